"""Products in oneDNN's own weight layouts, with the activation that follows fused and the residual added in place.

The operators are PyTorch's but not public, and for inference on a CPU alone: each is tried on a small product first
and left out where it fails or differs.
"""

from functools import lru_cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.conv import Residual, crop, is_pointwise
from muntin.layers.folding import note
from muntin.layers.mlp import Mlp
from muntin.layers.position import constants

_ALGORITHM = {"none": "", "relu": "", "hardswish": "", "gelu": "none"}
_FUNCTIONS = {"none": lambda y: y, "gelu": F.gelu, "relu": F.relu, "hardswish": F.hardswish}
_ACTIVATION: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.Hardswish: "hardswish"}


SMALL = 1 << 20
"""Multiply-accumulates of a float32 product below which setting oneDNN up costs more than it saves."""

_numbers = count()
_layers: WeakValueDictionary[int, "Packed"] = WeakValueDictionary()
"""Packed layers by number: a compiled graph holds the number, and finds what is packed when it runs."""


_MADE = ("_packed", "_plain", "_bias")
"""Attributes that are made from the layer's weights."""


class Packed(nn.Module):
    """Base: what is packed is opaque to pickle and copy, and made again from the layer, also when the layer's weights
    are loaded or converted. The layer itself serves where a packed product cannot: another dtype, autocast, gradients.
    """

    _packed: Any

    def __init__(self, layer: Any, act: str = "none") -> None:
        super().__init__()
        self._original = layer
        self._ready = True
        self._dtype = layer.weight.dtype
        self._enroll()
        self.act = act
        self._pack()
        self.register_load_state_dict_post_hook(_pack_again)

    def _pack(self) -> None:
        raise NotImplementedError

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        return self._original.bias

    def _enroll(self) -> None:
        self.number = next(_numbers)
        _layers[self.number] = self

    def forward(self, x: Tensor) -> Tensor:
        if not self._serves(x):
            return _FUNCTIONS[self.act](self._original(x))
        return self._traced(x) if torch.compiler.is_compiling() else self._product(x)

    def _traced(self, x: Tensor) -> Tensor:
        """The product as an operator that a compiler does not look into."""
        raise NotImplementedError

    def _serves(self, x: Tensor) -> bool:
        if not self._ready or x.dtype != self._dtype or torch.is_autocast_enabled("cpu"):
            return False
        return not (x.requires_grad and torch.is_grad_enabled())

    def repack(self) -> None:
        """To be called when the layer's weights have changed, or what may keep them from being packed."""
        self._dtype = self._original.weight.dtype
        self._ready = _packs(type(self), self._original.weight, self.act)
        if self._ready:
            self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> "Packed":
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enroll()
        self.repack()  # its weights may have been converted to what cannot be packed

    def extra_repr(self) -> str:
        return f"act={self.act}"


def _pack_again(module: Any, *_: Any) -> None:
    module.repack()


class PackedLinear(Packed):
    """A linear layer with an activation: (..., in) -> (..., out)."""

    def _pack(self) -> None:
        layer = self._original
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with constants():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous())
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._small = SMALL // self.out_features if layer.weight.dtype == torch.float32 else 0
        self._plain = layer.weight.detach().t()

    def _product(self, x: Tensor) -> Tensor:
        if x.numel() < self._small:
            rows = x.reshape(-1, x.shape[-1])
            y = rows @ self._plain if self._bias is None else torch.addmm(self._bias, rows, self._plain)
            return _FUNCTIONS[self.act](y.view(*x.shape[:-1], y.shape[1]))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, self.act, [], _ALGORITHM[self.act])

    def _traced(self, x: Tensor) -> Tensor:
        return torch.ops.muntin.packed_linear(x, self._original.weight, self.number)


class PackedPointwise(PackedLinear):
    """A 1x1 convolution of maps in channels-last memory, as a linear layer: (B, C, H, W) -> (B, C', H, W)."""

    def _pack(self) -> None:
        conv = self._original
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        with constants():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(conv.weight.detach().flatten(1).contiguous())
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._small = SMALL // self.out_channels if conv.weight.dtype == torch.float32 else 0
        self._plain = conv.weight.detach().flatten(1).t()

    def _product(self, x: Tensor) -> Tensor:
        return super()._product(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _traced(self, x: Tensor) -> Tensor:
        return super()._traced(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C'), the channels last as they are in memory."""
        if self._serves(x):
            return super()._traced(x) if torch.compiler.is_compiling() else super()._product(x)
        return _FUNCTIONS[self.act](F.linear(x, self._original.weight.flatten(1), self._original.bias))


class PackedConv(Packed):
    """A convolution with an activation. The best layout of its weights depends on the size of the map: for each it
    is made once.
    """

    def _pack(self) -> None:
        conv = self._original
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.groups = conv.kernel_size, conv.stride, conv.groups
        self._sizes = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._packed = {}  # by the shape of the input

    def _weight(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        weight = self._packed.get(shape)
        if weight is None:
            if len(self._packed) >= 8:
                self._packed.clear()
            with constants():
                original = self._original.weight.detach().contiguous(memory_format=torch.channels_last)
                weight = torch.ops.mkldnn._reorder_convolution_weight(original, *self._sizes, list(shape))
            self._packed[shape] = weight
        return weight

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight(x), self._bias, *self._sizes, self.act, [], _ALGORITHM[self.act]
        )

    def _traced(self, x: Tensor) -> Tensor:
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self._sizes[0], self._sizes[2], strict=True)
        height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides)
        return torch.ops.muntin.packed_convolution(x, self._original.weight, self.number, height, width)


