"""What every training task shares: optimiser, schedule, average of the weights, randomness by step."""

import copy
import math
from collections import defaultdict
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from muntin.models.backbone import NO_DECAY
from muntin.tasks.settings import Settings

FLOOR = 0.01  # the last learning rate over the peak


class Task(lightning.LightningModule):
    """A model in training. Sub-classes give `training_loss` and validation.

    The random state of a step is a function of (seed, step), so a step that is repeated after a restart is the
    same step. The average of the weights is updated inside the optimiser's step, before anything is saved.
    """

    loss_sum: Tensor
    loss_count: Tensor

    def __init__(self, model: nn.Module, settings: Settings, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.average: nn.Module | None = None
        if settings.ema_decay:
            self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self._averaged: dict[bool, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        # Saved with the weights, so that the mean of an epoch survives a stop in its middle.
        self.register_buffer("loss_sum", torch.zeros(()))
        self.register_buffer("loss_count", torch.zeros(()))

    def candidates(self) -> dict[str, nn.Module]:
        """The weights to choose from, by name: "raw", and "ema" where there is an average."""
        return {"raw": self.model} | ({} if self.average is None else {"ema": self.average})

    def training_loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def train_loss(self) -> float:
        """Mean over the steps of this epoch."""
        return float(self.loss_sum / self.loss_count.clamp(min=1))

    def on_train_epoch_start(self) -> None:
        self.loss_sum.zero_()
        self.loss_count.zero_()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, step)).generate_state(1)[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip, foreach=True)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        """average = decay * average + (1 - decay) * weights; statistics of BatchNorm too, counters are copied."""
        if self.average is None:
            return
        if not self._averaged:  # collected once: walking the modules takes longer than the arithmetic
            for ours, theirs in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                self._averaged[theirs.is_floating_point()].append((ours, theirs))
        ours, theirs = zip(*self._averaged[True], strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - self.settings.ema_decay)  # as in torch.optim.swa_utils
        for counter, value in self._averaged[False]:
            counter.copy_(value)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (others if parameter.ndim <= 1 or name.endswith(NO_DECAY) else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at a step over its peak: linear warm-up, then a cosine down to `FLOOR`."""
        total = self.settings.epochs * self.steps_per_epoch
        warmup = min(self.settings.warmup * self.steps_per_epoch, total / 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(total - warmup, 1)
        return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
