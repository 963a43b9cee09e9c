"""An exported file against the model that it was made from, on random images.

B batch, H W image
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.heads.dense import Detector
from muntin.runtime.pictures import Pictures
from muntin.runtime.targets import ExportError

BOUNDS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1.5e-1}
"""Standard deviations of the output: about what PyTorch itself is off by at worst in these formats (docs/export.md)."""
TOLERANCE = BOUNDS["float32"]


@dataclass(frozen=True)
class Check:
    """One comparison with PyTorch: the largest error over the batch in standard deviations of the output.

    objects: how many a detector found; its error is another (`muntin.runtime.detections`).
    """

    batch: int
    height: int
    width: int
    error: float
    objects: int | None = None


def default_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes that an export is checked at: its own, an odd larger one, an odd smaller one and a sliver."""
    height, width = size
    return [
        (height, width),
        (height * 5 // 4 | 1, width * 3 // 4 | 1),
        (height // 2 | 1, width),
        (max(height // 8, 1), max(width // 16, 1) | 1),
    ]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def verify(
    model: nn.Module,
    engine: Callable[[Tensor], Any],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    tick: Callable[[str], object] = lambda case: None,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    repeats: int = 1,
    pictures: Pictures | None = None,
    bound: float = TOLERANCE,
) -> list[Check]:
    """Compare an engine with the model it was made from, on random images of every size and batch.

    The model is compared in evaluation mode, float32, and left as it was. `tick` is told each case before it runs.
    prepare: what turns bytes (B, H, W, 3) into the model's images, where the engine takes bytes.
    repeats: how many batches of each kind. pictures: what to look at instead of noise.
    bound: of a detector's errors, beyond which what it found is no longer the same.
    Raises ExportError where the outputs have different shapes, or a detector finds something else.
    """
    like = next(model.parameters(), torch.empty(0))
    checks = []
    with evaluation(model):
        for size, batch, seed in itertools.product(sizes, batches, range(repeats)):
            tick(f"batch {batch}, {size[0]}x{size[1]}")
            if pictures is None and prepare is None:
                given = images = random_images(batch, size, seed).to(like.device, like.dtype)
            else:
                seen = random_bytes(batch, size, seed) if pictures is None else pictures(batch, size, seed)
                normalise = prepare if pictures is None or prepare is not None else pictures.prepare
                assert normalise is not None  # without one there are pictures
                images = normalise(seen).to(like.device, like.dtype)
                given = images if prepare is None else seen
            checks.append(_checked(model, engine, given, images, bound))
    return checks


def _checked(model: nn.Module, engine: Callable[[Tensor], Any], given: Tensor, images: Tensor, bound: float) -> Check:
    """given: what the engine takes for the model's images (B, 3, H, W)."""
    shape = (len(images), images.shape[2], images.shape[3])
    if not isinstance(model, Detector):
        return Check(*shape, _error(model, engine, given, images))
    from muntin.runtime.detections import compare

    found = {name: value.to(images.device) for name, value in engine(given).items()}
    with torch.inference_mode():
        return Check(*shape, compare(model, found, images, bound), len(found["boxes"]))


def random_images(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, 3, H, W), standard normal."""
    return torch.randn(batch, 3, *size, generator=_generator(batch, size, seed))


def random_bytes(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, H, W, 3), uint8."""
    return torch.randint(256, (batch, *size, 3), generator=_generator(batch, size, seed), dtype=torch.uint8)


def _generator(batch: int, size: tuple[int, int], seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch * 1_000_003 + size[0] * 1009 + size[1] + seed * 7_368_787)


def _error(model: nn.Module, engine: Callable[[Tensor], Any], given: Tensor, images: Tensor) -> float:
    with torch.inference_mode():
        wanted = as_list(model(images))
    found = as_list(engine(given))
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in wanted]:
        shapes = [", ".join(str(tuple(t.shape)) for t in outputs) for outputs in (found, wanted)]
        raise ExportError(f"the exported model returns {shapes[0]}, PyTorch {shapes[1]}")
    return max(deviation(f, w) for f, w in zip(found, wanted, strict=True))


def deviation(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    spread = wanted.std(unbiased=False) if wanted.numel() > 1 else wanted.abs().max()
    error = ((found - wanted).abs().max() / spread.clamp_min(1e-12)).item()
    return error if error == error else float("inf")  # not a number: nothing is worse


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
