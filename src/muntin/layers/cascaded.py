"""Cascaded group attention (EfficientViT, arXiv 2305.07027, section 3.1), and plain attention in its place.

Legend: B batch, H W map, C channels, h heads, K channels of a query or key, V channels of a value, w window,
A tokens of a window (w * w, or H * W where the map fits), M windows of all images.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin import kernels
from muntin.layers.conv import MAP_ACTIVATIONS, ConvNorm, Residual
from muntin.layers.folding import SCALE, note, with_weights
from muntin.layers.position import BiasCache, bias_matrix, constants
from muntin.layers.tracing import in_graph, symbolic
from muntin.layers.window import SymbolicGrid


def partition(x: Tensor, window: int) -> Tensor:
    """(B, C, H, W) -> (M, C, w, w), zeros at the bottom and right; a map that fits the window is left whole."""
    batch, channels, height, width = x.shape
    if height <= window and width <= window:
        return x
    if height % window or width % window:
        x = F.pad(x, (0, -width % window, 0, -height % window))
    cols = x.shape[3] // window
    # no tensor above rank 5: (B, H, W, C) -> (B * rows, w, cols, w * C)
    x = x.permute(0, 2, 3, 1).reshape(-1, window, cols, window * channels)
    return x.transpose(1, 2).reshape(-1, window, window, channels).permute(0, 3, 1, 2)


def merge(x: Tensor, height: int, width: int) -> Tensor:
    """(M, C, w, w) -> (B, C, H', W'), the map with its padding. A map that was left whole is H x W already."""
    channels, side = x.shape[1], x.shape[2]
    if x.shape[2] == height and x.shape[3] == width:
        return x
    rows, cols = -(-height // side), -(-width // side)
    x = x.permute(0, 2, 3, 1).reshape(-1, cols, side, side * channels).transpose(1, 2)
    return x.reshape(-1, rows * side, cols * side, channels).permute(0, 3, 1, 2)


def offsets(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Rows |dy| * w + |dx| of a table made for `window`, for each pair of tokens of a height x width map: (A * A,)."""
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    return (dy[:, None, :, None] * window + dx[None, :, None, :]).reshape(-1)


