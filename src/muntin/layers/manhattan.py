"""Manhattan self-attention: softmax attention that decays with the distance |dy| + |dx| (RMT, arXiv 2309.11523).

Head i of h has gamma_i = 1 - 2^(-a - r * i / h). Whole: softmax(q k^T + ln(gamma) (|dy| + |dx|)) v over the map.
Decomposed: along each row, softmax(q k^T + ln(gamma) |dx|) applied to v; then along each column, with |dy|,
applied to that. q and k are rotated by the raster index of their token.

Legend: B batch, H W map, N = H * W tokens in raster order, C channels, h heads, d channels per head,
L tokens of one attention (N, or a row's W, or a column's H), M attentions.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin import kernels
from muntin.layers.position import constants
from muntin.layers.tokens import on_map
from muntin.native import training

DECAYS = ("softmax", "no_softmax", "none")
KEPT = 1 << 23
"""Values of the largest table that is kept between calls."""
SHORT = 64
"""Tokens of the longest attention that is computed by explicit products on a CPU."""
PIECE = 1 << 20
"""Values that are worked on at a time on a CPU."""


def log_gamma(heads: int, least: float, reach: float, dtype: torch.dtype) -> Tensor:
    """ln(gamma) of each head: (h,). `least` and `reach` are a and r."""
    return torch.log(1 - 2 ** (-least - reach * torch.arange(heads, dtype=dtype) / heads))


@lru_cache(maxsize=64)
def kept_log_gamma(heads: int, least: float, reach: float, device: torch.device) -> Tensor:
    with constants():
        return log_gamma(heads, least, reach, torch.float64).float().to(device)


def frequencies(width: int, dtype: torch.dtype) -> Tensor:
    """Radians per step of each pair of channels of a head: (d / 2,)."""
    return 1.0 / 10000 ** torch.linspace(0, 1, width // 2, dtype=dtype)


def rotation(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What turns q and k as complex numbers: (N, 2, 1, d / 2). The part of k holds the scale d^-0.5 too."""
    with constants():
        angles = torch.arange(tokens, dtype=dtype)[:, None] * frequencies(width, dtype)  # (N, d / 2)
        turn = torch.polar(torch.ones_like(angles), angles)
        return torch.stack([turn, turn * width**-0.5], 1)[:, :, None].to(device)


kept_rotation = lru_cache(maxsize=16)(rotation)


