"""`muntin data check`: every image and annotation looked at before training starts, and all that is wrong listed."""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muntin.data.annotated import IGNORE, TASKS, Annotated, is_voc, read_parts, root_of
from muntin.data.images import BadImage
from muntin.data.objects import Objects, mask_box
from muntin.data.problems import Problem, Problems
from muntin.progress import progress
from muntin.run import atomic_write

SAMPLES = 12  # pictures of each part
COLUMNS = 4
SIDE = 480  # of a picture on the sheet, at most
APART = 0.5  # intersection over union of an object's box and the box of its mask, below which they do not fit


@dataclass(frozen=True)
class Survey:
    """What the data have for one task.

    counts: of the images (label maps) or objects that have each class, by part.
    """

    data: str
    task: str
    parts: dict[str, Annotated]
    counts: dict[str, np.ndarray]
    problems: list[Problem]
    notes: list[str]

    def __str__(self) -> str:
        classes = next(iter(self.parts.values())).classes
        lines = [f"{self.data}: {self.task}, {len(classes)} classes"]
        for name, part in self.parts.items():
            objects = f", {int(self.counts[name].sum())} objects" if isinstance(part, Objects) else ""
            lines.append(f"  {name}: {len(part)} images{objects}")
        lines += [f"  note: {note}" for note in [*self.notes, *self._missing(classes)]]
        lines += [f"  {problem}" for problem in self.problems]
        count = len(self.problems)
        lines.append(f"  {'nothing is wrong' if not count else '1 problem' if count == 1 else f'{count} problems'}")
        return "\n".join(lines)

    def _missing(self, classes: list[str]) -> Iterator[str]:
        for name, counts in self.counts.items():
            absent = [classes[label] for label in np.flatnonzero(counts == 0)]
            if absent:
                more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
                yield f"{name} has nothing of {', '.join(absent[:5])}{more}"

    def write(self, folder: Path) -> list[Path]:
        """problems-TASK.csv, and samples-TASK-PART.png with what is on some images drawn on them."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "item", "problem"])
        writer.writerows([problem.file, problem.item, problem.what] for problem in self.problems)
        written = [atomic_write(folder / f"problems-{self.task}.csv", file.getvalue().encode())]
        for name, part in self.parts.items():
            sheet = samples(part)
            if sheet is not None:
                written.append(
                    atomic_write(folder / f"samples-{self.task}-{name}.png", partial(sheet.save, format="PNG"))
                )
        return written


def surveys(data: str, task: str | None = None) -> list[Survey]:
    """What the data have for a task, by default for each task that they are for.

    Raises `UserError` where there is nothing to look at.
    """
    return [_survey(data, one) for one in ([task] if task else _tasks(root_of(data)))]


def _tasks(root: Path) -> list[str]:
    if is_voc(root):
        from muntin.data.voc import FOLDERS

        return [task for task in TASKS if (root / FOLDERS[task][0]).is_dir()] or [TASKS[0]]
    from muntin.data.coco import coco_files, has_masks
    from muntin.data.label_maps import has_label_maps

    files = coco_files(root)
    found = ["instance" if has_masks(files) else "detect"] if files else []
    return [*found, *(["segment"] if has_label_maps(root) else [])] or [TASKS[0]]


def _survey(data: str, task: str) -> Survey:
    problems = Problems(data, stop=False)
    parts = read_parts(data, task, problems)
    found = sorted(problems.found, key=lambda problem: problem.file)
    notes, counts, apart = problems.notes, {}, []
    for name, part in parts.items():
        counts[name] = np.zeros(len(part.classes), np.int64)
        with ThreadPoolExecutor() as pool:
            looks = progress(pool.map(lambda i, part=part: _look(part, i), range(len(part))), len(part), name)
            for look in looks:
                counts[name] += look.counts
                found += look.problems
                apart += look.apart
    if apart:
        notes = [*notes, f"{len(apart)} boxes do not fit their masks, the first: {apart[0]}"]
    return Survey(data, task, parts, counts, found, notes)


@dataclass(frozen=True)
class _Look:
    """What one image has: of each class how much, what is wrong, and whose box and mask lie apart."""

    counts: np.ndarray
    problems: list[Problem]
    apart: list[str]


def _look(part: Annotated, position: int) -> _Look:
    """Decode an image and what is on it, as training will."""
    look = _Look(np.zeros(len(part.classes), np.int64), [], [])
    try:
        part.picture(position)
        target = part.target(position)
    except BadImage as error:
        look.problems.append(Problem(part.name(position), "", str(error)))
        return look
    labels = target["labels"].numpy()
    if not isinstance(part, Objects):
        present = np.unique(labels)
        look.counts[present[present != IGNORE]] += 1
        return look
    np.add.at(look.counts, labels, 1)
    for mask, box, row in zip(target.get("masks", ()), target["boxes"].tolist(), part.of(position), strict=False):
        item = f"annotation {part.rows.ids[row]}"
        around = mask_box(mask.numpy())
        if not around.any():
            look.problems.append(Problem(part.name(position), item, "its mask has no pixels in the image"))
        elif _overlap(np.array(box), around) < APART:
            look.apart.append(f"{part.name(position)}: {item}")
    return look


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union, of boxes whose sides are at least a pixel."""
    sides = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(0)
    areas = [(np.maximum(one[2:] - one[:2], 1)).prod() for one in (box, other)]
    return float(sides.clip(0).prod() / max(sum(areas) - sides.prod(), 1e-9))


def samples(part: Annotated, count: int = SAMPLES) -> Image.Image | None:
    """A sheet of some images, drawn by a seed, with what is on them; None where none can be read."""
    from muntin.measure.drawing import contact_sheet

    pictures: list[Image.Image] = []
    titles: list[str] = []
    for position in np.random.default_rng(0).permutation(len(part)).tolist():
        if len(pictures) == count:
            break
        try:
            pictures.append(sample(part, position))
        except BadImage:  # among the problems
            continue
        titles.append(part.name(position))
    return contact_sheet(pictures, COLUMNS, titles, SIDE) if pictures else None


def sample(part: Annotated, position: int) -> Image.Image:
    """One image with its boxes and masks, or its label map."""
    from muntin.measure.drawing import draw

    picture, target = part.picture(position), part.target(position)
    drawn: dict[str, Any] = (
        {"boxes": target["boxes"], "labels": target["labels"], "masks": target.get("masks")}
        if isinstance(part, Objects)
        else {"label_map": target["labels"]}
    )
    return draw(picture, **drawn, classes=part.classes, palette=part.palette)
