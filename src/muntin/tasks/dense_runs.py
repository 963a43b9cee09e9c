"""Runs of detection and segmentation at work: `evaluate` and `predict` for what `train` has made."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muntin.data.annotated import Annotated, open_annotated, open_annotated_part
from muntin.errors import UserError
from muntin.run import Run, read_json
from muntin.tasks.asked import stored_settings
from muntin.tasks.dense_evaluation import evaluate_detection, evaluate_segmentation
from muntin.tasks.dense_prediction import DensePredictions, predict_dense


def model_of(run: Run) -> nn.Module:
    """The run's model, on the GPU where there is one."""
    return run.model().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def evaluate_run(
    run: Run,
    data: str | None = None,
    *,
    split: str | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
) -> Any:
    """Evaluate a detector or segmenter: a `DetectionEvaluation` or `SegmentationEvaluation`.

    data: what `muntin train --data` takes, by default the run's own. split: "train", "val" or "test", by default test,
    or val where there is none. scales, flip: views of each image whose results are merged. crop: side of a window that
    slides over the image, in segmentation.

    Raises `UserError` for other classes than the run's, and images that cannot be read.
    """
    if crop is not None:
        _refuse_window(run)
    part, name, source = _part(run, data, split)
    return evaluate_part(run, part, name, source, scales=scales, flip=flip, crop=crop)


def evaluate_part(
    run: Run,
    part: Annotated,
    name: str,
    data: str,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
) -> Any:
    """Evaluate a run's model on annotated images of its classes."""
    options: dict[str, Any] = {"data": data, "split": name, "classes": run.classes, "scales": scales, "flip": flip}
    if run.task == "segment":
        window = None if crop is None else (crop, crop)
        return evaluate_segmentation(model_of(run), part, run.preprocessing, crop=window, **options)
    return evaluate_detection(model_of(run), part, run.preprocessing, **options)


def _part(run: Run, data: str | None, split: str | None) -> tuple[Annotated, str, str]:
    if split not in (None, "train", "val", "test"):
        raise UserError(f"split {split!r} is unknown; valid are train, val and test")
    config, stored = run.path / "config.yaml", run.path / "split.json"
    if data is None and not (config.exists() and stored.exists()):
        raise UserError(f"{run.path} does not say which images it was trained on; give some with --data FOLDER")
    if data is not None:
        part, name = open_annotated_part(data, run.task, split)
        return part, name, data
    settings = stored_settings(run.path)
    splits = open_annotated(settings.data, run.task, settings.seed, settings.on_bad_image)
    splits.refuse_changed(settings.data, read_json(stored))
    parts = splits.parts()
    name = split or ("test" if "test" in parts else "val")
    if name not in parts:
        raise UserError(f"{settings.data} has no {name} part, but {', '.join(parts)}; give one of these as --split")
    return parts[name], name, settings.data


def write_held_out(part: Annotated, folder: Path, most: int = 24) -> None:
    """The first images of a part as PNG files: what `muntin predict` can be tried on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(len(part), most)):
        path = folder / Path(part.name(i)).with_suffix(".png").name
        part.picture(i).save(path)


def predict_run(
    run: Run | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
) -> DensePredictions:
    """Find objects on images, or label their pixels: see `muntin.tasks.dense_prediction.predict_dense`.

    run: one of detection or segmentation, its folder or its weights. crop: side of a window that slides over the image,
    in segmentation.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    views: dict[str, Any] = {"scales": scales, "flip": flip}
    if crop is not None:
        _refuse_window(run)
        views["crop"] = (crop, crop)
    return predict_dense(
        model_of(run),
        run.classes,
        run.preprocessing,
        inputs,
        out,
        threshold=threshold,
        palette=run.palette,
        **views,
    )


def _refuse_window(run: Run) -> None:
    if run.task != "segment":
        raise UserError(f"{run.path} finds objects; a sliding window (--crop) is for segmentation")
