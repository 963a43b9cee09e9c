"""Detectors and segmenters: every head on every kind of backbone, what is refused, and what they learn."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import muntin
from conftest import error_of
from muntin.errors import UserError
from muntin.models import FAMILIES

pytest.importorskip("torchvision")
pytest.importorskip("segmentation_models_pytorch")

from muntin.heads import HEADS, paste_masks  # noqa: E402

SMALL: dict[str, dict[str, Any]] = {
    "retinanet": {"channels": 16, "score_threshold": 0.0},
    "faster_rcnn": {"channels": 16, "fc": 32, "score_threshold": 0.0, "detections": 20},
    "mask_rcnn": {"channels": 16, "fc": 32, "mask_channels": 16, "score_threshold": 0.0, "detections": 20},
    "cascade_mask_rcnn": {
        **{"channels": 16, "fc": 32, "mask_channels": 16, "box_channels": 16},
        **{"score_threshold": 0.0, "detections": 20},
    },
    "upernet": {"channels": 16, "auxiliary": 16},
    "semantic_fpn": {"channels": 16, "width": 16, "auxiliary_weight": 0.5, "subpixels": 2},
}
DETECTORS = [head for head, task in HEADS.items() if task != "segment"]
SEGMENTERS = [head for head, task in HEADS.items() if task == "segment"]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rpartition(".")[2])


def create(head: str, family: Any = FAMILIES[0], classes: int = 4, **changes: Any) -> Any:
    torch.manual_seed(0)
    tiny = {field.name: getattr(family.TINY, field.name) for field in dataclasses.fields(family.TINY)}
    return muntin.create_dense(head, next(iter(family.VARIANTS)), classes, head_config=SMALL[head] | changes, **tiny)


def objects(size: tuple[int, int], *boxes: tuple[float, float, float, float]) -> dict[str, Tensor]:
    """A target of rectangles: of classes 0, 1, 2... in turn."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    rows = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": rows, "labels": torch.arange(len(boxes)) % 4, "masks": masks}


@families
@pytest.mark.parametrize("head", DETECTORS)
def test_detectors_learn_and_find_on_every_family(head: str, family: Any) -> None:
    model = create(head, family)
    assert (model.head_name, model.task, model.num_classes) == (head, HEADS[head], 4)
    images, size = torch.randn(2, 3, 75, 91), (75, 91)
    targets = [objects(size, (10, 12, 40, 44), (30, 20, 80, 60)), objects(size)]
    model.set_grad_checkpointing(True)
    losses = model.train()(images, targets=targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite() and total > 0
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    with torch.inference_mode():
        found = model.eval()(images, [size, (64, 50)])
    assert len(found) == 2 and len(found[1]["boxes"]) > 0
    for each, (height, width) in zip(found, [size, (64, 50)], strict=True):
        assert (each["boxes"] >= 0).all() and (each["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (each["scores"][:-1] >= each["scores"][1:]).all()
        assert each["labels"].min() >= 0 and each["labels"].max() < 4
        if model.task == "instance":
            assert each["masks"].shape == (len(each["boxes"]), 28, 28)
            assert paste_masks(each["masks"], each["boxes"], size).shape == (len(each["boxes"]), *size)


@families
@pytest.mark.parametrize("head", SEGMENTERS)
def test_segmenters_learn_and_label_on_every_family(head: str, family: Any) -> None:
    model = create(head, family)
    images, labels = torch.randn(2, 3, 75, 91), torch.randint(0, 4, (2, 75, 91))
    labels[:, :20] = 255
    losses = model.train()(images, targets=labels)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.inference_mode():
        assert model.eval()(images).shape == (2, 4, 75, 91)


def test_stages_are_taught_by_the_pixel_in_the_middle_of_a_token() -> None:
    """Deep supervision: half the sum of the cross entropies of the maps at strides 8, 16 and 32."""
    model = create("semantic_fpn").train()
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 4, (2, 64, 96))
    labels[:, :20] = 255
    maps = model.backbone(images)
    each = [
        torch.nn.functional.cross_entropy(classes(x), labels[:, s // 2 :: s, s // 2 :: s], ignore_index=255)
        for classes, x, s in zip(model.auxiliary, maps[1:], (8, 16, 32), strict=True)
    ]
    assert torch.allclose(model.learn(maps, labels)["auxiliary"], 0.5 * sum(each))
    assert len(muntin.optimize(model.eval()).auxiliary) == 0


def test_subpixels_are_told_apart_within_a_position() -> None:
    """Channel k * 4 + 2 * row + column of the classifier is class k at that row and column of the position's square."""
    model = create("semantic_fpn").eval()
    with torch.no_grad():
        model.classes.weight.zero_()
        model.classes.bias.copy_(torch.arange(16.0))
        logits = model.logits(model.backbone(torch.randn(1, 3, 64, 96)))
    squares = torch.arange(16.0).view(4, 2, 2)
    assert torch.equal(logits, squares.repeat(1, 16, 24)[None])


def test_importing_muntin_leaves_torchvision_alone() -> None:
    code = "import sys, muntin, muntin.heads; print('torchvision' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("head", ["mask_rcnn", "semantic_fpn"])
def test_optimised_copies_find_the_same(head: str, randomise: Any) -> None:
    model = randomise(create(head)).eval()
    image = torch.randn(1, 3, 75, 91)
    with torch.inference_mode():
        found, wanted = muntin.optimize(model)(image), model(image)
    if head == "semantic_fpn":
        assert error_of(found, wanted) < 1e-4
    else:
        assert all(torch.allclose(found[0][key], wanted[0][key], atol=1e-3) for key in wanted[0])


def test_wrong_names_and_values_are_refused() -> None:
    for arguments, options, told in [
        (("mask_rcn", "swin_t", 3), {}, "mask_rcnn"),
        (("mask_rcnn", "swin_tt", 3), {}, "swin_t"),
        (("mask_rcnn", "swin_t", 0), {}, "num_classes=0"),
        (("mask_rcnn", "swin_t", 3), {"head_config": {"anchor_scal": 4}}, "did you mean 'anchor_scale'"),
        (("mask_rcnn", "swin_t", 3), {"head_config": {"strides": (3, 6)}}, "maps at strides"),
        (("cascade_mask_rcnn", "swin_t", 3), {"head_config": {"ious": (0.5,)}}, "every stage"),
        (("cascade_mask_rcnn", "swin_t", 3), {"head_config": {"box_loss": "l2"}}, "giou"),
        (("retinanet", "swin_t", 3), {"head_config": {"coarser": "up"}}, "'pool'"),
        (("semantic_fpn", "swin_t", 3), {"head_config": {"subpixels": 0}}, "whole numbers from 1"),
        (("semantic_fpn", "swin_t", 3), {"head_config": {"finest": 3}}, "a power of 2"),
    ]:
        with torch.device("meta"), pytest.raises(UserError, match=told):
            muntin.create_dense(*arguments, **options)
