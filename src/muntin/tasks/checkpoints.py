"""Checkpoints of a training run: written whole or not at all, and read without running code."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from muntin.errors import UserError
from muntin.run import atomic_write


class AtomicCheckpoints(CheckpointIO):
    """Checkpoints that are whole or not there, and hold nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        def save(partial: Path) -> None:
            with open(partial, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:
                    # Closing its archive fails after a write failed, and hides why.
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        atomic_write(path, save)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours. Raises `UserError` for damaged files and for pickles that hold code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is not one of Muntin's checkpoints, or it holds code, which is not run; "
            "restore the file, or train again into another folder"
        ) from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or cannot be read; put back a copy of it, or delete it to train from the beginning"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is not one of Muntin's checkpoints; train again into another folder")
    return checkpoint


def remove_partial_files(folder: Path) -> None:
    """What a killed process left of files that it was writing."""
    for base, _, files in os.walk(folder):
        for name in files:
            if name.startswith(".") and ".tmp" in name:
                (Path(base) / name).unlink(missing_ok=True)
