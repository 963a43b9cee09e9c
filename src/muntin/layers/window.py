"""How a map is cut into windows, and the gathers that bring tokens into an order and back.

Two forms of the same partition. Eager code knows sizes as integers and keeps tokens window by window
through a whole stage; windows stand outermost and those with the same mask side by side, so that a batch
shares one bias matrix per kind of window. Exported and compiled code has symbols for sizes: there every
re-ordering is a gather on index tensors made from `arange`, without a branch on a size.

Legend: B batch, H W map, N = H * W tokens, w_h w_w window, A = w_h * w_w, n windows, C channels. The stream
of tokens is (n, B, A, C); raster order is a single window that is the map: (1, B, N, C).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from muntin.layers.position import constants, relative_index, separation_mask
from muntin.layers.tracing import symbolic, transformed


def fresh(size: int) -> int:
    """The same size as a symbol of its own, under export and `muntin.compile`, so that expressions never nest.

    Elsewhere, in compiled training and in an export of fixed size, sizes stay as they are: a backward pass asks more
    of them, and a fixed graph is to hold no symbol.
    """
    if not symbolic(size):
        return size
    inference = not torch.is_grad_enabled() and torch._dynamo.config.capture_scalar_outputs
    if not (torch.compiler.is_exporting() or inference):
        return size
    symbol: Any = torch.scalar_tensor(size, dtype=torch.int64).item()  # a symbol, not an int
    torch._check(symbol >= 1)
    return symbol


def axis_rule(side: Any, window: int, shifted: bool, small_maps: str) -> tuple[Any, Any]:
    """Window and shift along one axis of a map, for integers and symbols alike.

    "shrink": where the window is no smaller than the map the window is the map, and nothing shifts.
    "pad": the window stays and the shift too, as in the authors' detection code.
    """
    if small_maps == "pad":
        return window, window // 2 if shifted else 0
    longer = torch.sym_min(1, torch.sym_max(0, side - window))  # 1 where the map is longer than the window
    return torch.sym_min(window, side), longer * (window // 2) if shifted else 0


@dataclass(frozen=True)
class Grid:
    """One partition of a map, in plain integers."""

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        return -(-self.height // self.window[0]), -(-self.width // self.window[1])

    @property
    def area(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def aligned(self) -> bool:
        """No padding: the tokens of the map fill the windows."""
        return self.height % self.window[0] == 0 and self.width % self.window[1] == 0


def make_grid(height: int, width: int, window: int, shifted: bool, small_maps: str) -> Grid:
    wh, sh = axis_rule(height, window, shifted, small_maps)
    ww, sw = axis_rule(width, window, shifted, small_maps)
    return Grid(height, width, (wh, ww), (sh, sw))


@dataclass(frozen=True)
class Group:
    """Windows start to stop have the same mask: none for kind 0, along x for 1, along y for 2, both for 3."""

    start: int
    stop: int
    kind: int


def _axis_source(side: int, window: int, shift: int, count: int) -> Tensor:
    """(count, w) coordinates on the padded map that the slots of each window hold: padding, then the roll."""
    slots = torch.arange(count * window).view(count, window)
    return (slots + shift) % (count * window)


@lru_cache(maxsize=256)
def window_tokens(grid: Grid) -> tuple[Tensor, Tensor, tuple[Group, ...]]:
    """Raster tokens of each slot (n, A), clamped; which slots are real (n, A); groups of windows."""
    with constants():
        rows, cols = grid.counts
        y = _axis_source(grid.height, grid.window[0], grid.shift[0], rows)[:, None, :, None]
        x = _axis_source(grid.width, grid.window[1], grid.shift[1], cols)[None, :, None, :]
        real = (y < grid.height) & (x < grid.width)
        token = y.clamp(max=grid.height - 1) * grid.width + x.clamp(max=grid.width - 1)
        kind = torch.zeros(rows, cols, dtype=torch.int64)
        kind[-1, :] += 2 * int(grid.shift[0] > 0)
        kind[:, -1] += int(grid.shift[1] > 0)
        order = torch.sort(kind.view(-1), stable=True)
        counts = torch.bincount(order.values, minlength=4).tolist()
        groups, start = [], 0
        for number, count in enumerate(counts):
            if count:
                groups.append(Group(start, start + count, number))
            start += count
        flat = (rows * cols, grid.area)
        return token.reshape(flat)[order.indices], real.reshape(flat)[order.indices], tuple(groups)


@lru_cache(maxsize=256)
def _slots(grid: Grid) -> Tensor:
    """For each raster token the slot that holds it: (N,)."""
    with constants():
        token, real, _ = window_tokens(grid)
        slots = torch.empty(grid.height * grid.width, dtype=torch.int64)
        slots[token[real]] = torch.arange(token.numel()).view(token.shape)[real]
        return slots


@lru_cache(maxsize=64)
def kind_masks(grid: Grid, device: torch.device) -> Tensor:
    """Masks of the four kinds of windows: (4, A, A)."""
    with constants():
        (wh, ww), (sh, sw) = grid.window, grid.shift
        below = (torch.arange(wh) >= wh - sh).long()[:, None].expand(wh, ww).reshape(-1)
        right = (torch.arange(ww) >= ww - sw).long()[None, :].expand(wh, ww).reshape(-1)
        labels = torch.stack([torch.zeros_like(right), right, 2 * below, 2 * below + right])
        return separation_mask(labels).to(device)


@lru_cache(maxsize=64)
def window_masks(grid: Grid, device: torch.device) -> Tensor:
    """The mask of each window: (n, A, A)."""
    with constants():
        masks = kind_masks(grid, device)
        return torch.cat([masks[g.kind].expand(g.stop - g.start, -1, -1) for g in window_tokens(grid)[2]])


@dataclass(frozen=True)
class Move:
    """A gather of rows, and the gather that is its adjoint. `keep` is (rows, 1), or None where all are real."""

    index: Tensor
    keep: Tensor | None
    back_index: Tensor
    back_keep: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, C) -> (rows', C)"""
        if torch.is_grad_enabled() and x.requires_grad and not transformed():
            return _Gather.apply(x, self.index, self.keep, self.back_index, self.back_keep)
        return _gather(x, self.index, self.keep)


