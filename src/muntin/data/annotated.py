"""Images with what is on them: objects with boxes and masks, or a class for every pixel; and their splits.

What `--data` names is recognised by what lies there:

scenes                                      the built-in set: handwritten digits on textures (scenes.py)
FOLDER/annotations/instances_{train,val}*   COCO; FOLDER/{train,valid,test}/_annotations.coco.json (Roboflow);
                                            FOLDER/{train,val,test}.json; a single .json file (coco.py)
FOLDER/Annotations, FOLDER/JPEGImages       Pascal VOC, for every task (voc.py)
FOLDER/images, FOLDER/masks                 images with index masks: ADE20K and any other (label_maps.py)

H W image, n objects
"""

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muntin.data.datasets import PARTS, TEST, VAL
from muntin.data.problems import Problems
from muntin.errors import UserError, nearest

TASKS = ("detect", "instance", "segment")
IGNORE = 255  # in label maps
WHOLE = "all"  # the part of data that come in one
SCENES = "scenes"


class Annotated(ABC):
    """The images of one part of a data set with what is on them.

    classes: names by 0-based index, without background. palette: red, green and blue of each, where the files have one.
    """

    classes: list[str]
    palette: list[tuple[int, int, int]] | None

    @property
    @abstractmethod
    def masks(self) -> bool:
        """Whether objects have masks."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, position: int) -> str:
        """An image's file, relative to its images' folder: what errors call it."""

    @abstractmethod
    def picture(self, position: int) -> Image.Image:
        """An image, upright RGB. Raises `BadImage` where it cannot be used or is not of the size declared."""

    @abstractmethod
    def target(self, position: int) -> dict[str, Any]:
        """What is on an image, as torchvision's tv_tensors.

        Objects: "boxes" (n, 4) float32 x1 y1 x2 y2 in pixels, "labels" (n,) int64, "crowd" (n,) bool, "area" (n,)
        float32 in pixels and, where they have masks, "masks" (n, H, W) uint8. Label maps: "labels" (H, W) uint8, 255
        where nothing is said. Raises `UserError` naming what is wrong.
        """

    @abstractmethod
    def select(self, positions: Sequence[int]) -> "Annotated":
        """Some of the images, in this order."""

    @abstractmethod
    def digest(self) -> str:
        """Of which images these are, in which order, with which annotations."""

    @abstractmethod
    def coco(self) -> dict[str, Any]:
        """Objects as COCO's ground truth: images by position + 1, categories by class + 1.

        Raises `TypeError` for label maps.
        """


@dataclass(frozen=True)
class AnnotatedSplits:
    """Disjoint parts of one data set; `test` is None where it has none. `drawn`: a seed has split them."""

    train: Annotated
    val: Annotated
    test: Annotated | None
    drawn: bool

    def parts(self) -> dict[str, Annotated]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def json(self) -> dict[str, Any]:
        """What split.json holds: classes, the number of images and a digest of each part, and where the split was drawn
        the images' names."""
        described: dict[str, Any] = {"classes": self.train.classes, "drawn": self.drawn}
        for name, part in self.parts().items():
            described[name] = {"images": len(part), "sha256": part.digest()}
            if self.drawn:
                described[name]["names"] = [part.name(i) for i in range(len(part))]
        return described

    def refuse_changed(self, data: str, stored: Mapping[str, Any]) -> None:
        """Raise `UserError` unless these are the images and annotations of a run's split.json."""
        now = self.json()
        for name in (*PARTS, "classes"):
            if now.get(name) != stored.get(name):
                raise UserError(
                    f"{data}: {'the classes are' if name == 'classes' else f'the {name} part is'} not what the run's "
                    "split.json says; put the data back as they were, or start another run with --out"
                )


def open_annotated(data: str, task: str, seed: int = 0, on_bad: str = "error") -> AnnotatedSplits:
    """Train, val and test of what `data` names, for a task ("detect", "instance" or "segment").

    What has no parts is split 70/10/20 by `seed`; where there is no val, a tenth of train is.

    on_bad: "error" refuses the first annotation that cannot be used; "skip" leaves such ones out and says how many.

    Raises `UserError` that names the file and the id at fault, and says what is valid.
    """
    parts = _read(data, task, on_bad)
    learned = WHOLE if WHOLE in parts else "train"
    if learned not in parts:
        raise UserError(f"{data} has {' and '.join(parts)} but no train part; add it")
    drawn = learned == WHOLE or "val" not in parts
    if drawn:
        whole = parts.pop(learned)
        shares = {"val": VAL, "test": TEST} if learned == WHOLE else {"val": VAL}
        for name, positions in _drawn(data, len(whole), shares, seed).items():
            parts[name] = whole.select(positions)
    return AnnotatedSplits(parts["train"], parts["val"], parts.get("test"), drawn)


