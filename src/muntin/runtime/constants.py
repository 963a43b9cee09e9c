"""Position biases, masks, decays and the like in a graph of one size: computed once, by PyTorch.

Converters compute constants too, but not all of them to the last bit: RMT's rotations were off by 1e-3 of the output.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from muntin.runtime.tracing import quiet

aten = torch.ops.aten


def fold_constants(program: torch.export.ExportedProgram, image: Tensor) -> torch.export.ExportedProgram:
    """The same program with everything computed that does not depend on the image: biases, masks, decays."""
    with quiet(), torch.no_grad():
        graph: Any = program.run_decompositions({}).module(check_guards=False)  # decomposed: nothing in place
        values: dict[fx.Node, Any] = {}  # a tensor, or several
        for node in list(graph.graph.nodes):
            if node.target is aten._assert_tensor_metadata.default:
                graph.graph.erase_node(node)
                continue
            value = _constant(graph, node, values)
            if value is not None:
                values[node] = value
        made = [node for node in values if node.op == "call_function" and isinstance(values[node], Tensor)]
        folded = [node for node in made if not all(user in values for user in node.users)]
        for number, node in enumerate(folded):
            name = f"constant_{number}"
            graph.register_buffer(name, values[node].contiguous().clone())  # expanded ones have no strides to store
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return torch.export.export(graph, (image,), strict=False)


def _constant(graph: Any, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node is on every image, None where that depends on the image."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return value.detach() if isinstance(value, Tensor) else None  # a submodule is none
    if node.op != "call_function" or node.is_impure() or not all(given in values for given in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda given: values[given])
    return node.target(*args, **kwargs)  # type: ignore[operator]
