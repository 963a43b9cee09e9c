"""The report's parts about images that have several labels each, or none.

N images, K classes
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from muntin.measure import svg
from muntin.measure.page import data_uri, figure, meter, section, table
from muntin.tasks.multi_label_evaluation import THRESHOLD, MultiLabelEvaluation, summarise

if TYPE_CHECKING:
    from PIL.Image import Image

    from muntin.data.datasets import Images

BINS = 15  # of the calibration plot
ROWS = 40  # classes shown


@dataclass(frozen=True)
class SeenLabels:
    """The held-out images as the model sees them, with every class by itself."""

    images: "Images"
    picture: Callable[["Image"], "Image"]
    labels: Tensor  # (N, K), 0 and 1
    probabilities: Tensor  # (N, K)
    losses: Tensor  # (N,)
    inputs: Tensor  # (at most 8, 3, H, W)
    data: str
    split: str
    found: MultiLabelEvaluation

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    @property
    def said(self) -> Tensor:
        """(N, K), what the model says of each class at the threshold."""
        return self.probabilities >= THRESHOLD

    @property
    def right(self) -> Tensor:
        """(N,), whether all of an image's classes are right."""
        return (self.said == self.labels.bool()).all(1)


def seen_labels(
    logits: Tensor,
    labels: Tensor,
    images: "Images",
    picture: Callable[["Image"], "Image"],
    inputs: Tensor,
    where: tuple[str, str],
) -> SeenLabels:
    """logits, labels: (N, K); picture: what the model sees of an image; where: names of the data and the split."""
    return SeenLabels(
        images=images,
        picture=picture,
        labels=labels,
        probabilities=logits.sigmoid(),
        losses=F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1),
        inputs=inputs,
        data=where[0],
        split=where[1],
        found=summarise(logits, labels, images.classes, *where),
    )


def cards(seen: SeenLabels) -> list[tuple[str, str, str]]:
    """Figures for the head of the page: value, name, explanation."""
    measured = sum(row["average_precision"] is not None for row in seen.found.per_class)
    whole = int(seen.right.sum())
    return [
        (f"{seen.found.map:.2%}", f"{escape(seen.split)} mAP", f"mean average precision of {measured} classes"),
        (
            f"{seen.found.micro_f1:.1%}",
            f"micro F1 at {THRESHOLD:g}",
            f"macro {seen.found.macro_f1:.1%}; {whole} of {len(seen.labels)} images right in every class",
        ),
    ]


def classes(seen: SeenLabels) -> str:
    """A table of the classes, the worst average precisions first where not all are shown."""
    rows = list(seen.found.per_class)
    note = ""
    if len(rows) > ROWS:
        rows = sorted((r for r in rows if r["images"]), key=lambda row: row["average_precision"])[:ROWS]
        note = f'<p class="note">The {len(rows)} classes with the lowest average precision of {len(seen.classes)}.</p>'
    cells = [
        [
            escape(row["class"]),
            str(row["images"]),
            *("-" if row[name] is None else meter(row[name]) for name in ("average_precision", "recall", "precision")),
            "-" if row["f1"] is None else f"{row['f1']:.3f}",
        ]
        for row in rows
    ]
    head = ("class", "images", "average precision", "recall", "precision", "F1")
    lead = f"An image may have several classes or none; recall, precision and F1 are at a probability of {THRESHOLD:g}."
    return section("confusion", "Classes", lead, table(head, cells) + note)


def tile(seen: SeenLabels, index: int, full: bool) -> str:
    """An image with what the model says of it and, where that is wrong, what it has."""
    uri, small = data_uri(seen.picture(seen.images.open(index)))
    name = str(seen.images.keys[index])
    said, true = (
        ", ".join(seen.classes[k] for k in row.nonzero().flatten().tolist()) or "none"
        for row in (seen.said[index], seen.labels[index])
    )
    text = f"<b>{escape(said)}</b>"
    if not seen.right[index]:
        text += f'<br><span class="muted">has {escape(true)}</span>'
    if full:
        text += f'<br><span class="muted">loss {float(seen.losses[index]):.2f}</span>'
    state = "right" if seen.right[index] else "wrong"
    pixels = ' class="pixels"' if small else ""
    return (
        f'<figure class="tile {state}" title="{escape(f"{name}: predicted {said}, has {true}")}"><img{pixels} '
        f'src="{uri}" alt="{escape(name)}" width="96" height="96" loading="lazy"><figcaption>{text}</figcaption>'
        "</figure>"
    )


def calibrated(seen: SeenLabels) -> str:
    """How often an image has a class of which the model says so with a probability, over all images and classes."""
    probabilities, has = seen.probabilities.flatten(), seen.labels.flatten().bool()
    number = (probabilities * BINS).ceil().clamp(1, BINS).long() - 1
    bins, gap = [], 0.0
    for b in range(BINS):
        inside = number == b
        count = int(inside.sum())
        if count:
            mean, share = float(probabilities[inside].mean()), float(has[inside].double().mean())
            bins.append((b / BINS, (b + 1) / BINS, mean, share, count))
            gap += count / len(has) * abs(mean - share)
    body = svg.reliability(bins, ("classes of images", "probability", "there"))
    lead = (
        f"The model gives a class {float(probabilities.mean()):.1%} on average, and {float(has.double().mean()):.1%} "
        f"are there; mean gap in {BINS} bins <b>{gap:.2%}</b>."
    )
    note = '<p class="note">On the dashed line a probability is what it says. The stronger a bar, the more of them.</p>'
    return section("calibration", "Calibration", lead, figure(body, "Share that is there") + note)
