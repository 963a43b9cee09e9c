"""Cascaded group attention (EfficientViT, arXiv 2305.07027, section 3.1): the whole cascade of a window in one kernel.

What a head gives stays in registers and joins the next head's input; q, k, v, the convolution over the queries and the
softmax never reach memory. Maps are read and written in raster order, windows are index arithmetic. BatchNorms must be
folded into the weights, so it is for inference: in training their statistics need all windows between two steps.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, G = C / h channels of a group and of a value,
K channels of a query or key, A tokens of a window, s side of the largest convolution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from muntin.kernels.tiles import LEAST, MOST, WARPS, channels_block, precision


class Weights(NamedTuple):
    """Of all heads, BatchNorms folded.

    qkv: (h, 2K + G, G). qkv_bias: (h, 2K + G). taps: (h, K, s, s), smaller kernels with zeros around them. tap_bias:
    (h, K). table: (w * w, h), a row for each (|dy|, |dx|).
    """

    qkv: Tensor
    qkv_bias: Tensor
    taps: Tensor
    tap_bias: Tensor
    table: Tensor


@triton.jit
def _linear(x, weight, bias, row, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, G: tl.constexpr,
            BLOCK_G: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows `row` on of a weight (., G) and its bias applied to (slots, G): (slots, BLOCK_ROWS), float32."""
    r, g = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_G)
    inside = (g < G)[:, None] & (r < ROWS)[None, :]
    matrix = tl.load(weight + (row + r)[None, :] * G + g[:, None], inside, 0.0)  # transposed
    summand = tl.load(bias + row + r, r < ROWS, 0.0).to(tl.float32)
    return tl.dot(x, matrix, input_precision=PRECISION) + summand[None, :]


