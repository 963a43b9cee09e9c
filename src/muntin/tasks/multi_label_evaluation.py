"""What a model does on images that have several labels each, or none.

N images, K classes
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.5  # of a probability, from which an image is said to have the class


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Average precision and, at a threshold of 0.5, F1; all shares are 0..1.

    `map`: the mean of the classes' average precisions; `micro_f1`: of all decisions together; `macro_f1`: the mean of
    the classes'. Both means are over the classes that some image has. `loss`: mean binary cross-entropy.
    `per_class`: for each class how many images have it, average precision (None where none has), and recall, precision
    (None without such decisions) and F1 at the threshold.
    """

    data: str
    split: str
    images: int
    map: float
    micro_f1: float
    macro_f1: float
    threshold: float
    loss: float
    classes: list[str]
    per_class: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """What runs are compared by."""
        return self.map

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.data}, {self.split}: {self.images} images, mAP {self.map:.2%}, F1 at {self.threshold:g}: micro "
            f"{self.micro_f1:.2%}, macro {self.macro_f1:.2%}, loss {self.loss:.4f}",
            "",
        ]
        width = max(map(len, ("class", *self.classes)))
        lines.append(f"{'class':<{width}}  images  {'AP':>6}  recall  precision  {'F1':>6}")
        for row in self.per_class:
            ap, recall, precision, f1 = (
                "-" if row[name] is None else f"{row[name]:.1%}"
                for name in ("average_precision", "recall", "precision", "f1")
            )
            lines.append(f"{row['class']:<{width}}  {row['images']:>6}  {ap:>6}  {recall:>6}  {precision:>9}  {f1:>6}")
        return "\n".join(lines)


def summarise(logits: Tensor, labels: Tensor, classes: list[str], data: str, split: str) -> MultiLabelEvaluation:
    """logits: (N, K); labels: (N, K) of 0 and 1."""
    logits, labels = logits.double(), labels.long()
    said = (logits.sigmoid() >= THRESHOLD).long()
    right, taken, images = (said * labels).sum(0), said.sum(0), labels.sum(0)
    f1 = 2 * right / (taken + images).clamp(min=1)
    precisions = average_precisions(logits.sigmoid(), labels)
    rows = [
        {
            "class": name,
            "images": int(images[i]),
            "average_precision": float(precisions[i]) if images[i] else None,
            "recall": float(right[i] / images[i]) if images[i] else None,
            "precision": float(right[i] / taken[i]) if taken[i] else None,
            "f1": float(f1[i]) if images[i] + taken[i] else None,
        }
        for i, name in enumerate(classes)
    ]
    return MultiLabelEvaluation(
        data=data,
        split=split,
        images=len(labels),
        map=float(precisions.nanmean()),
        micro_f1=float(2 * right.sum() / (taken + images).sum().clamp(min=1)),
        macro_f1=float(f1[images > 0].mean()),
        threshold=THRESHOLD,
        loss=float(F.binary_cross_entropy_with_logits(logits, labels.double())),
        classes=classes,
        per_class=rows,
    )


def average_precisions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The average precision of each class, (K,), NaN for one that no image has: sum over the ranking of
    (R_n - R_(n-1)) P_n, without interpolation.

    probabilities, labels: (N, K), labels 0 or 1.
    """
    from torchmetrics.functional.classification import binary_average_precision

    return torch.stack(
        [
            binary_average_precision(scores, wanted, validate_args=False)
            if wanted.any()
            else scores.new_full((), torch.nan)
            for scores, wanted in zip(probabilities.T, labels.T, strict=True)
        ]
    )
