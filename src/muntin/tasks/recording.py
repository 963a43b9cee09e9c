"""What every training does before its first step and after its last, whatever it learns: refuse, record, describe."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import muntin
from muntin.errors import UserError
from muntin.run import Run, atomic_write, read_json, write_json
from muntin.tasks.asked import model_name
from muntin.tasks.checkpoints import read_checkpoint
from muntin.tasks.fitting import Fitted
from muntin.tasks.precision import choose_precision
from muntin.tasks.ranks import Ranks
from muntin.tasks.recipes import to_yaml
from muntin.tasks.resuming import Start
from muntin.tasks.settings import Settings
from muntin.weights.download import Checkpoint, local_file, resolve
from muntin.weights.load import preview

RESULTS = ("test_accuracy", "test_map", "box_ap", "miou")  # one of them in metrics.json says that a run is finished


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else {}


def is_finished(folder: Path) -> bool:
    """Whether a run has its results."""
    return any(name in _metrics(folder) for name in RESULTS)


def _unfinish(folder: Path) -> None:
    """A run that goes on after its end has no result until it is there again."""
    metrics = _metrics(folder)
    unfinished = {name: value for name, value in metrics.items() if name not in RESULTS}
    if unfinished != metrics:
        write_json(folder / "metrics.json", unfinished)


def refuse_unwritable(folder: Path) -> None:
    """Refuse at once what would otherwise fail after all images have been read."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a file" if existing.is_file() else "cannot be written"
        raise UserError(f"cannot write {folder}: {existing} {what}; choose a folder that you may write to (--out)")


def starting_weights(settings: Settings) -> Checkpoint | str:
    """The published checkpoint, or the path, that the settings start from."""
    return resolve(model_name(settings), settings.weights == "pretrained" or settings.weights)


def load_weights(model: nn.Module, settings: Settings, report: Callable[[str], None]) -> None:
    """What the settings start from, and what of it was made to fit."""
    found = starting_weights(settings)
    loaded = muntin.load_checkpoint(model, local_file(found) if isinstance(found, str) else found.fetch())
    said = [f"{len(loaded.loaded)} weights from {settings.weights}"]
    if loaded.resized:
        said.append(f"{len(loaded.resized)} bias tables resized from other windows ({preview(loaded.resized)})")
    if loaded.replaced:
        said.append(f"new: {preview(loaded.replaced)}")
    report("; ".join(said))


def with_precision(settings: Settings, report: Callable[[str], None], ranks: Ranks) -> Settings:
    """With the precision that suits the first process's machine, where it was left to that."""
    if settings.precision != "auto":
        return settings
    precision, why = ranks.agree(choose_precision)
    report(f"precision {precision}: {why}")
    return replace(settings, precision=precision)


def all_images(settings: Settings, images: int, report: Callable[[str], None]) -> Settings:
    """With steps that take no more images than there are."""
    if settings.batch_size <= images:
        return settings
    report(f"a step takes all {images} training images: batch_size is larger")
    return replace(settings, batch_size=images)


def record(
    folder: Path,
    settings: Settings,
    recorded: Settings,
    split: dict[str, Any] | None,
    start: Start | None,
    report: Callable[[str], None],
    ranks: Ranks,
) -> bool:
    """Write split.json, unless None, and config.yaml; whether steps after the checkpoint come again to the bit, because
    it was made with the same settings.

    recorded: what config.yaml is to hold, of which `settings` may be a version that fits the data.
    """
    changes = start.changes(settings) if start else {}
    for key, (before, now) in changes.items():
        report(f"{key}: {before} until step {start.step if start else 0}, {now} from there on")
    if ranks.first:
        if start:
            _unfinish(folder)
        if split is not None:
            write_json(folder / "split.json", split)
        if changes or not start:
            atomic_write(folder / "config.yaml", to_yaml(recorded.flat()).encode())  # last: it makes the folder a run
    ranks.wait()
    return not changes


def load_best(model: nn.Module, folder: Path, best: dict[str, Any]) -> None:
    """The weights of the best epoch, raw or averaged: whichever were better."""
    state = read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    prefix = {"raw": "model.", "ema": "average."}[best["weights"]]
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def described(settings: Settings, fitted: Fitted, model: nn.Module, run: Run) -> dict[str, Any]:
    """What metrics.json says of every training, beside its results."""
    from muntin.measure.machine import machine, versions

    return {
        "model": run.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "best_epoch": fitted.best["epoch"],
        "weights": fitted.best["weights"],
        "epochs": settings.epochs,
        "seconds": round(fitted.seconds, 2),
        "skipped_steps": fitted.skipped,
        "precision": settings.precision,
        "seed": settings.seed,
        "data": settings.data,
        "versions": versions(),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "latency_ms": None,
    }


def measure_latency(run: Run) -> None:
    """A first `latency_ms` for metrics.json; `muntin bench RUN` measures at length."""
    from muntin.measure import bench

    bench([str(run.path)], batch_sizes=(1,), rounds=2, seconds=0.5, progress=False)
    run.metrics = Run.open(run.path).metrics
