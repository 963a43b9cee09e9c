"""Exact arithmetic on weights for inference: norms and scales into the products beside them, and a record of it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_noted: ContextVar[Counter[str] | None] = ContextVar("noted", default=None)

RESIDUAL = "residual into a depthwise convolution"
SCALE = "attention's scale into the weights of q"


@contextmanager
def noting() -> Iterator[Counter[str]]:
    """Counts what is folded inside it, by what it was."""
    found: Counter[str] = Counter()
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(folded: str, times: int = 1) -> None:
    found = _noted.get()
    if found is not None:
        found[folded] += times


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The factor and summand that a BatchNorm is in evaluation mode, in float64."""
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def fold_after(norm: Any, layer: Any) -> Any:
    """A convolution or linear layer with the BatchNorm that follows it."""
    note("BatchNorm into the product before it")
    factor, summand = affine(norm)
    weight = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.ndim - 1))
    return with_weights(layer, weight, summand if layer.bias is None else layer.bias.double() * factor + summand)


def fold_before(norm: Any, linear: nn.Linear) -> Any:
    """A linear layer with the BatchNorm that stands in front of it."""
    note("BatchNorm into the product after it")
    factor, summand = affine(norm)
    weight = linear.weight.double()
    bias = weight @ summand
    return with_weights(linear, weight * factor, bias if linear.bias is None else bias + linear.bias.double())


def with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A layer like the given one, with these weights in its own dtype, for inference."""
    if isinstance(layer, nn.Linear):
        made: Any = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    else:
        made = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias is not None,
            device="meta",
        )
    made.weight = nn.Parameter(weight.detach().to(layer.weight.dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(layer.weight.dtype), requires_grad=False)
    return made.eval()


class FoldedHead(nn.Module):
    """Mean over the map, linear: (B, C, H, W) -> (B, num_classes). A norm over channels is for `features` alone."""

    def __init__(self, fc: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.norm = fc, norm

    def features(self, x: Tensor) -> Tensor:
        """The last map, normalised where the model has a norm for it: (B, C, H, W) -> the same."""
        return x if self.norm is None else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """What `fc` takes: (B, C, H, W) -> (B, C)."""
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))