@lru_cache(maxsize=64)
def constant_offsets(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """`offsets`, made once."""
    with constants():
        return offsets(height, width, window, torch.device("cpu")).to(device)


class MapAttention(nn.Module):
    """x + proj(act(attention(x))) in windows of a map (B, C, H, W).

    `bias_table` has a row for each (|dy|, |dx|) in a window, w * w of them, and a column for each head.
    """

    def __init__(self, dim: int, heads: int, window: int, key_dim: int, value_dim: int, act: str, norm: str) -> None:
        super().__init__()
        self.window, self.key_dim, self.value_dim = window, key_dim, value_dim
        self.scale = key_dim**-0.5
        self.bias_table = nn.Parameter(torch.zeros(window * window, heads))
        proj = ConvNorm(heads * value_dim, dim, scale=0.0, norm=norm)
        self.proj = Residual(nn.Sequential(MAP_ACTIVATIONS[act](), proj))
        self._cache = BiasCache()

    def forward(self, x: Tensor, grid: SymbolicGrid | None = None) -> Tensor:
        if grid is not None:
            return self._forward_symbolic(x, grid)
        windows = partition(x, self.window)
        out = self.attend(windows, self._bias(windows.shape[2], windows.shape[3], x.dtype))
        return self.proj(x, merge(out, x.shape[2], x.shape[3]))

    def attend(self, x: Tensor, bias: Tensor, real: Tensor | None = None) -> Tensor:
        """(M, C, w, w) -> (M, h * V, w, w). bias: (h, A, A), or with M or 1 in front. real: 0 at queries to clear."""
        raise NotImplementedError

    def _bias(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """(h, A, A), kept in inference."""
        table, area = self.bias_table, height * width
        if symbolic(height):
            return bias_matrix(table, offsets(height, width, self.window, table.device), area)
        if in_graph():
            return bias_matrix(table, constant_offsets(height, width, self.window, table.device), area)
        key = (height, width, dtype, table.device)
        bias = self._cache.get(key, table)
        if bias is None:
            with constants():
                bias = bias_matrix(table, constant_offsets(height, width, self.window, table.device), area)
                bias = bias.to(dtype).contiguous()
                self._cache.put(key, table, bias)
        return bias

    def _forward_symbolic(self, x: Tensor, grid: SymbolicGrid) -> Tensor:
        """Gathers alone, in windows of w x w on every map: what a small map lacks is hidden."""
        batch, channels, height, width = x.shape
        window, area = self.window, grid.area
        larger = torch.sym_min(1, torch.sym_max(0, torch.sym_max(height, width) - window))
        held = grid.keep.to(x.dtype).view(grid.count, area)
        y = x.flatten(2).index_select(2, grid.enter).view(batch, channels, grid.count, area) * held
        y = y.transpose(1, 2).reshape(batch * grid.count, channels, window, window)
        real = torch.maximum(held, torch.scalar_tensor(larger, dtype=x.dtype, device=x.device))
        real = real.expand(batch, -1, -1).reshape(batch * grid.count, 1, window, window)
        bias = bias_matrix(self.bias_table, offsets(window, window, self.window, x.device), area)
        bias = torch.where(real.view(-1, 1, 1, area) > 0, bias, -torch.inf)  # (M, h, A, A)
        out = self.attend(y, bias, real)
        out = out.view(batch, grid.count, -1, area).transpose(1, 2).reshape(batch, -1, grid.count * area)
        return self.proj(x, out.index_select(2, grid.leave).view(batch, -1, height, width))


class CascadedAttention(MapAttention):
    """Head i sees the i-th group of C / h channels, plus what head i - 1 has given.

    A depthwise convolution of `kernels[i]` runs over its queries. Where values are wider or narrower than a group
    (V is not C / h) the cascade adds the channels that both have.
    """

    all_qkv: Tensor
    all_qkv_bias: Tensor
    all_taps: Tensor
    all_tap_bias: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        key_dim: int,
        value_dim: int,
        act: str,
        norm: str,
        kernels: Sequence[int],
        cascade: bool,
    ) -> None:
        super().__init__(dim, heads, window, key_dim, value_dim, act, norm)
        self.cascade = cascade
        self.stacked = False
        width = 2 * key_dim + value_dim
        self.qkvs = nn.ModuleList(ConvNorm(dim // heads, width, norm=norm) for _ in range(heads))
        self.dws = nn.ModuleList(
            ConvNorm(key_dim, key_dim, kernels[i], groups=key_dim, norm=norm) for i in range(heads)
        )

    def attend(self, x: Tensor, bias: Tensor, real: Tensor | None = None) -> Tensor:
        size = x.shape[2:]
        outs: list[Tensor] = []
        groups = _tokens(x).chunk(len(self.qkvs), 2)  # (M, A, C / h) each
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            group = _add(groups[i], outs[-1]) if i and self.cascade else groups[i]
            q, k, v = _pointwise(qkv, group, size).split((self.key_dim, self.key_dim, self.value_dim), 2)
            q = _as_map(q, size)
            q = _tokens(dw(q if real is None else q * real))
            logits = torch.baddbmm(bias.select(-3, i), q, k.transpose(1, 2), alpha=self.scale)
            outs.append(torch.bmm(logits.softmax(-1), v))  # (M, A, V)
        return _as_map(torch.cat(outs, 2), size)

    def forward(self, x: Tensor, grid: SymbolicGrid | None = None) -> Tensor:
        if not self.stacked or torch.compiler.is_compiling() or not kernels.serve(x):
            return super().forward(x, grid)
        from muntin.kernels.cascade import Weights, cascaded_attention

        height, width = x.shape[2:]
        fits = height <= self.window and width <= self.window
        window = (height, width) if fits else (self.window, self.window)
        weights = Weights(self.all_qkv, self.all_qkv_bias, self.all_taps, self.all_tap_bias, self.bias_table)
        dws: Any = self.dws
        sides = [dw.kernel_size[0] for dw in dws]
        made = cascaded_attention(
            _tokens(x), weights, sides, (height, width), window, self.window, self.scale, self.cascade
        )
        return self.proj(x, _as_map(made, x.shape[2:]))

    def stack(self) -> None:
        """Puts the weights of all heads side by side for the kernel, which takes whole windows and folded norms."""
        from muntin.kernels.cascade import serves

        qkvs: Any = self.qkvs
        dws: Any = self.dws
        dtype = self.bias_table.dtype
        whole = all(isinstance(layer, nn.Conv2d) for layer in (*qkvs, *dws))
        if not (
            whole
            and qkvs[0].in_channels == self.value_dim
            and serves((self.window, self.window), self.value_dim, dtype)
        ):
            return
        side = max(dw.kernel_size[0] for dw in dws)
        taps = [F.pad(dw.weight[:, 0], [(side - dw.kernel_size[0]) // 2] * 4) for dw in dws]
        parts = {
            "all_qkv": [qkv.weight.flatten(1) for qkv in qkvs],
            "all_qkv_bias": [qkv.bias for qkv in qkvs],
            "all_taps": taps,
            "all_tap_bias": [dw.bias for dw in dws],
        }
        for name, tensors in parts.items():
            self.register_buffer(name, torch.stack(tensors).detach(), persistent=False)
        self.stacked = True

    def folded(self) -> nn.Module:
        """The scale joins the convolution of the queries."""
        convs: Any = [dw.folded() if isinstance(dw, ConvNorm) else dw for dw in self.dws]
        if all(isinstance(conv, nn.Conv2d) for conv in convs):
            note(SCALE, len(convs))
            self.dws = nn.ModuleList(with_weights(c, c.weight * self.scale, c.bias * self.scale) for c in convs)
            self.scale = 1.0
        return self


class PlainAttention(MapAttention):
    """Multi-head attention as everywhere: each head sees all channels, and nothing runs over the queries."""

    def __init__(self, dim: int, heads: int, window: int, key_dim: int, value_dim: int, act: str, norm: str) -> None:
        super().__init__(dim, heads, window, key_dim, value_dim, act, norm)
        self.heads = heads
        self.qkv = ConvNorm(dim, heads * (2 * key_dim + value_dim), norm=norm)

    def attend(self, x: Tensor, bias: Tensor, real: Tensor | None = None) -> Tensor:
        sizes = [self.heads * size for size in (self.key_dim, self.key_dim, self.value_dim)]
        qkv = _pointwise(self.qkv, _tokens(x), x.shape[2:]).split(sizes, 2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv)  # (M, h, A, .)
        weights = (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1)
        return _as_map((weights @ v).transpose(1, 2).flatten(2), x.shape[2:])

    def folded(self) -> nn.Module:
        """The scale joins the rows of the queries."""
        conv: Any = self.qkv.folded() if isinstance(self.qkv, ConvNorm) else self.qkv
        if isinstance(conv, nn.Conv2d):
            note(SCALE)
            factor = torch.ones(conv.out_channels, dtype=torch.float64, device=conv.weight.device)
            factor[: self.heads * self.key_dim] = self.scale
            bias: Any = conv.bias
            self.qkv = with_weights(conv, conv.weight * factor.view(-1, 1, 1, 1), bias * factor)
            self.scale = 1.0
        return self


def _tokens(x: Tensor) -> Tensor:
    """(M, C, H, W) -> (M, A, C), a view."""
    return x.flatten(2).transpose(1, 2)


def _as_map(x: Tensor, size: torch.Size) -> Tensor:
    """(M, A, C) -> (M, C, H, W), a view."""
    return x.transpose(1, 2).unflatten(2, size)


def _pointwise(layer: Any, x: Tensor, size: torch.Size) -> Tensor:
    """A 1x1 convolution of maps, on tokens (M, A, C). A packed layer takes these as they are."""
    if hasattr(layer, "forward_tokens"):
        return layer.forward_tokens(x)
    return _tokens(layer(_as_map(x, size)))


def _add(group: Tensor, given: Tensor) -> Tensor:
    """(M, A, .) both, summed in the channels that both have."""
    own, others = group.shape[2], given.shape[2]
    if others < own:
        return torch.cat([group[..., :others] + given, group[..., others:]], 2)
    return group + (given if others == own else given[..., :own])
