"""What the user asked for: a recipe, a file and single settings as one, and the folder of the run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muntin.data.sources import SCENES, absolute, short_name
from muntin.errors import UserError
from muntin.tasks.recipes import read_config, read_recipe
from muntin.tasks.settings import TASKS, Settings, settings_from


@dataclass(frozen=True)
class Asked:
    """What was `told` in one way or another; the `settings` that come of it, and the run's folder."""

    told: dict[str, Any]
    settings: Settings
    folder: Path


def ask(
    out: str | os.PathLike[str] | None,
    recipe: str | None,
    config: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
) -> Asked:
    """Later layers win: the recipe, the file, the settings (None where nothing was said).

    The recipe is that of the digits where these are the data and none is named; for detection and segmentation that of
    the task, or for the built-in scenes theirs. Raises `UserError` naming what is wrong.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    from_recipe = read_recipe(recipe) if recipe is not None else {}
    told = _absolute(from_recipe | (read_config(os.fspath(config)) if config is not None else {}) | given)
    task = told.get("task", Settings.task)
    if from_recipe.get("task", task) != task:
        raise UserError(
            f"recipe {recipe} is for task={from_recipe['task']}, not {task}; leave out --task, or choose another "
            "recipe (muntin train --recipe list)"
        )
    if recipe is not None and "task" not in from_recipe and task != Settings.task:
        raise UserError(f"recipe {recipe} is for task={Settings.task}, not {task}; see muntin train --recipe list")
    usual = read_recipe(default) if recipe is None and (default := _usual(task, told.get("data"))) else {}
    found = settings_from(usual, told)
    parts = [short_name(found.data), found.head, model_name(found)]
    name = "-".join(part for part in parts if part)
    return Asked(told, found, Path(out) if out is not None else Path("runs") / name)


def _usual(task: str, data: str | None) -> str:
    """The recipe of a task and data where none is named, "" for none."""
    if task == Settings.task:
        return "digits" if data in (None, "digits") else ""
    if task not in TASKS:
        return ""  # which the settings refuse
    return f"scenes/{task}" if data in (None, SCENES) else task


def model_name(settings: Settings) -> str:
    return settings.model or "swin_t"


def stored_settings(folder: Path) -> Settings:
    """Those of a run that was begun."""
    return settings_from(read_config(os.fspath(folder / "config.yaml")))


def processes(asked: Asked, resume: bool) -> tuple[int, int, str]:
    """How many processes on how many machines are to train, and where they meet: as told, else as a run that goes on
    had it.
    """
    stored = stored_settings(asked.folder) if resume and (asked.folder / "config.yaml").exists() else asked.settings
    names = ("devices", "nodes", "rendezvous")
    devices, nodes, rendezvous = (getattr(asked.settings if n in asked.told else stored, n) for n in names)
    if devices == 0:
        devices = torch.cuda.device_count()
    return devices or 1, nodes, rendezvous


def refuse_other_processes(settings: Settings, count: int) -> None:
    """Raises `UserError` where not as many processes run as the settings want."""
    wanted = (settings.devices or 0) * settings.nodes
    if wanted and wanted != count:
        raise UserError(
            f"devices={settings.devices} on nodes={settings.nodes} are {wanted} processes, and {count} "
            f"{'is' if count == 1 else 'are'} running; start them by the command muntin train, or as many by torchrun, "
            f"or go on with these by devices={count} nodes=1"
        )


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the paths in them absolute, so that a run can be resumed and evaluated from any folder."""
    values = dict(values)
    if "data" in values:
        values["data"] = absolute(str(values["data"]))
    weights = str(values.get("weights") or "")
    if os.path.exists(weights):  # otherwise a tag, or an address
        values["weights"] = os.path.abspath(weights)
    if values.get("token_labels"):
        values["token_labels"] = os.path.abspath(str(values["token_labels"]))
    teacher = str(values.get("teacher") or "")
    name, equals, file = teacher.partition("=")
    if os.path.exists(teacher):  # otherwise a name
        values["teacher"] = os.path.abspath(teacher)
    elif file:
        values["teacher"] = name + equals + os.path.abspath(file)
    return values
