"""Core ML programs (.mlpackage) of fixed size, by coremltools; they run on macOS and iOS.

Elsewhere a file is parsed again by coremltools, its input, outputs, ranks and operations are checked, and its
operations are computed by PyTorch (mil.py): that is a check of the conversion, not a run.

Class names are metadata, as in every other target: Core ML's own classifier type would turn the logits into a
dictionary and take one image only. With preprocessing inside the input is an image, as cameras and Vision give it.
"""

import importlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.runtime.constants import fold_constants
from muntin.runtime.targets import ExportError, Job, Opened, Written
from muntin.runtime.targets.mil import Unknown, evaluate
from muntin.runtime.targets.silence import silent
from muntin.runtime.tracing import trace
from muntin.runtime.verify import BOUNDS, as_list, deviation

INSTALL = (
    "install it in an environment of its own, since its converter fails with numpy 2.4 and later: "
    "pip install 'muntin[coreml]'"
)
RANK = 5  # Core ML has no tensor of more dimensions
WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights"
FORBIDDEN = ("random_", "while_loop", "cond", "list_", "write_state", "classify", "non_zero")
"""How the names of operations begin that a graph for inference of one size has no use for."""


def unavailable() -> str | None:
    return None if sys.platform == "darwin" else "Core ML runs on macOS"


def write(job: Job, path: Path) -> Written:
    if job.precision == "bfloat16":
        raise UserError("Core ML computes in float32 or float16, not in bfloat16; choose one of these")
    with silent():
        tools = _tools("exporting to Core ML")
        traced, given = _input(job, tools)
        try:
            made = tools.convert(
                traced.run_decompositions({}),
                inputs=[given],
                outputs=[tools.TensorType(name=name, dtype=_float32()) for name in job.outputs],
                convert_to="mlprogram",
                compute_precision=getattr(tools.precision, job.precision.upper()),
                minimum_deployment_target=tools.target.iOS16,  # and macOS 13: the first with gathers along an axis
                pass_pipeline=_passes(tools),
                skip_model_load=True,
            )
        except Exception as error:  # its exceptions share no base below Exception
            raise UserError(f"Core ML cannot express this model: {' '.join(str(error).split())[:300]}") from error
        made.user_defined_metadata.update(job.metadata)
        made.short_description = job.metadata.get("model", "")
        made.save(str(path))
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # of no use outside the converter
        return _check(job, path, tools)


def open(path: Path) -> Opened:
    """The program on whichever of CPU, GPU and Neural Engine Core ML chooses."""
    reason = unavailable()
    if reason is not None:
        raise UserError(f"{path} cannot run here: {reason}")
    with silent():
        tools = _tools(str(path))
        try:
            model = tools.models.MLModel(str(path))
        except Exception as error:  # of Core ML itself, through coremltools
            raise UserError(f"{path} is not a Core ML file that runs here ({error}); export it again") from error
    description = model.get_spec().description
    given = description.input[0]
    names = [output.name for output in description.output]
    metadata = {key: text for key, text in model.user_defined_metadata.items() if not key.startswith("com.")}
    takes_image = given.type.WhichOneof("Type") == "imageType"
    if takes_image:
        batch, height, width = 1, given.type.imageType.height, given.type.imageType.width
    else:
        batch, _, height, width = given.type.multiArrayType.shape

    def run(images: Tensor) -> list[Tensor]:
        found = model.predict({given.name: _picture(images) if takes_image else images.numpy()})
        return [torch.from_numpy(found[name]) for name in names]

    return Opened(run, metadata, torch.uint8 if takes_image else torch.float32, (batch, height, width))


def _tools(what: str) -> Any:
    """coremltools. Its numpy is checked, since it fails deep inside with another."""
    import numpy

    try:
        tools = importlib.import_module("coremltools")
    except ImportError as error:
        raise UserError(f"{what} needs the package coremltools; {INSTALL}") from error
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise UserError(f"coremltools cannot convert with numpy {numpy.__version__}; {INSTALL}")
    return tools


