"""Several labels for an image, or none: the loss, the validation, and what such a training refuses.

B batch, K classes, N images
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from muntin.data.datasets import Splits
from muntin.errors import UserError
from muntin.tasks.classification import Classification
from muntin.tasks.distillation import two_heads
from muntin.tasks.multi_label_evaluation import average_precisions
from muntin.tasks.settings import Settings


class MultiLabelClassification(Classification):
    """Binary cross-entropy of each class on batches mixed by mixup or cutmix; mean average precision in validation.

    Targets are (B, K), 1 for each class that an image has; mixed images have the same mixture of their rows.
    `results` holds the last validation: {"raw" | "ema": {"map", "loss"}}.
    """

    metric = "map"

    def loss(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, taught: Tensor | None) -> Tensor:
        return multi_label_loss(outputs, targets, self.settings, taught)

    def meter(self, what: str) -> Metric:
        return MeanMetric() if what == "loss" else MeanAveragePrecision(self.num_classes, validate_args=False)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        images = self.prepare(images)
        real = (targets >= 0).all(1)  # others fill up a process's share
        targets = targets[real]
        for name, model in self.candidates().items():
            logits = model(images).float()[real]
            self.gather(name, "map", logits.sigmoid(), targets.long())
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
            self.gather(name, "loss", losses)


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean of `average_precisions` over the classes that some image has; torchmetrics counts the others as 0."""

    def compute(self) -> Tensor:  # type: ignore[override]  # as that of the class above it is
        return average_precisions(dim_zero_cat(self.preds), dim_zero_cat(self.target)).nanmean()


def multi_label_loss(
    outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, settings: Settings, taught: Tensor | None = None
) -> Tensor:
    """The mean over images and classes of the binary cross-entropy of Z with (1 - s) y + s / 2.

    With a teacher (1 - alpha) of that, and alpha tau^2 times the mean of KL(sigmoid(T / tau) || sigmoid(Z' / tau)), of
    each class by itself.

    outputs: logits Z (B, K), of which Z' are the same, or of two heads, Z and Z'; targets: y, (B, K), 0 to 1; taught:
    the teacher's T (B, K). Of the settings: label_smoothing (s), distill_alpha and distill_tau.
    """
    logits, learning = two_heads(outputs)
    smoothed = torch.lerp(targets, torch.full_like(targets, 0.5), settings.label_smoothing)
    labelled = F.binary_cross_entropy_with_logits(logits.float(), smoothed)
    if taught is None:
        return labelled
    tau = settings.distill_tau
    theirs = taught.float() / tau
    entropy = F.binary_cross_entropy_with_logits(theirs, theirs.sigmoid())
    divergence = F.binary_cross_entropy_with_logits(learning.float() / tau, theirs.sigmoid()) - entropy
    return (1 - settings.distill_alpha) * labelled + settings.distill_alpha * tau**2 * divergence


def refuse_single_label_settings(settings: Settings, splits: Splits) -> None:
    """Raises `UserError` for settings and data that several labels leave without a meaning."""
    given = f"{settings.data} gives an image several labels or none"
    if settings.token_labels:
        raise UserError(f"{given}, and token_labels are for one class an image; leave them out")
    if settings.teacher and settings.distillation == "hard":
        raise UserError(f"{given}, and distillation=hard takes the teacher's one class; set distillation=soft")
    parts: dict[str, Any] = splits.parts()
    for name, part in parts.items():
        if not any(part.labels):
            raise UserError(
                f"{settings.data}: none of the {len(part)} {name} images has a label, so average precision has nothing "
                "to measure; label some, or say in a column `split` which images are train, val and test"
            )
