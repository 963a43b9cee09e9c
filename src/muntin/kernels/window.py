"""Window attention that reads and writes maps in raster order: no roll, no partition, no merge, no mask in memory.

softmax(s q k^T + bias + mask) v within windows (Swin, arXiv 2103.14030, section 3.2). Which token stands in a slot of
a window is index arithmetic on the shift and the padding; the bias comes from its compact table, and what the shift
brought together is told apart by coordinates. A program keeps the bias of one head in registers while it works
through many windows, where a window fits one tile.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, d channels of a head, A tokens of a window,
n windows of all images, S rows of the bias table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muntin.kernels.tiles import WARPS, channels_block, precision, tile
from muntin.layers.position import MASKED, relative_index
from muntin.layers.window import Grid, window_masks, window_tokens

APART = tl.constexpr(MASKED)
PARTIAL = 1 << 22
"""Values of the bias gradient's partial sums, which programs write apart so that every run adds in one order."""


@triton.jit
def _axis(place, padded, window, shift):
    """Along one axis of the padded map: the coordinate whose token the roll brings to a place, and the place's
    region of the mask."""
    source = place + shift
    source = tl.where(source >= padded, source - padded, source)
    region = (place >= padded - window).to(tl.int32) + (place >= padded - shift).to(tl.int32)
    return source, region


