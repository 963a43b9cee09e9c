"""Image classification: the task, and `train`, from settings to a finished run."""

import contextlib
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.transforms import v2

import muntin
from muntin.data.augment import Augment, Distort, Photographs, Plain
from muntin.data.check import BadFiles
from muntin.data.datasets import Splits, write_held_out
from muntin.data.device import Erase, Prepare
from muntin.data.loading import (
    EpochBatches,
    EvaluationSet,
    TrainingSet,
    evaluation_loader,
    training_loader,
)
from muntin.data.sources import absolute, open_splits, splits_from_json
from muntin.data.transforms import CROP, IMAGENET_MEAN, IMAGENET_STD, Evaluate
from muntin.errors import UserError
from muntin.models import published
from muntin.run import Run, atomic_write, read_json, save_model, write_json
from muntin.tasks.base import Task
from muntin.tasks.callbacks import (
    AtomicCheckpoints,
    Progress,
    Saver,
    Stopped,
    duration,
    read_checkpoint,
    remove_partial_files,
)
from muntin.tasks.inference import evaluate_images
from muntin.tasks.settings import Settings, read_config, settings_from, write_config
from muntin.tasks.trained import on_device
from muntin.weights.download import resolve

FREE_TO_CHANGE = {"workers", "save_minutes"}  # on --resume: they do not touch the result


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; what was done is saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Classification(Task):
    """Cross-entropy with label smoothing on batches mixed by mixup or cutmix; accuracy of raw and averaged weights.

    `results` holds the last validation: {"raw" | "ema": {"accuracy", "loss"}}.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        steps_per_epoch: int,
        num_classes: int,
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__(model, settings, steps_per_epoch)
        self.prepare = prepare or Prepare(IMAGENET_MEAN, IMAGENET_STD)
        self.erase = Erase(settings.erasing if settings.augment == "photographs" else 0.0)
        self.mixes: list[nn.Module] = []
        if settings.mixup:
            self.mixes.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
        if settings.cutmix:
            self.mixes.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
        self.meters = nn.ModuleDict(
            {f"{name}_{what}": MeanMetric() for name in self.candidates() for what in ("accuracy", "loss")}
        )
        self.results: dict[str, dict[str, float]] = {}

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        images = self.erase(self.prepare(images))
        if self.mixes:
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            images, targets = mix(images, targets)
        logits = self.model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.settings.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        images = self.prepare(images)
        for name, model in self.candidates().items():
            logits = model(images).float()
            found = {
                "accuracy": (logits.argmax(1) == labels).float(),
                "loss": F.cross_entropy(logits, labels, reduction="none"),
            }
            for what, values in found.items():
                meter = self.meters[f"{name}_{what}"]
                assert isinstance(meter, MeanMetric)
                meter.update(values)

    def on_validation_epoch_end(self) -> None:
        found = {}
        for key, meter in self.meters.items():
            assert isinstance(meter, MeanMetric)
            found[key] = float(meter.compute())
            meter.reset()
        self.results = {
            name: {"accuracy": found[f"{name}_accuracy"], "loss": found[f"{name}_loss"]} for name in self.candidates()
        }


def train(
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    config: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = print,
    **settings: Any,
) -> Run:
    """Train a classifier and evaluate it on the test split; the run is the folder `out`.

    `settings` are fields of `Settings`, or fields of the model's configuration as `{"model.window": (4, 8, 4, 2)}`;
    they win over the YAML file or recipe `config`, and that over the recipe of the digits, if those are the data.
    With `resume` a run that was stopped in any way continues, to the bit as if it had not been stopped; one that is
    not there is started, and a finished one left as it is.

    Raises `UserError` for bad input, before anything is written; `Interrupted` when a signal stopped it.
    """
    given = _absolute({name: value for name, value in settings.items() if value is not None})
    from_file = _absolute(read_config(os.fspath(config)) if config is not None else {})
    data = given.get("data", from_file.get("data", Settings.data))
    chosen = settings_from(read_config("digits") if data == "digits" else {}, from_file, given)
    folder = Path(out) if out is not None else Path("runs") / _run_name(chosen)
    begun = (folder / "config.yaml").exists()
    if resume and begun:
        chosen = _resumed(folder, from_file | given)
        if "test_accuracy" in _metrics(folder):
            report(f"{folder} is finished; nothing to resume. See it with: muntin report {folder}")
            return Run.open(folder)
        remove_partial_files(folder)
    elif resume:
        report(f"no run at {folder} yet: starting one")
    elif (folder / "checkpoints").exists() or (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds a run already; continue it with --resume, or choose another folder with --out")
    return _train(folder, chosen, resume and begun, report)


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the paths in them absolute, so that a run can be resumed and evaluated from any folder."""
    values = dict(values)
    if "data" in values:
        values["data"] = absolute(str(values["data"]))
    weights = str(values.get("weights") or "")
    if os.path.exists(weights):  # otherwise a tag, or an address
        values["weights"] = os.path.abspath(weights)
    return values


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else {}


