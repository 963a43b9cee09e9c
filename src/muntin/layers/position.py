"""Relative position bias (Swin, arXiv 2103.14030, section 3.2) and the mask of shifted windows.

Legend: h heads, A = w_h * w_w tokens of a window, S table side in windows (the configured window).
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MASKED = -100.0
"""What the authors add to the logit of two tokens that were not neighbours before the cyclic shift."""


def relative_index(
    height: int, width: int, window: int | tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Rows of a bias table made for `window`, for each pair of tokens of a height x width window: (A * A,).

    The table has one row per offset, (2 * window - 1) squared of them for a square window, row-major over
    (dy, dx). A smaller window reads the table's centre.
    """
    rows, columns = (window, window) if isinstance(window, int) else window
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    dy = y[:, None] - y[None, :] + (rows - 1)  # (w_h, w_h)
    dx = x[:, None] - x[None, :] + (columns - 1)  # (w_w, w_w)
    index = dy[:, None, :, None] * (2 * columns - 1) + dx[None, :, None, :]  # (w_h, w_w, w_h, w_w)
    return index.reshape(-1)


@contextmanager
def constants() -> Iterator[None]:
    """Where tensors that outlive the call are made: outside inference mode, or a later training step raises; on
    the CPU and without modes, or a meta or fake tensor stays in a cache, and the switches of gradients in a graph.
    """
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


@lru_cache(maxsize=64)
def constant_relative_index(height: int, width: int, window: int | tuple[int, int], device: torch.device) -> Tensor:
    """`relative_index` for sizes that are integers, made once."""
    with constants():
        return relative_index(height, width, window).to(device)


def bias_matrix(table: Tensor, index: Tensor, area: int) -> Tensor:
    """(S', h) table and (A * A,) index -> (h, A, A). Differentiable in the table."""
    # embedding's backward is parallel on the CPU, that of an index_select runs row by row
    return F.embedding(index, table).t().reshape(-1, area, area)


def separation_mask(labels: Tensor) -> Tensor:
    """(..., A) region labels -> (..., A, A): 0 within a region, -100 across."""
    apart = labels[..., :, None] != labels[..., None, :]
    return torch.zeros_like(apart, dtype=torch.float32).masked_fill_(apart, MASKED)


class BiasCache:
    """Position biases of one attention layer, kept while what they were made from is the same.

    That is a table, or the several weights that make it. Comparing values costs microseconds on a CPU; a version
    counter would miss edits through `.data`. On other devices a comparison would wait for the device, so nothing
    is kept there unless the table is `frozen`, which promises that it never changes again.
    """

    def __init__(self, frozen: bool = False) -> None:
        self.frozen = frozen
        self.entries: dict[Hashable, Tensor] = {}
        self.tables: tuple[Tensor, ...] = ()

    def get(self, key: Hashable, table: Tensor | tuple[Tensor, ...]) -> Tensor | None:
        if not self.frozen and not self._unchanged(_several(table)):
            self.entries.clear()
        return self.entries.get(key)

    def put(self, key: Hashable, table: Tensor | tuple[Tensor, ...], bias: Tensor) -> None:
        if len(self.entries) >= 8:
            self.entries.clear()
        if not self.entries:
            self.tables = tuple(tensor.detach().clone() for tensor in _several(table))
        self.entries[key] = bias

    def _unchanged(self, tables: tuple[Tensor, ...]) -> bool:
        if len(tables) != len(self.tables):
            return False
        return all(
            now.device.type == "cpu" and kept.dtype == now.dtype and torch.equal(kept, now)
            for kept, now in zip(self.tables, tables, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "BiasCache":
        return BiasCache(self.frozen)

    def __reduce__(self) -> tuple[type["BiasCache"], tuple[bool]]:
        return BiasCache, (self.frozen,)


def _several(table: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (table,) if isinstance(table, Tensor) else table
