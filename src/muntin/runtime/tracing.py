"""A model as the graph that every target starts from.

B batch, H W image
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.exc import UserError as TorchUserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from muntin.errors import UserError
from muntin.runtime.targets import Job, axes

LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx", "torch._subclasses.fake_tensor")


def trace(job: Job) -> torch.export.ExportedProgram:
    """The model's graph for the job's image: batch, height and width dynamic from 1 up, or all of them fixed."""
    Dim = torch.export.Dim
    sides = dict(zip(axes(job.image.dtype), ("batch", "height", "width"), strict=True))
    attempts: list[Any] = [None]
    if job.fixed is None:  # a model that some sizes are too small for is traced with whatever bounds it has
        attempts = [{axis: Dim(name, min=1) for axis, name in sides.items()}, dict.fromkeys(sides, Dim.DYNAMIC)]
    with quiet(), torch.no_grad():
        refusals: list[Exception] = []
        for dynamic in attempts:
            try:
                return _export(job, dynamic)
            except (TorchUserError, GuardOnDataDependentSymNode) as error:
                refusals.append(error)
    remedy = "rewrite it without" if job.fixed else "give fixed=(batch, height, width) for one size alone"
    raise UserError(f"no graph of this model can be made: {_reason(refusals[0])}; {remedy}") from refusals[0]


def _export(job: Job, dynamic: Any) -> torch.export.ExportedProgram:
    shapes = None if dynamic is None else (dynamic,)
    return torch.export.export(job.model, (job.image,), dynamic_shapes=shapes, strict=False)


def _reason(error: Exception) -> str:
    """What torch.export stumbled over, and where in the model."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("You marked")), lines[0]).partition(". ")[0]
    place = re.search(r"Caused by: \((?:.*/)?([^()]*) in (\w+)\)", str(error))
    return f"{told} ({place[1]}, {place[2]})" if place else told


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own deprecations and advice: a user can act on none of it."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx", "torch._subclasses.fake_tensor")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