def _run_name(settings: Settings) -> str:
    return f"{Path(settings.data).name}-{_model_name(settings)}"


def _model_name(settings: Settings) -> str:
    return settings.model or "swin_t"


def _resumed(folder: Path, given: Mapping[str, Any]) -> Settings:
    """The run's own settings. Raises `UserError` when told otherwise than then."""
    path = folder / "config.yaml"
    stored = settings_from(read_config(path))
    if given:
        wanted = settings_from(stored.flat(), given)
        for name, value in wanted.flat().items():
            if name not in FREE_TO_CHANGE and value != stored.flat().get(name):
                raise UserError(
                    f"{name}={value} differs from {name}={stored.flat().get(name)} in {path}; leave it out to resume, "
                    f"or start another run from these weights with: --set weights={folder / 'model.safetensors'}"
                )
        stored = wanted
    return stored


def _train(folder: Path, settings: Settings, resume: bool, report: Callable[[str], None]) -> Run:
    settings = _with_defaults(settings)
    torch.manual_seed(settings.seed)
    name = _model_name(settings)
    _build(settings, num_classes=2, meta=True)  # refuses a wrong configuration before reading any image
    _writable(folder)
    splits, preprocessing = _data(folder, settings, resume)
    begun = (folder / "checkpoints" / "last.ckpt").exists()
    start = replace(settings, weights="") if begun else settings  # a checkpoint holds all weights
    model = _build(start, num_classes=len(splits.train.classes))
    if settings.precision == "auto":
        precision, why = choose_precision()
        settings = replace(settings, precision=precision)
        report(f"precision {precision}: {why}")
    if not resume:
        settings = replace(settings, model=name, model_config=asdict(model.config))
        write_json(folder / "split.json", splits.json() | {"preprocessing": preprocessing})
        atomic_write(folder / "config.yaml", write_config(settings))  # last: it makes the folder a run
    test = len(splits.test) if splits.test else 0
    report(
        f"{name} with {sum(p.numel() for p in model.parameters()):,} parameters on {settings.data}: "
        f"{len(splits.train)} train, {len(splits.val)} val, {test} test images in {len(splits.train.classes)} classes"
    )
    # The test split goes no further than this: training and selection are handed the other two.
    with _threads(settings.threads):
        seconds, best = _fit(folder, settings, model, replace(splits, test=None), preprocessing, report)
    return _finish(folder, settings, splits, preprocessing, seconds, best, report)


def _writable(folder: Path) -> None:
    """Refuse at once what would otherwise fail after all images have been read."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a file" if existing.is_file() else "cannot be written"
        raise UserError(f"cannot write {folder}: {existing} {what}; choose a folder that you may write to (--out)")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_defaults(settings: Settings) -> Settings:
    """What was left to the data and the model."""
    name = _model_name(settings)
    workers = settings.workers if settings.workers is not None else min(os.cpu_count() or 1, 8)
    size = settings.size or published(name).get("size", 224)
    drop_path = settings.drop_path if settings.drop_path is not None else published(name).get("drop_path", 0.1)
    return replace(settings, workers=workers, size=size, drop_path=drop_path)


def _build(settings: Settings, num_classes: int, meta: bool = False) -> Any:
    """The model with what it starts from; on "meta" only its shapes."""
    name, config = _model_name(settings), dict(settings.model_config)
    weights: bool | str = {"": False, "pretrained": True}.get(settings.weights, settings.weights)
    if meta and weights:
        config = dict(getattr(resolve(name, weights), "config", {})) | config
        weights = False
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = muntin.create_model(name, num_classes, weights, settings.drop_path or 0.0, **config)
    if second := [name for name, _ in model.head.named_children() if name.startswith("fc_")]:
        raise UserError(
            f"{name} with a second head ({', '.join(second)}) learns from a teacher's labels, and "
            "these are images with a class each: leave out the setting that adds the head, or train in your own loop"
        )
    return model


def _data(folder: Path, settings: Settings, resume: bool) -> tuple[Splits, dict[str, Any]]:
    """The splits and the preprocessing: made now, or read back from split.json."""
    assert settings.size is not None
    if resume and (folder / "checkpoints").exists() and not (folder / "split.json").exists():
        raise UserError(
            f"{folder / 'split.json'} is gone: another split would train on test images; put it back, or start another "
            "run with --out"
        )
    if resume and (folder / "split.json").exists():
        stored = read_json(folder / "split.json")
        preprocessing = stored["preprocessing"]
        return splits_from_json(settings.data, stored, preprocessing["resize"] is None), preprocessing
    splits = open_splits(
        settings.data, settings.seed, settings.size, settings.on_bad_image, BadFiles(folder / "bad_files.csv")
    )
    preprocessing = {
        "size": [settings.size, settings.size],
        "resize": None if splits.plain_resize else round(settings.size / CROP),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bicubic",
        "channels": "RGB",
    }
    return splits, preprocessing


def choose_precision() -> tuple[str, str]:
    """`precision=auto`: what is used, and why.

    Decided by rule, not by timing, so that runs can be repeated: bfloat16 where the hardware multiplies it natively.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies bfloat16 natively"
        return "32", "this GPU has no native bfloat16"
    if torch.backends.mps.is_available():
        return "32", "bfloat16 is untested on this device"
    if not _cpu_multiplies_bf16():
        return "32", f"this {platform.machine()} CPU is not known to multiply bfloat16 natively"
    return "bf16", "this CPU multiplies bfloat16 natively"


