"""The evaluation transform: an image, encoded or decoded, to the model's input."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from muntin.data.decode import INTERPOLATIONS, Picture, cut
from muntin.data.images import to_rgb
from muntin.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP = 224 / 256  # the papers resize the shorter side to 256 and crop 224 from the centre
MARGIN = 2.0  # an image twice as large as needed in every direction, or more, is decoded at a reduced scale


def to_bytes(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 as a tensor (3, H, W) that shares its memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


@lru_cache
def affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, (3, 1, 1), that take 0..255 to values scaled to 0..1, minus `mean`, over `std`."""
    deviation = torch.tensor(std)[:, None, None]
    return 1 / (255 * deviation), -torch.tensor(mean)[:, None, None] / deviation


class Evaluate:
    """Resize the shorter side, crop the centre, normalise; or, with `resize=None`, resize the whole image.

    A call takes an encoded or a Pillow image to (3, H, W) float.
    """

    def __init__(
        self,
        size: Sequence[int],
        resize: int | None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        channels: str = "RGB",
    ) -> None:
        if interpolation not in INTERPOLATIONS or channels != "RGB":
            raise UserError(
                f"preprocessing with interpolation={interpolation!r}, channels={channels!r} is unknown; "
                f"valid are {', '.join(INTERPOLATIONS)} and RGB"
            )
        self.height, self.width = size
        self.resize = resize
        self.mean, self.std = mean, std
        self.interpolation = interpolation

    def pixels(self, image: Picture) -> np.ndarray:
        """What the model sees, (H, W, 3) uint8: resized and cropped."""
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        width, height = image.size
        whole = (0, 0, width, height)
        if self.resize is None:
            return cut(image, whole, (self.height, self.width), self.interpolation, MARGIN)
        scale = max(self.resize / min(width, height), self.height / height, self.width / width)
        wide, high = max(round(width * scale), self.width), max(round(height * scale), self.height)
        left, top = (wide - self.width) // 2, (high - self.height) // 2
        resized = cut(image, whole, (high, wide), self.interpolation, MARGIN)
        return resized[top : top + self.height, left : left + self.width]

    def picture(self, image: Picture) -> Image.Image:
        """What the model sees, still an RGB image."""
        return Image.fromarray(np.ascontiguousarray(self.pixels(image)))

    def bytes(self, image: Picture) -> torch.Tensor:
        """What the model sees, (3, H, W) uint8: for `Prepare`, which normalises a batch on the device."""
        return to_bytes(self.pixels(image))

    def __call__(self, image: Picture) -> torch.Tensor:
        scale, shift = affine(tuple(self.mean), tuple(self.std))
        return self.bytes(image).to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
