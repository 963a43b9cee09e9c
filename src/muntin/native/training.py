"""Layers of a block in training on the CPU, with their gradients, see training.cpp.

Each is an autograd function of its own that keeps its input, the hidden values of a feed-forward layer, and q, k and v:
norms, activations and attention weights are computed again in the backward pass. They take float32, and bfloat16 under
autocast where the machine multiplies it. A second derivative is taken through PyTorch's own operators.

Legend: B batch, N tokens of a map in raster order, C channels, A tokens of a window, h heads.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from muntin.layers.drop import DropPath
from muntin.layers.tracing import transformed
from muntin.layers.window import Grid, kind_masks, window_masks, window_tokens
from muntin.native.build import TRAINING, library

_ACTS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.GELU: 4}
_SERVED = (nn.Linear, nn.LayerNorm, DropPath, *_ACTS)
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(name: str, *fields: tuple[Any, str]) -> Any:
    """A C structure of fields by type, whose names stand in one string."""
    parts = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": parts})


_LINEAR = structure(
    "Linear",
    (_POINTER, "x residual norm_weight norm_bias weight bias scale y"),
    (_LONG, "rows tokens"),
    (_FLOAT, "epsilon"),
    (_INT, "inputs outputs"),
)
_LINEAR_GRADIENT = structure("LinearGradient", (_POINTER, "dy dx dweight dbias dnorm_weight dnorm_bias"))
_MLP = structure(
    "Mlp",
    (_POINTER, "x residual norm_weight norm_bias weight1 bias1 weight2 bias2 scale hidden y"),
    (_LONG, "rows tokens"),
    (_FLOAT, "epsilon"),
    (_INT, "inputs width outputs act"),
)
_MLP_GRADIENT = structure(
    "MlpGradient", (_POINTER, "dy dx dweight1 dbias1 dweight2 dbias2 dnorm_weight dnorm_bias"), (_INT, "beside")
)
_WINDOW = structure(
    "Window",
    (_POINTER, "qkv bias padding factors y"),
    (_FLOAT, "scale"),
    (_INT, "batch height width heads dim window_height window_width shift_height shift_width"),
)
_WINDOW_GRADIENT = structure("WindowGradient", (_POINTER, "dy dqkv dbias dpadding dfactors"), (_INT, "splits"))


@lru_cache(maxsize=1)
def _lanes() -> int:
    """Floats of a vector; 0: there are no kernels."""
    kernels = library(TRAINING)
    return 0 if kernels is None else kernels.muntin_lanes()


@lru_cache(maxsize=1)
def _halves() -> bool:
    return bool(_lanes()) and bool(library(TRAINING).muntin_half())


def serve(x: Tensor) -> bool:
    """Whether these layers train on this input. Not where something looks at single operators or transforms them."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    if torch.jit.is_tracing() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, nn.Parameter):
        return False
    if transformed() or nn.modules.module._has_any_global_hook():
        return False
    return bool(_lanes()) and _kept_in(x) is not None


def _kept_in(x: Tensor) -> torch.dtype | None:
    """What activations are kept in: float32, or bfloat16 under autocast; None: neither."""
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if x.dtype == torch.float32 else None
    half = torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return torch.bfloat16 if half and _halves() else None


def fits(*modules: nn.Module) -> bool:
    """Whether the kernels compute these layers."""
    return all(_fits(module) for module in modules)


