"""The formats that a model is exported to: one module for each, by the file's suffix.

A target module has three functions, and imports its package inside them:

`write(job, path) -> Written` writes `path`, whose folder is empty and temporary. What it leaves there, `path` (a
file or a folder) and files beside it that belong to it, moves to the folder that the user named once all checks
have passed, each under its own name. It writes `job.metadata` into the file and checks what the target's own
tool can check without running: that it parses, ranks, dynamic axes, operations. It raises UserError for a missing
package (with the install line) and for a model that the target cannot express (naming the operation), ExportError
where the result is not what it should be.

`open(path) -> Opened` makes it run, for `muntin.runtime.load`; UserError for a file of another kind.

`unavailable() -> str | None` says why files of this kind cannot run here ("Core ML runs on macOS"), or None. Where
there is a reason, the export is written and shown as not run, and `open` raises it as a UserError.

B batch, H W image
"""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

INSTALL = "install it with: pip install 'muntin[export]'"

Fixed = tuple[int, int, int]
"""(batch, height, width)"""


def axes(dtype: torch.dtype) -> tuple[int, int, int]:
    """Where batch, height and width stand: bytes come as (B, H, W, 3), numbers as (B, 3, H, W)."""
    return (0, 1, 2) if dtype == torch.uint8 else (0, 2, 3)


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes; it was not kept."""


@dataclass(frozen=True)
class Job:
    """What is to be written.

    model: takes `image` as it is and returns a tensor (`outputs` has one name) or a list of maps. In evaluation
    mode, BatchNorms folded; casts to `precision` and back and preprocessing are inside.
    image: an example on the CPU, (B, 3, H, W) float32, or (B, H, W, 3) uint8 with preprocessing inside. At the
    fixed sizes where there are some, otherwise at sizes that stand for all.
    fixed: the sizes that the graph is for, or None: batch, height and width are dynamic.
    precision: float32, float16 or bfloat16. `model` computes in it, or in float32 where the target's row in TARGETS
    says that the runtime lowers precision itself (`lowers`): then `write` sets what makes it do so.
    metadata: values that are not plain text are JSON.
    size: the height and width that the model is for. alone: whether the graph takes one image at a time, so that of
    height, width and batch the batch is never dynamic.
    """

    model: nn.Module
    image: Tensor
    fixed: Fixed | None
    precision: str
    metadata: dict[str, str]
    outputs: tuple[str, ...]
    opset: int
    size: tuple[int, int] = (224, 224)
    alone: bool = False


@dataclass(frozen=True)
class Written:
    """What stands in the file: operators by type, the most dimensions of any tensor, what else a user must know.

    main: the file that was written, where that is not the path that was asked for. beside: names of files that belong
    to it.
    """

    opset: int | None
    nodes: Counter[str]
    max_rank: int
    notes: tuple[str, ...] = ()
    main: Path | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A file ready to run.

    run: a batch of images on the CPU, contiguous, in the file's own layout and type -> one tensor for each output.
    metadata: as it was written.
    dtype: of the images, float32 or uint8. shape: batch, height and width where the file fixes them, or None.
    least: the smallest height and width that it takes. engine: the name of the target whose engine runs it, where that
    is another than its own.
    """

    run: Callable[[Tensor], list[Tensor]]
    metadata: dict[str, str]
    dtype: torch.dtype = torch.float32
    shape: tuple[int | None, int | None, int | None] = (None, None, None)
    least: int = 1
    engine: str = ""


class Module(Protocol):
    """The functions of a target module."""

    def write(self, job: Job, path: Path) -> Written: ...

    def open(self, path: Path) -> Opened: ...

    def unavailable(self) -> str | None: ...


@dataclass(frozen=True)
class Target:
    """name: for `--to`. title: for people. engine: what runs it. fixed: whether its sizes always are.

    lowers: the runtime computes a float32 graph in another precision by a setting of its own. beside: suffixes of
    further files that belong to one.
    """

    name: str
    title: str
    engine: str
    fixed: bool
    lowers: bool
    path: str
    beside: tuple[str, ...] = ()

    def module(self) -> Module:
        return cast(Module, importlib.import_module(self.path))


def _target(
    name: str, title: str, engine: str, fixed: bool = False, lowers: bool = False, beside: tuple[str, ...] = ()
) -> Target:
    return Target(name, title, engine, fixed, lowers, f"muntin.runtime.targets.{name}", beside)


TARGETS = {
    ".onnx": _target("onnx", "ONNX", "ONNX Runtime"),
    ".xml": _target("openvino", "OpenVINO", "OpenVINO", lowers=True, beside=(".bin",)),
    ".pt2": _target("pt2", "torch.export", "PyTorch"),
    ".engine": _target("tensorrt", "TensorRT", "TensorRT", lowers=True),
    ".mlpackage": _target("coreml", "Core ML", "Core ML", fixed=True, lowers=True),
    ".pte": _target("executorch", "ExecuTorch", "ExecuTorch", fixed=True),
}