def _cpu_multiplies_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.10


def augmentation(settings: Settings, preprocessing: Mapping[str, Any]) -> Augment:
    """The training transform that the settings name."""
    evaluate = Evaluate(**preprocessing)
    if settings.augment == "distort":
        return Distort(evaluate.picture, settings.distortion)
    if settings.augment == "photographs":
        height, width = preprocessing["size"]
        return Photographs((height, width), tuple(preprocessing["mean"]), settings.randaugment)
    return Plain(evaluate.bytes)


def _fit(
    folder: Path,
    settings: Settings,
    model: nn.Module,
    splits: Splits,
    preprocessing: Mapping[str, Any],
    report: Callable[[str], None],
) -> tuple[float, dict[str, Any]]:
    """Train to the end, from the last checkpoint if there is one; seconds, and the best epoch's description."""
    workers = settings.workers or 0
    saver = Saver(folder, settings.patience, settings.save_minutes, len(splits.val))
    batches = EpochBatches(len(splits.train), settings.batch_size, settings.seed, order=splits.train.order)
    checkpoint = saver.last if saver.last.exists() else None
    if checkpoint is not None:
        step = read_checkpoint(checkpoint)["global_step"]
        batches.epoch, batches.start = divmod(step, len(batches))
        report(f"resuming after step {step} (epoch {batches.epoch + 1}, batch {batches.start})")
    prepare = Prepare(preprocessing["mean"], preprocessing["std"])
    task = Classification(model, settings, len(batches), len(splits.train.classes), prepare)
    bad_files = BadFiles(folder / "bad_files.csv") if settings.on_bad_image == "skip" else None
    training = TrainingSet(splits.train, augmentation(settings, preprocessing), settings.seed, bad_files)
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


def _trainer(folder: Path, settings: Settings, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    with quiet_lightning():
        return lightning.Trainer(
            max_epochs=settings.epochs,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            devices=1,
            logger=TensorBoardLogger(folder, name="tensorboard", version=""),
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )


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


def _finish(
    folder: Path,
    settings: Settings,
    splits: Splits,
    preprocessing: dict[str, Any],
    seconds: float,
    best: dict[str, Any],
    report: Callable[[str], None],
) -> Run:
    """The best weights as model.safetensors, their test accuracy, metrics.json."""
    model = _build(replace(settings, weights=""), num_classes=len(splits.train.classes))
    state = read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    prefix = {"raw": "model.", "ema": "average."}[best["weights"]]
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    save_model(folder / "model.safetensors", model, classes=splits.train.classes, preprocessing=preprocessing)
    run = Run.open(folder)
    if settings.data == "digits" and splits.test is not None:
        write_held_out(splits.test, folder / "held_out")
    from muntin.measure.machine import machine, versions

    metrics = {
        "model": run.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": None,
        "val_accuracy": best["accuracy"],
        "best_epoch": best["epoch"],
        "weights": best["weights"],
        "epochs": settings.epochs,
        "seconds": round(seconds, 2),
        "precision": settings.precision,
        "seed": settings.seed,
        "data": settings.data,
        "versions": versions(),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "latency_ms": None,
    }
    if splits.test is not None:
        found = evaluate_images(on_device(run.model()), splits.test, run.transform(), settings.data, "test")
        write_json(folder / "evaluation.json", found.json())
        metrics["test_accuracy"] = found.top1
    run.update_metrics(**metrics)
    measure_latency(run)
    shown = f"test accuracy {metrics['test_accuracy']:.2%}" if splits.test is not None else "no test split"
    report(
        f"{folder}: {shown}, val accuracy {best['accuracy']:.2%} ({best['weights']} weights of epoch "
        f"{best['epoch']}), trained in {duration(seconds)}"
    )
    return run


def measure_latency(run: Run) -> None:
    """A first `latency_ms` for metrics.json; `muntin bench RUN` measures at length."""
    from muntin.measure import bench

    bench([str(run.path)], batch_sizes=(1,), rounds=2, seconds=0.5, progress=False)
    run.metrics = Run.open(run.path).metrics
