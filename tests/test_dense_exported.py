"""Exported detectors and segmenters at work: what the run that they were made from finds, by the same commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import muntin
from muntin.cli import main
from muntin.errors import UserError
from muntin.run import Run, save_model
from muntin.runtime import several, sources
from muntin.tasks import evaluate, predict, predict_dense

pytest.importorskip("torchvision")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

CLASSES = ["cup", "ball"]
PALETTE = [(9, 8, 7), (250, 0, 3)]
PREPROCESSING: dict[str, Any] = {
    **{"size": [48, 48], "resize": None, "fit": {"shorter": 48, "longer": 64}, "channels": "RGB"},
    **{"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2], "interpolation": "bilinear", "palette": PALETTE},
}
BACKBONE: dict[str, Any] = {"dim": 8, "depths": (1, 1), "heads": (1, 1), "window": 4}
HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {
        **{"strides": (4, 8), "channels": 8, "fc": 16, "mask_channels": 8, "mask_convs": 1, "mask_pool": 4},
        **{"anchor_scale": 4, "proposals": (50, 20), "detections": 9},
    },
    "semantic_fpn": {"channels": 8, "width": 8},
}
FILES = {
    "mask_rcnn": {"any.xml": {}, "one.onnx": {"fixed": (1, 64, 64)}},
    "semantic_fpn": {"any.onnx": {}, "bytes.xml": {"with_preprocessing": True, "fixed": (3, 48, 64)}},
}


def saved(head: str, folder: Path) -> Path:
    """A run of a small model that finds something."""
    torch.manual_seed(0)
    model = muntin.create_dense(head, "swin_t", 2, head_config=HEADS[head], **BACKBONE)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) and not name.startswith("backbone"):
                gain = 0.1 if name.endswith(("boxes", "bbox_reg", "bbox_pred")) else 1.4
                module.weight.normal_(0, gain / module.weight[0].numel() ** 0.5)
    save_model(folder / "model.safetensors", model, classes=CLASSES, preprocessing=PREPROCESSING)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of either kind with its files, and images of 48x64 and of 64x48 with annotations."""
    place = tmp_path_factory.mktemp("exported")
    for head, files in FILES.items():
        source = sources.open_source(saved(head, place / head), sources.Weights())
        for name, options in files.items():
            (outcome,) = several.export_several(source, [place / head / name], **options)  # type: ignore[arg-type]
            assert outcome.result == "passed"
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for part in ("images/test", "masks/test", "coco/test", "coco/annotations"):
        (place / part).mkdir(parents=True)
    for i in range(4):
        height, width = (60, 80) if i % 2 else (80, 60)
        picture = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).resize((width, height))
        for folder in ("images", "coco"):
            picture.save(place / folder / "test" / f"{i}.png")
        labels = draw.integers(0, 2, (height // 20, width // 20), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(labels).save(place / "masks/test" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for k in range(2):
            x, y, w, h = (int(v) for v in draw.integers((0, 0, 20, 20), (30, 30, 30, 30)))
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            fields = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": outline}
            annotations.append({"id": len(annotations), "image_id": i, "category_id": k} | fields)
    (place / "classes.txt").write_text("\n".join(CLASSES))
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (place / "coco/annotations/instances_test.json").write_text(json.dumps(document))
    return place


def found_by(path: Path, images: Path, out: Path, **views: Any) -> dict[str, Any]:
    predict_dense(path, [images], out, **views)
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.parametrize("views", [{}, {"scales": (0.75, 1.0), "flip": True}], ids=["plain", "views"])
def test_a_detectors_file_finds_and_scores_what_its_run_does(place: Path, tmp_path: Path, views: Any) -> None:
    folder, data = place / "mask_rcnn", str(place / "coco")
    wanted, found = (evaluate(path, data, **views) for path in (folder, folder / "any.xml"))
    assert found.objects == 8 and found.masks
    for name, value in wanted.figures.items():
        assert found.figures[name] == (value if value is None else pytest.approx(value, abs=1e-4)), name
    both = [
        found_by(path, place / "coco/test", tmp_path / str(i), **views)
        for i, path in enumerate((folder, folder / "any.xml"))
    ]
    assert both[0]["categories"] == both[1]["categories"] and len(both[0]["annotations"]) > 8
    assert len(both[0]["annotations"]) == len(both[1]["annotations"])
    for one, other in zip(both[0]["annotations"], both[1]["annotations"], strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.05)


def labels_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "labels").iterdir())]


