"""What a detector or segmenter does on annotated images: average precision, or how well label maps agree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from muntin.data.annotated import IGNORE, Annotated
from muntin.errors import UserError, nearest
from muntin.measure.coco import coco_metrics
from muntin.measure.pixels import PixelCounts
from muntin.progress import progress
from muntin.tasks.dense_inference import ahead, detect, segment

LONGEST = 32  # letters of a class's name in a table


@dataclass(frozen=True)
class DetectionEvaluation:
    """Average precision and recall as COCO defines them, 0..1; None where there is no object to find.

    `figures`: box_ap (IoU .5:.95), box_ap50, box_ap75, box_ap_small, _medium, _large (below 32 x 32 pixels, below
    96 x 96, and above) and box_ar100, and the same of masks where these are found. `curves`: box_curve50 (and
    mask_curve50), the classes' mean precision at IoU .5 for recalls of 0, .01, ... 1. `per_class`: the same figures of
    each class, with its number of objects.
    """

    data: str
    split: str
    images: int
    objects: int
    classes: list[str]
    figures: dict[str, float | None]
    curves: dict[str, list[float]]
    per_class: list[dict[str, Any]]

    @property
    def masks(self) -> bool:
        """Whether masks were measured."""
        return "mask_ap" in self.figures

    @property
    def score(self) -> float:
        """What runs are compared by: AP of masks where these are found, of boxes otherwise."""
        return self.figures["mask_ap" if self.masks else "box_ap"] or 0.0

    def metrics(self) -> dict[str, Any]:
        """What a run's metrics.json holds of it."""
        return dict(self.figures)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kinds = ("box", "mask") if self.masks else ("box",)
        lines = [
            f"{self.data}, {self.split}: {self.images} images, {self.objects} objects",
            "",
            f"{'':<8}{'AP':>8}{'AP50':>8}{'AP75':>8}{'small':>8}{'medium':>8}{'large':>8}{'AR100':>8}",
        ]
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
        for kind in kinds:
            cells = "".join(share(self.figures[f"{kind}_{name}"], 8) for name in names)
            lines.append(f"{kind + ('es' if kind == 'box' else 's'):<8}{cells}")
        width = min(LONGEST, max(map(len, ("class", *self.classes)))) + 2
        head = "".join(f"{title:>10}" for kind in kinds for title in (f"{kind} AP", f"{kind} AP50"))
        lines += ["", f"{'class':<{width}}{'objects':>8}{head}"]
        for row in self.per_class:
            cells = "".join(share(row[f"{kind}_{name}"], 10) for kind in kinds for name in names[:2])
            lines.append(f"{shortened(row['class']):<{width}}{row['objects']:>8}{cells}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SegmentationEvaluation:
    """How label maps agree: mean intersection over union, mean accuracy of the classes, share of all pixels, 0..1.

    `per_class`: `iou`, `acc` (None where the class does not occur) and `pixels` of each `class`.
    """

    data: str
    split: str
    images: int
    pixels: int
    miou: float
    macc: float
    aacc: float
    classes: list[str]
    per_class: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """What runs are compared by."""
        return self.miou

    def metrics(self) -> dict[str, Any]:
        """What a run's metrics.json holds of it."""
        return {"miou": self.miou, "macc": self.macc, "aacc": self.aacc}

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.data}, {self.split}: {self.images} images, mIoU {self.miou:.2%}, mean accuracy {self.macc:.2%}, "
            f"accuracy of all pixels {self.aacc:.2%}",
            "",
        ]
        width = min(LONGEST, max(map(len, ("class", *self.classes)))) + 2
        lines.append(f"{'class':<{width}}{'pixels':>12}{'IoU':>8}{'accuracy':>10}")
        for row in self.per_class:
            cells = f"{row['pixels']:>12}{share(row['iou'], 8)}{share(row['acc'], 10)}"
            lines.append(f"{shortened(row['class']):<{width}}{cells}")
        return "\n".join(lines)


def share(value: float | None, width: int) -> str:
    """A share in percent, or a dash where there is none."""
    return f"{'-' if value is None else f'{value:.1%}':>{width}}"


