"""RetinaNet (arXiv 1708.02002): classes and boxes at every anchor of a pyramid, on torchvision's head.

N anchors, K classes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from muntin.errors import UserError
from muntin.heads.boxes import best
from muntin.heads.dense import Detector, Sizes, Target, fitting_backbone
from muntin.heads.pyramid import Anchors, FeaturePyramid


@dataclass(frozen=True)
class RetinaNet:
    """strides: of the pyramid's levels. coarser: how levels beyond the backbone's maps are made, "conv" or "pool" (see
    `FeaturePyramid`); "published" is "pool" for maps up to stride 64, as in EfficientViT's detectors, else "conv".
    anchor_scale: side of the smallest anchor over its level's stride; anchor_octave: anchors from there to twice that.
    anchor_ratios: of height to width. ious: from the first on an anchor is an object's, below the second background.
    candidates: of each level, before suppression. score_threshold, nms, detections: what is reported: the least score,
    the most overlap within a class, how many.
    """

    channels: int = 256
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    coarser: str = "published"
    anchor_scale: float = 4.0
    anchor_octave: int = 3
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    ious: tuple[float, float] = (0.5, 0.4)
    candidates: int = 1000
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.coarser not in ("published", "conv", "pool"):
            raise UserError(f"coarser={self.coarser!r}: give 'published', 'conv' or 'pool'")
        for field in ("channels", "anchor_scale", "anchor_octave", "candidates", "detections"):
            if not getattr(self, field) > 0:
                raise UserError(f"{field}={getattr(self, field)!r}: give a number above 0")


CONFIGS = {"retinanet": RetinaNet()}


class RetinaDetector(Detector):
    """Backbone, feature pyramid, and one head for all levels."""

    task = "detect"

    def __init__(self, head: str, config: RetinaNet, name: str, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__(head, config, name, num_classes)
        self.backbone = fitting_backbone(name, config.strides, options)
        coarser = "pool" if self.backbone.strides[-1] >= 64 else "conv"
        self.neck = FeaturePyramid(
            self.backbone.channels,
            self.backbone.strides,
            config.channels,
            config.strides,
            coarser if config.coarser == "published" else config.coarser,
        )
        scales = [config.anchor_scale * 2 ** (i / config.anchor_octave) for i in range(config.anchor_octave)]
        self.anchors = Anchors(config.strides, scales, config.anchor_ratios)
        self.matcher = Matcher(*config.ious, allow_low_quality_matches=True)
        self.head = RetinaNetHead(config.channels, len(scales) * len(config.anchor_ratios), num_classes)

    def predict(self, levels: list[Tensor]) -> dict[str, Tensor]:
        """`cls_logits` (B, N, K) and `bbox_regression` (B, N, 4), in 32 bits, as boxes in pixels need."""
        return {key: values.float() for key, values in self.head(levels).items()}

    def learn(self, levels: list[Tensor], images: Tensor, sizes: Sizes, targets: list[Target]) -> dict[str, Tensor]:
        anchors = self.anchors(ImageList(images, sizes), levels)
        matched = [self._match(each, target["boxes"]) for each, target in zip(anchors, targets, strict=True)]
        found = self.head.compute_loss(targets, self.predict(levels), anchors, matched)
        return {"class": found["classification"], "box": found["bbox_regression"]}

    def _match(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """The number of each anchor's object (N,); negative for background and for those between both."""
        if not len(boxes):
            return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        return self.matcher(box_iou(boxes, anchors))

    def find(self, levels: list[Tensor], images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        anchors = self.anchors(ImageList(images, sizes), levels)[0]
        counts = [level.shape[2] * level.shape[3] * self._per_cell for level in levels]
        found = self.predict(levels)
        rows = zip(found["cls_logits"], found["bbox_regression"], sizes, strict=True)
        return [self._of_image(anchors, logits, deltas, counts, size) for logits, deltas, size in rows]

    @property
    def _per_cell(self) -> int:
        return self.anchors.num_anchors_per_location()[0]

    def _of_image(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, counts: list[int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Candidates of each level: the likeliest pairs of anchor and class; then the best of all levels."""
        config = self.head_config
        least = torch.logit(logits.new_tensor(config.score_threshold))
        chosen, values = [], []
        for start, part in zip(_starts(counts), logits.split(counts), strict=True):
            flat = part.flatten()
            pairs = torch.where(flat > least)[0]
            scores, order = flat[pairs].topk(min(config.candidates, len(pairs)))
            values.append(scores.sigmoid())
            chosen.append(pairs[order] + start * self.num_classes)
        pairs, scores = torch.cat(chosen), torch.cat(values)
        places = pairs // self.num_classes
        boxes = self.head.regression_head.box_coder.decode_single(deltas[places], anchors[places])
        spread = scores.new_zeros(len(scores), self.num_classes)
        spread[torch.arange(len(scores), device=scores.device), pairs % self.num_classes] = scores
        kept = best(boxes[:, None], spread, size, config.score_threshold, config.nms, config.detections)
        return dict(zip(("boxes", "scores", "labels"), kept, strict=True))

    def measured(self, image: Tensor) -> None:
        self.head(self.neck(self.backbone(image), image.shape[2:]))


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


MODEL = RetinaDetector
