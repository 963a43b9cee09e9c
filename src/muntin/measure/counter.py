"""Counting at the level of aten operators: multiply-accumulates, bytes moved, and the memory that is held.

Any model and any form of its forward (fused attention or explicit products) is counted alike, and on the meta device
nothing is computed.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.layers.opaque import run_stage
from muntin.native.program import program as native_program


def _mm(a: Tensor, b: Tensor, *_: Any) -> int:
    return a.shape[0] * a.shape[1] * b.shape[1]


def _addmm(_bias: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor, *_: Any) -> int:
    return a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


def _baddbmm(_bias: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    return _bmm(a, b)


def _convolution(x: Tensor, weight: Tensor, _bias: Any, _stride: Any, _pad: Any, _dilation: Any,
                 transposed: bool, *_: Any, out: Tensor) -> int:  # fmt: skip
    positions = x if transposed else out  # a transposed convolution multiplies at each position of its input
    return math.prod(positions.shape[2:]) * positions.shape[0] * weight.numel()


def _conv_pointwise(x: Tensor, *rest: Any, out: Tensor) -> int:
    fused_addition = isinstance(rest[1], Tensor) and rest[1].ndim == x.ndim  # (x, other, weight, ...)
    weight = rest[1] if fused_addition else rest[0]
    return out.shape[0] * math.prod(out.shape[2:]) * weight.numel()


def _opaque_convolution(x: Tensor, weight: Tensor, *_: Any, out: Tensor) -> int:
    channels_last = out.ndim == 3  # tokens (B, N, C), otherwise a map (B, C, H, W)
    return out.numel() // out.shape[2 if channels_last else 1] * weight.numel()


def _linear_pointwise(x: Tensor, weight: Tensor, *_: Any, out: Tensor) -> int:
    return out.numel() * x.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


LINEAR, ATTENTION, CONVOLUTION = KINDS = ("linear", "attention", "convolution")

# Rules that read the output's shape take it as `out`. A product counts as linear where one side depends on weights
# alone, otherwise as attention, whatever its operator: einsum becomes bmm.
RULES: dict[str, Callable[..., int]] = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::bmm": _bmm,
    "aten::baddbmm": _baddbmm,
    "aten::convolution": _convolution,
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn::_convolution_pointwise": _conv_pointwise,
    "mkldnn::_linear_pointwise": _linear_pointwise,
    "muntin::convolution": _opaque_convolution,  # our own operators, in compiled code
    "muntin::token_convolution": _opaque_convolution,
    "muntin::packed_convolution": _opaque_convolution,
    "muntin::packed_linear": _linear_pointwise,
}
PROGRAM = "muntin::program"  # several layers in one: its own rule
READS_OUTPUT = {"aten::convolution", "mkldnn::_convolution_pointwise", "mkldnn::_linear_pointwise"}
READS_OUTPUT |= {name for name in RULES if name.startswith("muntin::")}
FACTORS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(t: Tensor) -> int:
    """Bytes behind a tensor; what `expand` repeats is in memory once."""
    held = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return held * t.element_size()


def _is_view(op: torch._ops.OpOverload) -> bool:
    returns = op._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return op is torch.ops.aten._unsafe_view.default or any(not a.is_write for a in aliases)


def _storage(t: Tensor) -> torch.UntypedStorage | None:
    """What holds a tensor's values; None for packed weights, which have none to show."""
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class Held:
    """Bytes of the storages that depend on the input and are alive, now and at most.

    A storage counts from the operator that first writes something of the input into it until it is freed; views
    share theirs. What is made from weights alone (bias matrices, masks, indices) does not count: it is kept
    from one call to the next.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def add(self, t: Tensor) -> None:
        storage = _storage(t)
        if storage is None or storage._cdata in self._alive:
            return
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __contains__(self, t: Tensor) -> bool:
        storage = _storage(t)
        return storage is not None and storage._cdata in self._alive


class OperatorCounter(TorchDispatchMode):
    """Adds up multiply-accumulates and bytes of the aten operators that run inside it.

    `macs`, `bytes` and `calls` are by operator name, `kinds` holds the multiply-accumulates by kind (KINDS), `held`
    what depends on `inputs`, the tensors that the model is given.
    """

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.held = Held()
        for tensor in inputs:
            self.held.add(tensor)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in RULES and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # in inference mode composite operators (linear, matmul, conv2d, ...) arrive whole
            with self:
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        if name == "muntin::stage":
            with self:
                return run_stage(*args, **kwargs)
        out = func(*args, **kwargs)
        self._count(func, name, args, kwargs, out)
        return out

    def _count(
        self, func: torch._ops.OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        given, made = _tensors([args, kwargs]), _tensors(out)
        self.calls[name] += 1
        if name == PROGRAM:
            program = native_program(args[1])
            kinds = program.macs(args[0].shape[0], *args[0].shape[2:])
            self.kinds.update(kinds)
            self.macs[name] += kinds.total()
            self.bytes[name] += sum(map(_bytes, program.weights()))
        elif name in RULES:
            macs = RULES[name](*args, **({"out": made[0]} if name in READS_OUTPUT else {}))
            self.macs[name] += macs
            self.kinds[self._kind(name, args)] += macs
        if not _is_view(func):
            self.bytes[name] += sum(map(_bytes, [*given, *made]))
        if any(t in self.held for t in given):
            for t in made:  # what is written in place is returned too
                self.held.add(t)

    def _kind(self, name: str, args: tuple[Any, ...]) -> str:
        if name in FACTORS:
            return ATTENTION if all(args[place] in self.held for place in FACTORS[name]) else LINEAR
        if "attention" in name:
            return ATTENTION
        return LINEAR if "linear" in name else CONVOLUTION
