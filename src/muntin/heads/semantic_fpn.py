"""Semantic FPN (arXiv 1901.02446): a feature pyramid, all of whose levels are brought to the finest and added.

Works on maps of any size and any number of strides. Defaults are those of the published segmenters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Segmenter, fitting_backbone, pixel_loss
from muntin.heads.layers import conv_act, normal
from muntin.heads.pyramid import FeaturePyramid


@dataclass(frozen=True)
class SemanticFPN:
    """channels: of the pyramid. width: of the head. finest: stride of the finest level, which the logits have; where
    the backbone has no map there, the pyramid grows one. subpixels: the classifier tells so many by so many pixels of
    each position apart (dense upsampling convolution, arXiv 1702.08502), which costs next to nothing and sharpens what
    is thin; 1 as published. dropout: of whole channels, before the classifier.
    auxiliary_weight: of the losses of linear classifiers of the backbone's maps beyond the first, which only learn and
    tell each stage directly what it is for (arXiv 1409.5185); 0 for none, as published.
    """

    channels: int = 256
    width: int = 128
    finest: int = 4
    subpixels: int = 1
    dropout: float = 0.1
    auxiliary_weight: float = 0.0

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.finest, self.subpixels) < 1 or self.finest & (self.finest - 1):
            raise UserError(
                f"channels={self.channels}, width={self.width}, finest={self.finest}, subpixels={self.subpixels}: give "
                "whole numbers from 1, finest a power of 2"
            )


CONFIGS = {"semantic_fpn": SemanticFPN()}


class Climb(nn.Module):
    """A level up to the finest one: 3x3 convolution, norm, ReLU, and twice the size, as often as needed."""

    def __init__(self, channels: int, width: int, octaves: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.convs = nn.ModuleList(
            conv_act(channels if i == 0 else width, width, "batch") for i in range(max(octaves, 1))
        )

    def forward(self, x: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """sizes: of all levels, the finest first."""
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if self.octaves:
                x = F.interpolate(x, size=sizes[self.octaves - 1 - i], mode="bilinear", align_corners=False)
        return x


class SemanticFpnSegmenter(Segmenter):
    """Backbone, feature pyramid, and the sum of its levels."""

    def __init__(self, head: str, config: SemanticFPN, name: str, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__(head, config, name, num_classes)
        self.backbone = fitting_backbone(name, None, options)
        last = self.backbone.strides[-1]
        strides = [config.finest << i for i in range(int(math.log2(last / config.finest)) + 1)]
        self.neck = FeaturePyramid(self.backbone.channels, self.backbone.strides, config.channels, strides)
        self.climbs = nn.ModuleList(Climb(config.channels, config.width, i) for i in range(len(strides)))
        self.dropout = nn.Dropout2d(config.dropout)
        self.classes = normal(nn.Conv2d(config.width, num_classes * config.subpixels**2, 1), 0.01)
        taught = self.backbone.channels[1:] if config.auxiliary_weight else ()
        self.auxiliary = nn.ModuleList(normal(nn.Conv2d(channels, num_classes, 1), 0.01) for channels in taught)

    def logits(self, maps: list[Tensor]) -> Tensor:
        height, width = (side * self.backbone.strides[0] for side in maps[0].shape[2:])
        levels = self.neck(maps, (height, width))
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        climbed = [climb(level, sizes) for climb, level in zip(self.climbs, levels, strict=True)]
        logits, side = self.classes(self.dropout(sum(climbed[1:], climbed[0]))), self.head_config.subpixels
        return logits if side == 1 else F.pixel_shuffle(logits, side)

    def learn(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        losses = {"class": pixel_loss(self.logits(maps), labels, self.class_weights)}
        if self.auxiliary:
            each = [self._stage_loss(classes(x), labels) for classes, x in zip(self.auxiliary, maps[1:], strict=True)]
            losses["auxiliary"] = self.head_config.auxiliary_weight * sum(each)
        return losses

    def _stage_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """At the map's own resolution: a token's label is that of the pixel in its middle."""
        middle = F.interpolate(labels[:, None].float(), size=logits.shape[2:], mode="nearest-exact")[:, 0].long()
        return pixel_loss(logits, middle, self.class_weights)

    def folded(self) -> nn.Module:
        """For inference: without the classifiers that only learn."""
        self.auxiliary = nn.ModuleList()
        return self


MODEL = SemanticFpnSegmenter
