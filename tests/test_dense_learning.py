"""What detectors and segmenters learn: a scene by heart, sampling, box coding and losses by hand, empty images."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import muntin
from muntin.errors import UserError
from muntin.models import FAMILIES

pytest.importorskip("torchvision")
pytest.importorskip("segmentation_models_pytorch")

from torchvision.ops import box_iou  # noqa: E402

from muntin.heads import paste_masks  # noqa: E402
from muntin.heads.boxes import Assigner, best, box_loss, coder  # noqa: E402
from muntin.heads.pooling import RoiPool
from muntin.heads.pyramid import Anchors  # noqa: E402
from muntin.heads.rcnn import CASCADE  # noqa: E402
from muntin.heads.roi import mask_targets  # noqa: E402

TINY = {field.name: getattr(FAMILIES[0].TINY, field.name) for field in dataclasses.fields(FAMILIES[0].TINY)}
FEW: dict[str, Any] = {"channels": 24, "strides": (4, 8, 16, 32), "anchor_scale": 4, "score_threshold": 0.3}
REGIONS = FEW | {"samples": 32, "positive": 0.5, "rpn_samples": 64, "proposals": (48, 48), "fc": 48, "mask_convs": 1}
REGIONS |= {"proposals_before_nms": (48, 48), "samples_per_cell": 2}
CASCADED = REGIONS | {"box_convs": 1, "box_channels": 24}
SIZE = (64, 80)


def create(head: str, classes: int = 3, **changes: Any) -> Any:
    torch.manual_seed(0)
    return muntin.create_dense(head, "swin_t", classes, head_config=changes, **TINY)


def scene() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A red and a blue rectangle on noise."""
    image = 0.1 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[8.0, 10, 36, 40], [44, 22, 80, 60]])
    labels, masks = torch.tensor([0, 2]), torch.zeros(2, *SIZE, dtype=torch.uint8)
    for mask, box, label in zip(masks, boxes.int().tolist(), labels.tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
        image[0, label] += 2 * mask
    return image, [{"boxes": boxes, "labels": labels, "masks": masks}]


def overfit(model: Any, images: Tensor, targets: Any, steps: int, rate: float) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    history = []
    for _ in range(steps):
        loss = torch.stack(list(model.train()(images, targets=targets).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        history.append(loss.item())
    return history


AGNOSTIC = {"class_agnostic": True, "class_agnostic_masks": True, "box_loss": "smooth_l1", "box_loss_weight": 1.0}


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("retinanet", FEW | {"strides": (8, 16, 32)}),
        ("mask_rcnn", REGIONS),
        ("cascade_mask_rcnn", CASCADED | {"masks": False}),
        ("cascade_mask_rcnn", CASCADED | AGNOSTIC | {"mask_pool": 7}),
    ],
    ids=["retinanet", "mask_rcnn", "cascade", "cascade-agnostic"],
)
def test_detectors_learn_a_scene_by_heart(head: str, config: dict[str, Any]) -> None:
    model = create(head, **config)
    images, targets = scene()
    history = overfit(model, images, targets, 60, 3e-3)
    assert sum(history[-5:]) / 5 < 0.6 * history[0]
    with torch.inference_mode():
        found = model.eval()(images)[0]
    wanted = targets[0]
    overlap = box_iou(wanted["boxes"], found["boxes"]) * (wanted["labels"][:, None] == found["labels"])
    value, number = overlap.max(1)
    assert value.min() > 0.5
    if model.task == "instance":
        pasted = paste_masks(found["masks"], found["boxes"], SIZE)[number]
        both = (pasted & wanted["masks"].bool()).sum((1, 2)) / (pasted | wanted["masks"].bool()).sum((1, 2))
        assert both.min() > 0.5


@pytest.mark.parametrize(
    ("head", "config"),
    [("upernet", {"channels": 24, "auxiliary": 16}), ("semantic_fpn", {"channels": 24, "width": 24})],
)
def test_segmenters_learn_a_scene_by_heart(head: str, config: dict[str, Any]) -> None:
    model = create(head, **config)
    image, targets = scene()
    labels = torch.ones(1, *SIZE, dtype=torch.long)  # background is a class like any other
    for mask, label in zip(targets[0]["masks"].bool(), targets[0]["labels"].tolist(), strict=True):
        labels[0][mask] = label
    labels[:, :4] = 255
    images, labels = torch.cat((image, image.flip(3))), torch.cat((labels, labels.flip(2)))
    history = overfit(model, images, labels, 40, 3e-3)
    assert history[-1] < 0.3 * history[0]
    with torch.inference_mode():
        found = model.eval()(images).argmax(1)
    counted = labels != 255
    assert (found == labels)[counted].float().mean() > 0.95


# by hand


def giou(a: list[float], b: list[float]) -> float:
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - across
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return across / union - (hull - union) / hull


def decode(deltas: list[float], reference: list[float], deviations: tuple[float, ...]) -> list[float]:
    width, height = reference[2] - reference[0], reference[3] - reference[1]
    x = reference[0] + width / 2 + deltas[0] * deviations[0] * width
    y = reference[1] + height / 2 + deltas[1] * deviations[1] * height
    w, h = width * math.exp(deltas[2] * deviations[2]), height * math.exp(deltas[3] * deviations[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


@pytest.mark.parametrize("deviations", CASCADE)
def test_box_coding_and_losses_by_hand(deviations: tuple[float, ...]) -> None:
    references = torch.tensor([[10.0, 20, 50, 40], [0, 0, 30, 60], [5, 5, 25, 15]], dtype=torch.float64)
    wanted = torch.tensor([[14.0, 16, 60, 44], [2, 4, 33, 50], [40, 40, 50, 60]], dtype=torch.float64)
    deltas = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    code = coder(deviations)
    boxes = [decode(d, r, deviations) for d, r in zip(deltas.tolist(), references.tolist(), strict=True)]
    assert torch.allclose(code.decode_single(deltas, references), torch.tensor(boxes, dtype=torch.float64))
    assert torch.allclose(code.decode_single(code.encode_single(wanted, references), references), wanted)
    by_hand = sum(1 - giou(a, b) for a, b in zip(boxes, wanted.tolist(), strict=True))
    loss = box_loss("giou", code, deltas, references, wanted)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert deltas.grad is not None and (deltas.grad.abs().sum(1) > 0).all()
    targets = []
    for (x1, y1, x2, y2), (p1, q1, p2, q2) in zip(wanted.tolist(), references.tolist(), strict=True):
        width, height = p2 - p1, q2 - q1
        shifts = ((x1 + x2 - p1 - p2) / 2 / width, (y1 + y2 - q1 - q2) / 2 / height)
        sides = (math.log((x2 - x1) / width), math.log((y2 - y1) / height))
        targets += [[value / d for value, d in zip((*shifts, *sides), deviations, strict=True)]]
    apart = [
        abs(a - b) for row, want in zip(deltas.tolist(), targets, strict=True) for a, b in zip(row, want, strict=True)
    ]
    assert box_loss("l1", code, deltas, references, wanted).item() == pytest.approx(sum(apart))
    smooth = sum(d * d / 2 if d < 1 else d - 0.5 for d in apart)
    assert box_loss("smooth_l1", code, deltas, references, wanted).item() == pytest.approx(smooth)


@pytest.mark.parametrize("iou", [0.5, 0.6, 0.7])
def test_proposals_learn_the_object_that_they_overlap_most(iou: float) -> None:
    boxes, labels = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 70]]), torch.tensor([4, 1])
    moved = torch.tensor([[0.0, 0, 20, 20], [3, 0, 23, 20], [6, 0, 26, 20], [30, 30, 60, 62], [70, 70, 80, 80]])
    sample = Assigner(iou, 100, 1.0)(moved, boxes, labels, background=9)
    found = {tuple(box): (label, obj) for box, label, obj in zip(*(part.tolist() for part in (
        sample.boxes, sample.labels, sample.objects)), strict=True)}  # fmt: skip
    assert len(sample.boxes) == 7 and sample.own.sum() == 2
    for box in [*moved.tolist(), *boxes.tolist()]:
        overlaps = [box_iou(torch.tensor([box]), each[None]).item() for each in boxes]
        most = max(range(2), key=lambda i: overlaps[i])
        label, number = found[tuple(box)]
        assert label == (labels[most].item() if overlaps[most] >= iou else 9)
        assert overlaps[most] < iou or number == most
    assert torch.equal(sample.wanted[sample.labels < 9], boxes[sample.objects[sample.labels < 9]])


