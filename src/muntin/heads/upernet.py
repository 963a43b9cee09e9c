"""UperNet (arXiv 1807.10221): segmentation-models-pytorch's decoder, the published classifier and second head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segmentation_models_pytorch.base.modules import Conv2dReLU
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Segmenter, fitting_backbone, pixel_loss
from muntin.heads.layers import GridPool, conv_act, normal
from muntin.layers.folding import fold_after

IMAGE = [3, 0]
"""Channels at strides 1 and 2, which smp's decoders expect in front of the maps and leave out."""


@dataclass(frozen=True)
class UperNet:
    """channels: of the decoder; smp's own default, 256, is another head. dropout: of whole channels, before both
    classifiers. auxiliary: channels of the second head, on the last map but one, which only learns; 0 for none.
    auxiliary_weight: of its loss.
    """

    channels: int = 512
    dropout: float = 0.1
    auxiliary: int = 256
    auxiliary_weight: float = 0.4


CONFIGS = {"upernet": UperNet()}


class UperNetSegmenter(Segmenter):
    """Backbone, pooling at scales 1, 2, 3 and 6 on the last map, top-down pyramid, and one map of all levels."""

    def __init__(self, head: str, config: UperNet, name: str, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__(head, config, name, num_classes)
        self.backbone = fitting_backbone(name, None, options)
        channels = list(self.backbone.channels)
        self.decoder = UPerNetDecoder(IMAGE + channels, encoder_depth=5, decoder_channels=config.channels)
        # The maps are normed already, with the authors' epsilon and under the names of their checkpoints.
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)
        self.classes = _classifier(config.channels, num_classes, config.dropout)
        self.auxiliary: nn.Sequential | None = None
        if config.auxiliary:
            conv = conv_act(channels[max(len(channels) - 2, 0)], config.auxiliary, "batch")
            self.auxiliary = nn.Sequential(*conv, *_classifier(config.auxiliary, num_classes, config.dropout))

    def logits(self, maps: list[Tensor]) -> Tensor:
        return self.classes(self.decoder([maps[0], maps[0], *maps]))

    def learn(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        if len(labels) < 2:
            raise UserError("UperNet norms maps of one pixel over the batch: train on at least 2 images at a time")
        losses = {"class": pixel_loss(self.logits(maps), labels, self.class_weights)}
        if self.auxiliary is not None:
            second = self.auxiliary(maps[max(len(maps) - 2, 0)])
            losses["auxiliary"] = self.head_config.auxiliary_weight * pixel_loss(second, labels, self.class_weights)
        return losses

    def folded(self) -> nn.Module:
        """For inference: BatchNorms in the convolutions before them, pooling as products, and no second head."""
        self.auxiliary = None
        for scale in self.decoder.psp.blocks:
            scale[0] = GridPool(scale[0].output_size)
        for block in self.decoder.modules():
            if isinstance(block, Conv2dReLU) and isinstance(block[1], nn.BatchNorm2d):
                block[0] = fold_after(block[1], block[0])
                del block[1]
        return self


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), normal(nn.Conv2d(channels, num_classes, 1), 0.01))


MODEL = UperNetSegmenter
