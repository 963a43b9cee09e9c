"""Checkpoints of every dialect into a model: recognised from the names of the weights, checked both ways.

Nothing is copied before everything has been checked, so a failed load leaves the model as it was.
"""

import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.weights import efficientvit, rmt, swin, swinv2
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
            shown = "" if name == "loaded" else preview([self._entry(entry) for entry in entries])
            lines.append(f"{name:<10}  {len(entries):>5}  {shown}".rstrip())
        return "\n".join(lines)

    def _entry(self, name: str) -> str:
        return f"{name} ({self.details[name]})" if name in self.details else name


def load_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], strict: bool = True
) -> LoadReport:
    """Load weights in any known dialect into a model made by `create_model` or `create_backbone`.

    A model of a family without rules, such as one's own, takes weights under its own names.
    Takes a .safetensors file, a file of torch.save, or a state dict, also inside of the entries and prefixes that
    training code wraps around it. Files are read as tensors only: code in them is refused and not run.
    Bias tables of another window are resized bicubically, as the authors do. A head of another number of
    classes, or a head or output norms that the file does not have, keep the model's values (`replaced`); a head
    that the model does not have is `ignored`.
    strict: raise UserError, and change nothing, where anything else does not fit; otherwise load the rest.

    Raises UserError for unreadable files, unknown names, and a checkpoint of another model.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, content = "the state dict", path_or_state_dict
    else:
        source, content = os.fspath(path_or_state_dict), read_file(path_or_state_dict)
    own = model.state_dict()
    names = _bare_names(own)
    target = {bare: own[name] for bare, name in names.items()}
    try:
        state = _unwrap(content)
        family = _family_of(target)
        reading = recognise(_rules(first=family), state) if family else read_plainly(target, state)
        weights = translate(reading, state)
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
    plan = _Plan(reading, weights, target)
    if strict:
        plan.check(source, title)
    with torch.no_grad():
        for name, tensor in plan.values.items():
            target[name].copy_(tensor)
    report = plan.report(names)
    if report.nonfinite:
        warnings.warn(f"{source}: NaN or infinity in {preview(report.nonfinite)}", stacklevel=2)
    return report


def convert(state: Mapping[str, Any], to: str = "muntin") -> dict[str, Tensor]:
    """Weights of any known dialect under the names of another: "authors", "timm", "torchvision", "mm", ..."""
    tensors = _unwrap(state)
    reading = recognise(_rules(), tensors)
    if reading.unexpected:
        raise UserError(f"no name in {to} for {preview(reading.unexpected)}: leave these out")
    weights = translate(reading, tensors)
    if to != "muntin":
        return untranslate(FAMILIES[reading.family].RULES, weights, to)
    return {name if name.startswith("head.") else f"backbone.{name}": t for name, t in weights.items()}


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

    def __init__(self, reading: Reading, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        self.reading = reading
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
        if tensor.shape == ours.shape:
            self.values[name] = tensor
        elif (table := self._resize(name, tensor, ours.shape)) is not None:
            self.values[name] = table
            self.resized.append(name)
            square = name.endswith("bias_table") and tensor.ndim == 2 and tensor.shape[1] == ours.shape[1]
            side = _side if square else _shape
            self.details[name] = f"{side(tensor)} to {side(ours)}"
        else:
            self.misshapen.append(name)
            self.details[name] = f"{_shape(tensor)} in the file, {_shape(ours)} in the model"

    def _resize(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        if (resize := getattr(FAMILIES.get(self.reading.family), "resize", None)) is not None:
            return resize(name, tensor, shape)
        return resize_table(tensor, shape) if name.endswith("bias_table") else None

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


def resize_table(table: Tensor, shape: torch.Size) -> Tensor | None:
    """A bias table for another window: bicubic on its (2w-1) x (2w-1) grid. None where it is no such table."""
    if table.ndim != 2 or table.shape[1] != shape[1]:
        return None
    side, wanted = math.isqrt(table.shape[0]), math.isqrt(shape[0])
    if side * side != table.shape[0] or wanted * wanted != shape[0]:
        return None
    grid = table.float().t().reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].t().to(table.dtype)


def read_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The tensors of a .safetensors file or of one that torch.save wrote. UserError where it is neither."""
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
                content = torch.load(path, map_location="cpu", weights_only=True)
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


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict itself, out of the entries that training code puts around it."""
    for entry in _ENTRIES:
        if isinstance(content.get(entry), Mapping):
            return _unwrap(content[entry])
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
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


def _side(table: Tensor) -> str:
    side = math.isqrt(table.shape[0])
    return f"{side}x{side}"
