"""Bad input to the command: one line that names the thing and the remedy, exit code 2, nothing left behind.

Broken images one by one are in test_data.py, full disks and pickles while training in test_train.py, errors of
ours in test_cli.py.
"""

import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import muntin
from muntin.cli import main
from muntin.errors import UserError
from muntin.run import save_model
from muntin.tasks.recipes import read_config
from muntin.tasks.settings import Settings, parse_sets, settings_from
from test_data import folder_of

TINY = [
    "--set=model.dim=8",
    "--set=model.depths=[1,1]",
    "--set=model.heads=[1,2]",
    "--set=model.window=[4,4]",
    "--set=model.patch=4",
    "--model=swin_free_digits",
    "--set=drop_path=0.1",
    "--set=workers=0",
    "--size=16",
    "--epochs=1",
]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs the command, which is to refuse in one line with all of these words and leave nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, words):
        before = sorted(tmp_path.rglob("*"))
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert code == 2, shown.err
        lines = shown.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("muntin: ") and "Traceback" not in shown.err + shown.out
        for word in words:
            assert str(word) in lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def data(tmp_path):
    return folder_of(tmp_path / "data", {"cat": 6, "dog": 6})


def train(data, *more):
    return ["train", "--data", data, "--out", "run", *TINY, *more]


# Folders of images


def test_no_such_folder(refused, tmp_path):
    refused(*train(tmp_path / "nowhere"), words=["there is no data at", "nowhere", "give a folder"])


def test_a_file_instead_of_a_folder(refused, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused(*train(tmp_path / "file"), words=["file is a file", "sub-folder of images for each class"])


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "data").mkdir()
    refused(*train(tmp_path / "data"), words=["data has no class folders", "data/CLASS/*.jpg"])


def test_a_folder_with_one_class(refused, tmp_path):
    folder_of(tmp_path / "data", {"cat": 3})
    refused(*train(tmp_path / "data"), words=["one class only (cat)", "add another folder"])


def test_a_class_without_images(refused, data):
    (data / "empty").mkdir()
    (data / "empty" / "notes.txt").write_text("")
    refused(*train(data), words=["the class 'empty' has no images", "remove its folder"])


def test_no_images_at_all(refused, tmp_path):
    folder_of(tmp_path / "data", {"cat": 0, "dog": 0})
    refused(*train(tmp_path / "data"), words=["data has no images", ".png"])


def test_a_head_that_needs_a_teacher(refused, data):
    refused("train", "--data", data, "--out", "run", "--model=efficientvit_m0", "--set=model.distilled=true",
            words=["second head (fc_distilled)", "--set teacher=timm:", "leave out the setting"])  # fmt: skip


def test_train_without_val(refused, data, tmp_path):
    data.rename(tmp_path / "train")
    refused(*train(tmp_path), words=["train but no val", f"--data {tmp_path / 'train'}"])


def test_a_class_in_val_alone(refused, tmp_path):
    folder_of(tmp_path / "data" / "train", {"cat": 3, "dog": 3})
    folder_of(tmp_path / "data" / "val", {"cat": 3, "dgo": 3})
    refused(*train(tmp_path / "data"), words=["val/dgo is a class that", "did you mean 'dog'", "rename or remove"])


