"""Colours that tell classes apart, however many there are."""

from functools import lru_cache

import numpy as np

Colour = tuple[int, int, int]

FIRST = (0, 134, 230)  # near which the sequence begins
LIGHTNESS = (0.45, 0.88)  # of Oklab: neither near black nor near white
CHROMA = 0.09  # at least: greys look like a picture's own


def class_colours(count: int) -> list[Colour]:
    """One colour for each class. The colours of the first classes do not depend on how many follow."""
    sequence = _sequence()
    return [sequence[i % len(sequence)] for i in range(count)]


@lru_cache
def _sequence() -> list[Colour]:
    """Colours of which each is as far as possible from all before it, by distance in Oklab."""
    levels = np.arange(0, 256, 15)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > LIGHTNESS[0]) & (lab[:, 0] < LIGHTNESS[1]) & (chroma > CHROMA)
    rgb, lab = rgb[usable], lab[usable]
    chosen = int(np.abs(rgb - np.array(FIRST)).sum(1).argmin())
    nearest = np.full(len(rgb), np.inf)
    sequence = []
    for _ in range(256):
        sequence.append(chosen)
        nearest = np.minimum(nearest, ((lab - lab[chosen]) ** 2).sum(1))
        chosen = int(nearest.argmax())
    return [(int(r), int(g), int(b)) for r, g, b in rgb[sequence]]


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB of 0..255, (n, 3), as Oklab (Ottosson, 2020), in which distances are those that are seen."""
    values = rgb / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(cones) @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip


def ink(colour: Colour) -> Colour:
    """Black or white: what is read more easily on it."""
    return (0, 0, 0) if oklab(np.array([colour]))[0, 0] > 0.66 else (255, 255, 255)
