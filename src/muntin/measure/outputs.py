"""Outputs compared before anything is timed: an engine with eager float32, a peer with our model of the same weights.

B batch, H W image
"""

from typing import Any

import torch
from torch import Tensor, nn

from muntin.measure.runners import Runner, Skipped, placed
from muntin.measure.targets import Models, Size, Target
from muntin.measure.timing import timed
from muntin.runtime.verify import BOUNDS, deviation

GPU_BOUNDS = BOUNDS | {"float32": 5e-3}  # cuDNN's convolutions use TF32 as PyTorch sets it
SHARED = 2  # images in the comparison of a peer with our model


def tensors(result: Any) -> list[Tensor] | None:
    """The tensors of a result, in order; None where it holds something else, such as what a detector found."""
    found = list(result) if isinstance(result, (list, tuple)) else [result]
    return found if found and all(isinstance(t, Tensor) for t in found) else None


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest over all tensors, in standard deviations of the wanted one; infinite where shapes or NaN differ."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    return max(deviation(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


class Comparison:
    """What outputs should be at one batch and size; eager float32 of each model runs once."""

    def __init__(self, models: Models, device: torch.device) -> None:
        self.models, self.device = models, device
        self.bounds = GPU_BOUNDS if device.type == "cuda" else BOUNDS
        self._wanted: dict[int, list[Tensor] | None] = {}
        self._shared: dict[int, float] = {}

    def first_call(self, runner: Runner, images: Tensor, size: Size) -> tuple[float, float | None]:
        """Seconds of a runner's first call at this shape, and how far its outputs are from eager float32.

        Raises Skipped where that is beyond the bound of its precision.
        """
        seconds, result = timed(runner.call, runner.given(images, self.device))
        target, found = runner.target, tensors(result)
        if target.kind == "file":  # it was compared with its model when it was exported
            return seconds, None
        if (runner.engine, runner.precision) == ("eager", "float32") and not target.peer:
            self._wanted[id(target)] = None if found is None else [t.clone() for t in found]
            return seconds, None
        wanted = self._reference(target, images, size)
        if found is None or wanted is None:
            return seconds, None
        far, bound = difference(found, wanted), self.bounds[runner.precision]
        if not far <= bound:
            raise Skipped(f"outputs differ from eager float32 by {far:.1e} standard deviations, more than {bound:g}")
        return seconds, far

    def shared(self, target: Target, images: Tensor, size: Size) -> float | None:
        """How far a peer is from our model whose weights it has; None without such a model. Raises Skipped."""
        if target.counterpart is None:
            return None
        if id(target) not in self._shared:
            few = images[:SHARED]
            ours = self._eager(self.models.ours(target.counterpart), few)
            theirs = self._reference(target, images, size)
            assert ours is not None and theirs is not None  # classifiers
            self._shared[id(target)] = difference([t[:SHARED] for t in theirs], ours)
        far, bound = self._shared[id(target)], self.bounds["float32"]
        if not far <= bound:
            raise Skipped(
                f"with the weights of {target.counterpart} outputs differ by {far:.1e} standard deviations, more than "
                f"{bound:g}: at {size[0]}x{size[1]} it computes something else"
            )
        return far

    def _reference(self, target: Target, images: Tensor, size: Size) -> list[Tensor] | None:
        if id(target) not in self._wanted:
            found = self._eager(self.models.get(target, size), images)
            self._wanted[id(target)] = found
        return self._wanted[id(target)]

    def _eager(self, model: nn.Module, images: Tensor) -> list[Tensor] | None:
        model = placed(model, self.device, torch.float32)
        with torch.inference_mode():
            return tensors(model(images.to(self.device)))
