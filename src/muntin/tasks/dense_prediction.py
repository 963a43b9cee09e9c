"""What a detector or segmenter finds in any images, as files: predictions.json, label maps and pictures."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from muntin.data.annotated import Annotated
from muntin.data.images import BadImage, open_image
from muntin.data.rle import decode_rle, run_lengths
from muntin.errors import UserError
from muntin.measure.colours import Colour, class_colours
from muntin.measure.drawing import contact_sheet, draw
from muntin.progress import progress
from muntin.run import atomic_write, write_json
from muntin.tasks.dense_inference import Detections, ahead, detect, segment
from muntin.tasks.inference import find_images

SHOWN = 0.5  # least score of an object that is drawn, by default
SAMPLES = 12  # pictures of truth beside prediction, by default

Palette = Sequence[Colour]


@dataclass(frozen=True)
class DensePredictions:
    """What was written to `out`: of how many `images`, how many `objects` (None for label maps), and the `errors` of
    images that could not be read.
    """

    out: Path
    images: int
    objects: int | None
    errors: list[str]

    def __str__(self) -> str:
        told = f"{self.out}: {self.images} images"
        if self.objects is not None:
            told += f", {self.objects} objects"
        return told + (f", {len(self.errors)} more could not be read" if self.errors else "")


def predict_dense(
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    pictures: bool = True,
    palette: Palette | None = None,
    **views: Any,
) -> DensePredictions:
    """Find objects on images, or label their pixels, and write what was found to the folder `out`.

    predictions.json lists `images` (id, file_name, width, height), `categories`, and `errors` (file_name and error of
    images that cannot be read). A detector's `annotations` are in COCO's results format, with an id and an area, so
    that they can be trained on too. A segmenter's images each have `label_map`, an index PNG with a palette under
    `labels/`, and the `share` of each class. `pictures/` shows all of it.

    model, preprocessing: as for `muntin.tasks.dense_inference.detect` and `segment`, which take `views`. inputs: files,
    folders and .txt lists. threshold: least score of an object; by default all that the model finds are written, and
    those from 0.5 on are drawn. palette: a colour for each class. A broken image does not stop the rest.

    Raises `UserError` where there is no image, none can be read, or `out` cannot be written.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold={threshold}: give a score, from 0 to 1")
    files = find_images(inputs)
    folder, names = Path(out), _names(files)
    segmenting = getattr(model, "task", "detect") == "segment"
    read: deque[dict[str, Any]] = deque()
    rows: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    annotations: list[dict[str, Any]] = []
    readable = _readable(files, read, errors)
    found: Iterator[Any] = (
        segment(model, readable, preprocessing, **views)
        if segmenting
        else detect(model, readable, preprocessing, threshold=threshold or 0.0, **views)
    )
    for each in progress(found, len(files), "predicting"):
        row = read.popleft()
        rows.append(row)
        file, name = files[row["id"] - 1], names[row["id"] - 1]
        if segmenting:
            row |= {"label_map": f"labels/{name}.png", "share": _shares(each, classes)}
            write_label_map(folder / row["label_map"], each, palette)
        else:
            annotations += _annotations(each, row["id"], len(annotations) + 1)
        if pictures:  # read again, because those that wait for their results would take gigabytes
            shown = drawn(open_image(file), each, classes, palette, SHOWN if threshold is None else threshold)
            _write_picture(folder / "pictures" / f"{name}.png", shown)
    if not rows:
        raise UserError(
            f"none of the {len(files)} images could be read, as {errors[0]['error']}; give PNG or JPEG files"
        )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    document: dict[str, Any] = {"images": rows, "categories": categories, "errors": errors}
    write_json(folder / "predictions.json", document if segmenting else document | {"annotations": annotations})
    objects = None if segmenting else len(annotations)
    return DensePredictions(folder, len(rows), objects, [row["error"] for row in errors])


