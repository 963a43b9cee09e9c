"""What batch prediction works through: blocks of image files, and tar shards.

A shard is a tar file in WebDataset's form: the members of a sample stand together and share their name up to its
first dot, the sample's key, as in KEY.jpg, KEY.cls, KEY.json.
"""

import contextlib
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from muntin.data.datasets import image_files
from muntin.data.images import SUFFIXES, BadImage, decode_image, open_image
from muntin.data.indexing import refuse_early_end
from muntin.errors import UserError
from muntin.tasks.inference import find_images

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and extension of a shard's member
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class BadShard(UserError):
    """A shard that cannot be read to its end; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One image to classify. `label` is the class that it is said to be of: by name (of a file's folder, or in KEY.cls)
    or by index (in KEY.cls); "" where nothing is said.
    """

    key: str
    label: str | int
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Unit:
    """Images that are predicted and written together, and together done again after a crash: absolute paths of a
    block of files, or the path of one shard. `name` is a digest of what is in it.
    """

    name: str
    paths: tuple[str, ...]
    shard: bool

    def samples(self) -> Iterator[Sample]:
        """Its images, not yet decoded. Raises `BadShard`, possibly after some."""
        return _shard_samples(self.paths[0]) if self.shard else map(_file_sample, self.paths)


def shard_unit(path: str) -> Unit:
    """A shard, named by its path, size and time of writing: one that has changed is another unit."""
    content = [path]
    with contextlib.suppress(OSError):  # to be reported by who reads it
        about = os.stat(path)
        content += [str(about.st_size), str(about.st_mtime_ns)]
    return Unit(_digest(content), (path,), True)


def blocks(files: Sequence[str], count: int) -> list[Unit]:
    """The files in units of so many, named by their paths."""
    groups = [tuple(files[i : i + count]) for i in range(0, len(files), count)]
    return [Unit(_digest(group), group, False) for group in groups]


def _digest(content: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Found:
    """Absolute paths of files and of shards, each once, in the order given; `duplicates` files were given again."""

    files: list[str]
    shards: list[str]
    duplicates: int


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> Found:
    """Image files and tar shards of files, folders, .txt lists and patterns such as train-{000..127}.tar.

    A path that does not exist is kept, to be reported with the unreadable ones. Raises `UserError` where nothing is
    found.
    """
    given = [os.fspath(entry) for entry in inputs]
    paths: list[Path] = []
    for entry in map(Path, itertools.chain.from_iterable(map(_expanded, given))):
        paths += [*image_files(entry), *_shards_below(entry)] if entry.is_dir() else find_images([entry])
    if not paths:
        raise UserError(
            f"no images and no shards found in {', '.join(given) or 'nothing'}; give files, folders, .tar shards or a "
            ".txt list of paths"
        )
    absolute = [os.path.abspath(path) for path in paths]
    odd = next((path for path in absolute if not _is_text(path)), None)
    if odd is not None:
        raise UserError(f"{odd!r} has a name that is no UTF-8 and cannot stand in a table; rename it")
    files = [path for path in absolute if not path.endswith(".tar")]
    unique = list(dict.fromkeys(files))
    shards = dict.fromkeys(path for path in absolute if path.endswith(".tar"))
    return Found(unique, list(shards), len(files) - len(unique))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _expanded(entry: str) -> list[str]:
    """Every path of a pattern with {000..127} in it; the path itself where there is none, or a file is so called."""
    found = RANGE.search(entry)
    if found is None or os.path.exists(entry):
        return [entry]
    first, last = found.groups()
    if int(first) > int(last):
        raise UserError(f"{entry}: the range {found.group()} is empty; give the smaller number first")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    names = (entry[: found.start()] + number + entry[found.end() :] for number in numbers)
    return [path for name in names for path in _expanded(name)]


def _shards_below(folder: Path) -> list[Path]:
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(base, name) for name in files if name.endswith(".tar") and not name.startswith(".")]
    return sorted(found)


def _file_sample(path: str) -> Sample:
    return Sample(path, os.path.basename(os.path.dirname(path)), lambda: open_image(path))


def _shard_samples(path: str) -> Iterator[Sample]:
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in itertools.groupby(_members(tar), key=lambda member: member[0]):
                yield _shard_sample(path, key, tar, [(ending, info) for _, ending, info in members])
            refuse_early_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadShard(f"{path} cannot be read as a tar file ({reason})") from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension in lower case, and where it stands, of every member that belongs to a sample."""
    for info in tar:
        name = info.name.encode(errors="surrogateescape").decode(errors="replace")
        found = MEMBER.fullmatch(name)
        if info.isfile() and found and not found[1].startswith("__"):
            yield found[1], found[2].lower(), info


def _shard_sample(path: str, key: str, tar: tarfile.TarFile, members: list[tuple[str, tarfile.TarInfo]]) -> Sample:
    image: bytes | None = None
    label: str | int = ""
    for ending, info in members:
        if ending == "cls":
            text = _content(tar, info).decode(errors="replace").strip()
            label = int(text) if text.isdecimal() else text
        elif image is None and f".{ending.rpartition('.')[2]}" in SUFFIXES:
            image = _content(tar, info)
    name = f"{key} in {path}"

    def decode() -> Image.Image:
        if image is None:
            raise BadImage(f"{name} has no image, only {', '.join(ending for ending, _ in members)}")
        return decode_image(image, name)

    return Sample(key, label, decode)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return file.read() if file is not None else b""
