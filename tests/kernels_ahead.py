"""Compiles every kernel for GPUs that this machine need not have, and prints what each takes: a line of JSON.

python tests/kernels_ahead.py 80 90      # compute capabilities
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from muntin.kernels import cascade, manhattan, window
from muntin.kernels.tiles import WARPS

POINTERS = {"lse", "slopes", "grad_bias", "grad_padding"}  # to float32; `sides` to int64; others to the inputs' dtype
INPUTS = {"qkv", "table", "padding", "out", "grad", "grad_qkv", "qk", "v", "grad_qk", "grad_v", "x", "qkv_bias", "taps",
          "tap_bias"}  # fmt: skip
FLOATS = {"scale", "fall"}


def cases() -> list[tuple[Any, dict[str, Any]]]:
    """Kernels and their constants, for windows and lines of one tile and of several."""
    found: list[tuple[Any, dict[str, Any]]] = []
    common: dict[str, Any] = {"PRECISION": "tf32x3", "D": 32, "BLOCK_D": 32}
    for single in (True, False):
        shifted = {**common, "SINGLE": single, "PADDED": True, "SHIFTED": True}
        found += [(window._forward, shifted), (window._backward_keys, shifted)]
    found.append((window._backward_queries, {**common, "PADDED": True, "SHIFTED": True}))
    for lines in (manhattan.WHOLE, manhattan.COLUMNS):
        along = {**common, "LINES": lines}
        found += [(manhattan._forward, along), (manhattan._backward_queries, along)]
        found.append((manhattan._backward_keys, {**along, "SINGLE": lines != manhattan.WHOLE}))
    heads = {"CASCADE": True, "HEADS": 3, "G": 64, "BLOCK_G": 64, "K": 16, "BLOCK_K": 16, "SIDE": 7}
    found.append((cascade._forward, {"PRECISION": "tf32x3", **heads}))
    return found


def compiled(kernel: Any, constants: dict[str, Any], dtype: str, capability: int) -> dict[str, Any]:
    constants = constants | {"BLOCK": 64 if dtype == "bf16" or kernel is cascade._forward else 32}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS or name in INPUTS or name == "sides":
            signature[name] = "*fp32" if name in POINTERS else "*i64" if name == "sides" else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    warps = WARPS["forward" if kernel in (window._forward, manhattan._forward) else "backward"]
    made = triton.compile(
        ASTSource(kernel, signature, constexprs={n: constants[n] for n in kernel.arg_names if n in constants}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
    return {"kernel": name, "dtype": dtype, "capability": capability, "shared": made.metadata.shared}


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for kernel, constants in cases():
            for dtype in ("bf16", "fp32"):
                print(json.dumps(compiled(kernel, constants, dtype, capability)), flush=True)
