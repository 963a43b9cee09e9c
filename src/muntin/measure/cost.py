"""What a forward pass costs, counted and not timed: parameters, multiply-accumulates, bytes.

Counted at the level of aten operators, so that any model and any form of its forward (fused attention or
explicit products) is counted alike, and on the meta device without computing anything.

B batch, N tokens, C channels, h heads, w window
"""

import argparse
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.errors import UserError
from muntin.run import atomic_write

MODELS = Path(__file__).parent.parent / "models"


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


def _linear_pointwise(x: Tensor, weight: Tensor, *_: Any, out: Tensor) -> int:
    return out.numel() * x.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


# Rules that read the output's shape take it as `out`.
RULES: dict[str, Callable[..., int]] = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::bmm": _bmm,
    "aten::baddbmm": _baddbmm,
    "aten::convolution": _convolution,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn::_convolution_pointwise": _conv_pointwise,
    "mkldnn::_linear_pointwise": _linear_pointwise,
}
READS_OUTPUT = {"aten::convolution", "mkldnn::_convolution_pointwise", "mkldnn::_linear_pointwise"}


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


class OperatorCounter(TorchDispatchMode):
    """Adds up multiply-accumulates and bytes of the aten operators that run inside it, by operator name."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

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
        out = func(*args, **kwargs)
        self.calls[name] += 1
        if name in RULES:
            extra = {"out": _tensors(out)[0]} if name in READS_OUTPUT else {}
            self.macs[name] += RULES[name](*args, **extra)
        if not _is_view(func):
            self.bytes[name] += sum(_bytes(t) for t in _tensors([args, kwargs, out]))
        return out


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    `parameters` are learnable; `exported_parameters` counts each bias table as the h x w^2 x w^2 matrix that
    stands as a constant in a graph exported for one size, which is how the Swin-Free paper (table 6) counts.
    `macs` are multiply-accumulates of matrix products and convolutions, attention's two products included.
    `bytes_moved` sums the inputs and outputs of each operator that is not a view: what would cross the memory
    bus if no operator found its input in a cache.
    """

    parameters: int
    exported_parameters: int
    macs: int
    bytes_moved: int
    height: int
    width: int

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} learnable parameters "
            f"({self.exported_parameters:,} with bias matrices as constants), "
            f"{self.gmacs:.3f} GMACs and {self.bytes_moved / 1e6:.1f} MB moved at {self.height}x{self.width}"
        )


def _exported_parameters(model: nn.Module) -> int:
    total = sum(p.numel() for p in model.parameters())
    module: Any
    for module in model.modules():
        if hasattr(module, "bias_table"):  # (offsets, h) becomes (h, w^2, w^2)
            total += module.window**4 * module.bias_table.shape[1] - module.bias_table.numel()
    return total


def cost(model: nn.Module, size: int | tuple[int, int] = 224) -> Cost:
    """Count parameters, multiply-accumulates and bytes of one image.

    model: anything that takes a (1, 3, H, W) image; counted in evaluation mode and left as it was. Where its
        parameters are on the meta device nothing is computed.
    size: side or (height, width) of the image in pixels.
    Raises UserError for a size that is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size {height}x{width}: give a height and width of at least 1 pixel")
    first = next(model.parameters(), torch.empty(0))
    dtype = first.dtype if first.dtype.is_floating_point else torch.float32
    image = torch.zeros(1, 3, height, width, device=first.device, dtype=dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), OperatorCounter() as counter:
            model(image)
    finally:
        for module, training in modes.items():
            module.training = training
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        exported_parameters=_exported_parameters(model),
        macs=counter.macs.total(),
        bytes_moved=counter.bytes.total(),
        height=height,
        width=width,
    )


STATED = ("parameters", "gmacs", "exported", "folded", "paper")


def table(published: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each listed variant: its cost at its input size, and what is published about it.

    published: by name, `size` in pixels, and what is stated elsewhere, which stays as it is (a figure that is known
    in part is text): `parameters`, `gmacs`, `exported`, `folded`, `paper`, `top1` and `source`.
    """
    import muntin
    from muntin.runtime import fold

    rows = []
    for name in muntin.list_models():
        known = published.get(name, {})
        with torch.device("meta"):
            model = muntin.create_model(name)
        size = known.get("size", 224)
        found = cost(model, size)
        rows.append(
            {
                "name": name,
                "family": type(model.config).__module__.rpartition(".")[2],
                "parameters": found.parameters,
                "exported_parameters": found.exported_parameters,
                "folded_parameters": sum(p.numel() for p in fold(model).parameters()),
                "gmacs": round(found.gmacs, 4),
                "size": size,
                "stated": {key: known[key] for key in STATED if key in known},
                "top1": known.get("top1"),
                "source": known.get("source"),
            }
        )
    return rows


def table_text() -> str:
    """The contents of models/table.json, from the code and models/published.toml."""
    published = tomllib.loads((MODELS / "published.toml").read_text(encoding="utf-8"))
    return json.dumps(table(published), indent=1) + "\n"


def main() -> None:
    """`python -m muntin.measure.cost --write-table`."""
    parser = argparse.ArgumentParser(description="count what the listed models cost")
    parser.add_argument("--write-table", action="store_true", help="write models/table.json (otherwise print it)")
    arguments = parser.parse_args()
    text = table_text()
    if arguments.write_table:
        atomic_write(MODELS / "table.json", text.encode())
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
