"""Going on from a checkpoint, also with other settings than those it was made with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from muntin.errors import UserError
from muntin.tasks.checkpoints import latest
from muntin.tasks.optimizer import groups
from muntin.tasks.settings import MODEL_PREFIX, Settings

FREE = {"workers", "save_minutes", "keep", "devices", "nodes", "rendezvous", "strategy"}  # they do not touch the result
_COUNTED = "checkpoints count steps of the epochs that it makes"
_SHAPED = "the saved weights are those of that model"
FIXED = {  # what no checkpoint can go on with another value of
    "task": _SHAPED,
    "model": _SHAPED,
    "weights": "the run has begun from others",
    "size": "the recorded preprocessing is for that size",
    "batch_size": _COUNTED,
    "repeats": _COUNTED,
}


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from: steps and whole epochs done, the names of the parameters in each group of the
    optimiser, and what it was `made_with`.
    """

    path: Path
    step: int
    epochs: int
    groups: list[list[str]]
    settings: dict[str, Any]

    def changes(self, wanted: Settings) -> dict[str, tuple[Any, Any]]:
        """Settings that are not those it was made with: name -> (then, now)."""
        return _differences(self.settings, made_with(wanted))


def find_start(folder: Path, report: Callable[[str], None]) -> Start | None:
    """The latest checkpoint of a run that can be read, None where nothing was saved. Raises as `latest` does."""
    found = latest(folder, report)
    if found is None:
        return None
    path, checkpoint = found
    if "settings" not in checkpoint:
        raise UserError(
            f"{path} is of an earlier version of Muntin; start another run from its weights with: --set weights={path}"
        )
    names = [group["names"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    epochs = len(checkpoint["callbacks"]["Saver"]["history"])
    return Start(path, checkpoint["global_step"], epochs, names, checkpoint["settings"])


def made_with(settings: Settings) -> dict[str, Any]:
    """The settings that touch the result, as plain values."""
    free = FREE if settings.deterministic else FREE | {"threads"}  # sums by other numbers of threads round otherwise
    return {name: value for name, value in settings.flat().items() if name not in free}


def changed(stored: Settings, wanted: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and are not free to: name -> (then, now), in the order of `Settings`."""
    return _differences(made_with(stored), made_with(wanted))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*then, *(name for name in now if name not in then)]
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def refuse_changes(changes: Mapping[str, tuple[Any, Any]], folder: Path, epochs_done: int, force: bool) -> None:
    """Raises `UserError` with the whole difference, unless `force` is given and the checkpoint can go on with it."""
    if "model" in changes:  # its configuration differs with it
        changes = {name: values for name, values in changes.items() if not name.startswith(MODEL_PREFIX)}
    shown = ", ".join(f"{name}: {then} then, {now} now" for name, (then, now) in changes.items())
    reasons = {name: why for name in changes if (why := _why_fixed(name, changes[name], epochs_done))}
    if not changes or (force and not reasons):
        return
    message = f"settings differ from those in {folder / 'config.yaml'} ({shown}); leave them out to resume"
    if reasons:
        weights = next(
            (folder / name for name in ("model.safetensors", "checkpoints/best.ckpt") if (folder / name).exists()),
            folder / "checkpoints" / "last.ckpt",
        )
        alike = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
        given = " and ".join(f"{', '.join(names)} ({why})" for why, names in alike.items())
        raise UserError(
            f"{message}; not even --force can change {given}: start another run from these weights with: "
            f"--set weights={weights} --out ANOTHER"
        )
    raise UserError(f"{message}, or go on with the new ones from here with --force")


def _why_fixed(name: str, values: tuple[Any, Any], epochs_done: int) -> str:
    then, now = values
    if name.startswith(MODEL_PREFIX):
        return _SHAPED
    if name == "ema_decay" and not (then and now):
        return "checkpoints hold an average of the weights or none"
    if name == "data" and "digits" in values:
        return "the recorded split is of other images"
    if name == "epochs" and now < epochs_done:
        return f"{epochs_done} are done"
    return FIXED.get(name, "")


def refuse_other_groups(start: Start, model: nn.Module, settings: Settings) -> None:
    """Raises `UserError` where the optimiser's saved moments are of other groups of parameters."""
    now = [group["names"] for group in groups(model, settings)]
    if start.groups != now:
        raise UserError(
            f"these settings sort the parameters into {len(now)} groups, not the {len(start.groups)} whose "
            "optimiser's state is saved (freeze, weight_decay of 0 or layer_decay differ); not even --force can go on "
            "with them: leave them out"
        )


def recount(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Lightning's count of batches done, for steps in so many parts, in place."""
    before = checkpoint["settings"]["accumulate"]
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            done = counts["completed"]
            for name in counts:
                counts[name] += done * accumulate // before - done
