"""Trained detectors and segmenters at work: `evaluate` and `predict` for what `train` and `export` have made."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muntin.data.annotated import Annotated, open_annotated, open_annotated_part
from muntin.errors import UserError
from muntin.run import read_json
from muntin.tasks.asked import stored_settings
from muntin.tasks.dense_evaluation import evaluate_detection, evaluate_segmentation
from muntin.tasks.dense_prediction import DensePredictions, predict_dense
from muntin.tasks.trained import Source, open_any
from muntin.tasks.trained_dense import TrainedDense


def evaluate_dense(
    trained: TrainedDense,
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

    Raises `UserError` for other classes than the model's, and images that cannot be read.
    """
    trained.window(crop)  # refused before images are looked for
    part, name, source = _part(trained, data, split)
    return evaluate_part(trained, part, name, source, scales=scales, flip=flip, crop=crop)


def evaluate_part(
    trained: TrainedDense,
    part: Annotated,
    name: str,
    data: str,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
) -> Any:
    """Evaluate a detector or segmenter on annotated images of its classes."""
    options: dict[str, Any] = {"data": data, "split": name, "classes": trained.classes, "scales": scales, "flip": flip}
    if trained.task == "segment":
        window = trained.window(crop)
        return evaluate_segmentation(trained.model, part, trained.preprocessing, crop=window, **options)
    return evaluate_detection(trained.model, part, trained.preprocessing, **options)


def _part(trained: TrainedDense, data: str | None, split: str | None) -> tuple[Annotated, str, str]:
    if split not in (None, "train", "val", "test"):
        raise UserError(f"split {split!r} is unknown; valid are train, val and test")
    folder = trained.folder
    config, stored = folder / "config.yaml", folder / "split.json"
    if data is None and not (config.exists() and stored.exists()):
        raise UserError(f"{folder} does not say which images it was trained on; give some with --data FOLDER")
    if data is not None:
        part, name = open_annotated_part(data, trained.task, split)
        return part, name, data
    settings = stored_settings(folder)
    splits = open_annotated(settings.data, trained.task, settings.seed, settings.on_bad_image)
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


def predict_images(
    source: Source,
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
) -> DensePredictions:
    """Find objects on images, or label their pixels: see `muntin.tasks.dense_prediction.predict_dense`.

    source: a run of detection or segmentation, its folder, its weights, or a file exported of it. crop: side of a
    window that slides over the image, in segmentation.
    """
    trained = open_any(source)
    if not isinstance(trained, TrainedDense):
        raise UserError(f"{trained.path} is a classifier; call muntin.tasks.predict(run, images)")
    window = trained.window(crop)
    views: dict[str, Any] = {"scales": scales, "flip": flip} | ({} if window is None else {"crop": window})
    return predict_dense(
        trained.model,
        trained.classes,
        trained.preprocessing,
        inputs,
        out,
        threshold=threshold,
        palette=trained.palette,
        **views,
    )
