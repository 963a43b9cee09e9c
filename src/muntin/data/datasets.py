"""Labelled images and their splits: the bundled digits, and folders of images.

A data set's images are named by keys, an index (digits) or a path relative to the folder. A split is three
lists of keys; it is made once, written to split.json, and read from there ever after.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from muntin.data.decode import Encoded, Picture, read_image
from muntin.data.images import SUFFIXES, BadImage, check_image, read_bytes
from muntin.errors import UserError, nearest
from muntin.progress import progress
from muntin.run import atomic_write

Key = int | str
PARTS = ("train", "val", "test")
VAL, TEST = 0.1, 0.2  # of all images, where the data set has no splits of its own


@dataclass(frozen=True)
class Images:
    """Labelled images: keys, labels (indices into `classes`), and how to read one, encoded or as upright RGB."""

    keys: list[Key]
    labels: list[int]
    classes: list[str]
    read: Callable[[int], Picture]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, position: int) -> Image.Image:
        """One image as upright RGB."""
        found = self.read(position)
        return found.image() if isinstance(found, Encoded) else found


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one data set. `test` is None where a folder has train and val alone.

    `plain_resize` says that the images are no larger than the model's input: nothing is cropped then.
    """

    train: Images
    val: Images
    test: Images | None
    plain_resize: bool

    def __post_init__(self) -> None:
        keys = [key for part in self._parts().values() for key in part.keys]
        if len(set(keys)) != len(keys):
            raise RuntimeError("the splits of a data set overlap")

    def _parts(self) -> dict[str, Images]:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def json(self) -> dict[str, Any]:
        """What split.json holds."""
        return {"classes": self.train.classes} | {name: part.keys for name, part in self._parts().items()}


def stratified(labels: Sequence[int], seed: int) -> dict[str, list[int]]:
    """Positions of train, val and test: the same shares of every class, drawn from `seed`.

    Every class keeps at least one training image; one of two images gives none to val.
    """
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for label in sorted(set(labels)):
        members = np.flatnonzero(np.asarray(labels) == label)
        order = np.random.default_rng((seed, label)).permutation(members)
        # At least one of each where there are three.
        held = min(max(round(len(order) * TEST), 1), len(order) - 1) if len(order) >= 3 else 0
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

    return Images([images.keys[i] for i in chosen], [images.labels[i] for i in chosen], images.classes, read)


def digits_splits(seed: int, size: int) -> Splits:
    """The bundled digits in 70% train, 10% val, 20% test."""
    images = load_digits()
    parts = stratified(images.labels, seed)
    train, val, test = (select(images, parts[name]) for name in PARTS)
    return Splits(train, val, test, plain_resize=size >= 8)


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


def from_files(root: Path, keys: list[Key], labels: list[int], classes: list[str]) -> Images:
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


def folder_splits(path: str, seed: int, size: int, on_bad_image: str) -> Splits:
    """FOLDER/{train,val[,test]}/CLASS/*, or FOLDER/CLASS/* in 70% train, 10% val, 20% test."""
    root = read_folder(path)
    if (root / "train").is_dir():
        parts = _given_parts(root)
    else:
        classes = class_folders(root)
        parts = {"all": folder_images(root, root, classes)}
    learned = "train" if "train" in parts else "all"
    _refuse_empty_classes(root, parts[learned])
    parts, sides = _readable(root, parts, on_bad_image)
    _refuse_empty_classes(root, parts[learned])
    if "all" in parts:
        whole = parts.pop("all")
        positions = stratified(whole.labels, seed)
        parts = {name: select(whole, positions[name]) for name in PARTS}
    if not len(parts["val"]):
        raise UserError(
            f"{root} has too few images to set some aside for validation ({len(parts['train'])} in "
            f"{len(parts['train'].classes)} classes); add images so that a class has at least three"
        )
    test = parts.get("test")
    return Splits(parts["train"], parts["val"], test if test is not None and len(test) else None, median(sides) <= size)


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


def _refuse_empty_classes(root: Path, images: Images) -> None:
    if not len(images):
        raise UserError(f"{root} has no images ({', '.join(sorted(SUFFIXES))}) in its class folders; add some")
    present = set(images.labels)
    empty = [name for label, name in enumerate(images.classes) if label not in present]
    if empty:
        raise UserError(f"{root}: the class {empty[0]!r} has no images; add some or remove its folder")


def _readable(root: Path, parts: dict[str, Images], on_bad_image: str) -> tuple[dict[str, Images], list[int]]:
    """The parts without broken images (or a `UserError` that names them), and all shorter sides."""
    keys = [key for part in parts.values() for key in part.keys]
    found = check_files([root / str(key) for key in keys])
    bad = {key: error for key, error in zip(keys, found, strict=True) if isinstance(error, BadImage)}
    if bad and on_bad_image == "error":
        shown = "; ".join(str(error) for error in list(bad.values())[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{len(bad)} of {len(keys)} images cannot be used: {shown}{more}. "
                        "Or leave them out with: --set on_bad_image=skip")  # fmt: skip
    for error in bad.values():
        print(f"left out: {error}", file=sys.stderr)
    kept = {
        name: select(part, [i for i, key in enumerate(part.keys) if key not in bad]) for name, part in parts.items()
    }
    return kept, [side for side in found if isinstance(side, int)]


def check_files(files: Sequence[Path]) -> list[int | BadImage]:
    """Decode every file once, coarsely: its shorter side, or what is wrong with it."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # check_image reports what matters
        return list(progress(pool.map(_check, files), len(files), "checking images"))


def _check(file: Path) -> int | BadImage:
    try:
        return min(check_image(read_bytes(file), str(file)))
    except BadImage as error:
        return error


def splits_from_json(data: str, stored: dict[str, Any], plain_resize: bool) -> Splits:
    """The splits of a run, from its split.json: the same images whatever was added to the folder since."""
    classes: list[str] = stored["classes"]
    if data == "digits":
        whole = load_digits()
        parts = {name: select(whole, stored[name]) for name in PARTS}
    else:
        root = read_folder(data)
        # FOLDER/train/CLASS/* or FOLDER/CLASS/*: no class is called train, or it would be the former.
        level = int(all(str(key).startswith("train/") for key in stored["train"]))
        parts = {name: _stored_part(root, stored[name], classes, level) for name in PARTS if name in stored}
    return Splits(parts["train"], parts["val"], parts.get("test"), plain_resize)


def _stored_part(root: Path, keys: list[Key], classes: list[str], level: int) -> Images:
    labels = []
    for key in keys:
        if not (root / str(key)).is_file():
            raise UserError(
                f"{root / str(key)} is in the run's split.json but not on the disk; put it back, "
                "or give the images to evaluate with --data"
            )
        labels.append(classes.index(Path(str(key)).parts[level]))
    return from_files(root, keys, labels, classes)


def write_held_out(images: Images, folder: Path) -> None:
    """The images as FOLDER/CLASS/KEY.png, so that commands that take files have real ones to read."""
    for position, key in enumerate(images.keys):
        image = images.open(position)
        path = folder / images.classes[images.labels[position]] / f"{key}.png"

        def save(partial: Path, image: Image.Image = image) -> None:
            image.save(partial, format="PNG")

        atomic_write(path, save)