@triton.jit
def _tokens(slots, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns):
    """Of a window's slots: raster tokens in their image, whether they are no padding, and regions; then the image's
    first token."""
    image, inside = number // (rows * columns), number % (rows * columns)
    y, region_y = _axis(inside // columns * window_h + slots // window_w, rows * window_h, window_h, shift_h)
    x, region_x = _axis(inside % columns * window_w + slots % window_w, columns * window_w, window_w, shift_w)
    real = (slots < window_h * window_w) & (y < height) & (x < width)
    return y * width + x, real, region_y * 3 + region_x, image.to(tl.int64) * height * width


@triton.jit
def _load(source, token, real, first, stride, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """d channels from `column` on of each token: (slots, BLOCK_D), zeros where a slot is padding."""
    d = tl.arange(0, BLOCK_D)
    where = source + (first * stride + column) + (token[:, None] * stride + d[None, :])
    return tl.load(where, real[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def _part(qkv, padding, token, real, first, part, head, channels, D: tl.constexpr, BLOCK_D: tl.constexpr,
          PADDED: tl.constexpr):  # fmt: skip
    """q, k or v, as `part` is 0, 1 or 2, of one head: (slots, BLOCK_D). Where a slot is padding, that of `padding`."""
    column = part * channels + head * D
    x = _load(qkv, token, real, first, 3 * channels, column, D, BLOCK_D)
    if PADDED:
        d = tl.arange(0, BLOCK_D)
        fill = tl.load(padding + column + d, d < D, 0.0).to(x.dtype)
        x = tl.where(real[:, None], x, fill[None, :])
    return x


@triton.jit
def _store(target, token, real, first, stride, column, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    where = target + (first * stride + column) + (token[:, None] * stride + d[None, :])
    tl.store(where, x.to(target.dtype.element_ty), real[:, None] & (d < D)[None, :])


@triton.jit
def _bias(table, i, j, window_w, area, table_h, table_w, heads, head):
    """The bias of each pair of slots: (slots, slots), minus infinity for keys beyond the window."""
    row = tl.minimum(i, area - 1)  # rows beyond the window stay finite, and are not stored
    dy = (row // window_w)[:, None] - (j // window_w)[None, :] + table_h - 1
    dx = (row % window_w)[:, None] - (j % window_w)[None, :] + table_w - 1
    inside = (j < area)[None, :] & (row >= 0)[:, None]
    return tl.load(table + (dy * (2 * table_w - 1) + dx) * heads + head, inside, -float("inf")).to(tl.float32)


@triton.jit
def _logits(q, k, bias, region_i, region_j, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    if SHIFTED:
        logits += tl.where(region_i[:, None] == region_j[None, :], 0.0, APART)
    return logits


@triton.jit
def _forward(
    qkv, table, padding, out, lse, scale, count, each, channels, heads,
    height, width, window_h, window_w, shift_h, shift_w, table_h, table_w, rows, columns,
    SINGLE: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs: (groups of `each` windows, heads, tiles of queries)."""
    head, area = tl.program_id(1), window_h * window_w
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if SINGLE:
        bias = _bias(table, i, i, window_w, area, table_h, table_w, heads, head)
    begin = tl.program_id(0) * each
    for number in range(begin, tl.minimum(begin + each, count)):
        token_i, real_i, region_i, first = _tokens(
            i, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
        )
        q = _part(qkv, padding, token_i, real_i, first, 0, head, channels, D, BLOCK_D, PADDED)
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, area, BLOCK):
            j = start + tl.arange(0, BLOCK)
            token_j, real_j, region_j, first = _tokens(
                j, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
            )
            k = _part(qkv, padding, token_j, real_j, first, 1, head, channels, D, BLOCK_D, PADDED)
            v = _part(qkv, padding, token_j, real_j, first, 2, head, channels, D, BLOCK_D, PADDED)
            if not SINGLE:
                bias = _bias(table, i, j, window_w, area, table_h, table_w, heads, head)
            logits = _logits(q, k, bias, region_i, region_j, scale, SHIFTED, PRECISION)
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = higher
        _store(out, token_i, real_i, first, channels, head * D, mixed / total[:, None], D, BLOCK_D)
        tl.store(lse + (number * heads + head).to(tl.int64) * area + i, top + tl.log(total), i < area)


@triton.jit
def _weights(
    q, k, bias, region_i, region_j, lse, i, area, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The softmax again, from its logarithms of sums: (slots, slots), zero beyond the window."""
    known = tl.load(lse + i, i < area, 0.0)
    logits = _logits(q, k, bias, region_i, region_j, scale, SHIFTED, PRECISION)
    return tl.where((i < area)[:, None], tl.exp(logits - known[:, None]), 0.0)


@triton.jit
def _backward_keys(
    qkv, table, padding, out, lse, grad, grad_qkv, grad_bias, grad_padding, scale, count, each, channels, heads,
    height, width, window_h, window_w, shift_h, shift_w, table_h, table_w, rows, columns,
    SINGLE: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v, the bias and the padding, and of q where a window is one tile.

    Programs: (groups of `each` windows, heads, tiles of keys).
    """
    group, head, area = tl.program_id(0), tl.program_id(1), window_h * window_w
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    own = grad_bias + (group * heads + head).to(tl.int64) * area * area
    if SINGLE:
        bias = _bias(table, j, j, window_w, area, table_h, table_w, heads, head)
        summed = tl.zeros((BLOCK, BLOCK), tl.float32)
    padded_k = tl.zeros((BLOCK_D,), tl.float32)
    padded_v = tl.zeros((BLOCK_D,), tl.float32)
    for number in range(group * each, tl.minimum(group * each + each, count)):
        token_j, real_j, region_j, first = _tokens(
            j, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
        )
        k = _part(qkv, padding, token_j, real_j, first, 1, head, channels, D, BLOCK_D, PADDED)
        v = _part(qkv, padding, token_j, real_j, first, 2, head, channels, D, BLOCK_D, PADDED)
        grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, area, BLOCK):
            i = start + tl.arange(0, BLOCK)
            token_i, real_i, region_i, first = _tokens(
                i, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
            )
            q = _part(qkv, padding, token_i, real_i, first, 0, head, channels, D, BLOCK_D, PADDED)
            given = _load(grad, token_i, real_i, first, channels, head * D, D, BLOCK_D)
            made = _load(out, token_i, real_i, first, channels, head * D, D, BLOCK_D)
            if not SINGLE:
                bias = _bias(table, i, j, window_w, area, table_h, table_w, heads, head)
            known = lse + (number * heads + head).to(tl.int64) * area
            weights = _weights(q, k, bias, region_i, region_j, known, i, area, scale, SHIFTED, PRECISION)
            grad_v += tl.dot(tl.trans(weights.to(given.dtype)), given, input_precision=PRECISION)
            mean = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
            grad_logits = weights * (tl.dot(given, tl.trans(v), input_precision=PRECISION) - mean[:, None])
            small = grad_logits.to(q.dtype)
            grad_k += tl.dot(tl.trans(small), q, input_precision=PRECISION)
            if SINGLE:
                summed += grad_logits
                grad_q = tl.dot(small, k, input_precision=PRECISION) * scale
                _store(grad_qkv, token_i, real_i, first, 3 * channels, head * D, grad_q, D, BLOCK_D)
            else:  # no other program adds to these
                inside = (i < area)[:, None] & (j < area)[None, :]
                tl.atomic_add(own + i[:, None] * area + j[None, :], grad_logits, inside)
        grad_k *= scale
        _store(grad_qkv, token_j, real_j, first, 3 * channels, channels + head * D, grad_k, D, BLOCK_D)
        _store(grad_qkv, token_j, real_j, first, 3 * channels, 2 * channels + head * D, grad_v, D, BLOCK_D)
        if PADDED:
            missing = ((j < area) & (real_j == 0))[:, None]
            padded_k += tl.sum(tl.where(missing, grad_k, 0.0), 0)
            padded_v += tl.sum(tl.where(missing, grad_v, 0.0), 0)
    if SINGLE:
        tl.store(own + j[:, None] * area + j[None, :], summed, (j < area)[:, None] & (j < area)[None, :])
    if PADDED:
        d = tl.arange(0, BLOCK_D)
        row = grad_padding + (group * tl.num_programs(2) + tl.program_id(2)) * 2 * channels + head * D
        tl.store(row + d, padded_k, d < D)
        tl.store(row + channels + d, padded_v, d < D)


@triton.jit
def _backward_queries(
    qkv, table, padding, out, lse, grad, grad_qkv, scale, count, each, channels, heads,
    height, width, window_h, window_w, shift_h, shift_w, table_h, table_w, rows, columns,
    PADDED: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of q where a window is several tiles. Programs: (groups of `each` windows, heads, tiles of queries)."""
    head, area = tl.program_id(1), window_h * window_w
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(0) * each
    for number in range(begin, tl.minimum(begin + each, count)):
        token_i, real_i, region_i, first = _tokens(
            i, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
        )
        q = _part(qkv, padding, token_i, real_i, first, 0, head, channels, D, BLOCK_D, PADDED)
        given = _load(grad, token_i, real_i, first, channels, head * D, D, BLOCK_D)
        made = _load(out, token_i, real_i, first, channels, head * D, D, BLOCK_D)
        mean = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
        known = lse + (number * heads + head).to(tl.int64) * area
        grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, area, BLOCK):
            j = start + tl.arange(0, BLOCK)
            token_j, real_j, region_j, first = _tokens(
                j, number, height, width, window_h, window_w, shift_h, shift_w, rows, columns
            )
            k = _part(qkv, padding, token_j, real_j, first, 1, head, channels, D, BLOCK_D, PADDED)
            v = _part(qkv, padding, token_j, real_j, first, 2, head, channels, D, BLOCK_D, PADDED)
            bias = _bias(table, i, j, window_w, area, table_h, table_w, heads, head)
            weights = _weights(q, k, bias, region_i, region_j, known, i, area, scale, SHIFTED, PRECISION)
            grad_logits = weights * (tl.dot(given, tl.trans(v), input_precision=PRECISION) - mean[:, None])
            grad_q += tl.dot(grad_logits.to(k.dtype), k, input_precision=PRECISION)
        _store(grad_qkv, token_i, real_i, first, 3 * channels, head * D, grad_q * scale, D, BLOCK_D)


class _Launch(NamedTuple):
    """What forward and backward launch with."""

    windows: int  # of all images
    tiles: int  # of a window
    numbers: tuple[int, ...]  # the kernels' arguments from `channels` on
    constants: dict[str, Any]


def _launch(qkv: Tensor, padding: Tensor | None, heads: int, grid: Grid, extent: tuple[int, int]) -> _Launch:
    channels = qkv.shape[2] // 3
    block = tile(grid.area, qkv.dtype)
    return _Launch(
        windows=qkv.shape[0] * grid.counts[0] * grid.counts[1],
        tiles=-(-grid.area // block),
        numbers=(channels, heads, grid.height, grid.width, *grid.window, *grid.shift, *extent, *grid.counts),
        constants={
            "PADDED": padding is not None and not grid.aligned,
            "SHIFTED": grid.shift != (0, 0),
            "PRECISION": precision(qkv),
            "D": channels // heads,
            "BLOCK_D": channels_block(channels // heads),
            "BLOCK": block,
        },
    )


def forward(
    qkv: Tensor, table: Tensor, padding: Tensor | None, heads: int, grid: Grid, extent: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """By the kernel: (B, N, 3C) -> (B, N, C), and the logarithms of the softmax's sums (n, h, A)."""
    qkv, table = qkv.contiguous(), table.contiguous()
    plan = _launch(qkv, padding, heads, grid, extent)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    lse = torch.empty(plan.windows, heads, grid.area, device=qkv.device)
    each = max(1, min(16, plan.windows * heads * plan.tiles >> 12))  # 4096 programs fill any GPU
    programs = (-(-plan.windows // each), heads, plan.tiles)
    fill = qkv if padding is None else padding.contiguous()
    _forward[programs](
        qkv, table, fill, out, lse, scale, plan.windows, each, *plan.numbers,
        SINGLE=plan.tiles == 1, **plan.constants, num_warps=WARPS["forward"],
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    grid: Grid,
    extent: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernels: the gradients of `qkv`, `table` and `padding`, the last two in float32."""
    qkv, table, grad = qkv.contiguous(), table.contiguous(), grad.contiguous()
    plan = _launch(qkv, padding, heads, grid, extent)
    area, channels = grid.area, qkv.shape[2] // 3
    groups = max(1, min(plan.windows, PARTIAL // (heads * area * area)))
    each = -(-plan.windows // groups)
    groups = -(-plan.windows // each)
    grad_qkv = torch.empty_like(qkv)
    make = torch.empty if plan.tiles == 1 else torch.zeros
    grad_bias = make(groups, heads, area, area, device=qkv.device)
    grad_padding = torch.zeros(groups * plan.tiles, 3, channels, device=qkv.device)
    partial = grad_padding[:, 1:].contiguous()
    fill = qkv if padding is None else padding.contiguous()
    common = (qkv, table, fill, out, lse, grad, grad_qkv)
    _backward_keys[(groups, heads, plan.tiles)](
        *common, grad_bias, partial, scale, plan.windows, each, *plan.numbers,
        SINGLE=plan.tiles == 1, **plan.constants, num_warps=WARPS["backward"],
    )  # fmt: skip
    if plan.tiles > 1:
        _backward_queries[(plan.windows, heads, plan.tiles)](
            *common, scale, plan.windows, 1, *plan.numbers, **plan.constants, num_warps=WARPS["backward"]
        )
    grad_padding[:, 1:] = partial
    index = relative_index(*grid.window, extent, qkv.device)  # (A * A,)
    dense = grad_bias.sum(0).flatten(1).t()  # (A * A, h)
    grad_table = torch.ops.aten.embedding_dense_backward(dense, index, table.shape[0], -1, False)
    return grad_qkv, grad_table, grad_padding.sum(0).flatten()


def _parts(qkv: Tensor, padding: Tensor | None, heads: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of each window, padding in its place: (B, n', h, A, d) each, for the n' windows of an image."""
    token, real = (t.to(qkv.device) for t in window_tokens(grid)[:2])
    fill = qkv.new_zeros(qkv.shape[2]) if padding is None else padding.to(qkv.dtype)
    parts = torch.where(real[..., None], qkv[:, token], fill)  # (B, n', A, 3C)
    q, k, v = parts.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    return q, k, v


def _scores(
    q: Tensor, k: Tensor, table: Tensor, heads: int, grid: Grid, extent: tuple[int, int], scale: float
) -> Tensor:
    """The logits: (B, n', h, A, A)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    bias = table.to(exact)[relative_index(*grid.window, extent, q.device)].t().reshape(heads, grid.area, grid.area)
    logits = (q @ k.transpose(-2, -1)).to(exact) * scale + bias
    return logits if grid.shift == (0, 0) else logits + window_masks(grid, q.device)[:, None].to(exact)


def _merged(windows: Tensor, grid: Grid) -> Tensor:
    """(B, n', A, C) -> (B, N, C) in raster order."""
    token, real = (t.to(windows.device) for t in window_tokens(grid)[:2])
    out = windows.new_empty(windows.shape[0], grid.height * grid.width, windows.shape[-1])
    return out.index_copy(1, token[real], windows[:, real])


def reference(
    qkv: Tensor, table: Tensor, padding: Tensor | None, heads: int, grid: Grid, extent: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own operators, one step after the other; what the kernel is tested against."""
    q, k, v = _parts(qkv, padding, heads, grid)
    logits = _scores(q, k, table, heads, grid, extent, scale)
    mixed = (logits.softmax(-1).to(qkv.dtype) @ v).transpose(2, 3).flatten(3)  # (B, n', A, C)
    return _merged(mixed, grid), logits.logsumexp(-1).flatten(0, 1)


def reference_backward(
    grad: Tensor, qkv: Tensor, table: Tensor, padding: Tensor | None, heads: int, grid: Grid, extent: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `reference`, spelled out."""
    q, k, v = _parts(qkv, padding, heads, grid)
    weights = _scores(q, k, table, heads, grid, extent, scale).softmax(-1)
    token, real = (t.to(qkv.device) for t in window_tokens(grid)[:2])
    given = torch.where(real[..., None], grad[:, token], 0).unflatten(-1, (heads, -1)).transpose(2, 3)
    towards = (given @ v.transpose(-2, -1)).to(weights.dtype)
    grad_logits = weights * (towards - (towards * weights).sum(-1, keepdim=True))
    small = grad_logits.to(qkv.dtype)
    parts = small @ k * scale, small.transpose(-2, -1) @ q * scale, weights.to(qkv.dtype).transpose(-2, -1) @ given
    whole = torch.stack(parts, 3).permute(0, 1, 4, 3, 2, 5).flatten(3)  # (B, n', A, 3C)
    dense = grad_logits.sum((0, 1)).flatten(1).t()  # (A * A, h)
    index = relative_index(*grid.window, extent, qkv.device)
    grad_table = torch.ops.aten.embedding_dense_backward(dense, index, table.shape[0], -1, False)
    return _merged(whole, grid), grad_table, whole[:, ~real].sum((0, 1), dtype=weights.dtype)


def _grid(sides: Sequence[int]) -> Grid:
    height, width, *rest = sides
    return Grid(height, width, (rest[0], rest[1]), (rest[2], rest[3]))


@torch.library.custom_op("muntin::window_attention", mutates_args=(), device_types="cuda")
def _operator(
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return forward(qkv, table, padding, heads, _grid(grid), (extent[0], extent[1]), scale)


@_operator.register_kernel("cpu")
def _(
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return reference(qkv, table, padding, heads, _grid(grid), (extent[0], extent[1]), scale)


@_operator.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = _grid(grid)
    windows = qkv.shape[0] * shape.counts[0] * shape.counts[1]
    lse = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), qkv.new_empty(windows, heads, shape.area, dtype=lse)


@torch.library.custom_op("muntin::window_attention_backward", mutates_args=(), device_types="cuda")
def _backward_operator(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, qkv, table, padding, out, lse, heads, _grid(grid), (extent[0], extent[1]), scale)


@_backward_operator.register_kernel("cpu")
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference_backward(grad, qkv, table, padding, heads, _grid(grid), (extent[0], extent[1]), scale)


@_backward_operator.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    grid: Sequence[int],
    extent: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = lse.dtype
    return (
        torch.empty_like(qkv),
        torch.empty_like(table, dtype=exact),
        qkv.new_empty(qkv.shape[2], dtype=exact),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, padding, ctx.heads, ctx.grid, ctx.extent, ctx.scale = inputs
    ctx.save_for_backward(qkv, table, padding, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, padding, out, lse = ctx.saved_tensors
    rule = ctx.heads, ctx.grid, ctx.extent, ctx.scale
    grad_qkv, grad_table, grad_padding = _backward_operator(grad, qkv, table, padding, out, lse, *rule)
    kept = None if padding is None else grad_padding.to(padding.dtype)
    return grad_qkv, grad_table.to(table.dtype), kept, None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup)


def window_attention(
    qkv: Tensor, table: Tensor, padding: Tensor | None, heads: int, grid: Grid, extent: tuple[int, int], scale: float
) -> Tensor:
    """Attention within the windows of a map: (B, N, 3C) in raster order -> (B, N, C), N = H * W.

    table: (S, h), a row for each offset in a window of the sides `extent`, as in `layers.position`. padding: (3C,)
    q, k and v of a token beyond the map, zeros where it is None; they are attended like others, as the authors do.
    On CUDA by Triton, forward and backward; elsewhere by PyTorch's operators.
    """
    sides = [grid.height, grid.width, *grid.window, *grid.shift]
    return _operator(qkv, table, padding, heads, sides, list(extent), scale)[0]
