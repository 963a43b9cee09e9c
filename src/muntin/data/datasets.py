"""Labelled images and their splits; the bundled digits, and folders of images.

A data set's images are named by keys: an index (digits), or a path relative to the folder. A split is three lists of
keys; it is made once, written to split.json, and read from there ever after (sources.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muntin.data.decode import Encoded, Picture, read_image
from muntin.data.images import SUFFIXES
from muntin.data.order import Order
from muntin.errors import UserError, nearest
from muntin.run import atomic_write

Key = int | str
Label = int | list[int]
PARTS = ("train", "val", "test")
VAL, TEST = 0.1, 0.2  # of all images, where the data set has no splits of its own


@dataclass(frozen=True)
class Images:
    """Labelled images: keys, labels (indices into `classes`, one or a list of them), how to read one, encoded or as
    upright RGB, and in which order an epoch may read them (None: in any)."""

    keys: list[Key]
    labels: Sequence[Label]
    classes: list[str]
    read: Callable[[int], Picture]
    order: Order | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return any(isinstance(label, list) for label in self.labels[:1])

    def open(self, position: int) -> Image.Image:
        """One image as upright RGB."""
        found = self.read(position)
        return found.image() if isinstance(found, Encoded) else found

    def name(self, position: int) -> str:
        """What errors call an image."""
        return str(self.keys[position])

    def digest(self) -> str:
        """Of which images these are, in which order, with which labels."""
        rows = json.dumps([self.keys, list(self.labels)], separators=(",", ":"))
        return hashlib.sha256(rows.encode()).hexdigest()


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one data set. `test` is None where a folder has train and val alone.

    `plain_resize` says that the images are no larger than the model's input: nothing is cropped then. `given`: the data
    come with their parts, and split.json holds how many images those have and a digest of them, not all keys beside it.
    `left_out`: keys of images that could not be used.
    """

    train: Images
    val: Images
    test: Images | None
    plain_resize: bool
    given: bool = False
    left_out: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        keys = [key for part in self.parts().values() for key in part.keys]
        if len(set(keys)) != len(keys):
            raise RuntimeError("the splits of a data set overlap")

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none: labels are lists then, and targets multi-hot."""
        return self.train.multi_label

    def parts(self) -> dict[str, Images]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def json(self) -> dict[str, Any]:
        """What split.json holds."""
        described: dict[str, Any] = {"classes": self.train.classes, "multi_label": self.multi_label}
        if not self.given:
            digests = {name: part.digest() for name, part in self.parts().items()}
            return described | {name: part.keys for name, part in self.parts().items()} | {"sha256": digests}
        given = {name: {"images": len(part), "sha256": part.digest()} for name, part in self.parts().items()}
        return described | {"given": given, "left_out": list(self.left_out)}


def stratified(labels: Sequence[Label], seed: int, test: float = TEST) -> dict[str, list[int]]:
    """Positions of train, val and test: the same shares of every class, drawn from `seed`.

    Every class keeps at least one training image; one of two images gives none to val. An image of several classes
    counts for its first one.
    """
    first = np.array([label if isinstance(label, int) else (label or [-1])[0] for label in labels], dtype=np.int64)
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for label in np.unique(first).tolist():
        members = np.flatnonzero(first == label)
        order = np.random.default_rng((seed, label % 2**32)).permutation(members)
        # At least one of each where there are three.
        held = min(max(round(len(order) * test), 1), len(order) - 1) if len(order) >= 3 and test else 0
        checked = min(max(round(len(order) * VAL), 1), len(order) - held - 1) if len(order) >= 2 else 0
        parts["test"] += order[:held].tolist()
        parts["val"] += order[held : held + checked].tolist()
        parts["train"] += order[held + checked :].tolist()
    return {name: sorted(part) for name, part in parts.items()}


def load_digits() -> Images:
    """scikit-learn's 1797 handwritten digits of real people, 8x8 grey, as RGB images."""
    from sklearn.datasets import load_digits as bundled

    data = bundled()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # stored as 0..16

    def open_digit(index: int) -> Image.Image:
        return Image.fromarray(pixels[index]).convert("RGB")

    return Images(list(range(len(pixels))), data.target.tolist(), [str(digit) for digit in range(10)], open_digit)


def select(images: Images, positions: Sequence[int]) -> Images:
    """Some of the images; opening any other through the result is impossible."""
    chosen = list(positions)

    def read(position: int) -> Picture:
        return images.read(chosen[position])

    order = images.order.select(chosen) if images.order is not None else None
    return Images([images.keys[i] for i in chosen], [images.labels[i] for i in chosen], images.classes, read, order)


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, by suffix, sorted; hidden files and folders left out."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
        found += [Path(base) / name for name in names]
    return sorted(found)


