"""Pascal VOC's folders.

detect    Annotations/*.xml: boxes; difficult ones count as crowds. Lists of the parts in ImageSets/Main
instance  SegmentationObject/*.png: an object for each value, 255 says nothing; its class is what most of its pixels
          have in SegmentationClass. Lists in ImageSets/Segmentation
segment   SegmentationClass/*.png: a class for each pixel, 0 is background and 255 says nothing; the same lists

Images are in JPEGImages, whatever their format. Without lists all that has annotations is taken.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from muntin.data.annotated import IGNORE, WHOLE, Annotated
from muntin.data.datasets import image_files
from muntin.data.images import BadImage, upright_size
from muntin.data.label_maps import LabelMaps, class_names, class_numbers, read_indices, read_palette
from muntin.data.objects import Objects, Outlines, Rows, clipped, mask_box
from muntin.data.problems import Problems
from muntin.data.rle import encode_rle, run_lengths
from muntin.errors import UserError
from muntin.progress import progress

BACKGROUND = "background"
NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
FOLDERS = {"detect": ("Annotations", ".xml"), "instance": ("SegmentationObject", ".png"),
           "segment": ("SegmentationClass", ".png")}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What is on one image: a row for each object."""

    size: tuple[int, int]  # width and height
    names: list[str]
    boxes: list[np.ndarray]
    crowd: list[bool]
    area: list[float]
    ids: list[int]  # numbers in XML, values in SegmentationObject
    shapes: list[np.ndarray]  # as `Outlines` has them; none for boxes alone


def voc_parts(root: Path, task: str, problems: Problems) -> dict[str, Annotated]:
    """Images with what is on them by part. Raises `UserError` where the task's folder is not there."""
    folder, suffix = FOLDERS[task]
    if not (root / folder).is_dir() or not (root / "JPEGImages").is_dir():
        raise UserError(f"{root} has no {folder} or no JPEGImages, which Pascal VOC has for {task}; give a folder with "
                        "both, or another --task")  # fmt: skip
    images = root / "JPEGImages"
    paths = [path.relative_to(images) for path in image_files(images)]
    files = {path.with_suffix("").as_posix(): path.as_posix() for path in paths}
    parts = {
        part: [stem for stem in stems if _is_there(root, stem, files, root / folder / f"{stem}{suffix}", problems)]
        for part, stems in _lists(root, task, folder, suffix).items()
    }
    if task == "segment":
        return _label_maps(root, parts, files)
    names = class_names(root) or ([BACKGROUND, *NAMES] if task == "instance" else [])
    read = partial(_boxes if task == "detect" else _instances, root, names, problems)
    found = {part: _read(read, {stem: files[stem] for stem in stems}) for part, stems in parts.items()}
    used = {name for some in found.values() for one in some.values() for name in one.names}
    classes = [name for name in names if name != BACKGROUND] or (NAMES if used <= set(NAMES) else sorted(used))
    return {part: _objects(root, some, files, classes, task) for part, some in found.items()}


def _lists(root: Path, task: str, folder: str, suffix: str) -> dict[str, list[str]]:
    """Names without suffix by part; trainval is train where that is not listed by itself."""
    lists = root / "ImageSets" / ("Main" if task == "detect" else "Segmentation")
    found: dict[str, list[str]] = {}
    for part, name in (("train", "train"), ("val", "val"), ("test", "test"), ("train", "trainval")):
        path = lists / f"{name}.txt"
        if path.is_file() and (name != "trainval" or not {"train", "val"} & set(found)):
            lines = path.read_text(encoding="utf-8").splitlines()
            found[part] = [line.split()[0] for line in lines if line.strip()]
    return found or {WHOLE: sorted(path.stem for path in (root / folder).glob(f"*{suffix}"))}


def _is_there(root: Path, stem: str, files: dict[str, str], annotation: Path, problems: Problems) -> bool:
    if stem not in files:
        problems.add(annotation, "", f"its image {root / 'JPEGImages' / stem}.jpg does not exist")
    elif not annotation.is_file():
        problems.add(root / "JPEGImages" / files[stem], "", f"has no {annotation}")
    return stem in files and annotation.is_file()


def _label_maps(root: Path, parts: dict[str, list[str]], files: dict[str, str]) -> dict[str, Annotated]:
    classes = class_names(root) or [BACKGROUND, *NAMES]
    numbers, labels = class_numbers(len(classes)), root / "SegmentationClass"
    first = next((stem for stems in parts.values() for stem in stems), None)
    palette = read_palette(labels / f"{first}.png", numbers, len(classes)) if first else None
    return {
        part: LabelMaps(
            classes, palette, root / "JPEGImages", labels, [(files[stem], f"{stem}.png") for stem in stems], numbers
        )
        for part, stems in parts.items()
    }