def open_annotated_part(data: str, task: str, split: str | None, on_bad: str = "error") -> tuple[Annotated, str]:
    """The images of one part, by default test, else val, else all there is, and the part's name.

    Raises `UserError` where the data have no such part.
    """
    parts = _read(data, task, on_bad)
    if split is not None and split not in parts:
        raise UserError(f"{data} has no part {split}, but {', '.join(parts)}; leave --split out, or give one of these")
    chosen = split or next(name for name in ("test", "val", WHOLE, "train") if name in parts)
    return parts[chosen], chosen


def _read(data: str, task: str, on_bad: str) -> dict[str, Annotated]:
    if on_bad not in ("error", "skip"):
        raise UserError(f"bad annotations: {on_bad!r} is unknown; valid are error and skip")
    problems = Problems(data, stop=on_bad == "error")
    parts = read_parts(data, task, problems)
    empty = next((name for name, part in parts.items() if not len(part)), None)
    if empty is not None:
        where = "" if empty == WHOLE else f" in its part {empty}"
        raise UserError(f"{data} has no images to use{where}; add some, or see why with: muntin data check {data}")
    for problem in problems.found[:3]:
        print(f"left out: {problem}", file=sys.stderr)
    if len(problems.found) > 3:
        print(f"and {len(problems.found) - 3} more; all of them: muntin data check {data}", file=sys.stderr)
    return parts


def read_parts(data: str, task: str, problems: Problems) -> dict[str, Annotated]:
    """Images with annotations by part: "train", "val" and "test" as far as there are any, or "all".

    Raises `UserError` where there is nothing that the task could take. What reads a kind of data is imported for it.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown{nearest(task, TASKS)}; valid are {', '.join(TASKS)}")
    root = root_of(data)
    if is_voc(root):
        from muntin.data.voc import voc_parts

        return voc_parts(root, task, problems)
    from muntin.data.coco import coco_files, coco_parts
    from muntin.data.label_maps import has_label_maps, label_map_parts

    files = coco_files(root)
    if task == "segment" and has_label_maps(root):
        return label_map_parts(root, problems)
    if task != "segment" and files:
        return coco_parts(root, files, task, problems)
    if files:
        raise UserError(f"{data} has objects (COCO), but segment needs index masks; add {root}/masks, or give --task "
                        "detect or instance")  # fmt: skip
    if has_label_maps(root):
        raise UserError(f"{data} has index masks, but {task} needs objects; give --task segment, or add COCO's "
                        f"{root}/annotations/instances_train.json")  # fmt: skip
    raise UserError(
        f"{data} has no annotations that Muntin knows; give a COCO folder (annotations/instances_train*.json), a .json "
        "file, a Pascal VOC folder (Annotations, JPEGImages) or images with index masks (images, masks)"
    )


def is_voc(root: Path) -> bool:
    """Whether it is a folder of Pascal VOC's: by names in capitals, which not every disk tells from others."""
    return root.is_dir() and bool({"Annotations", "JPEGImages"} & set(os.listdir(root)))


def root_of(data: str) -> Path:
    """The folder or file that `data` names."""
    if data == SCENES:
        from muntin.data.scenes import scenes_folder

        return scenes_folder()
    root = Path(data).expanduser()
    if not root.exists():
        raise UserError(f"there is no data at {data}; give a folder or a .json file, or {SCENES} for the built-in set")
    return root


def _drawn(data: str, count: int, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Positions of each part, at least one in each, drawn by the seed."""
    if count <= len(shares):
        raise UserError(f"{data} has {count} images, too few to split into train and {' and '.join(shares)}; add some")
    order = np.random.default_rng(seed).permutation(count).tolist()
    positions, begin = {}, 0
    for name, share in shares.items():
        end = begin + max(round(count * share), 1)
        positions[name] = sorted(order[begin:end])
        begin = end
    return positions | {"train": sorted(order[begin:])}


def digest_of(*parts: Any) -> str:
    """SHA-256 of arrays and plain data."""
    found = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, separators=(",", ":")).encode()
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()
