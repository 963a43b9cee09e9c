"""The built-in set `scenes`: real handwritten digits at random scales on textured backgrounds, as files.

Made once from a seed and kept in Muntin's cache folder, in the forms that everybody's data have: images as PNG, objects
as COCO's JSON, index masks with a palette (0 is the background, digit d is d + 1). The handwriting of one part is in no
other: scikit-learn's digits are split before anything is drawn, as `--data digits` is.
"""

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muntin.data.datasets import Images, load_digits, select, stratified
from muntin.data.indexing import cache_home
from muntin.data.objects import mask_box
from muntin.data.rle import encode_rle
from muntin.data.textures import texture
from muntin.errors import UserError
from muntin.progress import Bar
from muntin.run import atomic_write, write_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 2  # of what is drawn; another number is another folder
SEED = 0
COUNTS = {"train": 1000, "val": 100, "test": 150}
SIDE = 128  # of a scene, in pixels
HEIGHTS = (24, 60)  # of a digit
DIGITS = (6, 14)  # of a scene
OVERLAP = 0.1  # of the smaller of two boxes, at most
ATTEMPTS = 40  # to find a place for a digit, or a colour
CONTRAST = 70  # least difference in brightness, of 255, between a digit and what is behind it
INK = 0.38  # of the darkest: from here on a point of the handwriting is ink
NOISE = 3.0  # standard deviation, of 255
CLASSES = [str(digit) for digit in range(10)]
COLOURS = [(38, 40, 48), (229, 83, 75), (240, 150, 60), (242, 208, 82), (135, 196, 82), (62, 158, 118),
           (80, 196, 210), (72, 122, 220), (144, 96, 212), (222, 104, 184), (172, 124, 92)]  # fmt: skip
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its class, and which pixels show it, (H, W) bool."""

    label: int
    mask: np.ndarray


def scenes_folder() -> Path:
    """The folder of the built-in set, drawn when it is first asked for (in some ten seconds).

    It is there as a whole or not at all; a second process waits for the first.
    """
    folder = cache_home() / f"scenes-{VERSION}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                if not folder.is_dir():
                    write_scenes(folder, COUNTS, SEED)
        except OSError as error:
            raise UserError(
                f"cannot write {folder} ({error.strerror or error}); free some space, or choose another folder with "
                "MUNTIN_HOME"
            ) from error
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; what one that was killed has left is removed."""
    if fcntl is None:
        yield
        return
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        for partial in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(partial)
        yield


def write_scenes(folder: Path, counts: Mapping[str, int], seed: int) -> None:
    """Write so many scenes for each part; the same seed gives the same bytes. `folder` is there as a whole or not."""
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    handwriting = load_digits()
    positions = stratified(handwriting.labels, seed)
    try:
        with Bar("drawing scenes", sum(counts.values())) as bar:
            for number, (part, count) in enumerate(counts.items()):
                glyphs = select(handwriting, positions[part])
                _write_part(partial, part, glyphs, [(seed, number, i) for i in range(count)], bar)
        atomic_write(partial / "classes.txt", "\n".join(["background", *CLASSES, ""]).encode())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_part(folder: Path, part: str, glyphs: Images, seeds: list[tuple[int, int, int]], bar: Bar) -> None:
    """images/PART/*.png, masks/PART/*.png and annotations/instances_PART.json."""
    for kind in ("images", "masks"):
        (folder / kind / part).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        picture, digits = draw_scene(glyphs, np.random.default_rng(seed))
        name = f"{number:04}.png"
        Image.fromarray(picture).save(folder / "images" / part / name)
        _index_mask(digits).save(folder / "masks" / part / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for digit in digits:
            left, top, right, bottom = mask_box(digit.mask)
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": digit.label + 1, "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top], "area": int(digit.mask.sum()),
                "segmentation": encode_rle(digit.mask),
            })  # fmt: skip
        bar.step()
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / f"instances_{part}.json", document)


def _index_mask(digits: list[Digit]) -> Image.Image:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for digit in digits:
        labels[digit.mask] = digit.label + 1
    image = Image.fromarray(labels)
    image.putpalette([value for colour in COLOURS for value in colour])
    return image


def draw_scene(glyphs: Images, random: np.random.Generator) -> tuple[np.ndarray, list[Digit]]:
    """A scene, (H, W, 3) uint8, and its digits. A digit that is drawn later covers those before it."""
    pixels = texture(random, SIDE)
    digits: list[Digit] = []
    boxes = np.zeros((0, 4))
    for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
        index = int(random.integers(len(glyphs)))
        ink = draw_glyph(np.asarray(glyphs.open(index).convert("L")), random)
        box = _place(boxes, ink.shape, random)
        if box is None:
            continue
        top, left = int(box[1]), int(box[0])
        behind = pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
        behind += ink[..., None] * (_colour(behind, random) - behind)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink >= 0.5
        label = glyphs.labels[index]
        assert isinstance(label, int)
        digits = [*(Digit(other.label, other.mask & ~mask) for other in digits), Digit(label, mask)]
        boxes = np.concatenate([boxes, box[None]])
    pixels += random.normal(0, NOISE, pixels.shape)
    return np.clip(pixels, 0, 255).round().astype(np.uint8), digits


def draw_glyph(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """8x8 handwriting of 0..255 at a random height, width and angle: (h, w) coverage of 0..1, cut to its ink."""
    scale = random.uniform(*HEIGHTS) / 8
    wide, angle = random.uniform(0.85, 1.15), np.deg2rad(random.uniform(-12, 12))
    source = np.pad(pixels.astype(np.float32) / 255, 2)
    side = int(np.ceil(scale * 8 * 1.6))
    cosine, sine, middle = np.cos(angle) / scale, np.sin(angle) / scale, source.shape[0] / 2
    x, y = middle - (cosine / wide + sine) * side / 2, middle - (cosine - sine / wide) * side / 2
    matrix = (cosine / wide, sine, x, -sine / wide, cosine, y)
    values = Image.fromarray(source).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    coverage = np.clip((np.asarray(values, np.float64) - INK) * scale * 1.3 + 0.5, 0, 1)  # an edge is a pixel wide
    left, top, right, bottom = mask_box(coverage >= 0.5)
    return coverage[top:bottom, left:right]


def _place(boxes: np.ndarray, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray | None:
    """A box of this height and width that hardly overlaps the others."""
    height, width = shape
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for _ in range(ATTEMPTS):
        left, top = random.integers(SIDE - width + 1), random.integers(SIDE - height + 1)
        box = np.array([left, top, left + width, top + height], np.float64)
        common = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        if (common.clip(0).prod(1) <= OVERLAP * np.minimum(areas, width * height)).all():
            return box
    return None


def _colour(behind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random colour that stands out from what is behind it; black or white if none is found."""
    brightness = float((behind @ BRIGHTNESS).mean())
    for _ in range(ATTEMPTS):
        colour = random.uniform(0, 255, 3)
        if abs(float(colour @ BRIGHTNESS) - brightness) >= CONTRAST:
            return colour
    return np.full(3, 0.0 if brightness > 127 else 255.0)
