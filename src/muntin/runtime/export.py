"""Export to other runtimes, run there and compared with PyTorch before the file gets its name.

One graph serves any batch, height and width. Today's target is ONNX; a target is one function in TARGETS.
B batch, H W image, K classes
"""

import contextlib
import itertools
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.run import atomic_write
from muntin.runtime.engines import INSTALL, load
from muntin.runtime.optimize import fold

OPSET = 20  # the first with a Gelu operator; ONNX Runtime 1.17 and OpenVINO 2024 read it
ONNX_LIMIT = 2**31 - 1  # bytes: protobuf holds no larger message
TOLERANCE = 1e-4  # standard deviations of the logits, float32


class ExportError(RuntimeError):
    """The exported file does not compute what the model computes; it was not kept."""


@dataclass(frozen=True)
class Check:
    """One comparison with PyTorch: the largest error over the batch in standard deviations of the logits."""

    batch: int
    height: int
    width: int
    error: float


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    `nodes` counts the graph's operators by type, `max_rank` is the most dimensions of any tensor in it.
    """

    path: Path
    target: str
    engine: str
    opset: int
    bytes: int
    nodes: dict[str, int]
    max_rank: int
    checks: list[Check]
    tolerance: float

    @property
    def max_error(self) -> float:
        return max(check.error for check in self.checks)

    def json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self) | {"path": str(self.path), "max_error": self.max_error}, indent=2) + "\n"

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.target} opset {self.opset}, {self.bytes / 1e6:.1f} MB, "
            f"{sum(self.nodes.values())} nodes, tensors up to rank {self.max_rank}",
            f"compared with PyTorch in {self.engine}; error in standard deviations of the output, "
            f"bound {self.tolerance:.0e}",
            "  batch  height x width   largest error",
        ]
        for check in self.checks:
            size = f"{check.height} x {check.width}"
            lines.append(f"  {check.batch:>5}  {size:>14}   {check.error:.1e}")
        lines.append(f"largest error {self.max_error:.1e}: passed")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Written:
    opset: int
    nodes: dict[str, int]
    max_rank: int


class _Target(Protocol):
    def __call__(
        self, model: nn.Module, image: Tensor, metadata: dict[str, str], path: Path, opset: int
    ) -> _Written: ...


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own deprecations and advice: a user can act on none of it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_onnx(model: nn.Module, image: Tensor, metadata: dict[str, str], path: Path, opset: int) -> _Written:
    try:
        import onnxscript  # noqa: F401  # torch.onnx needs it and would say so in its own words
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs the package onnxscript; {INSTALL}") from error
    held = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))
    if held > ONNX_LIMIT:
        raise UserError(f"the model holds {held / 1e9:.1f} GB; a single ONNX file holds less than 2 GB")
    Dim = torch.export.Dim
    dynamic = ({0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)},)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(model, (image,), dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            exported,
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # always, with dynamo=True
        graph = program.model
        graph.producer_name = "muntin"
        graph.producer_version = sys.modules["muntin"].__version__  # importing it here would go in a circle
        graph.metadata_props.clear()
        graph.metadata_props.update(metadata)
        for node in graph.graph.all_nodes():
            node.metadata_props.clear()  # stack traces with the paths of this machine
        program.save(path, external_data=False)
    values = [value for node in graph.graph.all_nodes() for value in node.outputs if value.shape is not None]
    values += list(graph.graph.initializers.values())
    return _Written(
        opset=graph.opset_imports[""],
        nodes=dict(Counter(node.op_type for node in graph.graph.all_nodes()).most_common()),
        max_rank=max(len(value.shape) for value in values if value.shape is not None),
    )


TARGETS: dict[str, tuple[str, str, _Target]] = {".onnx": ("ONNX", "ONNX Runtime", _write_onnx)}


def _input_size(model: nn.Module, preprocessing: dict[str, Any] | None) -> tuple[int, int]:
    size = (preprocessing or {}).get("size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _trace_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """A size at which every stage holds several windows: tracing sees the general case, not a special one.

    Nothing is computed at this size, so it costs nothing to be large.
    """
    strides = getattr(getattr(model, "backbone", model), "strides", (1,))
    config = getattr(model, "config", None)
    window = getattr(config, "window", getattr(config, "windows", 1))
    least = max(strides) * (window if isinstance(window, int) else max(window))
    return max(2 * least, size[0]), max(3 * least, size[1])


def default_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes that an export is checked at: its own, an odd larger one, an odd smaller one and a sliver."""
    height, width = size
    return [
        (height, width),
        (height * 5 // 4 | 1, width * 3 // 4 | 1),
        (height // 2 | 1, width),
        (max(height // 8, 1), max(width // 16, 1) | 1),
    ]


def _metadata(
    model: nn.Module, classes: Sequence[str] | None, preprocessing: dict[str, Any] | None, least: int
) -> dict[str, str]:
    config = getattr(model, "config", None)
    described: dict[str, Any] = {
        "model": str(getattr(model, "name", type(model).__name__)),
        "layout": "NCHW",
        "least_side": least,
    }
    if is_dataclass(config) and not isinstance(config, type):
        described["config"] = asdict(config)
    if classes is not None:
        described["classes"] = list(classes)
    if preprocessing is not None:
        described["preprocessing"] = {"layout": "NCHW", **preprocessing}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}


def _images(batch: int, size: tuple[int, int], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1_000_003 + size[0] * 1009 + size[1])
    return torch.randn(batch, 3, *size, generator=generator).to(like.device, like.dtype)


def _compare(model: nn.Module, engine: Callable[[Tensor], Tensor], images: Tensor) -> Check:
    with torch.inference_mode():
        expected = model(images).double().cpu()
    got = engine(images).double().cpu()
    batch, _, height, width = images.shape
    if got.shape != expected.shape:
        raise ExportError(f"the exported model returns {tuple(got.shape)}, PyTorch {tuple(expected.shape)}")
    spread = expected.std(unbiased=False) if expected.numel() > 1 else expected.abs().max()
    error = (got - expected).abs().max() / spread.clamp_min(1e-12)
    return Check(batch, height, width, error.item())


def verify(
    model: nn.Module,
    engine: Callable[[Tensor], Tensor],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    tick: Callable[[str], object] = lambda case: None,
) -> list[Check]:
    """Compare an engine with the model it was made from, on random images of every size and batch.

    The model is compared in evaluation mode and left as it was. `tick` is told each case before it runs.
    Raises ExportError where the outputs have different shapes.
    """
    like = next(model.parameters(), torch.empty(0))
    checks = []
    with _evaluation(model):
        for size, batch in itertools.product(sizes, batches):
            tick(f"batch {batch}, {size[0]}x{size[1]}")
            checks.append(_compare(model, engine, _images(batch, size, like)))
    return checks


def _writable(path: Path) -> None:
    """Refuse at once what would otherwise fail after the tracing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        what = "it is a folder" if path.is_dir() else f"{path.parent} is read-only"
        raise UserError(f"cannot write {path}: {what}; choose a file in a folder that you may write to")


def _checked(values: Sequence[int], what: str) -> None:
    if not values or min(values) < 1:
        raise UserError(f"{what} {list(values)} cannot be checked; give at least one, each of at least 1")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> ExportReport:
    """Export a model with dynamic batch, height and width, verified in the target's runtime.

    model: (B, 3, H, W) images to (B, K) logits; a copy in evaluation mode is exported, its BatchNorms folded.
    path: the suffix is the target, `.onnx`. It appears under this name only once every check has passed.
    classes, preprocessing: written into the file's metadata, beside the model's name and configuration.
    sizes: (height, width) in pixels of the comparison with PyTorch; by default four, odd ones too.
    batches: batch sizes of the comparison; by default 1, 2 and 5.
    tolerance: bound on the error in standard deviations of the logits.
    Raises UserError for another suffix, a folder that cannot be written or class names that do not fit, and
    ExportError where the file computes something else.
    """
    path = Path(path)
    if path.suffix not in TARGETS:
        raise UserError(
            f"{path}: no export to {path.suffix or 'a name without a suffix'}; the suffix is the target, "
            f"valid are: {', '.join(TARGETS)}"
        )
    target, engine, write = TARGETS[path.suffix]
    outputs = getattr(model, "num_classes", None)
    if classes is not None and outputs is not None and len(classes) != outputs:
        raise UserError(f"{len(classes)} class names given for a model of {outputs} classes; give one per class")
    if getattr(model, "optimized", False):
        raise UserError("an optimised copy is for PyTorch on this machine: export the model that it was made from")
    _writable(path)
    size = _input_size(model, preprocessing)
    sizes = default_sizes(size) if sizes is None else sizes
    batches = (1, 2, 5) if batches is None else batches
    _checked([side for pair in sizes for side in pair], "sizes")
    _checked(batches, "batches")
    metadata = _metadata(model, classes, preprocessing, min(min(pair) for pair in sizes))
    checks: list[Check] = []
    written: list[_Written] = []

    def write_and_check(partial: Path) -> None:
        from tqdm import tqdm

        like = next(model.parameters(), torch.empty(0))
        hidden = None if progress else True  # None: hidden where the output is not a terminal
        total = len(sizes) * len(batches) + 1
        with tqdm(total=total, desc=f"{target}: tracing", disable=hidden, leave=False) as bar, _evaluation(model):
            written.append(write(fold(model), _images(2, _trace_size(model, size), like), metadata, partial, opset))

            def tick(case: str) -> None:
                bar.set_description(f"{target}: checking {case}")
                bar.update()

            checks.extend(verify(model, load(partial), sizes, batches, tick))
        worst = max(checks, key=lambda check: check.error)
        if not all(check.error <= tolerance for check in checks):  # also where an error is not a number
            raise ExportError(
                f"{path} was not written: at batch {worst.batch}, {worst.height}x{worst.width} {engine} "
                f"differs from PyTorch by {worst.error:.1e} standard deviations, more than {tolerance:.0e}"
            )

    atomic_write(path, write_and_check)
    return ExportReport(
        path=path,
        target=target,
        engine=engine,
        opset=written[0].opset,
        bytes=path.stat().st_size,
        nodes=written[0].nodes,
        max_rank=written[0].max_rank,
        checks=checks,
        tolerance=tolerance,
    )