def test_too_few_images_for_a_validation_split(refused, tmp_path):
    folder_of(tmp_path / "data", {"cat": 1, "dog": 1})
    refused(*train(tmp_path / "data"), words=["too few images", "at least three"])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("zero.png", b"", "zero.png is empty (zero bytes)"),
        ("text.jpg", b"hello", "text.jpg is not a readable image"),
        ("cut.png", None, "cut.png is damaged"),
    ],
)
def test_a_broken_image_in_the_data(refused, data, name, content, words):
    whole = (data / "cat" / "0.png").read_bytes()
    (data / "dog" / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(*train(data), words=["1 of 13 images cannot be used", words, "--set on_bad_image=skip"])


def test_several_broken_images_are_counted(refused, data):
    for number in range(5):
        (data / "dog" / f"zero{number}.png").write_bytes(b"")
    refused(*train(data), words=["5 of 17 images", "zero0.png", "zero2.png", "and 2 more"])


def test_a_decompression_bomb_in_the_data(refused, data, monkeypatch):
    Image.new("L", (40, 40)).save(data / "dog" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)
    refused(*train(data), words=["huge.png is too large to decode safely", "make it smaller or remove it"])


def test_images_of_every_mode_are_trained_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr("muntin.tasks.training.measure_latency", lambda run: None)
    for mode, suffix in [("L", "png"), ("1", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg")]:
        Image.new("L", (20, 16), 99).convert(mode).save(data / "cat" / f"{mode}.{suffix}")
    Image.new("I;16", (20, 16), 30000).save(data / "cat" / "sixteen.png")
    turned = Image.new("RGB", (20, 16))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(data / "cat" / "turned.jpg", exif=exif)
    assert main([str(a) for a in train(data, "--out", tmp_path / "run")]) == 0


# Settings


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--epochs", "-1"], ["epochs=-1", "at least 1"]),
        (["--epochs", "0"], ["epochs=0", "at least 1"]),
        (["--epochs", "many"], ["epochs='many'", "whole number"]),
        (["--epochs", "2.5"], ["epochs='2.5'", "whole number"]),
        (["--size", "0"], ["size=0", "at least 1"]),
        (["--seed", "-3"], ["seed=-3", "at least 0"]),
        (["--set", "lr=0"], ["lr=0", "positive"]),
        (["--set", "lr=nan"], ["lr=nan", "positive"]),
        (["--set", "batch_size=0"], ["batch_size=0", "at least 1"]),
        (["--set", "label_smoothing=1"], ["label_smoothing=1", "from 0 up to"]),
        (["--set", "precision=fp8"], ["precision='fp8'", "auto, bf16, 16, 32"]),
        (["--set", "augment=distrot"], ["augment='distrot'", "did you mean 'distort'"]),
        (["--set", "on_bad_image=ignore"], ["on_bad_image='ignore'", "error, skip"]),
        (["--set", "learning=1"], ["there is no setting 'learning'", "label_smoothing", "model.FIELD"]),
        (["--set", "epoch=1"], ["there is no setting 'epoch'", "did you mean 'epochs'"]),
        (["--set", "lr"], ["--set lr", "key=value"]),
        (["--set", "lr=[1"], ["--set lr=[1", "not valid YAML"]),
        (["--set", "lr=[1]"], ["lr=[1]", "a number"]),
        (["--set", "weights=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--config", "imagnet"], ["no configuration file imagnet", "give a YAML file of settings"]),
        (["--recipe", "in1k/swim_t"], ["no recipe 'in1k/swim_t'", "did you mean 'in1k/swin_t'", "--recipe list"]),
    ],
)
def test_wrong_settings(refused, data, arguments, words):
    refused(*train(data, *arguments), words=words)


@pytest.mark.parametrize(
    "text, words",
    [("- a\n- b\n", "not a YAML mapping"), ("lr: [1\n", "cannot read"), ("lrr: 1\n", "did you mean 'lr'")],
)
def test_a_wrong_configuration_file(refused, data, tmp_path, text, words):
    (tmp_path / "wrong.yaml").write_text(text)
    refused(*train(data, "--config", "wrong.yaml"), words=[words])


def test_a_configuration_file_is_overruled_by_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nepochs: 7\nmodel.window: [4, 8]\n")
    settings = settings_from(read_config(tmp_path / "c.yaml"), parse_sets(["epochs=3"]))
    assert (settings.lr, settings.epochs, settings.model_config) == (1e-3, 3, {"window": (4, 8)})
    assert settings_from(settings.flat()) == settings


def test_settings_in_python_are_checked_too():
    with pytest.raises(UserError, match="mixup=-1"):
        Settings(mixup=-1.0)


# Models


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "swin_free_tt"], ["swin_free_tt", "did you mean 'swin_free_t'"]),
        (["--set", "model.windw=4"], ["windw", "did you mean 'window'"]),
        (["--set", "model.dim=9", "--set", "model.heads=[2,2]"], ["dim=9", "heads"]),
        (["--set", "model.window=0"], ["window=0", "at least 1"]),
        (["--set", "model.window=[4,4,4]"], ["window=(4, 4, 4)", "2 stages"]),
        (["--set", "model.norm=group"], ["norm='group'", "layer"]),
    ],
)
def test_impossible_models(refused, data, arguments, words):
    refused(*train(data, *arguments), words=words)


