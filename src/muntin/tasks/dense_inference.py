"""Detectors and segmenters at work: from pictures of any size to what is on them, at the pictures' own size.

B batch, H W picture, h w what the model sees, K classes, n objects
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from muntin.data.device import Prepare
from muntin.data.rle import encode_rle
from muntin.errors import UserError
from muntin.tasks.merging import View, merge
from muntin.tasks.windows import LabelMap, windows

CHUNK = 32  # images, at all scales together, among which those of one size are looked for
LOGITS = 2**28  # bytes that the logits of a batch may take, where it has several images or windows
NMS, MOST = 0.5, 100  # of merged views, where a head does not say

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Detections:
    """What was found on one picture, best first.

    boxes: (n, 4) float32 x1 y1 x2 y2 in the picture's pixels. scores: (n,). labels: (n,). masks: run lengths of each
    object at the picture's size, or None where the model finds boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[dict[str, Any]] | None

    def coco(self, image_id: int) -> list[dict[str, Any]]:
        """In COCO's results format; the category is the label + 1."""
        rows = []
        corners = self.boxes.double()
        sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        for i, (box, score, label) in enumerate(zip(sides, self.scores.tolist(), self.labels.tolist(), strict=True)):
            row = {"image_id": image_id, "category_id": label + 1, "bbox": box, "score": score}
            rows.append(row if self.masks is None else row | {"segmentation": self.masks[i]})
        return rows

    def above(self, threshold: float) -> "Detections":
        """Those of at least this score."""
        kept = (self.scores >= threshold).nonzero()[:, 0]
        masks = None if self.masks is None else [self.masks[i] for i in kept.tolist()]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)


