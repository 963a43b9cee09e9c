"""torch.compile with batch, height and width dynamic."""

from typing import Any

import torch
from torch import Tensor, nn

from muntin.runtime.optimize import optimize, take_over

RECOMPILES = 256  # models and shapes in a process: all classifiers share the code of one forward, and torch allows it 8


class Compiled(nn.Module):
    """A compiled model for every batch and size: in inference one graph for batch 1 and one for all others.

    The parameters are the given model's own. In inference the graphs are of its `optimize`d copy, which follows when
    weights are loaded, trained, moved or replaced; only what is written in place through `.data` goes unseen. An
    image no higher or wider than the stem's stride, whose map would be a single row or column, runs uncompiled. With
    gradients there is a graph for each shape: symbolic sizes in a backward pass take minutes to compile.
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

    def _copy(self) -> "_Copy":
        if not (self._copies and self._copies[0].follows()):
            self._copies = [_Copy(self.model, self._options)]
        return self._copies[0]


class _Copy:
    """An optimised copy of a model, and its compiled form."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self.model = model
        self.seen = _contents(model)
        self.fast = optimize(model)
        self.compiled = torch.compile(self.fast, fullgraph=True, **options)

    def follows(self) -> bool:
        """Whether it computes what the model does now; where weights alone have changed it takes them over."""
        if all(held.get(key) is value and _version(value) == version for held, key, value, version in self.seen):
            return True
        with torch.no_grad():
            fresh = optimize(self.model)
            self.seen = _contents(self.model)
            return take_over(self.fast, fresh)


def _contents(model: nn.Module) -> list[tuple[dict[str, Any], str, Any, tuple[int, int]]]:
    """Every module, parameter and buffer: what holds it, under which name, and its version."""
    held = [group for module in model.modules() for group in (module._modules, module._parameters, module._buffers)]
    return [(group, key, value, _version(value)) for group in held for key, value in group.items()]


def _version(value: Any) -> tuple[int, int]:
    """How often a tensor was written to, and where it is: a move to another type or device counts as no writing."""
    if not isinstance(value, Tensor):
        return 0, 0
    return 0 if value.is_inference() else value._version, value.data_ptr()


def compile(model: nn.Module, **options: Any) -> Compiled:
    """The model, compiled for all batches and sizes: at most two graphs in inference, without a graph break.

    options: passed on to `torch.compile` (backend, mode, options).
    """
    return Compiled(model, **options)
