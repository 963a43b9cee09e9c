"""timm's shears and translations of an image, in half of the time or less that Pillow's general affine transform takes.

Where every row only moves along itself, a row has one offset, and cubic interpolation four taps instead of sixteen.
The results are Pillow's, but for one level where a value lies less than `ROUNDING` below a whole number.
"""

from typing import Any

import numpy as np
from PIL import Image

TAPS = 4
ROWS = 32  # at a time, to stay in the caches
ROUNDING = 2**-12  # more than that of float32 here, so that even regions stay as they are


def shear_x(image: Image.Image, factor: float, **how: Any) -> Image.Image:
    """Each row, from its centre y, moved left by factor * y pixels. `how`: resample and fillcolor, as timm has them."""
    if not _cubic(image, how):
        return image.transform(image.size, Image.Transform.AFFINE, (1, factor, 0, 0, 1, 0), **how)
    moved = moved_rows(np.asarray(image), factor * (np.arange(image.height) + 0.5), how["fillcolor"])
    return Image.fromarray(moved)


def shear_y(image: Image.Image, factor: float, **how: Any) -> Image.Image:
    """Each column, from its centre x, moved up by factor * x pixels."""
    if not _cubic(image, how):
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, factor, 1, 0), **how)
    columns = np.asarray(image).transpose(1, 0, 2)
    moved = moved_rows(columns, factor * (np.arange(image.width) + 0.5), how["fillcolor"])
    return Image.fromarray(np.ascontiguousarray(moved.transpose(1, 0, 2)))


def translate_x(image: Image.Image, share: float, **how: Any) -> Image.Image:
    """Moved left by a share of the width."""
    if not _cubic(image, how):
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, share * image.width, 0, 1, 0), **how)
    offsets = np.full(image.height, share * image.width)
    return Image.fromarray(moved_rows(np.asarray(image), offsets, how["fillcolor"]))


def translate_y(image: Image.Image, share: float, **how: Any) -> Image.Image:
    """Moved up by a share of the height."""
    if not _cubic(image, how):
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, share * image.height), **how)
    one = np.asarray(image).reshape(1, image.height, -1)  # whose pixels are whole rows
    moved = moved_rows(one, np.array([share * image.height]), np.tile(how["fillcolor"], image.width))
    return Image.fromarray(moved.reshape(image.height, image.width, -1))


def _cubic(image: Image.Image, how: dict[str, Any]) -> bool:
    return image.mode == "RGB" and how.get("resample") == Image.Resampling.BICUBIC and how.get("fillcolor") is not None


def moved_rows(pixels: np.ndarray, offsets: np.ndarray, fill: Any) -> np.ndarray:
    """(H, W, C) uint8 pixels whose row y at x is the row at x + offsets[y]; `fill` where that is outside.

    Interpolation is Pillow's cubic (a = -1), beyond the edge by the last pixel, with values cut off, not rounded.
    """
    height, width, channels = pixels.shape
    whole = np.floor(offsets).astype(np.int64).clip(-width, width)
    edge = int(np.abs(whole).max()) + TAPS
    wide = np.empty((height, width + 2 * edge, channels), np.uint8)
    wide[:, :edge], wide[:, edge : edge + width], wide[:, edge + width :] = pixels[:, :1], pixels, pixels[:, -1:]
    wide = wide.reshape(height, -1)
    firsts = (whole + edge - 1) * channels
    windows = np.lib.stride_tricks.sliding_window_view(wide, (width + TAPS - 1) * channels, axis=1)
    weights = _cubic_weights((offsets - np.floor(offsets)).astype(np.float32)[:, None])
    moved = np.empty((height, width * channels), np.uint8)
    for start in range(0, height, ROWS):
        rows = slice(start, start + ROWS)
        taps = windows[np.arange(height)[rows], firsts[rows]].astype(np.float32)
        values = np.full((len(taps), width * channels), ROUNDING, np.float32)
        for i, weight in enumerate(weights):
            values += weight[rows] * taps[:, i * channels : (i + width) * channels]
        moved[rows] = values.clip(0, 255, out=values)
    moved = moved.reshape(pixels.shape)
    inside = offsets[:, None] + (np.arange(width) + 0.5)
    moved[(inside < 0) | (inside >= width)] = fill
    return moved


def _cubic_weights(part: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of the four pixels around a place that is `part` of the way from the second to the third."""
    square, cube = part**2, part**3
    return -cube + 2 * square - part, cube - 2 * square + 1, -cube + square + part, cube - square
