"""ONNX by torch.onnx; runs in ONNX Runtime on the CPU."""

import ast
import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.runtime.targets import INSTALL, Job, Opened, Written, axes
from muntin.runtime.targets.translations import translations
from muntin.runtime.tracing import quiet, trace

LIMIT = 2**31 - 1  # bytes: protobuf holds no larger message
BFLOAT16_OPSET = 22  # the first whose convolutions may be bfloat16


def unavailable() -> str | None:
    return None


def write(job: Job, path: Path) -> Written:
    try:
        import onnxscript  # noqa: F401  # torch.onnx needs it and would say so in its own words
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs the package onnxscript; {INSTALL}") from error
    held = sum(t.numel() * t.element_size() for t in itertools.chain(job.model.parameters(), job.model.buffers()))
    if held > LIMIT:
        raise UserError(f"the model holds {held / 1e9:.1f} GB; a single ONNX file holds less than 2 GB")
    tensors = itertools.chain(job.model.parameters(), job.model.buffers())
    narrow = any(t.dtype == torch.bfloat16 for t in tensors)
    opset = max(job.opset, BFLOAT16_OPSET) if narrow else job.opset
    traced = trace(job)
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                traced,
                input_names=["image"],
                output_names=list(job.outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
                custom_translation_table=translations() if job.alone else None,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(f"ONNX cannot express this model: {_reason(error)}") from error
        assert program is not None  # always, with dynamo=True
        graph = program.model
        if (written := graph.opset_imports[""]) != opset:  # it says nothing where it cannot convert
            raise UserError(
                f"opset {opset}: PyTorch writes this model in opset {written}; give --opset {written} or later"
            )
        graph.producer_name = "muntin"
        graph.producer_version = sys.modules["muntin"].__version__  # importing it here would go in a circle
        graph.metadata_props.clear()
        graph.metadata_props.update(job.metadata)
        for node in graph.graph.all_nodes():
            node.name = _placed(node)
            node.metadata_props.clear()  # stack traces with the paths of this machine
        program.save(path, external_data=False)
    values = [value for node in graph.graph.all_nodes() for value in node.outputs if value.shape is not None]
    values += list(graph.graph.initializers.values())
    note = ("ONNX Runtime's CPU has no bfloat16 convolution: compared in OpenVINO",) if narrow else ()
    return Written(
        notes=note,
        opset=graph.opset_imports[""],
        nodes=Counter(node.op_type for node in graph.graph.all_nodes()),
        max_rank=max(len(value.shape) for value in values if value.shape is not None),
    )


def _placed(node: Any) -> str:
    """A node's name with the module that it comes from and its operator in PyTorch in front, which profilers show:
    `backbone.stages.0.blocks.1.mlp.fc1/linear/node_MatMul_12`."""
    scopes, kinds = (
        ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{what}", "[]"))
        for what in ("name_scopes", "class_hierarchy")
    )
    module = scopes[-2] if len(scopes) > 1 else ""
    operator = kinds[-1].removeprefix("aten.").partition(".")[0] if kinds else ""
    return f"{module}/{operator}/{node.name}"


def _reason(error: BaseException) -> str:
    """The innermost cause, which names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def open(path: Path) -> Opened:
    """A session with as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs the package onnxruntime; {INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
        if "NOT_IMPLEMENTED" in str(error):  # its CPU lacks most bfloat16 kernels
            return _open_elsewhere(path, str(error))
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is not an ONNX file that ONNX Runtime can run ({reason}); export it again") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        described = ", ".join(f"{i.name}{i.shape}" for i in inputs) or "nothing"
        raise UserError(f"{path} takes {described}; a file exported by Muntin takes one batch of images")
    given = inputs[0]
    dtype = torch.uint8 if given.type == "tensor(uint8)" else torch.float32

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {given.name: images.numpy()})]

    shape: Any = tuple(given.shape[a] if isinstance(given.shape[a], int) else None for a in axes(dtype))
    return Opened(run, session.get_modelmeta().custom_metadata_map, dtype, shape)


def _open_elsewhere(path: Path, reason: str) -> Opened:
    """In OpenVINO, which reads ONNX files too."""
    from muntin.runtime.targets import openvino

    try:
        return replace(openvino.open(path), engine="openvino")
    except UserError as error:
        lines = " ".join(reason.split())[:200]
        raise UserError(f"ONNX Runtime's CPU cannot run {path} ({lines}), and OpenVINO neither: {error}") from error
