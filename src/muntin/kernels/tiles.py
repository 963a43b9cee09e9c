"""Sizes of the tiles that kernels work on, and the precision of their products."""

import torch
import triton
from torch import Tensor

LEAST, MOST = 16, 64
"""Rows of a tile: a tensor core takes no fewer than 16, and scores of 64 x 64 stay in registers."""
WARPS = {"forward": 4, "backward": 8}
"""Of a program; a backward pass holds twice as many tiles."""


def tile(rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile for sequences of this length. Larger ones of float32 do not fit every GPU's shared memory."""
    most = MOST // 2 if dtype == torch.float32 else MOST
    return min(most, max(LEAST, triton.next_power_of_2(rows)))


def channels_block(channels: int) -> int:
    """Channels of a tile: a power of two, with the least that a product takes."""
    return max(LEAST, triton.next_power_of_2(channels))


def precision(x: Tensor) -> str:
    """How tensor cores compute products of float32: in one pass where PyTorch is told so, else in three, which come
    to float32's precision."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
