"""The operations of a Core ML program, computed by PyTorch: what a file holds, checked where Core ML does not run.

Weights are those of the file, each result is rounded to the number format that the file gives it. It says whether the
conversion kept the model and whether half precision holds its values, not what Apple's runtime makes of it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = dict[str, Any]


class Unknown(NotImplementedError):
    """An operation that is not computed here."""


def evaluate(program: Any, image: Tensor) -> list[Tensor]:
    """The outputs of a program (coremltools' form of it) for its one input. Raises Unknown."""
    function = program.functions["main"]
    values: dict[Any, Any] = dict.fromkeys(function.inputs.values(), image.float())

    def read(given: Any) -> Any:
        if isinstance(given, (tuple, list)):
            return [read(part) for part in given]
        return values[given] if given in values else _constant(given.val)

    for op in function.operations:
        if op.op_type == "const":
            continue
        compute = OPERATIONS.get(op.op_type)
        if compute is None:
            raise Unknown(op.op_type)
        results = compute({name: read(given) for name, given in op.inputs.items() if given is not None})
        results = results if isinstance(results, (tuple, list)) else [results]
        for output, result in zip(op.outputs, results, strict=True):
            values[output] = result.half().float() if _is_half(output) else result
    return [values[output] for output in function.outputs]


def _is_half(output: Any) -> bool:
    return output.dtype.__name__ == "fp16"


def _constant(value: Any) -> Any:
    """Arrays as tensors, half precision widened; scalars and text as they are."""
    if getattr(value, "shape", ()) == ():
        return value.item() if hasattr(value, "item") else value
    tensor = torch.from_numpy(value.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


def _whole(values: Any) -> list[int]:
    """Sizes or axes as plain integers."""
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]


def _both(function: Callable[[Any, Any], Any]) -> Callable[[Arguments], Any]:
    def compute(a: Arguments) -> Any:
        return function(torch.as_tensor(a["x"]), torch.as_tensor(a["y"]))

    return compute


def _one(function: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Any]:
    return lambda a: function(a["x"])


def _reduce(function: Callable[..., Tensor]) -> Callable[[Arguments], Any]:
    return lambda a: function(a["x"], dim=tuple(_whole(a["axes"])), keepdim=bool(a.get("keep_dims", False)))


def _conv(a: Arguments) -> Tensor:
    x, weight = a["x"], a["weight"]
    sides = weight.ndim - 2
    stride, dilation = _whole(a.get("strides", [1] * sides)), _whole(a.get("dilations", [1] * sides))
    if a.get("pad_type", "valid") == "custom":
        x = F.pad(x, _innermost_first(_whole(a["pad"])))
    elif a.get("pad_type", "valid") != "valid":
        raise Unknown(f"conv with {a['pad_type']} padding")
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[sides]
    return convolution(x, weight, a.get("bias"), stride, 0, dilation, int(a.get("groups", 1)))


def _innermost_first(pad: list[int]) -> list[int]:
    """(begin, end) of each axis, outermost first -> as F.pad takes them."""
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    return [side for pair in reversed(pairs) for side in pair]


def _pad(a: Arguments) -> Tensor:
    if a.get("mode", "constant") != "constant":
        raise Unknown(f"pad by {a['mode']}")
    return F.pad(a["x"], _innermost_first(_whole(a["pad"])), value=float(a.get("constant_val", 0.0)))


def _matmul(a: Arguments) -> Tensor:
    x, y = a["x"], a["y"]
    x = x.transpose(-1, -2) if a.get("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if a.get("transpose_y", False) else y)


def _gelu(a: Arguments) -> Tensor:
    if a.get("mode", "EXACT") not in ("EXACT", "TANH_APPROXIMATION"):
        raise Unknown(f"gelu by {a['mode']}")
    return F.gelu(a["x"], approximate="none" if a.get("mode", "EXACT") == "EXACT" else "tanh")


def _layer_norm(a: Arguments) -> Tensor:
    x, axes = a["x"], tuple(_whole(a["axes"]))
    x = (x - x.mean(axes, True)) * torch.rsqrt(x.var(axes, False, keepdim=True) + a.get("epsilon", 1e-5))
    return x * a.get("gamma", 1.0) + a.get("beta", 0.0)


def _batch_norm(a: Arguments) -> Tensor:
    return F.batch_norm(
        a["x"], a["mean"], a["variance"], a.get("gamma"), a.get("beta"), eps=float(a.get("epsilon", 1e-5))
    )


def _split(a: Arguments) -> list[Tensor]:
    x, axis = a["x"], int(a["axis"])
    if "split_sizes" in a:
        return list(x.split(_whole(a["split_sizes"]), axis))
    return list(x.split(x.shape[axis] // int(a["num_splits"]), axis))


def _gather(a: Arguments) -> Tensor:
    x, indices, axis = a["x"], torch.as_tensor(a["indices"]).long(), int(a.get("axis", 0))
    if int(a.get("batch_dims", 0)):
        raise Unknown("gather with batch_dims")
    found = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis:][1:])


def _slice(a: Arguments) -> Tensor:
    x = a["x"]
    masks = {key: _whole(a[key]) if key in a else [0] * x.ndim for key in ("begin_mask", "end_mask", "squeeze_mask")}
    begin, end = _whole(a["begin"]), _whole(a["end"])
    stride = _whole(a["stride"]) if "stride" in a else [1] * x.ndim
    if min(stride) < 1:
        raise Unknown("slice_by_index backwards")
    picks: list[Any] = []
    for axis in range(x.ndim):
        if masks["squeeze_mask"][axis]:
            picks.append(begin[axis])
            continue
        first = None if masks["begin_mask"][axis] else begin[axis]
        picks.append(slice(first, None if masks["end_mask"][axis] else end[axis], stride[axis]))
    return x[tuple(picks)]


def _concat(a: Arguments) -> Tensor:
    if a.get("interleave", False):
        raise Unknown("concat that interleaves")
    return torch.cat(list(a["values"]), int(a["axis"]))


def _reshape(a: Arguments) -> Tensor:
    shape = [a["x"].shape[i] if side == 0 else side for i, side in enumerate(_whole(a["shape"]))]
    return a["x"].reshape(shape)


def _squeeze(a: Arguments) -> Tensor:
    return a["x"].squeeze(tuple(_whole(a["axes"]))) if "axes" in a else a["x"].squeeze()


def _expand(a: Arguments) -> Tensor:
    x = a["x"]
    for axis in sorted(axis % (x.ndim + len(a["axes"])) for axis in _whole(a["axes"])):
        x = x.unsqueeze(axis)
    return x


def _cast(a: Arguments) -> Tensor:
    kinds = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
    if a["dtype"] not in kinds:
        raise Unknown(f"cast to {a['dtype']}")
    return a["x"].to(kinds[a["dtype"]])


OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "add": _both(operator.add),
    "batch_norm": _batch_norm,
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "expand_dims": _expand,
    "exp": _one(torch.exp),
    "gather": _gather,
    "gelu": _gelu,
    "identity": _one(lambda x: x),
    "layer_norm": _layer_norm,
    "less_equal": _both(operator.le),
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": _matmul,
    "maximum": _both(torch.maximum),
    "minimum": _both(torch.minimum),
    "mul": _both(operator.mul),
    "pad": _pad,
    "real_div": _both(operator.truediv),
    "reduce_l2_norm": _reduce(torch.linalg.vector_norm),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "relu": _one(torch.relu),
    "reshape": _reshape,
    "select": lambda a: torch.where(a["cond"], torch.as_tensor(a["a"]), torch.as_tensor(a["b"])),
    "sigmoid": _one(torch.sigmoid),
    "silu": _one(F.silu),
    "slice_by_index": _slice,
    "softmax": lambda a: a["x"].softmax(int(a.get("axis", -1))),
    "split": _split,
    "squeeze": _squeeze,
    "sub": _both(operator.sub),
    "tanh": _one(torch.tanh),
    "transpose": lambda a: a["x"].permute(_whole(a["perm"])),
}
