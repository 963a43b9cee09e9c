"""Saving, stopping and showing a training run, on Lightning's hooks."""

import csv
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from muntin.errors import UserError
from muntin.run import TITLES, atomic_write
from muntin.tasks.base import Task
from muntin.tasks.checkpoints import AtomicCheckpoints, Damaged, prune, read_checkpoint, set_aside
from muntin.tasks.ranks import several

AGREED = 10  # steps between two questions whether a process was told to save or stop: each waits for all
CHECKED = 50  # steps between two looks at how many were skipped: each waits for the device
STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; pre-emption, and what SLURM's --signal=USR1 announces it by


class Stopped(BaseException):
    """A signal came, and the run has been saved. Lightning would turn a KeyboardInterrupt into an exit."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Saver(lightning.Callback):
    """Keeps last.ckpt with `keep` - 1 saves before it, best.ckpt and history.csv, and stops between steps if asked to.

    The best epoch is the latest one whose validation accuracy is not significantly below the highest, by two
    standard errors, and of its weights the averaged ones where they are not significantly below the raw: the highest
    of many noisy figures is mostly luck, while late epochs, with their low learning rate, and averages generalise
    better (after the one-standard-error rule of Breiman et al., 1984). `best` describes what is kept: epoch, weights
    ("raw", "ema"), accuracy, loss.
    `top` is the highest accuracy so far and the epoch that first reached it. Another `metric` between 0 and 1 than
    accuracy takes its place everywhere, with standard errors as if it were a share of the images.
    `replays` says that the settings are those of the checkpoint: what was done after it comes again to the bit.
    """

    def __init__(
        self,
        folder: Path,
        patience: int,
        save_minutes: float,
        val_images: int,
        *,
        keep: int = 1,
        replays: bool = True,
        report: Callable[[str], None] = print,
        metric: str = "accuracy",
    ) -> None:
        self.folder = folder
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best_path = folder / "checkpoints" / "best.ckpt"
        self.patience = patience
        self.save_seconds = 60 * save_minutes
        self.val_images = val_images
        self.keep = keep
        self.replays = replays
        self.report = report
        self.metric = metric
        self.saved_step = 0  # of last.ckpt
        self.best: dict[str, Any] = {}
        self.top: dict[str, float] = {"epoch": 0, metric: -1.0}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0  # of all sessions before this one
        self.signal: int | None = None  # that this process got
        self.stop: int | None = None  # that all processes stop for

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "top": self.top, "history": self.history, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.top, self.history = state_dict["best"], state_dict["top"], state_dict["history"]
        self.seconds = state_dict["seconds"]

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before the state is loaded: history.csv without epochs after the checkpoint, and best.ckpt that fits it."""
        self.saved_step = checkpoint["global_step"]
        state = checkpoint["callbacks"][self.state_key]
        if trainer.is_global_zero:
            atomic_write(self.folder / "history.csv", history_csv(state["history"], self.metric))
        if state["best"] and (trouble := self._trouble_with_best(state)):
            epoch_done = checkpoint["global_step"] == len(state["history"]) * pl_module.steps_per_epoch
            self._replace_best(state, checkpoint.get("state_dict", {}) if epoch_done else {}, trouble, trainer)

    def _trouble_with_best(self, state: dict[str, Any]) -> str:
        try:
            found = read_checkpoint(self.best_path)["epoch"] + 1
        except Damaged as error:
            return str(error).partition(": ")[0]
        # A later one than the checkpoint knows comes again, unless the settings are others now.
        if found != state["best"]["epoch"] and not self.replays:
            return f"{self.best_path} is of epoch {found}, which was left out with the checkpoint after it"
        return ""

    def _replace_best(
        self, state: dict[str, Any], weights: dict[str, Any], trouble: str, trainer: lightning.Trainer
    ) -> None:
        """`weights` are those at the end of the last epoch, where the checkpoint is of that moment."""
        done, epochs = len(state["history"]), trainer.max_epochs or 0
        if weights and state["best"]["epoch"] == done:
            if trainer.is_global_zero:
                content = {"epoch": done - 1, "state_dict": weights, "kept": state["best"]}
                AtomicCheckpoints().save_checkpoint(content, self.best_path)
            self.report(f"{trouble}: restored from the checkpoint, which is of the same epoch")
        elif done < epochs:
            self.report(f"{trouble}: the best is chosen among the epochs from {done + 1} on")
            state["best"], state["top"] = {}, {"epoch": done, self.metric: -1.0}
            if trainer.is_global_zero:
                self.best_path.unlink(missing_ok=True)  # so that another resume finds the same
        else:
            raise UserError(
                f"{trouble}, and no epoch is left to choose another: put back a copy of it, or train on with more "
                f"epochs, as in --resume --force --set epochs={2 * epochs}"
            )

    def elapsed(self) -> float:
        """Seconds of training, over all sessions."""
        return self.seconds + (time.monotonic() - self._started if hasattr(self, "_started") else 0.0)

    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return bool(self.patience and self.history) and (self.history[-1]["epoch"] - self.top["epoch"] >= self.patience)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = self._saved = self._epoch_started = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # Lightning has set its own by now, and puts the original ones back at the end.
            for name in STOPPING:
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), self._on_signal)
        if self.exhausted():
            trainer.should_stop = True

    def _on_signal(self, number: int, _frame: Any) -> None:
        """The first asks for a stop after this step; another Ctrl-C does not wait. Schedulers repeat theirs."""
        if self.signal is not None:
            if number == signal.SIGINT:
                raise Stopped(number)
            return
        self.signal = number
        print(f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C stops at once", file=sys.stderr)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._epoch_started = time.monotonic()

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # At the start of a step all of Lightning's counters agree on what is done; at its end they do not.
        if not batch_idx or batch_idx % pl_module.settings.accumulate:
            return  # within a step of the optimiser
        if trainer.global_step % CHECKED == 0:
            pl_module.refuse_skips()
        if several() and trainer.global_step % AGREED:
            return
        pl_module.share_statistics()  # before a save, and at steps that do not depend on when one is due
        if self._asked(trainer, time.monotonic() - self._saved > self.save_seconds):
            self._save_last(trainer, pl_module)

    def _asked(self, trainer: lightning.Trainer, due: bool) -> bool:
        """Whether to save, because it is due or to stop then: the same in all processes, whichever got a signal."""
        if not several():
            self.stop = self.signal
        else:
            asked = torch.tensor([float(due), float(self.signal or 0)], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            due, self.stop = bool(asked[0]), int(asked[1]) or None
        return due or self.stop is not None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        pl_module.refuse_skips(epoch_done=True)  # before validation and saving

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        results: dict[str, dict[str, float]] = pl_module.results  # type: ignore[assignment]
        name = preferred(results, self.val_images, self.metric)
        found = results[name]
        epoch = trainer.current_epoch + 1
        self.history.append(
            {
                "epoch": epoch,
                "train_loss": pl_module.train_loss(),
                **({"val_loss": found["loss"]} if "loss" in found else {}),
                f"val_{self.metric}": found[self.metric],
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "seconds": time.monotonic() - self._epoch_started,
            }
        )
        highest = max(result[self.metric] for result in results.values())
        if highest > self.top[self.metric]:
            self.top = {"epoch": epoch, self.metric: highest}
        if found[self.metric] >= least(self.top[self.metric], self.val_images):
            self.best = pl_module.kept = {"epoch": epoch, "weights": name, **found}
            trainer.save_checkpoint(self.best_path, weights_only=True)
        if trainer.is_global_zero:
            atomic_write(self.folder / "history.csv", history_csv(self.history, self.metric))
        if trainer.logger is not None:
            values = {f"epoch/{name}": value for name, value in self.history[-1].items() if name != "epoch"}
            trainer.logger.log_metrics(values, trainer.global_step)
        self._asked(trainer, True)
        self._save_last(trainer, pl_module)
        if self.exhausted():
            trainer.should_stop = True

    def _save_last(self, trainer: lightning.Trainer, task: Any) -> None:
        task.refuse_skips()
        if trainer.logger is not None:
            trainer.logger.save()  # points wait in memory otherwise, and those before a checkpoint are not drawn again
        if self.keep > 1 and trainer.is_global_zero:
            set_aside(self.last, self.saved_step)
        trainer.save_checkpoint(self.last)
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            prune(self.folder, self.keep)
        self._saved = time.monotonic()
        if self.stop is not None:
            raise Stopped(self.stop)


def least(accuracy: float, images: int) -> float:
    """The accuracy minus two standard errors over so many images, which count one more mistake: never zero."""
    wrong = ((1 - accuracy) * images + 1) / (images + 2)
    return accuracy - 2 * math.sqrt(wrong * (1 - wrong) / images)


def preferred(results: dict[str, dict[str, float]], images: int, metric: str = "accuracy") -> str:
    """ "ema" unless the averaged weights are significantly less accurate than the raw ones."""
    if "ema" in results and results["ema"][metric] >= least(results["raw"][metric], images):
        return "ema"
    return "raw"


def history_csv(rows: list[dict[str, float]], metric: str = "accuracy") -> bytes:
    """history.csv: one line per epoch."""
    columns = ["epoch", "train_loss", "val_loss", f"val_{metric}", "lr", "seconds"]
    if rows and "val_loss" not in rows[0]:  # detectors have a loss in training alone
        columns.remove("val_loss")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(row[name] if name == "epoch" else f"{row[name]:.6g}" for name in columns)
    return text.getvalue().encode()


def epochs_done(folder: Path) -> int:
    """How many epochs the history of a run has."""
    path = folder / "history.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


class Progress(lightning.Callback):
    """In a terminal one bar over the whole training, with rate and time left; elsewhere a line per epoch.

    Comes after the `Saver`, whose history it shows, and writes the curve of the steps for TensorBoard.
    """

    EVERY = 50  # steps between two points of the curves within an epoch

    def __init__(self, saver: Saver, epochs: int) -> None:
        self.saver = saver
        self.epochs = epochs
        self.terminal = sys.stderr.isatty()
        self.bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.terminal and trainer.is_global_zero:
            from tqdm import tqdm

            total = self.epochs * pl_module.steps_per_epoch
            self.bar = tqdm(total=total, initial=trainer.global_step, unit="step", dynamic_ncols=True)
        self._first, self._started = trainer.global_step, time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.set_description(f"epoch {trainer.current_epoch + 1}/{self.epochs}")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % pl_module.settings.accumulate:
            return  # within a step of the optimiser
        if self.bar is not None:
            self.bar.update()
        if trainer.logger is not None and trainer.global_step % self.EVERY == 0:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            values = {"step/loss": float(pl_module.step_loss), "step/lr": rate}
            trainer.logger.log_metrics(values, trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        row, metric = self.saver.history[-1], self.saver.metric
        skipped = int(pl_module.skipped)
        remark = f", {skipped} steps skipped" if skipped else ""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}, val {row[f'val_{metric}']:.2%}{remark}")
        if self.bar is not None or not trainer.is_global_zero:
            return
        rate = (trainer.global_step - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self.epochs * pl_module.steps_per_epoch - trainer.global_step) / max(rate, 1e-9)
        print(
            f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.3f}  "
            + (f"val loss {row['val_loss']:.3f}  " if "val_loss" in row else "")
            + f"val {TITLES[metric]} {row[f'val_{metric}']:.2%}  "
            f"{rate:.1f} steps/s  {duration(left)} left{remark}",
            flush=True,
        )

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
