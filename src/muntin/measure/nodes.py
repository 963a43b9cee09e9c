"""What norms and activations become in an exported graph, before and after a runtime has optimised it (Swin-Free,
figure 2).

A graph is counted in two forms. `written out` is what exporters write where the opset has no single operator for
the layer: LayerNorm as nine nodes (opsets below 17), GELU as five (below 20), BatchNorm as itself. `ours` is what
`muntin.export` writes: one node for each, BatchNorms folded into the product beside them.
B batch, H W image
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muntin.progress import progress

LAYERS = ("LayerNorm", "GELU", "BatchNorm", "ReLU")
SINGLE = {"LayerNormalization": "LayerNorm", "Gelu": "GELU", "BatchNormalization": "BatchNorm", "Relu": "ReLU"}
"""Operator as exported -> its layer."""

# What ONNX Runtime's fusions make: the layer, with a residual addition, a bias or an approximation where there is one.
FUSED = SINGLE | {
    "SkipLayerNormalization": "LayerNorm",
    "SimplifiedLayerNormalization": "LayerNorm",
    "BiasGelu": "GELU",
    "FastGelu": "GELU",
}
OPENVINO_FUSED = {"RMS": "LayerNorm", "MVN": "LayerNorm"}
OPENVINO_MADE = re.compile(r"(ReduceMean|Subtract)_\d+")  # the mean of a LayerNorm, and x less it, before RMS
IGNORED = ("Parameter", "Const", "Input", "Output", "Result", "Constant")
WRITTEN_OUT, OURS = FORMS = ("written out", "ours")


@dataclass(frozen=True)
class Count:
    """Nodes of one graph: all of them, those of each layer, and by operator."""

    total: int
    layers: dict[str, int]
    operators: dict[str, int]


@dataclass(frozen=True)
class Graph:
    """One model in one form: as exported, and as each runtime runs it. `layers` are how many there are of each."""

    model: str
    form: str
    layers: dict[str, int]
    exported: Count
    optimised: dict[str, Count]


@dataclass(frozen=True)
class NodeReport:
    """The graphs, the single layers first."""

    graphs: list[Graph]

    def json(self) -> list[dict[str, Any]]:
        """All of it for programs."""
        return [asdict(graph) for graph in self.graphs]

    def __str__(self) -> str:
        engines = list(self.graphs[0].optimised)
        lines = [["model", "form", "nodes in", "all", *LAYERS]]
        for graph in self.graphs:
            counts = {"the file": graph.exported, **{engine: graph.optimised[engine] for engine in engines}}
            if graph.form == WRITTEN_OUT:
                layers = [str(graph.layers[layer] or "-") for layer in LAYERS]
                lines.append([graph.model, "layers", "", "", *layers])
            for where, count in counts.items():
                cells = [str(count.layers[layer]) if graph.layers[layer] else "-" for layer in LAYERS]
                lines.append(["", graph.form, where, str(count.total), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join([*map(str.ljust, line[:3], widths[:3]), *map(str.rjust, line[3:], widths[3:])]) for line in lines
        ]
        return "\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]])


# ------------------------------------------------------------------------------------------------- making the graphs


def exported(model: nn.Module, size: tuple[int, int], form: str) -> Any:
    """An ONNX model for one image of this size, in one of FORMS; the nodes of layers are named LAYER.NUMBER."""
    from muntin.runtime import fold
    from muntin.runtime.export import OPSET
    from muntin.runtime.tracing import quiet

    model = fold(model) if form == OURS else model.eval()
    image = torch.randn(1, 3, *size)
    with quiet(), torch.no_grad():
        traced = torch.export.export(model, (image,), strict=False)
        program = torch.onnx.export(
            traced, opset_version=OPSET, dynamo=True, verbose=False, optimize=form == OURS, input_names=["image"]
        )
        assert program is not None  # always, with dynamo=True
        if form == WRITTEN_OUT:  # constants folded, but no rewriting: that would merge BatchNorms into convolutions
            from onnxscript import optimizer

            optimizer.inline(program.model)
            optimizer.fold_constants(program.model, onnx_shape_inference=True)
            optimizer.remove_unused_nodes(program.model)
        proto = program.model_proto
    for number, node in enumerate(proto.graph.node):
        layer = SINGLE.get(node.op_type)
        node.name = f"{layer or node.op_type}.{number}"
    return _written_out(proto) if form == WRITTEN_OUT else proto


def _written_out(proto: Any) -> Any:
    """The same graph with each LayerNormalization and exact Gelu as the nodes that older opsets need."""
    graph = proto.graph
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        settings = {a.name: a for a in node.attribute}
        if node.op_type == "LayerNormalization":
            axis = settings["axis"].i if "axis" in settings else -1
            epsilon = settings["epsilon"].f if "epsilon" in settings else 1e-5
            _layer_norm(graph, node, axis, epsilon)
        elif node.op_type == "Gelu" and ("approximate" not in settings or settings["approximate"].s == b"none"):
            _gelu(graph, node)
        else:
            graph.node.append(node)
    return proto


def _adder(graph: Any, name: str) -> tuple[Callable[..., str], Callable[[str, Any, type], str]]:
    """Two functions that put a node and a constant into the graph, and return the name of the value."""
    import numpy as np
    from onnx import helper, numpy_helper

    def node(kind: str, *inputs: str, out: str = "") -> str:
        made = f"{name}.{kind}.{len(graph.node)}"
        graph.node.append(helper.make_node(kind, list(inputs), [out or made], name=made))
        return out or made

    def constant(label: str, value: Any, dtype: type) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), f"{name}.{label}"))
        return f"{name}.{label}"

    return node, constant


def _layer_norm(graph: Any, layer: Any, axis: int, epsilon: float) -> None:
    import numpy as np

    node, constant = _adder(graph, layer.name)
    x, weight, *bias = layer.input
    axes = constant("axes", list(range(axis, 0)), np.int64)
    centred = node("Sub", x, node("ReduceMean", x, axes))
    squares = node("Pow", centred, constant("two", 2.0, np.float32))
    variance = node("Add", node("ReduceMean", squares, axes), constant("epsilon", epsilon, np.float32))
    normal = node("Div", centred, node("Sqrt", variance))
    if bias:
        node("Add", node("Mul", normal, weight), bias[0], out=layer.output[0])
    else:
        node("Mul", normal, weight, out=layer.output[0])


def _gelu(graph: Any, layer: Any) -> None:
    import numpy as np

    node, constant = _adder(graph, layer.name)
    (x,) = layer.input
    erf = node("Erf", node("Div", x, constant("root", 2**0.5, np.float32)))
    weighted = node("Mul", x, node("Add", erf, constant("one", 1.0, np.float32)))
    node("Mul", weighted, constant("half", 0.5, np.float32), out=layer.output[0])


# ------------------------------------------------------------------------------------------------------ counting them


def _count(nodes: Sequence[tuple[str, Sequence[str]]], fused: Mapping[str, str]) -> Count:
    """nodes: operator, and the names of the exported nodes that it stands for.

    A node belongs to a layer where its operator is that layer's, or everything that it stands for is of that layer.
    """
    layers: Counter[str] = Counter()
    for operator, names in nodes:
        owners = {"LayerNorm" if OPENVINO_MADE.fullmatch(name) else name.split(".")[0] for name in names}
        layer = fused.get(operator) or (owners.pop() if len(owners) == 1 else "")
        layers[layer] += 1
    operators = Counter(operator for operator, _ in nodes)
    return Count(len(nodes), {layer: layers[layer] for layer in LAYERS}, dict(operators.most_common()))


def _named(proto: Any) -> list[tuple[str, list[str]]]:
    return [(node.op_type, [node.name]) for node in proto.graph.node if node.op_type not in IGNORED]


def onnxruntime_graph(proto: Any) -> Count:
    """As ONNX Runtime runs it, with its optimisations that hold for any machine (ORT_ENABLE_EXTENDED)."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return _count(_named(onnx.load(path)), FUSED)


