"""What detection and segmentation share in training: preparation, fixed norms, validation in the images' own pixels."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from muntin.data.annotated_loading import Resized, alike
from muntin.data.device import Prepare
from muntin.tasks.base import BATCH_NORM, Task
from muntin.tasks.ranks import several
from muntin.tasks.settings import Settings


class Dense(Task):
    """A detector or segmenter in training. Sub-classes say what a validation gathers and what it comes to.

    `results` holds the last validation: {"raw" | "ema": {metric: 0..1, ...}}.
    """

    metric: str  # that the best epoch is chosen by

    def __init__(self, model: nn.Module, settings: Settings, steps_per_epoch: int, prepare: Prepare) -> None:
        super().__init__(model, settings, steps_per_epoch)
        self.prepare = prepare
        self.results: dict[str, dict[str, float]] = {}
        self.gathered: dict[str, list[Any]] = defaultdict(list)
        if settings.freeze_norms:
            freeze_norms(model)
        if settings.channels_last:
            self.to(memory_format=torch.channels_last)

    def prepared(self, images: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
        """Normalised, with zeros beyond `sizes`: what stands there is no part of an image."""
        images = self.prepare(images)
        for image, (height, width) in zip(images, sizes or [], strict=bool(sizes)):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning would copy every part of a list of `Resized`, label maps at the images' own size included."""
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, batch: list[Resized], batch_idx: int) -> None:
        for group in alike(batch):
            images = self.prepare(torch.stack([item.pixels for item in group]).to(self.device))
            for name, model in self.candidates().items():
                self.gathered[name] += self.observe(model, images, group)

    def observe(self, model: nn.Module, images: Tensor, group: list[Resized]) -> list[Any]:
        """What is to be gathered of prepared images, for `summarise`."""
        raise NotImplementedError

    def summarise(self, gathered: list[Any]) -> dict[str, float]:
        """The results of one candidate from what was gathered of all images."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        self.results = {}
        for name in self.candidates():
            gathered = self.gathered.pop(name, [])
            if several():
                parts: list[Any] = [None] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(parts, gathered)
                gathered = [item for part in parts for item in part]
            self.results[name] = self.summarise(gathered)


def freeze_norms(model: nn.Module) -> None:
    """BatchNorms of the backbone keep their statistics and are not trained, as detectors of small batches have them."""
    backbone: Any = getattr(model, "backbone", model)
    for module in backbone.modules():
        if isinstance(module, BATCH_NORM):
            module.eval().requires_grad_(False)
