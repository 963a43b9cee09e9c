"""Heads on regions of interest: pooling, boxes and masks, in one stage (Mask R-CNN) or several (Cascade R-CNN).

torchvision's RoIHeads has one stage, boxes for each class and smooth L1 alone; here its matcher, sampler, box coder,
RoIAlign and suppression serve stages that follow each other. The conventions are mmdetection's, so that its weights
fit: background is the last class, regions are aligned to pixels' centres.

B batch, R regions, C channels, K classes, P side of what is pooled
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, roi_align

from muntin.heads.boxes import Assigner, Sample, best, box_loss, clipped, coder
from muntin.heads.dense import Sizes, Target
from muntin.heads.layers import conv_act, kaiming, normal, xavier
from muntin.heads.pooling import RoiPool


class BoxHead(nn.Module):
    """Pooled regions (R, C, P, P) -> logits (R, K + 1), background last, and deltas (R, K or 1, 4)."""

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        channels = config.channels
        self.convs = nn.Sequential()
        for i in range(config.box_convs):
            self.convs.append(conv_act(channels if i == 0 else config.box_channels, config.box_channels, config.norm))
        width = (config.box_channels if config.box_convs else channels) * config.box_pool**2
        layers: list[nn.Module] = []
        for _ in range(config.box_fcs):
            layers += [xavier(nn.Linear(width, config.fc)), nn.ReLU(inplace=True)]
            width = config.fc
        self.fcs = nn.Sequential(*layers)
        self.classes = normal(nn.Linear(width, num_classes + 1), 0.01)
        self.boxes = normal(nn.Linear(width, 4 if config.class_agnostic else 4 * num_classes), 0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fcs(self.convs(pooled).flatten(1))
        return self.classes(x).float(), self.boxes(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Sequential):
    """Pooled regions (R, C, P, P) -> logits (R, K or 1, 2P, 2P)."""

    def __init__(self, config: Any, num_classes: int) -> None:
        width = config.mask_channels
        convs = [conv_act(config.channels if i == 0 else width, width, "none") for i in range(config.mask_convs)]
        source = width if config.mask_convs else config.channels
        super().__init__(
            OrderedDict(
                convs=nn.Sequential(*convs),
                enlarge=kaiming(nn.ConvTranspose2d(source, width, 2, 2)),
                act=nn.ReLU(inplace=True),
                classes=normal(nn.Conv2d(width, 1 if config.class_agnostic_masks else num_classes, 1), 0.01),
            )
        )


class Stage(nn.Module):
    """One box head and, where there are masks, one mask head, with the IoU from which a proposal is an object's."""

    def __init__(self, config: Any, number: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.kind, self.weight, self.scale = config.box_loss, config.stage_weights[number], config.box_loss_weight
        self.assign = Assigner(config.ious[number], config.samples, config.positive)
        self.coder = coder(config.deviations[number])
        self.box = BoxHead(config, num_classes)
        self.mask = MaskHead(config, num_classes) if config.masks else None

    def losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Cross entropy over all samples, and the boxes' loss of those that are objects over the number of samples."""
        labels, boxes, wanted = (torch.cat([getattr(s, key) for s in samples]) for key in ("labels", "boxes", "wanted"))
        objects = torch.where(labels < self.num_classes)[0]
        chosen = _of_class(deltas[objects], labels[objects])
        box = box_loss(self.kind, self.coder, chosen, boxes[objects], wanted[objects]) / max(len(labels), 1)
        return {
            "class": self.weight * F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1),
            "box": self.weight * self.scale * box,
        }

    def decoded(self, deltas: Tensor, references: Tensor) -> Tensor:
        """(R, K or 1, 4) deltas from references (R, 4) -> boxes (R, K or 1, 4)."""
        return self.coder.decode_single(deltas.flatten(1), references).view_as(deltas)

    def refined(self, logits: Tensor, deltas: Tensor, references: Tensor, labels: Tensor | None = None) -> Tensor:
        """Boxes (R, 4) for the next stage, each by its object's class, or by its likeliest where it has none."""
        likeliest = logits[:, :-1].argmax(1)
        if labels is not None:
            likeliest = torch.where(labels < self.num_classes, labels, likeliest)
        return self.decoded(_of_class(deltas, likeliest)[:, None], references)[:, 0]


