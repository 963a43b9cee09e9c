"""Batch prediction with Ray Data: any number of images, on one machine or a cluster, kept in Parquet as they come.

The driver names units of work (a shard, or a block of files) and leaves out what the output folder already holds. Each
worker is a process with a model of its own; Ray Data hands it one unit at a time, starts another in its place when it
dies, and hands that the same unit. What a unit gives is a small table, and the driver alone writes: a unit is there
whole or not at all, an image once. Images are read and decoded by the worker that predicts them, a few batches at a
time, so memory is a matter of workers and batch, not of how many images there are.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from muntin.errors import UserError
from muntin.progress import Bar
from muntin.run import Run
from muntin.runtime.targets import TARGETS
from muntin.tasks.inference import chosen
from muntin.tasks.parts import Predictions
from muntin.tasks.trained import Trained, open_trained
from muntin.tasks.units import Found, Unit, blocks, find_inputs, shard_unit
from muntin.tasks.workers import Pool, connected, results

BLOCK = 1024  # files of a unit, at most
UNITS_PER_WORKER = 4  # at least, where there are few files: so that workers end together


@dataclass(frozen=True)
class BatchReport:
    """What a folder of predictions holds after a call.

    `images` in `parts` files, `new` of them by this call; `unreadable` ones are rows with an error; `duplicates` were
    given more than once and left out. `failed` says for each shard that could not be read, why: its images are
    missing, and the next call tries it again.
    """

    folder: Path
    images: int
    new: int
    unreadable: int
    duplicates: int
    parts: int
    failed: list[str]
    seconds: float

    def not_done(self) -> str:
        """How many shards failed, and why: the first three."""
        more = f"; and {len(self.failed) - 3} more" if len(self.failed) > 3 else ""
        return f"{len(self.failed)} failed: {'; '.join(self.failed[:3])}{more}"

    def __str__(self) -> str:
        told = f"{self.folder}: {self.images:,} images in {self.parts:,} parts"
        if self.new < self.images:
            told += f", {self.images - self.new:,} of them from before"
        if self.unreadable:
            told += f", {self.unreadable:,} unreadable"
        if self.duplicates:
            told += f"; {self.duplicates:,} duplicates left out"
        return told


def predict_batches(
    run: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    top: int | None = None,
    threshold: float | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
) -> BatchReport:
    """Classify images by a run, its weights or an exported file into a folder of Parquet files; see
    `muntin.tasks.parts` for what it holds. A second call does what is left.

    inputs: files, folders, .txt lists, tar shards in WebDataset's form, patterns such as train-{000..127}.tar.
    top, threshold: as in `muntin.tasks.predict`.
    workers: processes with a model each, by default one for each GPU, or for each core. threads: of each, by default
    its share of the cores.
    Ray is the one that this process is connected to, that at RAY_ADDRESS, or one of this machine's own for the call.

    Raises `UserError` for a model that names no classes, inputs without images, and an output folder that holds
    something else, unless `overwrite`. Broken images and shards are told in what is returned.
    """
    for name, value in {"workers": workers, "threads": threads, "batch size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: give a whole number of at least 1")
    started = time.monotonic()
    source, classes, multi_label = _source(run)
    choice = chosen(str(source), classes, multi_label, top, threshold)
    found = find_inputs(inputs)
    with Predictions(
        out, _digest(source), choice.top, overwrite, choice.threshold if multi_label else None
    ) as predictions:
        shards = [shard_unit(path) for path in found.shards]
        predictions.begin({unit.paths[0]: unit.name for unit in shards})
        todo = [unit for unit in shards if unit.name not in predictions.parts]
        files = [file for file in found.files if file not in predictions.keys]
        before = sum(part.images for part in predictions.parts.values())
        failed: list[str] = []
        if todo or files:
            with connected(workers, threads) as pool:
                todo += blocks(files, min(BLOCK, -(-len(files) // (UNITS_PER_WORKER * pool.workers)) or 1))
                settings = {"source": str(source), "choice": choice, "batch_size": batch_size}
                failed = _work(todo, pool, settings, predictions)
        report = _report(predictions, found, before, failed, time.monotonic() - started)
        if not failed:
            _write_manifest(predictions, report, source)
    return report


def _source(run: str | os.PathLike[str]) -> tuple[Path, list[str], bool]:
    """The file that holds the model, by its absolute path, its classes, and whether an image may have several."""
    found: Trained | Run
    if Path(run).suffix in TARGETS:
        path, found = Path(run), open_trained(run)
    else:
        found = Run.open(run)
        path = found.weights
    if not found.classes:
        raise UserError(f"{path} does not name its classes; export it from a run, or with classes=...")
    return path.absolute(), found.classes, found.multi_label


def _digest(model: Path) -> str:
    """SHA-256 of the file and of the weights that an OpenVINO file has beside it."""
    digest = hashlib.sha256()
    folder = sorted(file for file in model.rglob("*") if file.is_file()) if model.is_dir() else []
    for path in folder or [model, *(p for p in [model.with_suffix(".bin")] if model.suffix == ".xml" and p.exists())]:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _work(units: list[Unit], pool: Pool, settings: dict[str, Any], predictions: Predictions) -> list[str]:
    """Predict the units and write their parts as they come; what failed, and why."""
    failed = []
    images = done = 0
    with Bar("predicting", len(units)) as bar:
        try:
            for row in results(units, pool, settings):
                if row["refusal"]:
                    raise UserError(row["refusal"])
                unit = units[row["unit"]]
                if row["failure"]:
                    failed.append(row["failure"])
                else:
                    table = pa.ipc.open_stream(row["table"]).read_all()
                    images += predictions.add(unit.name, unit.paths[0] if unit.shard else "", table).images
                done += 1
                bar.say(f"{images:,} images")
                bar.step()
        except KeyboardInterrupt as stop:
            left = len(units) - done
            raise KeyboardInterrupt(
                f"stopped with {left} of {len(units)} units to do; the same command does them"
            ) from stop
    return sorted(failed)


def _report(predictions: Predictions, found: Found, before: int, failed: list[str], seconds: float) -> BatchReport:
    parts = predictions.parts.values()
    images = sum(part.images for part in parts)
    return BatchReport(
        folder=predictions.folder,
        images=images,
        new=images - before,
        unreadable=sum(part.unreadable for part in parts),
        duplicates=found.duplicates + sum(part.duplicates for part in parts),
        parts=len(parts),
        failed=failed,
        seconds=seconds,
    )


def _write_manifest(predictions: Predictions, report: BatchReport, source: Path) -> None:
    from importlib import metadata

    import muntin

    predictions.finish(
        model={"path": str(source), "sha256": predictions.model},
        top=predictions.top,
        threshold=predictions.threshold,
        images=report.images,
        unreadable=report.unreadable,
        duplicates=report.duplicates,
        parts=report.parts,
        seconds=round(report.seconds, 3),
        versions={"muntin": muntin.__version__}
        | {package: metadata.version(package) for package in ("torch", "ray", "pyarrow")},
    )
