"""Where each sample of a tar shard lies: made by reading a shard once, and kept as index.json.

A shard that has changed since is read again.
"""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from muntin.data.images import SUFFIXES
from muntin.errors import UserError
from muntin.progress import progress
from muntin.run import atomic_write

INDEX = "index.json"
VERSION = 1
LABELS = ("label", "cls", "class", "labels")  # of a sample's .json

Raw = int | str | list[int | str]  # a label as a shard has it


@dataclass(frozen=True)
class Shard:
    """What a shard holds: samples by key, where their images lie, and their labels as the shard has them."""

    file: str  # relative to the folder, or the last part of an address
    bytes: int
    keys: list[str]
    suffixes: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[Raw]
    modified: int | None = None  # st_mtime_ns, where an index of local files says it


def index_shard(path: Path, file: str, name: str = "") -> Shard:
    """Read a tar's headers and labels. Raises `UserError` naming the shard (its path, or `name`) and the sample at
    fault."""
    name = name or str(path)
    samples = _Samples(name, file)
    size = _status(path).st_size
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                samples.add(tar, member)
                last = member.name
            refuse_early_end(tar)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{name} is no readable shard ({error}, after {last}); copy it again, or make it an uncompressed tar"
        ) from error
    return samples.shard(size)


def refuse_early_end(tar: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless zeros alone follow the last member that was read, two blocks of them at least.

    tarfile takes a damaged header, one of zeros, and a file cut off between two members for the end.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    zeros = 0
    while chunk := tar.fileobj.read(1 << 20):
        zeros += len(chunk)
        if chunk.count(0) < len(chunk):
            break
    else:
        if zeros >= 2 * tarfile.BLOCKSIZE:
            return
    raise tarfile.ReadError(f"damaged or cut short at byte {tar.offset:,}")


class _Samples:
    """The samples of a shard, made of its members one by one."""

    def __init__(self, name: str, file: str) -> None:
        self.name = name
        self.file = file
        self.seen: dict[str, None] = {}
        self.images: dict[str, tarfile.TarInfo] = {}
        self.labels: dict[str, Raw] = {}
        self.names: set[str] = set()  # of the members that hold labels

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        key, suffix = _key_and_suffix(member.name)
        self.seen[key] = None
        if f".{suffix}".lower() in SUFFIXES:
            other = self.images.setdefault(key, member)
            if other is not member:
                raise self._twice(key, "images", other.name, member.name)
        elif suffix in ("cls", "json"):
            if member.name in self.names:
                raise self._twice(key, "labels", member.name, member.name)
            self.names.add(member.name)
            if suffix == "json" and key in self.labels:
                return
            content = tar.extractfile(member)
            assert content is not None
            label = _label(f"{self.file}/{member.name}", suffix, content.read())
            if label is not None:
                self.labels[key] = label

    def _twice(self, key: str, what: str, one: str, other: str) -> UserError:
        return UserError(
            f"{self.name}: the sample {key!r} has two {what}, {one} and {other}; give each sample a name of its own"
        )

    def shard(self, size: int) -> Shard:
        """All of them, each with an image and a label."""
        for key in self.seen:
            if key not in self.images:
                what = "no image"
            elif key not in self.labels:
                what = f"no label (.cls, or .json with one of {', '.join(LABELS)})"
            else:
                continue
            raise UserError(f"{self.name}: the sample {key!r} has {what}; add it, or make the shards again")
        if not self.seen:
            raise UserError(f"{self.name} has no samples; remove it")
        members = [self.images[key] for key in self.seen]
        return Shard(
            self.file,
            size,
            list(self.seen),
            [f".{_key_and_suffix(member.name)[1]}" for member in members],
            [member.offset_data for member in members],
            [member.size for member in members],
            [self.labels[key] for key in self.seen],
        )


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's name, divided at its first dot."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"there is no shard at {path} ({error.strerror}); check the path") from error


def _label(name: str, suffix: str, content: bytes) -> Raw | None:
    """The label in a .cls or .json; None where a .json has none."""
    try:
        text = content.decode()
        if suffix == "cls":
            return int(text) if re.fullmatch(r"\s*\d+\s*", text) else text.strip()
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise UserError(f"{name} is no label ({error}); write a number or a name, or JSON with a label") from error
    label = next((found[key] for key in LABELS if key in found), None)
    if any(type(one) not in (int, str) for one in (label if isinstance(label, list) else [label]) if label is not None):
        raise UserError(f"{name} has the label {json.dumps(label)}; give a number, a name, or a list of them")
    return label


def index_shards(files: Sequence[tuple[str, Path]], folder: Path) -> list[Shard]:
    """The shards of one folder, by name and path: from index.json, which is made or completed where that is needed."""
    kept = _stored(folder)
    missing = [(file, path) for file, path in files if file not in kept]
    for file, path in progress(missing, len(missing), "indexing shards"):
        modified = _status(path).st_mtime_ns  # before it is read: one that changes meanwhile is read again
        kept[file] = replace(index_shard(path, file), modified=modified)
    if missing:
        write_index(folder, kept.values())
    return [kept[file] for file, _ in files]


def _stored(folder: Path) -> dict[str, Shard]:
    """What has been indexed of the shards of a folder and has not changed since."""
    found = {}
    for path in (folder / INDEX, _elsewhere(folder)):
        if not path.exists():
            continue
        indexed = path.stat().st_mtime_ns
        for shard in read_index(path.read_bytes(), str(path)):
            with contextlib.suppress(FileNotFoundError):
                status = (folder / shard.file).stat()
                if status.st_size == shard.bytes and _unchanged(shard, status, indexed):
                    found[shard.file] = replace(shard, modified=status.st_mtime_ns)
    return found


def _unchanged(shard: Shard, status: os.stat_result, indexed: int) -> bool:
    """Whether a shard has the time that its index says, or else came to its place before the index was written."""
    if shard.modified is not None:
        return status.st_mtime_ns == shard.modified
    return max(status.st_mtime_ns, status.st_ctime_ns) <= indexed


def read_index(content: bytes, name: str) -> list[Shard]:
    """The shards of an index.json. Raises `UserError` naming it where it is none."""
    try:
        found = json.loads(content)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        return [Shard(**shard) for shard in found["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} is no index of shards ({error}); remove it to have it made again") from error


def index_json(shards: Iterable[Shard]) -> bytes:
    """index.json."""
    rows = [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.file)]
    return json.dumps({"version": VERSION, "shards": rows}, separators=(",", ":")).encode()


def write_index(folder: Path, shards: Iterable[Shard]) -> Path:
    """Write index.json beside the shards, or into the cache folder."""
    path = folder / INDEX if os.access(folder, os.W_OK) else _elsewhere(folder)
    return atomic_write(path, index_json(shards))


def cache_home() -> Path:
    """$MUNTIN_HOME/data, or else $XDG_CACHE_HOME/muntin/data, or ~/.cache/muntin/data."""
    if home := os.environ.get("MUNTIN_HOME"):
        return Path(home) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "muntin" / "data"


def _elsewhere(folder: Path) -> Path:
    digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return cache_home() / "indexes" / f"{digest}.json"
