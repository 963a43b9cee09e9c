"""Convolution and BatchNorm on NCHW maps, and how such pairs fold into one convolution for inference."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.mlp import recomputing


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm of a map (B, C, H, W). Recomputing under gradient checkpointing leaves the statistics alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and recomputing.get()):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        spare = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(input, *spare, self.weight, self.bias, True, 0.0, self.eps)


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride)) for odd kernels."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        """scale: initial weight of the BatchNorm, 0 where a residual branch should start at zero."""
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = MapBatchNorm(out_channels)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> nn.Conv2d:
        """One convolution that computes the same in evaluation mode."""
        return fold_after(self.norm, self.conv)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The factor and summand that a BatchNorm is in evaluation mode, in float64."""
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def fold_after(norm: Any, layer: Any) -> Any:
    """A convolution or linear layer with the BatchNorm that follows it."""
    factor, summand = affine(norm)
    weight = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.ndim - 1))
    return with_weights(layer, weight, summand if layer.bias is None else layer.bias.double() * factor + summand)


def fold_before(norm: Any, linear: nn.Linear) -> Any:
    """A linear layer with the BatchNorm that stands in front of it."""
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
