"""A pass in ONNX Runtime, node by node.

The exported graph's nodes are named by their module and their operator in PyTorch. ONNX Runtime fuses and renames: a
node of the graph that runs is found by its name, or by the original name of a tensor that it makes; what the runtime
put in (a reordering of channels) belongs to its neighbour before.
"""

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.measure.capture import Capture, Piece, median_pass
from muntin.measure.capture.stages import Stages
from muntin.measure.kinds import group_of, kind_of, kind_of_node

HOW = (
    "each node of the graph that ONNX Runtime made of a fixed-size export, by its own profiler; stages by the module "
    "in the name of the exported node, or of the tensor that a fused one makes"
)
_WIDTH = {"float16": 2, "bfloat16": 2, "double": 8, "int64": 8, "bool": 1, "uint8": 1, "int8": 1}  # bytes, else 4
_SWAPPED = ([0, 1, 3, 2, 4, 5], [0, 3, 1, 2, 4, 5])


@dataclass(frozen=True)
class _Node:
    """A node of the optimised graph, with what its name said before; `channels` of a convolution as it was exported."""

    op_type: str
    path: str | None
    operator: str
    weights: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any]
    of_weights: bool
    channels: int | None = None


def _origin(name: str) -> tuple[str, str] | None:
    """Module and operator of a name that the export gave."""
    parts = name.split("/")
    return (parts[0], parts[1]) if len(parts) >= 3 else None


def _nodes(original: Path, optimised: Path) -> dict[str, _Node]:
    """The nodes that run, by name."""
    import onnx

    exported = onnx.load(original).graph
    held = {w.name: w.dims for w in exported.initializer}
    by_value: dict[str, tuple[str, str] | None] = {}
    channels: dict[str, int] = {}
    for node in exported.node:
        for value in node.output:
            by_value[value] = _origin(node.name)
        if node.op_type == "Conv" and node.input[1] in held:
            channels |= dict.fromkeys((node.name, *node.output), held[node.input[1]][0])
        elif node.op_type == "Relu" and node.input[0] in channels:  # fused into the convolution, which gets its name
            channels[node.output[0]] = channels[node.input[0]]
    graph = onnx.load(optimised).graph
    weights = {w.name: tuple(w.dims) for w in graph.initializer}
    reached = {value.name for value in graph.input} - weights.keys()
    found = {}
    for node in graph.node:
        data = [name for name in node.input if name in reached]
        if data and node.op_type not in ("Shape", "Size"):
            reached.update(node.output)
        origin = _origin(node.name) or by_value.get(node.name.removesuffix("_nchwc"))
        origin = origin or next((by_value[value] for value in node.output if by_value.get(value)), None)
        path, operator = origin or (None, "")
        keys = (node.name, node.name.removesuffix("_nchwc"), *node.output)
        found[node.name] = _Node(
            op_type=node.op_type,
            path=path,
            operator=operator,
            weights=tuple(weights[name] for name in node.input if name in weights),
            attributes={a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            channels=next((channels[key] for key in keys if key in channels), None),
            of_weights=not data or (bool(node.input) and node.input[0] not in reached),
        )
    return found


def _kind(node: _Node, ranks: Iterable[int], merges_patches: bool) -> str:
    """By type; where several nodes are one operator of PyTorch (a GELU in five) by that operator."""
    kind, source = kind_of_node(node.op_type), kind_of(node.operator) if node.operator else "other"
    if node.op_type == "Transpose" and 6 in ranks and list(node.attributes.get("perm", [])) in _SWAPPED:
        return "window shifting"
    if kind == "window shifting" and (node.of_weights or merges_patches or source not in ("window shifting", "other")):
        return "copy and reshape"
    parts = kind in ("element-wise", "copy and reshape", "activation", "other")
    if parts and source in ("activation", "normalisation", "softmax") or (parts and node.operator == "roll"):
        return source
    return kind


def _own(path: str, paths: set[str]) -> str:
    """A module's path in the model, without the names of what the export wrapped it in."""
    while path not in paths and "." in path:
        path = path.partition(".")[2]
    return path


def _shapes(described: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(shape)) for entry in described for kind, shape in entry.items()]


