"""Convolution and norm on NCHW maps, and residuals."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.folding import RESIDUAL, fold_after, note, with_weights
from muntin.layers.mlp import recomputing
from muntin.layers.tracing import symbolic
from muntin.layers.window import fresh
from muntin.native import maps


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm of a map (B, C, H, W). Recomputing under gradient checkpointing leaves the statistics alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and recomputing.get()):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        spare = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(input, *spare, self.weight, self.bias, True, 0.0, self.eps)


class MapLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position of a map (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MAP_NORMS: dict[str, type[MapBatchNorm] | type[MapLayerNorm]] = {"batch": MapBatchNorm, "layer": MapLayerNorm}
MAP_ACTIVATIONS: dict[str, type[nn.ReLU] | type[nn.Hardswish]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}


class Conv(nn.Conv2d):
    """A convolution of zero-padded maps (B, C, H, W) that compiles once for all sizes, see `convolution`."""

    def forward(self, input: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not traced or torch.is_grad_enabled():
            return super().forward(input)
        return convolution(input, self.weight, self.bias, self.stride[0], self.kernel_size[0] // 2, self.groups)


@torch.library.custom_op("muntin::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    """A convolution for compiled inference, opaque to the compiler.

    The compiler chooses an implementation, and guards on batch and size for it; of sizes without hints it does not
    foresee the layout of the result. This one is channels-last always.
    """
    return F.conv2d(x, weight, bias, stride, padding, 1, groups).contiguous(memory_format=torch.channels_last)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    height, width = ((x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (2, 3))
    return x.new_empty((x.shape[0], height, width, weight.shape[0])).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution, then norm: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride)) for odd kernels."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        scale: float = 1.0,
        norm: str = "batch",
    ) -> None:
        """scale: initial weight of the norm, 0 where a residual branch should start at zero."""
        super().__init__()
        self.conv = Conv(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm: nn.Module = MAP_NORMS[norm](out_channels)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if not self.trains(x) else maps.conv_norm(x, self)

    def trains(self, x: Tensor) -> bool:
        """Whether the kernels for training on a CPU compute the layer on this input."""
        if not (self.training and maps.serve(x) and x.shape[1] == self.conv.in_channels):
            return False
        several = x.shape[0] * x.shape[2] * x.shape[3] > self.conv.stride[0] ** 2  # values of a channel
        return several and self.plain()

    def plain(self) -> bool:
        """Whether these kernels know all of it."""
        ours = type(self) is ConvNorm and type(self.conv) is Conv and type(self.norm) is MapBatchNorm
        return ours and maps.fits(self)

    def folded(self) -> nn.Module:
        """One convolution that computes the same in evaluation mode; with LayerNorm the layer itself."""
        return fold_after(self.norm, self.conv) if isinstance(self.norm, MapBatchNorm) else self


def in_turn(layers: Iterable[Any], x: Tensor) -> Tensor:
    """x through all layers; a `ConvNorm` and the activation after it as one where the kernels for training serve."""
    waiting: list[Any] = list(layers)
    while waiting:
        layer, follows = waiting.pop(0), waiting[:1]
        if isinstance(layer, ConvNorm) and follows and maps.activates(follows[0]) and layer.trains(x):
            x = maps.conv_norm(x, layer, waiting.pop(0))
        else:
            x = layer(x)
    return x


class ConvMlp(nn.Sequential):
    """`expand`, `act` and `project`, on each pixel: (B, C, H, W) -> the same."""

    def __init__(self, dim: int, hidden: int, act: str, norm: str) -> None:
        expand, project = ConvNorm(dim, hidden, norm=norm), ConvNorm(hidden, dim, scale=0.0, norm=norm)
        super().__init__(OrderedDict(expand=expand, act=MAP_ACTIVATIONS[act](), project=project))

    def forward(self, input: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        if len(layers) == 3 and all(isinstance(layer, ConvNorm) for layer in layers[::2]):  # not folded
            expand, act, project = layers
            if maps.activates(act) and expand.trains(input) and project.plain():
                pixels = is_pointwise(expand.conv) and is_pointwise(project.conv)
                if pixels and expand.conv.out_channels == project.conv.in_channels:
                    return maps.mlp(input, expand, act, project)
        return super().forward(input)


class Residual(nn.Module):
    """x + branch(x), or x + branch(y), for maps (B, C, H, W). What y has beyond x, below and right, is cut off."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x + crop(self.branch(x if y is None else y), x)

    def folded(self) -> nn.Module:
        """A depthwise convolution and its residual as one, with 1 added to the centre tap."""
        conv = self.branch.folded() if isinstance(self.branch, ConvNorm) else self.branch
        if not (isinstance(conv, nn.Conv2d) and _keeps_shape(conv) and conv.weight.shape[1] == 1):
            return self
        weight = conv.weight.double().clone()
        weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
        note(RESIDUAL)
        return with_weights(conv, weight, conv.bias)


def _keeps_shape(conv: nn.Conv2d) -> bool:
    """Whether the output at a position is around the input at that position, channel by channel."""
    sides = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    padding = tuple(d * (k - 1) // 2 if k % 2 and s == 1 else -1 for k, s, d in sides)
    return conv.padding == padding and conv.padding_mode == "zeros" and conv.groups == conv.out_channels


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is a linear layer over the channels."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def crop(x: Tensor, like: Tensor) -> Tensor:
    """The top left part of a map, as high and wide as another map."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else x[:, :, :height, :width]


def renew(x: Tensor) -> Tensor:
    """A map (B, C, H, W) whose height and width are symbols of their own under export and `muntin.compile`."""
    if not symbolic(x.shape[2]):
        return x
    height, width = fresh(x.shape[2]), fresh(x.shape[3])
    tokens = torch.arange(height * width, device=x.device)
    return x.flatten(2).index_select(2, tokens).view(x.shape[0], x.shape[1], height, width)
