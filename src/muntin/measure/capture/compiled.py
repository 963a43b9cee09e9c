"""A pass of compiled code, kernel by kernel.

Inductor's own provenance says which nodes of the graph each call of its generated code comes from; a node says which
operator it was and which module it ran in. The generated C++ kernels mark themselves for the profiler. What they read
and write is seen once, when the generated code runs with every operand in sight.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from muntin.layers.opaque import OpaqueStage
from muntin.measure.capture import Capture
from muntin.measure.capture.eager import Recorder, Unit, attributed, timed
from muntin.measure.capture.stages import Stages
from muntin.measure.kinds import kind_of, kind_of_fused, plain_name

HOW = (
    "each call of inductor's generated code by the profiler; operators and modules of a fused kernel by inductor's "
    "provenance; a fused kernel is of the first kind that it holds of: softmax, normalisation, window shifting, "
    "activation, element-wise, copy; its stage is the one that most of its operators ran in"
)


@dataclass(frozen=True)
class _Node:
    """A node of the graph that inductor generates code for: its operator before decompositions, its module."""

    operator: str
    path: str
    of_weights: bool
    merges_patches: bool


@dataclass(frozen=True)
class _Call:
    """A call in the generated code, and the nodes that it computes."""

    label: str
    nodes: tuple[_Node, ...]


@dataclass
class _Seen:
    """What is noted while compiling, and in the pass that is recorded. `weights` are the shapes of parameters and
    buffers: by these a graph's arguments are told from what depends on the image."""

    weights: set[tuple[int, ...]]
    nodes: dict[str, _Node] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)
    recorder: Recorder | None = None


def _path(name: str) -> str:
    """`L['self'].stages.0.n` or `L['fn']._modules['blocks']...` -> `stages.0.n`."""
    name = re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]", lambda m: "." + (m[1] or m[2] or m[3]), name)
    name = re.sub(r"^(?:L|self)\.(?:self|fn|s|mod|model|module)?\.?", "", name) if name.startswith("L.") else name
    return name.strip(".")


def _note_nodes(seen: _Seen, graph: torch.fx.Graph) -> None:
    """A pass over the graph just before code is generated for it."""
    held: set[torch.fx.Node] = set()  # what depends on more than weights and sizes
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            fixed = isinstance(value, Tensor) and all(isinstance(side, int) for side in value.shape)
            if isinstance(value, Tensor) and not (fixed and tuple(value.shape) in seen.weights):
                held.add(node)
            continue
        if any(given in held for given in node.all_input_nodes):
            held.add(node)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        operator = str(node.meta.get("original_aten") or node.target)
        merges = any("PatchMerging" in getattr(kind, "__name__", str(kind)) for _, kind in stack[-1:])
        path = _path(str(stack[-1][0])) if stack else ""
        seen.nodes[node.name] = _Node(operator, path, node not in held, merges)


@contextmanager
def _watched(seen: _Seen) -> Iterator[None]:
    """Compile with every kernel named and marked, and keep what is known of it."""
    from torch._inductor import config, debug
    from torch._inductor.graph import GraphLowering

    generate = GraphLowering.compile_to_module
    sources: list[str] = []

    def compile_to_module(self: Any) -> Any:
        module: Any = generate(self)
        found = dict(debug._inductor_triton_kernel_to_post_grad_node_info)
        for label, handle in _labels(sources[-1] if sources else ""):
            names = found.get(f"{label}:{handle}", [])
            seen.calls.append(_Call(label, tuple(seen.nodes[name] for name in names if name in seen.nodes)))
        seen.modules.append(module)
        module.call = _recording(seen, module)
        return module

    settings = {
        "cpp.enable_kernel_profile": True,
        "trace.provenance_tracking_level": 1,
        "force_disable_caches": True,  # a cached kernel has no provenance
        "post_grad_custom_post_pass": lambda graph: _note_nodes(seen, graph),
    }
    with ExitStack() as stack:
        stack.enter_context(config.patch(settings))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", compile_to_module))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)))
        yield


def _labels(source: str) -> list[tuple[str, str]]:
    """The calls of generated code, in order: their label and handle."""
    found = []
    for line in source.splitlines():
        _, mark, rest = line.partition("# [Provenance debug handles] ")
        if mark:
            parts = (part.strip().rpartition(":") for part in rest.split(","))
            found += [(label, handle) for label, _, handle in parts]
    return found


