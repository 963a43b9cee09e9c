"""Masks as COCO's run lengths: {"size": [H, W], "counts": ...}.

The pixels are read column by column, and the counts are the lengths of runs that are in turn outside and inside the
mask, the first one outside. They are a list ("uncompressed"), or text: each count, from the fourth on its difference
from the one two before it, in groups of 5 bits from the lowest on, one character (from "0" on) per group, of which the
sixth bit says that another group follows; the highest bit of the last group is the sign.
"""

from typing import Any

import numpy as np

from muntin.errors import UserError

BITS = 5
MORE = 1 << BITS
ZERO = ord("0")
GROUPS = 13  # groups of 5 bits that a 64-bit count can have


def encode_rle(mask: np.ndarray, at: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> dict[str, Any]:
    """A mask as compressed run lengths, byte for byte as pycocotools writes them.

    mask: (h, w), what is not zero is inside. at, size: where it is a cut-out, the row and column of its upper left
    pixel, and height and width of the whole image, which is empty elsewhere.
    """
    (top, left), (height, width) = at, size or mask.shape
    high, wide = mask.shape
    if top < 0 or left < 0 or top + high > height or left + wide > width:
        raise UserError(f"a mask of {high}x{wide} at row {top}, column {left} does not lie in {height}x{width}")
    columns = np.zeros((wide, high + 2), bool)  # each with a pixel outside before and after it
    np.not_equal(mask.T, 0, out=columns[:, 1:-1])
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), high + 1)
    edges = (left + column) * height + top + row  # in the whole image
    starts, ends = edges[::2], edges[1::2]
    joined = ends[:-1] == starts[1:]  # a run that reaches the lower border goes on at the upper one
    starts = starts[np.concatenate([[True], ~joined])] if len(starts) else starts
    ends = ends[np.concatenate([~joined, [True]])] if len(ends) else ends
    borders = np.stack([starts, ends], 1).reshape(-1)
    counts = np.diff(borders, prepend=0)
    if not len(borders) or borders[-1] < height * width:
        counts = np.append(counts, height * width - (borders[-1] if len(borders) else 0))
    return {"size": [int(height), int(width)], "counts": _to_text(counts)}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """A mask, (H, W) uint8 of 0 and 1. Raises `UserError` where the runs do not fill the size."""
    height, width = rle["size"]
    counts = run_lengths(rle)
    inside = (np.arange(len(counts)) % 2).astype(np.uint8)
    return np.repeat(inside, counts).reshape(width, height).T


def run_lengths(rle: dict[str, Any]) -> np.ndarray:
    """The counts, int64. Raises `UserError` where they are damaged or do not fill the size."""
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode()
    lengths = _from_text(counts) if isinstance(counts, bytes) else np.asarray(counts, np.int64).reshape(-1)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise UserError(
            f"run lengths of {int(lengths.sum())} pixels are given for a mask of {height}x{width}, which has "
            f"{height * width}; write the mask again"
        )
    return lengths


def _to_text(counts: np.ndarray) -> str:
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    shifts = BITS * np.arange(GROUPS - 1)
    rest = values[:, None] >> shifts  # (counts, groups)
    groups = rest & (MORE - 1)
    follows = np.where(groups & (MORE >> 1), rest >> BITS != -1, rest >> BITS != 0)
    wanted = np.ones_like(follows)
    wanted[:, 1:] = np.logical_and.accumulate(follows[:, :-1], axis=1)
    return (groups + MORE * follows + ZERO)[wanted].astype(np.uint8).tobytes().decode("ascii")


def _from_text(text: bytes) -> np.ndarray:
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - ZERO
    last = np.flatnonzero(groups & MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    if not len(groups) or groups.min() < 0 or groups.max() >= 2 * MORE or groups[-1] & MORE:
        raise UserError("compressed run lengths are damaged; write the mask again")
    lengths = last - first + 1
    if lengths.max() >= GROUPS:
        raise UserError("compressed run lengths are damaged; write the mask again")
    place = np.arange(len(groups)) - np.repeat(first, lengths)
    values = np.add.reduceat((groups & (MORE - 1)) << BITS * place, first)
    values -= np.where(groups[last] & (MORE >> 1), 1, 0) << BITS * lengths  # the sign
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
