"""COCO's JSON: images, categories by any ids, and annotations with boxes, polygons or run lengths."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from muntin.data.annotated import WHOLE, Annotated
from muntin.data.images import BadImage, upright_size
from muntin.data.objects import Objects, Outlines, Rows, clipped, mask_box
from muntin.data.problems import Problems
from muntin.data.rle import run_lengths
from muntin.errors import UserError, nearest

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ROBOFLOW = "_annotations.coco.json"
TRIED = 20  # images that are looked for where an image folder might be


def coco_files(root: Path) -> dict[str, Path]:
    """The JSON files below a folder by part, or the file itself as "all"; empty where there are none.

    Raises `UserError` where two files are for one part.
    """
    if root.is_file():
        return {WHOLE: root}
    for pattern in ("annotations/instances_*.json", f"*/{ROBOFLOW}", "*.json", "annotations/*.json"):
        paths = sorted(path for path in root.glob(pattern) if path.name != "classes.json")
        named = [(_part(path), path) for path in paths]
        parts = dict(reversed([(part, path) for part, path in named if part != WHOLE]))
        if not parts and len(paths) == 1:
            return {WHOLE: paths[0]}
        for part, path in named:
            if part in parts and parts[part] != path:
                raise UserError(f"{root} has {parts[part].name} and {path.name} for {part}; keep one of them there")
        if parts:
            return {name: parts[name] for name in ("train", "val", "test") if name in parts}
    return {}


def _part(path: Path) -> str:
    """By the file's name, as in instances_train2017.json and val.json, or by its folder's: valid/_annotations..."""
    name = path.parent.name if path.name == ROBOFLOW else path.stem.removeprefix("instances_")
    match = re.match(r"(train|validation|valid|val|test)(?![a-z])", name)
    return PARTS[match[1]] if match else WHOLE


def coco_parts(root: Path, files: Mapping[str, Path], task: str, problems: Problems) -> dict[str, Annotated]:
    """Images with objects by part, of classes in the order of the first file's category ids.

    task: "instance" also reads masks. Raises `UserError` where a file is not COCO's.
    """
    parts: dict[str, Annotated] = {}
    classes: list[str] = []
    for part, path in files.items():
        document = _load(path)
        folder = _image_folder(root, path, part, document["images"])
        reader = _Reader(path, folder, task == "instance", problems)
        names = reader.categories(document["categories"])
        classes = classes or list(names.values())
        unknown = next((f"{i} ({name!r})" for i, name in names.items() if name not in classes), None)
        if unknown is not None:
            raise UserError(f"{path}: category {unknown} is not among those of {next(iter(files.values())).name}"
                            f"{nearest(unknown, classes)}; give all parts the same categories")  # fmt: skip
        numbers = {identity: classes.index(name) for identity, name in names.items()}
        parts[part] = reader.objects(document, classes, numbers)
    return parts


def has_masks(files: Mapping[str, Path]) -> bool:
    """Whether the annotations of the first file have outlines."""
    annotations = _load(next(iter(files.values())))["annotations"]
    return any(isinstance(one, dict) and one.get("segmentation") for one in annotations)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give COCO's JSON, or write the file again") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise UserError(f"{path} has no list {name!r}; give COCO's JSON with images, annotations and categories")
    return document


def _image_folder(root: Path, path: Path, part: str, images: list[Any]) -> Path:
    """The folder that has the first images; where none has, the first folder that could."""
    base = path.parent if root.is_file() else root
    suffix = path.stem.removeprefix("instances_")
    wanted = [path.parent, base / "images", base] if path.name == ROBOFLOW or root.is_file() else [
        base / suffix, base / "images" / suffix, base / part, base / "images" / part, base / "images", base,
        path.parent,
    ]  # fmt: skip
    folders = [folder for folder in dict.fromkeys(wanted) if folder.is_dir()]
    names = [str(image["file_name"]) for image in images[:TRIED] if isinstance(image, dict) and "file_name" in image]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))  # the first of equals


@dataclass
class _Image:
    position: int
    width: int
    height: int


@dataclass
class _Reader:
    """One file: what can be used of it, and the problems of the rest."""

    path: Path
    folder: Path
    outlines: bool
    problems: Problems
    _listed: dict[Path, set[str]] = field(default_factory=dict)

    def wrong(self, item: str, what: str) -> None:
        self.problems.add(self.path, item, what)

    def categories(self, categories: list[Any]) -> dict[Any, str]:
        """Names by id, in the order of the ids."""
        names: dict[Any, str] = {}
        for category in categories:
            if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
                self.wrong(f"category {category}", "has no whole number as id, or no name")
            elif category["id"] in names:
                self.wrong(f"category {category['id']}", f"is there twice, as {names[category['id']]!r} and "
                           f"{category['name']!r}")  # fmt: skip
            elif str(category["name"]) in names.values():
                self.wrong(f"category {category['id']}", f"has the name of another one, {category['name']!r}")
            else:
                names[category["id"]] = str(category["name"])
        if not names:
            raise UserError(f"{self.path} has no categories; add one for each class, with an id and a name")
        names = dict(sorted(names.items()))
        if len(names) != max(names) - min(names) + 1:
            self.problems.note(f"{self.path}: the {len(names)} category ids have gaps ({min(names)} to {max(names)})")
        return names

    def objects(self, document: dict[str, Any], classes: list[str], numbers: dict[Any, int]) -> Objects:
        """The images and annotations that can be used."""
        images, files, left_out = self._images(document["images"])
        found: dict[str, list[Any]] = {name: [] for name in ("image", "box", "label", "crowd", "area", "shape", "id")}
        seen: set[Any] = set()
        sticking = 0
        for annotation in document["annotations"]:
            item = self._identity(annotation, seen)
            if item is None or annotation.get("image_id") in left_out:
                continue
            image = images.get(annotation.get("image_id"))
            if image is None:
                self.wrong(item, f"is on image {annotation.get('image_id')}, which is not among the images")
                continue
            if annotation.get("category_id") not in numbers:
                self.wrong(item, f"is of category {annotation.get('category_id')}, which is not among the categories")
                continue
            shape = self._shape(item, annotation, image)
            if shape is None:
                continue
            box, what, sticks = clipped(_box(annotation, shape, image), image.width, image.height)
            if what:
                self.wrong(item, f"its box {annotation.get('bbox')} {what}")
                continue
            sticking += sticks
            area = annotation.get("area")
            found["image"].append(image.position)
            found["box"].append(box)
            found["label"].append(numbers[annotation["category_id"]])
            found["crowd"].append(bool(annotation.get("iscrowd", 0)))
            found["area"].append(area if isinstance(area, int | float) else np.prod(box[2:] - box[:2]))
            found["shape"].append(shape)
            found["id"].append(annotation["id"])
        if sticking:
            self.problems.note(f"{self.path}: {sticking} boxes reach over the image's borders, where they are cut off")
        return self._packed(classes, images, files, found)

    def _images(self, records: list[Any]) -> tuple[dict[Any, _Image], list[str], set[Any]]:
        """Images by id, their files, and the ids of those that cannot be used."""
        images: dict[Any, _Image] = {}
        files: list[str] = []
        left_out: set[Any] = set()
        for record in records:
            if not isinstance(record, dict) or "id" not in record or not record.get("file_name"):
                self.wrong(f"image {record}", "has no id or no file_name")
                continue
            identity, file = record["id"], str(record["file_name"])
            if identity in images or identity in left_out:
                self.wrong(f"image {identity}", f"is there twice, the second time as {file}")
                continue
            if not self._exists(file):
                self.wrong(f"image {identity}", f"{self.folder / file} does not exist")
                left_out.add(identity)
                continue
            size = self._size(identity, record, file)
            if size is None:
                left_out.add(identity)
                continue
            images[identity] = _Image(len(files), *size)
            files.append(file)
        twice = [file for file, count in Counter(files).items() if count > 1]
        if twice:
            self.problems.note(f"{self.path}: {twice[0]} belongs to several images")
        return images, files, left_out

    def _exists(self, file: str) -> bool:
        """By the listing of its folder: one look at each file would take minutes over a network."""
        path = self.folder / file
        if path.parent not in self._listed:
            self._listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in self._listed[path.parent]

    def _size(self, identity: Any, record: dict[str, Any], file: str) -> tuple[int, int] | None:
        """Width and height as declared; where they are not, the file's own."""
        width, height = record.get("width"), record.get("height")
        if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            return width, height
        try:
            return upright_size(self.folder / file)
        except BadImage as error:
            self.wrong(f"image {identity}", str(error))
            return None

    def _identity(self, annotation: Any, seen: set[Any]) -> str | None:
        """What messages call an annotation; None for one that cannot be used."""
        if not isinstance(annotation, dict) or "id" not in annotation:
            self.wrong(f"annotation {annotation}", "has no id")
            return None
        if annotation["id"] in seen:
            self.wrong(f"annotation {annotation['id']}", "is there twice; give each an id of its own")
            return None
        seen.add(annotation["id"])
        return f"annotation {annotation['id']}"

    def _shape(self, item: str, annotation: dict[str, Any], image: _Image) -> np.ndarray | None:
        """The outline as `Outlines` has it, empty where it is not asked for; None where it cannot be used."""
        given = annotation.get("segmentation")
        if not self.outlines and annotation.get("bbox"):
            return np.zeros(0)
        if not given:
            wanted = "segmentation; give --task detect" if self.outlines else "bbox and no segmentation"
            self.wrong(item, f"has no {wanted}")
            return None
        if isinstance(given, dict):
            return self._runs(item, given, image)
        polygons = []
        for number, polygon in enumerate(given, start=1):
            try:
                values = np.asarray(polygon, np.float64)
            except (TypeError, ValueError):
                values = np.full(1, np.nan)
            if values.ndim != 1 or len(values) % 2 or not np.isfinite(values).all():
                self.wrong(item, f"its polygon {number} is not a list of numbers x1, y1, x2, y2, ...")
                return None
            if len(values) < 6:
                self.wrong(item, f"its polygon {number} has {len(values) // 2} points; three are the least")
                return None
            polygons.append(values)
        return Outlines.polygons(polygons)

    def _runs(self, item: str, given: dict[str, Any], image: _Image) -> np.ndarray | None:
        """Run lengths, compressed or not."""
        if given.get("size") != [image.height, image.width]:
            self.wrong(item, f"its mask is of height and width {given.get('size')}, its image of "
                       f"{[image.height, image.width]}")  # fmt: skip
            return None
        try:
            return Outlines.runs(run_lengths(given))
        except (UserError, KeyError, TypeError, ValueError) as error:
            self.wrong(item, f"its mask cannot be read ({error})")
            return None

    def _packed(
        self, classes: list[str], images: dict[Any, _Image], files: list[str], found: dict[str, list[Any]]
    ) -> Objects:
        """Rows in the order of the images."""
        counts = np.bincount(np.asarray(found["image"], np.int64), minlength=len(files))
        order = np.argsort(np.asarray(found["image"], np.int64), kind="stable")
        if empty := int((counts == 0).sum()):
            self.problems.note(
                f"{self.path}: {empty} of {len(files)} images have no objects; they are kept as negatives"
            )
        rows = Rows(
            np.asarray(found["box"], np.float64).reshape(-1, 4),
            np.asarray(found["label"], np.int64),
            np.asarray(found["crowd"], bool),
            np.asarray(found["area"], np.float64),
            np.asarray(found["id"]),
        )
        sizes = np.asarray([(image.width, image.height) for image in images.values()], np.int64).reshape(-1, 2)
        first = np.concatenate([[0], counts.cumsum()])
        shapes = Outlines.of(found["shape"]).select(order) if self.outlines else None
        return Objects(classes, self.folder, files, sizes, first, rows.select(order), shapes)


def _box(annotation: dict[str, Any], shape: np.ndarray, image: _Image) -> np.ndarray:
    """x1 y1 x2 y2, from the outline where no box is given; not a number where it is none."""
    given = annotation.get("bbox")
    if given:
        try:
            left, top, width, height = (float(value) for value in given)
        except (TypeError, ValueError):
            return np.full(4, np.nan)
        return np.array([left, top, left + width, top + height])
    outline = Outlines.of([shape])
    if shape[0] >= 0:
        points = np.concatenate(outline.coco(0, image.height, image.width)).reshape(-1, 2)
        return np.concatenate([points.min(0), points.max(0)])
    return mask_box(outline.masks(range(1), image.height, image.width)[0])