@pytest.mark.parametrize("views", [{}, {"scales": (0.75, 1.0), "flip": True}, {"crop": 32}], ids=str)
def test_a_segmenters_file_labels_and_scores_what_its_run_does(place: Path, tmp_path: Path, views: Any) -> None:
    folder, data = place / "semantic_fpn", str(place)
    wanted, found = (evaluate(path, data, **views) for path in (folder, folder / "any.onnx"))
    assert found.miou == pytest.approx(wanted.miou, abs=2e-3) and found.classes == CLASSES
    both = [
        found_by(path, place / "images/test", tmp_path / str(i), **views)
        for i, path in enumerate((folder, folder / "any.onnx"))
    ]
    assert [row["label_map"] for row in both[0]["images"]] == [row["label_map"] for row in both[1]["images"]]
    for one, other in zip(labels_of(tmp_path / "0"), labels_of(tmp_path / "1"), strict=True):
        assert 0 < one.mean() < 1 and (one != other).mean() < 1e-3
    with Image.open(tmp_path / "1/labels/0.png") as label_map:
        assert label_map.getpalette()[:6] == [value for colour in PALETTE for value in colour]


def test_a_file_of_bytes_and_of_one_size(place: Path) -> None:
    """Images of 48x64 are what it is for, those of 64x48 are seen through a window."""
    folder = place / "semantic_fpn"
    wanted = evaluate(folder, str(place), crop=48)
    found = evaluate(folder / "bytes.xml", str(place), crop=48)
    assert found.miou == pytest.approx(wanted.miou, abs=0.02) and found.pixels == wanted.pixels
    with pytest.raises(UserError, match="was exported for 48x64 alone.*leave --crop 50 out"):
        evaluate(folder / "bytes.xml", str(place), crop=50)
    assert evaluate(folder / "bytes.xml", str(place)).pixels == wanted.pixels


def test_a_detectors_file_of_one_size(place: Path) -> None:
    path, data = place / "mask_rcnn/one.onnx", str(place / "coco")
    assert 0 <= evaluate(path, data).score <= 1
    with pytest.raises(UserError, match="one.onnx was exported for batch 1 at 64x64 and got batch 1 at 96x"):
        evaluate(path, data, scales=(2.0,))


def test_the_commands_take_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector, segmenter = str(place / "mask_rcnn/any.xml"), str(place / "semantic_fpn/any.onnx")
    assert main(["eval", detector, "--data", str(place / "coco"), "--json", str(tmp_path / "eval.json")]) == 0
    assert "4 images, 8 objects" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["classes"] == CLASSES
    assert main(["predict", segmenter, str(place / "images/test"), "--out", str(tmp_path / "maps"), "--flip"]) == 0
    assert "4 images" in capsys.readouterr().out and len(labels_of(tmp_path / "maps")) == 4

    def refused(told: str, *words: str) -> None:
        assert main(list(words)) == 2
        assert told in capsys.readouterr().err

    images = str(place / "images/test")
    refused("a sliding window (--crop) is for segmentation", "eval", detector, "--crop", "32")
    refused("does not say which images it was trained on", "eval", segmenter)
    refused("--top 3 is for classifiers", "predict", detector, images, "--top", "3")
    refused("is of task=instance and no classifier", "predict", detector, images, "--engine", "ray", "--out", "x")
    with pytest.raises(UserError, match="is of task=segment and no classifier"):
        predict(segmenter, [images])


def test_a_file_that_says_too_little_is_refused(place: Path, tmp_path: Path) -> None:
    model = Run.open(place / "semantic_fpn").model()
    options: dict[str, Any] = {"fixed": (1, 32, 32), "progress": False}
    muntin.export(model, tmp_path / "bare.onnx", classes=CLASSES, **options)
    with pytest.raises(UserError, match=r"does not say how its images are prepared \(fit, mean, std\)"):
        evaluate(tmp_path / "bare.onnx", str(place))
    muntin.export(model, tmp_path / "nameless.onnx", preprocessing=PREPROCESSING, **options)
    with pytest.raises(UserError, match="does not name its classes"):
        predict_dense(tmp_path / "nameless.onnx", [place / "images"], tmp_path / "out")


def test_a_classifier_is_sent_elsewhere(tmp_path: Path) -> None:
    model = muntin.create_model("swin_t", num_classes=2, **BACKBONE)
    preprocessing = {key: value for key, value in PREPROCESSING.items() if key not in ("fit", "palette")}
    save_model(tmp_path / "model.safetensors", model, classes=CLASSES, preprocessing=preprocessing)
    with pytest.raises(UserError, match="is a classifier; call muntin.tasks.predict"):
        predict_dense(tmp_path, [tmp_path], tmp_path / "out")
