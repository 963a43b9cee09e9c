"""What was trained, whatever holds it: a run's folder, its weights, or an exported file. A classifier of these.

B batch, H W image, K classes
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.data.decode import Picture
from muntin.data.transforms import Evaluate
from muntin.errors import UserError
from muntin.run import PREPROCESSING, Run
from muntin.runtime.engines import Engine, in_batches, load
from muntin.runtime.targets import TARGETS
from muntin.tasks.trained_dense import TrainedDense, of_file, of_run


@dataclass(frozen=True)
class Trained:
    """What evaluation and prediction need to know.

    `path` is what the user named, `folder` where a run's split would be. `classes` are in the order of the logits
    (empty where an exported file does not name them); with `multi_label` an image may have several or none.
    `transform` makes an image the input of `logits`, which
    takes a batch of them and returns (B, K) on the CPU. `whole`: images are resized whole, not cropped.
    """

    path: Path
    folder: Path
    classes: list[str]
    transform: Callable[[Picture], Tensor]
    logits: Callable[[Tensor], Tensor]
    whole: bool
    multi_label: bool = False

    def probabilities(self, images: Tensor) -> Tensor:
        """A batch of images -> (B, K): of all classes together 1, or, with `multi_label`, of each class by itself."""
        logits = self.logits(images)
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


Source = Trained | TrainedDense | Run | str | os.PathLike[str]
"""What a user may name, or a part of the library has opened already."""


def open_any(source: Source) -> Trained | TrainedDense:
    """Open a run, its folder, its weights, or a file that `muntin export` wrote, in that file's own runtime. What is
    open already is returned as it is.

    Raises UserError where it is missing, damaged, or does not say how images are prepared for it.
    """
    if isinstance(source, Trained | TrainedDense):
        return source
    if not isinstance(source, Run) and Path(source).suffix in TARGETS:
        engine = load(source)
        return of_file(engine) if "task" in engine.metadata else _exported(engine)
    run = source if isinstance(source, Run) else Run.open(source)
    if run.task != "classify":
        return of_run(run)
    whole = run.preprocessing["resize"] is None
    logits = on_device(run.model())
    return Trained(run.weights, run.path, run.classes, run.transform(), logits, whole, run.multi_label)


def open_trained(source: Source) -> Trained:
    """`open_any` for classifiers alone; UserError for a detector or segmenter, and a file that is a backbone's."""
    opened = open_any(source)
    if isinstance(opened, TrainedDense):
        raise UserError(
            f"{opened.path} is of task={opened.task} and no classifier; its predictions are files: muntin predict "
            f"{opened.path} IMAGES --out FOLDER, or muntin.tasks.predict_dense"
        )
    return opened


def refuse_views(path: str | os.PathLike[str], views: Mapping[str, Any]) -> None:
    """Raises `UserError` where a classifier is asked for the views of detection and segmentation."""
    if views:
        raise UserError(f"{path} classifies whole images; {', '.join(views)} are for detection and segmentation")


def on_device(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model on the GPU where there is one, as a function from a batch on the CPU to logits on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(device)).float().cpu()

    return logits


def _exported(engine: Engine) -> Trained:
    path = engine.path
    known = {key: engine.preprocessing[key] for key in PREPROCESSING if key in engine.preprocessing}
    if len(known) < len(PREPROCESSING):
        raise UserError(
            f"{path} does not say how its images are prepared; export it from a run, or with "
            "muntin.export(model, path, preprocessing=...)"
        )
    transform = Evaluate(**known)
    if engine.fixed is not None and (transform.height, transform.width) != engine.fixed[1:]:
        raise UserError(
            f"{path} was exported for images of {engine.fixed[1]}x{engine.fixed[2]} alone and its preprocessing makes "
            f"{transform.height}x{transform.width}; export it again with --fixed {engine.fixed[0]}x{transform.height}"
            f"x{transform.width}, or without --fixed"
        )
    prepare: Callable[[Picture], Tensor] = transform
    if engine.layout == "NHWC":

        def prepare(image: Picture) -> Tensor:
            return torch.from_numpy(transform.pixels(image))  # H W 3, uint8

    whole = known["resize"] is None
    return Trained(path, path.parent, engine.classes, prepare, _logits(engine), whole, engine.multi_label)


def _logits(engine: Engine) -> Callable[[Tensor], Tensor]:
    """The engine for any number of images."""

    def call(images: Tensor) -> Tensor:
        found: Any = engine(images)
        if not isinstance(found, Tensor):
            raise UserError(f"{engine.path} returns {len(found)} maps and no logits: it is a backbone, no classifier")
        return found.float().cpu()

    return lambda images: in_batches(call, images, engine.fixed and engine.fixed[0])
