"""Programs as the kernels read them: layers in C structures, weights in panels, and a place for each value.

Legend: B batch, H W map, C channels, A tokens of a window.
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.layers.manhattan import log_gamma, rotation
from muntin.layers.position import constants
from muntin.layers.window import Grid, make_grid
from muntin.native.build import library
from muntin.native.steps import (
    ACTS,
    BY_ROWS,
    CASCADE,
    CONV,
    DEPTHWISE,
    LINEAR,
    MIX,
    NORM,
    ROTATE,
    WINDOW,
    WITH_WEIGHTS,
    Step,
    Value,
    read_by,
    window_of,
)

ALIGNED = 16  # floats of a cache line
NEAR = 1 << 16
"""Floats that a few rows of a layer's input and output may take."""
FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
Arranged = tuple[Tensor, Tensor]  # weights and bias of a layer as the kernels read them
KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64}
_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p


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


@dataclass(frozen=True)
class Kernels:
    """The compiled function, and the sizes that it was compiled with.

    lanes: floats of a vector; panel, rows: columns and rows of a tile; patches: of a convolution, put side by side
    most: values of a program; halves: rows that are rounded to bfloat16 at a time, 0 where the machine does not
    multiply it
    """

    run: Any
    lanes: int
    panel: int
    rows: int
    patches: int
    most: int
    halves: int


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels, if they are there and agree with this file about the layout of a layer."""
    found = library()
    if found is None or found.muntin_layer_bytes() != ctypes.sizeof(_Layer):
        return None
    found.muntin_run.argtypes, found.muntin_run.restype = [KINDS[kind] for kind in "pipiippiillpllip"], None
    sizes = ("lanes", "panel", "rows", "patches", "values", "half")
    return Kernels(found.muntin_run, *(getattr(found, f"muntin_{name}")() for name in sizes))


@dataclass(frozen=True)
class Prepared:
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


class Preparation:
    """Prepares one program for batches and sizes."""

    def __init__(
        self,
        found: Kernels,
        steps: Sequence[Step],
        values: Sequence[Value],
        planes: bool,
        half: bool,
        arranged: dict[int, Arranged],
    ) -> None:
        """half: its weights are of bfloat16, and the machine multiplies that.
        arranged: of the layers so far, by their ids; those that are missing are added.
        """
        self._kernels, self._steps, self._values, self._planes, self._half = found, steps, values, planes, half
        self._arranged = arranged

    def prepare(self, batch: int, height: int, width: int, threads: int) -> Prepared:
        """For so many images of one size at a time."""
        layers = (_Layer * len(self._steps))()
        kept: list[Any] = []
        for layer, step in zip(layers, self._steps, strict=True):
            rows, columns = step.source.sides(height, width)
            layer.kind, layer.act = step.kind, ACTS[step.act]
            layer.source, layer.to = step.source.number, step.to.number
            layer.other = -1 if step.other is None else step.other.number
            layer.rows = rows * columns * (batch if step.kind in (LINEAR, NORM) else 1)
            layer.inputs, layer.outputs = step.source.channels, step.to.channels
            layer.height, layer.width, layer.half = rows, columns, self._half
            if step.kind == CASCADE:
                kept += self._prepare_window(layer, step, *window_of(step.layer, rows, columns))
            elif step.kind == WINDOW:
                kept += self._prepare_windows(layer, step, make_grid(rows, columns, *step.rule))
            elif step.kind in (ROTATE, MIX):
                kept.append(self._prepare_mix(layer, step))
            elif step.kind in WITH_WEIGHTS:
                layer.planes = self._planes and step.source.number == 0
                arranged = self._arrange(step.layer, layer.planes)
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
            layer.together, layer.block = len(group), self._kernels.rows * max(8, NEAR // widest // self._kernels.rows)
            for value in self._near(group):
                offsets[value.number] = -1 - place
                place += layer.block * value.channels
                place += -place % ALIGNED
            own = max(own, place)
        places = (ctypes.c_int64 * len(offsets))(*offsets)
        return Prepared(batch, layers, places, between, own, between + threads * own, kept)

    def _groups(self, layers: Any, threads: int) -> list[range]:
        """Layers that follow each other and run together, a few rows at a time, if there are rows for all threads."""
        groups: list[range] = []
        for i, layer in enumerate(layers):
            if layer.kind not in BY_ROWS or layer.rows < 4 * self._kernels.rows * threads:
                continue
            if groups and groups[-1].stop == i and layers[i - 1].rows == layer.rows:
                groups[-1] = range(groups[-1].start, i + 1)
            else:
                groups.append(range(i, i + 1))
        return groups

    def _near(self, group: range) -> list[Value]:
        """The values that only these layers see."""
        others = {value for i, step in enumerate(self._steps) if i not in group for value in read_by(step)}
        others |= {self._values[0], self._steps[-1].to}
        return sorted({value for i in group for value in read_by(self._steps[i])} - others, key=lambda v: v.number)

    def _arrange(self, layer: Any, planes: bool = False) -> Arranged:
        """Weights and bias as the kernels read them. A product's: columns in panels side by side, (in, panel) each, the
        last as wide as whole vectors; of a convolution `in` is (k, k, C), of planes (C, k, k). A depthwise
        convolution's: (k * k, C). A norm's: as they are.
        """
        found = self._arranged.get(id(layer))
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
                bias = F.pad(bias.float(), (0, -out % self._kernels.lanes)).contiguous()
            found = self._arranged.setdefault(id(layer), (weight, bias))
        return found

    def _panels(self, weight: Tensor) -> Tensor:
        """(out, in) -> panels; in bfloat16, where the machine multiplies it, each has pairs, of inputs that follow each
        other: (in / 2, panel, 2).
        """
        half = weight.dtype == torch.bfloat16 and self._kernels.halves > 0
        weight = weight if half else weight.float()
        padding = (0, weight.shape[1] % 2 if half else 0, 0, -weight.shape[0] % self._kernels.lanes)
        parts = F.pad(weight, padding).t().split(self._kernels.panel, 1)
        if half:
            parts = tuple(part.unflatten(0, (-1, 2)).transpose(1, 2) for part in parts)
        return torch.cat([part.reshape(-1) for part in parts])

    def _prepare_window(self, layer: Any, step: Step, height: int, width: int) -> list[Any]:
        """What an attention in such windows points to."""
        with constants():
            bias = step.layer._bias(height, width, torch.float32)
            bias = F.pad(bias, (0, -height * width % self._kernels.lanes), value=-torch.inf).contiguous()
        heads = (_Head * len(step.heads))()
        kept: list[Any] = [bias, heads]
        for head, pair in zip(heads, step.heads, strict=True):
            arranged = [tensor for part in pair for tensor in self._arrange(part)]
            head.qkv, head.qkv_bias, head.taps, head.tap_bias = (tensor.data_ptr() for tensor in arranged)
            kept += arranged
            head.kernel = pair[1].kernel_size[0]
        layer.window_height, layer.window_width = height, width
        layer.heads, layer.key = len(heads), step.layer.key_dim
        layer.bias, layer.head = bias.data_ptr(), ctypes.addressof(heads)
        return kept

    def _prepare_windows(self, layer: Any, step: Step, grid: Grid) -> list[Any]:
        """What a window attention's layer points to."""
        attention = step.layer
        (layer.window_height, layer.window_width), (layer.shift_height, layer.shift_width) = grid.window, grid.shift
        layer.heads, layer.key = attention.heads, step.to.channels // attention.heads
        with constants():
            bias = attention.kind_biases(grid, torch.float32)
            bias = F.pad(bias, (0, -grid.area % self._kernels.lanes), value=-torch.inf).contiguous()
            kept = [bias, attention.padded().detach().to(torch.float32, copy=True)]
            factors = getattr(attention, "factors", None)
            if factors is not None:
                kept.append(factors[0, :, 0].float().contiguous())
                layer.factors = kept[-1].data_ptr()
        layer.bias, layer.weight = kept[0].data_ptr(), kept[1].data_ptr()
        return kept

    def _prepare_mix(self, layer: Any, step: Step) -> Tensor:
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
        k, floats = self._kernels, 0
        halves = k.halves if layer.half else 0
        if layer.kind == CASCADE:
            area, value = layer.window_height * layer.window_width, layer.inputs // layer.heads
            padded = area + -area % k.lanes
            floats = area * 3 * (value + layer.key) + (layer.key + k.rows) * padded + 3 * k.panel
            floats += halves * -(-value // 2)
        elif layer.kind == MIX:
            length = (layer.width, layer.height, layer.rows)[layer.kernel]
            padded = length + -length % k.lanes
            floats = (2 * layer.key + k.rows + 2) * padded + 4 * k.panel
        elif layer.kind == WINDOW:
            area = layer.window_height * layer.window_width
            padded = area + -area % k.lanes
            floats = 3 * area * layer.key + (layer.key + k.rows + 1) * padded + 2 * k.panel
        elif layer.kind == CONV:
            depth = layer.kernel**2 * layer.inputs
            floats = k.patches * depth + halves * -(-depth // 2)
        elif layer.kind == LINEAR:
            floats = halves * -(-layer.inputs // 2)
        return floats + -floats % ALIGNED

    def _places(
        self, batch: int, height: int, width: int, groups: list[range], near: Collection[int]
    ) -> tuple[list[int], int]:
        """Where each value stands but those called near, and how many floats that takes; one that no later layer, and
        none of the same group, needs makes room.
        """
        ends = {i: group.stop - 1 for group in groups for i in group}
        last = {value.number: ends.get(i, i) for i, step in enumerate(self._steps) for value in read_by(step)}
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