def _macs(node: _Node, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> int:
    """Multiply-accumulates; a packed weight is missing from what the runtime tells of a node's inputs."""
    if not inputs or not outputs:
        return 0
    made = math.prod(outputs[0])
    kind = kind_of_node(node.op_type)
    if kind == "matrix product":
        first = inputs[0]
        turned = node.attributes.get("transA", 0)
        return made * first[-2 if turned else -1] if len(first) > 1 else 0
    if kind == "convolution":
        if node.channels is not None:  # the runtime pads them to its vectors
            made = made // outputs[0][1] * node.channels
        kernel = node.attributes.get("kernel_shape") or (node.weights[0][2:] if node.weights else inputs[1][2:])
        return made * inputs[0][1] // node.attributes.get("group", 1) * math.prod(kernel)
    return 0


def _pieces(events: list[dict[str, Any]], nodes: dict[str, _Node], stages: Stages, model: nn.Module) -> list[Piece]:
    rows, known = [], list[str | None]()
    paths = {name for name, _ in model.named_modules()}
    merging = {name for name, module in model.named_modules() if "PatchMerging" in type(module).__name__}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        node = nodes.get(name) or _Node(event["args"]["op_name"], None, "", (), {}, False)
        inputs = _shapes(event["args"].get("input_type_shape", []))
        outputs = _shapes(event["args"].get("output_type_shape", []))
        path = None if node.path is None else _own(node.path, paths)
        kind = _kind(node, (len(shape) for _, shape in inputs), path in merging)
        macs = _macs(node, [shape for _, shape in inputs], [shape for _, shape in outputs])
        given = [shape for _, shape in inputs]
        width = _WIDTH.get(outputs[0][0], 4) if outputs else 4
        moved = sum(math.prod(shape) * _WIDTH.get(dtype, 4) for dtype, shape in [*inputs, *outputs])
        moved += sum(math.prod(shape) * width for shape in node.weights if len(shape) > 1 and shape not in given)
        if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Shape", "Identity", "Flatten"):
            moved = 0  # another view of the same values
        rows.append((name, node, kind, 2 * macs, moved, event))
        known.append(None if path is None else stages.of(path))
    filled = stages.fill(known)
    origin = min((event["ts"] for *_, event in rows), default=0)
    return [
        Piece(
            name=f"{node.op_type} {name}",
            kind=kind,
            group=group_of(node.op_type, kind),
            stage=stage,
            ms=event["dur"] / 1000,
            start_ms=(event["ts"] - origin) / 1000,
            span_ms=event["dur"] / 1000,
            flops=flops,
            bytes=moved,
        )
        for (name, node, kind, flops, moved, event), stage in zip(rows, filled, strict=True)
    ]


def _runs(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The nodes of each run: those within it."""
    runs = [event for event in events if event.get("name") == "model_run"]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return [
        [n for n in nodes if run["ts"] <= n["ts"] and n["ts"] + n["dur"] <= run["ts"] + run["dur"] + 1] for run in runs
    ]


def _session(path: Path, folder: Path, profiled: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if profiled:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimised.onnx")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"ONNX Runtime cannot run this model here ({reason}); give another --precision or engine"
        ) from error


def capture(model: nn.Module, x: Tensor, calls: int, warmup: int) -> Capture:
    """A pass of the exported model, of this batch and size alone and in the image's precision, on the CPU.

    Raises UserError on a GPU, and where ONNX cannot express the model.
    """
    if x.device.type != "cpu":
        raise UserError("ONNX Runtime is profiled on the CPU here; give --device cpu or another engine")
    import muntin

    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name) / "model.onnx"
        batch, _, height, width = x.shape
        shape = {"fixed": (batch, height, width), "sizes": [(height, width)], "batches": [batch]}
        if x.dtype != torch.float32:
            model = copy.deepcopy(model).float()  # an export takes a model in float32, and converts it itself
        precision = str(x.dtype).removeprefix("torch.")
        muntin.export(model, path, precision=precision, progress=False, **shape)  # type: ignore[arg-type]
        image = x.float().numpy()
        plain = _session(path, folder, profiled=False)
        given = {plain.get_inputs()[0].name: image}

        def wall(session: Any) -> float:
            start = time.perf_counter()
            session.run(None, given)
            return 1000 * (time.perf_counter() - start)

        for _ in range(warmup):
            wall(plain)
        usual = statistics.median(wall(plain) for _ in range(calls))
        session = _session(path, folder, profiled=True)
        taken = [wall(session) for _ in range(warmup + calls)]
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = _nodes(path, folder / "optimised.onnx")
    stages = Stages(model)
    runs = zip(taken[warmup:], _runs(events)[warmup:], strict=True)
    wall_ms, found = median_pass([(ms, _pieces(run, nodes, stages, model)) for ms, run in runs])
    return Capture(wall_ms, usual, found, stages.names, HOW)