def _read(read: Callable[[str, str], Found | None], files: dict[str, str]) -> dict[str, Found]:
    """What is on each image that can be used, by the name without suffix."""
    with ThreadPoolExecutor() as pool:
        results: Iterator[Found | None] = progress(
            pool.map(read, files, files.values()), len(files), "reading annotations"
        )
        return {stem: one for stem, one in zip(files, results, strict=True) if one is not None}


def _boxes(root: Path, names: list[str], problems: Problems, stem: str, file: str) -> Found | None:
    """Of one XML file, with objects of these classes, or of any.

    Coordinates count from 1, and the last pixel is inside.
    """
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        size = _declared(tree) or upright_size(root / "JPEGImages" / file)
    except (ElementTree.ParseError, OSError, BadImage) as error:
        problems.add(path, "", f"cannot be read ({error})")
        return None
    found = Found(size, [], [], [], [], [], [])
    for number, element in enumerate(tree.iterfind("object"), start=1):
        name = (element.findtext("name") or "").strip()
        item = f"object {number} ({name})" if name else f"object {number}"
        try:
            sides = [float(element.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            sides = [float("nan")] * 4
        box, what, _ = clipped(np.array(sides) - [1, 1, 0, 0], *size)
        what = f"its box {sides} {what}" if what else ""
        if not name or (names and name not in names):
            what = f"is not of the classes in {root / 'classes.txt'}" if name else "has no name"
        if what:
            problems.add(path, item, what)
            continue
        found.names.append(name)
        found.ids.append(number)
        found.boxes.append(box)
        found.crowd.append(element.findtext("difficult", "0").strip() == "1")
        found.area.append(float((box[2:] - box[:2]).prod()))
    return found


def _declared(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height, where the file says them."""
    width, height = (tree.findtext(f"size/{side}", "").strip() for side in ("width", "height"))
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) * int(height) else None


def _instances(root: Path, names: list[str], problems: Problems, stem: str, file: str) -> Found | None:
    """Of one pair of PNGs."""
    path = root / "SegmentationObject" / f"{stem}.png"
    try:
        objects, classes = read_indices(path), read_indices(root / "SegmentationClass" / f"{stem}.png")
    except BadImage as error:
        problems.add(path, "", str(error))
        return None
    if objects.shape != classes.shape:
        problems.add(path, "", f"is of another size than {root / 'SegmentationClass' / path.name}")
        return None
    height, width = objects.shape
    found = Found((width, height), [], [], [], [], [], [])
    for value in np.unique(objects[(objects != 0) & (objects != IGNORE)]).tolist():
        mask = objects == value
        box = mask_box(mask)
        left, top, right, bottom = box.astype(int)
        number = int(np.bincount(classes[mask]).argmax())
        if not 0 < number < len(names):
            problems.add(path, f"object {value}", f"most of its pixels have the class {number}; valid are 1 to "
                         f"{len(names) - 1}")  # fmt: skip
            continue
        found.names.append(names[number])
        found.ids.append(value)
        found.boxes.append(box)
        found.crowd.append(False)
        found.area.append(float(mask.sum()))
        runs = encode_rle(mask[top:bottom, left:right], (top, left), (height, width))
        found.shapes.append(Outlines.runs(run_lengths(runs)))
    return found


def _objects(root: Path, found: dict[str, Found], files: dict[str, str], classes: list[str], task: str) -> Objects:
    """A part's images with their objects."""
    numbers = {name: number for number, name in enumerate(classes)}
    rows = Rows(
        np.array([box for one in found.values() for box in one.boxes]).reshape(-1, 4),
        np.array([numbers[name] for one in found.values() for name in one.names], np.int64),
        np.array([crowd for one in found.values() for crowd in one.crowd], bool),
        np.array([area for one in found.values() for area in one.area], np.float64),
        np.array([number for one in found.values() for number in one.ids], np.int64),
    )
    return Objects(
        classes,
        root / "JPEGImages",
        [files[stem] for stem in found],
        np.array([one.size for one in found.values()], np.int64).reshape(-1, 2),
        np.concatenate([[0], np.cumsum([len(one.names) for one in found.values()], dtype=np.int64)]),
        rows,
        Outlines.of([shape for one in found.values() for shape in one.shapes]) if task == "instance" else None,
    )
