"""An inference copy of a model: norms folded, weights packed for oneDNN, position biases made once.

Folding is exact arithmetic on the weights and holds on every device. Packing uses operators of PyTorch that
are not public, so each is tried on a small product first and left out where it fails or differs.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.mlp import Mlp
from muntin.layers.position import BiasCache


def optimize(model: nn.Module) -> nn.Module:
    """A copy for inference on the model's own device; the model itself is left as it is.

    BatchNorms are folded into the linear layer or convolution beside them and attention's scale into the
    weights of q; on a CPU the weights are packed for oneDNN and GELU or ReLU joins the product before it.
    Outputs are equal to 1e-5 of a standard deviation in float32. The copy has no gradients; for `muntin.compile`
    give the model itself.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"optimize takes a model, not a {type(model).__name__}: use muntin.create_model first")
    fast = fold(model)
    module: Any
    for module in fast.modules():
        if isinstance(getattr(module, "_cache", None), BiasCache):
            module._cache = BiasCache(frozen=True)
    _pack(fast)
    return fast


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


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own weight layout, with an activation: (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, act: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features, self.act = linear.in_features, linear.out_features, act
        self._original = linear
        self._pack()

    def _pack(self) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._original.weight.detach().contiguous())
        self._bias = None if self._original.bias is None else self._original.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self.act, [], _ALGORITHM[self.act])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_weight"}  # opaque to pickle and copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pack()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, act={self.act}"


_ALGORITHM = {"none": "", "relu": "", "gelu": "none"}
_ACTIVATION: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu"}


@lru_cache
def _packs(dtype: torch.dtype, act: str) -> bool:
    """Whether this build has the packed product with this activation, and it computes the same."""
    with torch.no_grad():
        linear = nn.Linear(48, 40).to(dtype)
        x = torch.linspace(-2, 2, 33 * 48).view(33, 48).to(dtype)
        expected = {"none": lambda y: y, "gelu": F.gelu, "relu": F.relu}[act](linear(x))
        try:
            out = PackedLinear(linear, act)(x)
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        return bool(torch.allclose(out, expected, atol=1e-5 if dtype == torch.float32 else 2e-2))


def _pack(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, Mlp) and isinstance(module.fc1, nn.Linear):
            _pack_mlp(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, PackedLinear) and _packable(child, "none"):
                setattr(module, name, PackedLinear(child))


def _pack_mlp(mlp: Any) -> None:
    act = _ACTIVATION[type(mlp.act)]
    if _packable(mlp.fc1, act):
        mlp.fc1, mlp.act = PackedLinear(mlp.fc1, act), nn.Identity()


def _packable(linear: nn.Linear, act: str) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and _packs(weight.dtype, act)
