"""Programs: a few dozen small layers that run as one call on the CPU, see kernels.cpp.

Legend: B batch, H W map, C channels, A tokens of a window.
"""

import ctypes
import math
import secrets
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.contents import Contents
from muntin.layers.conv import is_pointwise
from muntin.layers.manhattan import log_gamma, rotation
from muntin.layers.position import constants
from muntin.layers.window import Grid, make_grid
from muntin.native.build import library

LINEAR, DEPTHWISE, CASCADE, MEAN, SCALE, CONV, NORM, ROTATE, MIX, MERGE, WINDOW = range(11)
NAMES = ("linear", "depthwise", "cascade", "mean", "scale", "conv", "norm", "rotate", "mix", "merge", "window")
WITH_WEIGHTS = (LINEAR, DEPTHWISE, CONV, NORM)
BY_ROWS = (LINEAR, NORM)
HORIZONTAL, VERTICAL, WHOLE = range(3)
ACTS = {"none": 0, "relu": 1, "hardswish": 2, "sigmoid": 3, "gelu": 4}
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}
SHAPES = 8  # prepared at once
ALIGNED = 16  # floats of a cache line
KEPT = 1 << 24
"""Floats of scratch memory that a thread keeps from call to call."""
CACHED = 1 << 20
"""Floats of the largest value: as many images run at a time as stay below, so that caches hold them."""
NEAR = 1 << 16
"""Floats that a few rows of a layer's input and output may take."""
FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p
KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64}