# Output


def test_an_output_folder_below_a_file(refused, data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused(*train(data, "--out", tmp_path / "file" / "run"), words=["cannot write", "file/run", "--out"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_output_folder(refused, data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(*train(data, "--out", tmp_path / "locked" / "run"), words=["cannot write", "locked", "--out"])


def test_an_output_that_is_a_run_already(refused, data, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(*train(data), words=["run holds a run already", "--resume", "--out"])


# Runs and checkpoints


@pytest.mark.parametrize("command", ["eval", "predict", "export", "report"])
def test_a_run_folder_without_a_checkpoint(refused, tmp_path, command):
    (tmp_path / "run").mkdir()
    more = [tmp_path] if command == "predict" else []
    refused(command, tmp_path / "run", *more, words=["model.safetensors is missing", "muntin train --out"])


@pytest.mark.parametrize("command", ["eval", "predict", "export", "report"])
def test_no_run_at_all(refused, tmp_path, command):
    more = [tmp_path] if command == "predict" else []
    refused(command, tmp_path / "nowhere", *more, words=["there is no run at", "nowhere"])


@pytest.fixture
def weights(tmp_path):
    """Weights of a tiny model for cats and dogs, without a run around them."""
    model = muntin.create_model("swin_t", 2, dim=8, depths=(1, 1), heads=(1, 2), window=4)
    preprocessing = {
        "size": [16, 16],
        "resize": None,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "channels": "RGB",
    }
    return save_model(tmp_path / "w" / "w.safetensors", model, classes=["cat", "dog"], preprocessing=preprocessing)


def test_eval_without_data(refused, weights):
    refused("eval", weights, words=["does not say which images", "--data FOLDER"])


def test_eval_on_other_classes(refused, weights, tmp_path):
    folder_of(tmp_path / "data", {"cat": 1, "dgo": 1})
    refused("eval", weights, "--data", tmp_path / "data", words=["class 'dgo'", "did you mean 'dog'", "cat, dog"])


def test_eval_on_a_broken_image(refused, weights, data):
    (data / "dog" / "zero.png").write_bytes(b"")
    refused("eval", weights, "--data", data, words=["zero.png is empty"])


def test_eval_of_another_models_checkpoint(refused, weights, data):
    refused("eval", weights, "--data", data, "--model", "swin_s", words=["w.safetensors"])


def test_a_pickle_with_code_is_refused_and_not_run(refused, data, tmp_path):
    class Exploding:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"model": Exploding()}, tmp_path / "evil.pth")
    refused("eval", "evil.pth", "--data", data, "--model", "swin_t", words=["evil.pth"])
    refused(*train(data, "--set", "weights=evil.pth"), words=["evil.pth"])
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Exploding()))
    refused("eval", "plain.pkl", "--data", data, "--model", "swin_t", words=["plain.pkl"])


def test_a_file_that_is_no_checkpoint(refused, data, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused("eval", "x.safetensors", "--data", data, "--model", "swin_t", words=["x.safetensors"])
    refused("predict", "x.safetensors", data, words=["x.safetensors does not say which model", "--model"])
    refused("eval", "absent.pth", "--data", data, "--model", "swin_t", words=["absent.pth", "check the path"])


def test_nothing_to_predict(refused, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("predict", weights, tmp_path / "empty", words=["no images found in", "empty", "give files"])
    (tmp_path / "list.txt").write_text("\n")
    refused("predict", weights, "list.txt", words=["no images found in list.txt"])
    refused("predict", weights, tmp_path, "--top", "0", words=["top=0", "at least 1"])


def test_shards_need_an_engine(refused, weights, data):
    refused("predict", weights, data, "a.tar", words=["a.tar is a shard", "--engine ray"])


def test_predictions_to_an_unwritable_place(refused, weights, data, tmp_path):
    refused("predict", weights, data, "--out", data / "cat" / "0.png" / "x.csv", words=["cannot write", "x.csv"])


def test_export_to_an_unknown_format(refused, weights):
    refused("export", weights, "--to", "onx", words=["--to onx", "did you mean 'onnx'"])


def test_bench_of_an_unknown_model(refused):
    refused("bench", "swin_free_tt", words=["swin_free_tt", "did you mean 'swin_free_t'"])
