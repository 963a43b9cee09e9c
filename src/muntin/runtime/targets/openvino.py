"""OpenVINO from the ONNX graph; runs on the CPU. The precision is a hint in the file, applied when it is opened."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.runtime.targets import INSTALL, Job, Opened, Written, axes, onnx

HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
KEY = "muntin"  # of our part of rt_info


def unavailable() -> str | None:
    return None


def _package(path: Path) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"{path} needs the package openvino; {INSTALL}") from error
    return openvino


def write(job: Job, path: Path) -> Written:
    openvino = _package(path)
    source = path.with_name("source.onnx")
    try:
        # converting the traced program fails on graphs with symbols; through ONNX it does not
        onnx.write(replace(job, metadata={}), source)
        model = openvino.convert_model(source)
    finally:
        source.unlink(missing_ok=True)
    for key, value in job.metadata.items():
        model.set_rt_info(value, [KEY, key])
    for port, name in zip(model.outputs, job.outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=job.precision != "float32")
    operations = model.get_ordered_ops()
    ranks = [output.get_partial_shape().rank for operation in operations for output in operation.outputs()]
    notes: tuple[str, ...] = ()
    if _hint(openvino.Core(), job.precision) != HINTS[job.precision]:
        notes = (f"weights in {job.precision}; this machine's CPU lacks it, so OpenVINO computes in float32 here",)
    return Written(
        opset=None,
        nodes=Counter(o.get_type_name() for o in operations if o.get_type_name() not in ("Constant", "Result")),
        max_rank=max(rank.get_length() for rank in ranks if rank.is_static),
        notes=notes,
        beside=(path.with_suffix(".bin").name,),
    )


def open(path: Path) -> Opened:
    """A compiled model for latency, with as many threads as torch has, in the file's precision and no other."""
    openvino = _package(path)
    if path.suffix == ".xml" and b"<net" not in path.read_bytes()[:4096]:  # OpenVINO would try, and log, every format
        raise UserError(f"{path} is not an OpenVINO file (it holds no <net>); export it again")
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        reason = _reason(error)
        raise UserError(f"{path} is not an OpenVINO file that OpenVINO can read ({reason}); export it again") from error
    if len(model.inputs) != 1 or model.inputs[0].get_partial_shape().rank.get_length() != 4:
        described = ", ".join(str(port.get_partial_shape()) for port in model.inputs) or "nothing"
        raise UserError(f"{path} takes {described}; a file exported by Muntin takes one batch of images")
    metadata = _metadata(model)
    config = {
        "INFERENCE_PRECISION_HINT": _hint(core, metadata.get("precision", "float32")),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot run {path} here ({_reason(error)})") from error
    dtype = torch.uint8 if model.inputs[0].get_element_type() == openvino.Type.u8 else torch.float32

    def run(images: Tensor) -> list[Tensor]:
        found = compiled([images.numpy()], share_inputs=True)
        return [torch.from_numpy(found[port]) for port in compiled.outputs]

    sides = [model.inputs[0].get_partial_shape()[axis] for axis in axes(dtype)]
    shape: Any = tuple(side.get_length() if side.is_static else None for side in sides)
    return Opened(run, metadata, dtype, shape)


def _hint(core: Any, precision: str) -> str:
    """Without one the CPU plugin computes in bfloat16 where the machine has instructions for it; so it does for f16
    where the machine has no float16.
    """
    able = precision != "float16" or "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return HINTS[precision] if able else HINTS["float32"]


def _metadata(model: Any) -> dict[str, str]:
    for key in (KEY, "framework"):  # the second is where the metadata of an ONNX file goes
        if model.has_rt_info([key]):
            return {name: str(value) for name, value in model.get_rt_info([key]).value.items()}
    return {}


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
