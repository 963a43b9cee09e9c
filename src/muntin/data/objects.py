"""Images with objects on them, compactly: one array for a whole part, which worker processes share.

N images, M objects of all images, n objects of one image, H W image
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from muntin.data.annotated import Annotated, digest_of
from muntin.data.decode import read_image
from muntin.data.images import BadImage
from muntin.data.polygons import polygon_mask
from muntin.data.rle import decode_rle

STICKS_OUT = 2.0  # pixels by which a box may reach over a border without a word


@dataclass(frozen=True)
class Rows:
    """Objects of all images, in the order of the images."""

    boxes: np.ndarray  # (M, 4) float64, x1 y1 x2 y2 in pixels, inside of the image
    labels: np.ndarray  # (M,) int64, indices into classes
    crowd: np.ndarray  # (M,) bool: a group, or what is too hard to be asked for
    area: np.ndarray  # (M,) float64, in pixels
    ids: np.ndarray  # (M,) whole numbers or text: what the files call them

    def select(self, rows: np.ndarray) -> "Rows":
        """Some of them, in this order."""
        return Rows(self.boxes[rows], self.labels[rows], self.crowd[rows], self.area[rows], self.ids[rows])


@dataclass(frozen=True)
class Outlines:
    """Polygons and run lengths of all objects in one array.

    An object has either the number of its polygons, the number of values of each, and then their values; or -1, and
    then its run lengths (COCO's, uncompressed).
    """

    values: np.ndarray  # float64, which holds a run's length exactly
    first: np.ndarray  # (M + 1,) int64: object i has values[first[i]] to values[first[i + 1]]

    @classmethod
    def of(cls, objects: Sequence[np.ndarray]) -> "Outlines":
        """From what `polygons` and `runs` make."""
        first = np.concatenate([[0], np.cumsum([len(values) for values in objects], dtype=np.int64)])
        return cls(np.concatenate(objects) if objects else np.zeros(0), first)

    @staticmethod
    def polygons(polygons: Sequence[np.ndarray]) -> np.ndarray:
        """What an object of these polygons has."""
        return np.concatenate([[len(polygons)], [len(polygon) for polygon in polygons], *polygons])

    @staticmethod
    def runs(lengths: np.ndarray) -> np.ndarray:
        """What an object of these run lengths has."""
        return np.concatenate([[-1], lengths])

    def coco(self, row: int, height: int, width: int) -> Any:
        values = self.values[self.first[row] : self.first[row + 1]]
        count = int(values[0])
        if count < 0:
            return {"size": [height, width], "counts": values[1:].astype(np.int64).tolist()}
        ends = values[1 : count + 1].cumsum().astype(np.int64)
        return [polygon.tolist() for polygon in np.split(values[count + 1 :], ends[:-1])]

    def masks(self, rows: range, height: int, width: int) -> np.ndarray:
        masks = np.zeros((len(rows), height, width), np.uint8)
        for mask, row in zip(masks, rows, strict=True):
            shape = self.coco(row, height, width)
            mask[:] = decode_rle(shape) if isinstance(shape, dict) else polygon_mask(shape, height, width)
        return masks

    def select(self, rows: np.ndarray) -> "Outlines":
        counts = np.diff(self.first)[rows]
        first = np.concatenate([[0], counts.cumsum()])
        places = np.arange(first[-1]) + np.repeat(self.first[rows] - first[:-1], counts)
        return Outlines(self.values[places], first)

    def digest(self) -> str:
        return digest_of(self.values, self.first)


@dataclass(frozen=True)
class Objects(Annotated):
    """Images with boxes and, where there are `shapes`, masks."""

    classes: list[str]
    root: Path  # of the files
    files: list[str]
    sizes: np.ndarray  # (N, 2) int64, width and height when upright, as the annotations say
    first: np.ndarray  # (N + 1,) int64: image i has the rows first[i] to first[i + 1]
    rows: Rows
    shapes: Outlines | None = None
    palette = None

    @property
    def masks(self) -> bool:
        return self.shapes is not None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, position: int) -> str:
        return self.files[position]

    def picture(self, position: int) -> Image.Image:
        path = self.root / self.files[position]
        image = read_image(path).image()
        width, height = self.sizes[position].tolist()
        if image.size != (width, height):
            raise BadImage(
                f"{path} is {image.width}x{image.height} when upright, and its annotations say {width}x{height}; put "
                "the image back that was annotated, or correct its width and height there"
            )
        return image

    def of(self, position: int) -> range:
        """The rows of an image's objects."""
        return range(int(self.first[position]), int(self.first[position + 1]))

    def target(self, position: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        rows = self.of(position)
        some = slice(rows.start, rows.stop)
        width, height = self.sizes[position].tolist()
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(self.rows.boxes[some].astype(np.float32)), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(self.rows.labels[some].copy()),
            "crowd": torch.from_numpy(self.rows.crowd[some].copy()),
            "area": torch.from_numpy(self.rows.area[some].astype(np.float32)),
        }
        if self.shapes is not None:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(self.shapes.masks(rows, height, width)))
        return target

    def select(self, positions: Sequence[int]) -> "Objects":
        chosen = np.asarray(positions, np.int64)
        counts = np.diff(self.first)[chosen]
        first = np.concatenate([[0], counts.cumsum()])
        rows = np.arange(first[-1]) + np.repeat(self.first[chosen] - first[:-1], counts)
        return replace(
            self,
            files=[self.files[i] for i in chosen],
            sizes=self.sizes[chosen],
            first=first,
            rows=self.rows.select(rows),
            shapes=self.shapes and self.shapes.select(rows),
        )

    def digest(self) -> str:
        rows = self.rows
        shapes = self.shapes.digest() if self.shapes is not None else ""
        return digest_of(
            self.files, self.sizes, self.first, rows.boxes, rows.labels, rows.crowd, rows.area, self.classes, shapes
        )

    def coco(self) -> dict[str, Any]:
        images, annotations = [], []
        for position, (file, (width, height)) in enumerate(zip(self.files, self.sizes.tolist(), strict=True)):
            images.append({"id": position + 1, "file_name": file, "width": width, "height": height})
            for row in self.of(position):
                left, top, right, bottom = self.rows.boxes[row].tolist()
                annotation = {
                    "id": row + 1,
                    "image_id": position + 1,
                    "category_id": int(self.rows.labels[row]) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(self.rows.area[row]),
                    "iscrowd": int(self.rows.crowd[row]),
                }
                if self.shapes is not None:
                    annotation["segmentation"] = self.shapes.coco(row, height, width)
                annotations.append(annotation)
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(self.classes)]
        return {"images": images, "annotations": annotations, "categories": categories}


def clipped(box: np.ndarray, width: int, height: int) -> tuple[np.ndarray, str, bool]:
    """A box x1 y1 x2 y2 inside of the image, what is wrong with it ("" if nothing is), and whether it stuck out."""
    if not np.isfinite(box).all():
        return box, "is not four numbers", False
    left, top, right, bottom = box.tolist()
    if right <= left or bottom <= top:
        return box, f"is of zero size ({right - left:g}x{bottom - top:g})", False
    inside = np.clip(box, 0, [width, height, width, height])
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return box, f"lies outside of the image, which is {width}x{height}", False
    return inside, "", bool(np.abs(inside - box).max() > STICKS_OUT)


def mask_box(mask: np.ndarray) -> np.ndarray:
    """x1 y1 x2 y2 around the pixels of a mask (H, W); zeros where it has none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
