"""`muntin export`: sources, targets, places, the table and the exit codes."""

import json
from typing import Any

import pytest
import torch

import muntin
from conftest import error_of
from muntin.cli import main
from muntin.errors import UserError
from muntin.run import Run, save_model
from muntin.runtime import ExportError, load, several, sources
from test_export import CLASSES, PREPROCESSING

pytest.importorskip("onnxruntime")

SMALL: dict[str, Any] = {"dims": (16, 16, 32), "depths": (1, 1, 1), "heads": (2, 2, 2), "key_dim": 8}
NONE = sources.Weights()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What training leaves of a small model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = muntin.create_model("efficientvit_m0", num_classes=3, **SMALL).eval()
    save_model(folder / "model.safetensors", model, classes=CLASSES, preprocessing=PREPROCESSING)
    return folder


def test_several_targets_in_one_table(run, tmp_path, capsys):
    pytest.importorskip("openvino")
    words = ["export", str(run), "--to", "onnx,pt2", "tensorrt", "--fixed", "1x64x48", "--json"]
    assert main([*words, str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == "target file precision size checks largest error bound result".split()
    assert [line.split()[-1] for line in shown[1:3]] == ["passed", "passed"]
    assert shown[3].endswith("not run") and "trtexec --onnx=model.engine.onnx" in shown[4]
    assert {"model.onnx", "model.pt2", "model.engine.onnx"} <= {path.name for path in run.iterdir()}
    rows = json.loads((tmp_path / "found.json").read_text())["exports"]
    assert [row["result"] for row in rows] == ["passed", "passed", "not run"]
    engine = load(run / "model.onnx")
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert error_of(engine(images), Run.open(run).model()(images)) < 1e-5
    assert engine.classes == CLASSES and engine.preprocessing["size"] == [64, 48]


def test_a_run_as_a_backbone(run, tmp_path):
    source = sources.open_source(run, NONE, backbone=True, out_indices=(0, 2))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = source.model(images)
        whole = Run.open(run).model().backbone(images)  # type: ignore[union-attr, operator]
    assert [m.shape[1] for m in maps] == [16, 32] and source.stem == "backbone" and source.classes is None
    assert error_of(maps[-1], whole[-1]) < 1e-5


def test_a_name_needs_weights(tmp_path, capsys):
    assert main(["export", "efficientvit_m0"]) == 2
    shown = capsys.readouterr().err
    assert "--weights FILE or a tag" in shown and "--pretrained" in shown and "--random-weights" in shown
    assert main(["export", "efficientvit_m9", "--random-weights"]) == 2
    assert "did you mean 'efficientvit_m" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no checkpoint at missing.pth"):
        sources.open_source("efficientvit_m0", sources.Weights("missing.pth"))
    with pytest.raises(UserError, match="there is no run"):
        sources.open_source(tmp_path / "missing", NONE)


def test_a_name_with_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = muntin.create_model("efficientvit_m0").eval()
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    source = sources.open_source("efficientvit_m0", sources.Weights(str(file)), (96, 64))
    assert source.stem == "efficientvit_m0" and source.preprocessing["size"] == [96, 64]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(images), model(images))
    torch.save(muntin.create_model("efficientvit_m0", num_classes=7).state_dict(), file)
    with pytest.raises(UserError, match="another last layer.*1000 classes"):
        sources.open_source("efficientvit_m0", sources.Weights(str(file)))


def test_where_files_go(run, tmp_path):
    source = sources.open_source(run, NONE)
    named = several.places(source, ["onnx", "openvino"], None)
    assert named == [run / "model.onnx", run / "model.xml"]
    assert several.places(source, [], str(tmp_path / "a.pt2")) == [tmp_path / "a.pt2"]
    assert several.places(source, ["onnx", "pt2"], str(tmp_path)) == [tmp_path / "model.onnx", tmp_path / "model.pt2"]
    with pytest.raises(UserError, match="is a file of onnx; for --to onnx,pt2 give a folder"):
        several.places(source, ["onnx", "pt2"], "a.onnx")
    with pytest.raises(UserError, match="ends in .onnx"):
        several.places(source, ["onnx"], "a.tflite")
    with pytest.raises(UserError, match="--to onx is unknown.*'onnx'"):
        several.places(source, ["onx"], None)


def test_a_failed_check_is_exit_code_1(run, monkeypatch, capsys):
    def export(model, path, **options):
        raise (UserError if path.suffix == ".xml" else ExportError)(f"{path} is wrong")

    monkeypatch.setattr(several, "export", export)
    assert main(["export", str(run), "--to", "onnx,openvino"]) == 1
    shown = capsys.readouterr().out
    assert "ONNX failed: " in shown and "OpenVINO refused: " in shown
    assert main(["export", str(run), "--to", "openvino"]) == 2
    assert "is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fixed", "224x224"], "--fixed 224x224: give numbers such as 1x224x224"),
        (["--size", "0"], "--size 0x0: give numbers such as 224x320"),
        (["--out-indices", "1,x", "--backbone"], "--out-indices 1,x"),
        (["--out-indices", "1"], "give --backbone too"),
        (["--weights", "x.pth"], "has weights of its own"),
        (["--precision", "fp8"], "precision 'fp8' is unknown"),
    ],
)
def test_wrong_options(run, words, told, capsys):
    assert main(["export", str(run), *words]) == 2
    assert told in capsys.readouterr().err
