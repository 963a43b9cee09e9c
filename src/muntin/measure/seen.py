"""A run's held-out images as its model sees them: what the report draws from.

N images, K classes
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.measure.labels_page import SeenLabels, seen_labels
from muntin.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image

    from muntin.data.datasets import Images

BINS = 15  # of the calibration plot, as in `muntin eval`


@dataclass(frozen=True)
class Seen:
    """The held-out images as the model sees them: N images, K classes."""

    images: "Images"
    picture: Callable[["Image"], "Image"]
    labels: Tensor  # (N,)
    probabilities: Tensor  # (N, K)
    losses: Tensor  # (N,)
    inputs: Tensor  # (at most 8, 3, H, W)
    data: str
    split: str

    @property
    def predicted(self) -> Tensor:
        return self.probabilities.argmax(1)

    @property
    def right(self) -> Tensor:
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    def confusion(self) -> list[list[int]]:
        k = len(self.classes)
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).view(k, k).tolist()


def look(run: Run, model: nn.Module, batch_size: int = 64) -> Seen | SeenLabels:
    """Run the model over the run's held-out images.

    Raises UserError where the images are not there any more.
    """
    from muntin.data.loading import EvaluationSet, evaluation_loader
    from muntin.progress import progress
    from muntin.tasks.inference import held_out

    images, data, split = held_out(run)
    transform = run.transform()
    workers = min(os.cpu_count() or 1, 8) if len(images) > 2000 else 0
    loader = evaluation_loader(EvaluationSet(images, transform), batch_size, workers)
    logits, wanted, first = [], [], torch.empty(0)
    with torch.inference_mode():
        for batch, targets in progress(loader, len(loader), "report: held-out images"):
            first = batch[:8].clone() if not len(first) else first
            logits.append(model(batch).float())
            wanted.append(targets)
    found, labels = torch.cat(logits).double(), torch.cat(wanted)
    if run.multi_label:
        return seen_labels(found, labels.long(), images, transform.picture, first, (data, split))
    return Seen(
        images=images,
        picture=transform.picture,
        labels=labels,
        probabilities=found.softmax(1),
        losses=F.cross_entropy(found, labels, reduction="none"),
        inputs=first,
        data=data,
        split=split,
    )


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share counted as `right` of `total` (Wilson, 1927)."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration(probabilities: Tensor, labels: Tensor) -> tuple[list[tuple[float, float, float, float, int]], float]:
    """Bins of equal width (from, to, mean confidence, accuracy, images) that hold images, and the expected
    calibration error: the mean gap between confidence and accuracy, weighted by images."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    number = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    bins, gap = [], 0.0
    for b in range(BINS):
        inside = number == b
        count = int(inside.sum())
        if count:
            mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
            bins.append((b / BINS, (b + 1) / BINS, mean, accuracy, count))
            gap += count / len(labels) * abs(mean - accuracy)
    return bins, gap
