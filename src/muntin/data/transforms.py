"""Evaluation and training transforms: a PIL image to the model's input, (3, H, W) float."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from muntin.data.images import to_rgb
from muntin.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP = 224 / 256  # the papers resize the shorter side to 256 and crop 224 from the centre
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An RGB image as (3, H, W) float, scaled to 0..1, minus `mean`, over `std`."""
    scale, shift = _affine(tuple(mean), tuple(std))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # 3 H W
    return torch.addcmul(shift, pixels, scale)


@lru_cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, (3, 1, 1), that take 0..255 to the normalised values."""
    deviation = torch.tensor(std)[:, None, None]
    return 1 / (255 * deviation), -torch.tensor(mean)[:, None, None] / deviation


class Evaluate:
    """Resize the shorter side, crop the centre, normalise; or, with `resize=None`, resize the whole image."""

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
        self.interpolation = INTERPOLATIONS[interpolation]

    def picture(self, image: Image.Image) -> Image.Image:
        """What the model sees, still an RGB image: resized and cropped."""
        image = to_rgb(image)
        if self.resize is None:
            return image.resize((self.width, self.height), self.interpolation)
        scale = max(self.resize / min(image.size), self.height / image.height, self.width / image.width)
        wide = max(round(image.width * scale), self.width)
        high = max(round(image.height * scale), self.height)
        image = image.resize((wide, high), self.interpolation)
        left, top = (wide - self.width) // 2, (high - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(self.picture(image), self.mean, self.std)
