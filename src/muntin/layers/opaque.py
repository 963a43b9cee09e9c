"""Stages that run as one: as one operator of a compiled graph, as a program of compiled kernels, or both.

On a CPU packed products, attention in pieces and window order, with the sizes at hand, are faster than what a compiler
makes of a stage whose sizes are symbols (docs/performance.md). The graph holds a number, so it serves any weights.

Legend: B batch, H W map, N = H * W tokens in raster order, C channels. A stage takes tokens (B, N, C) or a map
(B, C, H, W), and gives the same kind. A stem is a stage that takes an image.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from muntin.layers.folding import note
from muntin.layers.window import fresh
from muntin.native.program import Program
from muntin.native.steps import Unsuitable

_numbers = count()
_stages: WeakValueDictionary[int, Any] = WeakValueDictionary()


class Programmed(nn.Module):
    """Base of modules that may run as a program (muntin.native).

    A program is of the layers that were there when it was added; their weights are followed. Layers that have hooks run
    themselves.
    """

    program: Program | None = None
    _hooks: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def programmed(self) -> Program:
        """The module, folded, as a program. Raises Unsuitable for what the kernels do not serve."""
        raise Unsuitable(type(self).__name__)

    def add_program(self) -> None:
        """Run as a program from now on, where the kernels serve the module; not before its norms are folded."""
        try:
            self.program = self.programmed()
        except Unsuitable:
            return
        note("layers into one program of compiled kernels")

    def serving(self, x: Tensor) -> Program | None:
        """The program where it serves this input."""
        if self.program is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if self._hooks is None:
            below = [module for module in self.modules() if module is not self]
            self._hooks = [h for module in below for h in (module._forward_hooks, module._forward_pre_hooks)]
        return self.program if self.program.serves(x) and not any(self._hooks) else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.program is not None:
            self.program.forget()
        return self


class OpaqueStage(Programmed):
    """Base of stages that may be one operator of a compiled graph.

    channels: of the output. stride: what the sides of its map are divided by, rounded up.
    """

    def __init__(self, channels: int, stride: int, *layers: Any) -> None:
        super().__init__(*layers)
        self.channels, self.stride = channels, stride
        self.number: int | None = None

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The stage, uncompiled: its input and the sides of that map -> its output, of the same kind."""
        raise NotImplementedError

    def enroll(self) -> None:
        """From now on compiled graphs hold the operator. Not for a module that is copied later."""
        self.number = next(_numbers)
        _stages[self.number] = self

    @property
    def opaque(self) -> bool:
        """Whether the operator stands here. Not under autocast: a graph has its casts inside, an operator none."""
        if self.number is None or not torch.compiler.is_compiling():
            return False
        return not torch.is_autocast_enabled("cpu")

    def by_operator(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, int, int]:
        """The output, and the sides of its map."""
        height, width = (fresh(-(-side // self.stride)) for side in size) if self.stride > 1 else size
        out = torch.ops.muntin.stage(x, self.number, list(size), [height, width], self.channels)
        return out, height, width


_library = torch.library.Library("muntin", "FRAGMENT")
_library.define("stage(Tensor x, int number, SymInt[] size, SymInt[] out, int channels) -> Tensor")


def run_stage(x: Tensor, number: int, size: Sequence[int], out: Sequence[int], channels: int) -> Tensor:
    """What the operator runs."""
    y = _stages[number].whole(x, (size[0], size[1]))
    return y.contiguous(memory_format=torch.channels_last if y.ndim == 4 else torch.contiguous_format)


_library.impl("stage", run_stage, "CPU")


@torch.library.register_fake("muntin::stage")
def _(x: Tensor, number: int, size: Sequence[int], out: Sequence[int], channels: int) -> Tensor:
    if x.ndim == 3:
        return x.new_empty(x.shape[0], out[0] * out[1], channels)
    return x.new_empty(x.shape[0], out[0], out[1], channels).permute(0, 3, 1, 2)