def test_samples_are_of_the_wanted_number_and_share() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20]])
    near, far = boxes.repeat(30, 1), boxes.repeat(100, 1) + 50
    sample = Assigner(0.5, 40, 0.25)(torch.cat((near, far)), boxes, torch.tensor([0]), background=3)
    assert (len(sample.labels), (sample.labels == 0).sum()) == (40, 10)
    none = Assigner(0.5, 40, 0.25)(far, boxes[:0], torch.zeros(0, dtype=torch.long), background=3)
    assert len(none.labels) == 40 and (none.labels == 3).all() and not none.own.any()


def test_what_is_reported_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 140, 90], [40, 40, 40, 50]])
    scores = torch.tensor([[0.9, 0.2, 0.0], [0.8, 0.6, 0.0], [0.0, 0.04, 0.7], [0.95, 0.0, 0.0]])
    found = best(boxes[:, None], scores, (80, 100), 0.05, 0.5, 10)
    assert torch.allclose(found[1], torch.tensor([0.9, 0.7, 0.6]))  # of class 0 the better, no box without area
    assert found[2].tolist() == [0, 2, 1]
    assert found[0].tolist() == [[0, 0, 10, 10], [20, 20, 100, 80], [1, 0, 11, 10]]
    per_class = boxes[:, None] + torch.tensor([0.0, 100, 200])[None, :, None]
    assert best(per_class, scores, (400, 400), 0.05, 0.5, 2)[0].tolist() == [[0, 0, 10, 10], [220, 220, 340, 290]]


