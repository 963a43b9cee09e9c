"""Programs: a few dozen small layers that run as one call on the CPU, see kernels.cpp.

Legend: B batch, H W map, C channels.
"""

import math
import secrets
import threading
from collections import Counter
from dataclasses import dataclass
from itertools import chain, count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from muntin.layers.contents import Contents
from muntin.layers.conv import is_pointwise
from muntin.layers.position import constants
from muntin.native.prepare import FLOATS, Arranged, Preparation, Prepared, kernels
from muntin.native.steps import (
    CASCADE,
    CONV,
    DEPTHWISE,
    HORIZONTAL,
    LINEAR,
    MEAN,
    MERGE,
    MIX,
    NAMES,
    NORM,
    ROTATE,
    SCALE,
    VERTICAL,
    WHOLE,
    WINDOW,
    WITH_WEIGHTS,
    Step,
    Unsuitable,
    Value,
    activation,
    macs_of,
    read_by,
    stride_of,
    weights_of,
)

SHAPES = 8  # prepared at once
KEPT = 1 << 24
"""Floats of scratch memory that a thread keeps from call to call."""
CACHED = 1 << 20
"""Floats of the largest value: as many images run at a time as stay below, so that caches hold them."""


@dataclass(frozen=True)
class Part:
    """What a layer of a program did: `ms` is the median over several runs, `bytes` counts operands and result once."""

    name: str
    macs: int
    bytes: int
    ms: float


@dataclass(frozen=True)
class _Plan:
    """A batch in passes: the first image, how many times as many as it is prepared for, and what is prepared."""

    shape: tuple[int, ...]
    passes: list[tuple[int, int, Prepared]]
    threads: int


@dataclass(frozen=True)
class _Held:
    """What is made from weights, and these: arranged weights by layer, plans by shape and threads. A change of weights
    makes another; calls that run meanwhile keep the one that they began with.
    """

    weights: Contents
    arranged: dict[int, Arranged]
    plans: dict[tuple[int, ...], _Plan]


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


_numbers = count(secrets.randbits(48))  # so that a graph of another process names none of this one's
_programs: WeakValueDictionary[int, "Program"] = WeakValueDictionary()


