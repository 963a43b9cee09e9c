"""Semantic segmentation: the head's losses, and mean intersection over union at the images' own size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.data.annotated import IGNORE, Annotated
from muntin.data.annotated_loading import Resized
from muntin.data.device import Prepare
from muntin.measure.pixels import PixelCounts
from muntin.tasks.dense import Dense
from muntin.tasks.settings import Settings

COUNTED = 1000  # label maps that the classes' shares are counted in, at most


def class_weights(annotated: Annotated, balance: float) -> Tensor:
    """(K,) factors of the classes' pixels: share^-balance, scaled so that an average pixel's is 1.

    A class without pixels gets the largest of the others.
    """
    counts = torch.zeros(len(annotated.classes) + 1, dtype=torch.double)
    step = -(-len(annotated) // COUNTED)
    for position in range(0, len(annotated), step):
        labels = annotated.target(position)["labels"].as_subclass(Tensor).flatten().long()
        counts += torch.bincount(labels.clamp(max=len(annotated.classes)), minlength=len(counts))
    shares = counts[:-1] / counts[:-1].sum()
    weights = torch.where(shares > 0, shares, torch.inf).pow(-balance)
    weights[shares == 0] = weights.max()
    return (weights / (shares * weights).sum()).float()


class Segmentation(Dense):
    """The sum of a segmenter's losses on square crops; mIoU of raw and averaged weights."""

    metric = "miou"

    def __init__(
        self, model: nn.Module, settings: Settings, steps_per_epoch: int, prepare: Prepare, num_classes: int
    ) -> None:
        super().__init__(model, settings, steps_per_epoch, prepare)
        self.num_classes = num_classes

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        losses = self.model(self.prepared(images), targets=labels)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def observe(self, model: nn.Module, images: Tensor, group: list[Resized]) -> list[Any]:
        """For each image the counts of its pixels and the sum and number of their losses."""
        rows: list[Any] = []
        for logits, item in zip(model(images).float(), group, strict=True):
            assert item.labels is not None
            labels = item.labels.to(logits.device).long()
            if logits.shape[1:] != labels.shape:
                logits = F.interpolate(logits[None], labels.shape, mode="bilinear", align_corners=False)[0]
            counts = PixelCounts(self.num_classes, IGNORE)
            counts.add(logits.argmax(0), labels)
            loss = F.cross_entropy(logits[None], labels[None], ignore_index=IGNORE, reduction="sum")
            rows.append((counts.tensor.cpu(), float(loss), int((labels != IGNORE).sum())))
        return rows

    def summarise(self, gathered: list[Any]) -> dict[str, float]:
        counts = PixelCounts(self.num_classes, IGNORE)
        for tensor, _, _ in gathered:
            counts.tensor += tensor
        pixels = sum(number for _, _, number in gathered)
        return {"miou": counts.results()["miou"], "loss": sum(loss for _, loss, _ in gathered) / max(pixels, 1)}
