"""Image classification: the loss, and the accuracy of raw and averaged weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
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

    metric = "accuracy"  # that the best epoch is chosen by

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
        self.num_classes = num_classes
        self.teacher = teacher  # no module: neither saved nor trained
        self.prepare = prepare or Prepare(IMAGENET_MEAN, IMAGENET_STD)
        self.erase = Erase(settings.erasing if settings.augment == "photographs" else 0.0)
        self.mixes: list[nn.Module] = []
        if settings.mixup:
            self.mixes.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
        if settings.cutmix:
            self.mixes.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
        self.meters = nn.ModuleDict(
            {f"{name}_{what}": self.meter(what) for name in self.candidates() for what in (self.metric, "loss")}
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
        return self.loss(self.model(images), targets, None if self.teacher is None else self.teacher(images))

    def loss(self, outputs: Any, targets: Tensor, taught: Tensor | None) -> Tensor:
        """Of logits, or of those of two heads, with targets that may be mixed and, where there is one, a teacher's
        logits.
        """
        if taught is not None:
            return distillation_loss(outputs, taught, targets, self.settings)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.settings.label_smoothing)

    def meter(self, what: str) -> Metric:
        """What gathers the metric, or the loss, over a validation."""
        return MeanMetric()

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
                self.gather(name, what, values, counts)

    def gather(self, name: str, what: str, *values: Tensor) -> None:
        """Add a batch to what the metric, or the loss, of the raw or averaged weights comes from."""
        meter = self.meters[f"{name}_{what}"]
        assert isinstance(meter, Metric)
        meter.update(*values)

    def on_validation_epoch_end(self) -> None:
        found = {}
        for key, meter in self.meters.items():
            assert isinstance(meter, Metric)
            found[key] = float(meter.compute())
            meter.reset()
        self.results = {
            name: {what: found[f"{name}_{what}"] for what in (self.metric, "loss")} for name in self.candidates()
        }
