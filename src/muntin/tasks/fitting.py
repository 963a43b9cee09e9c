"""From a model and splits to trained weights, by Lightning's trainer."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from muntin.data.augment import Augment, Distort, Photographs, Plain
from muntin.data.check import BadFiles
from muntin.data.datasets import Splits
from muntin.data.device import Prepare
from muntin.data.loading import (
    EpochBatches,
    EvaluationSet,
    Loader,
    TrainingSet,
    evaluation_loader,
    training_loader,
)
from muntin.data.token_labels import DenseLabels, TokenLabelledSet
from muntin.data.transforms import Evaluate
from muntin.errors import UserError
from muntin.run import FULL
from muntin.tasks.base import Task
from muntin.tasks.callbacks import Progress, Saver, Stopped
from muntin.tasks.checkpoints import AtomicCheckpoints, read_checkpoint
from muntin.tasks.classification import Classification
from muntin.tasks.distillation import Teacher
from muntin.tasks.memory import out_of_memory, too_little
from muntin.tasks.multi_label import MultiLabelClassification
from muntin.tasks.ranks import Ranks
from muntin.tasks.resuming import Start
from muntin.tasks.settings import Settings


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; what was done is saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Fitted:
    """What came of a training: seconds over all its sessions, what best.ckpt holds (as `Saver.best`), and how many
    steps were skipped.
    """

    seconds: float
    best: dict[str, Any]
    skipped: int


def fit(
    folder: Path,
    settings: Settings,
    model: nn.Module,
    splits: Splits,
    preprocessing: Mapping[str, Any],
    report: Callable[[str], None],
    ranks: Ranks,
    start: Start | None = None,
    replays: bool = True,
    *,
    teacher: Teacher | None = None,
    labels: DenseLabels | None = None,
) -> Fitted:
    """Train to the end, from a checkpoint if one is given; `replays` where that was made with the same settings.

    teacher, labels: what the settings `teacher` and `token_labels` name, opened.
    """
    workers = settings.workers or 0
    kind = MultiLabelClassification if splits.multi_label else Classification
    saver = Saver(
        folder,
        settings.patience,
        settings.save_minutes,
        len(splits.val),
        keep=settings.keep,
        replays=replays,
        report=report,
        metric=kind.metric,
    )
    batches = EpochBatches(
        len(splits.train),
        settings.batch_size,
        settings.seed,
        repeats=settings.repeats,
        parts=settings.accumulate,
        share=(ranks.rank, ranks.count),
        order=splits.train.order,
    )
    if start is not None:
        batches.begin(start.step)
        report(f"resuming after step {start.step} (epoch {batches.epoch + 1}, batch {batches.start})")
    steps_per_epoch = len(batches) // settings.accumulate
    evaluated = max(2 * batches.batch_size // batches.pieces, 1)  # at once: without gradients they take less
    prepare = Prepare(preprocessing["mean"], preprocessing["std"])
    task = kind(model, settings, steps_per_epoch, len(splits.train.classes), prepare, teacher)
    bad_files = BadFiles(folder / "bad_files.csv") if settings.on_bad_image == "skip" else None
    augment = augmentation(settings, preprocessing)
    training = TrainingSet(splits.train, augment, settings.seed, bad_files)
    if labels is not None:
        assert isinstance(augment, Photographs)
        training = TokenLabelledSet(splits.train, augment, settings.seed, bad_files, labels)
    validation = EvaluationSet(splits.val, Evaluate(**preprocessing).bytes, (ranks.rank, ranks.count))
    return train_task(
        folder,
        settings,
        task,
        training_loader(training, batches, workers),
        evaluation_loader(validation, min(evaluated, len(validation)), workers),
        saver,
        ranks,
        start,
    )


def train_task(
    folder: Path,
    settings: Settings,
    task: Task,
    training: Loader,
    validation: Loader,
    saver: Saver,
    ranks: Ranks,
    start: Start | None,
) -> Fitted:
    """Run Lightning's trainer to the end. Raises `Interrupted` when a signal stopped it, and `UserError` where the disk
    or the memory is too small.
    """
    trainer = _trainer(folder, settings, ranks, [saver, Progress(saver, settings.epochs)], start)
    try:
        with quiet_lightning():
            trainer.fit(task, training, validation, ckpt_path=start.path if start else None, weights_only=True)
    except Stopped as stop:
        raise Interrupted(
            f"stopped by {stop}; continue with: muntin train --out {folder} --resume", stop.number
        ) from stop
    except OSError as error:  # of the curves, which are written as they come; all else is written by `atomic_write`
        if error.errno not in FULL:
            raise
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free some space, then: muntin train --out {folder} --resume"
        ) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(too_little(task, settings, str(error), saver.last.exists(), ranks.count)) from error
    return Fitted(saver.elapsed(), read_checkpoint(saver.best_path)["kept"], int(task.skipped))


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


def _trainer(
    folder: Path, settings: Settings, ranks: Ranks, callbacks: list[lightning.Callback], start: Start | None
) -> lightning.Trainer:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # Told, since within a SLURM job Lightning would take its tasks for the processes, and its signals and requeue it.
    environment = TorchElasticEnvironment() if ranks.count > 1 else LightningEnvironment()
    plugins: list[Any] = [AtomicCheckpoints(), environment]
    if settings.precision != "32":
        # By hand: told by name, Lightning would replace float16 by bfloat16 on a CPU.
        plugins.append(MixedPrecision("16-mixed" if settings.precision == "16" else "bf16-mixed", kind))
    with quiet_lightning():
        # Points after the checkpoint are drawn again.
        logger = TensorBoardLogger(folder, "tensorboard", "", purge_step=start.step + 1 if start else None)
        trainer = lightning.Trainer(
            default_root_dir=folder,
            max_epochs=settings.epochs,
            accelerator="gpu" if kind == "cuda" else "cpu",
            devices=ranks.here,
            num_nodes=ranks.machines,
            strategy=_strategy(settings, ranks),
            accumulate_grad_batches=settings.accumulate,
            deterministic=settings.deterministic or None,
            logger=logger,
            callbacks=callbacks,
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )
    # Before every batch it would ask the first process for a signal, and wait for the device: the `Saver` asks all.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    return trainer


def _nothing() -> None: ...


def _strategy(settings: Settings, ranks: Ranks) -> Any:
    if ranks.count == 1:
        return "auto"
    if settings.strategy == "fsdp":
        return ModelParallelStrategy(ranks.count, 1, save_distributed_checkpoint=False)
    # Buffers are shared when that is due: statistics of BatchNorm before validation, see Task.share_statistics.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


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
    is told where to start; and without DDP's on the layout of gradients.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        remarks = ["does not have many workers", "dataloader is not resumable", "LeafSpec", "in eval mode at the start"]
        remarks += ["broadcast_buffers", "Grad strides do not match"]  # of channels-last convolutions: one copy
        for message in (f".*{remark}.*" for remark in remarks):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            logger.setLevel(level)
