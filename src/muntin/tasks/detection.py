"""Object detection and instance segmentation: the head's losses, and average precision as COCO has it."""

from typing import Any

import torch
from torch import Tensor, nn

from muntin.data.annotated import Annotated
from muntin.data.annotated_loading import Resized
from muntin.data.device import Prepare
from muntin.measure.coco import coco_metrics
from muntin.run import METRICS
from muntin.tasks.dense import Dense
from muntin.tasks.dense_inference import coco_results
from muntin.tasks.settings import Settings


class Detection(Dense):
    """The sum of a detector's losses on padded batches; box and mask AP of raw and averaged weights.

    validation: what its results are held against.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, steps_per_epoch: int, prepare: Prepare, validation: Annotated
    ) -> None:
        super().__init__(model, settings, steps_per_epoch, prepare)
        self.metric = METRICS[settings.task]
        self.kinds = ("bbox", "segm") if settings.task == "instance" else ("bbox",)
        self.truth = validation.coco()

    def training_loss(self, batch: tuple[Tensor, list[tuple[int, int]], list[dict[str, Any]]]) -> Tensor:
        images, sizes, targets = batch
        losses = self.model(self.prepared(images, sizes), sizes, targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def observe(self, model: nn.Module, images: Tensor, group: list[Resized]) -> list[Any]:
        rows: list[Any] = []
        size = (images.shape[2], images.shape[3])
        for found, item in zip(model(images), group, strict=True):
            rows += coco_results(found, size, item.original, item.position + 1)
        return rows

    def summarise(self, gathered: list[Any]) -> dict[str, float]:
        metrics = coco_metrics(self.truth, gathered, self.kinds)
        return {name: value or 0.0 for name, value in metrics.items() if name in ("box_ap", "mask_ap")}