def write_samples(
    model: nn.Module,
    annotated: Annotated,
    preprocessing: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    count: int = SAMPLES,
    seed: int = 0,
    **views: Any,
) -> list[Path]:
    """Some of the images, drawn by the seed, each as a picture of truth beside prediction: FOLDER/NAME.png.

    Detections are drawn from a score of 0.5 on.
    """
    order = np.random.default_rng(seed).permutation(len(annotated))[:count]
    positions = sorted(int(position) for position in order)
    names = _names([Path(annotated.name(position)) for position in positions])
    some = annotated.select(positions)
    images = [some.picture(i) for i in range(len(some))]
    method: Any = segment if getattr(model, "task", "detect") == "segment" else detect
    paths = []
    for i, found in enumerate(method(model, images, preprocessing, **views)):
        target = some.target(i)
        if "boxes" in target:
            masks = target["masks"] if some.masks else None
            truth = draw(images[i], target["boxes"], target["labels"], masks=masks, classes=some.classes)
        else:
            truth = draw(images[i], label_map=target["labels"], classes=some.classes, palette=some.palette)
        prediction = drawn(images[i], found, some.classes, some.palette, SHOWN)
        paths.append(Path(folder) / f"{names[i]}.png")
        _write_picture(paths[-1], contact_sheet([truth, prediction], 2, ["annotated", "predicted"]))
    return paths


def drawn(
    picture: Image.Image, found: Detections | Tensor, classes: Sequence[str], palette: Palette | None, threshold: float
) -> Image.Image:
    """The picture with what was found on it: objects of at least this score, or the label of every pixel."""
    if isinstance(found, Tensor):
        return draw(picture, label_map=found, classes=classes, palette=palette, ignore=-1)
    kept = found.above(threshold)
    masks = None if kept.masks is None else [decode_rle(mask) for mask in kept.masks]
    return draw(picture, kept.boxes, kept.labels, kept.scores, masks or None, classes, palette=palette)


def write_label_map(path: Path, labels: Tensor, palette: Palette | None = None) -> None:
    """An index PNG, (H, W): with a palette up to 256 classes, otherwise with 16 bits."""
    values = labels.numpy()
    if values.dtype != np.uint8:
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values).convert("P")
        colours = class_colours(256)
        colours[: len(palette or ())] = [(int(r), int(g), int(b)) for r, g, b in palette or ()]
        image.putpalette([value for colour in colours for value in colour])
    atomic_write(path, lambda partial: image.save(partial, "PNG"))


def _readable(
    files: Sequence[Path], read: deque[dict[str, Any]], errors: list[dict[str, str]]
) -> Iterator[Image.Image]:
    """The images that can be read, each with its row entered in `read`; the others are entered in `errors`."""

    def opened(file: Path) -> Image.Image | BadImage:
        try:
            return open_image(file)
        except BadImage as error:
            return error

    for i, (file, picture) in enumerate(zip(files, ahead(opened, files), strict=True), start=1):
        if isinstance(picture, BadImage):
            errors.append({"file_name": str(file), "error": str(picture)})
        else:
            read.append({"id": i, "file_name": str(file), "width": picture.width, "height": picture.height})
            yield picture


def _annotations(found: Detections, image_id: int, first: int) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(found.coco(image_id), start=first):
        x, y, w, h = row["bbox"]
        area = w * h if "segmentation" not in row else int(run_lengths(row["segmentation"])[1::2].sum())
        tidy = {"bbox": [round(v, 2) for v in (x, y, w, h)], "score": round(row["score"], 5), "area": round(area, 2)}
        rows.append({"id": number} | row | tidy | {"iscrowd": 0})
    return rows


def _shares(labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The share of the pixels of each class that occurs, the largest first."""
    counts = Counter(dict(enumerate(labels.flatten().long().bincount().tolist())))
    return {classes[k]: round(count / labels.numel(), 4) for k, count in counts.most_common() if count}


def _write_picture(path: Path, picture: Image.Image) -> None:
    atomic_write(path, lambda partial: picture.save(partial, "PNG"))


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file's results: its own without the suffix, numbered where others have the same."""
    taken: set[str] = set()
    names = []
    for file in files:
        name, number = file.stem, 2
        while name in taken:
            name, number = f"{file.stem}-{number}", number + 1
        taken.add(name)
        names.append(name)
    return names