def _gather(x: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
    out = x.index_select(0, index)
    return out if keep is None else out.mul_(keep)


class _Gather(torch.autograd.Function):
    """An index_select's own backward adds row by row on a CPU; a permutation's is a gather as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, keep: Tensor | None, back_index: Tensor, back_keep: Tensor | None
    ) -> Tensor:
        ctx.indices = index, keep, back_index, back_keep
        return _gather(x, index, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, keep, back_index, back_keep = ctx.indices
        return (
            _Gather.apply(grads[0].contiguous(), back_index, back_keep, index, keep),
            None,
            None,
            None,
            None,
        )


def _rows(slots: Tensor, area: int, batch: int) -> Tensor:
    """Slots (...) of a map -> rows of the stream (..., B), whose windows stand outermost."""
    window, place = slots // area, slots % area
    rows = window[..., None] * (batch * area) + torch.arange(batch) * area + place[..., None]
    return rows


@lru_cache(maxsize=128)
def move(source: Grid | None, target: Grid | None, size: tuple[int, int], batch: int, device: torch.device) -> Move:
    """From one order of a map's tokens to another; None is raster order. Padding slots become zero."""
    with constants():
        forth, keep = _move_index(source, target, size, batch)
        back, back_keep = _move_index(target, source, size, batch)
        return Move(
            forth.to(device),
            None if keep is None else keep.to(device),
            back.to(device),
            None if back_keep is None else back_keep.to(device),
        )


def _move_index(
    source: Grid | None, target: Grid | None, size: tuple[int, int], batch: int
) -> tuple[Tensor, Tensor | None]:
    tokens = size[0] * size[1]
    if target is None:
        wanted, real = torch.arange(tokens)[None], None  # (1, N)
    else:
        wanted, real, _ = window_tokens(target)  # (n, A)
    slots = wanted if source is None else _slots(source)[wanted]
    rows = _rows(slots, tokens if source is None else source.area, batch)  # (n, A, B)
    keep = None
    if real is not None and not bool(real.all()):
        keep = real[:, None, :].expand(-1, batch, -1).reshape(-1, 1).float()
    return rows.transpose(1, 2).reshape(-1).int(), keep


def same_order(source: Grid | None, target: Grid | None) -> bool:
    """Whether both orders are one: the same grid, or both a single window that is the map, unshifted."""
    return source == target or (_is_raster(source) and _is_raster(target))


def _is_raster(grid: Grid | None) -> bool:
    return grid is None or (grid.window == (grid.height, grid.width) and grid.shift == (0, 0))


def reorder(x: Tensor, source: Grid | None, target: Grid | None, size: tuple[int, int]) -> Tensor:
    """Stream (n, B, A, C) of a map of this size from one order to another."""
    if same_order(source, target):
        return x
    batch, channels = x.shape[1], x.shape[-1]
    area = size[0] * size[1] if target is None else target.area
    x = move(source, target, size, batch, x.device)(x.reshape(-1, channels))
    return x.view(-1, batch, area, channels)


PIECE = 1 << 19
"""Values of a block's input that are worked on at a time on a CPU."""


def window_runs(grid: Grid, batch: int, start: int, stop: int) -> list[Group]:
    """Of the windows start to stop of a stream, those of a kind together, counted from start."""
    runs = []
    for group in window_tokens(grid)[2]:
        first, last = max(group.start * batch, start), min(group.stop * batch, stop)
        if first < last:
            runs.append(Group(first - start, last - start, group.kind))
    return runs


def pieces(grid: Grid, batch: int, channels: int) -> Iterator[tuple[int, int, list[Group]]]:
    """Pieces of a stream of about equal size that fit a cache: first row, last row, and the kinds of windows."""
    windows = grid.counts[0] * grid.counts[1] * batch
    count = -(-windows * grid.area * channels // PIECE)
    for i in range(count):
        start, stop = windows * i // count, windows * (i + 1) // count
        if start < stop:
            yield start * grid.area, stop * grid.area, window_runs(grid, batch, start, stop)


@lru_cache(maxsize=64)
def merge_move(
    source: Grid | None, target: Grid | None, size: tuple[int, int], batch: int, device: torch.device
) -> Move:
    """From the tokens of a map to the 2x2 neighbours of each token of the next, in the target's order.

    Four rows for each token, in the order (0,0), (1,0), (0,1), (1,1) of (row, column); an odd side is padded
    with zeros. `size` is the map before merging.
    """
    with constants():
        height, width = size
        half_h, half_w = (height + 1) // 2, (width + 1) // 2
        if target is None:
            wanted = torch.arange(half_h * half_w)[None]  # (1, N / 4)
        else:
            wanted = window_tokens(target)[0]  # (n, A)
        y = 2 * (wanted // half_w)[..., None] + torch.tensor([0, 1, 0, 1])  # (n, A, 4)
        x = 2 * (wanted % half_w)[..., None] + torch.tensor([0, 0, 1, 1])
        real = (y < height) & (x < width)
        token = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
        slots = token if source is None else _slots(source)[token]
        rows = _rows(slots, height * width if source is None else source.area, batch)  # (n, A, 4, B)
        index = rows.permute(0, 3, 1, 2).reshape(-1)
        real = real[:, None].expand(-1, batch, -1, -1).reshape(-1)
        back = torch.empty(height * width * batch, dtype=torch.int64)
        back[index[real]] = torch.arange(index.numel())[real]
        keep = None if bool(real.all()) else real[:, None].float().to(device)
        return Move(index.int().to(device), keep, back.int().to(device), None)


@dataclass(frozen=True)
class SymbolicGrid:
    """A partition whose sizes may be symbols: index tensors for (B, N, C) tokens in raster order.

    enter: (n * A,) tokens of each slot, clamped; keep: (n * A, 1), zero where a slot is padding;
    leave: (N,) slots of each token; mask: (n, A, A), or None without shift; offsets: (A * A,) rows of a bias table.
    """

    window: tuple[int, int]
    count: int
    enter: Tensor
    keep: Tensor
    leave: Tensor
    mask: Tensor | None
    offsets: Tensor

    @property
    def area(self) -> int:
        return self.window[0] * self.window[1]


def symbolic_grid(
    height: int, width: int, window: int, shifted: bool, small_maps: str, device: torch.device
) -> SymbolicGrid:
    """The same partition as `make_grid`, by gathers alone and without a branch on a size."""
    wh, sh = axis_rule(height, window, shifted, small_maps)
    ww, sw = axis_rule(width, window, shifted, small_maps)
    rows, cols = fresh((height + wh - 1) // wh), fresh((width + ww - 1) // ww)
    y = _symbolic_axis(height, wh, sh, rows, device)
    x = _symbolic_axis(width, ww, sw, cols, device)
    inside = torch.logical_and(y.real.view(rows, 1, wh, 1), x.real.view(1, cols, 1, ww))
    enter = y.token.view(rows, 1, wh, 1) * _scalar(width, device) + x.token.view(1, cols, 1, ww)
    leave = (y.window[:, None] * _scalar(cols, device) + x.window[None, :]) * _scalar(wh * ww, device)
    leave = leave + y.place[:, None] * _scalar(ww, device) + x.place[None, :]
    mask = None
    if shifted:
        labels = y.label.view(rows, 1, wh, 1) * 3 + x.label.view(1, cols, 1, ww)
        mask = separation_mask(labels.reshape(rows * cols, wh * ww))
    return SymbolicGrid(
        window=(wh, ww),
        count=rows * cols,
        enter=enter.reshape(-1),
        keep=inside.reshape(-1, 1).float(),
        leave=leave.reshape(-1),
        mask=mask,
        offsets=relative_index(wh, ww, window, device),
    )


@dataclass(frozen=True)
class _Axis:
    token: Tensor  # (count * w,) coordinate on the map, clamped
    real: Tensor  # (count * w,)
    label: Tensor  # (count * w,) region after the roll
    window: Tensor  # (side,) the window that holds a coordinate
    place: Tensor  # (side,) its place there


def _scalar(size: int, device: torch.device) -> Tensor:
    """A size enters tensor arithmetic as a tensor: `tensor % symbol` has no ONNX translation."""
    return torch.scalar_tensor(size, dtype=torch.int64, device=device)


def _symbolic_axis(side: int, window: int, shift: int, count: int, device: torch.device) -> _Axis:
    padded, w, s = _scalar(count * window, device), _scalar(window, device), _scalar(shift, device)
    slot = torch.arange(count * window, device=device)
    coordinate = torch.remainder(slot + s, padded)
    last = _scalar(side, device) - 1
    label = (slot >= padded - w).long() + (slot >= padded - s).long()
    rolled = torch.remainder(torch.arange(side, device=device) - s + padded, padded)
    # no division: a runtime in bfloat16 may compute it as floats
    windows = torch.arange(count, device=device)[:, None].expand(count, window).reshape(-1)
    places = torch.arange(window, device=device)[None, :].expand(count, window).reshape(-1)
    return _Axis(
        torch.minimum(coordinate, last),
        coordinate <= last,
        label,
        windows.index_select(0, rolled),
        places.index_select(0, rolled),
    )
