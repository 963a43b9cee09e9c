"""Attention inside windows, with a learned bias for each relative position (Swin, section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.folding import SCALE, fold_before, note, with_weights
from muntin.layers.position import BiasCache, bias_matrix, constant_relative_index, constants
from muntin.layers.tracing import in_graph, symbolic
from muntin.layers.window import Grid, Group, SymbolicGrid, kind_masks, move, window_masks, window_runs
from muntin.native import training


class SplitLinear(nn.Module):
    """q, k and v of each head from that head's own C / h channels (EfficientViT's study): (..., C) -> (..., 3C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(3 * dim, dim // heads))
        self.bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        own = x.unflatten(-1, (self.heads, -1))  # (..., h, d)
        weight = self.weight.view(3, self.heads, -1, own.shape[-1])
        return torch.einsum("...hi,phoi->...pho", own, weight).flatten(-3) + self.bias


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v within windows: (M, A, C) -> (M, A, C).

    `bias_table` has a row for each relative offset in a window x window square and a column for each head.
    """

    def __init__(self, dim: int, heads: int, window: int, split_heads: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = (dim // heads) ** -0.5
        self.qkv = SplitLinear(dim, heads) if split_heads else nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self._cache = BiasCache()

    def folded(self, norm: nn.Module | None = None) -> "WindowAttention":
        """For inference: the scale in the weights of q, and the norm before it, where given, in q, k and v."""
        if not isinstance(self.qkv, nn.Linear):
            return self
        note(SCALE)
        factor = torch.ones_like(self.qkv.bias)
        factor[: self.proj.in_features] = self.scale
        self.qkv = with_weights(self.qkv, self.qkv.weight * factor[:, None], self.qkv.bias * factor)
        self.scale = 1.0
        return self if norm is None else FoldedAttention(self, norm)

    def forward(self, x: Tensor, bias: Tensor, real: Tensor | None = None) -> Tensor:
        """`bias`: (1, h, A, A) for all, or (n, 1, h, A, A) or (1, n, h, A, A) where windows differ.

        The five-dimensional forms say whether windows or images stand outermost in M. `real`: (M, A, 1), zero
        where a token is padding, given where there is any.
        """
        return self.proj(self._attend(self.project(x, real), bias))

    def forward_runs(self, x: Tensor, biases: Tensor, runs: Sequence[Group], real: Tensor | None = None) -> Tensor:
        """In inference: one product for all windows, and one attention for each run that shares a bias."""
        qkv = self.project(x, real)
        parts = [self._attend(qkv[run.start : run.stop], biases[run.kind]) for run in runs]
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts))

    def forward_stream(self, x: Tensor, grid: Grid) -> Tensor:
        """Stream (n, B, A, C) in the grid's order -> the same."""
        rows, batch = x.flatten(0, 1), x.shape[1]
        real = None
        if not grid.aligned:
            keep = move(None, grid, (grid.height, grid.width), batch, x.device).keep
            real = None if keep is None else keep.view(-1, grid.area, 1)
        if in_graph():
            return self(rows, self.window_biases(grid), real).view_as(x)
        runs = window_runs(grid, batch, 0, len(rows))
        return self.forward_runs(rows, self.kind_biases(grid, x.dtype), runs, real).view_as(x)

    def forward_raster(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) in raster order -> the same, by the operator that cuts the windows itself."""
        from muntin.kernels.window import window_attention

        extent = self.window, self.window
        qkv = self.project(x, None)
        mixed = window_attention(qkv, self.bias_table, self.padded(), self.heads, grid, extent, self.scale)
        return self.proj(mixed)

    def trains(self) -> bool:
        """Whether the kernels for training on a CPU compute what is between the linear layers."""
        return training.unhooked(self) and not training.rest(self.proj.in_features // self.heads)

    def trained(self, x: Tensor, grid: Grid, norm: nn.Module | None = None) -> Tensor:
        """norm(x) (B, N, C) in raster order -> (B, N, C), what the projection takes, by these kernels."""
        qkv = training.linear(x, self.qkv, norm)
        bias = self._matrix(self.table(grid.window), grid.window)
        return training.window(qkv, bias, self.padded(), grid, self.scale)

    def padded(self) -> Tensor:
        """q, k and v of a token that is padding: (3C,)."""
        return self.qkv.bias

    def project(self, x: Tensor, real: Tensor | None) -> Tensor:
        """q, k and v of (M, A, C): (M, A, 3C). Padding is zero after the norm, so it yields the biases."""
        return self.qkv(x)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, A, 3C) -> q, k and v of each head: (M, h, A, d)."""
        windows, area, _ = qkv.shape
        q, k, v = qkv.view(windows, area, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """(M, A, 3C) -> (M, A, C)"""
        windows, area, width = qkv.shape
        q, k, v = self._split(qkv)
        if self._fused(qkv):
            if bias.ndim == 5:
                copies = windows // (bias.shape[0] * bias.shape[1])
                fold = (copies, -1) if bias.shape[0] == 1 else (-1, copies)
                bias = bias.expand(*fold, -1, -1, -1).flatten(0, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            logits = (q if self.scale == 1.0 else q * self.scale) @ k.transpose(-2, -1)  # (M, h, A, A)
            if bias.ndim == 5 and not symbolic(windows) and (windows, 1) == bias.shape[:2]:
                logits = logits + bias.squeeze(1)  # one image: in rank 4 a runtime sees attention
            elif bias.ndim == 5:
                lead = (-1, bias.shape[1]) if bias.shape[0] == 1 else (bias.shape[0], -1)
                logits = (logits.view(*lead, *logits.shape[1:]) + bias).view(-1, *logits.shape[1:])
            else:
                logits = logits + bias
            out = logits.softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).reshape(windows, area, width // 3)

    @staticmethod
    def _fused(x: Tensor) -> bool:
        # On a CPU a bias that trains falls off the fused path, and explicit products are faster (docs/speed.md);
        # runtimes fuse the explicit form themselves.
        if torch.compiler.is_exporting():
            return False
        return x.device.type != "cpu" or not torch.is_grad_enabled()

    def kind_biases(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Bias plus mask for each kind of window, for inference: (4, 1, h, A, A), or (1, ...) without shift."""
        sources = self.bias_sources()
        key = (grid.window, grid.shift, dtype, sources[0].device)
        bias = self._cache.get(key, sources)
        if bias is None:
            table = self.table(grid.window)
            with constants():
                bias = self._matrix(table, grid.window)[None, None]
                if any(grid.shift):
                    bias = bias + kind_masks(grid, bias.device)[:, None, None]
                bias = bias.to(dtype).contiguous()
                self._cache.put(key, sources, bias)
        return bias

    def window_biases(self, grid: Grid) -> Tensor:
        """The same for each window, with gradients: (n, 1, h, A, A), or (1, h, A, A) without shift."""
        bias = self._matrix(self.table(grid.window), grid.window)
        if not any(grid.shift):
            return bias[None]
        return (bias + window_masks(grid, bias.device)[:, None]).unsqueeze(1)

    def symbolic_bias(self, grid: SymbolicGrid) -> Tensor:
        """(1, n, h, A, A), or (1, h, A, A) without shift."""
        bias = bias_matrix(self.symbolic_table(grid.window), grid.offsets, grid.area)[None]
        return bias if grid.mask is None else (bias + grid.mask[:, None]).unsqueeze(0)

    def bias_sources(self) -> tuple[Tensor, ...]:
        """What the position bias is made from, and changes with."""
        return (self.bias_table,)

    def table(self, window: tuple[int, int]) -> Tensor:
        """(S', h): the biases that windows of this size choose from."""
        return self.bias_table

    def symbolic_table(self, window: tuple[int, int]) -> Tensor:
        """((2w-1)^2, h), w being the configured window: the same for a window whose sides may be symbols."""
        return self.bias_table

    def _matrix(self, table: Tensor, window: tuple[int, int]) -> Tensor:
        index = constant_relative_index(*window, self.window, table.device)
        return bias_matrix(table, index, window[0] * window[1])  # (h, A, A)


class FoldedAttention(WindowAttention):
    """Attention whose norm is folded into q, k and v. Padding still yields what it yielded: the biases alone."""

    padding: Tensor

    def __init__(self, attention: Any, norm: nn.Module) -> None:
        nn.Module.__init__(self)
        self.heads, self.window, self.scale = attention.heads, attention.window, attention.scale
        self.register_buffer("padding", attention.qkv.bias.clone())
        self.qkv = fold_before(norm, attention.qkv)
        self.proj = attention.proj
        self.bias_table = attention.bias_table
        self._cache = attention._cache

    def folded(self, norm: nn.Module | None = None) -> "WindowAttention":
        return self

    def padded(self) -> Tensor:
        return self.padding

    def project(self, x: Tensor, real: Tensor | None) -> Tensor:
        qkv = self.qkv(x)
        return qkv if real is None else torch.where(real > 0, qkv, self.padding)
