"""Convolutions with BatchNorm in training on the CPU, with their gradients, see maps.cpp.

Each keeps its input, statistics, and where that is cheaper than computing it again, what the convolution made. They
take float32, and bfloat16 under autocast where the machine multiplies it. A second derivative is taken through
PyTorch's own operators.

Legend: B images, maps (B, C, H, W) in channels-last memory, k the side of a kernel.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.mlp import recomputing
from muntin.native import training
from muntin.native.build import MAPS, library
from muntin.native.training import again, pointer, structure

ACTS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.Hardswish: 2}
_TAPS = (1, 3, 5, 7)
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_CONV = structure(
    "Conv", (_POINTER, "x weight bias y"), (_INT, "batch height width inputs outputs kernel stride planes")
)
_CONV_GRADIENT = structure("ConvGradient", (_POINTER, "dy dx dweight"))
_BATCH = structure(
    "Batch",
    (_POINTER, "z weight bias mean inverse variance y"),
    (_LONG, "rows"),
    (_FLOAT, "epsilon"),
    (_INT, "channels act"),
)
_BATCH_GRADIENT = structure("BatchGradient", (_POINTER, "dy dz dweight dbias"))


@lru_cache(maxsize=1)
def _available() -> bool:
    return library(MAPS) is not None


def _run(name: str, *given: Any, half: bool) -> None:
    """Structures by reference, numbers as they are, then what maps are kept in and the number of threads."""
    given = tuple(ctypes.byref(g) if isinstance(g, ctypes.Structure) else g for g in given)
    getattr(library(MAPS), name)(*given, int(half), torch.get_num_threads())


def serve(x: Tensor) -> bool:
    """Whether these layers train on this input, whatever they are."""
    return x.ndim == 4 and training.serve(x) and _available()


def activates(module: nn.Module) -> bool:
    """Whether the kernels compute this activation after a norm."""
    return type(module) in ACTS and training.unhooked(module)


def fits(layer: Any) -> bool:
    """Whether the kernels compute this `ConvNorm`, which is in training, and nothing waits for its parts."""
    conv, norm = layer.conv, layer.norm
    if not norm.training or norm.momentum is None or not norm.track_running_stats:
        return False
    if not training.unhooked(layer, conv, norm) or not (training.plain(norm.weight) and training.plain(norm.bias)):
        return False
    if conv.bias is not None or not _fits(conv):
        return False
    if conv.groups == 1:
        pairs = 2 if torch.is_autocast_enabled("cpu") else 1
        divided = not (training.rest(conv.in_channels, pairs) or training.rest(conv.out_channels, pairs))
        return divided or conv.kernel_size[0] > 1 or conv.stride[0] > 1
    return _is_depthwise(conv)


def fits_depthwise(conv: nn.Module) -> bool:
    """Whether the kernels compute this depthwise convolution, and nothing waits for it."""
    if type(conv) is not nn.Conv2d or not training.unhooked(conv) or not _fits(conv) or not _is_depthwise(conv):
        return False
    return conv.bias is None or training.plain(conv.bias)


def _fits(conv: Any) -> bool:
    """Whether weights are as the kernels read them, and zeros around keep a map's size at stride 1."""
    weight, side = conv.weight, conv.kernel_size[0]
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or weight.is_meta:
        return False
    square = conv.kernel_size == (side, side) and side % 2 and conv.stride[0] == conv.stride[1]
    zeros = conv.padding == (side // 2, side // 2) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return bool(square and zeros)


def _is_depthwise(conv: Any) -> bool:
    if not (conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size[0] in _TAPS):
        return False
    return not training.rest(conv.in_channels)


# ------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class _Shape:
    """Of a convolution: dense, depthwise, or of single pixels."""

    kernel: int
    stride: int
    depthwise: bool = False
    planes: bool = False  # the input is (B, C, H, W) in memory, in float32
    half: bool = False  # maps are kept in bfloat16

    @property
    def pointwise(self) -> bool:
        return self.kernel == self.stride == 1 and not self.depthwise

    def outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """Memory for what comes out."""
        height, width = ((side - 1) // self.stride + 1 for side in x.shape[2:])
        return _map(x, weight.shape[0], height, width, torch.bfloat16 if self.half else torch.float32)


def _map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map."""
    return like.new_empty((like.shape[0], height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _conv(x: Tensor, weight: Tensor, shape: _Shape, bias: Tensor | None = None) -> Tensor:
    """bias: of a depthwise convolution."""
    z = shape.outputs(x, weight)
    if shape.pointwise:
        training.linear_rows(x, weight.flatten(1).contiguous(), z, _rows(x))
    else:
        ordered = _ordered(weight, shape)  # a name keeps it until the kernel has run
        given = _structure(x, ordered, z, shape, len(weight), bias)
        _run("muntin_depthwise" if shape.depthwise else "muntin_conv", given, half=shape.half)
    return z


def _ordered(weight: Tensor, shape: _Shape) -> Tensor:
    """As the kernels read it: taps (k * k, C), or (N, k * k * K)."""
    if shape.depthwise:
        return weight.flatten(1).t().contiguous()
    return (
        weight.flatten(1).contiguous()
        if shape.planes
        else weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous()
    )


def _structure(
    x: Tensor, weight: Tensor, y: Tensor | None, shape: _Shape, outputs: int, bias: Tensor | None = None
) -> Any:
    batch, inputs, height, width = x.shape
    sizes = batch, height, width, inputs, outputs, shape.kernel, shape.stride, shape.planes
    return _CONV(*map(pointer, (x, weight, bias, y)), *sizes)


def _conv_backward(
    x: Tensor, weight: Tensor, dz: Tensor, shape: _Shape, into_input: bool, into_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = _map(x, *x.shape[1:]) if into_input else None
    if shape.pointwise:
        dweight = weight.new_empty(weight.shape) if into_weight else None
        training.linear_rows_backward(x, weight.flatten(1).contiguous(), dz, dx, dweight, _rows(x))
        return dx, dweight
    threads, ordered = torch.get_num_threads(), _ordered(weight, shape)
    given = _structure(x, ordered, None, shape, len(weight))
    if not shape.depthwise:
        parts = ordered.new_zeros(threads, *ordered.shape) if into_weight else None
        _run("muntin_conv_backward", given, _CONV_GRADIENT(*map(pointer, (dz, dx, parts))), half=shape.half)
        n, channels, k, _ = weight.shape
        if parts is None or shape.planes:
            return dx, None if parts is None else parts.sum(0).view(weight.shape)
        return dx, parts.sum(0).view(n, k, k, channels).permute(0, 3, 1, 2).contiguous()
    splits = max(1, min(len(x), -(-threads * 16 // len(weight))))
    parts = ordered.new_zeros(splits, *ordered.shape) if into_weight else None
    _run("muntin_depthwise_backward", given, _CONV_GRADIENT(*map(pointer, (dz, dx, parts))), splits, half=shape.half)
    return dx, None if parts is None else parts.sum(0).t().reshape(weight.shape)


# --------------------------------------------------------------------------------------------------------- BatchNorms


@dataclass(frozen=True)
class _Norm:
    """What a BatchNorm does besides its weights: `running` (mean, variance, batches) is None where they stay."""

    epsilon: float
    momentum: float
    running: tuple[Tensor, Tensor, Tensor] | None
    act: int


def _norm_of(norm: Any, act: int) -> _Norm:
    running = None if recomputing.get() else (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return _Norm(norm.eps, norm.momentum, running, act)


def _moments(z: Tensor, norm: _Norm) -> Tensor:
    """Mean and 1 / deviation of each channel: (2, C). Moves the running ones."""
    found, rows = z.new_empty(3, z.shape[1], dtype=torch.float32), _rows(z)
    _run("muntin_moments", _batch(z, None, None, found, None, norm), half=_half(z))
    if norm.running is not None:
        mean, variance, batches = norm.running
        mean.lerp_(found[0], norm.momentum)
        variance.lerp_(found[2] * (rows / (rows - 1)), norm.momentum)
        batches.add_(1)
    return found[:2]


def _batch(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, y: Tensor | None, norm: _Norm
) -> Any:
    rows = [moments[i] for i in range(len(moments))]
    tensors = (z, weight, bias, *rows, *[None] * (3 - len(rows)), y)
    return _BATCH(*map(pointer, tensors), _rows(z), norm.epsilon, z.shape[1], norm.act)


def _normalise(z: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, norm: _Norm, y: Tensor) -> Tensor:
    """act(norm(z)) into y, which may be z."""
    _run("muntin_normalise", _batch(z, weight, bias, moments, y, norm), half=_half(z))
    return y


def _normalise_backward(
    dy: Tensor, z: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, norm: _Norm, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of z into dz, which may be dy; those of weight and bias."""
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    gradient = _BATCH_GRADIENT(*map(pointer, (dy, dz, dweight, dbias)))
    _run("muntin_normalise_backward", _batch(z, weight, bias, moments, None, norm), gradient, half=_half(z))
    return dweight, dbias


_PLAIN = {0: lambda x: x, 1: F.relu, 2: F.hardswish}


def _plain(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shape: _Shape, norm: _Norm) -> Tensor:
    groups = x.shape[1] if shape.depthwise else 1
    z = F.conv2d(x.float(), weight, None, shape.stride, shape.kernel // 2, groups=groups)
    y = _PLAIN[norm.act](F.batch_norm(z, None, None, gain, bias, True, 0.0, norm.epsilon))
    return y.bfloat16() if shape.half else y


# ------------------------------------------------------------------------------------------------------------- layers


class _ConvNorm(torch.autograd.Function):
    """act(norm(conv(x)))"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shape: _Shape, norm: _Norm) -> Tensor:
        z = _conv(x, weight, shape)
        moments = _moments(z, norm)
        # depthwise, and of a few channels, it is made again in less time than memory takes to hold it
        kept = z if shape.pointwise and weight.shape[0] <= 2 * weight.shape[1] else None
        y = _normalise(z, gain, bias, moments, norm, z if kept is None else _map(z, *z.shape[1:]))
        ctx.save_for_backward(x, weight, gain, bias, moments, kept)
        ctx.given = shape, norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, bias, moments, kept = ctx.saved_tensors
        shape, norm = ctx.given
        if training.differentiated(grads[0]):
            return again(_plain, (x, weight, gain, bias, shape, norm), grads[0])
        x = x.contiguous() if shape.planes else _last(x)  # a hook may have laid it out otherwise
        z = _conv(x, weight, shape) if kept is None else _last(kept)
        dy = _last(grads[0])
        dz = z if kept is None else _map(z, *z.shape[1:])  # the last use of what was made again
        dgain, dbias = _normalise_backward(dy, z, gain, bias, moments, norm, dz)
        dx, dweight = _conv_backward(x, weight, dz, shape, *ctx.needs_input_grad[:2])
        return dx, dweight, dgain, dbias, None, None


class _Depthwise(torch.autograd.Function):
    """conv(x), with a bias or without"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.shape = shape
        return _conv(x, weight, shape, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if training.differentiated(grads[0]):
            return again(_plain_depthwise, (x, weight, bias, ctx.shape), grads[0])
        dy = _last(grads[0])
        dx, dweight = _conv_backward(_last(x), weight, dy, ctx.shape, *ctx.needs_input_grad[:2])
        dbias = dy.sum((0, 2, 3), dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


def _plain_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
    return F.conv2d(x.float(), weight, bias, shape.stride, shape.kernel // 2, groups=x.shape[1]).to(x.dtype)


class _Mlp(torch.autograd.Function):
    """norm2(conv2(act(norm1(conv1(x))))), both convolutions of single pixels"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        gain1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        gain2: Tensor,
        bias2: Tensor,
        norm1: _Norm,
        norm2: _Norm,
    ) -> Tensor:
        shape = _Shape(1, 1, half=_half(x))
        hidden = _conv(x, weight1, shape)
        moments1 = _moments(hidden, norm1)
        inner = _normalise(hidden, gain1, bias1, moments1, norm1, _map(hidden, *hidden.shape[1:]))
        z = _conv(inner, weight2, shape)
        moments2 = _moments(z, norm2)
        ctx.save_for_backward(x, weight1, gain1, bias1, moments1, hidden, weight2, gain2, bias2, moments2, z)
        ctx.given = norm1, norm2
        return _normalise(z, gain2, bias2, moments2, norm2, _map(z, *z.shape[1:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, gain1, bias1, moments1, hidden, weight2, gain2, bias2, moments2, z = ctx.saved_tensors
        norm1, norm2 = ctx.given
        if training.differentiated(grads[0]):
            given = (x, weight1, gain1, bias1, weight2, gain2, bias2, norm1, norm2)
            return again(_plain_mlp, given, grads[0])
        wanted, shape = ctx.needs_input_grad, _Shape(1, 1, half=_half(x))
        x, hidden, z = _last(x), _last(hidden), _last(z)  # a hook may have laid them out otherwise
        dz = _map(z, *z.shape[1:])
        dgain2, dbias2 = _normalise_backward(_last(grads[0]), z, gain2, bias2, moments2, norm2, dz)
        inner = _normalise(hidden, gain1, bias1, moments1, norm1, _map(hidden, *hidden.shape[1:]))
        d, dweight2 = _conv_backward(inner, weight2, dz, shape, True, wanted[4])
        assert d is not None
        del inner
        dgain1, dbias1 = _normalise_backward(d, hidden, gain1, bias1, moments1, norm1, d)
        dx, dweight1 = _conv_backward(x, weight1, d, shape, wanted[0], wanted[1])
        return dx, dweight1, dgain1, dbias1, dweight2, dgain2, dbias2, None, None


def _plain_mlp(
    x: Tensor,
    weight1: Tensor,
    gain1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    gain2: Tensor,
    bias2: Tensor,
    norm1: _Norm,
    norm2: _Norm,
) -> Tensor:
    shape = _Shape(1, 1, half=_half(x))
    return _plain(_plain(x, weight1, gain1, bias1, shape, norm1), weight2, gain2, bias2, shape, norm2)


def _kept(x: Tensor) -> Tensor:
    """A map as the kernels read it."""
    return _last(x.bfloat16() if torch.is_autocast_enabled("cpu") else x)


def conv_norm(x: Tensor, layer: Any, act: nn.Module | None = None) -> Tensor:
    """act(layer(x)) for a `ConvNorm`: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
    conv, norm = layer.conv, layer.norm
    image = x.dtype == torch.float32 and not x.requires_grad and x.is_contiguous()
    planes = image and conv.groups == 1 and conv.kernel_size[0] > 1
    shape = _Shape(conv.kernel_size[0], conv.stride[0], conv.groups > 1, planes, torch.is_autocast_enabled("cpu"))
    known = _norm_of(norm, 0 if act is None else ACTS[type(act)])
    return _ConvNorm.apply(x if planes else _kept(x), conv.weight, norm.weight, norm.bias, shape, known)


def depthwise(x: Tensor, conv: Any) -> Tensor:
    """conv(x) for a depthwise convolution: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
    shape = _Shape(conv.kernel_size[0], conv.stride[0], depthwise=True, half=torch.is_autocast_enabled("cpu"))
    return _Depthwise.apply(_kept(x), conv.weight, conv.bias, shape)


def mlp(x: Tensor, expand: Any, act: nn.Module, project: Any) -> Tensor:
    """project(act(expand(x))) for two `ConvNorm`s of single pixels: (B, C, H, W) -> the same."""
    parts = [(layer.conv.weight, layer.norm.weight, layer.norm.bias) for layer in (expand, project)]
    norms = _norm_of(expand.norm, ACTS[type(act)]), _norm_of(project.norm, 0)
    return _Mlp.apply(_kept(x), *parts[0], *parts[1], *norms)
