"""Checkpoints of a training run: written whole, read back before they count, and read without running code.

`checkpoints/` holds last.ckpt, the saves before it as step-XXXXXXXX.ckpt, and best.ckpt. Each is an archive of
torch.save, which stores a CRC-32 of every record; torch.load does not look at them, `verify` does.
"""

import contextlib
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from muntin.errors import UserError
from muntin.run import atomic_write

CHUNK = 1 << 22  # bytes read at once


class Damaged(UserError):
    """A checkpoint that is cut short, or whose contents are not what was written."""


class AtomicCheckpoints(CheckpointIO):
    """Checkpoints that are whole or not there, and hold nothing but tensors and plain values.

    A file takes its name only after it has been flushed, read back and found to hold what was written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        def save(partial: Path) -> None:
            with open(partial, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:
                    # Closing its archive fails after a write failed, and hides why.
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
                file.flush()
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # so that the disk is read back, not the memory that was written
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            verify(partial, "what was written to it reads back differently; check the disk")

        atomic_write(path, save)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        Path(path).unlink(missing_ok=True)


def verify(path: Path, remedy: str) -> None:
    """Raises `Damaged` unless every record of the archive has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                with archive.open(record) as file:
                    while file.read(CHUNK):  # raises at the end of a record whose CRC-32 is another
                        pass
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, zlib.error) as error:
        why = str(error) or type(error).__name__
        raise Damaged(f"{path} is damaged ({' '.join(why.split())}): {remedy}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours. Raises `Damaged`, and `UserError` for pickles that hold code and for other files."""
    remedy = "put back a copy of it, or delete it to train from the one before"
    verify(path, remedy)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is not one of Muntin's checkpoints, or it holds code, which is not run; "
            "restore the file, or train again into another folder"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged or cannot be read: {remedy}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is not one of Muntin's checkpoints; train again into another folder")
    return checkpoint


def saves(folder: Path) -> list[Path]:
    """The checkpoints that a run in this folder can go on from, the latest first."""
    last = folder / "checkpoints" / "last.ckpt"
    return [last] * last.exists() + sorted(last.parent.glob("step-*.ckpt"), reverse=True)


def latest(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The latest checkpoint that can be read, and what it holds; None where nothing was saved.

    Damaged ones are reported and put aside as damaged-NAME. Raises `UserError` where none can be read.
    """
    damaged: list[Path] = []
    for path in saves(folder):
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            report(str(error).partition(": ")[0])
            damaged.append(path)
            continue
        for other in damaged:
            other.replace(other.with_name(f"damaged-{other.name}"))
        if damaged:
            report(f"going on from the one before, {path.name}, after step {checkpoint['global_step']}")
        return path, checkpoint
    if damaged:
        raise UserError(
            f"none of the checkpoints in {folder / 'checkpoints'} can be read ({', '.join(p.name for p in damaged)}); "
            "put back copies, or delete them to train from the beginning"
        )
    return None


def set_aside(last: Path, step: int) -> None:
    """Give the save that is about to be replaced, made after `step`, a name of its own besides."""
    earlier = last.with_name(f"step-{step:08}.ckpt")
    if not last.exists() or earlier.exists():
        return
    try:
        os.link(last, earlier)
    except OSError:  # a file system without links
        last.replace(earlier)


def prune(folder: Path, keep: int) -> None:
    """Leave last.ckpt and keep - 1 saves before it."""
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True)[keep - 1 :]:
        with contextlib.suppress(OSError):  # the next save tries again
            path.unlink()


def remove_partial_files(folder: Path) -> None:
    """What a killed process left of files that it was writing."""
    for base, _, files in os.walk(folder):
        for name in files:
            if name.startswith(".") and ".tmp" in name:
                (Path(base) / name).unlink(missing_ok=True)
