"""What is done to a whole batch, on the device: normalisation and random erasing.

B batch, H W image
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muntin.data.transforms import affine


class Prepare(nn.Module):
    """(B, 3, H, W) uint8 to normalised float: scaled to 0..1, minus `mean`, over `std`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale, shift = affine(tuple(mean), tuple(std))
        self.register_buffer("scale", scale.clone(), persistent=False)
        self.register_buffer("shift", shift.clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return pixels.mul_(self.scale).add_(self.shift)


class Erase(nn.Module):
    """Random erasing (Zhong et al., arXiv 1708.04896) of a normalised batch, in place, as timm's mode "pixel".

    With `probability` an image has a rectangle of 2% to a third of its area, of a ratio of sides between 0.3 and 1/0.3,
    replaced by normal deviates. Rectangles are drawn on the CPU, so that a GPU is not waited for, deviates on the
    device, both from torch's default generators.
    """

    AREA = (0.02, 1 / 3)
    RATIO = (0.3, 1 / 0.3)
    ATTEMPTS = 10  # to draw a rectangle that fits

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, images: Tensor) -> Tensor:
        if not self.probability:
            return images
        batch, _, height, width = images.shape
        for image, box in zip(images, self.rectangles(batch, height, width), strict=True):
            if box is not None:
                top, left, height, width = box
                noise = torch.randn(3, height, width, dtype=image.dtype, device=image.device)
                image[:, top : top + height, left : left + width] = noise  # in place it would take five times as long
        return images

    def rectangles(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int] | None]:
        """For each image top, left, height and width in pixels, or None."""
        chosen = torch.rand(batch) < self.probability
        draws = torch.rand(batch, self.ATTEMPTS, 4, dtype=torch.double)
        return [
            self._fitting(draw, height, width) if hit else None
            for hit, draw in zip(chosen.tolist(), draws.tolist(), strict=True)
        ]

    def _fitting(self, draws: list[list[float]], height: int, width: int) -> tuple[int, int, int, int] | None:
        low, high = map(math.log, self.RATIO)
        for size, ratio, down, across in draws:
            area = (self.AREA[0] + (self.AREA[1] - self.AREA[0]) * size) * height * width
            aspect = math.exp(low + (high - low) * ratio)
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide
        return None

    def extra_repr(self) -> str:
        return f"probability={self.probability}, mode=pixel, area={self.AREA}, ratio={self.RATIO}"
