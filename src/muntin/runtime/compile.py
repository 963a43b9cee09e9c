"""torch.compile with batch, height and width dynamic."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from muntin.layers.contents import Contents
from muntin.layers.opaque import OpaqueStage
from muntin.runtime.optimize import optimize, take_over

RECOMPILES = 256  # models and shapes in a process: all classifiers share the code of one forward, and torch allows it 8


class Compiled(nn.Module):
    """A compiled model for every batch and size: in inference one graph for batch 1 and one for all others.

    The parameters are the given model's own. In inference the graphs are of its `optimize`d copy, which follows when
    weights are loaded, trained, moved or replaced; only what is written in place through `.data` goes unseen. On a CPU
    each stage is one operator of these graphs (layers/opaque.py). An image no higher or wider than the stem's stride,
    whose map would be a single row or column, runs uncompiled. With gradients there is a graph for each shape: symbolic
    sizes in a backward pass take minutes to compile.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self._options = options
        backbone: Any = getattr(model, "backbone", model)
        self._least = backbone.stem.stride + 1
        # in lists, so that state_dict holds the model's weights once
        self._training = [torch.compile(model, fullgraph=True, dynamic=False, **options)]
        self._copies: list[_Copy] = []

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if min(image.shape[-2:]) < self._least:
            return self.model(image)
        if torch.is_grad_enabled() or self.model.training:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
                return self._training[0](image)
        image = image.view_as(image)  # the marks stay off the caller's tensor
        for axis in (0, 2, 3):
            if image.shape[axis] > 1:
                torch._dynamo.mark_dynamic(image, axis)
        with torch._dynamo.config.patch(capture_scalar_outputs=True, recompile_limit=RECOMPILES):
            return self._copy().compiled(image)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """A copy compiles anew: a graph is of one model's stages."""
        return Compiled(copy.deepcopy(self.model, memo), **self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.model, self._options)

    def optimized(self) -> nn.Module:
        """The copy that the graphs of inference are of."""
        return self._copy().fast

    def _copy(self) -> "_Copy":
        if not (self._copies and self._copies[0].follows()):
            self._copies = [_Copy(self.model, self._options)]
        return self._copies[0]


def _rebuilt(model: nn.Module, options: dict[str, Any]) -> Compiled:
    return Compiled(model, **options)


class _Copy:
    """An optimised copy of a model, and its compiled form."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self.model = model
        self.seen = Contents(model.modules())
        self.fast = optimize(model)
        for module in self.fast.modules():
            if isinstance(module, OpaqueStage) and next(module.parameters()).device.type == "cpu":
                module.enroll()
        self.compiled = torch.compile(self.fast, fullgraph=True, **options)

    def follows(self) -> bool:
        """Whether it computes what the model does now; where weights alone have changed it takes them over."""
        if self.seen.unchanged():
            return True
        with torch.no_grad():
            fresh = optimize(self.model)
            self.seen = Contents(self.model.modules())
            return take_over(self.fast, fresh)


def compile(model: nn.Module, **options: Any) -> Compiled:
    """The model, compiled for all batches and sizes: at most two graphs in inference, without a graph break.

    options: passed on to `torch.compile` (backend, mode, options).
    """
    return Compiled(model, **options)
