"""Images with index masks: a folder of images and one of PNGs that hold each pixel's class.

ADE20K     images/{training,validation}, annotations/{training,validation}: 0 says nothing, classes are 1 to 150
any other  images/{train,val,test} and {masks,labels,annotations}/{train,val,test}, or without parts; 255 says nothing

An image and its mask share a name up to the suffix. Class names are the lines of classes.txt, a list in classes.json,
or for ADE20K the names in objectInfo150.txt; where there is none of these, the numbers that the masks hold.
"""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from muntin.data.annotated import IGNORE, WHOLE, Annotated, digest_of
from muntin.data.datasets import image_files
from muntin.data.decode import read_image
from muntin.data.images import BadImage, decoding, upright_size
from muntin.data.problems import Problems
from muntin.errors import UserError
from muntin.progress import progress

MASKS = ("masks", "labels", "annotations")  # folders beside images, the first that has PNGs
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNKNOWN = 254  # among classes: a mask's value that is none
ADE_CLASSES = 150
ADE_NAMES = "objectInfo150.txt"


@dataclass(frozen=True)
class LabelMaps(Annotated):
    """Pairs of an image and a mask. `numbers`: the class of each value that a mask may hold, 255 for none, 254 for a
    value that is not known."""

    classes: list[str]
    palette: list[tuple[int, int, int]] | None
    images: Path
    labels: Path
    pairs: list[tuple[str, str]]  # relative to these folders
    numbers: np.ndarray  # (256,) uint8

    @property
    def masks(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, position: int) -> str:
        return self.pairs[position][0]

    def picture(self, position: int) -> Image.Image:
        return read_image(self.images / self.pairs[position][0]).image()

    def target(self, position: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        return {"labels": tv_tensors.Mask(torch.from_numpy(self.label_map(position)))}

    def label_map(self, position: int) -> np.ndarray:
        """(H, W) uint8, the class of each pixel; 255 where nothing is said."""
        image, label = self.images / self.pairs[position][0], self.labels / self.pairs[position][1]
        values = read_indices(label)
        height, width = values.shape
        size = upright_size(image)
        if size != (width, height):
            raise BadImage(f"{label} is {width}x{height}, and its image {image} {size[0]}x{size[1]} when upright; "
                           "give both the same size")  # fmt: skip
        found = self.numbers[values]
        if (found == UNKNOWN).any():
            wrong = sorted(np.unique(values[found == UNKNOWN]).tolist())
            raise BadImage(f"{label} has the labels {', '.join(map(str, wrong[:5]))}, but there are "
                           f"{len(self.classes)} classes; add their names to classes.txt, or make them {IGNORE} "
                           "(ignored)")  # fmt: skip
        return found

    def select(self, positions: Sequence[int]) -> "LabelMaps":
        return replace(self, pairs=[self.pairs[i] for i in positions])

    def digest(self) -> str:
        """Masks by their files' sizes in bytes: reading those of ADE20K would take half a minute."""
        sizes = [(self.labels / label).stat().st_size for _, label in self.pairs]
        return digest_of(self.pairs, sizes, self.classes)

    def coco(self) -> dict[str, Any]:
        raise TypeError("label maps are no ground truth for COCO's metrics")


def class_numbers(count: int, first: int = 0) -> np.ndarray:
    """(256,) uint8: the class of each value of a mask, where class 0 is `first` and what is below says nothing."""
    numbers = np.full(256, UNKNOWN, np.uint8)
    numbers[:first] = IGNORE
    numbers[first : first + count] = np.arange(count)
    numbers[IGNORE] = IGNORE
    return numbers


def read_indices(path: Path) -> np.ndarray:
    """(H, W) uint8, the values of a mask's pixels. Raises `BadImage` where it holds colours or cannot be read."""
    with decoding(str(path)), Image.open(path) as image:
        if image.mode in ("P", "L"):
            return np.array(image)
        values = np.array(image)
    if values.ndim == 3:
        values = values[..., 0] if (values[..., :1] == values[..., :3]).all() else values
    if values.ndim != 2 or values.min() < 0 or values.max() > IGNORE:
        raise BadImage(
            f"{path} holds colours or values above 255 ({image.mode}), not a class for each pixel; convert it to a PNG "
            "in grey or with a palette, whose values are the classes"
        )
    return values.astype(np.uint8)


def read_palette(path: Path, numbers: np.ndarray, count: int) -> list[tuple[int, int, int]] | None:
    """The colour of each class, where the mask has a palette. One that cannot be read shows itself later."""
    try:
        with decoding(str(path)), Image.open(path) as image:
            flat = image.getpalette() if image.mode == "P" else None
    except BadImage:
        return None
    if flat is None:
        return None
    colours = [*zip(flat[0::3], flat[1::3], flat[2::3], strict=True)]
    values = [int(np.flatnonzero(numbers == label)[0]) for label in range(count)]
    return [colours[value] if value < len(colours) else (0, 0, 0) for value in values]


def has_label_maps(root: Path) -> bool:
    """Whether a folder has images, and masks beside them."""
    return root.is_dir() and (root / "images").is_dir() and _masks_folder(root) is not None


def _masks_folder(root: Path) -> Path | None:
    folders = (root / name for name in MASKS)
    return next((folder for folder in folders if next(folder.rglob("*.png"), None) is not None), None)


def label_map_parts(root: Path, problems: Problems) -> dict[str, Annotated]:
    """Pairs of images and masks by part."""
    images, labels = root / "images", _masks_folder(root)
    assert labels is not None
    ade = (images / "training").is_dir()
    given = {PARTS[p.name]: p.name for p in sorted(images.iterdir()) if p.is_dir() and p.name in PARTS}
    folders = {part: (images / name, labels / name) for part, name in given.items()} or {WHOLE: (images, labels)}
    pairs = {part: pair_up(*both, problems) for part, both in folders.items()}
    first = next(part for part in ("train", WHOLE, *pairs) if part in pairs)
    masks = [folders[first][1] / label for _, label in pairs[first]]
    classes = class_names(root) or (_ade_names(root) if ade else _numbered(masks))
    numbers = class_numbers(len(classes), first=1 if ade else 0)
    palette = read_palette(masks[0], numbers, len(classes)) if masks else None
    order = [part for part in ("train", "val", "test", WHOLE) if part in pairs]
    return {part: LabelMaps(classes, palette, *folders[part], pairs[part], numbers) for part in order}


def pair_up(images: Path, labels: Path, problems: Problems) -> list[tuple[str, str]]:
    """Images and masks of the same name up to the suffix, relative to these folders."""
    masks: dict[str, str] = {}
    for path in sorted(labels.rglob("*.png")):
        masks[path.relative_to(labels).with_suffix("").as_posix()] = path.relative_to(labels).as_posix()
    pairs = []
    for path in image_files(images):
        name = path.relative_to(images)
        mask = masks.pop(name.with_suffix("").as_posix(), None)
        if mask is None:
            problems.add(path, "", f"has no mask {labels / name.with_suffix('.png')}")
        else:
            pairs.append((name.as_posix(), mask))
    for mask in masks.values():
        problems.add(labels / mask, "", f"has no image of this name in {images}")
    return pairs


def class_names(root: Path) -> list[str] | None:
    """The lines of classes.txt, or the list in classes.json."""
    text, listed = root / "classes.txt", root / "classes.json"
    if text.is_file():
        names = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        path = text
    elif listed.is_file():
        path = listed
        try:
            names = json.loads(listed.read_bytes())
        except ValueError as error:
            raise UserError(f"cannot read {listed} ({error}); give a list of names") from error
    else:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not 0 < len(names) < UNKNOWN:
        raise UserError(f"{path} has no list of 1 to {UNKNOWN - 1} names; give one for each class, from 0 on")
    return names


def _ade_names(root: Path) -> list[str]:
    """The first of the names in each line of objectInfo150.txt; numbers from 1 on without it."""
    path = root / ADE_NAMES
    if not path.is_file():
        return [str(number) for number in range(1, ADE_CLASSES + 1)]
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    found = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if re.fullmatch(r"\d+", row[0].strip())}
    if sorted(found) != list(range(1, ADE_CLASSES + 1)):
        raise UserError(f"{path} does not name the classes 1 to {ADE_CLASSES}; restore the file, or remove it")
    return [found[number] for number in sorted(found)]


def _numbered(masks: list[Path]) -> list[str]:
    """As many classes as the masks have values, by number. Masks that cannot be read show themselves later."""

    def largest(path: Path) -> int:
        try:
            values = read_indices(path)
        except BadImage:
            return 0
        return int(values[values < UNKNOWN].max(initial=0))

    with ThreadPoolExecutor() as pool:
        found: Iterator[int] = progress(pool.map(largest, masks), len(masks), "looking for classes")
        return [str(number) for number in range(max(found, default=0) + 1)]
