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
from muntin.tasks.ranks import mean, several
from muntin.tasks.resuming import made_with, recount
from muntin.tasks.settings import Settings

MEMORY = 0.98  # of the running mean of the loss, per step
LEAST_SPIKE = 1.0  # losses below are no spikes, however small the mean
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Diverged(UserError):
    """Too many steps had to be skipped: the settings are what is wrong."""


class Task(lightning.LightningModule):
    """A model in training. Sub-classes give `training_loss` and validation.

    The random state of a step is a function of (seed, step) and of its part, so a step that is repeated after a restart
    is the same step. The average of the weights is updated inside the optimiser's step, before anything is saved.
    A step whose loss or gradient is not finite, or whose loss is a spike, changes nothing but a count; the average of
    the weights follows the same weights one step further.
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
        self.kept: dict[str, Any] = {}  # what is said of the best weights, saved with them
        self._statistics: list[list[Tensor]] | None = None  # of BatchNorms, by type
        self._statistics_before: list[Tensor] = []  # this step, flat
        # Saved with the weights, so that the mean of an epoch survives a stop in its middle.
        self.register_buffer("loss_sum", torch.zeros(()))  # of the steps that were not skipped
        self.register_buffer("loss_count", torch.zeros(()))
        self.register_buffer("typical", torch.zeros(()))  # running mean of the loss, 0 before the first step
        self.register_buffer("skipped", torch.zeros(()))
        self.register_buffer("in_a_row", torch.zeros(()))
        self._losses: list[Tensor] = []  # of the parts of this step
        self.step_loss = torch.zeros(())  # of the last step: the mean over its parts and processes
        self._sharded = False

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

    def on_train_start(self) -> None:
        """Rates and decays from the settings of now, whatever a checkpoint had."""
        schedule: Any = self.lr_schedulers()
        factor = self.rate(schedule.last_epoch)
        fresh: list[dict[str, Any]] = groups(self.model, self.settings)
        for group, new in zip(schedule.optimizer.param_groups, fresh, strict=True):
            group.update(weight_decay=new["weight_decay"], lr_scale=new["lr_scale"], initial_lr=new["lr"])
            group["lr"] = new["lr"] * factor
        schedule.base_lrs = [group["lr"] for group in fresh]
        schedule._last_lr = [group["lr"] * factor for group in fresh]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        part = batch_idx % self.settings.accumulate
        drawn = np.random.SeedSequence((self.settings.seed, self.trainer.global_step, part, self.global_rank))
        torch.manual_seed(int(drawn.generate_state(1)[0]))
        if part == 0:
            self._remember_statistics()

    @torch.no_grad()
    def _remember_statistics(self) -> None:
        """What a forward pass changes: a batch with a NaN would leave it in BatchNorm's averages for good."""
        if self._statistics is None:
            norms = [m for m in self.model.modules() if isinstance(m, BATCH_NORM)]
            buffers = [buffer for norm in norms for buffer in norm.buffers()]
            kinds = sorted({buffer.dtype for buffer in buffers}, key=str)
            self._statistics = [[b for b in buffers if b.dtype == kind] for kind in kinds]
        self._statistics_before = [torch.cat([b.flatten() for b in same]) for same in self._statistics]

    @torch.no_grad()
    def _restore_statistics(self, bad: Tensor) -> None:
        for same, before in zip(self._statistics or [], self._statistics_before, strict=True):
            chosen = torch.where(bad, before, torch.cat([b.flatten() for b in same]))
            parts = chosen.split([b.numel() for b in same])
            torch._foreach_copy_(same, [part.view_as(b) for part, b in zip(parts, same, strict=True)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self._losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and mark the step as one to be skipped where loss or gradient say so; all without waiting for the
        device.
        """
        loss = self.step_loss = mean(torch.stack(self._losses).mean().float())
        self._losses.clear()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        spike = self._spikes(loss)
        if scaler is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            # For the scaler to skip, which halves the scale besides; that grows again by itself.
            torch._foreach_mul_(gradients, torch.where(spike, torch.inf, 1.0))
            scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self.settings)
        bad = spike | ~torch.isfinite(norm)
        if self._sharded:
            if bad:  # waits for the device: the fused AdamW takes no mark, as below, for sharded weights
                optimizer.zero_grad()
        elif scaler is None:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # what the fused AdamW skips a step by
        # An overflow under a loss scale is how the scaler finds its scale: the step is skipped, its loss is none.
        self._count(loss, bad, spike if scaler is not None else bad)
        self._restore_statistics(bad)

    def on_validation_start(self) -> None:
        self.share_statistics()

    def share_statistics(self) -> None:
        """Statistics of BatchNorm, of which each process has its own, become their mean."""
        if not several():
            return
        norms = [m for model in self.candidates().values() for m in model.modules() if isinstance(m, BATCH_NORM)]
        buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        if buffers:
            means = mean(torch.cat([b.flatten() for b in buffers])).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(means, buffers, strict=True)])

    def configure_model(self) -> None:
        """With strategy "fsdp": weights, gradients and the optimiser's state are shared out over the processes."""
        if self.settings.strategy != "fsdp" or not several() or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for model in self.candidates().values():
            backbone: Any = getattr(model, "backbone", model)
            for stage in backbone.stages:
                for block in stage.blocks:
                    fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self._sharded = True

    def _spikes(self, loss: Tensor) -> Tensor:
        bad = ~torch.isfinite(loss)
        if self.settings.spike:
            limit = (self.settings.spike * self.typical).clamp(min=LEAST_SPIKE)
            bad = bad | ((self.typical > 0) & (loss > limit))
        return bad

    def _count(self, loss: Tensor, skipped: Tensor, bad: Tensor) -> None:
        """`bad`: the loss is not to be counted."""
        good = (~bad).float()
        loss = torch.where(bad, 0.0, loss)
        self.loss_sum += loss
        self.loss_count += good
        self.skipped += skipped
        self.in_a_row.add_(1).mul_(skipped)
        weight = good * torch.where(self.typical > 0, 1 - MEMORY, 1.0)
        self.typical.lerp_(loss, weight)

    def refuse_skips(self, epoch_done: bool = False) -> None:
        """Raises `Diverged` where so many steps in a row, or half of an epoch, were skipped: that is no accident."""
        row, bad = int(self.in_a_row), self.steps_per_epoch - int(self.loss_count)
        if row >= self.settings.max_skips or (epoch_done and 2 * bad > self.steps_per_epoch):
            full = "" if self.settings.precision == "32" else " train in full precision (--set precision=32),"
            many = f"{bad} of the {self.steps_per_epoch} training steps of an epoch"
            raise Diverged(
                f"{f'{row} training steps in a row' if row >= self.settings.max_skips else many} "
                "had a loss or a gradient that is not finite, or a loss "
                f"of more than {self.settings.spike:g} times the usual {float(self.typical):.3g}, and were skipped; "
                f"lower the learning rate (--set lr={self.settings.lr / 4:g}), lengthen the warm-up (--set "
                f"warmup=...),{full} or allow more (--set max_skips=...)"
            )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.trainer.global_step  # which the next line counts up
        optimizer.step(closure=optimizer_closure)
        self.update_average(step)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weights; statistics of BatchNorm too, counters are copied."""
        if self.average is None:
            return
        if not self._averaged:  # collected once: walking the modules takes longer than the arithmetic
            for ours, theirs in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                self._averaged[theirs.is_floating_point()].append((local(ours), local(theirs)))
        ours, theirs = zip(*self._averaged[True], strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - self.settings.average_decay(step))  # as in torch.optim.swa_utils
        for counter, value in self._averaged[False]:
            counter.copy_(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = made_with(self.settings)
        checkpoint["kept"] = self.kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        recount(checkpoint, self.settings.accumulate)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(groups(self.model, self.settings), lr=self.settings.peak(), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at a step over its peak."""
        return rate(step, self.settings, self.steps_per_epoch)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def frozen(model: nn.Module, stages: int) -> list[nn.Module]:
    """The stem and so many stages of a model with a backbone, none for 0. Raises `UserError` where it has fewer."""
    if not stages:
        return []
    backbone: Any = getattr(model, "backbone", model)
    if stages > len(backbone.stages):
        raise UserError(f"freeze={stages}: the model has {len(backbone.stages)} stages; give a number up to that")
    return [backbone.stem, *backbone.stages[:stages]]


def freeze(model: nn.Module, stages: int) -> None:
    """The stem and so many stages are not trained, and use the statistics that they have."""
    for module in frozen(model, stages):
        module.requires_grad_(False).eval()
