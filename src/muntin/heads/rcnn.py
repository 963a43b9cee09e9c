"""Faster, Mask and Cascade R-CNN: proposals, then heads on each proposal's region.

arXiv 1506.01497, 1703.06870, 1712.00726. Defaults are those of the published Swin detectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from muntin.errors import UserError
from muntin.heads.boxes import LOSSES
from muntin.heads.dense import Detector, Sizes, Target, fitting_backbone
from muntin.heads.pyramid import Anchors, FeaturePyramid
from muntin.heads.roi import RoiHeads

CASCADE = (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)


@dataclass(frozen=True)
class RCNN:
    """strides: of the pyramid's levels; regions are pooled from all but the last.
    anchor_scale: side of an anchor over its level's stride. anchor_ratios: of height to width.
    rpn_samples, rpn_positive: anchors of an image to learn from, and at most this share of objects.
    rpn_ious: from the first on an anchor is an object's, below the second background, between them nothing.
    rpn_nms, proposals_before_nms, proposals: in training and in evaluation, of each level and of each image.
    ious, stage_weights, deviations: one for each stage: from which IoU on a proposal is an object's, the weight of the
    losses, and what deltas are divided by in learning.
    samples, positive: proposals of an image to learn from, and at most this share of objects.
    box_pool, mask_pool: cells along a side of a pooled region. samples_per_cell: of RoIAlign along a side, 0 for as
    many as the map has. aligned: whether a pixel's value stands at its centre.
    box_convs, box_channels, norm, box_fcs, fc: layers of the box heads: 3x3 convolutions, their channels and norm
    ("batch", "layer" or "none"), linear layers and their width. class_agnostic: one box for all classes.
    box_loss: "l1" or "smooth_l1" of deltas, or "giou" of boxes; box_loss_weight: its factor.
    masks: whether there are mask heads; mask_convs, mask_channels: their layers. class_agnostic_masks: one for all
    classes.
    score_threshold, nms, detections: what is reported: the least score, the most overlap within a class, how many.
    """

    channels: int = 256
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    rpn_ious: tuple[float, float] = (0.7, 0.3)
    rpn_nms: float = 0.7
    proposals_before_nms: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] = (1000, 1000)
    ious: tuple[float, ...] = (0.5,)
    stage_weights: tuple[float, ...] = (1.0,)
    deviations: tuple[tuple[float, ...], ...] = CASCADE[:1]
    samples: int = 512
    positive: float = 0.25
    box_pool: int = 7
    mask_pool: int = 14
    samples_per_cell: int = 0
    aligned: bool = True
    box_convs: int = 0
    box_channels: int = 256
    norm: str = "none"
    box_fcs: int = 2
    fc: int = 1024
    class_agnostic: bool = False
    box_loss: str = "l1"
    box_loss_weight: float = 1.0
    masks: bool = True
    mask_convs: int = 4
    mask_channels: int = 256
    class_agnostic_masks: bool = False
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = tuple(tuple(each) if isinstance(each, list) else each for each in value)
                object.__setattr__(self, name, value)
        _check(self)


def _check(config: RCNN) -> None:
    """Raises UserError naming the first field whose value is impossible, and what is valid."""
    stages = len(config.ious)
    if not stages or len(config.stage_weights) != stages or len(config.deviations) != stages:
        raise UserError(
            f"ious={config.ious}, stage_weights={config.stage_weights}, deviations={config.deviations}: give one of "
            "each for every stage"
        )
    if any(len(each) != 4 or min(each) <= 0 for each in config.deviations):
        raise UserError(f"deviations={config.deviations}: give four positive numbers for each stage")
    for field, valid in (("box_loss", LOSSES), ("norm", ("batch", "layer", "none"))):
        if getattr(config, field) not in valid:
            raise UserError(f"{field}={getattr(config, field)!r}: give one of {', '.join(valid)}")
    for field in ("channels", "samples", "box_pool", "mask_pool", "fc", "mask_channels", "detections", "anchor_scale"):
        if not getattr(config, field) > 0:
            raise UserError(f"{field}={getattr(config, field)!r}: give a number above 0")


CONFIGS = {
    "faster_rcnn": RCNN(masks=False),
    "mask_rcnn": RCNN(),
    "cascade_mask_rcnn": RCNN(
        ious=(0.5, 0.6, 0.7),
        stage_weights=(1.0, 0.5, 0.25),
        deviations=CASCADE,
        box_convs=4,
        box_fcs=1,
        norm="batch",
        box_loss="giou",
        box_loss_weight=10.0,
    ),
}


class RcnnDetector(Detector):
    """Backbone, feature pyramid, region proposals, and the stages' heads."""

    def __init__(self, head: str, config: RCNN, name: str, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__(head, config, name, num_classes)
        self.task = "instance" if config.masks else "detect"
        self.backbone = fitting_backbone(name, config.strides, options)
        self.neck = FeaturePyramid(self.backbone.channels, self.backbone.strides, config.channels, config.strides)
        self.rpn = RegionProposalNetwork(
            Anchors(config.strides, (config.anchor_scale,), config.anchor_ratios),
            WideHead(config.channels, len(config.anchor_ratios)),
            *config.rpn_ious,
            batch_size_per_image=config.rpn_samples,
            positive_fraction=config.rpn_positive,
            pre_nms_top_n=dict(zip(("training", "testing"), config.proposals_before_nms, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), config.proposals, strict=True)),
            nms_thresh=config.rpn_nms,
        )
        self.roi = RoiHeads(config, num_classes)

    def learn(self, levels: list[Tensor], images: Tensor, sizes: Sizes, targets: list[Target]) -> dict[str, Tensor]:
        proposals, found = self.rpn(ImageList(images, sizes), dict(enumerate(levels)), targets)
        losses = {"rpn_class": found["loss_objectness"], "rpn_box": found["loss_rpn_box_reg"]}
        return losses | self.roi.learn(levels, proposals, sizes, targets)

    def find(self, levels: list[Tensor], images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        proposals, _ = self.rpn(ImageList(images, sizes), dict(enumerate(levels)))
        return self.roi.find(levels, proposals, sizes)

    def measured(self, image: Tensor) -> None:
        levels = self.neck(self.backbone(image), image.shape[2:])
        self.rpn.head(levels)
        self.roi.measured(
            levels[0], len(image) * self.head_config.proposals[1], len(image) * self.head_config.detections
        )


class WideHead(RPNHead):
    """torchvision's head of a region proposal network; what it gives is in 32 bits, as boxes in pixels need."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


MODEL = RcnnDetector
