"""Procedural textures: (H, W) in 0..1 from a generator, and two colours for them."""

from collections.abc import Callable

import numpy as np
from PIL import Image

Generator = np.random.Generator


def texture(random: Generator, side: int) -> np.ndarray:
    """A random texture in two random colours of limited contrast, (H, W, 3) float64 in 0..255."""
    values = KINDS[random.integers(len(KINDS))](random, side)
    values = (values - values.min()) / max(values.max() - values.min(), 1e-9)
    base = random.uniform(40, 215) + random.uniform(-1, 1, 3) * 45
    other = np.clip(base + random.uniform(-1, 1, 3) * 30 + random.uniform(15, 45) * random.choice([-1, 1]), 10, 245)
    light = 1 + 0.12 * (_turned(random, side)[0] / side)  # from one side, as a lamp gives it
    return (base + values[..., None] * (other - base)) * light[..., None]


def clouds(random: Generator, side: int) -> np.ndarray:
    """Random grids, each twice as fine and half as strong as the one before."""
    return sum(0.5**octave * _grid(random, side, 4 * 2**octave) for octave in range(4))  # type: ignore[return-value]


def grain(random: Generator, side: int) -> np.ndarray:
    """Fine noise over coarse."""
    return 0.6 * _grid(random, side, 48) + 0.8 * _grid(random, side, 3)


def stripes(random: Generator, side: int) -> np.ndarray:
    """Waves in one direction, bent a little."""
    along, _ = _turned(random, side)
    return np.sin(along * random.uniform(0.25, 0.8) + 2.5 * _grid(random, side, 4))


def rings(random: Generator, side: int) -> np.ndarray:
    """Grown wood: waves around a point outside."""
    x, y = _turned(random, side)
    return np.sin(np.hypot(x + 0.6 * side, y) * random.uniform(0.25, 0.7) + 3 * _grid(random, side, 4))


def checks(random: Generator, side: int) -> np.ndarray:
    """Squares, turned."""
    x, y = _turned(random, side)
    width = random.uniform(7, 22)
    return (np.floor(x / width) + np.floor(y / width)) % 2 + 0.3 * _grid(random, side, 24)


def cells(random: Generator, side: int) -> np.ndarray:
    """Stones: to each random point what is nearest to it, with joints between."""
    points = random.uniform(0, side, (random.integers(12, 40), 2))
    place = np.arange(side)
    distances = np.hypot(place[:, None, None] - points[:, 0], place[None, :, None] - points[:, 1])  # H W points
    nearest = np.argsort(distances, axis=-1)[..., :2]
    first, second = np.moveaxis(np.take_along_axis(distances, nearest, axis=-1), -1, 0)
    shades = random.uniform(0.3, 1, len(points))[nearest[..., 0]]
    return shades * np.clip((second - first) / 3, 0, 1) + 0.15 * _grid(random, side, 32)


KINDS: tuple[Callable[[Generator, int], np.ndarray], ...] = (clouds, grain, stripes, rings, checks, cells)


def _grid(random: Generator, side: int, cells: int) -> np.ndarray:
    """Random numbers of -1..1 on a coarse grid, smoothly between them."""
    coarse = Image.fromarray(random.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float64)


def _turned(random: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in pixels from the centre along two axes at a random angle."""
    angle = random.uniform(0, 2 * np.pi)
    place = np.arange(side) - side / 2
    x, y = place[None, :], place[:, None]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