def _passes(tools: Any) -> Any:
    """The converter's own but for one: it makes a product and a sum a BatchNorm, whose epsilon is an error of 5e-6."""
    passes = tools.PassPipeline()
    passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    return passes


def _float32() -> Any:
    import numpy

    return numpy.float32


def _input(job: Job, tools: Any) -> tuple[torch.export.ExportedProgram, Any]:
    """The graph, and what Core ML is to hand it: numbers (B, 3, H, W), or an image where preprocessing is inside."""
    if job.image.dtype != torch.uint8:
        return fold_constants(trace(job), job.image), tools.TensorType(
            name="image", shape=tuple(job.image.shape), dtype=_float32()
        )
    batch, height, width, _ = job.image.shape
    if batch != 1:
        raise UserError(
            f"Core ML's image input holds one image, so preprocessing cannot be inside a file for batch {batch}; "
            f"give batch 1, as in --fixed 1x{height}x{width}, or leave --with-preprocessing out"
        )
    pixels = job.image.permute(0, 3, 1, 2).float().contiguous()
    inside = replace(job, model=_OfPixels(job.model).eval(), image=pixels)
    return fold_constants(trace(inside), pixels), tools.ImageType(
        name="image", shape=tuple(pixels.shape), color_layout="RGB"
    )


class _OfPixels(nn.Module):
    """Core ML's images arrive as (1, 3, H, W) floats of 0 to 255, ours as bytes (1, H, W, 3)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels.permute(0, 2, 3, 1))


def _picture(images: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(images[0].numpy())


def _check(job: Job, path: Path, tools: Any) -> Written:
    """What the file says when it is read again."""
    load = importlib.import_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = tools.utils.load_spec(str(path))
    program = load(spec, spec.specificationVersion, str(path / WEIGHTS))
    given, names = spec.description.input, tuple(output.name for output in spec.description.output)
    if len(given) != 1 or given[0].name != "image" or names != job.outputs:
        raise ExportError(f"the Core ML file takes {[g.name for g in given]} and returns {list(names)}")
    shape = _shape(given[0])
    asked = tuple(job.image.shape) if job.image.dtype != torch.uint8 else (1, 3, *job.image.shape[1:3])
    if shape != asked:
        raise ExportError(f"the Core ML file takes {shape}, asked for was {asked}")
    operations = [op for op in program.functions["main"].operations if op.op_type != "const"]
    for op in operations:
        rank = max(len(output.shape) for output in op.outputs)
        if rank > RANK:
            raise UserError(f"Core ML cannot express this model: {op.op_type} {op.name} has {rank} dimensions, over 5")
        if op.op_type.startswith(FORBIDDEN):
            raise ExportError(f"the Core ML file holds the operation {op.op_type}, which inference has no use for")
    nodes = Counter(op.op_type for op in operations)
    return Written(
        opset=None,
        nodes=nodes,
        max_rank=max(len(output.shape) for op in operations for output in op.outputs),
        notes=(_conversion(job, program),),
    )


def _shape(given: Any) -> tuple[int, ...]:
    kind = given.type
    if kind.WhichOneof("Type") == "imageType":
        return 1, 3, kind.imageType.height, kind.imageType.width
    return tuple(kind.multiArrayType.shape)


def _conversion(job: Job, program: Any) -> str:
    """The file's operations against the model, on the job's image. ExportError where they differ."""
    image = job.image if job.image.dtype != torch.uint8 else job.image.permute(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = as_list(job.model(job.image))
        try:
            found = evaluate(program, image)
        except Unknown as operation:
            return f"operations not checked one by one: {operation} is not among those that Muntin computes itself"
    error = max(deviation(f, w) for f, w in zip(found, wanted, strict=True))
    if error > BOUNDS[job.precision]:
        raise ExportError(
            f"the operations in the Core ML file, computed by PyTorch, differ from the model by {error:.1e} standard "
            f"deviations, more than {BOUNDS[job.precision]:.0e}"
        )
    return f"conversion: the file's operations, computed by PyTorch, differ from the model by {error:.1e}"
