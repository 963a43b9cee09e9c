"""Checkpoints of every dialect into a model: recognised from the names of the weights, checked both ways.

Nothing is copied before everything has been checked, so a failed load leaves the model as it was.
"""

import math
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.run import atomic_write
from muntin.weights import efficientvit, rmt, swin, swinv2
from muntin.weights.download import local_file
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

FAMILIES: dict[str, ModuleType] = {"swin": swin, "swinv2": swinv2, "efficientvit": efficientvit, "rmt": rmt}
"""Each has RULES, and `describe(weights)`: the configuration that the shapes of our weights show.

`resize(name, tensor, shape)`, where there is one, makes a tensor of another shape fit, or returns None. Without
it Swin's rule holds: a name that ends in `bias_table` is a table of (2w-1)^2 offsets for a window of w.
"""

# An average of the weights comes before the weights, as in timm.
_ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("model_state_dict", "state_dict", "model", "module", "net"),
)
_AVERAGE = "average."  # in the state of our own training, beside `model.`

# What the checkpoints of training code hold besides tensors: settings and logs. None of these classes is imported:
# those that pickle as a mapping become a plain one, the others nothing.
_MAPPINGS = (
    "yacs.config.CfgNode",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_RECORDS = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.{name}" for name in ("base.ContainerMetadata", "base.Metadata")),
    *("typing.Any", "__builtin__.list", "__builtin__.dict", "__builtin__.int"),  # OmegaConf names types
    *("mmengine.logging.history_buffer.HistoryBuffer", "__builtin__.getattr", "builtins.getattr"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
)


class _Nothing:
    """What `_RECORDS` are read as: takes anything, keeps nothing, does nothing."""

    def __new__(cls, *_: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


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
    """Load weights in any known dialect into a model made by `create_model` or `create_backbone`.

    A model of a family without rules, such as one's own, takes weights under its own names.
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
    if isinstance(path_or_state_dict, Mapping):
        source, content = "the state dict", path_or_state_dict
    else:
        if not isinstance(path_or_state_dict, (str, os.PathLike)):
            hint = ": its state_dict()?" if isinstance(path_or_state_dict, nn.Module) else ""
            kind = type(path_or_state_dict).__name__
            raise UserError(f"weights come from a path, an address or a state dict, not from a {kind}{hint}")
        source, content = os.fspath(path_or_state_dict), read_file(local_file(path_or_state_dict))
    if file_window is not None:
        _check_window(file_window)
    own = model.state_dict()
    names = _bare_names(own)
    target = {bare: own[name] for bare, name in names.items()}
    try:
        state = _unwrap(content)
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
    plan = _Plan(reading, weights, target, _windows(reading, weights, state, file_window))
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
    tensors = _unwrap(state)
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
            grid = _grid(ours.shape[0], None)
            told = [_shape(tensor), _shape(ours)]
            if tensor.ndim == 2 and grid is not None and (before := _grid(tensor.shape[0], window)) is not None:
                told = [f"{rows}x{columns}" for rows, columns in (before, grid)]
            self.details[name] = f"{told[0]} to {told[1]}"
        else:
            self.misshapen.append(name)
            self.details[name] = f"{_shape(tensor)} in the file, {_shape(ours)} in the model"
            if name.endswith("bias_table") and tensor.ndim == 2 and tensor.shape[1] == ours.shape[-1]:
                fitting = " or ".join(map(str, _possible_windows(tensor.shape[0])[:4]))
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

        broken = [name for name, t in self.values.items() if t.is_floating_point() and not t.isfinite().all()]
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


def resize_table(table: Tensor, shape: torch.Size, window: tuple[int, int] | None = None) -> Tensor | None:
    """A bias table for another window: bicubic on its (2h-1) x (2w-1) grid. None where it is no such table.

    window: the height and width of the table's own; square unless given. `shape` is that of a square window.
    """
    if table.ndim != 2 or table.shape[1] != shape[1]:
        return None
    grid, wanted = _grid(table.shape[0], window), _grid(shape[0], None)
    if grid is None or wanted is None:
        return None
    values = table.float().t().reshape(1, -1, *grid)
    values = F.interpolate(values, size=wanted, mode="bicubic", align_corners=False)
    return values.flatten(2)[0].t().to(table.dtype)


def _grid(rows: int, window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The sides of a table's grid of offsets."""
    if window is not None:
        return 2 * window[0] - 1, 2 * window[1] - 1
    side = math.isqrt(rows)
    return (side, side) if side * side == rows else None


def _possible_windows(rows: int) -> list[tuple[int, int]]:
    """The windows, of more than one row and column, that have a table of so many rows; compact ones first."""
    odd = [n for n in range(3, rows // 3 + 1, 2) if rows % n == 0 and (rows // n) % 2]
    pairs = [((n + 1) // 2, (rows // n + 1) // 2) for n in odd]
    return sorted(pairs, key=lambda pair: (max(pair), pair))


def _choose(rows: int, given: tuple[int, int]) -> tuple[int, int] | None:
    """The window of a table out of those that may be, for a file whose windows are at most `given`."""
    if (2 * given[0] - 1) * (2 * given[1] - 1) == rows:
        return given
    if _grid(rows, None) is not None:
        return None
    fits = [pair for pair in _possible_windows(rows) if pair[0] <= given[0] and pair[1] <= given[1]]
    if len(fits) > 1:
        fits = [pair for pair in fits if (pair[0] > pair[1]) == (given[0] > given[1])]
    return fits[0] if len(fits) == 1 else None


def _windows(
    reading: Reading, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], given: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """Height and width of the window of each table where the file's index of positions shows them, or `given` fits.

    timm cuts a window to the map along each axis, so a table may be of a smaller window than the one given.
    """
    found: dict[str, tuple[int, int]] = {}
    if hasattr(FAMILIES.get(reading.family), "resize"):
        return found
    for name, tensor in weights.items():
        if not name.endswith("bias_table") or tensor.ndim != 2:
            continue
        index = state.get(reading.sources[name].parts[0].replace("_bias_table", "_index"))
        if index is not None and (window := _window_of_index(index, tensor.shape[0])) is not None:
            found[name] = window
        elif given is not None and (window := _choose(tensor.shape[0], given)) is not None:
            found[name] = window
    return found


def _check_window(window: object) -> None:
    sides = window if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"file_window={window!r}: give height and width in tokens, as in (4, 7)")


def _window_of_index(index: Tensor, rows: int) -> tuple[int, int] | None:
    """A table's window from the offsets of its first token to all others: those in its own row count down by one."""
    area = math.isqrt(index.numel())
    first = index.flatten()[:area].tolist()
    width = next((x for x in range(area) if first[x] != (rows - 1) // 2 - x), area)
    window = area // max(width, 1), width
    return window if width and (2 * window[0] - 1) * (2 * window[1] - 1) == rows else None


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


def read_file(path: str | os.PathLike[str], mapped: bool = False) -> Mapping[str, Any]:
    """The tensors of a .safetensors file or of one that torch.save wrote. UserError where it is neither.

    mapped: leave the tensors of torch.save's newer files on the disk until they are used.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .safetensors, .pth or .pt file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): fetch or save it again")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is no whole safetensors file ({error}): fetch or save it again") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}): check its permissions") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old pickle protocols
            stand_ins: list[Any] = [(OrderedDict, name) for name in _MAPPINGS]
            stand_ins += [(_Nothing, name) for name in _RECORDS]
            with torch.serialization.safe_globals(stand_ins):
                mapped = mapped and zipfile.is_zipfile(path)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error}): check its permissions") from error
    except Exception as error:  # a foreign file makes the unpickler raise anything
        if (code := _code_in(path, error)) is not None:
            raise UserError(
                f"{path} holds Python objects ({code}), which could run code, so it was not opened: where it was "
                "made, save the tensors alone, torch.save(model.state_dict(), ...) or as .safetensors"
            ) from error
        raise UserError(f"{path} is no whole checkpoint of torch.save: fetch or save it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}: give a file with a state dict, names and tensors")
    return content


def _code_in(path: Path, error: Exception) -> str | None:
    """What a file refused by `weights_only` holds besides tensors; None where it is no such file at all."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return found[1]
    if "TorchScript" in str(error):
        return "TorchScript"
    with path.open("rb") as file:
        return "pickled without torch.save" if file.read(1) == b"\x80" else None


def _unwrap(content: Mapping[str, Any], depth: int = 0) -> dict[str, Tensor]:
    """The state dict itself, out of the entries that training code puts around it."""
    for entry in _ENTRIES:
        if isinstance(content.get(entry), Mapping) and depth < 8:
            return _unwrap(content[entry], depth + 1)
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
            kind = "quantised" if tensor.is_quantized else "sparse or nested"
            raise UserError(f"{name} is {kind}: save plain tensors")
    if tensors:
        average = {name.removeprefix(_AVERAGE): t for name, t in tensors.items() if name.startswith(_AVERAGE)}
        return average or tensors
    raise UserError(
        f"no weights in it, only {preview([str(name) for name in content]) or 'nothing'}: give a state dict, or one "
        f"under {', '.join(_ENTRIES)}"
    )


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