def test_anchors_by_hand() -> None:
    found = Anchors((8, 16), (4.0,), (0.5, 2.0))(
        type("Images", (), {"image_sizes": [(17, 24)]})(), [torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 2, 2)]
    )[0]
    by_hand = []
    for stride, rows, columns in ((8, 3, 3), (16, 2, 2)):
        for y in range(rows):
            for x in range(columns):
                for ratio in (0.5, 2.0):
                    w, h = 4 * stride / ratio**0.5, 4 * stride * ratio**0.5
                    by_hand.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    assert torch.allclose(found, torch.tensor(by_hand))


def bilinear(level: Tensor, y: float, x: float) -> Tensor:
    """The value between positions; zero beyond one position outside, the edge's until there."""
    height, width = level.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(level))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = level[:, y0, x0] * (1 - x + x0) + level[:, y0, x1] * (x - x0)
    return top * (1 - y + y0) + (level[:, y1, x0] * (1 - x + x0) + level[:, y1, x1] * (x - x0)) * (y - y0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_regions_are_pooled_from_the_level_of_their_size(samples: int, aligned: bool, memory: Any) -> None:
    levels = [torch.randn(2, 5, 40, 50), torch.randn(2, 5, 20, 25), torch.randn(2, 5, 10, 13)]
    boxes = [
        torch.tensor([[3.0, 5, 40, 60], [0, 0, 150, 140]]),
        torch.tensor([[30.0, 20, 90, 99], [190, 150, 200, 160]]),
    ]
    pool = RoiPool(3, (4, 8), samples, aligned)
    assert pool.level_of(torch.cat(boxes)).tolist() == [0, 1, 0, 0]
    found = pool([level.contiguous(memory_format=memory) for level in levels], boxes)
    places = [(image, box) for image, part in enumerate(boxes) for box in part.tolist()]
    for out, (image, box), number in zip(found, places, [0, 1, 0, 0], strict=True):
        scale, shift = 1 / (4, 8)[number], 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (side * scale - shift for side in box)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows, columns = (samples or math.ceil(side / 3) for side in (h, w))
        for i in range(3):
            for j in range(3):
                values = [
                    bilinear(
                        levels[number][image],
                        y1 + h * (i + (a + 0.5) / rows) / 3,
                        x1 + w * (j + (b + 0.5) / columns) / 3,
                    )
                    for a in range(rows)
                    for b in range(columns)
                ]
                assert torch.allclose(out[:, i, j], torch.stack(values).mean(0), atol=1e-5)


def test_masks_there_and_back() -> None:
    masks = torch.zeros(2, 60, 70, dtype=torch.uint8)
    masks[0, 10:30, 20:50] = 1
    masks[1].copy_((torch.arange(60)[:, None] - 30) ** 2 + (torch.arange(70) - 35) ** 2 < 400)
    boxes = torch.tensor([[20.0, 10, 50, 30], [15, 10, 55, 50]])
    targets = mask_targets(masks, torch.tensor([0, 1]), boxes, 28)
    assert targets[0].min() == 1 and set(targets.unique().tolist()) == {0.0, 1.0}
    back = paste_masks(targets, boxes, (60, 70))
    assert back.dtype == torch.bool and torch.equal(back[0], masks[0].bool())
    both = (back[1] & masks[1].bool()).sum() / (back[1] | masks[1].bool()).sum()
    assert both > 0.95
    outside = paste_masks(torch.ones(2, 28, 28), torch.tensor([[-20.0, -10, 10, 10], [80, 80, 90, 90]]), (60, 70))
    assert outside[0, :10, :10].all() and outside.sum() == 100


# images without objects, and what is refused


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_images_without_objects(head: str) -> None:
    model = create(head, **(CASCADED | {"box_convs": 0} if head != "retinanet" else {"channels": 16}))
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    targets = [none | {"masks": torch.zeros(0, *SIZE, dtype=torch.uint8)}] * 2
    losses = model.train()(torch.randn(2, 3, *SIZE), targets=targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    strict = muntin.create_dense(head, "swin_t", 3, head_config={"score_threshold": 1.0, "channels": 16}, **TINY).eval()
    with torch.inference_mode():
        found = strict(torch.randn(1, 3, *SIZE))[0]
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        **{"boxes": (0, 4), "scores": (0,), "labels": (0,)},
        **({"masks": (0, 28, 28)} if strict.task == "instance" else {}),
    }


@pytest.mark.parametrize("name", ["swin_t", "efficientvit_m0"])
def test_padding_does_not_matter(name: str) -> None:
    """Images are found as if they were alone, in batches of all sizes."""
    torch.manual_seed(0)
    config = REGIONS | {"strides": (4, 8, 16, 32, 64), "score_threshold": 0.0, "detections": 10}
    model = muntin.create_dense("mask_rcnn", name, 3, head_config=config, **(TINY if name == "swin_t" else {})).eval()
    sizes = [(64, 80), (50, 61), (64, 80), (33, 80)]
    images = torch.zeros(4, 3, 70, 96)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    with torch.inference_mode():
        together = model(images, sizes)
        for i, (height, width) in enumerate(sizes):
            alone = model(images[i : i + 1, :, :height, :width])[0]
            assert all(torch.allclose(together[i][key], alone[key], atol=1e-3) for key in alone)


def test_wrong_input_is_refused() -> None:
    detector, segmenter = create("faster_rcnn", channels=16, fc=16), create("semantic_fpn", channels=16)
    images = torch.zeros(1, 3, *SIZE)
    whole = {"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([0])}
    for targets, told in [
        (None, "give one for each"),
        ([whole, whole], "1 images in training mode and 2 targets"),
        ([{"boxes": whole["boxes"]}], "no 'labels'"),
        ([whole | {"boxes": torch.tensor([[5.0, 0, 5, 9]])}], "without area"),
        ([whole | {"labels": torch.tensor([3])}], "outside 0 to 2"),
        ([whole | {"labels": torch.tensor([0, 1])}], r"give \(n, 4\)"),
    ]:
        with pytest.raises(UserError, match=told):
            detector.train()(images, targets=targets)
    for sizes in ([(10, 10), (10, 10)], [(65, 80)], [(0, 5)]):
        with pytest.raises(UserError, match="within 64x80"):
            detector.eval()(images, sizes)
    for bad in (None, torch.zeros(1, 10, 10, dtype=torch.long)):
        with pytest.raises(UserError, match="as the images"):
            segmenter.train()(images, targets=bad)
    with pytest.raises(UserError, match="at least 2 images"):
        create("upernet", channels=16).train()(images, targets=torch.zeros(1, *SIZE, dtype=torch.long))
