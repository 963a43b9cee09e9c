"""Profiles as a trace that Perfetto and Chrome show: a process for each, its operations and its stages as slices."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from muntin.measure.capture import Piece
from muntin.measure.kinds import UNATTRIBUTED
from muntin.measure.profile import Profile

STAGES, OPERATIONS = 1, 2  # the rows of a process


def trace(profiles: Sequence[Profile]) -> str:
    """JSON in Chrome's trace event format, times in microseconds from the beginning of each pass."""
    events: list[dict[str, Any]] = []
    for pid, found in enumerate(profiles, 1):
        events.append(_named(pid, 0, "process_name", found.label))
        events.append(_named(pid, STAGES, "thread_name", "stages"))
        events.append(_named(pid, OPERATIONS, "thread_name", "operations"))
        for stage, start, end in _stages(found.pieces):
            events.append(_slice(pid, STAGES, stage, "stage", start, end - start, {}))
        for piece in found.pieces:
            told: dict[str, Any] = {"kind": piece.kind, "stage": piece.stage, "own_ms": piece.ms}
            if piece.bytes:
                told |= {"flops": piece.flops, "bytes": piece.bytes}
            if piece.holds:
                told["holds"] = ", ".join(piece.holds)
            events.append(_slice(pid, OPERATIONS, piece.name, piece.kind, piece.start_ms, piece.span_ms, told))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _named(pid: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def _slice(pid: int, tid: int, name: str, category: str, start: float, span: float, told: dict[str, Any]) -> Any:
    times = {"ts": round(1000 * start, 3), "dur": round(1000 * span, 3)}
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category, **times, "args": told}


def _stages(pieces: Sequence[Piece]) -> Iterator[tuple[str, float, float]]:
    """Stage, begin and end of each stretch of operations of one stage, in the order that they ran."""
    stage, start, end = "", 0.0, 0.0
    for piece in sorted((p for p in pieces if p.kind != UNATTRIBUTED), key=lambda p: p.start_ms):
        if piece.stage != stage:
            if stage:
                yield stage, start, min(end, piece.start_ms)
            stage, start, end = piece.stage, piece.start_ms, piece.start_ms
        end = max(end, piece.start_ms + piece.span_ms)
    if stage:
        yield stage, start, end
