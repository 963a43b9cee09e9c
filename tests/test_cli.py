"""The command: the main job in one go, its help, its exit codes."""

import csv
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

import muntin
from muntin import cli
from muntin.cli import COMMANDS, main
from muntin.errors import UserError
from muntin.run import Run
from muntin.tasks import training
from muntin.tasks.callbacks import duration
from muntin.tasks.fitting import Interrupted
from test_data import folder_of

TINY = [
    "--set=model.dim=8",
    "--set=model.depths=[1,1]",
    "--set=model.heads=[1,2]",
    "--set=model.window=[4,4]",
    "--set=model.patch=4",
    "--set=drop_path=0.1",
    "--set=workers=0",
    "--size=16",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits by the command itself."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--data", "digits", "--out", str(folder), "--epochs", "1", *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("photos"), {"cat": 12, "dog": 12}, size=(20, 30))


def test_train_leaves_a_whole_run(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"model", "test_accuracy", "parameters", "latency_ms"} <= metrics.keys()
    assert metrics["latency_ms"] > 0 and 0 <= metrics["test_accuracy"] <= 1
    wanted = ["config.yaml", "split.json", "history.csv", "model.safetensors", "checkpoints/best.ckpt"]
    assert all((run / name).is_file() for name in [*wanted, "checkpoints/last.ckpt"])


