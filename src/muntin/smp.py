"""Muntin's backbones as encoders of segmentation-models-pytorch: `import muntin.smp`, then `smp.Unet("muntin-swin_t")`.

An encoder gives smp's list of maps: the image, then one map for each stride 2, 4, ... 2^depth. Where the backbone
has none, stride 2 has a map without channels, as smp gives for timm's transformers, and strides between 4 and the
backbone's finest have that finest map, enlarged bilinearly. Depth 5, smp's default, stands for the whole network:
maps at strides above 32 (EfficientViT's 64) are enlarged and stacked on that of stride 32; depth 6 gives them a
level of their own.

smp loads weights in its own format only and drops keyword arguments of encoders that are not timm's, so its
`get_encoder` is replaced by one that hands names starting with `muntin-` to Muntin: `encoder_weights` is then a path,
a tag or True, as `pretrained` of `muntin.create_model`, and other keyword arguments are fields of the configuration.
"""

import sys
from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch.encoders as smp_encoders
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muntin
from muntin.errors import UserError

PREFIX = "muntin-"
WHOLE = 5  # smp's default depth


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> [image, maps (B, out_channels[i], ceil(H / 2^i), ceil(W / 2^i))]."""

    def __init__(
        self,
        name: str,
        depth: int = WHOLE,
        output_stride: int = 32,
        out_norm: bool = True,
        pretrained: bool | str = False,
        **config: Any,
    ) -> None:
        """depth: the coarsest stride is 2^depth. The rest as in `muntin.create_backbone`."""
        super().__init__()
        self._depth = depth
        if output_stride != 32:
            self.make_dilated(output_stride)
        with torch.device("meta"):
            strides = muntin.create_backbone(name, **config).strides
        least, most = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        if not least <= depth <= most:
            raise UserError(f"depth {depth}: the maps of {name} have strides {strides}; give {least} to {most}")
        kept = tuple(i for i, stride in enumerate(strides) if stride <= 2**depth or depth == WHOLE)
        self.backbone = muntin.create_backbone(name, kept, out_norm, pretrained=pretrained, **config)
        self.levels: list[tuple[int, ...]] = []
        """For each stride the maps that are stacked there, by number."""
        for stride in (2**i for i in range(1, depth + 1)):
            at = [i for i, s in enumerate(self.backbone.strides) if s == stride or s > stride == 2**depth]
            self.levels.append(tuple(at or ([0] if 2 < stride < strides[0] else [])))
        self._out_channels = [3] + [sum(self.backbone.channels[i] for i in level) for level in self.levels]

    @property
    def out_channels(self) -> list[int]:
        return list(self._out_channels)

    @property
    def output_stride(self) -> int:
        """What smp wants the sides of an image to be multiples of."""
        return int(2**self._depth)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.backbone(image)
        features = [image]
        for number, level in enumerate(self.levels, 1):
            size = [(side + 2**number - 1) // 2**number for side in image.shape[2:]]
            placed = [maps[i] if self.backbone.strides[i] == 2**number else _resize(maps[i], size) for i in level]
            features.append(torch.cat(placed, 1) if placed else image.new_empty(image.shape[0], 0, *size))
        return features

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        if in_channels != 3:
            raise UserError(
                f"in_channels={in_channels}: Muntin's backbones take 3; for gray images: image.expand(-1, 3, -1, -1)"
            )

    def make_dilated(self, output_stride: int) -> None:
        raise UserError(
            f"output_stride={output_stride}: Muntin's backbones keep their strides; leave it at 32, or choose Unet, "
            "FPN or UPerNet"
        )


def _resize(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _get_encoder(
    original: Callable[..., nn.Module],
    name: str,
    in_channels: int = 3,
    depth: int = WHOLE,
    weights: str | bool | None = None,
    output_stride: int = 32,
    **config: Any,
) -> nn.Module:
    if not name.startswith(PREFIX):
        return original(name, in_channels, depth, weights, output_stride, **config)
    pretrained = True if weights == "imagenet" else weights or False
    encoder = Encoder(name.removeprefix(PREFIX), depth, output_stride, pretrained=pretrained, **config)
    encoder.set_in_channels(in_channels)
    return encoder


def _register() -> None:
    """Add the names to smp's table, and put our `get_encoder` wherever smp has imported its own."""
    for name in muntin.list_models():
        smp_encoders.encoders[PREFIX + name] = {
            "encoder": Encoder,
            "params": {"name": name},
            "pretrained_settings": {},
        }
    original = smp_encoders.get_encoder

    def get_encoder(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        return _get_encoder(original, name, *args, **kwargs)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("segmentation_models_pytorch."):
            if getattr(module, "get_encoder", None) is original:
                module.get_encoder = get_encoder  # type: ignore[attr-defined]


_register()
