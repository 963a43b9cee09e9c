"""From a model and splits to trained weights, by Lightning's trainer."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from muntin.data.augment import Augment, Distort, Photographs, Plain
from muntin.data.check import BadFiles
from muntin.data.datasets import Splits
from muntin.data.device import Prepare
from muntin.data.loading import EpochBatches, EvaluationSet, TrainingSet, evaluation_loader, training_loader
from muntin.data.token_labels import DenseLabels, TokenLabelledSet
from muntin.data.transforms import Evaluate
from muntin.errors import UserError
from muntin.tasks.callbacks import Progress, Saver, Stopped
from muntin.tasks.checkpoints import AtomicCheckpoints, read_checkpoint
from muntin.tasks.classification import Classification
from muntin.tasks.distillation import Teacher
from muntin.tasks.settings import Settings


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; what was done is saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def fit(
    folder: Path,
    settings: Settings,
    model: nn.Module,
    splits: Splits,
    preprocessing: Mapping[str, Any],
    report: Callable[[str], None],
    *,
    teacher: Teacher | None = None,
    labels: DenseLabels | None = None,
) -> tuple[float, dict[str, Any]]:
    """Train to the end, from the last checkpoint if there is one; seconds, and the best epoch's description.

    teacher, labels: what the settings `teacher` and `token_labels` name, opened.
    """
    workers = settings.workers or 0
    saver = Saver(folder, settings.patience, settings.save_minutes, len(splits.val))
    batches = EpochBatches(
        len(splits.train),
        settings.batch_size,
        settings.seed,
        repeats=settings.repeats,
        parts=settings.accumulate,
        order=splits.train.order,
    )
    checkpoint = saver.last if saver.last.exists() else None
    if checkpoint is not None:
        step = read_checkpoint(checkpoint)["global_step"]
        batches.begin(step)
        report(f"resuming after step {step} (epoch {batches.epoch + 1}, batch {batches.start})")
    steps_per_epoch = len(batches) // settings.accumulate
    prepare = Prepare(preprocessing["mean"], preprocessing["std"])
    task = Classification(model, settings, steps_per_epoch, len(splits.train.classes), prepare, teacher)
    bad_files = BadFiles(folder / "bad_files.csv") if settings.on_bad_image == "skip" else None
    augment = augmentation(settings, preprocessing)
    training = TrainingSet(splits.train, augment, settings.seed, bad_files)
    if labels is not None:
        assert isinstance(augment, Photographs)
        training = TokenLabelledSet(splits.train, augment, settings.seed, bad_files, labels)
    validation = EvaluationSet(splits.val, Evaluate(**preprocessing).bytes)
    trainer = _trainer(folder, settings, [saver, Progress(saver, settings.epochs)])
    try:
        with quiet_lightning():
            trainer.fit(
                task,
                training_loader(training, batches, workers),
                evaluation_loader(validation, min(2 * settings.batch_size, len(splits.val)), workers),
                ckpt_path=checkpoint,
                weights_only=True,
            )
    except Stopped as stop:
        raise Interrupted(
            f"stopped by {stop}; continue with: muntin train --out {folder} --resume", stop.number
        ) from stop
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device has too little memory for batch_size={settings.batch_size} at size={settings.size}; "
            f"lower it, as in --set batch_size={max(settings.batch_size // 2, 1)}"
        ) from error
    return saver.elapsed(), saver.best


def augmentation(settings: Settings, preprocessing: Mapping[str, Any]) -> Augment:
    """The training transform that the settings name."""
    evaluate = Evaluate(**preprocessing)
    if settings.augment == "distort":
        return Distort(evaluate.picture, settings.distortion)
    if settings.augment == "photographs":
        height, width = preprocessing["size"]
        mean = tuple(preprocessing["mean"])
        return Photographs((height, width), mean, settings.randaugment, settings.color_jitter)
    return Plain(evaluate.bytes)


def _trainer(folder: Path, settings: Settings, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    plugins: list[Any] = [AtomicCheckpoints()]
    if settings.precision != "32":
        # By hand: told by name, Lightning would replace float16 by bfloat16 on a CPU.
        plugins.append(MixedPrecision("16-mixed" if settings.precision == "16" else "bf16-mixed", kind))
    with quiet_lightning():
        return lightning.Trainer(
            max_epochs=settings.epochs,
            devices=1,
            accumulate_grad_batches=settings.accumulate,
            deterministic=settings.deterministic or None,
            logger=TensorBoardLogger(folder, name="tensorboard", version=""),
            callbacks=callbacks,
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks on the hardware, on its own use of torch, and on loaders that cannot resume: ours
    is told where to start.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        remarks = ("does not have many workers", "dataloader is not resumable", "LeafSpec", "in eval mode at the start")
        for message in (f".*{remark}.*" for remark in remarks):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            logger.setLevel(level)