# The weights are arguments for what counts operations and bytes; the product takes what was packed of them.
_library = torch.library.Library("muntin", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, int number) -> Tensor")
_library.define("packed_convolution(Tensor x, Tensor weight, int number, SymInt height, SymInt width) -> Tensor")


def _run_linear(x: Tensor, weight: Tensor, number: int) -> Tensor:
    return PackedLinear._product(_layers[number], x)  # type: ignore[arg-type]


def _run_convolution(x: Tensor, weight: Tensor, number: int, height: int, width: int) -> Tensor:
    return _layers[number]._product(x).contiguous(memory_format=torch.channels_last)


_library.impl("packed_linear", _run_linear, "CPU")
_library.impl("packed_convolution", _run_convolution, "CPU")


@torch.library.register_fake("muntin::packed_linear")
def _(x: Tensor, weight: Tensor, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("muntin::packed_convolution")
def _(x: Tensor, weight: Tensor, number: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], height, width, weight.shape[0]).permute(0, 3, 1, 2)


class PackedResidual(nn.Module):
    """x + conv(before(x)), or x + conv(before(y)), see `Residual`."""

    def __init__(self, before: nn.Module | None, conv: PackedConv | PackedPointwise) -> None:
        super().__init__()
        self.before, self.conv = before, conv

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        y = self.conv(y if self.before is None else self.before(y))
        if y.requires_grad or y.dtype != x.dtype:
            return x + crop(y, x)
        # in place: cheaper than the operators that fuse a sum, and nobody else has the product's output
        return y.add_(x) if y.shape[2:] == x.shape[2:] else x + crop(y, x)


def pack(model: nn.Module) -> nn.Module:
    """Packs what is known here, in place: linear layers, convolutions, and what stands behind these."""
    for name, child in list(model.named_children()):
        setattr(model, name, pack(child))
    if type(model) is nn.Linear:
        return _packed(PackedLinear, model)
    if isinstance(model, nn.Conv2d) and model.padding_mode == "zeros" and isinstance(model.padding, tuple):
        kind = PackedPointwise if is_pointwise(model) else PackedConv
        return _packed(kind, model)
    if isinstance(model, Mlp):
        model.act = _fuse(model.fc1, model.act) or nn.Identity()
    if isinstance(model, nn.Sequential):
        _fuse_all(model)
    if isinstance(model, Residual):
        return _pack_residual(model)
    return model


def _packed(kind: type[Packed], layer: Any) -> nn.Module:
    if not _packs(kind, layer.weight, "none"):
        return layer
    note("weights packed for oneDNN")
    return kind(layer)


def _fuse(layer: nn.Module, act: nn.Module) -> nn.Module | None:
    """The activation, or None if the layer has taken it over."""
    kind = _ACTIVATION.get(type(act))
    exact = not isinstance(act, nn.GELU) or act.approximate == "none"
    if kind is None or not exact or not isinstance(layer, Packed) or layer.act != "none":
        return act
    if not _packs(type(layer), layer._original.weight, kind):
        return act
    layer.act = kind
    note("activation into the product before it")
    return None


def _fuse_all(layers: nn.Sequential) -> None:
    last: nn.Module | None = None
    for name, layer in list(layers.named_children()):
        if last is not None and _fuse(last, layer) is None:
            delattr(layers, name)
        else:
            last = layer


def _pack_residual(residual: Residual) -> nn.Module:
    branch = residual.branch
    before, last = None, branch
    if isinstance(branch, nn.Sequential) and len(branch):
        name, last = list(branch.named_children())[-1]
        before = branch
    if not isinstance(last, PackedConv | PackedPointwise) or last.act != "none":
        return residual
    if before is not None:
        delattr(before, name)
    note("residual added in place to its product")
    return PackedResidual(before, last)


def _packs(kind: Any, weight: Tensor, act: str) -> bool:
    known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return known and _computes_the_same(kind, weight.dtype, act)


@lru_cache
def _computes_the_same(kind: Any, dtype: torch.dtype, act: str) -> bool:
    """Whether this build has the packed product with this activation."""
    with constants():
        layer: Any = nn.Linear(48, 40)
        x = torch.linspace(-2, 2, 33 * 48).view(33, 48)
        if kind is not PackedLinear:
            layer = nn.Conv2d(48, 40, 1 if kind is PackedPointwise else 3, padding=0 if kind is PackedPointwise else 1)
            x = torch.linspace(-2, 2, 2 * 48 * 35).view(2, 48, 5, 7).contiguous(memory_format=torch.channels_last)
        layer, x = layer.to(dtype), x.to(dtype)
        expected = _FUNCTIONS[act](layer(x))
        try:
            made = kind(layer, act)
            made._small = 0
            out = made(x)
        except (RuntimeError, AttributeError, NotImplementedError):  # AttributeError: no such operator
            return False
        return bool(torch.allclose(out, expected, atol=1e-5 if dtype == torch.float32 else 5e-2))
