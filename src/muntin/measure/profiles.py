"""Profiles of models that are named, side by side, and the files that are made of them."""

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.measure.machine import commit, machine, versions
from muntin.measure.profile import Profile, check_engine, profile
from muntin.measure.targets import Models, Size, Target, parse
from muntin.measure.timing import threads_of
from muntin.progress import Bar
from muntin.run import atomic_write
from muntin.runtime.precision import DTYPES
from muntin.runtime.precision import precision as full_precision

Given = str | tuple[str, nn.Module]


def profiles(
    targets: Sequence[Given],
    engines: Sequence[str] = ("eager",),
    batches: Sequence[int] = (1,),
    size: Size | None = None,
    *,
    precision: str = "float32",
    threads: int | None = None,
    device: str | None = None,
    calls: int = 5,
) -> list[Profile]:
    """A profile of each model in each engine at each batch size, in this order.

    targets: model names, runs' folders, timm:NAME, torchvision:NAME, transformers:NAME, or (label, module).
    size: (height, width) in pixels, by default each model's own.
    calls: profiled passes of each; medians are shown.
    Raises UserError for an unknown model, engine, precision or device, and for a size that a model does not take.
    """
    for engine in engines:
        check_engine(engine)
    dtype, place = DTYPES[full_precision(precision)], _device(device)
    counts = [("batch", b) for b in batches] + [("threads", threads or 1), ("calls", calls)]
    for what, count in [*counts, *(("size", side) for side in size or ())]:
        if count < 1:
            raise UserError(f"{what} {count} is not possible; give at least 1")
    named = [_target(given) for given in targets]
    models, found = Models(0), []
    total = len(named) * len(engines) * len(batches)
    with threads_of(threads or torch.get_num_threads()), Bar("profile", total) as bar:
        for target in named:
            for batch in batches:
                height, width = size or target.size
                model = _placed(_built(models, target, (height, width)), place, dtype)
                x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(place, dtype)
                _try(model, x, target.label)
                for engine in engines:
                    bar.say(f"{target.label}, {engine}, batch {batch}")
                    found.append(profile(model, x, engine=engine, name=target.label, calls=calls))
                    bar.step()
    return found


def _target(given: Given) -> Target:
    target = parse(given)[0]
    if target.kind == "file":
        raise UserError(
            f"{target.label} holds no modules that time could be attributed to; give the model's name or its run, and "
            f"the engine by --engine {target.only}"
        )
    return target


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; valid are cpu and cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name} is not here: PyTorch sees no GPU; leave --device out")
    return device


def _built(models: Models, target: Target, size: Size) -> nn.Module:
    try:
        return models.get(target, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_refused(target.label, size, error)) from error


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    first = next(model.parameters(), torch.empty(0))
    if first.device.type == device.type and first.dtype == dtype:
        return model
    import copy

    return copy.deepcopy(model).to(device, dtype)


def _try(model: nn.Module, x: Tensor, label: str) -> None:
    """One pass, so that what a model does not take is told before anything is measured."""
    try:
        with torch.inference_mode():
            model.eval()(x)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_refused(label, (x.shape[2], x.shape[3]), error)) from error


def _refused(label: str, size: Size, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{label} does not take images of {size[0]}x{size[1]} ({reason}); give another --size, or leave it out"


def where() -> str:
    """The machine and the versions, in words."""
    here, found = machine(torch.device("cpu")), versions()
    told = ", ".join(f"{name} {found[name]}" for name in ("torch", "timm", "onnxruntime") if name in found)
    return f"{here['cpu']}, {here['cores']} cores; {told}"


def content(found: Sequence[Profile]) -> dict[str, Any]:
    """Profiles as plain data, with what is needed to judge and repeat them."""
    return {
        "profiles": [p.plain() for p in found],
        "machine": machine(torch.device(found[0].device)),
        "versions": versions(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(
    found: Sequence[Profile],
    *,
    to_json: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> list[str]:
    """The files that are wanted; their names."""
    from muntin.measure import profile_page
    from muntin.measure.trace import trace as traced

    makers: list[tuple[Any, Callable[[], bytes]]] = [
        (to_json, lambda: (json.dumps(content(found), indent=1) + "\n").encode()),
        (plot, lambda: profile_page.picture(found)),
        (html, lambda: profile_page.html(found, where()).encode()),
        (trace, lambda: traced(found).encode()),
    ]
    written = []
    for path, make in makers:
        if path:
            atomic_write(path, make())
            written.append(str(path))
    return written


def check_files(**paths: str | None) -> None:
    """UserError, before anything is measured, for a picture that is no PNG or a folder that is not there."""
    plot = paths.get("plot")
    if plot and not plot.endswith(".png"):
        raise UserError(f"--plot {plot}: the picture is a PNG; give a name that ends in .png, or --html for a page")
    for path in paths.values():
        folder = os.path.dirname(path or "") or "."
        if not os.path.isdir(folder):
            raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")


def words(given: str | Sequence[str]) -> list[str]:
    """The items of lists that are separated by commas or spaces."""
    text = given if isinstance(given, str) else " ".join(given)
    return [word for word in re.split(r"[,\s]+", text) if word]


def numbers(given: str | Sequence[str], what: str) -> list[int]:
    """The same, as whole numbers. Raises UserError for anything else."""
    found = words(given)
    if not all(re.fullmatch(r"-?\d+", word) for word in found):
        raise UserError(f"{what} {' '.join(found)}: give whole numbers, separated by commas or spaces")
    return [int(word) for word in found]
