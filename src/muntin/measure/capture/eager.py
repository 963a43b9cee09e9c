"""A pass in PyTorch, operator by operator.

Two passes see it. One, untimed, goes through the dispatcher with every operand in sight: it knows kind, stage, FLOPs
and bytes of each operator, in order. The other is timed by PyTorch's profiler, whose events are the same operators in
the same order. An operator's time includes what it calls; a wrapper (linear around addmm) has its own time alone.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from muntin.measure.capture import Capture, Piece, median_pass
from muntin.measure.capture.stages import Stages
from muntin.measure.counter import PROGRAM, OperatorCounter
from muntin.measure.kinds import UNATTRIBUTED, group_of, kind_of, kind_of_call, plain_name
from muntin.native.program import program

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty")
AHEAD = 8  # operators that are looked through for an event that is not the next one

HOW = (
    "each operator by its name and operands in a pass through the dispatcher, timed by PyTorch's profiler in another; "
    "stages by the module that ran it"
)


@dataclass(frozen=True)
class Unit:
    """An operator as the dispatcher saw it. `parts` are the layers of a program (muntin.native), with the share of its
    time that each takes.
    """

    name: str
    kind: str
    stage: str | None
    flops: int
    bytes: int
    holds: tuple[str, ...] = ()
    parts: tuple[tuple[float, "Unit"], ...] = ()


class Recorder(OperatorCounter):
    """Writes down each operator that runs inside it."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self.units: list[Unit] = []
        self._stage: str | None = None
        self._merges = False

    def enter(self, stage: str | None, module: nn.Module | None) -> None:
        """The module that runs from now on."""
        self._stage, self._merges = stage, "PatchMerging" in type(module).__name__

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        before = self.calls[name], self.macs[name], self.bytes[name]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        # views and allocations take other forms from pass to pass, and move nothing: their events say enough
        if self.calls[name] > before[0] and self.bytes[name] > before[2] and plain_name(name) not in _ALLOCATIONS:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
            of_weights = not any(tensor in self.held for tensor in tensors)
            kind = kind_of_call(name, tensors, of_weights, self._merges)
            flops, moved = 2 * (self.macs[name] - before[1]), self.bytes[name] - before[2]
            parts = self._parts(*args) if name == PROGRAM else ()
            self.units.append(Unit(name, kind, self._stage, flops, moved, parts=parts))
        return out

    def _parts(self, x: Tensor, number: int) -> tuple[tuple[float, Unit], ...]:
        """The layers of a program, timed one by one."""
        with _disable_current_modes():
            parts = program(number).timed(x)
        total = sum(part.ms for part in parts)
        return tuple(
            (part.ms / total, Unit(part.name, kind_of(part.name), self._stage, 2 * part.macs, part.bytes))
            for part in parts
        )


def recorded(call: Callable[[Tensor], Any], x: Tensor, model: nn.Module, stages: Stages) -> list[Unit]:
    """The operators of one pass."""
    recorder = Recorder([x])
    with stages.tracked(model.named_modules(), recorder.enter), recorder:
        call(x)
    filled = stages.fill([unit.stage for unit in recorder.units])
    return [replace(unit, stage=stage) for unit, stage in zip(recorder.units, filled, strict=True)]


def wall(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """Milliseconds of one call, the work on a GPU included."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    call(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1000 * (time.perf_counter() - start)


def timed(call: Callable[[Tensor], Any], x: Tensor, calls: int, warmup: int) -> tuple[float, list[tuple[float, Any]]]:
    """The median without the profiler, then wall time and events of each profiled pass."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports on stderr that it starts and stops
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if x.is_cuda else [])

    def profiled() -> tuple[float, Any]:
        with torch.profiler.profile(activities=activities) as profiler:
            taken = wall(call, x)
        return taken, profiler

    for _ in range(warmup):
        call(x)
    plain = statistics.median(wall(call, x) for _ in range(calls))
    profiled()  # a first use sets the profiler up, which is not the model's time
    return plain, [(taken, profiler.events()) for taken, profiler in (profiled() for _ in range(calls))]


def attributed(
    runs: Sequence[tuple[float, Any]], units: Sequence[Unit], on_gpu: bool
) -> tuple[float, list[Piece], list[str]]:
    """Wall time and pieces of the timed passes, and what could not be told."""
    found = [(taken, *pieces(events, units, on_gpu)) for taken, events in runs]
    missed = max(missing for *_, missing in found)
    notes = [f"{missed} of {len(units)} operators were seen by no event: their FLOPs and bytes are left out"]
    return *median_pass([(taken, parts) for taken, parts, _ in found]), notes if missed else []


def pieces(events: Any, units: Sequence[Unit], on_gpu: bool) -> tuple[list[Piece], int]:
    """Events with what is known of them, and the number of operators that no event was found for."""
    tops = [e for e in events if e.cpu_parent is None and e.device_type == torch.autograd.DeviceType.CPU]
    tops.sort(key=lambda event: event.time_range.start)
    origin = tops[0].time_range.start if tops else 0.0
    found: list[Piece] = []
    place = missed = 0

    def add(
        event: Any, name: str, kind: str, whole: bool, unit: Unit | None = None, share: float = 1.0, before: float = 0.0
    ) -> None:
        """share: of the event's time that is this piece's, after another share `before`."""
        near = unit or (units[min(place, len(units) - 1)] if units else None)  # a wrapper precedes what it wraps
        if on_gpu:
            own = event.device_time_total if whole else event.self_device_time_total
        else:
            own = event.cpu_time_total if whole else event.self_cpu_time_total
        found.append(
            Piece(
                name=name,
                kind=kind,
                group=group_of(name, kind) if kind != UNATTRIBUTED else UNATTRIBUTED,
                stage=(near.stage if near and kind != UNATTRIBUTED else None) or UNATTRIBUTED,
                ms=share * own / 1000,
                start_ms=(event.time_range.start - origin + before * event.time_range.elapsed_us()) / 1000,
                span_ms=share * event.time_range.elapsed_us() / 1000,
                flops=unit.flops if unit else 0,
                bytes=unit.bytes if unit else 0,
                holds=unit.holds if unit else (),
            )
        )

    def visit(event: Any) -> None:
        nonlocal place, missed
        name = re.sub(r"^graph_\d+_", "", event.name)
        ahead = next((i for i in range(place, min(place + AHEAD, len(units))) if units[i].name == name), None)
        if ahead is not None:
            unit = units[ahead]
            missed += ahead - place
            place = ahead + 1
            before = 0.0
            for share, part in unit.parts or ((1.0, unit),):
                add(event, part.name, part.kind, True, replace(part, stage=unit.stage), share, before)
                before += share
            return
        # calls into the driver and the compiler's own marks are no operators: their time is launching
        add(event, name, kind_of(name) if "::" in name else UNATTRIBUTED, False)
        for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
            visit(child)

    for event in tops:
        visit(event)
    return found, missed + len(units) - place


def capture(model: nn.Module, x: Tensor, calls: int, warmup: int) -> Capture:
    """A pass of the model as it is."""
    stages = Stages(model)
    model(x)  # what is kept between calls is made now, and does not run again
    units = recorded(model, x, model, stages)
    plain, runs = timed(model, x, calls, warmup)
    wall_ms, found, notes = attributed(runs, units, x.is_cuda)
    return Capture(wall_ms, plain, found, stages.names, HOW, notes)