class RoiHeads(nn.Module):
    """Stages that follow each other, each learning from the boxes of the one before (arXiv 1712.00726).

    In evaluation the stages' logits are averaged over the last stage's boxes, their masks' probabilities too.
    """

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        strides = config.strides[:-1] if len(config.strides) > 1 else config.strides
        self.box_pool = RoiPool(config.box_pool, strides, config.samples_per_cell, config.aligned)
        self.mask_pool = RoiPool(config.mask_pool, strides, config.samples_per_cell, config.aligned)
        self.stages: Any = nn.ModuleList(Stage(config, i, num_classes) for i in range(len(config.ious)))

    def learn(
        self, levels: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[Target]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages, 1):
            samples = [
                stage.assign(p, t["boxes"].to(p.dtype), t["labels"], self.num_classes)
                for p, t in zip(proposals, targets, strict=True)
            ]
            logits, deltas = stage.box(self.box_pool(levels, [s.boxes for s in samples]))
            found = stage.losses(logits, deltas, samples)
            if stage.mask is not None:
                found["mask"] = stage.weight * self._mask_loss(stage.mask, levels, samples, targets)
            last = number == len(self.stages)
            losses |= {name if len(self.stages) == 1 else f"{name}_{number}": loss for name, loss in found.items()}
            if not last:
                with torch.no_grad():
                    proposals = self._next(stage, logits, deltas, samples, sizes)
        return losses

    def _next(
        self, stage: Any, logits: Tensor, deltas: Tensor, samples: Sequence[Sample], sizes: Sizes
    ) -> list[Tensor]:
        counts = [len(s.boxes) for s in samples]
        parts = zip(samples, sizes, logits.split(counts), deltas.split(counts), strict=True)
        refined = [(s, size, stage.refined(row, delta, s.boxes, s.labels)) for s, size, row, delta in parts]
        return [with_area(clip_boxes_to_image(boxes, size)[~s.own]) for s, size, boxes in refined]

    def _mask_loss(self, head: Any, levels: list[Tensor], samples: Sequence[Sample], targets: list[Target]) -> Tensor:
        chosen = [torch.where(s.labels < self.num_classes)[0] for s in samples]
        boxes = [s.boxes[here] for s, here in zip(samples, chosen, strict=True)]
        logits = head(self.mask_pool(levels, boxes)).float()
        if not len(logits):
            return logits.sum()
        labels = torch.cat([s.labels[here] for s, here in zip(samples, chosen, strict=True)])
        wanted = [
            mask_targets(target["masks"], s.objects[here], s.boxes[here], logits.shape[-1])
            for target, s, here in zip(targets, samples, chosen, strict=True)
        ]
        return F.binary_cross_entropy_with_logits(_of_class(logits, labels), torch.cat(wanted))

    def find(self, levels: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        boxes, scores = self.scored(levels, proposals, sizes)
        counts, config = [len(p) for p in proposals], self.config
        rule = config.score_threshold, config.nms, config.detections
        found = []
        for box, score, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True):
            found.append(dict(zip(("boxes", "scores", "labels"), best(box, score, size, *rule), strict=True)))
        if config.masks:
            labels = torch.cat([each["labels"] for each in found])
            masks = self.masks(levels, [each["boxes"] for each in found], labels)
            for each, part in zip(found, masks.split([len(each["boxes"]) for each in found]), strict=True):
                each["masks"] = part
        return found

    def scored(self, levels: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """All regions' boxes (R, K or 1, 4), not clipped to their images, and scores (R, K)."""
        total = torch.zeros(())
        for number, stage in enumerate(self.stages, 1):
            logits, deltas = stage.box(self.box_pool(levels, proposals))
            total = logits if number == 1 else total + logits
            if number < len(self.stages):
                counts = [each.shape[0] for each in proposals]
                refined = _parts(stage.refined(logits, deltas, torch.cat(proposals)), counts)
                proposals = [clipped(each, size) for each, size in zip(refined, sizes, strict=True)]
        return stage.decoded(deltas, torch.cat(proposals)), (total / len(self.stages)).softmax(1)[:, :-1]

    def masks(self, levels: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Probabilities (R, M, M) within the boxes (n, 4) of each image, of labels (R,) of all of them."""
        pooled = self.mask_pool(levels, boxes)
        return torch.stack([_of_class(stage.mask(pooled).float(), labels).sigmoid() for stage in self.stages]).mean(0)

    def measured(self, level: Tensor, proposals: int, detections: int) -> None:
        """Every product for this many proposals and detections, regions of one level standing for all."""
        for stage in self.stages:
            stage.box(_pooled(self.box_pool, level, proposals))
            if stage.mask is not None:
                stage.mask(_pooled(self.mask_pool, level, detections))


def _pooled(pool: Any, level: Tensor, regions: int) -> Tensor:
    rois = level.new_zeros(regions, 5)
    return roi_align(level, rois, (pool.side, pool.side), 1 / pool.strides[0], 2, pool.aligned)


def _parts(values: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """Of each image; what is of one image may have as many rows as a graph finds."""
    return [values] if len(counts) == 1 else values.split(counts)


def _of_class(values: Tensor, labels: Tensor) -> Tensor:
    """What belongs to each region's class: (R, K, ...) -> (R, ...); of (R, 1, ...), for all classes, the one."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(labels.shape[0], device=labels.device), labels]


def with_area(boxes: Tensor) -> Tensor:
    """Those boxes (n, 4) that have any."""
    return boxes[torch.where((boxes[:, 2:] > boxes[:, :2]).all(1))[0]]


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """masks: (n, h, w) of an image's objects. objects: (R,), the object of each box (R, 4). -> (R, side, side), 0 or 1.

    A cell is the object's where at least half of it is, as in mmdetection.
    """
    if not len(boxes):
        return boxes.new_empty(0, side, side)
    rois = torch.cat((objects[:, None].to(boxes.dtype), boxes), 1)
    return (roi_align(masks[:, None].to(boxes.dtype), rois, (side, side), 1.0, 0, True)[:, 0] >= 0.5).to(boxes.dtype)
