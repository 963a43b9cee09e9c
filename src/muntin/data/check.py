"""Images that cannot be used: found before training where that takes minutes, and listed in bad_files.csv.

Up to `ALL` images of a part are decoded once, coarsely; of a larger part, or one whose shards would have to be fetched,
a sample is, and the rest shows itself in training.
"""

import csv
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from muntin.data.datasets import Images, Key
from muntin.data.decode import Encoded
from muntin.data.images import BadImage, check_image
from muntin.data.order import ShardsShuffled
from muntin.errors import UserError
from muntin.progress import progress

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

ALL = 50_000
SAMPLE = 2_000


@dataclass
class BadFiles:
    """bad_files.csv: images that were left out, and why, each once. Processes add to it one at a time."""

    path: Path
    _listed: set[str] = field(default_factory=set)

    def add(self, name: str, problem: str) -> None:
        """List an image, unless it is listed."""
        if name in self._listed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", newline="", encoding="utf-8") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(0)
            text = file.read()
            self._listed.update(row["file"] for row in csv.DictReader(io.StringIO(text)))
            writer = csv.writer(file, lineterminator="\n")
            if not text:
                writer.writerow(["file", "problem"])
            if name not in self._listed:
                self._listed.add(name)
                writer.writerow([name, problem])

    def names(self) -> set[str]:
        """The images that are listed."""
        if not self.path.exists():
            return set()
        with open(self.path, newline="", encoding="utf-8") as file:
            return {row["file"] for row in csv.DictReader(file)}


@dataclass(frozen=True)
class Checked:
    """Which images cannot be used, by key, and the shorter sides of those that were looked at, in pixels."""

    bad: dict[Key, BadImage]
    sides: list[int]


def check_parts(parts: Mapping[str, Images], seed: int) -> Checked:
    """Decode the images of all parts, or a sample of them, once and coarsely."""
    todo = [(part, position) for part in parts.values() for position in _looked_at(part, seed)]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # check_image reports what matters
        found = list(progress(pool.map(_check, todo), len(todo), "checking images"))
    results = list(zip(todo, found, strict=True))
    bad = {part.keys[position]: result for (part, position), result in results if isinstance(result, BadImage)}
    return Checked(bad, [result for result in found if isinstance(result, int)])


def _looked_at(part: Images, seed: int) -> Sequence[int]:
    if isinstance(part.order, ShardsShuffled):
        return np.flatnonzero(part.order.shards == part.order.shards[0])[:SAMPLE].tolist()
    if len(part) <= ALL:
        return range(len(part))
    return np.sort(np.random.default_rng(seed).choice(len(part), SAMPLE, replace=False)).tolist()


def _check(item: tuple[Images, int]) -> int | BadImage:
    images, position = item
    try:
        found = images.read(position)
        if isinstance(found, Encoded):
            return min(check_image(found.data, found.name))
        return min(found.size)
    except BadImage as error:
        return error


def refuse_or_report(checked: Checked, total: int, on_bad_image: str, files: BadFiles | None) -> None:
    """Raise `UserError` naming the first bad images, or, with the policy "skip", list them."""
    if checked.bad and on_bad_image == "error":
        shown = "; ".join(str(error) for error in list(checked.bad.values())[:3])
        more = f"; and {len(checked.bad) - 3} more" if len(checked.bad) > 3 else ""
        raise UserError(f"{len(checked.bad)} of {total} images cannot be used: {shown}{more}. "
                        "Or leave them out with: --set on_bad_image=skip")  # fmt: skip
    for key, error in checked.bad.items():
        if files is not None:
            files.add(str(key), str(error))
        print(f"left out: {error}", file=sys.stderr)
