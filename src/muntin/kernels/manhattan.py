"""Manhattan self-attention on maps in raster order; rotation and decay are computed in registers.

softmax(q k^T + ln(gamma) distance) v (RMT, arXiv 2309.11523) over the whole map, along its rows, or along its columns,
which are read where they are: nothing is transposed, no mask and no rotated q or k is written to memory. q and k are
turned by the raster index of their token, pairs of neighbouring channels as complex numbers; k is scaled by d^-0.5.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, d channels of a head, L tokens of one attention (a
line: N, or a row's W, or a column's H), M lines of all images.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muntin.kernels.tiles import WARPS, channels_block, precision, tile

WHOLE, ROWS, COLUMNS = 0, 1, 2
_WHOLE, _ROWS = tl.constexpr(WHOLE), tl.constexpr(ROWS)
OCTAVES = math.log2(10000)
"""From the fastest rotation to the slowest."""


@triton.jit
def _tokens(places, line, height, width, LINES: tl.constexpr):
    """Places along a line of all images' lines: raster tokens within the image, and the image's first token."""
    if LINES == _WHOLE:
        image, token = line, places
    elif LINES == _ROWS:
        image, token = line // height, line % height * width + places
    else:
        image, token = line // width, places * width + line % width
    return token, image.to(tl.int64) * height * width


@triton.jit
def _load(source, token, first, inside, stride, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    where = source + (first * stride + column) + (token[:, None] * stride + d[None, :])
    return tl.load(where, inside[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def _store(target, token, first, inside, stride, column, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    where = target + (first * stride + column) + (token[:, None] * stride + d[None, :])
    tl.store(where, x.to(target.dtype.element_ty), inside[:, None] & (d < D)[None, :])


@triton.jit
def _turn(x, token, scale, fall, SIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, d) turned by each token's angles, forth for a SIGN of 1 and back for -1, then scaled; float32.

    fall: octaves from one pair to the next, negative.
    """
    speed = tl.exp2(tl.arange(0, BLOCK_D // 2).to(tl.float32) * fall)
    angle = token[:, None].to(tl.float32) * speed[None, :]
    cos, sin = tl.cos(angle) * scale, tl.sin(angle) * (SIGN * scale)
    a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (x.shape[0], BLOCK_D))


@triton.jit
def _logits(q, k, i, j, length, width, slope, LINES: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of turned q and k: (places, places), minus infinity for keys beyond the line."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if LINES == _WHOLE:
        distance = tl.abs((i // width)[:, None] - (j // width)[None, :])
        distance += tl.abs((i % width)[:, None] - (j % width)[None, :])
    else:
        distance = tl.abs(i[:, None] - j[None, :])
    return tl.where((j < length)[None, :], logits + slope * distance.to(tl.float32), -float("inf"))


@triton.jit
def _forward(
    qk, v, slopes, out, lse, channels, heads, length, height, width, fall,
    LINES: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs: (lines, heads, tiles of queries)."""
    line, head = tl.program_id(0), tl.program_id(1)
    slope = tl.load(slopes + head)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    token_i, first = _tokens(i, line, height, width, LINES)
    q = _load(qk, token_i, first, i < length, 2 * channels, head * D, D, BLOCK_D)
    q = _turn(q, token_i, 1.0, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token_j, _ = _tokens(j, line, height, width, LINES)
        k = _load(qk, token_j, first, j < length, 2 * channels, channels + head * D, D, BLOCK_D)
        k = _turn(k, token_j, D**-0.5, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
        value = _load(v, token_j, first, j < length, channels, head * D, D, BLOCK_D)
        logits = _logits(q, k, i, j, length, width, slope, LINES, PRECISION)
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    _store(out, token_i, first, i < length, channels, head * D, mixed / total[:, None], D, BLOCK_D)
    tl.store(lse + (line * heads + head).to(tl.int64) * length + i, top + tl.log(total), i < length)


@triton.jit
def _backward_keys(
    qk, v, slopes, out, lse, grad, grad_qk, grad_v, channels, heads, length, height, width, fall,
    SINGLE: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, and of q where a line is one tile. Programs: (lines, heads, tiles of keys)."""
    line, head = tl.program_id(0), tl.program_id(1)
    slope = tl.load(slopes + head)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    token_j, first = _tokens(j, line, height, width, LINES)
    k = _load(qk, token_j, first, j < length, 2 * channels, channels + head * D, D, BLOCK_D)
    k = _turn(k, token_j, D**-0.5, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
    value = _load(v, token_j, first, j < length, channels, head * D, D, BLOCK_D)
    sum_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token_i, _ = _tokens(i, line, height, width, LINES)
        q = _load(qk, token_i, first, i < length, 2 * channels, head * D, D, BLOCK_D)
        q = _turn(q, token_i, 1.0, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
        given = _load(grad, token_i, first, i < length, channels, head * D, D, BLOCK_D)
        made = _load(out, token_i, first, i < length, channels, head * D, D, BLOCK_D)
        known = tl.load(lse + (line * heads + head).to(tl.int64) * length + i, i < length, 0.0)
        logits = _logits(q, k, i, j, length, width, slope, LINES, PRECISION)
        weights = tl.where((i < length)[:, None], tl.exp(logits - known[:, None]), 0.0)
        sum_v += tl.dot(tl.trans(weights.to(given.dtype)), given, input_precision=PRECISION)
        mean = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
        grad_logits = weights * (tl.dot(given, tl.trans(value), input_precision=PRECISION) - mean[:, None])
        small = grad_logits.to(q.dtype)
        sum_k += tl.dot(tl.trans(small), q, input_precision=PRECISION)
        if SINGLE:
            grad_q = _turn(tl.dot(small, k, input_precision=PRECISION), token_i, 1.0, fall, -1, BLOCK_D)
            _store(grad_qk, token_i, first, i < length, 2 * channels, head * D, grad_q, D, BLOCK_D)
    grad_k = _turn(sum_k, token_j, D**-0.5, fall, -1, BLOCK_D)
    _store(grad_qk, token_j, first, j < length, 2 * channels, channels + head * D, grad_k, D, BLOCK_D)
    _store(grad_v, token_j, first, j < length, channels, head * D, sum_v, D, BLOCK_D)


@triton.jit
def _backward_queries(
    qk, v, slopes, out, lse, grad, grad_qk, channels, heads, length, height, width, fall,
    LINES: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of q where a line is several tiles. Programs: (lines, heads, tiles of queries)."""
    line, head = tl.program_id(0), tl.program_id(1)
    slope = tl.load(slopes + head)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    token_i, first = _tokens(i, line, height, width, LINES)
    q = _load(qk, token_i, first, i < length, 2 * channels, head * D, D, BLOCK_D)
    q = _turn(q, token_i, 1.0, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
    given = _load(grad, token_i, first, i < length, channels, head * D, D, BLOCK_D)
    made = _load(out, token_i, first, i < length, channels, head * D, D, BLOCK_D)
    mean = tl.sum(given.to(tl.float32) * made.to(tl.float32), 1)
    known = tl.load(lse + (line * heads + head).to(tl.int64) * length + i, i < length, 0.0)
    sum_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token_j, _ = _tokens(j, line, height, width, LINES)
        k = _load(qk, token_j, first, j < length, 2 * channels, channels + head * D, D, BLOCK_D)
        k = _turn(k, token_j, D**-0.5, fall, 1, BLOCK_D).to(qk.dtype.element_ty)
        value = _load(v, token_j, first, j < length, channels, head * D, D, BLOCK_D)
        logits = _logits(q, k, i, j, length, width, slope, LINES, PRECISION)
        weights = tl.exp(logits - known[:, None])
        grad_logits = weights * (tl.dot(given, tl.trans(value), input_precision=PRECISION) - mean[:, None])
        sum_q += tl.dot(grad_logits.to(k.dtype), k, input_precision=PRECISION)
    grad_q = _turn(sum_q, token_i, 1.0, fall, -1, BLOCK_D)
    _store(grad_qk, token_i, first, i < length, 2 * channels, head * D, grad_q, D, BLOCK_D)


def _lines(tokens: int, height: int, width: int, lines: int) -> tuple[int, int]:
    """Lines of an image, and tokens of a line."""
    return {WHOLE: (1, tokens), ROWS: (height, width), COLUMNS: (width, height)}[lines]


def _named(v: Tensor, heads: int, length: int, lines: int) -> dict[str, Any]:
    width = v.shape[2] // heads
    return {
        "fall": -OCTAVES / max(width // 2 - 1, 1),
        "LINES": lines,
        "PRECISION": precision(v),
        "D": width,
        "BLOCK_D": channels_block(width),
        "BLOCK": tile(length, v.dtype),
    }


def forward(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> tuple[Tensor, Tensor]:
    """By the kernel: (B, N, 2C) and (B, N, C) -> (B, N, C), and the logarithms of the softmax's sums (M, h, L)."""
    qk, v, slopes = qk.contiguous(), v.contiguous(), slopes.float()
    batch, tokens, channels = v.shape
    count, length = _lines(tokens, height, width, lines)
    heads = len(slopes)
    out = torch.empty_like(v)
    lse = torch.empty(batch * count, heads, length, device=v.device)
    named = _named(v, heads, length, lines)
    programs = (batch * count, heads, -(-length // named["BLOCK"]))
    _forward[programs](
        qk, v, slopes, out, lse, channels, heads, length, height, width, **named, num_warps=WARPS["forward"]
    )
    return out, lse


def backward(
    grad: Tensor, qk: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor, height: int, width: int, lines: int
) -> tuple[Tensor, Tensor]:
    """By the kernels: the gradients of `qk` and `v`."""
    qk, v, grad, slopes = qk.contiguous(), v.contiguous(), grad.contiguous(), slopes.float()
    batch, tokens, channels = v.shape
    count, length = _lines(tokens, height, width, lines)
    heads = len(slopes)
    grad_qk, grad_v = torch.empty_like(qk), torch.empty_like(v)
    named = _named(v, heads, length, lines)
    tiles = -(-length // named["BLOCK"])
    programs = (batch * count, heads, tiles)
    inputs = (qk, v, slopes, out, lse, grad, grad_qk)
    numbers = (channels, heads, length, height, width)
    _backward_keys[programs](*inputs, grad_v, *numbers, SINGLE=tiles == 1, **named, num_warps=WARPS["backward"])
    if tiles > 1:
        _backward_queries[programs](*inputs, *numbers, **named, num_warps=WARPS["backward"])
    return grad_qk, grad_v


def _turned(x: Tensor, back: bool = False) -> Tensor:
    """q and k (B, N, 2, h, d) turned by the raster index of their token, or back, and k scaled."""
    tokens, d = x.shape[1], x.shape[-1]
    exact = torch.promote_types(x.dtype, torch.float32)
    speed = 10000 ** -torch.linspace(0, 1, d // 2, dtype=exact, device=x.device)
    angle = (torch.arange(tokens, device=x.device)[:, None].to(exact) * speed)[:, None, None]  # (N, 1, 1, d / 2)
    cos, sin = angle.cos(), -angle.sin() if back else angle.sin()
    a, b = x.to(exact).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return turned * torch.tensor([1, d**-0.5], dtype=exact, device=x.device)[:, None, None]


def _order(height: int, width: int, lines: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The raster tokens of each line (lines, L), and the distances along a line (L, L)."""
    place = torch.arange(height * width, device=device)
    y, x = place // width, place % width
    if lines == WHOLE:
        return place[None], (y[:, None] - y).abs() + (x[:, None] - x).abs()
    order = place.view(height, width) if lines == ROWS else place.view(height, width).t()
    along = torch.arange(order.shape[1], device=device)
    return order, (along[:, None] - along).abs()


def _weights(q: Tensor, k: Tensor, slopes: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax, and the logarithms of its sums."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(-2, -1)).to(exact) + slopes.to(exact)[:, None, None] * distance
    return logits.softmax(-1), logits.logsumexp(-1)


def _merged(x: Tensor, order: Tensor) -> Tensor:
    """(B, lines, h, L, d) -> (B, N, h, d) in raster order."""
    tokens = x.transpose(2, 3).flatten(1, 2)
    return torch.empty_like(tokens).index_copy(1, order.reshape(-1), tokens)


def reference(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own operators, one step after the other; what the kernel is tested against."""
    heads = len(slopes)
    order, distance = _order(height, width, lines, v.device)
    parts = *_turned(qk.unflatten(-1, (2, heads, -1))).to(v.dtype).unbind(2), v.unflatten(-1, (heads, -1))
    q, k, w = (part[:, order].transpose(2, 3) for part in parts)  # (B, lines, h, L, d)
    weights, sums = _weights(q, k, slopes, distance)
    return _merged(weights.to(v.dtype) @ w, order).flatten(2), sums.flatten(0, 1)


def reference_backward(
    grad: Tensor, qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int
) -> tuple[Tensor, Tensor]:
    """The gradients of `reference`, spelled out."""
    heads = len(slopes)
    order, distance = _order(height, width, lines, v.device)
    parts = *_turned(qk.unflatten(-1, (2, heads, -1))).to(v.dtype).unbind(2), v.unflatten(-1, (heads, -1))
    q, k, w = (part[:, order].transpose(2, 3) for part in parts)
    given = grad.unflatten(-1, (heads, -1))[:, order].transpose(2, 3)
    weights, _ = _weights(q, k, slopes, distance)
    towards = (given @ w.transpose(-2, -1)).to(weights.dtype)
    grad_logits = (weights * (towards - (towards * weights).sum(-1, keepdim=True))).to(v.dtype)
    grad_qk = torch.stack([_merged(grad_logits @ k, order), _merged(grad_logits.transpose(-2, -1) @ q, order)], 2)
    grad_v = _merged(weights.to(v.dtype).transpose(-2, -1) @ given, order)
    return _turned(grad_qk, back=True).to(qk.dtype).flatten(2), grad_v.flatten(2)


@torch.library.custom_op("muntin::manhattan_attention", mutates_args=(), device_types="cuda")
def _operator(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> tuple[Tensor, Tensor]:
    return forward(qk, v, slopes, height, width, lines)


@_operator.register_kernel("cpu")
def _(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> tuple[Tensor, Tensor]:
    return reference(qk, v, slopes, height, width, lines)


@_operator.register_fake
def _(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> tuple[Tensor, Tensor]:
    count, length = _lines(v.shape[1], height, width, lines)
    exact = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(v.shape), v.new_empty(v.shape[0] * count, slopes.shape[0], length, dtype=exact)


@torch.library.custom_op("muntin::manhattan_attention_backward", mutates_args=(), device_types="cuda")
def _backward_operator(
    grad: Tensor, qk: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor, height: int, width: int, lines: int
) -> tuple[Tensor, Tensor]:
    return backward(grad, qk, v, slopes, out, lse, height, width, lines)


@_backward_operator.register_kernel("cpu")
def _(
    grad: Tensor, qk: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor, height: int, width: int, lines: int
) -> tuple[Tensor, Tensor]:
    return reference_backward(grad, qk, v, slopes, height, width, lines)


@_backward_operator.register_fake
def _(
    grad: Tensor, qk: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor, height: int, width: int, lines: int
) -> tuple[Tensor, Tensor]:
    return qk.new_empty(qk.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qk, v, slopes, ctx.height, ctx.width, ctx.lines = inputs
    ctx.save_for_backward(qk, v, slopes, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qk, v, slopes, out, lse = ctx.saved_tensors
    grads = _backward_operator(grad, qk, v, slopes, out, lse, ctx.height, ctx.width, ctx.lines)
    return *grads, None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup)


def manhattan_attention(qk: Tensor, v: Tensor, slopes: Tensor, height: int, width: int, lines: int) -> Tensor:
    """softmax(q k^T + slope * distance) v along `lines` of a map: WHOLE, ROWS or COLUMNS. (B, N, C) -> (B, N, C).

    qk: (B, N, 2C) in raster order, not yet turned or scaled. slopes: (h,) ln(gamma) of each head. Decomposed attention
    is ROWS, and then COLUMNS of what that gave for v. On CUDA by Triton, forward and backward; elsewhere by PyTorch.
    """
    return _operator(qk, v, slopes, height, width, lines)[0]
