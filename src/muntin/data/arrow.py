"""Hugging Face data sets on disk: what `save_to_disk` wrote (Arrow), and folders of Parquet files.

Arrow files are mapped into memory and read at random. Parquet is compressed by groups of rows: an epoch reads a few of
them at a time, in a random order (see `ShardsShuffled`).
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muntin.data.datasets import Images, Key, Label
from muntin.data.decode import Encoded, Picture
from muntin.data.images import BadImage, read_bytes
from muntin.data.order import Order, ShardsShuffled
from muntin.data.shards import expand, part_of
from muntin.errors import UserError

LABELS = ("label", "labels", "fine_label", "cls", "class")
TOGETHER = 4  # groups of rows whose images are mixed
PARTS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


def saved_parts(data: str) -> dict[str, Images]:
    """The splits of a DatasetDict, or the rows of a Dataset as "all", as `save_to_disk` wrote them."""
    root = Path(data)
    listed = root / "dataset_dict.json"
    if not listed.exists():
        return {"all": _saved(root, "")}
    parts = {}
    for split in json.loads(listed.read_text(encoding="utf-8"))["splits"]:
        if split not in PARTS:
            raise UserError(
                f"{root} has a split {split!r}; valid are {', '.join(PARTS)}: rename it, or give {root / split}"
            )
        parts[PARTS[split]] = _saved(root / split, f"{split}/")
    return parts


def _saved(folder: Path, prefix: str) -> Images:
    import pyarrow as pa

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        maps = [pa.memory_map(str(folder / file["filename"])) for file in state["_data_files"]]
        table = pa.concat_tables([pa.ipc.open_stream(one).read_all() for one in maps])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder} is no data set that save_to_disk wrote ({error}); write it again") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} selects rows of other files; call flatten_indices() before save_to_disk")
    image, label, classes = _columns(folder, table.schema)
    column = table.column(image)
    keys: list[Key] = [f"{prefix}{i}" for i in range(len(table))]
    labels, names = _labels(folder, table.column(label).to_pylist(), classes)

    def read(position: int) -> Picture:
        return _picture(column[position].as_py(), f"{folder}, row {position}", folder)

    return Images(keys, labels, names, read)


def parquet_parts(data: str) -> dict[str, Images]:
    """Images by part of a folder of Parquet files, or of a pattern; parts by the files' names, as for shards."""
    root = Path(data)
    if root.is_dir():
        files = sorted(root.rglob("*.parquet"))
    else:
        files = [path for text in expand(data) for path in sorted(Path().glob(os.path.relpath(text)))]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else root
    if not files:
        raise UserError(f"no Parquet files match {data}; check the pattern")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(part_of(file.relative_to(root).as_posix()), []).append(file)
    found = {name: _Groups(some, root) for name, some in parts.items()}
    given = next((groups.classes for groups in found.values() if groups.classes), None)
    if given is None:
        raw = [label for groups in found.values() for label in groups.raw]
        _, given = _labels(root, raw, None)
    return {name: groups.images(given) for name, groups in found.items()}


class _Groups:
    """The groups of rows of some Parquet files; a few are held in memory."""

    def __init__(self, files: Sequence[Path], root: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self.root = root
        self.groups: list[tuple[Path, int]] = []
        self.which: list[int] = []
        self.rows: list[int] = []
        self.keys: list[Key] = []
        self.raw: list[Any] = []
        self.held: OrderedDict[int, Any] = OrderedDict()
        self.classes: list[str] | None = None
        for file in files:
            try:
                opened = parquet.ParquetFile(file)
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(f"{file} is no readable Parquet file ({error}); copy it again") from error
            self.image, label, self.classes = _columns(file, opened.schema_arrow)
            self.raw += opened.read([label]).column(0).to_pylist()
            name = file.relative_to(root).as_posix()
            for group in range(opened.metadata.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                self.which += [len(self.groups)] * count
                self.rows += range(count)
                self.groups.append((file, group))
            self.keys += [f"{name}/{i}" for i in range(opened.metadata.num_rows)]

    def images(self, classes: list[str]) -> Images:
        labels, _ = _labels(self.root, self.raw, classes)
        order: Order = ShardsShuffled(np.asarray(self.which), TOGETHER, lambda groups: None)
        return Images(self.keys, labels, classes, self.read, order)

    def read(self, position: int) -> Picture:
        found = self._group(self.which[position])[self.rows[position]].as_py()
        return _picture(found, f"{self.root / str(self.keys[position])}", self.root)

    def _group(self, number: int) -> Any:
        import pyarrow.parquet as parquet

        if number not in self.held:
            file, group = self.groups[number]
            self.held[number] = parquet.ParquetFile(file).read_row_group(group, columns=[self.image]).column(0)
            while len(self.held) > TOGETHER + 1:
                self.held.popitem(last=False)
        return self.held[number]


def _columns(where: Path, schema: Any) -> tuple[str, str, list[str] | None]:
    """The columns of images and labels, and the classes' names where the features of `datasets` state them."""
    features: dict[str, Any] = {}
    if schema.metadata and b"huggingface" in schema.metadata:
        features = json.loads(schema.metadata[b"huggingface"])["info"].get("features") or {}
    images = [field.name for field in schema if _is_image(field.type)]
    labels = [name for name in LABELS if name in schema.names]
    labels += [
        name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name not in labels
    ]
    for found, what in ((images, "images ({bytes, path}, or binary)"), (labels, f"labels ({', '.join(LABELS)})")):
        if not found:
            raise UserError(f"{where} has no column of {what}; it has {', '.join(schema.names)}: rename one")
    feature = features.get(labels[0], {})
    feature = feature.get("feature", feature)  # of a list
    return images[0], labels[0], feature.get("names") if isinstance(feature, dict) else None


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _labels(where: Path, raw: Sequence[Any], classes: list[str] | None) -> tuple[list[Label], list[str]]:
    """Labels as indices into the classes, which are those given, names in order, or numbers."""
    flat = [one for label in raw for one in (label if isinstance(label, list) else [label])]
    if classes is None:
        names = {one for one in flat if isinstance(one, str)}
        classes = sorted(names) or [
            str(i) for i in range(max((one for one in flat if isinstance(one, int)), default=-1) + 1)
        ]
    numbers: dict[Any, int] = {name: i for i, name in enumerate(classes)} | {i: i for i in range(len(classes))}
    wrong = next((one for one in flat if one not in numbers), 0)
    if wrong not in numbers:
        raise UserError(f"{where} has the label {wrong!r}, which is none of its {len(classes)} classes; correct it")
    return [[numbers[one] for one in label] if isinstance(label, list) else numbers[label] for label in raw], classes


def _picture(value: Any, name: str, folder: Path) -> Picture:
    """An image's {bytes, path}, or its bytes."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            path = folder / value["path"]
            return Encoded(read_bytes(path), str(path))
        value = value.get("bytes")
    if not value:
        raise BadImage(f"{name} has no image; remove the row")
    return Encoded(value, name)
