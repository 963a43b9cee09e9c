"""Exported detectors and segmenters: what they find is what PyTorch finds, at every size, and nothing else passes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.errors import UserError
from muntin.models import FAMILIES

pytest.importorskip("torchvision")
pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("onnxruntime")

from muntin.heads.graph import DetectorGraph  # noqa: E402
from muntin.heads.layers import GridPool  # noqa: E402
from muntin.runtime import ExportError, dense_engine, load  # noqa: E402
from muntin.runtime.detections import Candidates, compare, hold  # noqa: E402
from muntin.runtime.export import export  # noqa: E402
from muntin.runtime.pictures import Pictures, drawn  # noqa: E402
from muntin.runtime.verify import verify  # noqa: E402

PREPROCESSING: dict[str, Any] = {"size": [64, 96], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
PREPROCESSING |= {"resize": None, "fit": {"shorter": 64, "longer": 96}, "interpolation": "bilinear", "channels": "RGB"}
CLASSES = ["cup", "ball & <bat>", "Größe"]
SMALL: dict[str, dict[str, Any]] = {
    "retinanet": {"strides": (4, 8, 16), "anchor_octave": 2, "score_threshold": 0.005},
    "faster_rcnn": {"strides": (4, 8, 16), "fc": 16},
    "mask_rcnn": {"strides": (4, 8, 16), "fc": 16, "mask_channels": 8, "mask_convs": 1, "mask_pool": 4},
    "cascade_mask_rcnn": {
        **{"strides": (4, 8, 16), "fc": 16, "mask_channels": 8, "mask_convs": 1, "mask_pool": 4},
        **{"box_channels": 8, "box_convs": 1},
    },
    "upernet": {"auxiliary": 8},
    "semantic_fpn": {"width": 8},
}


def create(head: str, family: Any = FAMILIES[0], **changes: Any) -> Any:
    """A small model with two stages, whose head is drawn so that its outputs differ from place to place."""
    torch.manual_seed(0)
    rows = {field.name: getattr(family.TINY, field.name) for field in dataclasses.fields(family.TINY)}
    stages = len(family.TINY.depths)
    chosen = (0, 3) if family.__name__.endswith("rmt") else (0, 1)
    per_stage = {k: v for k, v in rows.items() if isinstance(v, tuple) and len(v) == stages and k != "kernels"}
    config = rows | {name: tuple(row[i] for i in chosen) for name, row in per_stage.items()}
    head_config = {"channels": 8, **SMALL[head], **changes}
    if "strides" in head_config and family.__name__.endswith("efficientvit"):
        head_config["strides"] = (16, 32, 64)
    model = muntin.create_dense(head, next(iter(family.VARIANTS)), 3, head_config=head_config, **config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) and not name.startswith("backbone"):
                gain = 0.1 if name.endswith(("boxes", "bbox_reg", "bbox_pred")) else 1.4
                module.weight.normal_(0, gain / module.weight[0].numel() ** 0.5)
    return model


def look(model: Any, size: tuple[int, int], seed: int = 0) -> Tensor:
    pictures = Pictures(None, PREPROCESSING)
    return pictures.prepare(pictures(1, size, seed))


def by_hand(model: Any, image: Tensor) -> dict[str, Tensor]:
    """What the graph of a detector finds, as its file names it."""
    masks = ("masks",) if model.task == "instance" else ()
    names = ("boxes", "scores", "labels", *masks, *(("proposals",) if hasattr(model, "rpn") else ()))
    with torch.no_grad():
        return dict(zip(names, DetectorGraph(model)(image), strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A Mask R-CNN, its file for any size and the report."""
    model = create("mask_rcnn")
    path = tmp_path_factory.mktemp("dense") / "model.onnx"
    return model, path, export(model, path, classes=CLASSES, preprocessing=PREPROCESSING, progress=False)


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_detectors_file_serves_any_height_and_width(exported: Any) -> None:
    model, path, report = exported
    assert len({(check.height, check.width) for check in report.checks}) == 4
    assert len(report.checks) == 12 and sum(check.objects > 0 for check in report.checks) >= 9
    assert report.max_error < 1e-5 and report.alone and "one image of any height and width" in str(report)
    assert all(check.error < 1e-5 for check in verify(model, load(path), [(47, 130), (128, 32)], [1]))


def test_a_detectors_file_finds_what_the_model_finds(exported: Any) -> None:
    model, path, _ = exported
    engine, image = load(path), look(model, (75, 91), 7)
    with torch.no_grad():
        wanted = model(image)[0]
    found = engine(image)
    assert list(found) == ["boxes", "scores", "labels", "masks", "proposals"]
    assert len(wanted["boxes"]) > 20 and len(wanted["labels"].unique()) > 1
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=1e-4)
    arrays = engine(image.numpy())
    assert isinstance(arrays["boxes"], np.ndarray) and np.array_equal(arrays["boxes"], found["boxes"].numpy())


