"""ExecuTorch for phones and small devices: XNNPACK where it has the operation, portable kernels elsewhere.

The file has two methods: `forward`, and `metadata`, which returns the metadata as JSON text.
"""

import json
import operator
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from muntin.errors import UserError
from muntin.runtime.constants import fold_constants
from muntin.runtime.targets import ExportError, Job, Opened, Written, axes
from muntin.runtime.targets.silence import silent
from muntin.runtime.tracing import trace

INSTALL = "install it in an environment of its own, since it pins many packages: pip install 'muntin[executorch]'"
REFUSED = {
    "float16": "executorch 1.5 computes some maps wrong in it (Swin's last one by standard deviations)",
    "bfloat16": "XNNPACK leaves it to slow portable kernels",
}
DTYPES = {0: torch.uint8, 6: torch.float32}
"""By ExecuTorch's number of a scalar type."""


def unavailable() -> str | None:
    return None


def write(job: Job, path: Path) -> Written:
    if job.precision in REFUSED:
        raise UserError(f"no ExecuTorch export in {job.precision}: {REFUSED[job.precision]}; choose float32")
    with silent():
        lower, partitioner, tidy = _tools()
        program = fold_constants(trace(job), job.image)
        try:
            edge = lower(
                program,
                transform_passes=[tidy()],
                partitioner=[partitioner()],
                constant_methods={"metadata": json.dumps(job.metadata)},
            )
        except Exception as error:  # its exceptions share no base below Exception
            raise _inexpressible(error) from error
        written = _describe(edge.exported_program().graph_module)
        try:
            whole = edge.to_executorch()
        except Exception as error:
            raise _inexpressible(error) from error
        with path.open("wb") as file:
            whole.write_to_file(file)
    return written


def open(path: Path) -> Opened:
    """The program in ExecuTorch's own runtime, with as many threads as torch has when the first is opened."""
    with silent():
        try:
            from executorch.runtime import Runtime
        except ImportError as error:
            raise UserError(f"{path} needs the package executorch; {INSTALL}") from error
        _set_threads()
        try:
            program = Runtime.get().load_program(path)
            metadata = json.loads(program.load_method("metadata").execute([])[0])
            method = program.load_method("forward")
            given = program.metadata("forward").input_tensor_meta(0)
            dtype, sizes = DTYPES[given.dtype()], given.sizes()
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not an ExecuTorch file that Muntin wrote ({error}); export it again") from error

    def run(images: Tensor) -> list[Tensor]:
        try:
            return list(method.execute([images]))
        except RuntimeError as error:
            raise ExportError(f"ExecuTorch does not run {path}: {error}") from error

    batch, height, width = (sizes[axis] for axis in axes(dtype))
    return Opened(run, metadata, dtype, (batch, height, width))


@lru_cache(maxsize=1)
def _set_threads() -> None:
    """As many as torch has when the first file is opened: a loaded program holds on to the pool that it was given."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())


def _inexpressible(error: Exception) -> UserError:
    return UserError(f"ExecuTorch cannot express this model: {' '.join(str(error).split())[:300]}")


def _tools() -> tuple[Any, Any, Any]:
    """What lowers a program, XNNPACK's partitioner, and our pass."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.dialects._ops import ops
        from executorch.exir.pass_base import ExportPass
    except ImportError as error:
        raise UserError(f"exporting to ExecuTorch needs the package executorch; {INSTALL}") from error
    edge = ops.edge.aten

    class Tidy(ExportPass):
        """An expansion that keeps the shape is left out, a squeeze becomes the view that XNNPACK takes."""

        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            if op == edge.expand_copy.default and list(args[0].data.shape) == list(meta["val"].shape):
                return args[0]
            if op in (edge.squeeze_copy.dims, edge.squeeze_copy.dim):
                op, args, kwargs = edge.view_copy.default, (args[0], list(meta["val"].shape)), {}
            return super().call_operator(op, args, kwargs, meta)

    return to_edge_transform_and_lower, XnnpackPartitioner, Tidy


def _describe(graph: fx.GraphModule) -> Written:
    """Counts what XNNPACK took and what is left to portable kernels."""
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    rank, pieces = 0, 0
    for node in graph.graph.nodes:
        if node.op == "get_attr" and hasattr(getattr(graph, node.target), "original_module"):
            pieces += 1
            inner = getattr(graph, node.target).original_module.graph.nodes
            taken.update(_name(n) for n in inner if _is_operation(n))
            rank = max([rank, *map(_rank, inner)])
        elif _is_operation(node):
            left[_name(node)] += 1
        rank = max(rank, _rank(node))
    total = taken.total() + left.total()
    rest = ", ".join(f"{name} {count}" for name, count in left.most_common()) or "nothing"
    notes = (f"XNNPACK takes {taken.total()} of {total} operations in {pieces} pieces; portable kernels: {rest}",)
    nodes = Counter({f"xnnpack.{name}": count for name, count in taken.items()})
    nodes.update({f"portable.{name}": count for name, count in left.items()})
    return Written(None, nodes, rank, notes)


def _is_operation(node: fx.Node) -> bool:
    helpers = (operator.getitem, torch.ops.higher_order.executorch_call_delegate)
    return node.op == "call_function" and node.target not in helpers


def _name(node: fx.Node) -> str:
    """`aten::linear` as linear."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", str(node.target))


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else 0
