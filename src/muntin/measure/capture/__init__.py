"""What ran in one forward pass, by engine: each capture times a pass and says of each piece what it was."""

from dataclasses import dataclass, field


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
    """One timed pass: its wall time with the profiler on, and without it the median of several."""

    wall_ms: float
    plain_ms: float
    pieces: list[Piece]
    stages: list[str]
    how: str
    notes: list[str] = field(default_factory=list)