def detect(
    model: nn.Module,
    pictures: Iterable[Image.Image],
    preprocessing: Mapping[str, Any],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    threshold: float = 0.0,
    batch_size: int = 8,
) -> Iterator[Detections]:
    """Find objects on upright RGB pictures, one result for each, in order.

    model: a detector in evaluation mode, on the device that is to be used. preprocessing: "fit" ({"shorter", "longer"},
    pixels), "mean" and "std". scales: of `fit`, each of which is looked at. flip: look at the mirror image too. What
    several views find is merged by non-maximum suppression with box voting (`muntin.tasks.merging`); an object's mask
    is that of the view that was surest of it. threshold: least score.

    Images of one size share a batch, so that what is found on one never depends on the others.
    """
    check_views(model, scales)
    prepare = _preparation(model, preprocessing)
    head: Any = getattr(model, "head_config", None)
    rule = getattr(head, "nms", NMS), getattr(head, "detections", MOST)
    resized = ahead(partial(_resized, fit=preprocessing["fit"], scales=scales), pictures)
    for chunk in batches(resized, max(1, CHUNK // len(scales))):
        views: list[list[View]] = [[] for _ in chunk]
        for members in _alike(chunk):
            for batch in batches(members, batch_size):
                images = prepare(torch.stack([chunk[i][1][s] for i, s in batch]).to(device_of(model)))
                for mirrored in (False, True) if flip else (False,):
                    with torch.inference_mode():
                        found = model(images.flip(-1) if mirrored else images)
                    for (i, _), each in zip(batch, found, strict=True):
                        views[i].append(_in_picture(each, images.shape[2:], chunk[i][0], mirrored))
        for (size, _), seen in zip(chunk, views, strict=True):
            yield _objects(merge(seen, *rule), size, threshold)


def coco_results(
    found: Mapping[str, Tensor], resized: Sequence[int], original: tuple[int, int], image_id: int
) -> list[dict[str, Any]]:
    """What a detector found on an image of `resized` height and width, in COCO's format and `original`'s pixels."""
    return _objects(_in_picture(found, resized, original, False), original, 0.0).coco(image_id)


def segment(
    model: nn.Module,
    pictures: Iterable[Image.Image],
    preprocessing: Mapping[str, Any],
    *,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
) -> Iterator[Tensor]:
    """Label every pixel of upright RGB pictures: (H, W) class indices of each, uint8 up to 255 classes, in order.

    model, preprocessing: as in `detect`. crop: height and width of a window that slides over the image, whose logits
    are averaged where windows overlap; by default the whole image is looked at. stride: of the window, two thirds of it
    by default. scales, flip: as in `detect`; the probabilities of all views are averaged.

    Logits are brought to the picture's size (bilinearly) before the class is chosen, in strips of rows, so that those
    of a whole picture are never held at once; for several views the sum of their probabilities is, in 16 bits.
    """
    check_views(model, scales)
    stride = _stride(crop, stride)
    prepare = _preparation(model, preprocessing)
    resized = ahead(partial(_resized, fit=preprocessing["fit"], scales=scales), pictures)
    mirrors = (False, True) if flip else (False,)
    views = len(scales) * len(mirrors)
    for chunk in batches(resized, CHUNK if views == 1 else 1):
        maps = [LabelMap(size, views) for size, _ in chunk]
        for members in _alike(chunk):
            height, width = chunk[members[0][0]][1][members[0][1]].shape[1:]
            high, wide = (height, width) if crop is None else (min(crop[0], height), min(crop[1], width))
            pixel = 4 * int(model.num_classes)  # type: ignore[arg-type]
            most, limit = (max(1, min(batch_size, LOGITS // (pixel * high * side))) for side in (width, wide))
            for batch in batches(members, most):
                images = prepare(torch.stack([chunk[i][1][s] for i, s in batch]).to(device_of(model)))
                for mirrored in mirrors:
                    for top, bands in windows(model, images, crop, stride, mirrored, limit):
                        for (i, _), band in zip(batch, bands, strict=True):
                            maps[i].add(band, top, height)
        for label_map in maps:
            yield label_map.labels()


def _stride(crop: tuple[int, int] | None, stride: tuple[int, int] | None) -> tuple[int, int] | None:
    if crop is None:
        if stride is not None:
            raise UserError(f"stride={stride} is of a sliding window; give its crop too, as in crop=(512, 512)")
        return None
    stride = stride or (math.ceil(crop[0] * 2 / 3), math.ceil(crop[1] * 2 / 3))
    if min(*crop, *stride) < 1:
        raise UserError(f"crop={crop}, stride={stride}: give a height and a width of at least one pixel")
    return stride


# ----------------------------------------------------------------------------------------------------------- pictures


def check_views(model: nn.Module, scales: Sequence[float]) -> None:
    """Raises `UserError` for a model in training mode and scales that are none."""
    if model.training:
        raise UserError("the model is in training mode, where it returns losses; call model.eval() first")
    if not scales or min(scales) <= 0:
        raise UserError(f"scales={list(scales)}: give at least one factor of the size, above 0, as in 0.75,1,1.25")


def _preparation(model: nn.Module, preprocessing: Mapping[str, Any]) -> nn.Module:
    """What makes bytes (B, 3, h, w) the model's images: nothing where it normalises them itself."""
    if getattr(model, "takes_bytes", False):
        return nn.Identity()
    return Prepare(preprocessing["mean"], preprocessing["std"]).to(device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def ahead(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """function(item) of each, in order, made by threads while what was made before is used."""
    workers = min(os.cpu_count() or 1, 8)
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, so many at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _resized(
    picture: Image.Image, fit: Mapping[str, Any], scales: Sequence[float]
) -> tuple[tuple[int, int], list[Tensor]]:
    """A picture's height and width, and at each scale what the model is to see: (3, h, w) uint8."""
    from muntin.data.dense import fit as fitted

    longer = fit["longer"]
    sides = [(max(1, round(s * fit["shorter"])), None if longer is None else max(1, round(s * longer))) for s in scales]
    return (picture.height, picture.width), [fitted(picture, *side) for side in sides]


def _alike(chunk: Sequence[tuple[tuple[int, int], list[Tensor]]]) -> list[list[tuple[int, int]]]:
    """(image, scale) of what has one size and can share a batch, in order."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, (_, tensors) in enumerate(chunk):
        for s, pixels in enumerate(tensors):
            groups.setdefault(tuple(pixels.shape), []).append((i, s))
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------ objects


def _in_picture(found: Mapping[str, Tensor], resized: Sequence[int], original: tuple[int, int], mirrored: bool) -> View:
    """A model's detections on the CPU, mirrored back, with boxes in the picture's pixels and within it."""
    view = {key: values.detach().cpu() for key, values in found.items()}
    (h, w), (height, width) = resized, original
    boxes = view["boxes"].float()
    if mirrored:
        boxes = torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1)
        if "masks" in view:
            view["masks"] = view["masks"].flip(-1)
    boxes = boxes * boxes.new_tensor([width / w, height / h, width / w, height / h])
    limits = boxes.new_tensor([width, height, width, height])
    return view | {"boxes": boxes.clamp(min=0).minimum(limits)}


def _objects(view: View, size: tuple[int, int], threshold: float) -> Detections:
    order = view["scores"].argsort(descending=True, stable=True)
    order = order[view["scores"][order] >= threshold]
    boxes = view["boxes"][order]
    masks = None
    if "masks" in view:
        masks = [_pasted(mask, box, size) for mask, box in zip(view["masks"][order], boxes, strict=True)]
    return Detections(boxes, view["scores"][order].float(), view["labels"][order], masks)


def _pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of a mask (m, m) of probabilities in its box, of which only the box's surroundings are drawn."""
    from muntin.heads import paste_masks

    x1, y1, x2, y2 = box.tolist()
    left, top = max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0)
    right, bottom = min(math.ceil(x2) + 1, size[1]), min(math.ceil(y2) + 1, size[0])
    place = box - box.new_tensor([left, top, left, top])
    part = paste_masks(mask[None], place[None], (bottom - top, right - left))[0]
    return encode_rle(part.numpy(), (top, left), size)
