"""A trained detector or segmenter, whatever holds it: a run's folder, its weights, or an exported file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muntin.errors import UserError
from muntin.run import Run
from muntin.runtime.dense_engine import DenseEngine
from muntin.runtime.engines import Engine

NEEDED = ("fit", "mean", "std")  # of an exported file's preprocessing


@dataclass(frozen=True)
class TrainedDense:
    """What evaluation and prediction need to know.

    `path` is what the user named, `folder` where a run's split would be. `model` is in evaluation mode on the device to
    use; an exported file stands in for it. `classes` are in its order, `palette` their colours where there are any.
    `preprocessing` has `fit`, `mean` and `std`, as `muntin.tasks.dense_inference` takes them.
    """

    path: Path
    folder: Path
    model: nn.Module
    task: str
    classes: list[str]
    preprocessing: dict[str, Any]
    palette: list[tuple[int, int, int]] | None

    def window(self, crop: int | None) -> tuple[int, int] | None:
        """Height and width of what slides over an image, for a side that was asked for; None where nothing does.

        A segmenter's file of one size is a window of that size. Raises UserError for a detector, and for a side that
        the file does not take.
        """
        if self.task != "segment":
            if crop is not None:
                raise UserError(f"{self.path} finds objects; a sliding window (--crop) is for segmentation")
            return None
        fixed = self.model.engine.fixed if isinstance(self.model, DenseEngine) else None
        if fixed is None:
            return None if crop is None else (crop, crop)
        if crop is not None and crop > min(fixed[1:]):
            raise UserError(
                f"{self.path} was exported for {fixed[1]}x{fixed[2]} alone, the window that slides over larger "
                f"images; leave --crop {crop} out, or export it again without --fixed"
            )
        return (fixed[1], fixed[2]) if crop is None else (crop, crop)


def of_run(run: Run) -> TrainedDense:
    """A run's model, on the GPU where there is one."""
    model = run.model().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedDense(run.weights, run.path, model, run.task, run.classes, run.preprocessing, run.palette)


def of_file(engine: Engine) -> TrainedDense:
    """An exported file. UserError where it does not say how images are prepared for it, or what its classes are."""
    model, path = DenseEngine(engine), engine.path
    if missing := [key for key in NEEDED if key not in engine.preprocessing]:
        raise UserError(
            f"{path} does not say how its images are prepared ({', '.join(missing)}); export it from a run, or with "
            "muntin.export(model, path, preprocessing=...)"
        )
    if not engine.classes:
        raise UserError(f"{path} does not name its classes; export it from a run, or with classes=...")
    colours = engine.metadata.get("palette")
    palette = None if colours is None else [(r, g, b) for r, g, b in colours]
    return TrainedDense(path, path.parent, model, model.task, engine.classes, engine.preprocessing, palette)
