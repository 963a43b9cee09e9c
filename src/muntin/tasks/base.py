"""What every training task shares: optimiser, schedule, average of the weights, randomness by step, a guard."""

import copy
from collections import defaultdict
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.tasks.optimizer import clip_gradients, groups, rate
from muntin.tasks.settings import Settings

MEMORY = 0.98  # of the running mean of the loss, per step
LEAST_SPIKE = 1.0  # losses below are no spikes, however small the mean


class Diverged(UserError):
    """Too many steps had to be skipped: the settings are what is wrong."""


class Task(lightning.LightningModule):
    """A model in training. Sub-classes give `training_loss` and validation.

    The random state of a step is a function of (seed, step) and of its part, so a step that is repeated after a restart
    is the same step. The average of the weights is updated inside the optimiser's step, before anything is saved.
    A step whose loss or gradient is not finite, or whose loss is a spike, changes nothing but a count.
    """

    loss_sum: Tensor
    loss_count: Tensor
    typical: Tensor
    skipped: Tensor
    in_a_row: Tensor

    def __init__(self, model: nn.Module, settings: Settings, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        freeze(model, settings.freeze)
        self.average: nn.Module | None = None
        if settings.ema_decay:
            self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self._averaged: dict[bool, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        # Saved with the weights, so that the mean of an epoch survives a stop in its middle.
        self.register_buffer("loss_sum", torch.zeros(()))  # of the steps that were not skipped
        self.register_buffer("loss_count", torch.zeros(()))
        self.register_buffer("typical", torch.zeros(()))  # running mean of the loss, 0 before the first step
        self.register_buffer("skipped", torch.zeros(()))
        self.register_buffer("in_a_row", torch.zeros(()))
        self._losses: list[Tensor] = []  # of the parts of this step

    def candidates(self) -> dict[str, nn.Module]:
        """The weights to choose from, by name: "raw", and "ema" where there is an average."""
        return {"raw": self.model} | ({} if self.average is None else {"ema": self.average})

    def training_loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def train_loss(self) -> float:
        """Mean over the steps of this epoch; NaN where all were skipped."""
        return float(self.loss_sum / self.loss_count) if self.loss_count else float("nan")

    def on_train_epoch_start(self) -> None:
        self.loss_sum.zero_()
        self.loss_count.zero_()
        for module in frozen(self.model, self.settings.freeze):
            module.eval()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        part = batch_idx % self.settings.accumulate
        drawn = np.random.SeedSequence((self.settings.seed, self.trainer.global_step, part, self.global_rank))
        torch.manual_seed(int(drawn.generate_state(1)[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self._losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and mark the step as one to be skipped where loss or gradient say so; all without waiting for the
        device.
        """
        loss = torch.stack(self._losses).mean().float()
        self._losses.clear()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        spike = self._spikes(loss)
        if scaler is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, torch.where(spike, torch.inf, 1.0))  # for the scaler to skip
            scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self.settings)
        bad = spike | ~torch.isfinite(norm)
        if scaler is None:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # what the fused AdamW skips a step by
        # An overflow under a loss scale is the scaler's to mend, but counts.
        self._count(loss, bad)

    def _spikes(self, loss: Tensor) -> Tensor:
        bad = ~torch.isfinite(loss)
        if self.settings.spike:
            limit = (self.settings.spike * self.typical).clamp(min=LEAST_SPIKE)
            bad = bad | ((self.typical > 0) & (loss > limit))
        return bad

    def _count(self, loss: Tensor, bad: Tensor) -> None:
        good = (~bad).float()
        loss = torch.where(bad, 0.0, loss)
        self.loss_sum += loss
        self.loss_count += good
        self.skipped += 1 - good
        self.in_a_row.add_(1).mul_(1 - good)
        weight = good * torch.where(self.typical > 0, 1 - MEMORY, 1.0)
        self.typical.lerp_(loss, weight)

    def refuse_skips(self, epoch_done: bool = False) -> None:
        """Raises `Diverged` where so many steps in a row, or half of an epoch, were skipped: that is no accident."""
        if self.in_a_row >= self.settings.max_skips or (epoch_done and 2 * self.loss_count < self.steps_per_epoch):
            raise Diverged(
                f"{int(self.in_a_row)} training steps in a row had a loss or a gradient that is not finite, or a loss "
                f"of more than {self.settings.spike:g} times the usual {float(self.typical):.3g}, and were skipped; "
                f"lower the learning rate (--set lr={self.settings.lr / 4:g}), lengthen the warm-up (--set "
                "warmup=...), train in full precision (--set precision=32), or allow more (--set max_skips=...)"
            )

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
        torch._foreach_lerp_(ours, theirs, 1 - self.settings.average_decay())  # as in torch.optim.swa_utils
        for counter, value in self._averaged[False]:
            counter.copy_(value)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(groups(self.model, self.settings), lr=self.settings.peak(), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at a step over its peak."""
        return rate(step, self.settings, self.steps_per_epoch)


def frozen(model: nn.Module, stages: int) -> list[nn.Module]:
    """The stem and so many stages of a model with a backbone, none for 0. Raises `UserError` where it has fewer."""
    if not stages:
        return []
    backbone: Any = getattr(model, "backbone", model)
    if stages > len(backbone.stages):
        raise UserError(f"freeze={stages}: the model has {len(backbone.stages)} stages; give a number up to that")
    return [backbone.stem, *backbone.stages[:stages]]


def freeze(model: nn.Module, stages: int) -> None:
    """The stem and so many stages are not trained."""
    for module in frozen(model, stages):
        module.requires_grad_(False)
