"""An inference copy of a model: norms folded, weights packed for oneDNN, position biases made once.

Folding is exact arithmetic on the weights and holds on every device; for packing see `packed`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from muntin import kernels
from muntin.errors import UserError
from muntin.layers.cascaded import CascadedAttention
from muntin.layers.folding import noting
from muntin.layers.opaque import Programmed
from muntin.layers.position import BiasCache
from muntin.runtime.graphs import CudaGraphs
from muntin.runtime.packed import Packed, pack


def optimize(model: nn.Module, cuda_graph: bool = False) -> nn.Module:
    """A copy for inference on the model's own device; the model itself is left as it is.

    cuda_graph: on a GPU, capture each shape of input as a CUDA graph and replay it: what a batch of few images waits
    for is the launching of hundreds of kernels. Each shape keeps the memory of a forward pass, eight at most.

    BatchNorms are folded into the linear layer or convolution beside them and attention's scale into the
    weights of q, x + DWConv(x) becomes one convolution; on a CPU the weights are packed for oneDNN, and activations
    and residuals join the product before them.
    Outputs are equal to 1e-5 of a standard deviation in float32. The copy has no gradients of its own; for
    `muntin.export` give the model itself, and `muntin.compile` makes its own copy. A copy of a copy is that copy. Its
    `folds` count what was folded and packed, by what it was.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"optimize takes a model, not a {type(model).__name__}: use muntin.create_model first")
    if getattr(model, "optimized", False):
        return _graphs(model) if cuda_graph else model
    with noting() as folds:
        packed = _prepared(model)
    packed.folds = dict(folds)
    packed.optimized = True
    return _graphs(packed) if cuda_graph else packed


def _prepared(model: nn.Module) -> Any:
    """The copy, folded and packed."""
    fast = fold(model)
    module: Any
    for module in fast.modules():
        if isinstance(getattr(module, "_cache", None), BiasCache):
            module._cache = BiasCache(frozen=True)
            module.register_load_state_dict_post_hook(_forget)
        if isinstance(module, CascadedAttention) and kernels.serve(module.bias_table):
            module.stack()
            module.register_load_state_dict_post_hook(_stack)
        if isinstance(module, Programmed) and all(p.device.type == "cpu" for p in module.parameters()):
            module.add_program()
    return pack(fast)


def _graphs(model: nn.Module) -> nn.Module:
    if isinstance(model, CudaGraphs):
        return model
    device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
    if device.type != "cuda":
        raise UserError(f"cuda_graph=True: the model is on {device}; move it to a GPU first, or leave cuda_graph out")
    graphs: Any = CudaGraphs(model)
    graphs.optimized, graphs.folds = True, model.folds
    return graphs


def take_over(old: nn.Module, new: nn.Module) -> bool:
    """Gives an optimised copy the weights of another, in place; False, and nothing done, where more is different."""
    theirs = dict(new.named_modules())
    tensors: list[tuple[Tensor, Tensor]] = []
    for name, module in old.named_modules():
        other = theirs.pop(name, None)
        if type(other) is not type(module) or other.extra_repr() != module.extra_repr():
            return False
        for held, given in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            tensors += [(x, given[key]) for key, x in held.items() if x is not None and given[key] is not None]
    if theirs or any(x.shape != y.shape or x.dtype != y.dtype or x.device != y.device for x, y in tensors):
        return False
    for x, y in tensors:
        x.copy_(y)
    for module in old.modules():
        if isinstance(module, Packed):
            module.repack()
        if isinstance(getattr(module, "_cache", None), BiasCache):
            _forget(module, None)
    return True


def _forget(module: Any, _: Any) -> None:
    """A frozen bias is of the weights that were there when it was made."""
    module._cache.entries.clear()


def _stack(module: Any, _: Any) -> None:
    module.stack()


def fold(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without BatchNorms where a product stands beside them; public operators only.

    A module that has `folded()` says itself what replaces it: from the outside inwards, a module before its children.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        return _folded(fast)


def _folded(module: Any) -> nn.Module:
    module = module.folded() if hasattr(module, "folded") else module
    for name, child in list(module.named_children()):
        setattr(module, name, _folded(child))
    return module
