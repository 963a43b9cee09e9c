"""Regions of feature maps, pooled to squares by RoIAlign (arXiv 1703.06870).

R regions, C channels, H W map, P side of what is pooled, n m samples of a cell along its height and width
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

FINEST = 14
"""Cells along a region, to twice that, of the level chosen for it (arXiv 1612.03144: 224 pixels at stride 16)."""


class RoiPool(nn.Module):
    """RoIAlign from the level that suits each region's size: levels and boxes -> (R, C, P, P).

    torchvision's MultiScaleRoIAlign guesses strides from sizes, which fails for small images, and knows only regions
    whose pixels' values stand at their corners.
    """

    def __init__(self, side: int, strides: Sequence[int], samples: int, aligned: bool) -> None:
        """samples: per cell and axis, 0 for one at each position. aligned: values stand at pixels' centres."""
        super().__init__()
        self.side, self.strides, self.samples, self.aligned = side, tuple(strides), samples, aligned

    def forward(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """levels: of all images, at least as many as strides. boxes: of each image, (n, 4) in its pixels."""
        regions = torch.cat(list(boxes))
        images = torch.cat([torch.full_like(each[:, :1], i) for i, each in enumerate(boxes)])
        rois = torch.cat((images, regions), 1)
        which = self.level_of(regions)
        parts, order = [], []
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=False)):
            here = torch.where(which == i)[0]
            parts.append(self.from_level(level, rois[here], 1 / stride))
            order.append(here)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def from_level(self, level: Tensor, rois: Tensor, scale: float) -> Tensor:
        """rois: (R, 5), the number of an image and a box in pixels. scale: the level's sides over the image's."""
        if serves(level) and level.is_contiguous(memory_format=torch.channels_last) and not level.is_contiguous():
            return pool_rows(level, rois, self.side, scale, self.samples, self.aligned)
        pooled = roi_align(level.to(rois.dtype), rois, (self.side, self.side), scale, self.samples or -1, self.aligned)
        return pooled.to(level.dtype)

    def level_of(self, regions: Tensor) -> Tensor:
        """Number of the level for each box (R, 4)."""
        sides = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).clamp(min=0).sqrt()
        octaves = torch.log2(sides / (FINEST * self.strides[0]) + 1e-6).floor()
        return octaves.clamp(0, len(self.strides) - 1).long()


def serves(level: Tensor) -> bool:
    """Whether `pool_rows` is the faster way: in inference on a CPU."""
    plain = level.device.type == "cpu" and level.dtype == torch.float32 and not torch.compiler.is_compiling()
    return plain and not (level.requires_grad and torch.is_grad_enabled())


def pool_rows(level: Tensor, rois: Tensor, side: int, scale: float, samples: int, aligned: bool) -> Tensor:
    """RoIAlign of a map in channels-last memory: (R, 5) -> (R, C, P, P) in the same memory.

    Each cell is a weighted sum of 4 n m pixels, whose channels lie together: an embedding bag. torchvision's operator
    copies the map to have its channels apart and takes one number at a time.
    """
    height, width = level.shape[2:]
    starts = rois[:, 1:3] * scale - (0.5 if aligned else 0.0)
    sides = rois[:, 3:] * scale - (0.5 if aligned else 0.0) - starts
    if not aligned:
        sides = sides.clamp(min=1.0)
    counts = torch.full_like(sides, samples).long() if samples else (sides / side).ceil().long()
    rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
    out = rows.new_zeros(len(rois), side * side, level.shape[1])
    for m, n in counts.unique(dim=0).tolist():
        if min(m, n) < 1:
            continue  # a region without area is zero
        here = torch.where((counts[:, 0] == m) & (counts[:, 1] == n))[0]
        x, at_x = _axis(starts[here, 0], sides[here, 0], side, m, width)
        y, at_y = _axis(starts[here, 1], sides[here, 1], side, n, height)
        y = y + rois[here, 0].long().view(-1, 1, 1) * height
        index = y[:, :, None, :, None] * width + x[:, None, :, None, :]  # R, P, P, 2n, 2m
        weight = at_y[:, :, None, :, None] * at_x[:, None, :, None, :]
        cells = len(here) * side * side
        found = F.embedding_bag(
            index.reshape(cells, -1), rows, mode="sum", per_sample_weights=weight.reshape(cells, -1)
        )
        out[here] = found.view(len(here), side * side, -1)
    return out.view(-1, side, side, level.shape[1]).permute(0, 3, 1, 2)


def _axis(start: Tensor, extent: Tensor, side: int, samples: int, limit: int) -> tuple[Tensor, Tensor]:
    """Positions along an axis that each of `side` cells takes, and how much of each: (R, P, 2 samples)."""
    steps = (torch.arange(side * samples, device=start.device, dtype=start.dtype) + 0.5) / (side * samples)
    place = start[:, None] + extent[:, None] * steps
    share = ((place >= -1) & (place <= limit)).to(start.dtype) / samples
    place = place.clamp(0, limit - 1)
    low = place.floor()
    part = place - low
    both = torch.stack((low, (low + 1).clamp(max=limit - 1)), 2).long()
    weights = torch.stack(((1 - part) * share, part * share), 2)
    return both.view(len(start), side, -1), weights.view(len(start), side, -1)
