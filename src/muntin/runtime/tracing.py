"""A model as the graph that every target starts from.

B batch, H W image
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch

from muntin.runtime.targets import Job, axes


def trace(job: Job) -> torch.export.ExportedProgram:
    """The model's graph for the job's image: batch, height and width dynamic from 1 up, or all of them fixed."""
    with quiet(), torch.no_grad():
        if job.fixed is not None:
            return torch.export.export(job.model, (job.image,), strict=False)
        Dim = torch.export.Dim
        names = ("batch", "height", "width")
        dynamic = {axis: Dim(name, min=1) for axis, name in zip(axes(job.image.dtype), names, strict=True)}
        return torch.export.export(job.model, (job.image,), dynamic_shapes=(dynamic,), strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own deprecations and advice: a user can act on none of it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
