"""Files and folders that appear under their final name whole, or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from muntin.errors import UserError


def check_writable(path: Path, folder: bool, beside: Sequence[str] = ()) -> None:
    """Refuse at once what would otherwise fail after the work. `folder`: whether `path` is to be one; `beside`: names
    of files that are written with it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from error
    for made, is_folder in [(path, folder), *((path.with_name(name), False) for name in beside)]:
        if made.is_dir() != is_folder and made.exists():
            what = "a file" if is_folder else "a folder"
            raise UserError(f"cannot write {made}: {what} has this name; choose another name or remove it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: {path.parent} is read-only; choose a folder that you may write to")


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A path of the same name in an empty temporary folder beside `path`.

    Where the body ends well, all that stands in that folder moves beside `path`, and `path` itself last; an earlier
    one is replaced. Where it raises, nothing has changed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent) as folder:
            yield Path(folder) / path.name
            made = sorted(Path(folder).iterdir(), key=lambda entry: entry.name == path.name)
            for entry in made:
                _flush(entry)
            for entry in made:
                _replace(entry, path.parent / entry.name, Path(folder))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "choose a folder that you may write to (--out)"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _replace(made: Path, final: Path, folder: Path) -> None:
    if made.is_dir() and final.is_dir():  # no rename replaces it: the earlier one goes with the temporary folder
        os.replace(final, folder / "earlier")
        os.replace(made, final)
        shutil.rmtree(folder / "earlier")
    else:
        os.replace(made, final)


def _flush(entry: Path) -> None:
    for file in [entry, *entry.rglob("*")]:
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
