"""torch.compile with batch, height and width dynamic."""

from typing import Any

import torch
from torch import Tensor, nn

RECOMPILES = 256  # models and shapes in a process: all classifiers share the code of one forward, and torch allows it 8


class Compiled(nn.Module):
    """A compiled model for every batch and size: in inference one graph for batch 1 and one for all others.

    The parameters are the given model's own. An image no higher or wider than the stem's stride, whose map
    would be a single row or column, runs uncompiled. With gradients there is a graph for each shape: symbolic
    sizes in a backward pass take minutes to compile.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        backbone: Any = getattr(model, "backbone", model)
        self._least = backbone.stem.stride + 1
        self._inference = torch.compile(model, fullgraph=True, **options)
        self._training = torch.compile(model, fullgraph=True, dynamic=False, **options)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if min(image.shape[-2:]) < self._least:
            return self.model(image)
        if torch.is_grad_enabled():
            with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
                return self._training(image)
        image = image.view_as(image)  # the marks stay off the caller's tensor
        for axis in (0, 2, 3):
            if image.shape[axis] > 1:
                torch._dynamo.mark_dynamic(image, axis)
        with torch._dynamo.config.patch(capture_scalar_outputs=True, recompile_limit=RECOMPILES):
            return self._inference(image)


def compile(model: nn.Module, **options: Any) -> Compiled:
    """The model, compiled for all batches and sizes: at most two graphs in inference, without a graph break.

    options: passed on to `torch.compile` (backend, mode, options).
    """
    return Compiled(model, **options)
