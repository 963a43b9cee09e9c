"""A model as the graph that every target starts from.

B batch, H W image
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
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
    if job.alone:
        del sides[0]
    attempts: list[Any] = [None]
    if job.fixed is None:  # a model that some sizes are too small for is traced with whatever bounds it has
        attempts = [{axis: Dim(name, min=1) for axis, name in sides.items()}, dict.fromkeys(sides, Dim.DYNAMIC)]
    with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():  # it prints graphs that it gave up
        refusals: list[Exception] = []
        for dynamic in attempts:
            try:
                return _export(job, dynamic)
            except (TorchUserError, GuardOnDataDependentSymNode) as error:
                refusals.append(error)
    reason = _reason(refusals[0])
    if "data-dependent" in reason:
        remedy = "write it without a branch or a shape that hangs on values of a tensor"
    else:
        remedy = "rewrite it without" if job.fixed else "give fixed=(batch, height, width) for one size alone"
    raise UserError(f"no graph of this model can be made: {reason}; {remedy}") from refusals[0]


def _export(job: Job, dynamic: Any) -> torch.export.ExportedProgram:
    shapes = None if dynamic is None else (dynamic,)
    return torch.export.export(job.model, (job.image,), dynamic_shapes=shapes, strict=False)


def _reason(error: Exception) -> str:
    """What torch.export stumbled over, and where in the model."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("You marked")), lines[0]).partition(". ")[0]
    place = re.search(r'File "([^"]*)", line (\d+), in \w+\n\s*(.*)', str(error))
    return f"{told} ({Path(place[1]).name}:{place[2]}: {place[3]})" if place else told


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own deprecations and advice: a user can act on none of it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
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
