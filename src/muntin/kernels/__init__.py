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

_TRITON = find_spec("triton") is not None
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


def _supported(device: torch.device) -> bool:
    """What the kernels need: Triton, and compute capability 8.0 or later."""
    return _TRITON and torch.cuda.get_device_properties(device).major >= 8


_supported_once = lru_cache(_supported)


def serve(x: Tensor) -> bool:
    """Whether operators compute attention for this input. An exported graph has none of them."""
    if _choice is False or torch.compiler.is_exporting():
        return False
    if _choice:
        return True
    if not x.is_cuda or x.dtype not in _DTYPES:
        return False
    # The compiler folds the properties of a device into a constant, but does not look into caches.
    return _supported(x.device) if torch.compiler.is_compiling() else _supported_once(x.device)
