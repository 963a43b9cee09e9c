"""Training of detectors and segmenters: from settings to a finished run, as `training` has it for classifiers."""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import muntin
from muntin.data.annotated import AnnotatedSplits, open_annotated
from muntin.data.annotated_loading import AnnotatedEvaluationSet, AnnotatedTrainingSet, together
from muntin.data.check import BadFiles
from muntin.data.dense import (
    LONGER,
    DetectionAugment,
    SegmentationAugment,
    collate_detection,
    collate_segmentation,
    dense_preprocessing,
    fit,
)
from muntin.data.device import Prepare
from muntin.data.loading import EpochBatches, evaluation_loader, shared_batch, training_loader
from muntin.errors import UserError
from muntin.heads import HEADS
from muntin.models import published
from muntin.run import METRICS, TITLES, Run, read_json, save_model, write_json
from muntin.tasks.asked import model_name
from muntin.tasks.base import freeze, frozen
from muntin.tasks.callbacks import Saver, duration
from muntin.tasks.dense import Dense
from muntin.tasks.dense_prediction import write_samples
from muntin.tasks.dense_runs import evaluate_part, write_held_out
from muntin.tasks.detection import Detection
from muntin.tasks.fitting import Fitted, threads, train_task
from muntin.tasks.ranks import Ranks
from muntin.tasks.recording import (
    all_images,
    described,
    load_best,
    load_weights,
    measure_latency,
    record,
    refuse_unwritable,
    starting_weights,
    with_precision,
)
from muntin.tasks.resuming import Start, refuse_other_groups
from muntin.tasks.segmentation import Segmentation, class_weights
from muntin.tasks.settings import Settings
from muntin.tasks.trained_dense import of_run

SIZES = {"detect": 800, "instance": 800, "segment": 512}  # shorter side, where the settings name none
SCALE = 0.5  # of segmentation's images, at least, where the settings name no smallest side; twice as large at most
CROPPED = 0.5  # of the images, with `crop`
USUAL = {"detect": "retinanet", "instance": "mask_rcnn", "segment": "upernet"}  # heads


