"""What ran in one forward pass, by engine: each capture times a pass and says of each piece what it was."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Piece:
    """A stretch of one pass: an operator, or a kernel that fuses several.

    kind and group are those of `kinds`. `ms` is its own time; the interval from `start_ms`, `span_ms` long, holds what
    it calls too. `flops` are those of products (two for each multiply-accumulate), `bytes` the operands read and
    the results written, once each. `holds` names the kinds of what is fused into it beside its own.
    """

    name: str
    kind: str
    group: str
    stage: str
    ms: float
    start_ms: float
    span_ms: float
    flops: int = 0
    bytes: int = 0
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A timed pass: its wall time with the profiler on, and without it; each, like a piece's own time, the median of
    several passes. Begin and span of pieces are those of the pass with the median wall time.
    """

    wall_ms: float
    plain_ms: float
    pieces: list[Piece]
    stages: list[str]
    how: str
    notes: list[str] = field(default_factory=list)


def median_pass(runs: Sequence[tuple[float, list[Piece]]]) -> tuple[float, list[Piece]]:
    """Wall time and pieces of several passes as one: of each its median, where all ran the same."""
    ordered = sorted(runs, key=lambda run: run[0])
    wall, pieces = ordered[len(ordered) // 2]
    if any([p.name for p in other] != [p.name for p in pieces] for _, other in ordered):
        return wall, pieces
    times = zip(*([p.ms for p in other] for _, other in ordered), strict=True)
    return wall, [replace(p, ms=statistics.median(ms)) for p, ms in zip(pieces, times, strict=True)]
