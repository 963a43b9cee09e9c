"""Stochastic depth (Huang et al., arXiv 1603.09382)."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch per sample with probability `rate` in training, and rescales the others.

    Takes (B, N, C) or (n, B, A, C): the sample axis is the third from the end.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty((x.shape[-3], 1, 1), device=x.device).bernoulli_(1.0 - self.rate)
        return x * (keep / (1.0 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
