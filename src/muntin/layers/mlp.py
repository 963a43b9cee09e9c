"""The feed-forward half of a block, and the norms and activations that configurations name."""

from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor, nn

recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""True while gradient checkpointing runs a forward pass for the second time."""


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm per channel over every axis but the last: (..., C) -> (..., C).

    Under gradient checkpointing the second forward pass leaves the running statistics alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if not (self.training and recomputing.get()):
            return super().forward(rows).view(input.shape)
        assert self.running_mean is not None and self.running_var is not None
        spare = self.running_mean.clone(), self.running_var.clone()
        out = F.batch_norm(rows, *spare, self.weight, self.bias, True, 0.0, self.eps)
        return out.view(input.shape)


NORMS: dict[str, type[nn.LayerNorm] | type[TokenBatchNorm]] = {"layer": nn.LayerNorm, "batch": TokenBatchNorm}
ACTIVATIONS: dict[str, type[nn.GELU] | type[nn.ReLU]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Mlp(nn.Module):
    """Linear, activation, linear: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int, act: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
