"""A folder of predictions in Parquet: one part for each unit of work, each image in one part only.

```
parquet/
  part-4e0c1d29a7...parquet  image, label, class1, probability1, class2, ..., error; named by its unit's digest.
                             Of a multi-label model lists: image, label, classes, probabilities, error
  _predictions.json          written last: model, options, counts, versions. Readers of Parquet pass over names in _
```

A part is written whole or not at all and says which model, options and shard it is from, so the folder itself is the
record of what is done. One process writes; its lock ends with it.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from muntin.errors import UserError
from muntin.run import METADATA, atomic_write, write_json
from muntin.tasks.inference import Prediction

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "_predictions.json"


def table_of(rows: Sequence[Prediction], top: int, lists: bool = False) -> pa.Table:
    """Predictions as columns image, label, class1, probability1, ..., error; null is what there is not.

    lists: columns classes and probabilities instead, as long as each image has classes.
    """
    columns: dict[str, pa.Array] = {
        "image": pa.array([row.image for row in rows], pa.string()),
        "label": pa.array([row.label or None for row in rows], pa.string()),
    }
    if lists:
        columns["classes"] = pa.array([None if row.error else row.classes for row in rows], pa.list_(pa.string()))
        found = [None if row.error else row.probabilities for row in rows]
        columns["probabilities"] = pa.array(found, pa.list_(pa.float32()))
    for i in range(0 if lists else top):
        names = [None if row.error else row.classes[i] for row in rows]
        probabilities = [None if row.error else row.probabilities[i] for row in rows]
        columns[f"class{i + 1}"] = pa.array(names, pa.string())
        columns[f"probability{i + 1}"] = pa.array(probabilities, pa.float32())
    columns["error"] = pa.array([row.error or None for row in rows], pa.string())
    return pa.table(columns)


@dataclass(frozen=True)
class Part:
    """One file of the folder. `shard` is the path of the shard that it is from, "" of a block of files; `duplicates`
    images of its unit are in other parts; `threshold` is that of a multi-label model.
    """

    model: str
    top: int
    shard: str
    images: int
    unreadable: int
    duplicates: int
    threshold: float | None = None


class Keys:
    """A set of image keys in a temporary file, so that memory does not grow with it."""

    def __init__(self) -> None:
        self._store = sqlite3.connect("", isolation_level=None)
        self._store.execute("PRAGMA journal_mode = OFF")
        self._store.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, keys: Iterable[str]) -> list[bool]:
        """Add them; which were new."""
        insert = "INSERT OR IGNORE INTO keys VALUES (?)"
        self._store.execute("BEGIN")
        new = [self._store.execute(insert, (_short(key),)).rowcount == 1 for key in keys]
        self._store.execute("COMMIT")
        return new

    def __contains__(self, key: str) -> bool:
        return self._store.execute("SELECT 1 FROM keys WHERE key = ?", (_short(key),)).fetchone() is not None

    def close(self) -> None:
        self._store.close()


def _short(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


class Predictions:
    """The folder, locked for this process while it is open (a context manager).

    `parts` are its parts by name, `keys` the images in them.

    model: digest of the model that predicts; top: classes per image; threshold: of their probabilities, for a
    multi-label model. Raises `UserError` where the folder holds predictions of another model or with another top or
    threshold, unless `overwrite`, which removes all; where it holds other Parquet files, cannot be written, or another
    process is writing to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: str,
        top: int,
        overwrite: bool = False,
        threshold: float | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.model, self.top, self.threshold = model, top, threshold
        self.overwrite = overwrite
        self.parts: dict[str, Part] = {}
        self.keys = Keys()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Predictions":
        with contextlib.ExitStack() as opening:
            opening.callback(self.keys.close)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder}: {error.strerror}; choose a folder that you may write to (--out)"
                ) from error
            opening.enter_context(_locked(self.folder))
            for left in self.folder.glob(".*.tmp.parquet"):  # of a process that was killed
                left.unlink()
            self._read()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _read(self) -> None:
        parts = {path: _part(path) for path in sorted(self.folder.glob("*.parquet"))}
        if self.overwrite:
            for path in [*parts, self._path_of_manifest()]:
                path.unlink(missing_ok=True)
            return
        for path, part in parts.items():
            if (part.model, part.top, part.threshold) != (self.model, self.top, self.threshold):
                options = f"with --top {part.top}" + (
                    "" if part.threshold is None else f" --threshold {part.threshold}"
                )
                other = "by another model" if part.model != self.model else options
                raise UserError(
                    f"{self.folder} holds predictions {other}; give another folder, or replace them with --overwrite"
                )
            self.parts[path.stem.removeprefix("part-")] = part

    def begin(self, names: Mapping[str, str]) -> None:
        """Learn which images are done. names: of the parts of shards, by the paths of these; the part of a shard that
        has another name by now, because the shard has changed, goes, so that its images are predicted again.
        """
        for name, part in list(self.parts.items()):
            if names.get(part.shard, name) != name:
                self._path(name).unlink()
                del self.parts[name]
        for name in self.parts:
            self.keys.add(pq.read_table(self._path(name), columns=["image"])["image"].to_pylist())

    def add(self, name: str, shard: str, table: pa.Table) -> Part:
        """Write a unit's predictions, less the images that are in other parts."""
        self._path_of_manifest().unlink(missing_ok=True)  # until all is done again
        new = table.filter(pa.array(self.keys.add(table["image"].to_pylist()), pa.bool_()))
        unreadable = new.num_rows - pc.sum(pc.is_null(new["error"])).as_py() if new.num_rows else 0
        duplicates = table.num_rows - new.num_rows
        part = Part(self.model, self.top, shard, new.num_rows, unreadable, duplicates, self.threshold)
        new = new.replace_schema_metadata({METADATA: json.dumps(asdict(part))})
        atomic_write(self._path(name), lambda partial: pq.write_table(new, partial))
        self.parts[name] = part
        return part

    def finish(self, **described: Any) -> None:
        """Write the manifest: everything that was asked for is there."""
        write_json(self._path_of_manifest(), described)

    def _path(self, name: str) -> Path:
        return self.folder / f"part-{name}.parquet"

    def _path_of_manifest(self) -> Path:
        return self.folder / MANIFEST


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process is writing to; the lock goes with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another command is writing to {folder}; wait for it, or give another folder") from error
        yield
    finally:
        os.close(handle)


def _part(path: Path) -> Part:
    """What a part says about itself."""
    try:
        described = (pq.read_schema(path).metadata or {}).get(METADATA.encode())
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and its images are predicted again") from error
    if described is None:
        raise UserError(f"{path} is no file of predictions by Muntin; give a folder for predictions alone")
    return Part(**json.loads(described))
