"""Image classification: the loss, and the accuracy of raw and averaged weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from muntin.data.device import Erase, Prepare
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.tasks.base import Task
from muntin.tasks.settings import Settings


class Classification(Task):
    """Cross-entropy with label smoothing on batches mixed by mixup or cutmix; accuracy of raw and averaged weights.

    `results` holds the last validation: {"raw" | "ema": {"accuracy", "loss"}}.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        steps_per_epoch: int,
        num_classes: int,
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__(model, settings, steps_per_epoch)
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
        # A bound method, so that the weights keep their names.
        self.forward_model = torch.compile(model.forward, dynamic=False) if settings.compile else model.forward

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        images = self.erase(self.prepare(images))
        if self.mixes:
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            images, targets = mix(images, targets)
        logits = self.forward_model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.settings.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        images = self.prepare(images)
        for name, model in self.candidates().items():
            logits = model(images).float()
            found = {
                "accuracy": (logits.argmax(1) == labels).float(),
                "loss": F.cross_entropy(logits, labels, reduction="none"),
            }
            for what, values in found.items():
                meter = self.meters[f"{name}_{what}"]
                assert isinstance(meter, MeanMetric)
                meter.update(values)

    def on_validation_epoch_end(self) -> None:
        found = {}
        for key, meter in self.meters.items():
            assert isinstance(meter, MeanMetric)
            found[key] = float(meter.compute())
            meter.reset()
        self.results = {
            name: {"accuracy": found[f"{name}_accuracy"], "loss": found[f"{name}_loss"]} for name in self.candidates()
        }
