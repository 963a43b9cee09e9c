"""Triton kernels for attention in windows and along lines, picked by the models themselves on CUDA.

Each is a PyTorch operator with a fake implementation and gradients, and computes the same by PyTorch on other devices.
`use(False)`, or MUNTIN_KERNELS=0 in the environment, leaves them out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_choice: bool | None = False if os.environ.get("MUNTIN_KERNELS") == "0" else None


@contextmanager
def use(choice: bool | None) -> Iterator[None]:
    """Within the block, and in all threads: False never uses the operators, True uses them on every device, None where
    they are kernels.
    """
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this machine has what the kernels need: Triton, and a CUDA device of compute capability 8.0 or later."""
    return _available()


@lru_cache
def _available() -> bool:
    return (
        find_spec("triton") is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    )


def serve(x: Tensor) -> bool:
    """Whether operators compute attention for this input. An exported graph has none of them."""
    if _choice is False or torch.compiler.is_exporting():
        return False
    if _choice:
        return True
    return x.is_cuda and x.dtype in _DTYPES and available()