def shortened(name: str) -> str:
    """A class's name, no longer than tables are wide."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def evaluate_detection(
    model: nn.Module,
    annotated: Annotated,
    preprocessing: Mapping[str, Any],
    *,
    data: str,
    split: str,
    classes: Sequence[str] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
) -> DetectionEvaluation:
    """Find objects on annotated images and measure boxes, and masks where the model finds them and they are annotated.

    model: a detector in evaluation mode on the device to use. classes: the model's, in order, where they are not those
    of the images. scales, flip: see `muntin.tasks.dense_inference.detect`.

    Raises `UserError` naming an image that cannot be read, a class that the model does not know, and where no image has
    an object.
    """
    names = list(classes or annotated.classes)
    truth = _in_classes(annotated.coco(), annotated.classes, names, data)
    _refuse_other_count(model, names, data)
    found = detect(model, _pictures(annotated), preprocessing, scales=scales, flip=flip, batch_size=batch_size)
    results = []
    for position, objects in enumerate(progress(found, len(annotated), "evaluating")):
        results += objects.coco(position + 1)
    masks = annotated.masks and getattr(model, "task", "instance") == "instance"
    metrics = coco_metrics(truth, results, ("bbox", "segm") if masks else ("bbox",))
    apart = ("images", "objects", "per_class")
    return DetectionEvaluation(
        data=data,
        split=split,
        images=metrics["images"],
        objects=metrics["objects"],
        classes=names,
        figures={name: value for name, value in metrics.items() if name not in apart and "curve" not in name},
        curves={name: value for name, value in metrics.items() if "curve" in name},
        per_class=metrics["per_class"],
    )


def evaluate_segmentation(
    model: nn.Module,
    annotated: Annotated,
    preprocessing: Mapping[str, Any],
    *,
    data: str,
    split: str,
    classes: Sequence[str] | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
) -> SegmentationEvaluation:
    """Label every pixel of annotated images and compare, at the images' own size.

    model, classes: as in `evaluate_detection`. crop, stride, scales, flip: see `muntin.tasks.dense_inference.segment`.

    Raises `UserError` naming an image that cannot be read, a class that the model does not know, and where no pixel is
    annotated.
    """
    names = list(classes or annotated.classes)
    places = _places(annotated.classes, names, data)
    _refuse_other_count(model, names, data)
    views = {"crop": crop, "stride": stride, "scales": scales, "flip": flip, "batch_size": batch_size}
    found = segment(model, _pictures(annotated), preprocessing, **views)  # type: ignore[arg-type]
    truths = ahead(lambda position: _labels(annotated, position, places), range(len(annotated)))
    counts = PixelCounts(len(names), IGNORE)
    for labels in progress(found, len(annotated), "evaluating"):
        counts.add(labels, next(truths))
    results = counts.results()
    return SegmentationEvaluation(
        data=data,
        split=split,
        images=len(annotated),
        pixels=results["pixels"],
        miou=results["miou"],
        macc=results["macc"],
        aacc=results["aacc"],
        classes=names,
        per_class=[{"class": name} | row for name, row in zip(names, results["per_class"], strict=True)],
    )


def _pictures(annotated: Annotated) -> Iterator[Image.Image]:
    return ahead(annotated.picture, range(len(annotated)))


def _labels(annotated: Annotated, position: int, places: list[int]) -> Tensor:
    """An image's label map, (H, W) uint8, in the model's classes."""
    labels = annotated.target(position)["labels"].as_subclass(Tensor)
    if places == list(range(len(places))):
        return labels
    table = torch.full((256,), IGNORE, dtype=torch.uint8)
    table[: len(places)] = torch.tensor(places, dtype=torch.uint8)
    return table[labels.long()]


def _refuse_other_count(model: nn.Module, names: list[str], data: str) -> None:
    known = getattr(model, "num_classes", len(names))
    if known != len(names):
        raise UserError(
            f"the model has {known} classes and {data} has {len(names)}; give the data that it was made for, or name "
            "the model's classes"
        )


def _places(given: Sequence[str], names: list[str], data: str) -> list[int]:
    """Where each of the data's classes is among the model's."""
    for name in given:
        if name not in names:
            raise UserError(
                f"{data} has a class {name!r} that the model was not trained on{nearest(name, names)}; its classes are "
                f"{', '.join(names[:20])}"
            )
    return [names.index(name) for name in given]


def _in_classes(truth: dict[str, Any], given: Sequence[str], names: list[str], data: str) -> dict[str, Any]:
    """COCO's ground truth with the model's classes as categories."""
    places = _places(given, names, data)
    return truth | {
        "annotations": [a | {"category_id": places[a["category_id"] - 1] + 1} for a in truth["annotations"]],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