class _Noted:
    """A kernel that writes down what it is given: C++ kernels are called, Triton's are run."""

    def __init__(self, name: str, kernel: Any, recorder: Recorder) -> None:
        self._name, self._kernel, self._recorder = name, kernel, recorder

    def _note(self, given: tuple[Any, ...]) -> None:
        moved = sum(t.numel() * t.element_size() for t in given if isinstance(t, Tensor))
        self._recorder.units.append(Unit(self._name, "other", None, 0, moved))

    def __call__(self, *given: Any, **options: Any) -> Any:
        self._note(given)
        return self._kernel(*given, **options)

    def run(self, *given: Any, **options: Any) -> Any:
        self._note(given)
        return self._kernel.run(*given, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _recording(seen: _Seen, module: Any) -> Callable[..., Any]:
    """The generated code's entry, which writes down operators and kernels while there is a recorder."""
    call = module.call

    def run(args: Any) -> Any:
        if seen.recorder is None:
            return call(args)
        recorder = seen.recorder
        kernels = {name: value for name, value in vars(module).items() if name.startswith(("cpp_fused", "triton_"))}

        for name, kernel in kernels.items():
            setattr(module, name, _Noted(name, kernel, recorder))
        try:
            with recorder:
                return call(args)
        finally:
            for name, kernel in kernels.items():
                setattr(module, name, kernel)

    return run


def _explained(units: Sequence[Unit], calls: Sequence[_Call], stages: Stages) -> list[Unit]:
    """Units with kind and stage: the k-th unit of a name is the k-th call of that name in the generated code."""
    waiting: defaultdict[str, deque[_Call]] = defaultdict(deque)
    for call in calls:
        waiting[_base(call.label)].append(call)
    known = []
    for unit in units:
        if unit.stage is not None:  # inside an operator that is a whole stage
            known.append(unit)
            continue
        queue = waiting[_base(unit.name)]
        call = queue.popleft() if queue else _Call(unit.name, ())
        computing = [node for node in call.nodes if "scalar_tensor" not in node.operator]  # sizes are made ahead
        places = Counter(stage for node in computing if (stage := stages.of(node.path)) is not None)
        stage = places.most_common(1)[0][0] if places else None
        fused = unit.name.startswith(("cpp_", "triton_"))
        kinds = tuple(dict.fromkeys(_kind(node) for node in call.nodes))
        # around a product a kernel only prepares it (a weight's layout): the product is a call of its own
        around = tuple(kind for kind in kinds if kind not in ("convolution", "matrix product", "attention"))
        kind = kind_of_fused(around or ("copy and reshape",)) if fused else kind_of(unit.name)
        if not fused and kind == "window shifting" and call.nodes and all(n.of_weights for n in call.nodes):
            kind = "copy and reshape"
        holds = tuple(other for other in around if other != kind) if fused else ()
        known.append(replace(unit, kind=kind, stage=stage, holds=holds))
    filled = stages.fill([unit.stage for unit in known])
    return [replace(unit, stage=stage) for unit, stage in zip(known, filled, strict=True)]


def _kind(node: _Node) -> str:
    kind = kind_of(node.operator)
    return "copy and reshape" if kind == "window shifting" and (node.of_weights or node.merges_patches) else kind


def _base(label: str) -> str:
    """`extern_kernels.addmm`, `torch.ops.aten.addmm.default`, `aten::addmm` -> `addmm`; a kernel's own name stays."""
    if label.startswith(("cpp_", "triton_")):
        return label
    if label.startswith("torch.ops."):
        return label.split(".")[3]
    return plain_name(label.rpartition(".")[2]) if label.startswith("extern_kernels.") else plain_name(label)


def is_ours(model: nn.Module) -> bool:
    """Whether a model is one of Muntin's classifiers or backbones."""
    from muntin.models.backbone import Backbone

    return isinstance(getattr(model, "backbone", model), Backbone)


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """Ours by `muntin.compile`, any other by `torch.compile`."""
    import muntin

    return muntin.compile(model) if is_ours(model) else torch.compile(model)


def _opaque(call: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that run inside operators, with their paths."""
    from muntin.runtime.compile import Compiled

    if isinstance(call, Compiled):
        for path, stage in call.optimized().named_modules():
            if isinstance(stage, OpaqueStage) and stage.number is not None:
                yield from stage.named_modules(prefix=path)


def capture(model: nn.Module, x: Tensor, calls: int, warmup: int) -> Capture:
    """A pass of the compiled model; compiling takes its time."""
    import logging
    import warnings

    stages = Stages(model)
    seen = _Seen({tuple(t.shape) for t in [*model.parameters(), *model.buffers()]})
    torch._dynamo.reset()
    loggers = [logging.getLogger(name) for name in ("torch", "torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to developers of the compiler
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            with _watched(seen):
                call = compiled(model)
                call(x)
            seen.recorder = Recorder([x])
            with stages.tracked(_opaque(call), seen.recorder.enter):
                call(x)
            units = _explained(seen.recorder.units, seen.calls, stages)
            seen.recorder = None
            plain, runs = timed(call, x, calls, warmup)
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            torch._dynamo.reset()
    wall_ms, found, notes = attributed(runs, units, x.is_cuda)
    return Capture(wall_ms, plain, found, stages.names, HOW, notes)