def unhooked(*modules: nn.Module) -> bool:
    """Whether nothing waits for these modules to be called, and their forward is that of their class."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def rest(width: int, vectors: int = 1) -> int:
    """What so many vectors leave of a width."""
    return width % (_lanes() * vectors)


def _fits(module: nn.Module) -> bool:
    if type(module) not in _SERVED or not unhooked(module):
        return False
    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    if isinstance(module, nn.Linear):
        pairs = 2 if torch.is_autocast_enabled("cpu") else 1
        divided = not (rest(module.in_features, pairs) or rest(module.out_features, pairs))
        return divided and plain(module.weight) and (module.bias is None or plain(module.bias))
    return not isinstance(module, nn.LayerNorm) or (plain(module.weight) and plain(module.bias))


def plain(p: Any) -> bool:
    """Whether it is a parameter that the kernels read as it lies there."""
    return type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous()


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(name: str, *structures: Any, half: bool) -> None:
    getattr(library(TRAINING), name)(*map(ctypes.byref, structures), int(half), torch.get_num_threads())


def linear_rows(x: Tensor, weight: Tensor, y: Tensor, rows: int) -> None:
    """y = x @ weight^T: (rows, K), (N, K) and (rows, N)."""
    sizes = rows, rows, 0.0, weight.shape[1], weight.shape[0]
    given = map(pointer, (x, None, None, None, weight, None, None, y))
    _run("muntin_linear", _LINEAR(*given, *sizes), half=x.dtype == torch.bfloat16)


def linear_rows_backward(
    x: Tensor, weight: Tensor, dy: Tensor, dx: Tensor | None, dweight: Tensor | None, rows: int
) -> None:
    """Its gradients, where they are wanted."""
    sizes = rows, rows, 0.0, weight.shape[1], weight.shape[0]
    given = map(pointer, (x, None, None, None, weight, None, None, None))
    gradient = _LINEAR_GRADIENT(*map(pointer, (dy, dx, dweight, None, None, None)))
    _run("muntin_linear_backward", _LINEAR(*given, *sizes), gradient, half=x.dtype == torch.bfloat16)


def _rows(x: Tensor) -> Tensor:
    """(B, N, C) as the kernels read it."""
    kept = _kept_in(x)
    return (x if kept is None else x.to(kept)).contiguous()


def again(by_pytorch: Callable[..., Tensor], given: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, through PyTorch's own operators."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # one may have been made from another: each as a node of its own, where the way back ends
        nodes = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in given]
        wanted = [n for n in nodes if isinstance(n, Tensor) and n.requires_grad]
        found = iter(torch.autograd.grad(by_pytorch(*nodes), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if isinstance(n, Tensor) and n.requires_grad else None for n in nodes)


def differentiated(grad: Tensor) -> bool:
    """In a backward pass: whether its gradients are to be differentiated, or many of them stand in one."""
    batched = torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched


def unpacked(ctx: Any) -> tuple[Any, ...]:
    """What was saved; a hook may have laid it out otherwise."""
    return tuple(t if t is None else t.contiguous() for t in ctx.saved_tensors)


def _like(parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """For a gradient: zeros where it is added to."""
    if not wanted or parameter is None:
        return None
    return torch.zeros_like(parameter) if parameter.ndim == 1 else torch.empty_like(parameter)


# ------------------------------------------------------------------------------------------------------ linear layers


class _Linear(torch.autograd.Function):
    """residual + scale * (norm(x) @ weight^T + bias)"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        epsilon: float,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, residual, scale)
        ctx.epsilon = epsilon
        _run("muntin_linear", _linear(ctx, ctx.to_save, residual, y), half=x.dtype == torch.bfloat16)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, norm_weight, norm_bias, residual, scale = saved = unpacked(ctx)
        if differentiated(grads[0]):
            given = (x, weight, bias, norm_weight, norm_bias, ctx.epsilon, residual, scale)
            return again(_plain_linear, given, grads[0])
        dy, wanted = grads[0].contiguous(), ctx.needs_input_grad
        dx = torch.empty_like(x) if wanted[0] else None
        parts = [_like(t, w) for t, w in zip((weight, bias, norm_weight, norm_bias), wanted[1:5], strict=True)]
        if parts[0] is None and parts[1] is not None:  # the sums of dy are a part of the gradient of the weight
            parts[0] = torch.empty_like(weight)
        gradient = _LINEAR_GRADIENT(*map(pointer, (dy, dx, *parts)))
        _run("muntin_linear_backward", _linear(ctx, saved, None, None), gradient, half=x.dtype == torch.bfloat16)
        return dx, parts[0] if wanted[1] else None, *parts[1:], None, dy if wanted[6] else None, None


def _linear(ctx: Any, saved: Sequence[Any], residual: Tensor | None, y: Tensor | None) -> Any:
    x, weight, bias, norm_weight, norm_bias, _, scale = saved
    tensors = map(pointer, (x, residual, norm_weight, norm_bias, weight, bias, scale, y))
    return _LINEAR(*tensors, x.shape[:-1].numel(), x.shape[-2], ctx.epsilon, weight.shape[1], weight.shape[0])


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    y = x.float()
    if norm_weight is not None:
        y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, epsilon)
    return _joined(F.linear(y, weight, bias), residual, scale).to(x.dtype)