def test_a_detectors_file_says_what_it_is(exported: Any) -> None:
    model, path, report = exported
    engine = load(path)
    assert (engine.name, engine.classes, engine.preprocessing["fit"]) == (model.name, CLASSES, PREPROCESSING["fit"])
    assert (engine.metadata["task"], engine.metadata["head"]) == ("instance", "mask_rcnn")
    assert engine.metadata["head_config"]["strides"] == [4, 8, 16] and engine.fixed is None
    assert json.loads(report.json())["alone"] is True
    with pytest.raises(UserError, match="one image at a time and got 2"):
        engine(torch.zeros(2, 3, 64, 64))


def test_an_engine_stands_in_for_the_model(exported: Any) -> None:
    model, path, _ = exported
    engine = dense_engine(path)
    assert not engine.training and (engine.task, engine.num_classes) == ("instance", 3)
    assert engine.head_config.nms == model.head_config.nms
    images = torch.cat([look(model, (60, 80), seed) for seed in (1, 2)])
    found = engine(images, [(60, 80), (40, 50)])
    with torch.no_grad():
        wanted = [model(images[:1])[0], model(images[1:, :, :40, :50])[0]]
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in other:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_a_file_of_one_size(head: str, tmp_path: Path) -> None:
    model, path = create(head), tmp_path / "model.xml"
    pytest.importorskip("openvino")
    report = export(model, path, preprocessing=PREPROCESSING, fixed=(1, 48, 64), progress=False)
    assert report.max_error < 1e-4 and report.fixed == (1, 48, 64) and len(report.checks) == 3
    found = dense_engine(path)(look(model, (40, 64)))[0]
    assert len(found["boxes"]) and found["boxes"][:, 3].max() <= 40


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_a_segmenters_file_serves_any_batch_height_and_width(head: str, tmp_path: Path) -> None:
    model, path = create(head), tmp_path / "model.onnx"
    report = export(model, path, classes=CLASSES, preprocessing=PREPROCESSING, progress=False)
    assert report.max_error < 1e-4 and len(report.checks) == 12 and not report.alone
    images = torch.randn(3, 3, 47, 130)
    with torch.no_grad():
        torch.testing.assert_close(dense_engine(path)(images), model(images), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rpartition(".")[2])
@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"])
def test_the_graph_of_a_detector_finds_what_the_detector_finds(head: str, family: Any) -> None:
    model, size = create(head, family), (70, 101)
    image = look(model, size, 3)
    found = by_hand(model, image)
    with torch.no_grad():
        wanted = model(image)[0]
    assert len(wanted["boxes"]) > 5
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert compare(model, found, image) < 1e-6


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_boxes_for_all_classes_and_for_each(class_agnostic: bool) -> None:
    model = create("faster_rcnn", class_agnostic=class_agnostic)
    image = look(model, (70, 101), 4)
    found = by_hand(model, image)
    with torch.no_grad():
        for key, values in model(image)[0].items():
            torch.testing.assert_close(found[key], values, rtol=0, atol=1e-5)