def openvino_graph(proto: Any) -> Count:
    """As OpenVINO runs it on this machine's CPU."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU")
    nodes = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        told = op.get_rt_info()
        operator = told["layerType"].astype(str) if "layerType" in told else op.get_type_name()
        names = told["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in told else []
        if operator not in IGNORED:
            nodes.append((operator, names))
    return _count(nodes, OPENVINO_FUSED)


RUNTIMES = {"ONNX Runtime": onnxruntime_graph, "OpenVINO": openvino_graph}


# --------------------------------------------------------------------------------------------------------- the report


def _alone() -> dict[str, nn.Module]:
    """Each layer between two convolutions."""
    layers = {"LayerNorm": nn.LayerNorm(16), "GELU": nn.GELU(), "BatchNorm": nn.BatchNorm2d(8), "ReLU": nn.ReLU()}
    alone: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        for weight in layer.parameters():  # a weight of 1 and a bias of 0 would be optimised away
            nn.init.uniform_(weight, 0.5, 1.5)
        alone[name] = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.Conv2d(8, 8, 1))
    return alone


def count_layers(model: nn.Module) -> dict[str, int]:
    """How many of each layer a model has."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "LayerNorm": nn.LayerNorm,
        "GELU": nn.GELU,
        "BatchNorm": nn.modules.batchnorm._BatchNorm,
        "ReLU": nn.ReLU,
    }
    return {name: sum(isinstance(m, kind) for m in model.modules()) for name, kind in kinds.items()}


def graph_of(label: str, model: nn.Module, size: tuple[int, int], form: str) -> Graph:
    """One model in one form, counted in the file and in each runtime."""
    proto = exported(model, size, form)
    optimised = {name: count(proto) for name, count in RUNTIMES.items()}
    return Graph(label, form, count_layers(model), _count(_named(proto), SINGLE), optimised)


def nodes(targets: Sequence[str], size: int | tuple[int, int] | None = None) -> NodeReport:
    """Count the nodes of each layer alone and of each model's graph, before and after runtimes optimise it.

    targets: listed models, runs' folders, timm:NAME or torchvision:NAME. size: side or (height,
        width) in pixels, by default each one's own.
    Raises UserError for a target that cannot be found.
    """
    from muntin.measure.targets import Models, pair, parse

    models, own = Models(seed=0), None if size is None else pair(size)
    jobs: list[tuple[str, nn.Module, tuple[int, int]]] = []
    for name, module in _alone().items():
        jobs.append((f"{name} between convolutions", module, (16, 16)))
    for target in targets:
        found = parse(target)[0]
        jobs.append((target, models.get(found, own or found.size), own or found.size))
    pairs = [(job, form) for job in jobs for form in FORMS]
    return NodeReport([graph_of(*job, form) for job, form in progress(pairs, len(pairs), "nodes")])
