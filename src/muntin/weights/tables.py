"""Tables of position biases: what window they are of, and another window's made from them."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from muntin.errors import UserError
from muntin.weights.rules import Reading


def resize_table(table: Tensor, shape: torch.Size, window: tuple[int, int] | None = None) -> Tensor | None:
    """A bias table for another window: bicubic on its (2h-1) x (2w-1) grid. None where it is no such table.

    window: the height and width of the table's own; square unless given. `shape` is that of a square window.
    """
    if table.ndim != 2 or table.shape[1] != shape[1]:
        return None
    grid, wanted = grid_of(table.shape[0], window), grid_of(shape[0], None)
    if grid is None or wanted is None:
        return None
    values = table.float().t().reshape(1, -1, *grid)
    values = F.interpolate(values, size=wanted, mode="bicubic", align_corners=False)
    return values.flatten(2)[0].t().to(table.dtype)


def grid_of(rows: int, window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The sides of a table's grid of offsets."""
    if window is not None:
        return 2 * window[0] - 1, 2 * window[1] - 1
    side = math.isqrt(rows)
    return (side, side) if side * side == rows else None


def possible_windows(rows: int) -> list[tuple[int, int]]:
    """The windows, of more than one row and column, that have a table of so many rows; compact ones first."""
    odd = [n for n in range(3, rows // 3 + 1, 2) if rows % n == 0 and (rows // n) % 2]
    pairs = [((n + 1) // 2, (rows // n + 1) // 2) for n in odd]
    return sorted(pairs, key=lambda pair: (max(pair), pair))


def _choose(rows: int, given: tuple[int, int]) -> tuple[int, int] | None:
    """The window of a table out of those that may be, for a file whose windows are at most `given`."""
    if (2 * given[0] - 1) * (2 * given[1] - 1) == rows:
        return given
    if grid_of(rows, None) is not None:
        return None
    fits = [pair for pair in possible_windows(rows) if pair[0] <= given[0] and pair[1] <= given[1]]
    if len(fits) > 1:
        fits = [pair for pair in fits if (pair[0] > pair[1]) == (given[0] > given[1])]
    return fits[0] if len(fits) == 1 else None


def check_window(window: object) -> None:
    """UserError where it is no height and width."""
    sides = window if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"file_window={window!r}: give height and width in tokens, as in (4, 7)")


def _window_of_index(index: Tensor, rows: int) -> tuple[int, int] | None:
    """A table's window from the offsets of its first token to all others: those in its own row count down by one."""
    if index.is_floating_point() or index.is_meta:
        return None
    area = math.isqrt(index.numel())
    first = index.flatten()[:area].tolist()
    width = next((x for x in range(area) if first[x] != (rows - 1) // 2 - x), area)
    window = area // max(width, 1), width
    return window if width and (2 * window[0] - 1) * (2 * window[1] - 1) == rows else None


def table_windows(
    reading: Reading, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], given: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """Height and width of the window of each table where the file's index of positions shows them, or `given` fits.

    timm cuts a window to the map along each axis, so a table may be of a smaller window than the one given.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in weights.items():
        if not name.endswith("bias_table") or tensor.ndim != 2:
            continue
        index = state.get(reading.sources[name].parts[0].replace("_bias_table", "_index"))
        if index is not None and (window := _window_of_index(index, tensor.shape[0])) is not None:
            found[name] = window
        elif given is not None and (window := _choose(tensor.shape[0], given)) is not None:
            found[name] = window
    return found