@triton.jit
def _convolve(q, taps, tap_bias, sides, head, slots, window_h, window_w, K: tl.constexpr, BLOCK_K: tl.constexpr,
              SIDE: tl.constexpr):  # fmt: skip
    """The depthwise convolution of a head over (slots, K), zeros around the window."""
    c = tl.arange(0, BLOCK_K)
    side = tl.load(sides + head)
    y, x = slots // window_w, slots % window_w
    out = tl.zeros_like(q) + tl.load(tap_bias + head * K + c, c < K, 0.0).to(tl.float32)[None, :]
    for tap in range(0, side * side):
        dy, dx = tap // side - side // 2, tap % side - side // 2
        near_y, near_x = y + dy, x + dx
        inside = (near_y >= 0) & (near_y < window_h) & (near_x >= 0) & (near_x < window_w)
        source = tl.where(inside, near_y * window_w + near_x, 0)
        near = tl.gather(q, tl.broadcast_to(source[:, None], q.shape), 0)
        place = ((head * K + c) * SIDE + dy + SIDE // 2) * SIDE + dx + SIDE // 2
        factor = tl.load(taps + place, c < K, 0.0).to(tl.float32)
        out += tl.where(inside[:, None], near * factor[None, :], 0.0)
    return out


@triton.jit
def _forward(
    x, qkv, qkv_bias, taps, tap_bias, sides, table, out, scale, height, width, window_h, window_w, table_w,
    rows, columns, CASCADE: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (windows of all images,)."""
    number = tl.program_id(0)
    image, inside = number // (rows * columns), number % (rows * columns)
    slots, g = tl.arange(0, BLOCK), tl.arange(0, BLOCK_G)
    map_y = inside // columns * window_h + slots // window_w
    map_x = inside % columns * window_w + slots % window_w
    held = slots < window_h * window_w
    real = (held & (map_y < height) & (map_x < width))[:, None] & (g < G)[None, :]
    first = image.to(tl.int64) * height * width * (HEADS * G)
    places = (map_y * width + map_x)[:, None] * (HEADS * G) + g[None, :]
    last = tl.minimum(slots, window_h * window_w - 1)
    dy = tl.abs((last // window_w)[:, None] - (last // window_w)[None, :])
    dx = tl.abs((last % window_w)[:, None] - (last % window_w)[None, :])
    given = tl.zeros((BLOCK, BLOCK_G), tl.float32)
    for head in tl.static_range(HEADS):
        group = tl.load(x + first + head * G + places, real, 0.0)
        if CASCADE:
            group = (group.to(tl.float32) + given).to(group.dtype)
        row = head * (2 * K + G)
        q = _linear(group, qkv, qkv_bias, row, K, BLOCK_K, G, BLOCK_G, PRECISION)
        k = _linear(group, qkv, qkv_bias, row + K, K, BLOCK_K, G, BLOCK_G, PRECISION).to(group.dtype)
        v = _linear(group, qkv, qkv_bias, row + 2 * K, G, BLOCK_G, G, BLOCK_G, PRECISION).to(group.dtype)
        q = _convolve(q, taps, tap_bias, sides, head, slots, window_h, window_w, K, BLOCK_K, SIDE)
        bias = tl.load(table + (dy * table_w + dx) * HEADS + head).to(tl.float32)
        logits = tl.dot((q * scale).to(group.dtype), tl.trans(k), input_precision=PRECISION) + bias
        logits = tl.where(held[None, :], logits, -float("inf"))
        weights = tl.exp(logits - tl.max(logits, 1)[:, None])
        weights = (weights / tl.sum(weights, 1)[:, None]).to(v.dtype)
        given = tl.dot(weights, v, input_precision=PRECISION)
        tl.store(out + first + head * G + places, given.to(out.dtype.element_ty), real)


def serves(window: tuple[int, int], group: int, dtype: torch.dtype) -> bool:
    """Whether a window fits one tile, and what a program holds every GPU's shared memory."""
    return window[0] * window[1] <= MOST and (dtype != torch.float32 or group <= 64)


def forward(
    x: Tensor, weights: Weights, sides: Sequence[int], size: tuple[int, int], window: tuple[int, int], table_w: int,
    scale: float, cascade: bool,
) -> Tensor:  # fmt: skip
    """By the kernel: (B, N, C) -> (B, N, C)."""
    x = x.contiguous()
    heads, _, group = weights.qkv.shape
    key = weights.taps.shape[1]
    rows, columns = -(-size[0] // window[0]), -(-size[1] // window[1])
    out = torch.empty_like(x)
    _forward[(x.shape[0] * rows * columns,)](
        x, *(w.contiguous() for w in weights[:4]), torch.tensor(sides, device=x.device), weights.table.contiguous(),
        out, scale, *size, *window, table_w, rows, columns,
        CASCADE=cascade, HEADS=heads, G=group, BLOCK_G=channels_block(group), K=key, BLOCK_K=channels_block(key),
        SIDE=weights.taps.shape[-1], BLOCK=max(LEAST, triton.next_power_of_2(window[0] * window[1])),
        PRECISION=precision(x), num_warps=WARPS["backward"],
    )  # fmt: skip
    return out


def reference(
    x: Tensor, weights: Weights, size: tuple[int, int], window: tuple[int, int], table_w: int, scale: float,
    cascade: bool,
) -> Tensor:  # fmt: skip
    """The same by PyTorch's own operators, one step after the other; what the kernel is tested against."""
    heads, _, group = weights.qkv.shape
    key, side = weights.taps.shape[1], weights.taps.shape[-1]
    (height, width), (wh, ww) = size, window
    rows, columns = -(-height // wh), -(-width // ww)
    maps = F.pad(x.unflatten(1, size), (0, 0, 0, columns * ww - width, 0, rows * wh - height))
    maps = maps.unflatten(1, (rows, wh)).unflatten(3, (columns, ww)).transpose(2, 3)  # (B, rows, columns, wh, ww, C)
    tokens = maps.reshape(-1, wh * ww, heads * group)
    place = torch.arange(wh * ww, device=x.device)
    dy = (place[:, None] // ww - place // ww).abs()
    dx = (place[:, None] % ww - place % ww).abs()
    bias = weights.table[dy * table_w + dx].permute(2, 0, 1)  # (h, A, A)
    given: list[Tensor] = []
    for head, own in enumerate(tokens.split(group, 2)):
        own = own + given[-1] if given and cascade else own
        q, k, v = F.linear(own, weights.qkv[head], weights.qkv_bias[head]).split((key, key, group), 2)
        q = q.transpose(1, 2).unflatten(2, window)
        q = F.conv2d(q, weights.taps[head][:, None], weights.tap_bias[head], padding=side // 2, groups=key)
        logits = (q.flatten(2).transpose(1, 2) * scale) @ k.transpose(1, 2) + bias[head]
        given.append(logits.softmax(-1).to(v.dtype) @ v)
    made = torch.cat(given, 2).view(maps.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H', W', C)
    return made[:, :height, :width].flatten(1, 2)


@torch.library.custom_op("muntin::cascaded_attention", mutates_args=(), device_types="cuda")
def _operator(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor, taps: Tensor, tap_bias: Tensor, table: Tensor, sides: Sequence[int],
    size: Sequence[int], window: Sequence[int], table_w: int, scale: float, cascade: bool,
) -> Tensor:  # fmt: skip
    weights = Weights(qkv, qkv_bias, taps, tap_bias, table)
    return forward(x, weights, sides, (size[0], size[1]), (window[0], window[1]), table_w, scale, cascade)


@_operator.register_kernel("cpu")
def _(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor, taps: Tensor, tap_bias: Tensor, table: Tensor, sides: Sequence[int],
    size: Sequence[int], window: Sequence[int], table_w: int, scale: float, cascade: bool,
) -> Tensor:  # fmt: skip
    weights = Weights(qkv, qkv_bias, taps, tap_bias, table)
    return reference(x, weights, (size[0], size[1]), (window[0], window[1]), table_w, scale, cascade)


@_operator.register_fake
def _(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor, taps: Tensor, tap_bias: Tensor, table: Tensor, sides: Sequence[int],
    size: Sequence[int], window: Sequence[int], table_w: int, scale: float, cascade: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    _, ctx.size, ctx.window, ctx.table_w, ctx.scale, ctx.cascade = inputs[6:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By recomputing with PyTorch's operators."""
    with torch.enable_grad():
        x, *rest = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        weights = Weights(*rest)
        made = reference(x, weights, tuple(ctx.size), tuple(ctx.window), ctx.table_w, ctx.scale, ctx.cascade)
        grads = torch.autograd.grad(made, (x, *weights), grad)
    return *grads, *[None] * 6


_operator.register_autograd(_gradients, setup_context=_setup)


def cascaded_attention(
    x: Tensor, weights: Weights, sides: Sequence[int], size: tuple[int, int], window: tuple[int, int], table_w: int,
    scale: float, cascade: bool,
) -> Tensor:  # fmt: skip
    """All heads, side by side, of attention within windows of a map: (B, N, C) in raster order -> the same.

    sides: of each head's convolution. table_w: the window that the table is made for. A map that the window does not
    divide is padded with zeros, which are attended like others. On CUDA by Triton, gradients by recomputing; elsewhere
    by PyTorch.
    """
    return _operator(x, *weights, list(sides), list(size), list(window), table_w, scale, cascade)