class Program:
    """Layers in the order in which they were added, from a map (B, C, H, W) in channels-last memory to another.

    The layers are modules, whose weights are arranged for the kernels when they are first needed, and again when they
    have changed. Adding a layer raises Unsuitable where the kernels do not serve it.
    """

    def __init__(self, channels: int, planes: bool = False) -> None:
        """planes: the input is a map in contiguous memory, which only a convolution takes."""
        if kernels() is None:
            raise Unsuitable("no kernels")
        self.planes = planes
        self._steps: list[Step] = []
        self._values: list[Value] = []
        self._start()
        self.input = self._value(channels, 0)

    def _start(self) -> None:
        self.number = next(_numbers)
        _programs[self.number] = self
        self.forget()
        self._kernels = kernels()  # a copy may come from another machine
        self._served = self._kernels is not None and all(self._fits(step) for step in self._steps)

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
        step = Step(kind, source, to, *rest, **named)
        if not self._fits(step):
            raise Unsuitable(f"{NAMES[kind]} of {to.channels} channels")
        self._steps.append(step)
        return to

    def _fits(self, step: Step) -> bool:
        """Whether vectors divide what the kernels read and write in whole ones."""
        assert self._kernels is not None
        widths = [] if step.kind in (LINEAR, CONV) else [step.to.channels]  # of these the weights are padded
        if step.kind == CASCADE:
            widths += [step.layer.key_dim, step.layer.value_dim]
        elif step.kind in (ROTATE, MIX):
            widths.append(step.layer.width)
        elif step.kind == WINDOW:
            widths.append(step.to.channels // step.layer.heads)
        return not any(width % self._kernels.lanes for width in widths) and len(self._values) <= self._kernels.most

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
        halved = (x.halved or 0) + stride_of(conv, depthwise=True) - 1
        return self._add(DEPTHWISE, x, self._sum(residual, x.channels, halved), residual, act, conv)

    def conv(self, x: Value, conv: Any, act: str = "none") -> Value:
        """act(conv(x)), as for `depthwise`, each output of all channels, or of patches side by side."""
        halved = (x.halved or 0) + round(math.log2(stride_of(conv, depthwise=False)))
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
            if stride_of(conv, depthwise=True) != 1 or not isinstance(qkv, nn.Conv2d):
                raise Unsuitable(repr(attention))
        return self._add(CASCADE, x, self._value(x.channels, x.halved), None, act, attention, heads)

    def gated(self, x: Value, reduce: nn.Module, act: str, expand: nn.Module) -> Value:
        """x * sigmoid(expand(act(reduce(mean(x)))))"""
        mean = self._add(MEAN, x, self._value(x.channels, None))
        factors = self.linear(self.linear(mean, reduce, act), expand, "sigmoid")
        return self._add(SCALE, x, self._value(x.channels, x.halved), factors)

    # ------------------------------------------------------------------------------------------------- running

    def serves(self, x: Tensor) -> bool:
        """Whether this input can be run: on the CPU in float32 or bfloat16, without gradients, autocast or a graph
        being made. Where the machine does not multiply bfloat16, such weights are widened once.
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
            moved = [batch * math.prod(v.sides(height, width)) * v.channels for v in read_by(step)]
            moved += [weight.numel() for weight in weights_of(step)]
            macs = macs_of(step, batch, height, width).total()
            parts.append(Part(f"muntin::{NAMES[step.kind]}", macs, 4 * sum(moved), 1000 * seconds))
        return parts

    def _run_all(self, x: Tensor, clock: int | None) -> Tensor:
        dtype, x = x.dtype, self._ordered(x).float()
        assert self._kernels is not None
        plan = self._plan(x.shape, torch.get_num_threads())
        out = torch.empty(plan.shape, **FLOATS)
        sizes = x[0].numel(), out[0].numel()
        pointers = x.data_ptr(), out.data_ptr()
        for first, times, made in plan.passes:
            source, target = (p + 4 * first * size for p, size in zip(pointers, sizes, strict=True))
            held = _scratch(made.floats)
            self._kernels.run(
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
            preparation = self._preparation(held.arranged)
            passes = [(0, times, preparation.prepare(each, height, width, threads))]
            if rest:
                passes.append((times * each, 1, preparation.prepare(rest, height, width, threads)))
            plan = _Plan((batch, *last.sides(height, width), last.channels), passes, threads)
            held.plans[*shape, threads] = plan
        return plan

    def _preparation(self, arranged: dict[int, Arranged]) -> Preparation:
        assert self._kernels is not None
        half = self._kernels.halves > 0 and self._weight().dtype == torch.bfloat16
        return Preparation(self._kernels, self._steps, self._values, self.planes, half, arranged)

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
        return sum((macs_of(step, batch, height, width) for step in self._steps), Counter[str]())

    def weights(self) -> list[Tensor]:
        """Of all layers."""
        return [weight for step in self._steps for weight in weights_of(step)]


def convolutions(layers: nn.Sequential) -> Program:
    """A stem of folded convolutions and activations in turns. Raises Unsuitable."""
    program = Program(3, planes=True)
    x = program.input
    modules = [*layers, None]
    for conv, act in zip(modules[::2], modules[1::2], strict=True):
        x = program.conv(x, conv, "none" if act is None else activation(act))
    return program


_library = torch.library.Library("muntin", "FRAGMENT")
_library.define("program(Tensor x, int number) -> Tensor")
_library.impl("program", lambda x, number: _programs[number].run(x), "CPU")


def program(number: int) -> Program:
    """The program that an operator names."""
    return _programs[number]
