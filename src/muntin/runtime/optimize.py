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
from muntin.layers.attention import WindowAttention
from muntin.layers.mlp import Mlp, TokenBatchNorm
from muntin.layers.patch import PatchEmbed, PatchMerging
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
    for module in list(fast.modules()):
        if isinstance(module, WindowAttention):
            module._cache = BiasCache(frozen=True)
    _pack(fast)
    return fast


def fold(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without BatchNorms where a product stands beside them; public operators only."""
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for module in list(fast.modules()):
            if isinstance(module, WindowAttention) and isinstance(module.qkv, nn.Linear):
                _fold_scale(module)
        for module in list(fast.modules()):
            _fold_norms(module)
    return fast


def _fold_norms(module: Any) -> None:
    """The BatchNorms that this module holds, by where they stand."""
    if isinstance(module, PatchEmbed) and isinstance(module.norm, TokenBatchNorm):
        _fold_after(module.norm, module.proj)
        module.norm = nn.Identity()
    if isinstance(module, PatchMerging) and isinstance(module.norm, TokenBatchNorm):
        module.reduction = _fold_before(module.norm, module.reduction)
        module.norm = nn.Identity()
    if isinstance(getattr(module, "norm1", None), TokenBatchNorm) and isinstance(module.attention.qkv, nn.Linear):
        module.attention = FoldedAttention(module.attention, module.norm1)
        module.norm1 = nn.Identity()
    if isinstance(getattr(module, "norm2", None), TokenBatchNorm):
        module.mlp.fc1 = _fold_before(module.norm2, module.mlp.fc1)
        module.norm2 = nn.Identity()


class FoldedAttention(WindowAttention):
    """Attention whose norm is folded into q, k and v. Padding still yields what it yielded: the biases alone."""

    padding: Tensor

    def __init__(self, attention: Any, norm: TokenBatchNorm) -> None:
        nn.Module.__init__(self)
        self.heads, self.window, self.scale = attention.heads, attention.window, attention.scale
        self.register_buffer("padding", attention.qkv.bias.clone())
        self.qkv = _fold_before(norm, attention.qkv)
        self.proj = attention.proj
        self.bias_table = attention.bias_table
        self._cache = BiasCache(frozen=True)

    def project(self, x: Tensor, real: Tensor | None) -> Tensor:
        qkv = self.qkv(x)
        return qkv if real is None else torch.where(real > 0, qkv, self.padding)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The factor and summand that a BatchNorm is in evaluation mode, in float64."""
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def _fold_before(norm: TokenBatchNorm, linear: nn.Linear) -> nn.Linear:
    factor, summand = _affine(norm)
    weight = linear.weight.double()
    folded = nn.Linear(linear.in_features, linear.out_features).to(linear.weight).requires_grad_(False)
    folded.weight.copy_(weight * factor)
    folded.bias.copy_(weight @ summand + (0 if linear.bias is None else linear.bias.double()))
    return folded.eval()


def _fold_after(norm: TokenBatchNorm, conv: Any) -> None:
    factor, summand = _affine(norm)
    conv.weight.copy_(conv.weight.double() * factor[:, None, None, None])
    conv.bias.copy_(conv.bias.double() * factor + summand)


def _fold_scale(attention: Any) -> None:
    channels = attention.proj.in_features
    attention.qkv.weight[:channels] *= attention.scale
    attention.qkv.bias[:channels] *= attention.scale
    attention.scale = 1.0


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
