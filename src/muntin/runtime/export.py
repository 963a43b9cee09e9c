"""Export to other runtimes, run there and compared with PyTorch before the file gets its name.

The targets stand in `runtime/targets`, one module for each.
B batch, H W image, K classes
"""

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Dense, Detector
from muntin.runtime.engines import Engine, open_engine
from muntin.runtime.inputs import Around, Normalise, check_preprocessing, describe, normalised, output_names
from muntin.runtime.optimize import fold
from muntin.runtime.pictures import Pictures
from muntin.runtime.placing import check_writable, placed, size_of
from muntin.runtime.precision import precision as full_precision
from muntin.runtime.targets import TARGETS, ExportError, Fixed, Job, Target, Written
from muntin.runtime.verify import (
    BOUNDS,
    TOLERANCE,
    Check,
    default_sizes,
    evaluation,
    random_bytes,
    random_images,
    verify,
)

__all__ = ["OPSET", "TOLERANCE", "Check", "ExportError", "ExportReport", "default_sizes", "export", "verify"]

OPSET = 20  # the first with a Gelu operator; ONNX Runtime 1.17 and OpenVINO 2024 read it
BATCHES = (1, 2, 5)
REPEATS = 3  # batches that an export of fixed size is compared on


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    `nodes` counts the graph's operators by type, `max_rank` is the most dimensions of any tensor in it. `not_run`
    is the reason why the target could not be run here; then there are no checks, and nothing passed. `fixed` is
    (batch, height, width), or None where they are dynamic. `alone`: it is a detector's, for one image at a time.
    """

    path: Path
    target: str
    engine: str
    opset: int | None
    bytes: int
    nodes: dict[str, int]
    max_rank: int
    checks: list[Check]
    tolerance: float
    precision: str = "float32"
    layout: str = "NCHW"
    fixed: Fixed | None = None
    least_side: int = 1
    alone: bool = False
    notes: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def max_error(self) -> float | None:
        """In standard deviations of the output, or as detectors are compared; None where nothing was run."""
        return max((check.error for check in self.checks), default=None)

    @property
    def result(self) -> str:
        """ "passed" or "not run"; a file that fails is not kept and has no report."""
        return "passed" if self.not_run is None else "not run"

    def json(self) -> str:
        """All of it as JSON text."""
        extra = {"path": str(self.path), "max_error": self.max_error, "result": self.result}
        return json.dumps(asdict(self) | extra, indent=2) + "\n"

    def __str__(self) -> str:
        opset = f" opset {self.opset}" if self.opset else ""
        taken = ", bytes (B, H, W, 3) in" if self.layout == "NHWC" else ""
        any_size = "one image of any height and width" if self.alone else "any batch, height and width"
        sizes = "x".join(map(str, self.fixed)) if self.fixed else any_size
        if not self.fixed and self.least_side > 1:
            sizes += f" from {self.least_side}"
        lines = [
            f"{self.path}: {self.target}{opset}, {self.precision}{taken}, {sizes}, {self.bytes / 1e6:.1f} MB, "
            f"{sum(self.nodes.values())} nodes, tensors up to rank {self.max_rank}",
            *self.notes,
        ]
        if self.not_run is not None:
            return "\n".join([*lines, f"not run: {self.not_run}"])
        of = "scores, of masks and of boxes by their longer side" if self.alone else "standard deviations of the output"
        lines += [
            f"compared with PyTorch in {self.engine}; error {'of' if self.alone else 'in'} {of}, "
            f"bound {self.tolerance:g}",
            "  batch  height x width   largest error" + ("   objects" if self.alone else ""),
        ]
        for check in self.checks:
            size = f"{check.height} x {check.width}"
            objects = "" if check.objects is None else f"   {check.objects:>13}"
            lines.append(f"  {check.batch:>5}  {size:>14}   {check.error:.1e}{objects}")
        lines.append(f"largest error {self.max_error:.1e}: passed")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    multi_label: bool = False,
    preprocessing: dict[str, Any] | None = None,
    with_preprocessing: bool = False,
    precision: str = "float32",
    fixed: Fixed | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    opset: int = OPSET,
    tolerance: float | None = None,
    pictures: Sequence[Tensor] | None = None,
    progress: bool = True,
) -> ExportReport:
    """Export a model, verified in the target's runtime where that runs here.

    model: (B, 3, H, W) images to (B, K) logits, or to a list of maps; a copy in evaluation mode is exported, its
    BatchNorms folded. With `fixed` any module will do, otherwise it must trace with symbols for sizes. A detector or
    segmenter of `muntin.create_dense` does too: what a detector's file returns is in docs/export.md.
    path: the suffix is the target: `.onnx`, `.xml` (OpenVINO), `.pt2`, `.engine` (TensorRT), `.mlpackage` (Core ML) or
    `.pte` (ExecuTorch). It appears under this name only once every check has passed.
    classes, multi_label (an image may have several of them), preprocessing: written into the file's metadata, beside
    the model's name and configuration. preprocessing may have a `palette`, the colours of a segmenter's classes.
    with_preprocessing: the file takes bytes (B, H, W, 3) and normalises them itself by preprocessing's mean and std.
    precision: inside the graph: float32, float16 or bfloat16. Images and outputs stay float32.
    fixed: (batch, height, width) of a graph for these alone; by default any. Core ML and ExecuTorch files are fixed
    always, by default at batch 1 and preprocessing's size.
    sizes: (height, width) in pixels of the comparison with PyTorch; by default four, odd ones too.
    batches: batch sizes of the comparison; by default 1, 2 and 5.
    tolerance: bound on the error in standard deviations of the output; by default by precision (docs/export.md).
    pictures: (3, H, W) uint8, which a detector or segmenter is compared on at every size; by default drawn ones.
    Raises UserError for another suffix, a folder that cannot be written, class names that do not fit, a missing
    package or an operation that the target lacks, and ExportError where the file computes something else.
    """
    path = Path(path)
    target = _target(path)
    precision = full_precision(precision)
    _check_model(model, classes)
    if with_preprocessing:
        check_preprocessing(preprocessing)
    alone = isinstance(model, Detector)
    if alone:
        _check_detector(target.name, precision, fixed, batches)
        batches = (1,)
    beside = [path.with_suffix(suffix).name for suffix in target.beside]
    check_writable(path, folder=path.suffix == ".mlpackage", beside=beside)
    size = _input_size(preprocessing)
    if target.fixed and fixed is None:
        fixed = (1, *size)
    sizes, batches = _cases(size, fixed, sizes, batches)
    _check_memory(model, max(batches), max(sizes, key=math.prod))
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in model.parameters()):
        model = copy.deepcopy(model).float()  # what a file is compared with
    like = next(model.parameters(), torch.empty(0))
    with evaluation(model):
        outputs = output_names(model, random_images(1, fixed[1:] if fixed else size).to(like.device, like.dtype))
        job = _job(model, fixed, size, precision, target, opset, outputs, with_preprocessing and preprocessing or None)
    seen = Pictures(pictures, preprocessing) if isinstance(model, Dense) else None
    job.metadata.update(
        describe(
            model,
            classes=classes,
            multi_label=multi_label,
            preprocessing=preprocessing,
            inside=with_preprocessing,
            precision=precision,
            outputs=outputs,
            least=min(min(pair) for pair in sizes),
        )
    )
    bound = BOUNDS[precision] if tolerance is None else tolerance
    inside = preprocessing if with_preprocessing else None
    checking = _Checking(model, target, sizes, batches, bound, inside, seen, progress)
    with placed(path) as partial:
        written = checking.write(job, partial)
        checks, not_run, engine = checking.run(written.main or partial, path)
    main = path.with_name(written.main.name) if written.main else path
    return ExportReport(
        path=main,
        target=target.title,
        engine=_title(engine) if engine else target.engine,
        opset=written.opset,
        bytes=sum(size_of(file) for file in {main, *(path.with_name(name) for name in written.beside)}),
        nodes=dict(written.nodes.most_common()),
        max_rank=written.max_rank,
        checks=checks,
        tolerance=bound,
        precision=precision,
        layout=job.metadata["layout"],
        fixed=fixed,
        least_side=engine.least_side if engine else 1,
        alone=alone,
        notes=written.notes,
        not_run=not_run,
    )


@dataclass(frozen=True)
class _Checking:
    """Writing and comparing, with one progress bar for both."""

    model: nn.Module
    target: Target
    sizes: Sequence[tuple[int, int]]
    batches: Sequence[int]
    bound: float
    preprocessing: dict[str, Any] | None
    pictures: Pictures | None
    progress: bool

    def _bar(self, total: int, what: str) -> Any:
        from tqdm import tqdm

        hidden = None if self.progress else True  # None: hidden where the output is not a terminal
        return tqdm(total=total, desc=f"{self.target.title}: {what}", disable=hidden, leave=False)

    def write(self, job: Job, partial: Path) -> Written:
        with self._bar(1, "tracing and writing"):
            return self.target.module().write(job, partial)

    def run(self, partial: Path, path: Path) -> tuple[list[Check], str | None, Engine | None]:
        """The checks and the engine that they ran in, or why there are none."""
        not_run = self.target.module().unavailable()
        if not_run is not None:
            return [], not_run, None
        engine = open_engine(partial)
        least = engine.least_side
        title = _title(engine)
        sizes = list(dict.fromkeys((max(height, least), max(width, least)) for height, width in self.sizes))
        prepare = None
        if self.preprocessing is not None:
            given = self.preprocessing

            def prepare(images: Tensor) -> Tensor:
                return normalised(images, given)

        repeats = REPEATS if engine.fixed is not None or isinstance(self.model, Detector) else 1
        with self._bar(len(sizes) * len(self.batches) * repeats, "checking") as bar:

            def tick(case: str) -> None:
                bar.set_description(f"{self.target.title}: checking {case}")
                bar.update()

            options: dict[str, Any] = {
                "prepare": prepare,
                "repeats": repeats,
                "pictures": self.pictures,
                "bound": self.bound,
            }
            try:
                checks = verify(self.model, engine, sizes, self.batches, tick, **options)
            except ExportError as error:
                raise ExportError(f"{path} was not written: {title} differs from PyTorch, {error}") from error
        worst = max(checks, key=lambda check: check.error)
        if worst.error > self.bound:
            unit = "" if isinstance(self.model, Detector) else " standard deviations"
            raise ExportError(
                f"{path} was not written: at batch {worst.batch}, {worst.height}x{worst.width} {title} "
                f"differs from PyTorch by {worst.error:.1e}{unit}, more than {self.bound:g}"
            )
        return checks, None, engine


def _title(engine: Engine) -> str:
    return next(target.engine for target in TARGETS.values() if target.name == engine.engine)


def _target(path: Path) -> Target:
    if path.suffix not in TARGETS:
        raise UserError(
            f"{path}: no export to {path.suffix or 'a name without a suffix'}; the suffix is the target, "
            f"valid are: {', '.join(TARGETS)}"
        )
    return TARGETS[path.suffix]


def _check_model(model: nn.Module, classes: Sequence[str] | None) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"export takes a model, not a {type(model).__name__}: use muntin.create_model first")
    outputs = getattr(model, "num_classes", None)
    if classes is not None and outputs is not None and len(classes) != outputs:
        raise UserError(f"{len(classes)} class names given for a model of {outputs} classes; give one per class")
    if getattr(model, "optimized", False):
        raise UserError("an optimised copy is for PyTorch on this machine: export the model that it was made from")


def _check_detector(target: str, precision: str, fixed: Fixed | None, batches: Sequence[int] | None) -> None:
    """UserError where a detector cannot be exported so."""
    if target not in ("onnx", "openvino"):
        raise UserError(f"no export of detectors to {target}; choose onnx or openvino")
    if precision != "float32":
        raise UserError(f"no export of detectors in {precision}, in which boxes are off by pixels; choose float32")
    if (fixed and fixed[0] != 1) or set(batches or ()) - {1}:
        told = f"fixed={fixed}" if fixed else f"batches={list(batches or ())}"
        raise UserError(f"{told}: a detector's file takes one image at a time; give a batch of 1")


def _check_memory(model: nn.Module, batch: int, size: tuple[int, int]) -> None:
    """UserError where the largest comparison needs more than is free, before anything is computed."""
    from muntin.measure import memory

    free = memory.available()
    if free is not None and not memory.plenty(batch, size, free):
        known = memory.need_of(model, 4)  # nothing where the model cannot be counted: its images, then
        memory.check("this model", lambda b, s: max(known(b, s), memory.images_twice(b, s)), batch, size, free)


def _input_size(preprocessing: dict[str, Any] | None) -> tuple[int, int]:
    size = (preprocessing or {}).get("size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _cases(
    size: tuple[int, int],
    fixed: Fixed | None,
    sizes: Sequence[tuple[int, int]] | None,
    batches: Sequence[int] | None,
) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    """What is compared: sizes and batches."""
    if fixed is not None:
        if len(fixed) != 3 or not all(isinstance(side, int) and side >= 1 for side in fixed):
            raise UserError(f"fixed={fixed!r}: give (batch, height, width), each of at least 1")
        if any(tuple(pair) != tuple(fixed[1:]) for pair in sizes or ()) or any(b != fixed[0] for b in batches or ()):
            raise UserError(
                f"the file is for batch {fixed[0]} at {fixed[1]}x{fixed[2]} alone and can be checked at nothing else: "
                "leave sizes and batches out"
            )
        return [(fixed[1], fixed[2])], [fixed[0]]
    sizes = default_sizes(size) if sizes is None else sizes
    batches = BATCHES if batches is None else batches
    for values, what in (([side for pair in sizes for side in pair], "sizes"), (batches, "batches")):
        if not values or min(values) < 1:
            raise UserError(f"{what} {list(values)} cannot be checked; give at least one, each of at least 1")
    return sizes, batches


def _job(
    model: nn.Module,
    fixed: Fixed | None,
    size: tuple[int, int],
    precision: str,
    target: Target,
    opset: int,
    outputs: tuple[str, ...],
    preprocessing: dict[str, Any] | None,
) -> Job:
    copy = fold(model).cpu().float()
    normalise = Normalise(preprocessing["mean"], preprocessing["std"]) if preprocessing else None
    inner = "float32" if target.lowers else precision
    alone = isinstance(model, Detector)
    if alone:
        from muntin.heads.graph import DetectorGraph

        copy = DetectorGraph(copy).eval()
    if normalise is not None or inner != "float32":
        copy = Around(copy, inner, normalise).eval()
    batch, sides = (fixed[0], (fixed[1], fixed[2])) if fixed else (1 if alone else 2, _trace_size(model, size))
    image = random_images(batch, sides) if normalise is None else random_bytes(batch, sides)
    return Job(copy, image, fixed, precision, {}, outputs, opset, size, alone)


def _trace_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """A size at which every stage holds several windows: tracing sees the general case, not a special one.

    Nothing is computed at this size, so it costs nothing to be large.
    """
    strides = getattr(getattr(model, "backbone", model), "strides", (1,))
    config = getattr(model, "config", None)
    window = getattr(config, "window", getattr(config, "windows", 1))
    least = max(strides) * (window if isinstance(window, int) else max(window))
    return max(2 * least, size[0]), max(3 * least, size[1])