def class_folders(folder: Path) -> list[str]:
    """The sub-folders that are classes, sorted. Raises `UserError` unless there are at least two, none empty."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(
            f"{folder} has no class folders; put the images in {folder}/CLASS/*.jpg, "
            f"or in {folder}/train/CLASS and {folder}/val/CLASS"
        )
    if len(names) == 1:
        raise UserError(
            f"{folder} has one class only ({names[0]}); classification needs at least two: add another folder"
        )
    return names


def folder_images(folder: Path, root: Path, classes: list[str]) -> Images:
    """The images of FOLDER/CLASS/*; keys are paths relative to `root`."""
    keys: list[Key] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = image_files(folder / name) if (folder / name).is_dir() else []
        keys += [file.relative_to(root).as_posix() for file in files]
        labels += [label] * len(files)
    return from_files(root, keys, labels, classes)


def from_files(root: Path, keys: list[Key], labels: Sequence[Label], classes: list[str]) -> Images:
    """Images that are files below `root`."""
    return Images(keys, labels, classes, lambda position: read_image(root / str(keys[position])))


def read_folder(path: str | os.PathLike[str]) -> Path:
    """The path as a folder. Raises `UserError` where it is none."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"there is no data at {folder}; give a folder of images, or digits for the bundled set")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with one sub-folder of images for each class")
    return folder


def folder_parts(path: str) -> dict[str, Images]:
    """FOLDER/{train,val[,test]}/CLASS/*, or FOLDER/CLASS/* as "all".

    Raises `UserError` naming a class without images, or one that train does not have.
    """
    root = read_folder(path)
    if (root / "train").is_dir():
        parts = _given_parts(root)
        refuse_empty_classes(str(root), parts["train"])
        return parts
    whole = folder_images(root, root, class_folders(root))
    refuse_empty_classes(str(root), whole)
    return {"all": whole}


def folder_part(path: str, split: str | None) -> tuple[Images, str]:
    """The images of FOLDER/{test,val,train}/CLASS/*, by default of the first of these, or of FOLDER/CLASS/* as "all",
    with the part's name. Raises `UserError` where there is no such folder."""
    root = read_folder(path)
    present = [name for name in ("test", "val", "train") if (root / name).is_dir()]
    if split is not None and split not in present:
        raise UserError(f"{root} has no folder {split}; leave --split out, or give the folder of classes itself")
    chosen = split or (present[0] if "train" in present or len(present) == 2 else None)
    folder = root / chosen if chosen else root
    images = folder_images(folder, folder, class_folders(folder))
    if not len(images):
        raise UserError(f"{folder} has no images in its class folders; add some or give another folder")
    return images, chosen or "all"


def _given_parts(root: Path) -> dict[str, Images]:
    """FOLDER/train, FOLDER/val and, if there, FOLDER/test, with the classes of train."""
    if not (root / "val").is_dir():
        raise UserError(
            f"{root} has train but no val; add {root}/val/CLASS, or give --data {root / 'train'} to have it split"
        )
    classes = class_folders(root / "train")
    parts = {}
    for name in PARTS:
        folder = root / name
        if not folder.is_dir():
            continue
        for other in sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if other not in classes:
                raise UserError(
                    f"{folder / other} is a class that {root / 'train'} does not have{nearest(other, classes)}; "
                    "rename or remove it"
                )
        parts[name] = folder_images(folder, root, classes)
        if not len(parts[name]):
            raise UserError(f"{folder} has no images in its class folders; add some or remove the folder")
    return parts


def refuse_empty_classes(data: str, images: Images) -> None:
    """Raise `UserError` where a class has no images in its folder."""
    if not len(images):
        raise UserError(f"{data} has no images ({', '.join(sorted(SUFFIXES))}) in its class folders; add some")
    if empty := empty_classes(images):
        raise UserError(f"{data}: the class {empty[0]!r} has no images; add some or remove its folder")


def empty_classes(images: Images) -> list[str]:
    """The classes that no image is of."""
    present = {one for label in images.labels for one in (label if isinstance(label, list) else [label])}
    return [name for label, name in enumerate(images.classes) if label not in present]


def write_held_out(images: Images, folder: Path) -> None:
    """The images as FOLDER/CLASS/KEY.png, so that commands that take files have real ones to read."""
    for position, key in enumerate(images.keys):
        image = images.open(position)
        label = images.labels[position]
        assert isinstance(label, int)
        path = folder / images.classes[label] / f"{key}.png"

        def save(partial: Path, image: Image.Image = image) -> None:
            image.save(partial, format="PNG")

        atomic_write(path, save)
