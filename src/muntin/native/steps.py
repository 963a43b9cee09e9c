"""What programs are made of: values, the layers between them, and which of a model's layers can be such.

Legend: H W map, C channels, A tokens of a window.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from muntin.layers.window import make_grid

LINEAR, DEPTHWISE, CASCADE, MEAN, SCALE, CONV, NORM, ROTATE, MIX, MERGE, WINDOW = range(11)
NAMES = ("linear", "depthwise", "cascade", "mean", "scale", "conv", "norm", "rotate", "mix", "merge", "window")
WITH_WEIGHTS = (LINEAR, DEPTHWISE, CONV, NORM)
BY_ROWS = (LINEAR, NORM)  # each row by itself
HORIZONTAL, VERTICAL, WHOLE = range(3)
ACTS = {"none": 0, "relu": 1, "hardswish": 2, "sigmoid": 3, "gelu": 4}
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}


class Unsuitable(Exception):
    """A layer that the kernels do not serve."""


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
class Step:
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


def activation(module: nn.Module) -> str:
    """Its name here. Raises Unsuitable."""
    name = ACTIVATIONS.get(type(module))
    if name is None or getattr(module, "approximate", "none") != "none":
        raise Unsuitable(repr(module))
    return name


def macs_of(step: Step, batch: int, height: int, width: int) -> Counter[str]:
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
        tall, wide = window_of(step.layer, rows, columns)
        area, windows = tall * wide, batch * -(-rows // tall) * -(-columns // wide)
        found["linear"] += windows * area * sum(qkv.weight.numel() for qkv, _ in step.heads)
        found["convolution"] += windows * area * sum(conv.weight.numel() for _, conv in step.heads)
        channels = step.layer.key_dim + step.layer.value_dim
        found["attention"] += windows * area * area * channels * len(step.heads)
    return found


def weights_of(step: Step) -> list[Tensor]:
    """Weights and biases, and a cascade's bias table."""
    layers = [step.layer] if step.kind in WITH_WEIGHTS else [layer for pair in step.heads for layer in pair]
    found = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
    return [*found, step.layer.bias_table] if step.heads else found


def read_by(step: Step) -> list[Value]:
    """What it reads or writes."""
    return [value for value in (step.source, step.other, step.to) if value is not None]


def window_of(attention: Any, height: int, width: int) -> tuple[int, int]:
    """A map that fits the window is one."""
    fits = height <= attention.window and width <= attention.window
    return (height, width) if fits else (attention.window, attention.window)


def stride_of(conv: Any, depthwise: bool) -> int:
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
