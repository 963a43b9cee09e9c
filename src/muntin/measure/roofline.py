"""What this machine could do at best, measured: products per second and bytes per second; and what follows for a pass.

An operation cannot take less than its FLOPs at the machine's best rate of products, nor less than its bytes at the
bandwidth of a working set of that size: the roofline. Its time up to the larger of the two counts as bound by
computing or by memory; its time beyond is overhead, such as small operators, launching, Python, or a slow
implementation.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from muntin.measure.capture import Piece
from muntin.measure.kinds import PRODUCTS, UNATTRIBUTED

SIDES = ((1024, 1024, 1024), (2048, 512, 2048), (3136, 384, 384))
"""Rows, inner side and columns of the products that are tried."""
SETS = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
"""Bytes of the working sets that may lie in a cache."""
REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """The best of this machine in one precision, with the threads that the model has.

    gflops: of matrix products, the best of several shapes and of PyTorch's own product and oneDNN's packed one, each
        the median of several. gbps: of memory, the best of copy and triad over a set well beyond the last cache.
    cached: bytes of a working set and the bandwidth measured over it, the smallest first.
    """

    gflops: float
    gbps: float
    cached: tuple[tuple[int, float], ...]
    precision: str
    threads: int
    device: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte of memory above which computing is the bound."""
        return self.gflops / self.gbps

    def bandwidth(self, moved: int) -> float:
        """GB/s for an operation that moves so many bytes: that of the smallest measured set that holds them."""
        return next((rate for size, rate in self.cached if moved <= size), self.gbps)

    def compute_ms(self, flops: int) -> float:
        """Milliseconds of these FLOPs at the best rate."""
        return flops / self.gflops / 1e6

    def memory_ms(self, moved: int) -> float:
        """Milliseconds of these bytes at the bandwidth for so many."""
        return moved / self.bandwidth(moved) / 1e6

    def floor_ms(self, flops: int, moved: int) -> float:
        """The least that an operation can take."""
        return max(self.compute_ms(flops), self.memory_ms(moved))


@dataclass(frozen=True)
class Bounds:
    """One pass against the roofline. The first four are milliseconds and add up to the wall time.

    compute, memory: time of operations up to their bound, by which of the two it is. overhead: time of operations
    beyond their bound. outside: time in no operation (Python, launching, an idle device).
    floor_ms: the sum of the bounds of products (matrix products, convolutions, attention) alone: what remains if all
    else were free.
    """

    compute: float
    memory: float
    overhead: float
    outside: float
    floor_ms: float

    @property
    def wall_ms(self) -> float:
        return self.compute + self.memory + self.overhead + self.outside


def bounds(pieces: Sequence[Piece], wall_ms: float, peaks: Peaks) -> Bounds:
    """What bounds a pass of these pieces."""
    compute = memory = overhead = floor = 0.0
    for piece in pieces:
        if piece.kind == UNATTRIBUTED:
            continue
        by_flops, by_bytes = peaks.compute_ms(piece.flops), peaks.memory_ms(piece.bytes)
        explained = min(piece.ms, max(by_flops, by_bytes))
        if by_flops > by_bytes:
            compute += explained
        else:
            memory += explained
        overhead += piece.ms - explained
        if piece.kind in PRODUCTS:
            floor += max(by_flops, by_bytes)
    return Bounds(compute, memory, overhead, max(wall_ms - compute - memory - overhead, 0.0), floor)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of several calls, of which the first do not count."""
    times = []
    for _ in range(REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def last_cache() -> int:
    """Bytes of the largest cache, by what Linux says of the first core; 64 MB where it says nothing."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=64 << 20)


def _gflops(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for rows, inner, columns in SIDES:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        works: list[Callable[[], object]] = [lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out)]  # type: ignore[misc]
        packed = _packed(b) if device.type == "cpu" else None
        if packed is not None:
            product = torch.ops.mkldnn._linear_pointwise
            works.append(lambda a=a, p=packed, f=product: f(a, p, None, "none", [], ""))  # type: ignore[misc]
        best = max([best, *(2 * rows * inner * columns / _seconds(work, device) / 1e9 for work in works)])
    return best


def _packed(weight: Tensor) -> Tensor | None:
    """A weight in oneDNN's own layout, or None where this build has none for it."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        torch.ops.mkldnn._linear_pointwise(weight[:2], packed, None, "none", [], "")
        return packed
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _gbps(size: int, device: torch.device) -> float:
    """Over a working set of so many bytes: the best of a copy, which reads one half and writes the other, and a triad,
    which reads two thirds."""
    half, third = size // 8, size // 12
    a, b = torch.ones(half, device=device), torch.empty(half, device=device)
    x, y, z = (torch.ones(third, device=device) for _ in range(3))
    copied = 8 * half / _seconds(lambda: b.copy_(a), device)
    triad = 12 * third / _seconds(lambda: torch.add(x, y, alpha=1.5, out=z), device)
    return max(copied, triad) / 1e9


@lru_cache(maxsize=16)
def _measured(dtype: torch.dtype, device: torch.device, threads: int) -> Peaks:
    with torch.inference_mode():
        cache = last_cache() if device.type == "cpu" else 64 << 20
        beyond = max(256 << 20, 4 * cache)
        rates = {size: _gbps(size, device) for size in (*(s for s in SETS if s <= cache), beyond)}
        gbps = rates.pop(beyond)
        cached = tuple((size, max(rate, gbps)) for size, rate in rates.items())
        return Peaks(_gflops(dtype, device), gbps, cached, str(dtype).removeprefix("torch."), threads, str(device))


def peaks(dtype: torch.dtype, device: torch.device) -> Peaks:
    """This machine's best, measured once in a process for a precision, a device and a number of threads."""
    return _measured(dtype, device, torch.get_num_threads())