class _Head(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("qkv", "qkv_bias", "taps", "tap_bias")] + [("kernel", _INT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("kind", "act", "source", "to", "other", "rows", "inputs", "outputs")),
        *((name, _INT) for name in ("height", "width", "kernel", "stride", "planes", "half")),
        *((name, _INT) for name in ("window_height", "window_width", "shift_height", "shift_width", "heads", "key")),
        *((name, _INT) for name in ("together", "block")),
        *((name, _POINTER) for name in ("weight", "bias", "factors", "head")),
        ("epsilon", ctypes.c_float),
    ]


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the kernels are there and agree with this file about the layout of a layer."""
    kernels = library()
    return kernels is not None and kernels.muntin_layer_bytes() == ctypes.sizeof(_Layer)


@dataclass(frozen=True)
class Value:
    """What a layer makes: a map of so many channels, its sides halved so many times (rounded up), or a vector for each
    image (`halved` is None).
    """

    number: int
    channels: int
    halved: int | None

    def sides(self, height: int, width: int) -> tuple[int, int]:
        if self.halved is None:
            return 1, 1
        for _ in range(self.halved):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


@dataclass(frozen=True)
class _Step:
    """A layer of a program.

    other: the residual, of SCALE the factors, of MIX the values. layer: of CASCADE, ROTATE, MIX and WINDOW the
    attention. heads: the convolutions of a cascade's heads, as they are before they are packed. rule: how windows are
    cut.
    """

    kind: int
    source: Value
    to: Value
    other: Value | None = None
    act: str = "none"
    layer: Any = None
    heads: tuple[tuple[Any, Any], ...] = ()
    lines: int = 0
    rule: tuple[int, bool, str] = (0, False, "")


@dataclass(frozen=True)
class Part:
    """What a layer of a program did: `ms` is the median over several runs, `bytes` counts operands and result once."""

    name: str
    macs: int
    bytes: int
    ms: float


@dataclass(frozen=True)
class _Prepared:
    """A program for so many images of one size.

    offsets: of each value in a buffer of `floats`, which has `between` floats for these, then `own` for each thread.
    kept: what the layers point to.
    """

    batch: int
    layers: Any
    offsets: Any
    between: int
    own: int
    floats: int
    kept: list[Any]


@dataclass(frozen=True)
class _Plan:
    """A batch in passes: the first image, how many times as many as it is prepared for, and what is prepared."""

    shape: tuple[int, ...]
    passes: list[tuple[int, int, _Prepared]]
    threads: int


_kept = threading.local()


def _scratch(floats: int) -> Tensor:
    """Memory for what is between layers. It is kept: the system takes longer to hand it out than a layer takes."""
    if floats > KEPT:
        return torch.empty(floats, **FLOATS)
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is None or held.numel() < floats:
        with constants():
            held = _kept.scratch = torch.empty(floats, **FLOATS)
    return held


@dataclass(frozen=True)
class _Held:
    """What is made from weights, and these: arranged weights by layer, plans by shape. A change of weights makes
    another; calls that run meanwhile keep the one that they began with.
    """

    weights: Contents
    arranged: dict[int, tuple[Tensor, Tensor]]
    plans: dict[tuple[int, ...], _Plan]


class Unsuitable(Exception):
    """A layer that the kernels do not serve."""


_numbers = count(secrets.randbits(48))  # so that a graph of another process names none of this one's
_programs: WeakValueDictionary[int, "Program"] = WeakValueDictionary()


class Program:
    """Layers in the order in which they were added, from a map (B, C, H, W) in channels-last memory to another.

    The layers are modules, whose weights are arranged for the kernels when they are first needed, and again when they
    have changed. Adding a layer raises Unsuitable where the kernels do not serve it.
    """

    def __init__(self, channels: int, planes: bool = False) -> None:
        """planes: the input is a map in contiguous memory, which only a convolution takes."""
        if not available():
            raise Unsuitable("no kernels")
        self.planes = planes
        self._steps: list[_Step] = []
        self._values: list[Value] = []
        self._start()
        self.input = self._value(channels, 0)

    def _start(self) -> None:
        self.number = next(_numbers)
        _programs[self.number] = self
        self.forget()
        self._served = available()  # a copy may come from another machine
        if not self._served:
            return
        kernels = library()
        self._lanes, self._panel = kernels.muntin_lanes(), kernels.muntin_panel()
        self._rows, self._patches = kernels.muntin_rows(), kernels.muntin_patches()
        self._most, self._halves = kernels.muntin_values(), kernels.muntin_half()
        self._run = kernels.muntin_run
        self._run.argtypes, self._run.restype = [KINDS[kind] for kind in "pipiippiillpllip"], None
        self._served = all(self._fits(step) for step in self._steps)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_steps", "_values", "input", "planes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def forget(self) -> None:
        """The layers' weights are others now."""
        self._held: _Held | None = None

    # ------------------------------------------------------------------------------------------- adding layers

    def _value(self, channels: int, halved: int | None) -> Value:
        self._values.append(Value(len(self._values), channels, halved))
        return self._values[-1]

    def _add(self, kind: int, source: Value, to: Value, *rest: Any, **named: Any) -> Value:
        step = _Step(kind, source, to, *rest, **named)
        if not self._fits(step):
            raise Unsuitable(f"{NAMES[kind]} of {to.channels} channels")
        self._steps.append(step)
        return to

    def _fits(self, step: _Step) -> bool:
        """Whether vectors divide what the kernels read and write in whole ones."""
        widths = [] if step.kind in (LINEAR, CONV) else [step.to.channels]  # of these the weights are padded
        if step.kind == CASCADE:
            widths += [step.layer.key_dim, step.layer.value_dim]
        elif step.kind in (ROTATE, MIX):
            widths.append(step.layer.width)
        elif step.kind == WINDOW:
            widths.append(step.to.channels // step.layer.heads)
        return not any(width % self._lanes for width in widths) and len(self._values) <= self._most

    def _sum(self, residual: Value | None, channels: int, halved: int | None) -> Value:
        """Where a sum goes: in the residual's place, unless that is the input."""
        if residual is None or residual is self.input:
            return self._value(channels, halved)
        return residual

    def linear(self, x: Value, layer: nn.Module, act: str = "none", residual: Value | None = None) -> Value:
        """act(layer(x)) + residual, of a linear layer or a 1x1 convolution. The residual is not to be used again."""
        if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and is_pointwise(layer))):
            raise Unsuitable(repr(layer))
        return self._add(LINEAR, x, self._sum(residual, len(layer.weight), x.halved), residual, act, layer)

    def depthwise(self, x: Value, conv: nn.Module, act: str = "none", residual: Value | None = None) -> Value:
        """act(conv(x)) + residual, with as many zeros around as keep the map's size at stride 1. The residual is not to
        be used again.
        """
        halved = (x.halved or 0) + _stride(conv, depthwise=True) - 1
        return self._add(DEPTHWISE, x, self._sum(residual, x.channels, halved), residual, act, conv)

    def conv(self, x: Value, conv: Any, act: str = "none") -> Value:
        """act(conv(x)), as for `depthwise`, each output of all channels, or of patches side by side."""
        halved = (x.halved or 0) + round(math.log2(_stride(conv, depthwise=False)))
        return self._add(CONV, x, self._value(conv.out_channels, halved), None, act, conv)

    def norm(self, x: Value, norm: nn.Module, residual: Value | None = None) -> Value:
        """LayerNorm over the channels, plus a residual, which is not to be used again. An identity is left out."""
        if isinstance(norm, nn.Identity) and residual is None:
            return x
        if type(norm) is not nn.LayerNorm or norm.normalized_shape != (x.channels,) or norm.bias is None:
            raise Unsuitable(repr(norm))
        return self._add(NORM, x, self._sum(residual, x.channels, x.halved), residual, layer=norm)

    def merge(self, x: Value) -> Value:
        """2x2 neighbours side by side, as in `neighbours`."""
        return self._add(MERGE, x, self._value(4 * x.channels, (x.halved or 0) + 1))

    def window(self, qkv: Value, attention: Any, rule: tuple[int, bool, str]) -> Value:
        """Attention in windows, between its projections. rule: window, whether it is shifted, and `small_maps`."""
        channels = qkv.channels // 3
        if attention.scale != 1.0:
            raise Unsuitable(repr(attention))
        return self._add(WINDOW, qkv, self._value(channels, qkv.halved), layer=attention, rule=rule)

    def mix(self, qk: Value, v: Value, attention: Any) -> Value:
        """Manhattan attention without its projections and local enhancement. q and k are turned in place."""
        if attention.decay != "softmax":
            raise Unsuitable(repr(attention))
        self._add(ROTATE, qk, qk, layer=attention)
        for lines in (HORIZONTAL, VERTICAL) if attention.decomposed else (WHOLE,):
            v = self._add(MIX, qk, self._value(v.channels, v.halved), v, layer=attention, lines=lines)
        return v

    def cascade(self, x: Value, attention: Any, act: str) -> Value:
        """act(attention(x)) of a CascadedAttention, without its projection."""
        value = attention.value_dim
        if not attention.cascade or attention.scale != 1.0 or value * len(attention.qkvs) != x.channels:
            raise Unsuitable(repr(attention))
        heads = tuple(zip(attention.qkvs, attention.dws, strict=True))
        for qkv, conv in heads:
            if _stride(conv, depthwise=True) != 1 or not isinstance(qkv, nn.Conv2d):
                raise Unsuitable(repr(attention))
        return self._add(CASCADE, x, self._value(x.channels, x.halved), None, act, attention, heads)

    def gated(self, x: Value, reduce: nn.Module, act: str, expand: nn.Module) -> Value:
        """x * sigmoid(expand(act(reduce(mean(x)))))"""
        mean = self._add(MEAN, x, self._value(x.channels, None))
        factors = self.linear(self.linear(mean, reduce, act), expand, "sigmoid")
        return self._add(SCALE, x, self._value(x.channels, x.halved), factors)

    # ------------------------------------------------------------------------------------------------- running

    def serves(self, x: Tensor) -> bool:
        """Whether this input can be run: on the CPU in float32 or bfloat16, without gradients, autocast or a graph being
        made. Where the machine does not multiply bfloat16, such weights are widened once.
        """
        if not self._served:
            return False
        if type(x) is not Tensor or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
            return False
        if torch.is_autocast_enabled("cpu") or not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
            return False
        weight = self._weight()
        if weight.dtype != x.dtype or weight.device != x.device:
            return False
        return not (torch.is_grad_enabled() and any(weight.requires_grad for weight in self.weights()))

    def _weight(self) -> Tensor:
        """One of the weights: all are of its type."""
        found: Tensor = next(step.layer.weight for step in self._steps if step.kind in WITH_WEIGHTS)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> a map in channels-last memory."""
        return torch.ops.muntin.program(self._ordered(x), self.number)

    def _ordered(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.input.channels:
            raise ValueError(f"a program for maps of {self.input.channels} channels was given {tuple(x.shape)}")
        return x.contiguous(memory_format=torch.contiguous_format if self.planes else torch.channels_last)

    def run(self, x: Tensor) -> Tensor:
        """What the operator runs."""
        return self._run_all(x, None)

    def timed(self, x: Tensor, calls: int = 5) -> list[Part]:
        """What each layer does for this input, and how long it takes."""
        clocks = torch.zeros(calls, len(self._steps), dtype=torch.float64)
        for clock in clocks:
            self._run_all(x, clock.data_ptr())
        batch, _, height, width = x.shape
        parts = []
        for step, seconds in zip(self._steps, clocks.median(0).values.tolist(), strict=True):
            moved = [batch * math.prod(v.sides(height, width)) * v.channels for v in _read(step)]
            moved += [weight.numel() for weight in _weights(step)]
            macs = _macs(step, batch, height, width).total()
            parts.append(Part(f"muntin::{NAMES[step.kind]}", macs, 4 * sum(moved), 1000 * seconds))
        return parts

    def _run_all(self, x: Tensor, clock: int | None) -> Tensor:
        dtype, x = x.dtype, self._ordered(x).float()
        plan = self._plan(x.shape, torch.get_num_threads())
        out = torch.empty(plan.shape, **FLOATS)
        sizes = x[0].numel(), out[0].numel()
        pointers = x.data_ptr(), out.data_ptr()
        for first, times, made in plan.passes:
            source, target = (p + 4 * first * size for p, size in zip(pointers, sizes, strict=True))
            held = _scratch(made.floats)
            self._run(
                *(made.layers, len(made.layers), made.offsets, len(made.offsets), self._steps[-1].to.number),
                *(source, target, made.batch, times, made.batch * sizes[0], made.batch * sizes[1]),
                *(held.data_ptr(), made.between, made.own, plan.threads, clock),
            )
        return out.to(dtype).permute(0, 3, 1, 2)

    def _plan(self, shape: torch.Size, threads: int) -> _Plan:
        """For a shape and so many threads: as many images at a time as caches hold, and then the rest."""
        held = self._held
        if held is None or not held.weights.unchanged():
            held = self._held = self._hold()
        plan = held.plans.get((*shape, threads))
        if plan is None:
            batch, _, height, width = shape
            if len(held.plans) >= SHAPES:
                held.plans.clear()
            last = self._steps[-1].to
            each = min(batch, self._together(height, width))
            times, rest = divmod(batch, each)
            passes = [(0, times, self._prepare(held, each, height, width, threads))]
            if rest:
                passes.append((times * each, 1, self._prepare(held, rest, height, width, threads)))
            plan = _Plan((batch, *last.sides(height, width), last.channels), passes, threads)
            held.plans[*shape, threads] = plan
        return plan

    def _hold(self) -> _Held:
        """A new start with the weights as they are."""
        attentions = [step.layer for step in self._steps if step.kind in (CASCADE, WINDOW)]
        for attention in attentions:
            attention._cache.entries.clear()
        layers = [layer for step in self._steps for layer in (step.layer, *chain(*step.heads)) if layer is not None]
        return _Held(Contents(module for layer in layers for module in layer.modules()), {}, {})

    def _together(self, height: int, width: int) -> int:
        """How many images run at a time."""
        most = max(math.prod(step.to.sides(height, width)) * step.to.channels for step in self._steps)
        return max(1, CACHED // most)

    def macs(self, batch: int, height: int, width: int) -> Counter[str]:
        """Multiply-accumulates for a map of this size, by the kinds of `measure.counter`."""
        return sum((_macs(step, batch, height, width) for step in self._steps), Counter[str]())

    def weights(self) -> list[Tensor]:
        """Of all layers."""
        return [weight for step in self._steps for weight in _weights(step)]

    # ----------------------------------------------------------------------------------------------- preparing

    def _prepare(self, held: _Held, batch: int, height: int, width: int, threads: int) -> _Prepared:
        layers = (_Layer * len(self._steps))()
        kept: list[Any] = []
        half = self._halves > 0 and self._weight().dtype == torch.bfloat16
        for layer, step in zip(layers, self._steps, strict=True):
            rows, columns = step.source.sides(height, width)
            layer.kind, layer.act = step.kind, ACTS[step.act]
            layer.source, layer.to = step.source.number, step.to.number
            layer.other = -1 if step.other is None else step.other.number
            layer.rows = rows * columns * (batch if step.kind in (LINEAR, NORM) else 1)
            layer.inputs, layer.outputs = step.source.channels, step.to.channels
            layer.height, layer.width, layer.half = rows, columns, half
            if step.kind == CASCADE:
                kept += self._prepare_window(held, layer, step, *_window(step.layer, rows, columns))
            elif step.kind == WINDOW:
                kept += self._prepare_windows(layer, step, make_grid(rows, columns, *step.rule))
            elif step.kind in (ROTATE, MIX):
                kept.append(self._prepare_mix(layer, step))
            elif step.kind in WITH_WEIGHTS:
                layer.planes = self.planes and step.source is self.input
                arranged = self._arrange(held, step.layer, layer.planes)
                layer.weight, layer.bias = (tensor.data_ptr() for tensor in arranged)
                kept += arranged
                if step.kind in (DEPTHWISE, CONV):
                    layer.kernel, layer.stride = step.layer.kernel_size[0], step.layer.stride[0]
                elif step.kind == NORM:
                    layer.epsilon = step.layer.eps
        groups = self._groups(layers, threads)
        near = {value.number for group in groups for value in self._near(group)}
        offsets, between = self._places(batch, height, width, groups, near)
        own = max(self._own(layer) for layer in layers)
        for group in groups:
            layer, place = layers[group.start], max(self._own(layers[i]) for i in group)
            widest = max(layers[i].inputs + layers[i].outputs for i in group)
            layer.together, layer.block = len(group), self._rows * max(8, NEAR // widest // self._rows)
            for value in self._near(group):
                offsets[value.number] = -1 - place
                place += layer.block * value.channels
                place += -place % ALIGNED
            own = max(own, place)
        places = (ctypes.c_int64 * len(offsets))(*offsets)
        return _Prepared(batch, layers, places, between, own, between + threads * own, kept)

    def _groups(self, layers: Any, threads: int) -> list[range]:
        """Layers that follow each other and run together, a few rows at a time, if there are rows for all threads."""
        groups: list[range] = []
        for i, layer in enumerate(layers):
            if layer.kind not in BY_ROWS or layer.rows < 4 * self._rows * threads:
                continue
            if groups and groups[-1].stop == i and layers[i - 1].rows == layer.rows:
                groups[-1] = range(groups[-1].start, i + 1)
            else:
                groups.append(range(i, i + 1))
        return groups

    def _near(self, group: range) -> list[Value]:
        """The values that only these layers see."""
        others = {value for i, step in enumerate(self._steps) if i not in group for value in _read(step)}
        others |= {self.input, self._steps[-1].to}
        return sorted({value for i in group for value in _read(self._steps[i])} - others, key=lambda v: v.number)

    def _arrange(self, held: _Held, layer: Any, planes: bool = False) -> tuple[Tensor, Tensor]:
        """Weights and bias as the kernels read them. A product's: columns in panels side by side, (in, panel) each, the
        last as wide as whole vectors; of a convolution `in` is (k, k, C), of planes (C, k, k). A depthwise
        convolution's: (k * k, C). A norm's: as they are.
        """
        found = held.arranged.get(id(layer))
        if found is None:
            with constants():
                weight, out = layer.weight.detach(), len(layer.weight)
                if isinstance(layer, nn.LayerNorm):
                    weight = weight.to(torch.float32, copy=True)
                elif getattr(layer, "groups", 1) > 1:
                    weight = weight.float().flatten(1).t().contiguous()
                else:
                    weight = weight.permute(0, 2, 3, 1) if weight.ndim == 4 and not planes else weight
                    weight = self._panels(weight.flatten(1))
                bias = torch.zeros(out, **FLOATS) if layer.bias is None else layer.bias.detach()
                bias = F.pad(bias.float(), (0, -out % self._lanes)).contiguous()
            found = held.arranged.setdefault(id(layer), (weight, bias))
        return found

    def _panels(self, weight: Tensor) -> Tensor:
        """(out, in) -> panels; in bfloat16, where the machine multiplies it, each has pairs, of inputs that follow each
        other: (in / 2, panel, 2).
        """
        half = self._halves > 0 and weight.dtype == torch.bfloat16
        weight = weight if half else weight.float()
        padding = (0, weight.shape[1] % 2 if half else 0, 0, -weight.shape[0] % self._lanes)
        parts = F.pad(weight, padding).t().split(self._panel, 1)
        if half:
            parts = tuple(part.unflatten(0, (-1, 2)).transpose(1, 2) for part in parts)
        return torch.cat([part.reshape(-1) for part in parts])

    def _prepare_window(self, held: _Held, layer: Any, step: _Step, height: int, width: int) -> list[Any]:
        """What an attention in such windows points to."""
        with constants():
            bias = step.layer._bias(height, width, torch.float32)
            bias = F.pad(bias, (0, -height * width % self._lanes), value=-torch.inf).contiguous()
        heads = (_Head * len(step.heads))()
        kept: list[Any] = [bias, heads]
        for head, pair in zip(heads, step.heads, strict=True):
            arranged = [tensor for part in pair for tensor in self._arrange(held, part)]
            head.qkv, head.qkv_bias, head.taps, head.tap_bias = (tensor.data_ptr() for tensor in arranged)
            kept += arranged
            head.kernel = pair[1].kernel_size[0]
        layer.window_height, layer.window_width = height, width
        layer.heads, layer.key = len(heads), step.layer.key_dim
        layer.bias, layer.head = bias.data_ptr(), ctypes.addressof(heads)
        return kept

    def _prepare_windows(self, layer: Any, step: _Step, grid: Grid) -> list[Any]:
        """What a window attention's layer points to."""
        attention = step.layer
        (layer.window_height, layer.window_width), (layer.shift_height, layer.shift_width) = grid.window, grid.shift
        layer.heads, layer.key = attention.heads, step.to.channels // attention.heads
        with constants():
            bias = attention.kind_biases(grid, torch.float32)
            bias = F.pad(bias, (0, -grid.area % self._lanes), value=-torch.inf).contiguous()
            kept = [bias, attention.padded().detach().to(torch.float32, copy=True)]
            factors = getattr(attention, "factors", None)
            if factors is not None:
                kept.append(factors[0, :, 0].float().contiguous())
                layer.factors = kept[-1].data_ptr()
        layer.bias, layer.weight = kept[0].data_ptr(), kept[1].data_ptr()
        return kept

    def _prepare_mix(self, layer: Any, step: _Step) -> Tensor:
        """What a Manhattan attention's layer points to."""
        attention = step.layer
        layer.key, layer.heads, layer.kernel = attention.width, attention.heads, step.lines
        with constants():
            if step.kind == MIX:
                found = log_gamma(attention.heads, attention.least, attention.reach, torch.float32)
            else:
                turns = rotation(layer.rows, attention.width, torch.float64, torch.device("cpu"))[:, 0, 0]  # (N, d / 2)
                cosines, sines = (part.repeat_interleave(2, 1) for part in (turns.real, turns.imag))
                sines[:, ::2] *= -1
                found = torch.cat([cosines, sines], 1).float()
        layer.weight = found.data_ptr()
        return found

    def _own(self, layer: Any) -> int:
        """Floats that a thread needs for a layer, as the kernels lay them out."""
        floats = 0
        if layer.kind == CASCADE:
            area, value = layer.window_height * layer.window_width, layer.inputs // layer.heads
            padded = area + -area % self._lanes
            floats = area * 3 * (value + layer.key) + (layer.key + self._rows) * padded + 3 * self._panel
            floats += layer.half * self._halves * -(-value // 2)
        elif layer.kind == MIX:
            length = (layer.width, layer.height, layer.rows)[layer.kernel]
            floats = (2 * layer.key + self._rows + 2) * (length + -length % self._lanes) + 4 * self._panel
        elif layer.kind == WINDOW:
            area = layer.window_height * layer.window_width
            padded = area + -area % self._lanes
            floats = 3 * area * layer.key + (layer.key + self._rows + 1) * padded + 2 * self._panel
        elif layer.kind == CONV:
            depth = layer.kernel**2 * layer.inputs
            floats = self._patches * depth + layer.half * self._halves * -(-depth // 2)
        elif layer.kind == LINEAR:
            floats = layer.half * self._halves * -(-layer.inputs // 2)
        return floats + -floats % ALIGNED

    def _places(
        self, batch: int, height: int, width: int, groups: list[range], near: Collection[int]
    ) -> tuple[list[int], int]:
        """Where each value stands but those called near, and how many floats that takes; one that no later layer, and
        none of the same group, needs makes room.
        """
        ends = {i: group.stop - 1 for group in groups for i in group}
        last = {value.number: ends.get(i, i) for i, step in enumerate(self._steps) for value in _read(step)}
        offsets, total = [0] * len(self._values), 0
        taken: dict[int, tuple[int, int]] = {}  # size and offset
        free: list[tuple[int, int]] = []
        for i, step in enumerate(self._steps):
            number = step.to.number
            if number not in taken and number not in near and step.to is not self._steps[-1].to:
                rows, columns = step.to.sides(height, width)
                size = batch * rows * columns * step.to.channels
                size += -size % ALIGNED
                place = min((place for place in free if place[0] >= size), default=None)
                if place is None:
                    place, total = (size, total), total + size
                else:
                    free.remove(place)
                taken[number], offsets[number] = place, place[1]
            free += [taken.pop(other) for other in list(taken) if other != number and last[other] <= i]
        return offsets, total


def activation(module: nn.Module) -> str:
    """Its name here. Raises Unsuitable."""
    name = ACTIVATIONS.get(type(module))
    if name is None or getattr(module, "approximate", "none") != "none":
        raise Unsuitable(repr(module))
    return name


def convolutions(layers: nn.Sequential) -> Program:
    """A stem of folded convolutions and activations in turns. Raises Unsuitable."""
    program = Program(3, planes=True)
    x = program.input
    modules = [*layers, None]
    for conv, act in zip(modules[::2], modules[1::2], strict=True):
        x = program.conv(x, conv, "none" if act is None else activation(act))
    return program


def _macs(step: _Step, batch: int, height: int, width: int) -> Counter[str]:
    """Multiply-accumulates of a layer by the kinds of `measure.counter`, for sides of the program's input."""
    found: Counter[str] = Counter()
    rows, columns = step.to.sides(height, width)
    if step.kind == LINEAR:
        found["linear"] += batch * rows * columns * step.layer.weight.numel()
    elif step.kind in (DEPTHWISE, CONV):
        found["convolution"] += batch * rows * columns * step.layer.weight.numel()
    elif step.kind == MIX:
        length = (columns, rows, rows * columns)[step.lines]
        found["attention"] += 2 * batch * rows * columns * length * step.to.channels
    elif step.kind == WINDOW:
        grid = make_grid(rows, columns, *step.rule)
        found["attention"] += 2 * batch * math.prod(grid.counts) * grid.area**2 * step.to.channels
    elif step.kind == CASCADE:
        tall, wide = _window(step.layer, rows, columns)
        area, windows = tall * wide, batch * -(-rows // tall) * -(-columns // wide)
        found["linear"] += windows * area * sum(qkv.weight.numel() for qkv, _ in step.heads)
        found["convolution"] += windows * area * sum(conv.weight.numel() for _, conv in step.heads)
        channels = step.layer.key_dim + step.layer.value_dim
        found["attention"] += windows * area * area * channels * len(step.heads)
    return found


def _weights(step: _Step) -> list[Tensor]:
    layers = [step.layer] if step.kind in WITH_WEIGHTS else [layer for pair in step.heads for layer in pair]
    found = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
    return [*found, step.layer.bias_table] if step.heads else found


def _read(step: _Step) -> list[Value]:
    return [value for value in (step.source, step.other, step.to) if value is not None]


def _window(attention: Any, height: int, width: int) -> tuple[int, int]:
    """A map that fits the window is one."""
    fits = height <= attention.window and width <= attention.window
    return (height, width) if fits else (attention.window, attention.window)


def _stride(conv: Any, depthwise: bool) -> int:
    """Of a convolution of an odd, square kernel, with zeros around, or of patches. Raises Unsuitable for any other."""
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        raise Unsuitable(repr(conv))
    side = conv.kernel_size[0]
    if not depthwise and conv.stride == conv.kernel_size == (side, side) and side in (2, 4, 8, 16):
        if conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1:
            return side
    as_ours = conv.kernel_size == (side, side) and conv.padding == (side // 2, side // 2) and conv.dilation == (1, 1)
    groups = conv.groups == conv.in_channels == conv.out_channels if depthwise else conv.groups == 1
    if not (as_ours and groups and side % 2 and conv.stride in ((1, 1), (2, 2))):
        raise Unsuitable(repr(conv))
    return conv.stride[0]


_library = torch.library.Library("muntin", "FRAGMENT")
_library.define("program(Tensor x, int number) -> Tensor")
_library.impl("program", lambda x, number: _programs[number].run(x), "CPU")


def program(number: int) -> Program:
    """The program that an operator names."""
    return _programs[number]