def test_eval_prints_the_test_accuracy_and_writes_json(run, tmp_path, capsys):
    assert main(["eval", str(run), "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["top1"] == json.loads((run / "metrics.json").read_text())["test_accuracy"]
    assert f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}" in shown and "calibration error" in shown
    assert sum(map(sum, found["confusion"])) == found["images"] == sum(row["images"] for row in found["per_class"])
    correct = sum(found["confusion"][i][i] for i in range(10))
    assert correct / found["images"] == found["top1"] and found["top5"] >= found["top1"]


def test_predict_agrees_with_eval_on_the_held_out_files(run, tmp_path, capsys):
    out = tmp_path / "predictions.csv"
    assert main(["predict", str(run), str(run / "held_out"), "--out", str(out)]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class1"] == row["label"] for row in rows)
    metrics = json.loads((run / "metrics.json").read_text())
    assert right / len(rows) == metrics["test_accuracy"]
    for row in rows[:5]:
        shares = [float(row[f"probability{i}"]) for i in range(1, 6)]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.00001
    assert f"{len(rows)} images" in capsys.readouterr().out


def test_predict_reports_a_broken_image_and_goes_on(run, tmp_path, capsys):
    good = sorted((run / "held_out").glob("*/*.png"))[:2]
    broken = tmp_path / "broken, with a comma.png"
    broken.write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "list.txt").write_text(f"{good[0]}\n\n{broken}\n{tmp_path / 'absent.png'}\n{good[1]}\n")
    out = tmp_path / "out.csv"
    assert main(["predict", str(run), str(tmp_path / "list.txt"), "--out", str(out), "--top", "2"]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(good[0]), str(broken), str(tmp_path / "absent.png"), str(good[1])]
    assert [bool(row["error"]) for row in rows] == [False, True, True, False]
    assert rows[1]["class1"] == "" and rows[0]["class2"] and "class3" not in rows[0]
    errors = capsys.readouterr().err
    assert "broken, with a comma.png is damaged" in errors and "absent.png does not exist" in errors
    assert main(["predict", str(run), str(broken)]) == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err


def test_predict_without_a_file_prints(run, capsys):
    image = sorted((run / "held_out" / "3").glob("*.png"))[0]
    assert main(["predict", str(run), str(image), "--top", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{image}  ")


def test_export_writes_a_verified_file_with_metadata(run, capsys):
    onnx = pytest.importorskip("onnx")
    assert main(["export", str(run), "--to", "onnx"]) == 0
    stored = onnx.load(run / "model.onnx")
    names = {entry.key: entry.value for entry in stored.metadata_props}
    assert any("bicubic" in value for value in names.values())
    assert str(run / "model.onnx") in capsys.readouterr().out


def test_bench_fills_in_the_latency(run, tmp_path, capsys):
    arguments = ["bench", str(run), "--batch", "1", "--rounds", "2", "--json", str(tmp_path / "bench.json")]
    assert main(arguments) == 0
    assert str(run) in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]


def test_report_writes_one_page(run, capsys):
    assert main(["report", str(run)]) == 0
    path = run / "report.html"
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    metrics = json.loads((run / "metrics.json").read_text())
    assert table["report"].strip() == str(path)
    assert table["test accuracy"].strip() == f"{metrics['test_accuracy']:.2%}"
    page = path.read_text(encoding="utf-8")
    assert "swin_free_digits" in page and "<script src=" not in page and "<link" not in page


def test_a_folder_trains_by_a_recipe_and_is_evaluated(photos, tmp_path, monkeypatch, capsys):
    """The ImageNet recipe for a step, an image that is skipped, evaluation on the run's own split and a folder."""
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    (photos / "dog" / "bad.png").write_bytes(b"")
    out = tmp_path / "run"
    arguments = ["--recipe", "in1k/swin_t", "--data", str(photos), "--out", str(out), *TINY]
    assert main(["train", *arguments, "--epochs", "1"]) == 2
    assert "bad.png is empty" in capsys.readouterr().err and not out.exists()
    assert main(["train", *arguments, "--epochs", "1", "--set", "on_bad_image=skip"]) == 0
    (photos / "dog" / "bad.png").unlink()
    split = json.loads((out / "split.json").read_text())
    assert split["classes"] == ["cat", "dog"] and "dog/bad.png" not in split["train"] + split["val"] + split["test"]
    assert sum(len(split[name]) for name in ("train", "val", "test")) == 24
    assert split["preprocessing"]["resize"] == round(16 * 256 / 224)
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    assert "test: 4 images" in capsys.readouterr().out
    assert main(["eval", str(out), "--data", str(photos)]) == 0
    shown = capsys.readouterr().out
    assert "all: 24 images" in shown and "top-5" not in shown
    assert main(["predict", str(out), str(photos / "cat")]) == 0


def test_eval_takes_a_foreign_checkpoint_with_its_models_name(photos, tmp_path, capsys):
    model = muntin.create_model("swin_t", num_classes=2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert main(["eval", str(tmp_path / "w.safetensors"), "--data", str(photos)]) == 2
    assert "--model" in capsys.readouterr().err
    arguments = ["eval", str(tmp_path / "w.safetensors"), "--data", str(photos), "--model", "swin_t", "--size", "32"]
    assert main(arguments) == 0
    assert "24 images" in capsys.readouterr().out
    folder_of(tmp_path / "three", {"a": 1, "b": 1, "c": 1})
    arguments[3] = str(tmp_path / "three")
    assert main(arguments) == 2
    assert "another number of classes than the 3 class folders" in capsys.readouterr().err


def test_models_reads_the_table(capsys):
    assert main(["models", "swin_free_b*"]) == 0
    shown = capsys.readouterr().out
    assert "87,938,464" in shown and "16.080" in shown and "swin_t" not in shown
    assert main(["models", "swin_fre_t"]) == 2
    assert "did you mean 'swin_free_t'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_names_the_subcommand(name, capsys):
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: muntin {name} " in shown
    assert shown.endswith(COMMANDS[name][2]) and "null" not in shown


def test_the_command_lists_its_subcommands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in COMMANDS) and "example:" in shown


# Exit codes


def test_wrong_arguments_exit_2(capsys):
    assert main(["modles"]) == 2
    assert "did you mean 'models'" in capsys.readouterr().err
    assert main(["train", "--epoch", "3"]) == 2  # no abbreviations: they break when an option is added
    assert main(["export"]) == 2
    assert main([]) == 2


def test_an_error_in_a_model_is_ours_and_exits_1(run, monkeypatch, capsys):
    def forward(self, image):
        raise RuntimeError("inside the model")

    monkeypatch.setattr(muntin.models.classifier.Classifier, "forward", forward)
    assert main(["eval", str(run)]) == 1
    shown = capsys.readouterr().err
    assert "internal error: RuntimeError: inside the model" in shown and "Traceback" not in shown
    assert main(["--debug", "eval", str(run)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_in_a_model_while_training_exits_1(tmp_path, monkeypatch, capsys):
    def forward(self, image):
        raise RuntimeError("inside the model")

    monkeypatch.setattr(muntin.models.classifier.Classifier, "forward", forward)
    assert main(["train", "--out", str(tmp_path / "run"), *TINY]) == 1
    assert "internal error: RuntimeError: inside the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("x=0: give 1"), 2, "muntin: x=0: give 1"),
        (UserError("two\nlines"), 2, "muntin: two lines"),
        (KeyboardInterrupt(), 130, "--resume"),
        (Interrupted("stopped; --resume", 15), 143, "stopped; --resume"),
        (ModuleNotFoundError("no", name="lightning.pytorch"), 2, 'pip install "muntin[train]"'),
        (ModuleNotFoundError("no", name="onnxruntime"), 2, 'pip install "muntin[export]"'),
        (ModuleNotFoundError("no", name="muntin.typo"), 1, "internal error"),
        (ValueError("ours"), 1, "internal error: ValueError: ours"),
    ],
)
def test_exit_codes(error, code, words, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["models"]) == code
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and "Traceback" not in shown


def test_a_missing_extra_is_one_line(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("muntin", "lightning")]:
        if name.startswith("lightning") or name in ("muntin.tasks.training", "muntin.tasks.base"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert 'pip install "muntin[train]"' in capsys.readouterr().err


def test_durations():
    assert [duration(s) for s in (3.4, 65, 7500)] == ["3 s", "1 min 05 s", "2 h 05 min"]


def test_help_and_the_list_of_models_load_nothing_heavy():
    """What they import beyond torch; the next test times it."""
    script = (
        "import sys; from muntin.cli import main; main(['--help']); main(['models']);"
        "heavy = {'lightning', 'torchvision', 'timm', 'torchmetrics', 'sklearn', 'PIL', 'onnx', 'torch._dynamo'};"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


# Examples


@pytest.mark.parametrize("name", ["train_on_a_folder", "backbone_features"])
def test_examples_run(name, tmp_path, photos):
    script = os.path.join(os.path.dirname(__file__), "..", "examples", f"{name}.py")
    arguments = [str(photos), str(tmp_path / "run"), "--quick"] if name == "train_on_a_folder" else []
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if name == "train_on_a_folder":
        assert Run.open(tmp_path / "run").classes == ["cat", "dog"] and "top-1" in done.stdout
    else:
        assert done.stdout.count("stride") >= 4
