"""Exported files at work: the same accuracy and predictions as the run that they were made from."""

import numpy as np
import pytest
from PIL import Image

import muntin
from muntin.cli import main
from muntin.errors import UserError
from muntin.run import Run, save_model
from muntin.tasks import evaluate, predict

pytest.importorskip("openvino")
PREPROCESSING = {
    "size": (32, 32),
    "resize": None,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.2, 0.2),
    "interpolation": "bicubic",
    "channels": "RGB",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two classes, ten images, and the run's file in three forms. Tracing takes long by stage, so one."""
    folder = tmp_path_factory.mktemp("exported")
    model = muntin.create_model("swin_t", num_classes=2, dim=16, depths=(2,), heads=(2,))
    save_model(folder / "run/model.safetensors", model, classes=["a", "b"], preprocessing=PREPROCESSING)
    pixels = np.random.default_rng(0)
    for name in "ab":
        (folder / "data" / name).mkdir(parents=True)
        for i in range(5):
            picture = Image.fromarray(pixels.integers(0, 255, (40, 50, 3), dtype=np.uint8))
            picture.save(folder / f"data/{name}/{i}.png")
    run = Run.open(folder / "run")
    for name, options in {
        "any.onnx": {},
        "any.xml": {},
        "bytes.onnx": {"with_preprocessing": True, "fixed": (3, 32, 32)},
    }.items():
        muntin.export(run.model(), folder / name, classes=run.classes, preprocessing=run.preprocessing,
                      progress=False, **options)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["any.onnx", "any.xml", "bytes.onnx"])
def test_an_exported_file_is_evaluated_and_predicts_as_its_run(place, name):
    data = str(place / "data")
    wanted, found = evaluate(place / "run", data), evaluate(place / name, data)
    assert found.confusion == wanted.confusion
    assert found.loss == pytest.approx(wanted.loss, abs=1e-5)
    for one, other in zip(predict(place / name, [data]), predict(place / "run", [data]), strict=True):
        assert one.classes == other.classes and one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_the_command_evaluates_a_file(place, capsys):
    assert main(["eval", str(place / "any.xml"), "--data", str(place / "data")]) == 0
    assert "10 images, top-1" in capsys.readouterr().out


def test_a_file_that_says_nothing_of_its_preprocessing_is_refused(place, tmp_path):
    model = Run.open(place / "run").model()
    muntin.export(model, tmp_path / "bare.onnx", sizes=[(32, 32)], batches=[1], progress=False)
    with pytest.raises(UserError, match="bare.onnx does not say how its images are prepared"):
        evaluate(tmp_path / "bare.onnx", str(place / "data"))
