"""Pictures with objects on them, for comparing exported detectors and segmenters with PyTorch.

B batch, H W image
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muntin.errors import UserError

USUAL: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OBJECTS = 6


class Pictures:
    """Given pictures (3, H, W) uint8, resized to what is asked for; where there are none they are drawn.

    preprocessing: whose mean and std they are normalised by, ImageNet's where it has none.
    """

    def __init__(self, given: Sequence[Tensor] | None = None, preprocessing: Mapping[str, Any] | None = None) -> None:
        """Raises UserError for pictures of another form."""
        self.given, self.preprocessing = list(given or []), USUAL | dict(preprocessing or {})
        for i, picture in enumerate(self.given):
            if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8:
                told = f"{tuple(picture.shape)} {picture.dtype}"
                raise UserError(f"pictures[{i}] is {told}; give bytes (3, H, W), RGB")

    def __call__(self, batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
        """(B, H, W, 3) uint8."""
        return torch.stack([self._one(size, seed * batch + i) for i in range(batch)]).permute(0, 2, 3, 1).contiguous()

    def prepare(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32."""
        mean, std = (torch.tensor(self.preprocessing[key]) for key in ("mean", "std"))
        return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def _one(self, size: tuple[int, int], number: int) -> Tensor:
        if not self.given:
            return drawn(size, number)
        picture = self.given[number % len(self.given)][None].float()
        return F.interpolate(picture, size=size, mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()


def drawn(size: tuple[int, int], seed: int) -> Tensor:
    """(3, H, W) uint8: discs and rectangles of single colours over clouds, with a little noise on all of it."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size
    picture = F.interpolate(torch.rand(1, 3, 4, 4, generator=draw), size=size, mode="bilinear")[0]
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    for number in range(OBJECTS):
        y, x, h, w = (torch.rand(4, generator=draw) * torch.tensor([1, 1, 0.3, 0.3]) + 0.05).tolist()
        down, right = (rows / height - y).abs() / h, (columns / width - x).abs() / w
        inside = down.square() + right.square() < 1 if number % 2 else down.maximum(right) < 1
        picture = torch.where(inside, torch.rand(3, 1, 1, generator=draw), picture)
    picture += 0.03 * torch.randn(3, height, width, generator=draw)
    return (255 * picture).round().clamp(0, 255).byte()
