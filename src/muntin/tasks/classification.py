"""Image classification: the loss, and the accuracy of raw and averaged weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from muntin.data.device import Erase, Prepare
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.models.rmt import forward_mixed
from muntin.tasks.base import Task
from muntin.tasks.distillation import Teacher, distillation_loss
from muntin.tasks.settings import Settings
from muntin.tasks.token_labels import TokenLabelling


class Classification(Task):
    """Cross-entropy with label smoothing on batches mixed by mixup or cutmix; accuracy of raw and averaged weights.

    With a teacher its logits are learned from too (`distillation_loss`); with token labels the targets are
    `TokenTarget`s and the loss is `TokenLabelling`.
    `results` holds the last validation: {"raw" | "ema": {"accuracy", "loss"}}.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        steps_per_epoch: int,
        num_classes: int,
        prepare: Prepare | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(model, settings, steps_per_epoch)
        self.teacher = teacher  # no module: neither saved nor trained
        self.prepare = prepare or Prepare(IMAGENET_MEAN, IMAGENET_STD)
        self.erase = Erase(settings.erasing if settings.augment == "photographs" else 0.0)
        self.mixes: list[nn.Module] = []
        if settings.mixup:
            self.mixes.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
        if settings.cutmix:
            self.mixes.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
        self.meters = nn.ModuleDict(
            {f"{name}_{what}": MeanMetric() for name in self.candidates() for what in ("accuracy", "loss")}
        )
        self.results: dict[str, dict[str, float]] = {}
        if settings.channels_last:
            self.to(memory_format=torch.channels_last)
        self.token_labelling: TokenLabelling | None = None
        if settings.token_labels:
            classifier: Any = model
            forward: Callable[..., Any] = partial(forward_mixed, classifier)
            if settings.compile:
                forward = torch.compile(forward, dynamic=False)
            stride = classifier.backbone.strides[-1]
            self.token_labelling = TokenLabelling(forward, stride, num_classes, settings)
        elif settings.compile:
            model.compile(dynamic=False)  # in place: the weights keep their names

    def training_loss(self, batch: tuple[Tensor, Any]) -> Tensor:
        images, targets = batch
        images = self.erase(self.prepare(images))
        if self.token_labelling is not None:
            return self.token_labelling(images, targets)
        if self.mixes:
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            images, targets = mix(images, targets)
        outputs = self.model(images)
        if self.teacher is not None:
            return distillation_loss(outputs, self.teacher(images), targets, self.settings)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.settings.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        images = self.prepare(images)
        counts = (labels >= 0).float()  # others fill up a process's share
        labels = labels.clamp(min=0)
        for name, model in self.candidates().items():
            logits = model(images).float()
            found = {
                "accuracy": (logits.argmax(1) == labels).float(),
                "loss": F.cross_entropy(logits, labels, reduction="none"),
            }
            for what, values in found.items():
                meter = self.meters[f"{name}_{what}"]
                assert isinstance(meter, MeanMetric)
                meter.update(values, counts)

    def on_validation_epoch_end(self) -> None:
        found = {}
        for key, meter in self.meters.items():
            assert isinstance(meter, MeanMetric)
            found[key] = float(meter.compute())
            meter.reset()
        self.results = {
            name: {"accuracy": found[f"{name}_accuracy"], "loss": found[f"{name}_loss"]} for name in self.candidates()
        }