def _joined(y: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    return y if residual is None else residual + y


def _normed(x: Tensor, norm: nn.Module | None) -> tuple[Tensor, tuple[Any, Any, float]]:
    """A LayerNorm as the kernels take it; another norm is computed."""
    if isinstance(norm, nn.LayerNorm) and fits(norm) and norm.normalized_shape == x.shape[-1:]:
        return x, (norm.weight, norm.bias, norm.eps)
    return x if norm is None else norm(x), (None, None, 0.0)


def linear(
    x: Tensor,
    layer: Any,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    drop_path: DropPath | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """residual + drop_path(layer(norm(x))): (B, N, C) -> (B, N, C'). `bias` takes the place of the layer's own."""
    x, given = _normed(x, norm)
    shape = (*x.shape[:-1], layer.out_features)
    if x.shape[-1] != layer.in_features or (residual is not None and residual.shape != shape):
        raise RuntimeError(f"{layer} on {tuple(x.shape)}, beside {None if residual is None else tuple(residual.shape)}")
    residual = None if residual is None else _rows(residual)
    bias = layer.bias if bias is None else bias.float().contiguous()
    return _Linear.apply(_rows(x), layer.weight, bias, *given, residual, _factors(drop_path, x))


def applied(layer: Any, x: Tensor) -> Tensor:
    """layer(x) for a linear layer, (B, N, C) -> (B, N, C'), by the kernels where they serve."""
    return linear(x, layer) if x.ndim == 3 and serve(x) and fits(layer) else layer(x)


def _factors(drop_path: DropPath | None, x: Tensor) -> Tensor | None:
    """What the branch of each image is multiplied by: (B,)."""
    if drop_path is None or not drop_path.training or drop_path.rate == 0.0:
        return None
    return drop_path(x.new_ones(x.shape[0], 1, 1, dtype=torch.float32)).flatten()


# ------------------------------------------------------------------------------------------------ feed-forward layers


class _Mlp(torch.autograd.Function):
    """[x +] scale * (act(norm(x) @ weight1^T + bias1) @ weight2^T + bias2)"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        epsilon: float,
        act: int,
        residual: bool,
        scale: Tensor | None,
    ) -> Tensor:
        y = x.new_empty(*x.shape[:-1], weight2.shape[0])
        hidden = x.new_empty(*x.shape[:-1], weight1.shape[0])
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, scale, hidden)
        ctx.given = epsilon, act, residual
        _run("muntin_mlp", _mlp(ctx, ctx.to_save, y), half=x.dtype == torch.bfloat16)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, scale, _ = saved = unpacked(ctx)
        if differentiated(grads[0]):
            given = (x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, *ctx.given, scale)
            return again(_plain_mlp, given, grads[0])
        dy, wanted = grads[0].contiguous(), ctx.needs_input_grad
        dx = torch.empty_like(x) if wanted[0] else None
        parameters = weight1, bias1, weight2, bias2, norm_weight, norm_bias
        parts = [_like(t, w) for t, w in zip(parameters, wanted[1:7], strict=True)]
        for i in (0, 2):
            if parts[i] is None and parts[i + 1] is not None:
                parts[i] = torch.empty_like(parameters[i])
        gradient = _MLP_GRADIENT(*map(pointer, (dy, dx, *parts)), int(ctx.given[2]))
        _run("muntin_mlp_backward", _mlp(ctx, saved, None), gradient, half=x.dtype == torch.bfloat16)
        kept = [part if w else None for part, w in zip(parts, wanted[1:7], strict=True)]
        return dx, *kept, None, None, None, None


def _mlp(ctx: Any, saved: Sequence[Tensor | None], y: Tensor | None) -> Any:
    x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, scale, hidden = saved
    assert x is not None and weight1 is not None and weight2 is not None
    epsilon, act, residual = ctx.given
    tensors = (x, x if residual else None, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, hidden, y)
    sizes = x.shape[-1], weight1.shape[0], weight2.shape[0], act
    return _MLP(*map(pointer, tensors), x.shape[:-1].numel(), x.shape[-2], epsilon, *sizes)


_PLAIN: dict[int, Callable[[Tensor], Tensor]] = {0: lambda x: x, 1: F.relu, 4: F.gelu}


def _plain_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    act: int,
    residual: bool,
    scale: Tensor | None,
) -> Tensor:
    y = x.float()
    if norm_weight is not None:
        y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, epsilon)
    y = F.linear(y, weight1, bias1)
    y = F.linear(_PLAIN[act](y), weight2, bias2)
    return _joined(y, x if residual else None, scale).to(x.dtype)


def mlp(
    x: Tensor,
    layers: Any,
    norm: nn.Module | None = None,
    drop_path: DropPath | None = None,
    residual: bool = True,
) -> Tensor:
    """[x +] drop_path(layers(norm(x))) for an `Mlp`: (B, N, C) -> the same."""
    y, given = _normed(x, norm)
    if (y.shape[-1], layers.fc1.out_features) != (layers.fc1.in_features, layers.fc2.in_features):
        raise RuntimeError(f"{layers.fc1} and {layers.fc2} on {tuple(x.shape)}")
    weights = layers.fc1.weight, layers.fc1.bias, layers.fc2.weight, layers.fc2.bias
    within = residual and y is x and layers.fc2.out_features == x.shape[-1]
    y = _Mlp.apply(_rows(y), *weights, *given, _ACTS[type(layers.act)], within, _factors(drop_path, x))
    return y if within or not residual else x + y


# -------------------------------------------------------------------------------------------------- window attention


class _Window(torch.autograd.Function):
    """softmax(scale q k^T + bias) v in the windows of a grid; with factors (h,) of unit vectors q and k."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, padding: Tensor, factors: Tensor | None, grid: Grid, scale: float
    ) -> Tensor:
        heads, area, _ = bias.shape
        lined = bias if not any(grid.shift) else bias + kind_masks(grid, bias.device)[:, None]
        lined = F.pad(lined.detach(), (0, -area % _lanes()), value=-torch.inf).contiguous()
        y = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        ctx.save_for_backward(qkv, bias, padding, factors, lined)
        ctx.grid, ctx.scale = grid, scale
        _run("muntin_window", _window(ctx, ctx.to_save, y), half=qkv.dtype == torch.bfloat16)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, padding, factors, lined = saved = unpacked(ctx)
        if differentiated(grads[0]):
            return again(_plain_window, (qkv, bias, padding, factors, ctx.grid, ctx.scale), grads[0])
        heads, area, _ = bias.shape
        rows, columns = ctx.grid.counts
        splits = max(1, min(-(-torch.get_num_threads() // heads), len(qkv) * rows * columns))
        dqkv, dy = torch.empty_like(qkv), grads[0].contiguous()
        dbias = bias.new_zeros(splits, heads, area, lined.shape[-1]) if ctx.needs_input_grad[1] else None
        dpadding = padding.new_zeros(splits, len(padding))
        dfactors = None if factors is None else factors.new_zeros(splits, heads)
        gradient = _WINDOW_GRADIENT(*map(pointer, (dy, dqkv, dbias, dpadding, dfactors)), splits)
        _run("muntin_window_backward", _window(ctx, saved, None), gradient,
             half=qkv.dtype == torch.bfloat16)  # fmt: skip
        dbias = None if dbias is None else dbias[..., :area].sum(0)
        return dqkv, dbias, dpadding.sum(0), None if dfactors is None else dfactors.sum(0), None, None


def _window(ctx: Any, saved: Sequence[Tensor | None], y: Tensor | None) -> Any:
    qkv, bias, padding, factors, lined = saved
    assert qkv is not None and bias is not None
    grid, heads = ctx.grid, len(bias)
    tensors = map(pointer, (qkv, lined, padding, factors, y))
    sizes = len(qkv), grid.height, grid.width, heads, qkv.shape[-1] // (3 * heads)
    return _WINDOW(*tensors, ctx.scale, *sizes, *grid.window, *grid.shift)


def _plain_window(
    qkv: Tensor, bias: Tensor, padding: Tensor, factors: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    tokens, real, _ = window_tokens(grid)
    batch, count, _ = qkv.shape
    heads, area, _ = bias.shape
    cut = torch.where(real[..., None], qkv.float()[:, tokens], padding)  # (B, n, A, 3C)
    q, k, v = cut.view(batch, -1, area, 3, heads, cut.shape[-1] // (3 * heads)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    if factors is None:
        q = q * scale
    else:
        q, k = _unit(q) * factors.view(-1, 1, 1), _unit(k)
    logits = q @ k.transpose(-2, -1) + bias
    if any(grid.shift):
        logits = logits + window_masks(grid, bias.device)[:, None]
    mixed = (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)  # (B, n, A, C)
    out = mixed.new_zeros(batch, count, mixed.shape[-1])
    return out.index_copy(1, tokens[real], mixed[:, real]).to(qkv.dtype)


def _unit(x: Tensor) -> Tensor:
    """To unit length; a zero vector stays zero and has no gradient."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, torch.inf)


def window(
    qkv: Tensor, bias: Tensor, padding: Tensor | None, grid: Grid, scale: float = 1.0, factors: Tensor | None = None
) -> Tensor:
    """Attention in windows of a map in raster order: q, k and v side by side (B, N, 3C) -> (B, N, C).

    bias: (h, A, A), without masks. padding: q, k and v of a token beside the map (3C,), zeros by default.
    factors: (h,), by which products of unit vectors are multiplied, as in SwinV2; otherwise `scale` is.
    """
    width = qkv.shape[-1]
    padding = bias.new_zeros(width) if padding is None else padding
    if len(padding) != width or width % (3 * len(bias)) or bias.shape[1:] != (grid.area, grid.area):
        raise RuntimeError(f"q, k and v of {width} channels, biases {tuple(bias.shape)}, windows of {grid.area} tokens")
    if factors is not None:
        factors = factors.float().contiguous()
    return _Window.apply(_rows(qkv), bias.float(), padding.float().contiguous(), factors, grid, scale)
