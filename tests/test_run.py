"""The run folder: whole files or none, and a model that its weights file alone rebuilds."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

import muntin
from muntin.errors import UserError
from muntin.run import Run, atomic_write, save_model

TINY = {"dim": 8, "depths": (1, 1), "heads": (1, 2), "window": (4, 4), "patch": 4}
PREPROCESSING = {
    "size": [16, 16],
    "resize": None,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "channels": "RGB",
}


@pytest.fixture
def saved(tmp_path):
    """A folder with the weights of a tiny model, and that model."""
    torch.manual_seed(0)
    model = muntin.create_model("swin_t", num_classes=3, **TINY).eval()
    save_model(tmp_path / "model.safetensors", model, classes=["a", "b", "c"], preprocessing=PREPROCESSING)
    return tmp_path, model


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = atomic_write(tmp_path / "file.txt", b"earlier")

    def half(partial):
        partial.write_bytes(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        atomic_write(path, half)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_function_writes_to_the_folder_of_the_file_with_its_suffix(tmp_path):
    seen = []

    def write(partial):
        seen.append(partial)
        partial.write_bytes(b"new")

    path = atomic_write(tmp_path / "deep" / "file.onnx", write)
    assert path.read_bytes() == b"new"
    assert seen[0].parent == path.parent and seen[0].suffix == ".onnx" and seen[0] != path


def test_files_get_the_permissions_of_ordinary_files(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(atomic_write(tmp_path / "x", b"1").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_unwritable_place_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*file.*--out"):
        atomic_write(tmp_path / "file" / "metrics.json", b"{}")


def test_a_weights_file_alone_rebuilds_the_model(saved):
    folder, model = saved
    run = Run.open(folder / "model.safetensors")
    assert (run.name, run.classes, run.num_classes) == ("swin_t", ["a", "b", "c"], 3)
    assert run.model_config["depths"] == (1, 1)
    assert run.preprocessing == PREPROCESSING
    images = torch.randn(2, 3, 16, 16)
    rebuilt = run.model()
    assert not rebuilt.training
    assert torch.equal(rebuilt(images), model(images))


def test_the_transform_is_that_of_the_preprocessing(saved):
    from PIL import Image

    image = Image.new("L", (40, 20), 255)
    tensor = Run.open(saved[0]).transform()(image)
    torch.testing.assert_close(tensor, torch.full((3, 16, 16), 2.5))


def test_metrics_keep_what_others_wrote(saved):
    first, second = Run.open(saved[0]), Run.open(saved[0])
    first.update_metrics(test_accuracy=0.5)
    second.update_metrics(latency_ms=1.25)
    assert json.loads((saved[0] / "metrics.json").read_text()) == {"test_accuracy": 0.5, "latency_ms": 1.25}
    assert Run.open(saved[0]).metrics["test_accuracy"] == 0.5


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no run at .*nowhere.*muntin train"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no checkpoint \(model\.safetensors is missing\)"):
        Run.open(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has not finished.*--resume"):
        Run.open(tmp_path)


def test_files_that_are_not_ours_are_refused(tmp_path, saved):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((saved[0] / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"damaged\.safetensors is not a readable safetensors file"):
        Run.open(damaged)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match=r"foreign\.safetensors does not say which model.*--model"):
        Run.open(foreign)


def test_weights_that_do_not_fit_their_description_are_refused(saved):
    folder, _ = saved
    other = muntin.create_model("swin_t", num_classes=3, **TINY | {"dim": 16})
    described = json.loads(json.dumps(Run.open(folder).model_config))
    save_model(folder / "other.safetensors", other, classes=["a", "b", "c"], preprocessing=PREPROCESSING)
    run = Run.open(folder / "other.safetensors")
    run.model_config = {key: tuple(v) if isinstance(v, list) else v for key, v in described.items()}
    with pytest.raises(UserError, match=r"other\.safetensors does not fit the model 'swin_t'"):
        run.model()


def test_a_weights_file_cannot_choose_which_module_is_imported(saved):
    run = Run.open(saved[0])
    run.name = "somewhere.evil"
    with pytest.raises(UserError, match=r"not part of Muntin.*load_checkpoint"):
        run.model()
