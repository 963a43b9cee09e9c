"""Polygons to masks: a pixel is inside where its centre is.

Between the edges of one polygon every second region is inside (even-odd); several polygons are joined. COCO's own code
draws the outline on a grid five times as fine, so that pixels on the outline, and only those, may differ from it.
"""

from collections.abc import Sequence

import numpy as np


def polygon_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of 0 and 1. polygons: x1, y1, x2, y2, ... in pixels, each of at least three points."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        _draw(mask, np.asarray(polygon, np.float64).reshape(-1, 2))
    return mask


def _draw(mask: np.ndarray, points: np.ndarray) -> None:
    """Add one polygon: in each column of pixels, every crossing of an edge turns inside to outside."""
    height, width = mask.shape
    start, end = points, np.roll(points, -1, axis=0)
    swapped = (start[:, 0] > end[:, 0])[:, None]
    start, end = np.where(swapped, end, start), np.where(swapped, start, end)
    first = np.ceil(start[:, 0] - 0.5).clip(0, width).astype(np.int64)  # centres from start up to, but not at, end
    last = np.ceil(end[:, 0] - 0.5).clip(0, width).astype(np.int64)
    crossed = last - first
    if not crossed.any():
        return
    edge = np.repeat(np.arange(len(points)), crossed)
    column = first[edge] + np.arange(len(edge)) - np.repeat(crossed.cumsum() - crossed, crossed)
    slope = (end[edge, 1] - start[edge, 1]) / (end[edge, 0] - start[edge, 0])
    y = start[edge, 1] + slope * (column + 0.5 - start[edge, 0])
    row = np.ceil(y - 0.5).clip(0, height).astype(np.int64)
    left, top = column.min(), row.min()
    toggles = np.zeros((row.max() + 1 - top, column.max() + 1 - left), np.uint8)
    np.bitwise_xor.at(toggles, (row - top, column - left), 1)
    inside = np.bitwise_xor.accumulate(toggles, axis=0)[:-1]  # the last row is outside
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside
