"""Checkpoints of every dialect into a model: recognised from the names of the weights, checked both ways.

Nothing is copied before everything has been checked, so a failed load leaves the model as it was.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Dense
from muntin.run import atomic_write
from muntin.weights import efficientvit, rmt, swin, swinv2
from muntin.weights.dense import load_dense
from muntin.weights.download import local_file
from muntin.weights.files import read_file, unwrap
from muntin.weights.rules import (
    Reading,
    Rule,
    explains,
    forms,
    preview,
    read_plainly,
    recognise,
    translate,
    untranslate,
)
from muntin.weights.tables import check_window, grid_of, possible_windows, resize_table, table_windows

FAMILIES: dict[str, ModuleType] = {"swin": swin, "swinv2": swinv2, "efficientvit": efficientvit, "rmt": rmt}
"""Each has RULES, and `describe(weights)`: the configuration that the shapes of our weights show.

`resize(name, tensor, shape)`, where there is one, makes a tensor of another shape fit, or returns None. Without
it Swin's rule holds: a name that ends in `bias_table` is a table of (2w-1)^2 offsets for a window of w.
"""


@dataclass(frozen=True)
class LoadReport:
    """What became of each weight. Prints as a table.

    loaded, resized, replaced, missing: names in the model. `resized` are bias tables made for another window;
    `replaced` kept the model's own values, because the file has another number of classes or none of them;
    `missing` are not in the file. unexpected, ignored: names in the file. `ignored` are derived buffers and
    parts that this model does not have, such as a head. nonfinite: loaded, but with NaN or infinity inside.
    details: for some names, what is different.
    """

    dialect: str
    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'dialect':<10}  {self.dialect}"]
        for name in ("loaded", "resized", "replaced", "missing", "unexpected", "ignored", "nonfinite"):
            entries = getattr(self, name)
            told = [entry for entry in entries if entry in self.details] if name == "loaded" else entries
            shown = preview([self._entry(entry) for entry in told])
            lines.append(f"{name:<10}  {len(entries):>5}  {shown}".rstrip())
        return "\n".join(lines)

    def _entry(self, name: str) -> str:
        return f"{name} ({self.details[name]})" if name in self.details else name


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
    *,
    classes: str | Sequence[int] | None = None,
    file_window: tuple[int, int] | None = None,
) -> LoadReport:
    """Load weights in any known dialect into a model made by `create_model`, `create_backbone` or `create_dense`.

    A detector or segmenter takes a whole file, its own or mmdetection's and mmsegmentation's, or that of a backbone;
    heads that are not in it keep the model's values (`replaced`). A model of a family without rules, such as one's
    own, takes weights under its own names.
    Takes a .safetensors file, a file of torch.save, or a state dict, also inside of the entries and prefixes that
    training code wraps around it. Files are read as tensors only: code in them is refused and not run.
    Bias tables of another window are resized bicubically, as the authors do. A head of another number of
    classes, or a head or output norms that the file does not have, keep the model's values (`replaced`); a head
    that the model does not have is `ignored`.
    path_or_state_dict: an http or https address is downloaded first (see `muntin.weights.download`).
    classes: which of the file's classes the model has, by number and in order; "imagenet-1k" for the 1000 of
    ImageNet-1k out of the authors' 21841 of ImageNet-22k.
    file_window: height and width of the file's windows where timm made them for images that are not square, and
    the file does not show it. Such tables are resized to the model's square windows too.
    strict: raise UserError, and change nothing, where anything else does not fit; otherwise load the rest.

    Raises UserError for unreadable files, unknown names, and a checkpoint of another model.
    """
    if getattr(model, "optimized", False):
        raise UserError("an optimised copy takes no weights: load them into the model, then optimise again")
    if isinstance(path_or_state_dict, Mapping):
        source, content = "the state dict", path_or_state_dict
    else:
        if not isinstance(path_or_state_dict, (str, os.PathLike)):
            hint = ": its state_dict()?" if isinstance(path_or_state_dict, nn.Module) else ""
            kind = type(path_or_state_dict).__name__
            raise UserError(f"weights come from a path, an address or a state dict, not from a {kind}{hint}")
        source, content = os.fspath(path_or_state_dict), read_file(local_file(path_or_state_dict))
    if file_window is not None:
        check_window(file_window)
    if isinstance(model, Dense):
        backbone = model.backbone
        return load_dense(
            model, source, content, strict, lambda: _load(backbone, source, content, strict, classes, file_window)
        )
    return _load(model, source, content, strict, classes, file_window)


def _load(
    model: nn.Module,
    source: str,
    content: Mapping[str, Any],
    strict: bool,
    classes: str | Sequence[int] | None,
    file_window: tuple[int, int] | None,
) -> LoadReport:
    own = model.state_dict()
    names = _bare_names(own)
    target = {bare: own[name] for bare, name in names.items()}
    try:
        state = unwrap(content)
        family = _family_of(target)
        reading = recognise(_rules(first=family), state) if family else read_plainly(target, state)
        weights = translate(reading, state)
        taken = {} if classes is None else _take(weights, _numbers(classes, weights))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if any(tensor.is_meta for tensor in target.values()):
        raise UserError("the model is on the meta device and has no storage: create it on a real device to load")
    title = getattr(model, "name", type(model).__name__)
    if family and reading.family != family:
        theirs = _like(FAMILIES[reading.family].describe(weights), reading.family)
        raise UserError(
            f"{source} holds weights of {reading.family} ({theirs}), the model is {title} ({family}): create the "
            "model that the weights belong to, or choose another file"
        )
    resizes = hasattr(FAMILIES.get(reading.family), "resize")
    windows = {} if resizes else table_windows(reading, weights, state, file_window)
    plan = _Plan(reading, weights, target, windows)
    plan.details |= taken
    if strict:
        plan.check(source, title)
    if hollow := next((name for name, tensor in plan.values.items() if tensor.is_meta), None):
        raise UserError(f"{source}: {hollow} is on the meta device and has no values")
    with torch.no_grad():
        for name, tensor in plan.values.items():
            target[name].copy_(tensor)
    report = plan.report(names)
    if report.nonfinite:
        warnings.warn(f"{source}: NaN or infinity in {preview(report.nonfinite)}", stacklevel=2)
    return report


def convert(state: Mapping[str, Any], to: str = "muntin") -> dict[str, Tensor]:
    """Weights of any known dialect under the names of another: "authors", "timm", "torchvision", "mm", ..."""
    reading, weights = _read(state, to)
    return _written(reading.family, weights, to)


def convert_file(
    source: str | os.PathLike[str], out: str | os.PathLike[str], to: str = "muntin"
) -> tuple[str, LoadReport]:
    """Write a checkpoint's weights under the names of another dialect; says what they are, and what became of each.

    source: as for `load_checkpoint`. out: a .safetensors file, or .pth or .pt for torch.save, where the authors'
    dialect has its weights under `model`, as their code reads them. The file is written whole or not at all.

    Raises UserError as `load_checkpoint` does, and where `out` is the source itself.
    """
    path, out = local_file(source), Path(out)
    path = path / "model.safetensors" if path.is_dir() else path
    if out.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{out}: the name of what is written ends in .safetensors, .pth or .pt")
    if path.exists() and out.exists() and path.samefile(out):
        raise UserError(f"{out} is the file to convert: give another name for what is written")
    content = read_file(path, mapped=True)
    try:
        reading, weights = _read(content, to)
        tensors = {name: _own_memory(tensor) for name, tensor in _written(reading.family, weights, to).items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if out.suffix == ".safetensors":
        metadata = {"format": "pt"}
        atomic_write(out, lambda file: safetensors.torch.save_file(tensors, file, metadata))
    else:
        atomic_write(out, lambda file: torch.save({"model": tensors} if to == "authors" else tensors, file))
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    shown = FAMILIES[reading.family].describe(weights)
    report = LoadReport(reading.dialect, tuple(tensors), ignored=tuple(reading.ignored), nonfinite=tuple(broken))
    return f"{reading.family}, {_like(shown, reading.family)} ({_plain(shown)})", report


def _read(state: Mapping[str, Any], to: str) -> tuple[Reading, dict[str, Tensor]]:
    """A state dict under our names. UserError where any of its names is unknown."""
    tensors = unwrap(state)
    reading = recognise(_rules(), tensors)
    if reading.unexpected:
        raise UserError(f"no name in {to} for {preview(reading.unexpected)}: leave these out")
    return reading, translate(reading, tensors)


def _written(family: str, weights: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """Weights under our names (without `backbone.`) as a dialect has them."""
    if to != "muntin":
        return untranslate(FAMILIES[family].RULES, weights, to)
    return {name if name.startswith("head.") else f"backbone.{name}": t for name, t in weights.items()}


def _own_memory(tensor: Tensor) -> Tensor:
    """Contiguous, and no part of a larger one: files hold each tensor by itself."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _rules(first: str = "") -> dict[str, list[Rule]]:
    """Every family's, that one first which should win where several explain a file equally well."""
    return {name: FAMILIES[name].RULES for name in sorted(FAMILIES, key=lambda name: name != first)}


def _family_of(target: Mapping[str, Tensor]) -> str:
    """The family whose names a model's own weights have, or nothing."""
    explained = {name: explains(rules, target) for name, rules in _rules().items()}
    best = max(explained, key=lambda name: explained[name])
    return best if 2 * explained[best] > len(target) else ""


def _bare_names(names: Iterable[str]) -> dict[str, str]:
    """A model's names by what is left without `backbone.` and what DDP, compile or a training module put before."""
    names = list(names)
    bare = {list(forms(name))[-1]: name for name in names}
    return bare if len(bare) == len(names) else {name: name for name in names}


class _Plan:
    """Each weight of the file against the model, under our names; nothing is written yet."""

    def __init__(
        self,
        reading: Reading,
        weights: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        windows: Mapping[str, tuple[int, int]],
    ) -> None:
        self.reading = reading
        self.windows = windows
        self.weights = weights
        self.target = target
        self.values: dict[str, Tensor] = {}
        self.resized: list[str] = []
        self.replaced: list[str] = []
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.ignored = list(reading.ignored)
        self.unexpected = list(reading.unexpected)
        self.details: dict[str, str] = {}
        for name, tensor in weights.items():
            self._place(name, tensor)
        for name in target:
            if name not in weights:
                (self.replaced if self._optional(name) else self.missing).append(name)
        self._replace_head()

    def _place(self, name: str, tensor: Tensor) -> None:
        theirs = str(self.reading.sources[name])
        if name not in self.target:
            # a head that the model does not have, or norms of maps that it does not return, go nowhere
            headless = name.startswith("head.") and not any(n.startswith("head.") for n in self.target)
            (self.ignored if headless or name.startswith("norms.") else self.unexpected).append(theirs)
            return
        ours = self.target[name]
        window = self.windows.get(name)
        if tensor.is_floating_point() != ours.is_floating_point():
            self.misshapen.append(name)
            self.details[name] = f"{tensor.dtype} in the file, {ours.dtype} in the model"
        elif tensor.shape == ours.shape and (window is None or window[0] == window[1]):
            self.values[name] = tensor
        elif (table := self._resize(name, tensor, ours.shape)) is not None:
            self.values[name] = table
            self.resized.append(name)
            grid = grid_of(ours.shape[0], None)
            told = [_shape(tensor), _shape(ours)]
            if tensor.ndim == 2 and grid is not None and (before := grid_of(tensor.shape[0], window)) is not None:
                told = [f"{rows}x{columns}" for rows, columns in (before, grid)]
            self.details[name] = f"{told[0]} to {told[1]}"
        else:
            self.misshapen.append(name)
            self.details[name] = f"{_shape(tensor)} in the file, {_shape(ours)} in the model"
            if name.endswith("bias_table") and tensor.ndim == 2 and tensor.shape[1] == ours.shape[-1]:
                fitting = " or ".join(map(str, possible_windows(tensor.shape[0])[:4]))
                if fitting:
                    self.details[name] += f"; for a window that is not square say which: file_window={fitting}"

    def _resize(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        if (resize := getattr(FAMILIES.get(self.reading.family), "resize", None)) is not None:
            return resize(name, tensor, shape)
        return resize_table(tensor, shape, self.windows.get(name)) if name.endswith("bias_table") else None

    def _replace_head(self) -> None:
        """Last layers for another number of classes, `head.fc` and `head.fc_...`, keep the model's values."""
        weights = [name for name in self.misshapen if re.fullmatch(r"head\.fc[^.]*\.weight", name)]
        both = [(self.weights[name], self.target[name]) for name in weights]
        if not both or any(theirs.ndim != 2 or theirs.shape[1] != ours.shape[1] for theirs, ours in both):
            return
        own = [name for name in self.target if name.startswith("head.fc")]
        self.misshapen = [name for name in self.misshapen if name not in own]
        self.missing = [name for name in self.missing if name not in own]
        self.values = {name: tensor for name, tensor in self.values.items() if name not in own}
        self.replaced += own
        theirs, ours = both[0]
        self.details |= dict.fromkeys(own, f"{len(theirs)} classes in the file, {len(ours)} in the model")

    def _optional(self, name: str) -> bool:
        """A backbone's file has no head, a classifier's no output norms: those keep the model's values."""
        if name.endswith(".num_batches_tracked"):
            return True  # a count of steps, which no forward pass reads
        if name.startswith("head."):
            return not any(n.startswith("head.fc") for n in self.weights)
        return name.startswith("norms.") and not any(n.startswith("norms.") for n in self.weights)

    def check(self, source: str, model: str) -> None:
        """UserError that says what does not fit, and whose weights they seem to be."""
        if not (self.missing or self.unexpected or self.misshapen):
            return
        family = FAMILIES.get(self.reading.family)
        if family is not None and (theirs := family.describe(self.weights)) != (ours := family.describe(self.target)):
            raise UserError(
                f"{source} holds weights of another model: {_like(theirs, self.reading.family)} ({_plain(theirs)}), "
                f"the model is {model} ({_plain(ours)}); create the model that the weights belong to, or choose "
                "another file"
            )
        shapes = [f"{name} ({self.details[name]})" for name in self.misshapen]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)]
        told = "; ".join(f"{len(names)} {what}: {preview(names)}" for what, names in parts if names)
        raise UserError(f"{source} does not fit {model}: {told}. Pass strict=False to load the rest")

    def report(self, names: Mapping[str, str]) -> LoadReport:
        def own(chosen: list[str]) -> tuple[str, ...]:
            return tuple(names[name] for name in chosen)

        broken = [name for name in self.values if not self.target[name].isfinite().all()]  # as the model holds them
        return LoadReport(
            self.reading.dialect,
            own([name for name in self.values if name not in self.resized]),
            own(self.resized),
            own(self.replaced + self.misshapen),
            own(self.missing),
            tuple(self.unexpected),
            tuple(self.ignored),
            own(broken),
            {names[name]: text for name, text in self.details.items()},
        )


