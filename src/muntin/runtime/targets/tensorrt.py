"""TensorRT: an engine where the package and a GPU are present, elsewhere its ONNX and the line that builds it.

The code that needs TensorRT follows its documentation (10.x) and has not been run: no machine here has it.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.runtime.targets import ExportError, Job, Opened, Written, axes, onnx

SUPPORTED = frozenset(
    """Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape
    Conv ConvTranspose Cos Div Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool Greater GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not Or
    Pad Pow PRelu Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu
    Reshape Resize Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt
    Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor""".split()
)
"""Operators of TensorRT 10's ONNX parser that image models are made of (its docs/operators.md)."""
MAX_RANK = 5
LEAST_SIDE, MAX_BATCH = 32, 32  # of the optimisation profile; its largest side is twice the model's own
METADATA = ".json"  # beside an engine, which holds none


def unavailable() -> str | None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        return "TensorRT is not installed here; run the trtexec line where it is"
    if not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU; run the trtexec line where there is one"
    return None


def write(job: Job, path: Path) -> Written:
    source = path.with_name(f"{path.name}.onnx")
    written = onnx.write(job, source)
    check_graph(source, job)
    profile = shapes(job)
    if unavailable() is not None:
        return replace(written, main=source, notes=(f"build it with: {command(job, profile, source, path)}",))
    _build(source, path, job.precision, profile)
    path.with_name(path.name + METADATA).write_text(json.dumps(job.metadata), encoding="utf-8")
    return replace(written, beside=(source.name, path.name + METADATA))


def shapes(job: Job) -> tuple[tuple[int, ...], ...] | None:
    """The profile: least, usual and largest shape of the input, or None where the graph is for one."""
    if job.fixed is not None:
        return None
    height, width = job.size
    sides = (
        (1, min(LEAST_SIDE, height), min(LEAST_SIDE, width)),
        (8, height, width),
        (MAX_BATCH, 2 * height, 2 * width),
    )
    return tuple((b, h, w, 3) if job.image.dtype == torch.uint8 else (b, 3, h, w) for b, h, w in sides)


def command(job: Job, profile: tuple[tuple[int, ...], ...] | None, source: Path, path: Path) -> str:
    """The line that makes the engine of the ONNX file, in their folder."""
    words = ["trtexec", f"--onnx={source.name}", f"--saveEngine={path.name}"]
    if profile is not None:
        named = zip(("min", "opt", "max"), profile, strict=True)
        words += [f"--{name}Shapes=image:{'x'.join(map(str, shape))}" for name, shape in named]
    words += {"float32": ["--noTF32"], "float16": ["--fp16"], "bfloat16": ["--bf16"]}[job.precision]
    return shlex.join(words)


def check_graph(source: Path, job: Job) -> None:
    """What can be known without TensorRT: the graph is valid, its shapes follow, ranks, operators, dynamic axes."""
    import onnx as package

    model = package.load(source)
    try:
        package.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and the shape inference's own, which share no base
        raise ExportError(f"{source.name} is not valid ONNX: {' '.join(str(error).split())[:300]}") from error
    unknown = sorted({node.op_type for node in model.graph.node if node.domain or node.op_type not in SUPPORTED})
    if unknown:
        raise UserError(f"TensorRT cannot express this model: its ONNX parser lacks {', '.join(unknown)}")
    inferred = package.shape_inference.infer_shapes(model, strict_mode=True).graph
    for value in [*inferred.value_info, *inferred.output]:
        rank = len(value.type.tensor_type.shape.dim)
        if rank > MAX_RANK:
            raise UserError(f"TensorRT is slow or fails on tensors above rank {MAX_RANK}; {value.name} has rank {rank}")
    dims = inferred.input[0].type.tensor_type.shape.dim
    dynamic = tuple(axis for axis, dim in enumerate(dims) if not dim.HasField("dim_value"))
    wanted = () if job.fixed else axes(job.image.dtype)
    if dynamic != wanted:
        raise ExportError(f"{source.name} has dynamic axes {dynamic}; wanted are {wanted}")


def _build(source: Path, path: Path, precision: str, profile: tuple[tuple[int, ...], ...] | None) -> None:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        reason = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise UserError(f"TensorRT cannot express this model: {reason}")
    config = builder.create_builder_config()
    if profile is not None:
        ranges = builder.create_optimization_profile()
        ranges.set_shape("image", *profile)
        config.add_optimization_profile(ranges)
    if precision == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.FP16 if precision == "float16" else trt.BuilderFlag.BF16)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise ExportError(f"TensorRT could not build an engine of {source.name}; its log on stderr says why")
    path.write_bytes(bytes(serialised))


def open(path: Path) -> Opened:
    reason = unavailable()
    if reason is not None:
        raise UserError(f"{path} cannot run here: {reason}")
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(f"{path} is not an engine of this TensorRT on this GPU; build it again here")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    stream = torch.cuda.Stream()

    def run(images: Tensor) -> list[Tensor]:
        given = images.cuda()
        if not context.set_input_shape("image", tuple(given.shape)):
            raise UserError(f"{path} was built for other sizes than {tuple(given.shape)}; see its optimisation profile")
        made = [torch.empty(tuple(context.get_tensor_shape(name)), device="cuda") for name in outputs]
        for name, tensor in zip(["image", *outputs], [given, *made], strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed to run {path}")
        stream.synchronize()
        return [tensor.cpu() for tensor in made]

    dtype = torch.uint8 if engine.get_tensor_dtype("image") == trt.DataType.UINT8 else torch.float32
    sides = [engine.get_tensor_shape("image")[axis] for axis in axes(dtype)]
    shape: Any = tuple(side if side > 0 else None for side in sides)
    beside = path.with_name(path.name + METADATA)
    metadata = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    least = 1 if all(sides[1:]) and sides[1] > 0 else LEAST_SIDE
    return Opened(run, metadata, dtype, shape, least)
