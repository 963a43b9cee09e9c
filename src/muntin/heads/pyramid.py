"""Feature pyramids and anchors that read a backbone's strides.

B batch, H W image
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from muntin.errors import UserError
from muntin.heads.layers import xavier

RETINA = tuple(4 * 2 ** (i / 3) for i in range(3))
"""Sides of RetinaNet's anchors over their level's stride."""


class FeaturePyramid(nn.Module):
    """Maps of a backbone -> maps of equal channels at strides that double (arXiv 1612.03144).

    Levels finer than the backbone's finest map grow out of that level by 2x2 transposed convolutions of stride 2, each
    with a 3x3 convolution behind it, as in EfficientViT's detectors. Coarser ones are made by `coarser`: "pool" takes
    every second position of the level before, as Mask R-CNN does; "conv" is a 3x3 convolution of stride 2, the first
    of the backbone's last map and the others of the level before, as in RetinaNet.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        input_strides: Sequence[int],
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        coarser: str = "pool",
    ) -> None:
        """inputs, input_strides: channels and strides of the backbone's maps.
        channels, strides: of the levels; each stride is twice the one before, and all of the maps' are among them.

        Raises UserError for strides that do not fit.
        """
        super().__init__()
        self.strides, self.input_strides = tuple(strides), tuple(input_strides)
        doubled = all(
            b == 2 * a for s in (self.strides, self.input_strides) for a, b in zip(s[:-1], s[1:], strict=True)
        )
        if not self.strides or not doubled or not set(self.input_strides) <= set(self.strides):
            raise UserError(
                f"strides={self.strides} for maps at strides {self.input_strides}: each is twice the one before, and "
                "the maps' are among the levels'; choose maps with create_backbone(..., out_indices=...)"
            )
        if coarser not in ("pool", "conv"):
            raise UserError(f"coarser={coarser!r}: give 'pool' or 'conv'")
        self.out_channels = channels
        self.fpn = FeaturePyramidNetwork(list(inputs), channels)
        finer = self.strides.index(self.input_strides[0])
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range(finer))
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(finer))
        beyond = len(self.strides) - finer - len(self.input_strides) if coarser == "conv" else 0
        sources = [inputs[-1], *[channels] * beyond]
        self.shrink = nn.ModuleList(xavier(nn.Conv2d(sources[i], channels, 3, 2, 1)) for i in range(beyond))

    def levels(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """maps: the backbone's. size: (H, W) of its image. -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        found = list(self.fpn(OrderedDict((str(i), each) for i, each in enumerate(maps))).values())
        x = found[0]
        finer = [stride for stride in self.strides if stride < self.input_strides[0]]
        for stride, enlarge, smooth in zip(reversed(finer), self.enlarge, self.smooth, strict=True):
            height, width = (-(-side // stride) for side in size)
            x = enlarge(x)[:, :, :height, :width]
            found.insert(0, smooth(x))
        x = maps[-1]
        for shrink in self.shrink:
            x = shrink(x)
            found.append(x)
        while len(found) < len(self.strides):
            found.append(F.max_pool2d(found[-1], 1, 2))
        return found

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        return self.levels(maps, size)


class Anchors(AnchorGenerator):
    """Anchors of true strides, not rounded, centred on the first pixel of each cell.

    torchvision divides the image by the map to get a stride, which fails where the map was rounded up, and rounds the
    anchors' corners, which nobody else does.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float]) -> None:
        """Sides of scales * stride, of each ratio of height to width."""
        super().__init__(
            tuple(tuple(stride * s for s in scales) for stride in strides), (tuple(ratios),) * len(strides)
        )
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> Tensor:
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        halves = torch.stack(((sides / roots).flatten(), (sides * roots).flatten()), 1) / 2  # width, height
        return torch.cat((-halves, halves), 1)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)  # 16 bits are too few
        steps = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        every = torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps))
        return [every for _ in image_list.image_sizes]