def _numbers(classes: str | Sequence[int], weights: Mapping[str, Tensor]) -> list[int]:
    """The numbers of classes that a caller names. UserError for unknown names and numbers that are not there."""
    rows = [len(tensor) for name, tensor in weights.items() if name.startswith("head.fc") and tensor.ndim]
    if not rows:
        raise UserError(f"classes={_short(classes)}, but there is no last layer in the file: leave classes out")
    if isinstance(classes, str):
        if classes != "imagenet-1k":
            raise UserError(f"classes={classes!r}: give 'imagenet-1k' or numbers of classes")
        if rows[0] != 21841:
            raise UserError(f"classes='imagenet-1k' is for files with 21841 classes, this one has {rows[0]}")
        text = (resources.files("muntin") / "weights" / "imagenet_1k_of_22k.txt").read_text(encoding="utf-8")
        return [int(number) for line in text.splitlines() if not line.startswith("#") for number in line.split()]
    numbers = list(classes) if isinstance(classes, Iterable) else []
    if not numbers or not all(isinstance(n, int) and 0 <= n < min(rows) for n in numbers):
        raise UserError(f"classes={_short(classes)}: give numbers from 0 to {min(rows) - 1}, the file's classes")
    return numbers


def _take(weights: dict[str, Tensor], numbers: list[int]) -> dict[str, str]:
    """Cut the last layers to these classes; what to say of each of them."""
    told = {}
    for name in [name for name in weights if name.startswith("head.fc")]:
        told[name] = f"{len(numbers)} of {len(weights[name])} classes"
        weights[name] = weights[name][torch.tensor(numbers)]
    return told


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _like(shown: Mapping[str, Any], family: str) -> str:
    """The family's listed model that has these values, or what can be said of it."""
    from muntin.models import FAMILIES as MODELS

    for module in MODELS:
        for name, row in module.VARIANTS.items() if module.__name__.endswith(f".{family}") else ():
            if all(getattr(row, key, None) == value for key, value in shown.items()):
                return f"like {name}"
    return "like no listed model"


def _plain(shown: Mapping[str, Any]) -> str:
    texts = {k: "-".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in shown.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
