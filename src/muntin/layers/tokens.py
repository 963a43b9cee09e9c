"""Convolutions of tokens in raster order: (B, N, C), whose map (B, C, H, W) is a view in channels-last order.

Legend: B batch, H W map, N = H * W tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.conv import ConvNorm
from muntin.native import maps


def on_map(layer: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """A convolution, or ConvNorm with a bias, of maps (B, C, H, W) on tokens (B, N, C): (B, N', C')."""
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    known = isinstance(layer, nn.Conv2d | ConvNorm)  # a packed convolution is an operator of its own
    if traced and known and not (torch.is_grad_enabled() or layer.training):
        conv, weight, bias = (layer, layer.weight, layer.bias) if isinstance(layer, nn.Conv2d) else _folded(layer)
        return _opaque(x, weight, bias, *size, conv.stride[0], conv.padding[0], conv.groups)
    # not transpose(1, 2).unflatten(2, size): of one image it has strides by which a convolution takes another layout
    x = x.unflatten(1, size).permute(0, 3, 1, 2)
    y = maps.depthwise(x, layer) if maps.serve(x) and maps.fits_depthwise(layer) else layer(x)
    return y.flatten(2).transpose(1, 2)


def _folded(layer: Any) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """The convolution of a ConvNorm, and weight and bias with the norm in them."""
    factor = layer.norm.weight * torch.rsqrt(layer.norm.running_var + layer.norm.eps)
    bias = layer.norm.bias + (layer.conv.bias - layer.norm.running_mean) * factor
    return layer.conv, layer.conv.weight * factor.view(-1, 1, 1, 1), bias


@torch.library.custom_op("muntin::token_convolution", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _opaque(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, stride: int, padding: int, groups: int
) -> Tensor:
    """A convolution that `torch.compile` does not look into: it would make a graph for batches from 16 up and one for
    small images, and inductor guesses the memory layout of a map whose sides are symbols.
    """
    x = x.contiguous().view(-1, height, width, x.shape[2]).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, stride, padding, groups=groups)
    return x.flatten(2).transpose(1, 2).contiguous()


@_opaque.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, stride: int, padding: int, groups: int
) -> Tensor:
    height, width = after(height, weight.shape[2], stride, padding), after(width, weight.shape[3], stride, padding)
    return x.new_empty(x.shape[0], height * width, weight.shape[0])


def after(side: int, kernel: int, stride: int, padding: int) -> int:
    """The side of a map after a convolution."""
    return (side + 2 * padding - kernel) // stride + 1
