"""Tar shards in WebDataset's form: read at random, by an index of where every sample lies.

A sample is the files of a tar that share a name up to the first dot: an image and its label, in .cls (a number or a
name) or .json ("label", "cls", "class" or "labels": a number, a name, or a list of them). The index is made once and
kept as index.json beside the shards, or in a cache folder where those cannot be written.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muntin.data.datasets import Images, Key, Label
from muntin.data.decode import Encoded
from muntin.data.images import BadImage
from muntin.data.indexing import Raw, Shard, index_shards
from muntin.data.order import Order
from muntin.errors import UserError

CLASSES = "classes.json"
ATTEMPTS = 3  # to open a shard: another process may remove it from the cache after it was fetched
_PART = re.compile(r"(?:^|[-_./])(train|val|validation|test)(?=[-_./0-9]|$)")


def expand(pattern: str) -> list[str]:
    """Braces written out, as a shell does: `{000..127}` and `{train,val}`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span is not None:
        choices = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
        if not choices:
            raise UserError(f"{pattern}: the range {{{inner}}} is empty; give the smaller number first")
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise UserError(f"{pattern}: {{{inner}}} is no range; write it as in {{000000..000127}} or {{train,val}}")
    return [text for c in choices for text in expand(pattern[: match.start()] + c + pattern[match.end() :])]


def part_of(file: str) -> str:
    """train, val or test by a shard's name, as in train-000000.tar or validation/00.tar; "all" where it has none."""
    found = _PART.findall(file)
    return {"validation": "val"}.get(found[-1], found[-1]) if found else "all"


def find_shards(data: str) -> tuple[Path, list[tuple[str, Path]]]:
    """The folder of local shards and their names and paths, from a folder or a pattern with `*` or braces."""
    root = Path(data)
    if root.is_dir():
        paths = sorted(root.rglob("*.tar"))
    else:
        texts = expand(data)
        static = os.path.commonpath([re.split(r"[*?\[]", text)[0].rpartition("/")[0] or "." for text in texts])
        root = Path(static)
        paths = []
        for text in texts:
            found = sorted(root.glob(os.path.relpath(text, root))) if re.search(r"[*?\[]", text) else [Path(text)]
            if not found:
                raise UserError(f"no shards match {text}; check the pattern")
            paths += found
    return root, [(path.relative_to(root).as_posix(), path) for path in paths]


def read_classes(content: bytes, name: str) -> list[str]:
    """The names of classes.json. Raises `UserError` naming it where it is no list of different names."""
    try:
        classes = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is damaged ({error}); it holds a JSON list of class names") from error
    if (
        not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
        or len(set(classes)) < len(classes)
    ):
        raise UserError(f"{name}: give a JSON list of different class names")
    return classes


def class_map(shards: Sequence[Shard], known: list[str] | None) -> list[str]:
    """Class names: those given, or names in order, or numbers up to the largest."""
    if known is not None:
        return known
    found = {label for shard in shards for raw in shard.labels for label in (raw if isinstance(raw, list) else [raw])}
    names, numbers = {c for c in found if isinstance(c, str)}, {c for c in found if isinstance(c, int)}
    if names and numbers:
        raise UserError(
            f"{shards[0].file} and others label classes by number ({min(numbers)}) and by name ({min(names)!r}); "
            f"use one, or add a {CLASSES}"
        )
    return sorted(names) if names else [str(i) for i in range(max(numbers, default=-1) + 1)]


def shard_images(
    shards: Sequence[Shard], names: Sequence[str], classes: list[str], path_of: Callable[[int], Path], order: Any = None
) -> dict[str, Images]:
    """Images by part. `names[i]` is what errors call shard i, `path_of(i)` where it can be read.

    order: makes the order of a part's epochs from the shard of each of its positions.
    """
    numbers = {name: label for label, name in enumerate(classes)}
    parts: dict[str, list[int]] = {}
    for i, shard in enumerate(shards):
        parts.setdefault(part_of(shard.file), []).append(i)
    return {
        name: _part([shards[i] for i in chosen], chosen, names, classes, numbers, path_of, order)
        for name, chosen in parts.items()
    }


def _part(
    shards: Sequence[Shard],
    chosen: Sequence[int],
    names: Sequence[str],
    classes: list[str],
    numbers: dict[str, int],
    path_of: Callable[[int], Path],
    order: Callable[[np.ndarray], Order] | None,
) -> Images:
    which = np.repeat(np.asarray(chosen), [len(shard.keys) for shard in shards])
    offsets = np.concatenate([shard.offsets for shard in shards])
    sizes = np.concatenate([shard.sizes for shard in shards])
    keys: list[Key] = [f"{shard.file}/{key}" for shard in shards for key in shard.keys]
    labels = [
        _numbered(raw, f"{names[i]}: the sample {key!r}", classes, numbers)
        for i, shard in zip(chosen, shards, strict=True)
        for key, raw in zip(shard.keys, shard.labels, strict=True)
    ]
    suffixes = [suffix for shard in shards for suffix in shard.suffixes]
    folders = {i: names[i].removesuffix(shard.file) for i, shard in zip(chosen, shards, strict=True)}

    def read(position: int) -> Encoded:
        shard = int(which[position])
        name = f"{folders[shard]}{keys[position]}{suffixes[position]}"
        return Encoded(_read(path_of, shard, int(offsets[position]), int(sizes[position]), name), name)

    return Images(keys, labels, classes, read, order(which) if order is not None else None)


def _numbered(raw: Raw, name: str, classes: list[str], numbers: dict[str, int]) -> Label:
    """A raw label as an index into the classes."""
    if isinstance(raw, list):
        return [_index(one, name, classes, numbers) for one in raw]
    return _index(raw, name, classes, numbers)


def _index(raw: Any, name: str, classes: list[str], numbers: dict[str, int]) -> int:
    if isinstance(raw, str) and raw in numbers:
        return numbers[raw]
    if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < len(classes):
        return raw
    raise UserError(
        f"{name} has the label {raw!r}, which is none of the {len(classes)} classes in {CLASSES}; correct it"
    )


def _read(path_of: Callable[[int], Path], shard: int, offset: int, size: int, name: str) -> bytes:
    """So many bytes of a shard. Raises `BadImage` naming the sample where they cannot be read."""
    for attempt in range(ATTEMPTS):
        path = path_of(shard)
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(handle, size, offset)
            finally:
                os.close(handle)
            break
        except FileNotFoundError as error:
            if attempt == ATTEMPTS - 1:
                raise BadImage(f"{name} cannot be read ({error.strerror}: {path}); put the shard back") from error
        except OSError as error:
            raise BadImage(f"{name} cannot be read ({error.strerror}: {path}); copy the shard again") from error
    if len(data) != size:
        raise BadImage(f"{name} is cut short ({path} has {len(data)} of its {size} bytes); copy the shard again")
    if not size:
        raise BadImage(f"{name} is empty (zero bytes); make the shard again without it")
    return data


def local_shards(data: str) -> dict[str, Images]:
    """Images by part ("all" where shards name none) of a folder of shards or a pattern."""
    folder, files = find_shards(data)
    shards = index_shards(files, folder)
    path = folder / CLASSES
    classes = class_map(shards, read_classes(path.read_bytes(), str(path)) if path.exists() else None)
    names = [str(path) for _, path in files]
    return shard_images(shards, names, classes, lambda shard: files[shard][1])
