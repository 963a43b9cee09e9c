"""Times of calls: the clock, the warm-up, turns taken by all in every round, and what is made of them.

B batch, H W image
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muntin.measure.energy import Meter
from muntin.measure.statistics import median_interval, percentile

WARMUP_CALLS = 3  # the last so many calls must agree ...
WARMUP_SPREAD = 0.05  # ... within this share of their median
WARMUP_SECONDS = 5.0  # or this much time has passed

Call = Callable[[Tensor], Any]


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """So many CPU threads for torch within, and for every engine that is opened within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(call: Call, images: Tensor) -> tuple[float, Any]:
    """Seconds of one call and its result: the wall clock on a CPU; on a GPU a pair of events around the call, which
    also see the gaps in which the GPU waits for the next launch.
    """
    if not images.is_cuda:
        start = time.perf_counter()
        with torch.inference_mode():
            result = call(images)
        return time.perf_counter() - start, result
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(images.device)
    before.record()
    with torch.inference_mode():
        result = call(images)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000, result


@dataclass
class Series:
    """What was measured of one call: seconds by round and call, and joules per image by round where they are known."""

    images: int
    warmup_calls: int = 0
    stable: bool = True
    visits: list[list[float]] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def medians(self) -> list[float]:
        """Milliseconds, by round."""
        return [1000 * statistics.median(visit) for visit in self.visits]


def warm_up(call: Call, images: Tensor) -> tuple[list[float], bool]:
    """Call until times agree or the time is up; the times, and whether they agreed."""
    times: list[float] = []
    start = time.perf_counter()
    while True:
        times.append(timed(call, images)[0])
        last = times[-WARMUP_CALLS:]
        agree = max(last) - min(last) <= WARMUP_SPREAD * statistics.median(last)
        if len(times) > WARMUP_CALLS and agree:
            return times, True
        if len(times) > WARMUP_CALLS and time.perf_counter() - start > WARMUP_SECONDS:
            return times, False


def interleaved(
    calls: Sequence[tuple[Call, Tensor]],
    rounds: int,
    seconds: float,
    order: random.Random,
    meter: Meter | None = None,
    tick: Callable[[int], object] = lambda turn: None,
) -> list[Series]:
    """Warm every call up, then let them take turns: in each round all of them, in an order shuffled per round, so
    that a machine that slows down slows all of them. `tick` is told whose turn is over.
    """
    found, counts = [], []
    for turn, (call, images) in enumerate(calls):
        times, stable = warm_up(call, images)
        found.append(Series(len(images), len(times), stable))
        counts.append(max(1, round(seconds / rounds / statistics.median(times[-WARMUP_CALLS:]))))
        tick(turn)
    for _ in range(rounds):
        turns = list(range(len(calls)))
        order.shuffle(turns)
        for turn in turns:
            call, images = calls[turn]
            timed(call, images)  # brings its weights back into the caches, untimed
            before = meter.joules() if meter else 0.0
            visit = [timed(call, images)[0] for _ in range(counts[turn])]
            if meter and sum(visit) >= meter.least:
                found[turn].joules.append((meter.joules() - before) / (len(visit) * len(images)))
            found[turn].visits.append(visit)
            tick(turn)
    return found


def figures(series: Series, base: Series) -> dict[str, Any]:
    """A row's figures, by the names of its fields; speeds against `base`, round by round."""
    every = [1000 * t for visit in series.visits for t in visit]
    medians = series.medians()
    speeds = [b / m for b, m in zip(base.medians(), medians, strict=True)]
    median = statistics.median(every)
    return {
        "median_ms": median,
        "p90_ms": percentile(every, 0.90),
        "p99_ms": percentile(every, 0.99),
        "iqr_ms": percentile(every, 0.75) - percentile(every, 0.25),
        "interval_ms": median_interval(medians),
        "round_ms": medians,
        "throughput": 1000 * series.images / median,
        "speed": statistics.median(speeds),
        "speed_interval": median_interval(speeds),
        "calls": len(every),
        "warmup_calls": series.warmup_calls,
        "stable": series.stable,
        "energy_j": statistics.median(series.joules) if series.joules else None,
    }
