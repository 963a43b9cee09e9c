"""Files that hold weights, opened without running what is in them, and the state dict inside of what they hold."""

import contextlib
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.weights.rules import preview

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
    if _is_safetensors(path):
        if _is_pickled(path):
            raise UserError(f"{path} is no safetensors file but one of torch.save: call it .pth")
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


def is_whole(path: Path) -> bool:
    """False where a file was plainly cut off: an archive without its end, a header that promises more bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        return zipfile.is_zipfile(path)
    if start[8:] != b"{":
        return bool(start)  # an older pickle, or nothing that is known here
    try:
        with safetensors.safe_open(path, "pt"):
            return True
    except safetensors.SafetensorError:
        return False


def _is_safetensors(path: Path) -> bool:
    """By the name, or by a header in JSON whose length stands before it."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            return True
    return path.suffix == ".safetensors"


def _is_pickled(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")
    return False


def _code_in(path: Path, error: Exception) -> str | None:
    """What a file refused by `weights_only` holds besides tensors; None where it is no such file at all."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return found[1]
    if "TorchScript" in str(error):
        return "TorchScript"
    with path.open("rb") as file:
        return "pickled without torch.save" if file.read(1) == b"\x80" else None


def _holds_tensors(value: object, depth: int = 0) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, Tensor) and depth > 0
    return depth < 8 and any(_holds_tensors(part, depth + 1) for part in value.values())


def unwrap(content: Mapping[str, Any], depth: int = 0) -> dict[str, Tensor]:
    """The state dict itself, out of the entries that training code puts around it."""
    for entry in _ENTRIES:
        if depth < 8 and _holds_tensors(content.get(entry)):
            return unwrap(content[entry], depth + 1)
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
