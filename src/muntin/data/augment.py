"""Training transforms: an image, encoded or decoded, and the numbers that it may draw from -> (3, H, W) uint8.

Nothing is drawn from a generator that lives on. Normalisation and random erasing follow on the device (device.py).
"""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import mtrand
from PIL import Image, ImageOps
from torch import Tensor

from muntin.data.decode import Box, Picture, cut
from muntin.data.shear import shear_x, shear_y, translate_x, translate_y
from muntin.data.transforms import to_bytes
from muntin.errors import UserError

Seed = tuple[int, int, int]  # of the run, epoch, index


class Augment(Protocol):
    """A training transform; what it makes is a function of the image and the seed."""

    def __call__(self, image: Picture, seed: Seed, /) -> Tensor: ...


class Plain:
    """No augmentation: what evaluation sees, as `transform` makes it."""

    def __init__(self, transform: Callable[[Picture], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Picture, seed: Seed) -> Tensor:
        return self.transform(image)

    def __repr__(self) -> str:
        return "Plain()"


class Distort:
    """Small rotation, scale, shear, shift and bending of the resized image, for characters: no flip, no crop.

    At strength 1 up to 15 degrees, a factor of 1.16 each way, 0.15, and a tenth of the side; bending moves
    the knots of a 4 x 4 mesh by a normal deviate of 1/32 of the side (after Simard et al., ICDAR 2003).
    """

    CELLS = 4

    def __init__(self, picture: Callable[[Picture], Image.Image], strength: float = 1.0) -> None:
        self.picture = picture
        self.radians = strength * math.radians(15)
        self.scale, self.shear, self.shift = 0.15 * strength, 0.15 * strength, 0.1 * strength
        self.bend = strength / 32
        self.strength = strength

    def __call__(self, picture: Picture, seed: Seed) -> Tensor:
        image = self.picture(picture)
        x, y = self._knots(np.random.default_rng(seed))
        x, y = ((x + 0.5) * image.width).tolist(), ((y + 0.5) * image.height).tolist()
        edges_x = [round(image.width * i / self.CELLS) for i in range(self.CELLS + 1)]
        edges_y = [round(image.height * i / self.CELLS) for i in range(self.CELLS + 1)]
        mesh = []
        for i, j in itertools.product(range(self.CELLS), repeat=2):
            box = (edges_x[j], edges_y[i], edges_x[j + 1], edges_y[i + 1])
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))  # anticlockwise from the upper left
            mesh.append((box, tuple(value for r, c in corners for value in (x[r][c], y[r][c]))))
        image = image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
        return to_bytes(np.array(image))

    def _knots(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Where each knot of the mesh is taken from: x and y in sides from the centre, (CELLS + 1, CELLS + 1)."""
        turn, wide, high, lean, right, down = random.uniform(-1, 1, 6).tolist()
        sine, cosine = math.sin(self.radians * turn), math.cos(self.radians * turn)
        wide, high, lean = math.exp(self.scale * wide), math.exp(self.scale * high), self.shear * lean
        place = np.linspace(-0.5, 0.5, self.CELLS + 1)
        x, y = wide * (place[None, :] + lean * place[:, None]), high * place[:, None]
        noise = self.bend * random.standard_normal((2, self.CELLS + 1, self.CELLS + 1))
        x, y = cosine * x - sine * y, sine * x + cosine * y
        return x + self.shift * right + noise[0], y + self.shift * down + noise[1]

    def __repr__(self) -> str:
        return f"Distort(strength={self.strength}, cells={self.CELLS})"


class Photographs:
    """Random resized crop, flip, and RandAugment or colour jitter: the recipe of DeiT and Swin.

    The crop follows the law of timm's and torchvision's, and is drawn before the image is decoded, which is done at no
    larger a scale than the crop needs; what comes after flipping are timm's own operations.

    size: height and width; mean: what RandAugment fills empty corners with; strength: timm's name of a policy, as in
    "rand-m9-mstd0.5-inc1", or "" for none; color_jitter: of brightness, contrast and saturation, where there is no
    policy; flip: its probability
    """

    SCALE = (0.08, 1.0)  # of the image's area
    RATIO = (3 / 4, 4 / 3)
    ATTEMPTS = 10  # to draw a crop that fits

    def __init__(
        self,
        size: tuple[int, int],
        mean: tuple[float, ...],
        strength: str = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        flip: float = 0.5,
    ) -> None:
        from timm.data import auto_augment, create_transform

        self.size = size
        self.flip = flip
        try:
            _, self.colours, _ = create_transform(
                size,
                is_training=True,
                auto_augment=strength or None,
                color_jitter=color_jitter,
                interpolation="bicubic",
                mean=mean,
                separate=True,
            )
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"randaugment={strength!r} is no policy that timm knows ({error}); give one such as "
                'rand-m9-mstd0.5-inc1, or "" for none'
            ) from error
        instead: dict[Callable[..., Any], Callable[..., Any]] = {
            auto_augment.posterize: posterize,
            auto_augment.shear_x: shear_x,
            auto_augment.shear_y: shear_y,
            auto_augment.translate_x_rel: translate_x,
            auto_augment.translate_y_rel: translate_y,
        }
        for operation in _operations(self.colours.transforms):
            operation.aug_fn = instead.get(operation.aug_fn, operation.aug_fn)

    def __call__(self, image: Picture, seed: Seed) -> Tensor:
        generator = np.random.default_rng(seed)
        box, flipped = self._draw(image.size, generator)
        picture = Image.fromarray(cut(image, box, self.size))
        if flipped:
            picture = ImageOps.mirror(picture)
        with _drawing_from(generator):
            return to_bytes(np.array(self.colours(picture)))

    def crop(self, size: tuple[int, int], seed: Seed) -> tuple[Box, bool]:
        """The box that is cut from an image of this width and height, and whether it is flipped: for dense labels."""
        return self._draw(size, np.random.default_rng(seed))

    def _draw(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[Box, bool]:
        flipped = generator.random() < self.flip
        return random_crop(size, self.SCALE, self.RATIO, generator.random((self.ATTEMPTS, 4)).tolist()), flipped

    def __repr__(self) -> str:
        return (
            f"Photographs(RandomResizedCrop(size={self.size}, scale={self.SCALE}, "
            f"ratio=({self.RATIO[0]:.4f}, {self.RATIO[1]:.4f}), interpolation=bicubic), "
            f"RandomHorizontalFlip(p={self.flip}), {self.colours!r})"
        )


def _operations(transforms: Sequence[Any]) -> Iterator[Any]:
    """timm's operations, of whatever policy they are part."""
    for transform in transforms:
        yield from (*getattr(transform, "ops", ()), *itertools.chain(*getattr(transform, "policy", ())))


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation as it was meant: at the largest magnitudes no bit is left, which recent Pillow refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], draws: list[list[float]]
) -> Box:
    """A box of random area and ratio of sides, at a random place, from rows of four uniform numbers.

    The first that fits the image (width, height) is taken; failing that the largest central one of an allowed ratio.
    """
    width, height = size
    low, high = map(math.log, ratio)
    for area, aspect, across, down in draws:
        pixels = (scale[0] + (scale[1] - scale[0]) * area) * width * height
        wanted = math.exp(low + (high - low) * aspect)
        wide, tall = round(math.sqrt(pixels * wanted)), round(math.sqrt(pixels / wanted))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(across * (width - wide + 1)), int(down * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide = min(width, max(round(height * ratio[1]), 1))
    tall = min(height, max(round(width / ratio[0]), 1))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


@contextlib.contextmanager
def _drawing_from(generator: np.random.Generator) -> Iterator[None]:
    """The three global generators that timm draws from, determined by this one for a while and then put back."""
    python, torchs, legacy = random.getstate(), torch.get_rng_state(), mtrand.get_bit_generator()
    cached: Any = np.random.get_state(legacy=False)  # numpy forgets a second normal deviate when it is given another
    first, second = generator.integers(2**63, size=2).tolist()
    random.seed(first)
    torch.default_generator.manual_seed(second)
    mtrand.set_bit_generator(generator.bit_generator)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        mtrand.set_bit_generator(legacy)
        if cached["has_gauss"]:
            np.random.set_state(cached)
