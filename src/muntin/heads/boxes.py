"""Boxes: their coding against a reference, losses, assignment to objects, and the choice of what is reported.

Boxes are (n, 4) x1 y1 x2 y2 in pixels. n boxes, K classes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss

from muntin.layers.tracing import symbolic

GROWTH = math.log(1000 / 16)
"""No box is decoded to more than e^GROWTH times its reference's sides."""

LOSSES = ("l1", "smooth_l1", "giou")


def coder(deviations: Sequence[float]) -> BoxCoder:
    """deviations: of (dx, dy, dw, dh), by which what is predicted is multiplied."""
    x, y, w, h = (1 / deviation for deviation in deviations)
    return BoxCoder((x, y, w, h), GROWTH)


def box_loss(kind: str, code: BoxCoder, deltas: Tensor, references: Tensor, wanted: Tensor) -> Tensor:
    """Summed over boxes. deltas: (n, 4) as predicted, from references (n, 4) to the wanted boxes (n, 4).

    "l1" and "smooth_l1" (quadratic below 1) compare deltas, "giou" decoded boxes: 1 - IoU + what of the smallest box
    around both is in neither (arXiv 1902.09630).
    """
    if kind == "giou":
        return generalized_box_iou_loss(code.decode_single(deltas, references), wanted, reduction="sum")
    targets = code.encode_single(wanted, references)
    loss = F.l1_loss if kind == "l1" else F.smooth_l1_loss
    return loss(deltas, targets, reduction="sum")


@dataclass(frozen=True)
class Sample:
    """Proposals of one image to learn from.

    boxes (n, 4); labels (n,), K for background; wanted (n, 4), the object's box, their own where there is none;
    objects (n,), the object's number; own (n,), whether the box is an object's own, put among the proposals.
    """

    boxes: Tensor
    labels: Tensor
    wanted: Tensor
    objects: Tensor
    own: Tensor


class Assigner:
    """Which proposals learn which object: the one that they overlap most, if by at least `iou`; else background.

    Of each image at most `samples`, of which at most the share `positive` are objects; the objects' own boxes are
    among the proposals.
    """

    def __init__(self, iou: float, samples: int, positive: float) -> None:
        self.matcher = Matcher(iou, iou)
        self.sampler = BalancedPositiveNegativeSampler(samples, positive)

    def __call__(self, proposals: Tensor, boxes: Tensor, labels: Tensor, background: int) -> Sample:
        every = torch.cat((proposals, boxes))
        own = torch.arange(len(every), device=every.device) >= len(proposals)
        if len(boxes):
            found = self.matcher(box_iou(boxes, every))
            objects = found.clamp(min=0)
            classes, wanted = labels[objects].masked_fill(found < 0, background), boxes[objects]
        else:
            objects = torch.zeros(len(every), dtype=torch.long, device=every.device)
            classes, wanted = torch.full_like(objects, background), every
        chosen = [part[0] for part in self.sampler([(classes != background).long()])]
        kept = torch.cat([torch.where(part)[0] for part in chosen])  # objects first
        return Sample(every[kept], classes[kept], wanted[kept], objects[kept], own[kept])


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) within (h, w), which may be symbols of a graph."""
    if not symbolic(size[0]):
        return clip_boxes_to_image(boxes, size)
    height, width = (torch.scalar_tensor(side, dtype=boxes.dtype) for side in size)
    return boxes.clamp(min=0).minimum(torch.stack((width, height, width, height)))


def best(boxes: Tensor, scores: Tensor, size: tuple[int, int], threshold: float, iou: float, most: int) -> list[Tensor]:
    """What of an image is reported, best first: boxes (m, 4) within (h, w), scores (m,) and labels (m,).

    boxes: (n, K, 4), or (n, 1, 4) for all classes. scores: (n, K). Those above `threshold`; of two of a class that
    overlap by more than `iou` the better one; `most` in all.
    """
    proposals, labels = torch.where(scores > threshold)
    chosen = boxes[proposals, labels if boxes.shape[1] > 1 else torch.zeros_like(labels)]
    chosen, values = clipped(chosen, size), scores[proposals, labels]
    kept = torch.where((chosen[:, 2:] > chosen[:, :2]).all(1))[0]
    chosen, values, labels = chosen[kept], values[kept], labels[kept]
    kept = batched_nms(chosen.double(), values.double(), labels, iou)[:most]  # which moves classes far apart
    return [chosen[kept], values[kept], labels[kept]]
