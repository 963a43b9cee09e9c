"""`train`: from settings to a finished run."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import muntin
from muntin.data.check import BadFiles
from muntin.data.datasets import Splits, write_held_out
from muntin.data.loading import shared_batch
from muntin.data.sources import open_splits, splits_from_json
from muntin.data.token_labels import DenseLabels
from muntin.data.transforms import CROP, IMAGENET_MEAN, IMAGENET_STD
from muntin.errors import UserError
from muntin.models import published
from muntin.run import TITLES, Run, read_json, save_model, write_json
from muntin.tasks.asked import ask, model_name, refuse_other_processes, stored_settings
from muntin.tasks.base import freeze, frozen
from muntin.tasks.callbacks import duration, epochs_done
from muntin.tasks.checkpoints import remove_partial_files
from muntin.tasks.distillation import open_teacher
from muntin.tasks.expense import long_epochs
from muntin.tasks.fitting import Fitted, augmentation, fit, threads
from muntin.tasks.inference import evaluate_images
from muntin.tasks.multi_label import refuse_single_label_settings
from muntin.tasks.ranks import Ranks
from muntin.tasks.recording import (
    all_images,
    described,
    is_finished,
    load_best,
    load_weights,
    measure_latency,
    record,
    refuse_unwritable,
    starting_weights,
    with_precision,
)
from muntin.tasks.resuming import Start, changed, find_start, refuse_changes, refuse_other_groups
from muntin.tasks.settings import MODEL_PREFIX, Settings, settings_from
from muntin.tasks.trained import on_device


def train(
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    recipe: str | None = None,
    config: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = print,
    **settings: Any,
) -> Run:
    """Train a classifier and evaluate it on the test split; the run is the folder `out`.

    `settings` are fields of `Settings`, or fields of the model's configuration as `{"model.window": (4, 8, 4, 2)}`;
    they win over the YAML file `config`, and that over the `recipe` (by default that of the digits, if those are the
    data).
    With `resume` a run that was stopped in any way continues, to the bit as if it had not been stopped; one that is
    not there is started, and a finished one left as it is. Other settings than it had are refused; with `force` it
    goes on with them from its last checkpoint, where that is possible.

    Raises `UserError` for bad input, before anything is written; `Interrupted` when a signal stopped it.
    """
    ranks = Ranks()
    if not ranks.first:
        report = _nothing
    asked = ask(out, recipe, config, settings)
    folder = asked.folder
    begun = ranks.agree((folder / "config.yaml").exists)
    if resume and ranks.first:
        remove_partial_files(folder)
    if resume and begun:
        return _resume(folder, asked.told, force, report, ranks)
    if resume:
        report(f"no run at {folder} yet: starting one")
    elif ranks.agree(lambda: (folder / "checkpoints").exists() or (folder / "model.safetensors").exists()):
        raise UserError(f"{folder} holds a run already; continue it with --resume, or choose another folder with --out")
    return _train(folder, asked.settings, report, ranks)


def resolved(
    recipe: str | None = None, config: str | os.PathLike[str] | None = None, **settings: Any
) -> dict[str, Any]:
    """Every setting that `train` would use, with the model's configuration, as flat plain values; the precision stays
    "auto" where the machine decides it.
    """
    chosen = ask(None, recipe, config, settings).settings
    if chosen.dense:
        from muntin.tasks.dense_training import resolve_dense

        return resolve_dense(chosen).flat()
    chosen = _with_defaults(chosen)
    model = _build(chosen, num_classes=2, meta=True)
    return replace(chosen, model=model.name, model_config=asdict(model.config)).flat()


def _resume(folder: Path, told: Mapping[str, Any], force: bool, report: Callable[[str], None], ranks: Ranks) -> Run:
    """Go on with a run from its last checkpoint that can be read."""
    stored = stored_settings(folder)
    then = stored.flat()
    if told.get("model", stored.model) != stored.model:  # whose configuration has other fields
        then = {name: value for name, value in then.items() if not name.startswith(MODEL_PREFIX)}
    wanted = settings_from(then, told)
    if wanted.precision == "auto":  # decided when the run began
        wanted = replace(wanted, precision=stored.precision)
    changes = changed(stored, wanted)
    finished = ranks.agree(lambda: is_finished(folder))
    done = ranks.agree(lambda: epochs_done(folder))
    if finished and not (changes and wanted.epochs > done):
        refuse_changes(changes, folder, done, force)
        left = f" ({', '.join(changes)}: only more epochs go on with a finished run)" if changes else ""
        report(f"{folder} is finished; nothing to resume{left}. See it with: muntin report {folder}")
        return Run.open(folder)
    start = ranks.agree(lambda: find_start(folder, report))
    if start is None:
        report(f"{folder} has saved nothing yet: starting it from the beginning")
        return _train(folder, wanted, report, ranks, keep_split=not changes)
    refuse_changes(changes, folder, start.epochs, force)
    return _train(folder, wanted, report, ranks, start, keep_split=True)


def _nothing(_line: str) -> None:
    """What processes but the first report."""


def _train(
    folder: Path,
    settings: Settings,
    report: Callable[[str], None],
    ranks: Ranks,
    start: Start | None = None,
    *,
    keep_split: bool = False,
) -> Run:
    """From a checkpoint, or from the beginning."""
    refuse_other_processes(settings, ranks.count)
    if settings.devices == 0 and ranks.count == 1 and torch.cuda.device_count() > 1:
        report(f"on one of {torch.cuda.device_count()} GPUs; the command muntin train takes all")
    torch.manual_seed(settings.seed)
    if settings.dense:
        from muntin.tasks.dense_training import train_dense

        return train_dense(folder, settings, report, ranks, start, keep_split=keep_split)
    return _train_classifier(folder, settings, report, ranks, start, keep_split=keep_split)


def _train_classifier(
    folder: Path,
    settings: Settings,
    report: Callable[[str], None],
    ranks: Ranks,
    start: Start | None,
    *,
    keep_split: bool,
) -> Run:
    settings = _with_defaults(settings)
    name = model_name(settings)
    # Refuses a wrong configuration before reading any image.
    _refuse_misfits(settings, _build(settings, num_classes=2, meta=True))
    refuse_unwritable(folder)
    splits, preprocessing = _data(folder, settings, keep_split, ranks)
    augmentation(settings, preprocessing)  # which refuses a policy that timm does not know
    shared_batch(len(splits.train), settings.batch_size, settings.accumulate, ranks.count)
    if splits.multi_label:
        refuse_single_label_settings(settings, splits)
    model = _build(settings, num_classes=len(splits.train.classes))
    if settings.weights and not start:  # a checkpoint holds all weights
        load_weights(model, settings, report)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    classes, several = splits.train.classes, splits.multi_label
    teacher = open_teacher(settings.teacher, classes, preprocessing, several) if settings.teacher else None
    labels = DenseLabels(settings.token_labels, splits.train) if settings.token_labels else None
    settings = with_precision(settings, report, ranks)
    if start:
        freeze(model, settings.freeze)
        refuse_other_groups(start, model, settings)
    recorded = replace(settings, model=name, model_config=asdict(model.config))
    settings = all_images(recorded, len(splits.train), report)
    split = splits.json() | {"preprocessing": preprocessing}
    replays = record(folder, settings, recorded, None if keep_split else split, start, report, ranks)
    test = len(splits.test) if splits.test else 0
    report(
        f"{name} with {sum(p.numel() for p in model.parameters()):,} parameters on {settings.data}: "
        f"{len(splits.train)} train, {len(splits.val)} val, {test} test images in {len(splits.train.classes)} classes"
    )
    if costly := long_epochs(model, name, settings, len(splits.train), ranks.count):
        report(costly)
    # The test split goes no further than this: training and selection are handed the other two.
    with threads(settings.threads):
        learned = replace(splits, test=None)
        fitted = fit(
            folder,
            settings,
            model,
            learned,
            preprocessing,
            report,
            ranks,
            start,
            replays,
            teacher=teacher,
            labels=labels,
        )
    if ranks.first:
        _finish(folder, settings, splits, preprocessing, fitted, report)
    ranks.wait()
    return Run.open(folder)


def _with_defaults(settings: Settings) -> Settings:
    """What was left to the data and the model."""
    name = model_name(settings)
    workers = settings.workers if settings.workers is not None else min(os.cpu_count() or 1, 8)
    size = settings.size or published(name).get("size", 224)
    drop_path = settings.drop_path if settings.drop_path is not None else published(name).get("drop_path", 0.1)
    if settings.token_labels:  # which have a mixing of their own
        settings = replace(settings, mixup=0.0, cutmix=0.0)
    return replace(settings, workers=workers, size=size, drop_path=drop_path)


def _build(settings: Settings, num_classes: int, meta: bool = False) -> Any:
    """The model with what it starts from; on "meta" only its shapes."""
    name, config = model_name(settings), dict(settings.model_config)
    if settings.weights:
        config = dict(getattr(starting_weights(settings), "config", {})) | config
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = muntin.create_model(name, num_classes, False, settings.drop_path or 0.0, **config)
    return model


def _refuse_misfits(settings: Settings, model: Any) -> None:
    """Raises UserError where there are fewer stages than are to be frozen, a second head has nothing to learn from, or
    token labels no head or images to suit.
    """
    frozen(model, settings.freeze)
    heads = [name for name, _ in model.head.named_children()]
    if "fc_distilled" in heads and not settings.teacher:
        raise UserError(
            f"{model.name} with a second head (fc_distilled) learns it from a teacher: give one, as in --set "
            "teacher=timm:regnety_160.deit_in1k, or leave out the setting that adds the head"
        )
    if "fc_tokens" in heads and not settings.token_labels:
        raise UserError(
            f"{model.name} with a head for tokens (fc_tokens) learns it from dense labels: give their folder, as in "
            "--set token_labels=FOLDER, or leave out model.token_label"
        )
    if not settings.token_labels:
        return
    if settings.strategy == "fsdp":
        raise UserError("token_labels need whole weights and strategy=fsdp has parts: set strategy=ddp")
    if settings.teacher:
        raise UserError("teacher and token_labels are both set: a model learns from one of them; leave out the other")
    if "fc_tokens" not in heads:
        raise UserError(
            f"{model.name} has no head for tokens, which token_labels={settings.token_labels} are for: take an RMT "
            "and --set model.token_label=true"
        )
    stride = model.backbone.strides[-1]
    if settings.size is None or settings.size % stride:
        raise UserError(f"size={settings.size}: token labels need whole tokens; give a multiple of {stride}")
    if settings.augment != "photographs":
        raise UserError(f"augment={settings.augment}: token labels follow crops and flips; give augment=photographs")


def _data(folder: Path, settings: Settings, keep_split: bool, ranks: Ranks) -> tuple[Splits, dict[str, Any]]:
    """The splits and the preprocessing: made now, by the first process for all, or read back from split.json."""
    if keep_split and (folder / "checkpoints").exists() and not (folder / "split.json").exists():
        raise UserError(
            f"{folder / 'split.json'} is gone: another split would train on test images; put it back, or start another "
            "run with --out"
        )
    if keep_split and (folder / "split.json").exists():
        stored = read_json(folder / "split.json")
        preprocessing = stored["preprocessing"]
        return splits_from_json(settings.data, stored, preprocessing["resize"] is None), preprocessing
    made: list[tuple[Splits, dict[str, Any]]] = []

    def make() -> tuple[dict[str, Any], dict[str, Any]]:
        made.append(_new_data(folder, settings))
        splits, preprocessing = made[0]
        return splits.json(), preprocessing

    stored, preprocessing = ranks.agree(make)
    if made:
        return made[0]
    return splits_from_json(settings.data, stored, preprocessing["resize"] is None), preprocessing


def _new_data(folder: Path, settings: Settings) -> tuple[Splits, dict[str, Any]]:
    """The splits of a new run, and how their images are prepared."""
    assert settings.size is not None
    bad_files = BadFiles(folder / "bad_files.csv")
    splits = open_splits(settings.data, settings.seed, settings.size, settings.on_bad_image, bad_files)
    preprocessing = {
        "size": [settings.size, settings.size],
        "resize": None if splits.plain_resize else round(settings.size / CROP),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bicubic",
        "channels": "RGB",
    }
    return splits, preprocessing


def _finish(
    folder: Path,
    settings: Settings,
    splits: Splits,
    preprocessing: dict[str, Any],
    fitted: Fitted,
    report: Callable[[str], None],
) -> None:
    """The best weights as model.safetensors, their test accuracy, metrics.json."""
    best = fitted.best
    model = _build(replace(settings, weights=""), num_classes=len(splits.train.classes))
    load_best(model, folder, best)
    save_model(
        folder / "model.safetensors",
        model,
        classes=splits.train.classes,
        preprocessing=preprocessing,
        multi_label=splits.multi_label,
    )
    run = Run.open(folder)
    metric, title = run.metric, TITLES[run.metric]
    if settings.data == "digits" and splits.test is not None:
        write_held_out(splits.test, folder / "held_out")
    metrics = described(settings, fitted, model, run) | {
        f"test_{metric}": None,
        f"val_{metric}": best[metric],
    }
    if splits.test is not None:
        found = evaluate_images(on_device(run.model()), splits.test, run.transform(), settings.data, "test")
        write_json(folder / "evaluation.json", found.json())
        metrics[f"test_{metric}"] = found.score
    run.update_metrics(**metrics)
    measure_latency(run)
    shown = f"test {title} {metrics[f'test_{metric}']:.2%}" if splits.test is not None else "no test split"
    report(
        f"{folder}: {shown}, val {title} {best[metric]:.2%} ({best['weights']} weights of epoch "
        f"{best['epoch']}), trained in {duration(fitted.seconds)}"
    )