def train_dense(
    folder: Path,
    settings: Settings,
    report: Callable[[str], None],
    ranks: Ranks,
    start: Start | None = None,
    *,
    keep_split: bool = False,
) -> Run:
    """From a checkpoint, or from the beginning; evaluated on the test part, or on val where there is none."""
    settings = with_dense_defaults(settings)
    frozen(
        build(settings, num_classes=2, meta=True), settings.freeze
    )  # refuses what does not fit before reading images
    refuse_unwritable(folder)
    splits = open_annotated(settings.data, settings.task, settings.seed, settings.on_bad_image)
    if keep_split and (folder / "split.json").exists():
        splits.refuse_changed(settings.data, read_json(folder / "split.json"))
    shared_batch(len(splits.train), settings.batch_size, settings.accumulate, ranks.count)
    classes = splits.train.classes
    model = build(settings, num_classes=len(classes))
    if ranks.count > 1 and torch.cuda.is_available():  # a GPU has one or two images: too few for statistics
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if settings.weights and not start:  # a checkpoint holds all weights
        load_weights(model, settings, report)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    settings = with_precision(settings, report, ranks)
    if start:
        freeze(model, settings.freeze)
        refuse_other_groups(start, model, settings)
    recorded = _described(settings, model)
    settings = all_images(recorded, len(splits.train), report)
    if settings.steps:
        settings = replace(settings, epochs=math.ceil(settings.steps / (len(splits.train) // settings.batch_size)))
    preprocessing = preprocessing_of(settings)
    split = splits.json() | {"preprocessing": preprocessing}
    replays = record(folder, settings, recorded, None if keep_split else split, start, report, ranks)
    count = sum(p.numel() for p in model.parameters())
    parts = ", ".join(f"{len(part)} {name}" for name, part in splits.parts().items())
    report(
        f"{model.head_name} on {model.name} with {count:,} parameters on {settings.data}: {parts} images, "
        f"{len(classes)} classes"
    )
    with threads(settings.threads):
        fitted = fit_dense(folder, settings, model, splits, preprocessing, report, ranks, start, replays)
    if ranks.first:
        _finish(folder, settings, splits, preprocessing, fitted, report)
    ranks.wait()
    return Run.open(folder)


def resolve_dense(settings: Settings) -> Settings:
    """With everything that was left to the task and the model, and the whole configurations of both."""
    settings = with_dense_defaults(settings)
    return _described(settings, build(settings, num_classes=2, meta=True))


def _described(settings: Settings, model: Any) -> Settings:
    config, head_config = asdict(model.config), asdict(model.head_config)
    return replace(settings, model=model.name, head=model.head_name, model_config=config, head_config=head_config)


def with_dense_defaults(settings: Settings) -> Settings:
    """What was left to the task and the model."""
    name, task = model_name(settings), settings.task
    size = settings.size or SIZES[task]
    workers = settings.workers if settings.workers is not None else min(os.cpu_count() or 1, 8)
    drop_path = settings.drop_path if settings.drop_path is not None else published(name).get("drop_path", 0.1)
    longer = settings.longer or round(size * LONGER[task])
    head = settings.head or USUAL[task]
    if settings.compile:
        raise UserError("compile=True: images of detection and segmentation have many sizes; leave it out")
    return replace(settings, size=size, longer=longer, workers=workers, drop_path=drop_path, head=head)


def build(settings: Settings, num_classes: int, meta: bool = False) -> Any:
    """The model of the settings with random weights; on "meta" only its shapes."""
    task = HEADS.get(settings.head, settings.task)
    if task != settings.task:
        fitting = ", ".join(name for name in HEADS if HEADS[name] == settings.task)
        raise UserError(
            f"head={settings.head} is for task={task}, not {settings.task}; for this one take {fitting}, or give "
            f"--task {task}"
        )
    config = dict(settings.model_config)
    if settings.weights:
        config = dict(getattr(starting_weights(settings), "config", {})) | config
    with torch.device("meta") if meta else contextlib.nullcontext():
        return muntin.create_dense(
            settings.head,
            model_name(settings),
            num_classes,
            drop_path=settings.drop_path or 0.0,
            head_config=dict(settings.head_config),
            **config,
        )


def preprocessing_of(settings: Settings) -> dict[str, Any]:
    """How an image becomes the model's input. `size` is what a measurement takes."""
    assert settings.size is not None
    return dense_preprocessing((settings.size, settings.size), settings.size, settings.longer)


def _augmentation(settings: Settings) -> Any:
    assert settings.size is not None
    if settings.task == "segment":
        least = settings.smallest / settings.size if settings.smallest else SCALE
        return SegmentationAugment(settings.size, (least, 1 / least), settings.flip, settings.photometric)
    smallest = settings.smallest or settings.size
    return DetectionAugment(settings.size, settings.longer, smallest, settings.flip, CROPPED if settings.crop else 0.0)


def fit_dense(
    folder: Path,
    settings: Settings,
    model: nn.Module,
    splits: AnnotatedSplits,
    preprocessing: dict[str, Any],
    report: Callable[[str], None],
    ranks: Ranks,
    start: Start | None = None,
    replays: bool = True,
) -> Fitted:
    """Train to the end, from a checkpoint if one is given."""
    assert settings.size is not None
    segmenting = settings.task == "segment"
    saver = Saver(
        folder,
        settings.patience,
        settings.save_minutes,
        len(splits.val),
        keep=settings.keep,
        replays=replays,
        report=report,
        metric=METRICS[settings.task],
    )
    batches = EpochBatches(
        len(splits.train),
        settings.batch_size,
        settings.seed,
        parts=settings.accumulate,
        share=(ranks.rank, ranks.count),
    )
    if start is not None:
        batches.begin(start.step)
        report(f"resuming after step {start.step} (epoch {batches.epoch + 1}, batch {batches.start})")
    bad_files = BadFiles(folder / "bad_files.csv") if settings.on_bad_image == "skip" else None
    training = AnnotatedTrainingSet(splits.train, _augmentation(settings), settings.seed, bad_files)
    resize = partial(fit, size=settings.size, longer=settings.longer)
    validation = AnnotatedEvaluationSet(splits.val, resize, segmenting, (ranks.rank, ranks.count))
    prepare = Prepare(preprocessing["mean"], preprocessing["std"])
    steps = len(batches) // settings.accumulate
    task: Dense
    if segmenting:
        if settings.class_balance:
            balance = settings.class_balance
            model.class_weights = ranks.agree(lambda: class_weights(splits.train, balance))
        task = Segmentation(model, settings, steps, prepare, len(splits.train.classes))
    else:
        task = Detection(model, settings, steps, prepare, splits.val)
    workers = settings.workers or 0
    return train_task(
        folder,
        settings,
        task,
        training_loader(training, batches, workers, collate_segmentation if segmenting else collate_detection),
        evaluation_loader(validation, max(batches.batch_size // batches.pieces, 1), workers, together),
        saver,
        ranks,
        start,
    )


def _finish(
    folder: Path,
    settings: Settings,
    splits: AnnotatedSplits,
    preprocessing: dict[str, Any],
    fitted: Fitted,
    report: Callable[[str], None],
) -> None:
    """The best weights as model.safetensors, what they reach on the test part, pictures, metrics.json."""
    best, metric = fitted.best, METRICS[settings.task]
    model = build(replace(settings, weights=""), num_classes=len(splits.train.classes))
    load_best(model, folder, best)
    palette = splits.train.palette
    save_model(
        folder / "model.safetensors",
        model,
        classes=splits.train.classes,
        preprocessing=preprocessing | ({"palette": palette} if palette else {}),
    )
    run = Run.open(folder)
    part, name = (splits.test, "test") if splits.test is not None else (splits.val, "val")
    write_held_out(part, folder / "held_out")
    trained = of_run(run)
    write_samples(trained.model, part, preprocessing, folder / "pictures")
    found = evaluate_part(trained, part, name, settings.data)
    write_json(folder / "evaluation.json", found.json())
    metrics = described(settings, fitted, model, run)
    metrics |= {"head": settings.head, "task": settings.task, "split": name, f"val_{metric}": best[metric]}
    run.update_metrics(**metrics, **found.metrics())
    measure_latency(run)
    report(
        f"{folder}: {name} {TITLES[metric]} {found.score:.2%}, val {TITLES[metric]} {best[metric]:.2%} "
        f"({best['weights']} weights of epoch {best['epoch']}), trained in {duration(fitted.seconds)}"
    )