@lru_cache(maxsize=32)
def axis_decay(side: int, heads: int, least: float, reach: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """ln(gamma) |i - j| along a row or a column: (1, h, L, L)."""
    with constants():
        exact = torch.promote_types(dtype, torch.float32)
        place = torch.arange(side, dtype=exact)
        distance = (place[:, None] - place).abs()
        return (log_gamma(heads, least, reach, exact)[:, None, None] * distance)[None].to(device, dtype)


def whole_decay(
    size: tuple[int, int], heads: int, least: float, reach: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """ln(gamma) (|dy| + |dx|) between all tokens of a map: (1, h, N, N)."""
    with constants():
        exact = torch.promote_types(dtype, torch.float32)
        y, x = torch.arange(size[0], dtype=exact), torch.arange(size[1], dtype=exact)
        dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
        distance = dy[:, None, :, None] + dx[None, :, None, :]  # (H, W, H, W)
        distance = distance.reshape(size[0] * size[1], -1)
        return (log_gamma(heads, least, reach, exact)[:, None, None] * distance)[None].to(device, dtype)


kept_whole_decay = lru_cache(maxsize=8)(whole_decay)


def _is_short(q: Tensor) -> bool:
    """Whether explicit products in pieces beat the fused ones: on a CPU in inference, for few tokens."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and q.shape[2] <= SHORT


def attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """softmax(q k^T + decay) v for (M, h, L, d), a few attentions at a time, whose products stay in cache."""
    count, heads, tokens, _ = q.shape
    out = torch.empty((count, tokens, heads, v.shape[-1]), dtype=v.dtype).transpose(1, 2)
    step = max(1, PIECE // (heads * tokens**2))
    for start in range(0, count, step):
        part = slice(start, start + step)
        logits = q[part] @ k[part].transpose(-2, -1)  # (m, h, L, L)
        if decay is not None:
            logits += decay
        if tokens < 16:  # softmax itself is slow on rows shorter than a vector
            logits = logits.sub_(logits.amax(-1, True)).exp_()
            logits = logits.div_(logits.sum(-1, True))
        else:
            logits = logits.softmax(-1)
        out[part] = logits @ v[part]
    return out


class ManhattanAttention(nn.Module):
    """Linear(attention(q, k, v) + local(v)): (B, N, C) -> (B, N, C), local a depthwise 5x5 convolution of the map.

    least, reach: a and r of the decay. local: whether there is local enhancement. decay: "softmax"; "none" for
    softmax(q k^T) v; "no_softmax" for (q k^T gamma^distance) v, which nothing normalises.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        least: float,
        reach: float,
        decomposed: bool,
        local: bool = True,
        decay: str = "softmax",
    ) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.least, self.reach = least, reach
        self.decomposed = decomposed
        self.decay = decay
        self.qk = nn.Linear(dim, 2 * dim)  # apart from v, whose map the convolution reads without a copy
        self.v = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim) if local else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        v = training.applied(self.v, x)
        if self.decay != "no_softmax" and kernels.serve(x):
            mixed = self._mix_by_operator(self.qk(x), v, size)
        elif torch.compiler.is_compiling():
            mixed = self._mix_symbolic(*self._rotate_symbolic(x), v, size)
        else:
            mix = self._mix_axes if self.decomposed else self._mix_whole
            mixed = mix(self._rotate(training.applied(self.qk, x)), v, size)
        if self.local is not None:
            mixed = mixed + on_map(self.local, v, size)
        return training.applied(self.proj, mixed)

    def _mix_by_operator(self, qk: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, 2C), neither turned nor scaled, and (B, N, C) -> (B, N, C)"""
        from muntin.kernels.manhattan import COLUMNS, ROWS, WHOLE, manhattan_attention

        if torch.compiler.is_compiling():
            slopes = log_gamma(self.heads, self.least, self.reach, torch.float32).to(v.device)
        else:
            slopes = kept_log_gamma(self.heads, self.least, self.reach, v.device)
        if self.decay == "none":
            slopes = torch.zeros_like(slopes)
        for lines in (ROWS, COLUMNS) if self.decomposed else (WHOLE,):
            v = manhattan_attention(qk, v, slopes, *size, lines)
        return v

    def _rotate(self, qk: Tensor) -> Tensor:
        """(B, N, 2C) -> (B, N, 2, h, d): q and k turned, and k scaled."""
        exact = qk if qk.dtype == torch.float64 else qk.float()  # no other dtype has complex numbers
        make = kept_rotation if qk.shape[1] * self.width <= KEPT >> 3 else rotation
        table = make(qk.shape[1], self.width, exact.dtype, qk.device)
        pairs = torch.view_as_complex(exact.unflatten(-1, (2, self.heads, -1, 2)))  # (B, N, 2, h, d / 2)
        return torch.view_as_real(pairs * table).flatten(-2).to(qk.dtype)

    def _mix_whole(self, qk: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, 2, h, d) and (B, N, C) -> (B, N, C)"""
        q, k = qk.transpose(1, 3).unbind(2)  # (B, h, N, d)
        decay = None
        if self.decay != "none":
            kept = self.heads * q.shape[2] ** 2 <= KEPT
            make = kept_whole_decay if kept else whole_decay
            decay = make(size, self.heads, self.least, self.reach, q.dtype, q.device)
        v = v.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        return self._attend(q, k, v, decay).transpose(1, 2).flatten(2)

    def _mix_axes(self, qk: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, 2, h, d) and (B, N, C) -> (B, N, C): rows, then columns."""
        height, width = size
        q, k = qk.unbind(2)
        q, k, v = (t.reshape(-1, height, width, self.heads, self.width) for t in (q, k, v))
        v = self._mix_rows(q, k, v, self._axis_decay(width, q))
        decay = self._axis_decay(height, q)
        if len(q) == 1 or q.numel() < PIECE or torch.is_grad_enabled():
            return self._mix_columns(q, k, v, decay)
        images = zip(q.split(1), k.split(1), v.split(1), strict=True)  # whose columns are views, not copies
        return torch.cat([self._mix_columns(*image, decay) for image in images])

    def _mix_rows(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        """(B, H, W, h, d) -> (B, H, W, h, d)"""
        shape = v.shape
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))  # (B * H, h, W, d)
        return self._attend(q, k, v, decay).transpose(1, 2).reshape(shape)

    def _mix_columns(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        """(B, H, W, h, d) -> (B, N, C)"""
        batch, height, width, heads, d = v.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1).transpose(1, 2) for t in (q, k, v))  # (B * W, h, H, d)
        mixed = self._attend(q, k, v, decay).transpose(1, 2).reshape(batch, width, height, heads * d)
        return mixed.transpose(1, 2).reshape(batch, height * width, heads * d)

    def _axis_decay(self, side: int, like: Tensor) -> Tensor | None:
        if self.decay == "none":
            return None
        return axis_decay(side, self.heads, self.least, self.reach, like.dtype, like.device)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        """(M, h, L, d) -> (M, h, L, d); decay: (1, h, L, L)."""
        if self.decay != "no_softmax" and self._fused(q):
            if _is_short(q):
                return attend_in_pieces(q, k, v, decay)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=decay, scale=1.0)
        logits = q @ k.transpose(-2, -1)  # (M, h, L, L)
        if self.decay == "no_softmax" and decay is not None:
            return (logits * decay.exp()) @ v
        if decay is not None:
            logits = logits + decay
        return logits.softmax(-1).to(v.dtype) @ v

    @staticmethod
    def _fused(x: Tensor) -> bool:
        # In training on a CPU explicit products are faster (docs/speed.md); runtimes fuse the explicit form themselves.
        if torch.compiler.is_exporting():
            return False
        return x.device.type != "cpu" or not torch.is_grad_enabled()

    def _rotate_symbolic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> q and k (B, N, h, d), turned and scaled, for any N and without complex numbers.

        The two channels of a pair end up half a head apart, in q and k alike.
        """
        tokens = x.shape[1]
        exact = torch.promote_types(x.dtype, torch.float32)
        a, b = self._pairs(x, exact)
        angles = torch.arange(tokens, device=x.device).to(exact)[:, None] * frequencies(self.width, exact).to(x.device)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (N, 1, d / 2)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        q, k = turned.chunk(2, 2)
        return q, k

    def _pairs(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> the first and the second channels of the pairs of q and k, scaled: (B, N, 2h, d / 2) each."""
        scale = torch.tensor([1.0, self.width**-0.5], dtype=exact, device=x.device)
        if not torch.compiler.is_exporting():
            qk = self.qk(x).unflatten(-1, (2 * self.heads, self.width // 2, 2))
            a, b = (qk * scale.repeat_interleave(self.heads)[:, None, None]).unbind(-1)
            return a, b
        # runtimes turn pairs best whose channels stand half a head apart; the weights are put in this order, once
        batch, tokens, dim = x.shape
        order = torch.arange(2 * dim, device=x.device).view(-1, self.width // 2, 2).transpose(1, 2).reshape(-1)
        scale = scale.repeat_interleave(dim).to(x.dtype)
        weight, bias = self.qk.weight.index_select(0, order), self.qk.bias.index_select(0, order)
        qk = F.linear(x, weight * scale[:, None], bias * scale).view(batch, tokens, 2 * self.heads, self.width)
        a, b = qk.chunk(2, -1)
        return a, b

    def _mix_symbolic(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, h, d), q and k, and (B, N, C) -> (B, N, C), for sizes that may be symbols; no tensor above rank 5."""
        exact = torch.promote_types(v.dtype, torch.float32)
        y, x = (torch.arange(side, device=v.device).to(exact) for side in size)
        dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
        v = v.unflatten(-1, (self.heads, self.width))
        if self.decomposed:
            q, k, v = (t.unflatten(1, size) for t in (q, k, v))
            v = self._mix_rows(q, k, v, self._decay(dx, v.dtype))
            return self._mix_columns(q, k, v, self._decay(dy, v.dtype))
        distance = (dy[:, None, :, None] + dx[None, :, None, :]).reshape(v.shape[1], v.shape[1])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._attend(q, k, v, self._decay(distance, v.dtype)).transpose(1, 2).flatten(2)

    def _decay(self, distance: Tensor, dtype: torch.dtype) -> Tensor | None:
        """(L, L) -> (1, h, L, L)"""
        if self.decay == "none":
            return None
        slope = log_gamma(self.heads, self.least, self.reach, distance.dtype).to(distance.device)
        return (slope[:, None, None] * distance)[None].to(dtype)