def altered(found: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    """What was found, with one thing wrong."""
    other = {key: values.clone() for key, values in found.items()}
    if change == "a box moved":
        other["boxes"][2, 0] -= 3
    elif change == "a score":
        other["scores"][2] += 0.01
    elif change == "a class":
        other["labels"][0] = (other["labels"][0] + 1) % 3
    elif change == "a box missing":
        other |= {key: torch.cat((other[key][:1], other[key][2:])) for key in ("boxes", "scores", "labels", "masks")}
    elif change == "a box twice":
        other |= {key: torch.cat((other[key][:1], other[key])) for key in ("boxes", "scores", "labels", "masks")}
    elif change == "the order":
        other |= {key: other[key].flip(0) for key in ("boxes", "scores", "labels", "masks")}
    elif change == "a mask":
        other["masks"][0, 0, 0] += 0.1
    elif change == "a mask of another class":
        other["masks"] = other["masks"].flip(0)
    elif change == "a proposal moved":
        other["proposals"][0, 0] += 3
    elif change == "a proposal missing":
        other["proposals"] = other["proposals"][1:]
    elif change == "nothing found":
        other |= {key: other[key][:0] for key in ("boxes", "scores", "labels", "masks")}
    elif change == "not a number":
        other["boxes"][0, 0] = torch.nan
    return other


CHANGES = ["a box moved", "a score", "a class", "a box missing", "a box twice", "the order", "a mask"]
CHANGES += ["a mask of another class", "a proposal moved", "a proposal missing", "nothing found", "not a number"]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_wrong_fails(change: str) -> None:
    model = create("mask_rcnn")
    image = look(model, (64, 96))
    found = by_hand(model, image)
    with torch.no_grad():
        assert compare(model, found, image) < 1e-6 and len(found["boxes"]) > 5
        try:
            error = compare(model, altered(found, change), image)
        except ExportError as refusal:
            told = ("none that PyTorch has", "lack", "overlaps", "falling order", "is the most", "not all numbers")
            assert any(part in str(refusal) for part in told)
        else:
            assert error > 1e-3


def candidates() -> Candidates:
    """Two boxes of equal scores over each other, and one apart."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 1, 10, 11], [50.0, 50, 60, 70]])
    return Candidates(boxes, torch.tensor([0.8, 0.8, 0.3]), torch.tensor([1, 1, 0]), torch.tensor(0.1), 0.5, 10)


def chosen(*places: int) -> dict[str, Tensor]:
    every = candidates()
    rows = list(places)
    return {"boxes": every.boxes[rows], "scores": every.scores[rows], "labels": every.groups[rows]}


def test_of_equals_either_may_be_kept_but_one_of_them_has_to_be() -> None:
    assert hold(chosen(0, 2), candidates(), "its boxes") == hold(chosen(1, 2), candidates(), "its boxes") == 0
    with pytest.raises(ExportError, match=r"boxes lack \(0.00, 0.00, 10.00, 10.00\) of 1 with score 0.8"):
        hold(chosen(2), candidates(), "its boxes")
    with pytest.raises(ExportError, match="overlaps another by 0.8"):
        hold(chosen(0, 1, 2), candidates(), "its boxes")
    with pytest.raises(ExportError, match="lack.*50.00"):
        hold(chosen(0), candidates(), "its boxes")


def test_the_limit_of_their_number_leaves_out_the_worst_alone() -> None:
    limited = dataclasses.replace(candidates(), most=1)
    assert hold(chosen(1), limited, "its boxes") == 0
    with pytest.raises(ExportError, match="lack"):
        hold(chosen(2), limited, "its boxes")
    with pytest.raises(ExportError, match="its boxes are 2; 1 is the most"):
        hold(chosen(0, 2), limited, "its boxes")


def test_a_file_that_finds_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from muntin.heads import graph

    model, path = create("faster_rcnn"), tmp_path / "model.onnx"
    best = graph.best

    def one_off(*given: Any) -> list[Tensor]:
        boxes, scores, labels = best(*given)
        return [boxes + 2, scores, labels]

    monkeypatch.setattr(graph, "best", one_off)
    with pytest.raises(ExportError, match="was not written: ONNX Runtime differs from PyTorch, of its boxes"):
        export(model, path, fixed=(1, 32, 48), progress=False)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- parts of it


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (16, 64), (13, 19)])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_pooling_to_a_grid_is_adaptive_average_pooling(side: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(GridPool(side)(x), nn.AdaptiveAvgPool2d(side)(x))


def test_pictures_are_drawn_or_given() -> None:
    one, other = drawn((40, 60), 0), drawn((40, 60), 1)
    assert one.shape == (3, 40, 60) and one.dtype == torch.uint8 and not torch.equal(one, other)
    given = Pictures([torch.full((3, 10, 20), 77, dtype=torch.uint8)], PREPROCESSING)
    seen = given(2, (30, 40))
    assert seen.shape == (2, 30, 40, 3) and bool((seen == 77).all())
    torch.testing.assert_close(given.prepare(seen)[0, :, 0, 0], (77 / 255 - torch.tensor([0.5, 0.4, 0.3])) / 0.2)
    with pytest.raises(UserError, match=r"pictures\[0\] is \(10, 20\)"):
        Pictures([torch.zeros(10, 20, dtype=torch.uint8)])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "float16"}, "no export of detectors in float16.*choose float32"),
        ({"fixed": (2, 32, 32)}, "takes one image at a time"),
        ({"batches": [1, 2]}, "takes one image at a time"),
        ({"name": "model.pt2"}, "no export of detectors to pt2; choose onnx or openvino"),
    ],
)
def test_what_a_detector_is_not_exported_to_is_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / options.pop("name", "model.onnx")
    with pytest.raises(UserError, match=told):
        export(create("retinanet"), path, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_no_dense_engine(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    tiny = muntin.create_model("swin_t", num_classes=3, dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    export(tiny, path, fixed=(1, 32, 32), progress=False)
    with pytest.raises(UserError, match="is no detector or segmenter"):
        dense_engine(path)
