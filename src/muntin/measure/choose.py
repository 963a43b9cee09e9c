"""The most accurate model that meets a budget on this machine, measured now.

In order of published accuracy, each candidate that may meet the budget gets a quick measurement, until a few are
within it; those near it or within it then take turns and get an interval. What cannot meet the budget is not
measured: its multiplications would have to run MARGIN times as fast as the fastest measured so far.
B batch, H W image
"""

import fnmatch
import json
import random
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from muntin.errors import UserError, nearest
from muntin.measure import timing
from muntin.measure.accuracy import accuracy
from muntin.measure.choice import MEETS, OVER, STRADDLES, Candidate, Choice, Found
from muntin.measure.cost import MODELS, costs
from muntin.measure.machine import commit, device_of, machine, versions
from muntin.measure.runners import Runner, Skipped, Workshop, check_engines, refusal
from muntin.measure.statistics import median_interval
from muntin.measure.targets import Models, Target, parse
from muntin.progress import Bar
from muntin.runtime.precision import precision as full_precision

MARGIN = 2.0  # a model that must multiply so many times as fast as the fastest measured cannot meet the budget
NEAR = 1.5  # a quick measurement says whether a model is within so many times the budget, in either direction
ENOUGH = 3  # models within the budget: the answer and two runners-up
UNITS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}


# ----------------------------------------------------------------------------------------------- what may be chosen


def parse_latency(text: str) -> float:
    """`20ms`, `900us` or `0.5s` in milliseconds. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zµ]*)\s*", text)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise UserError(
            f"latency {text!r} cannot be read; give a number above 0 with its unit: 20ms, 900us or 0.5s "
            "(for images a second: --throughput)"
        )
    return float(match[1]) * UNITS[match[2]]


def _weights(model: str) -> str:
    """Where a model's weights come from: a tag of ours; a peer's are its library's affair."""
    from muntin.weights.download import published

    if ":" in model:
        return f"of {model.partition(':')[0]}"
    tags = [c.tag for c in published() if c.model == model and c.classes == 1000]
    return tags[0] if tags else "none published"


def candidates(among: Sequence[str] = ("*",), size: tuple[int, int] | None = None) -> tuple[list[Candidate], list[str]]:
    """Candidates by accuracy, the cheaper of equals first, and the names whose accuracy is not wholly known.

    among: shell patterns of listed models, or targets such as timm:NAME.
    Raises UserError for a pattern that matches nothing, and where nothing has a complete accuracy.
    """
    import muntin

    listed = {row["name"]: row for row in json.loads((MODELS / "table.json").read_text(encoding="utf-8"))}
    names: dict[str, None] = {}
    for pattern in among:
        matching = [pattern] if ":" in pattern else fnmatch.filter(listed, pattern)
        if not matching:
            near = nearest(pattern, muntin.list_models())
            raise UserError(f"no model matches {pattern!r}{near}; see all with: muntin models")
        names |= dict.fromkeys(matching)
    found, left_out = [], []
    for name in names:
        known = accuracy(name)
        if known is None or known.top1 is None:
            left_out.append(f"{name} ({known.text})" if known else name)
        elif size is None and name in listed:
            row = listed[name]
            found.append(Candidate(name, known, row["gmacs"], (row["size"], row["size"])))
        else:
            counted = costs([name], size, training=False)[name]
            found.append(Candidate(name, known, counted.gmacs, (counted.height, counted.width)))
    if not found:
        raise UserError(f"nothing to choose from: no complete accuracy is published of {', '.join(left_out)}")
    return sorted(found, key=lambda c: (-c.top1, c.gmacs)), left_out


# ------------------------------------------------------------------------------------------------------ the measuring


class Clock(Protocol):
    """What measures candidates."""

    def quick(self, candidate: Candidate) -> list[float]:
        """Milliseconds of some calls. Raises Skipped with the reason where it cannot run."""

    def together(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Milliseconds by round, of candidates that were measured quickly, taking turns."""

    def forget(self, candidate: Candidate) -> None:
        """It will not be measured again."""


class MachineClock:
    """This machine, in one engine and precision."""

    def __init__(
        self, workshop: Workshop, engine: str, precision: str, batch: int, rounds: int, seconds: float
    ) -> None:
        self.workshop, self.engine, self.precision = workshop, engine, precision
        self.batch, self.rounds, self.seconds = batch, rounds, seconds
        self._ready: dict[str, tuple[Runner, torch.Tensor]] = {}

    def quick(self, candidate: Candidate) -> list[float]:
        target: Target = parse(candidate.name)[0]
        reason = refusal(target, self.engine, self.precision, self.workshop.device)
        if reason:
            raise Skipped(reason)
        runner = self.workshop.runner(target, self.engine, self.precision, self.batch, candidate.size)
        images = runner.given(torch.randn(self.batch, 3, *candidate.size), self.workshop.device)
        self._ready[candidate.name] = runner, images
        times, _ = timing.warm_up(runner.call, images)
        return [1000 * t for t in times[-timing.WARMUP_CALLS :]]

    def together(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        calls = [(self._ready[c.name][0].call, self._ready[c.name][1]) for c in candidates]
        return [series.medians() for series in timing.interleaved(calls, self.rounds, self.seconds, random.Random(0))]

    def forget(self, candidate: Candidate) -> None:
        self._ready.pop(candidate.name, None)


@dataclass
class Search:
    """The search for the most accurate within a budget: what was measured so far, and what that says of the rest."""

    budget_ms: float
    batch: int
    clock: Clock
    bar: Bar
    quick: dict[str, list[float]] = field(default_factory=dict)
    final: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0  # GMACs per second, the highest measured

    def run(self, ordered: Sequence[Candidate]) -> list[Candidate]:
        """Measure what is needed of the candidates, which come by accuracy; those that were measured."""
        by_cost = sorted(ordered, key=lambda c: c.gmacs)
        for candidate in {c.name: c for c in (by_cost[0], by_cost[len(by_cost) // 2])}.values():
            self._measure(candidate)  # the cheapest, to be told where none is within; a usual one, for the rate
        rest = list(ordered)
        while True:
            rest = self._look(rest)
            hasty = [c for c in ordered if c.name in self.skipped and self._least(c) <= self.budget_ms]
            if hasty:  # skipped by a rate that has since been surpassed
                for candidate in hasty:
                    del self.skipped[candidate.name]
                rest = hasty + rest
                continue
            self._finish([c for c in ordered if c.name in self.quick and self._middle(c) <= NEAR * self.budget_ms])
            if not rest or any(self.verdict(name) == MEETS for name in self.final):
                return [c for c in ordered if c.name in self.quick]

    def _look(self, rest: list[Candidate]) -> list[Candidate]:
        """Quick measurements down the list until enough are within the budget; what remains."""
        within = 0
        for place, candidate in enumerate(rest):
            known = candidate.name in self.quick or candidate.name in self.failed
            if not known and self._least(candidate) > self.budget_ms:
                self.skipped[candidate.name] = self._least(candidate)
                continue
            self._measure(candidate)
            within += candidate.name in self.quick and self._middle(candidate) <= self.budget_ms
            if within >= ENOUGH:
                return rest[place + 1 :]
        return []

    def _measure(self, candidate: Candidate) -> None:
        if candidate.name in self.quick or candidate.name in self.failed:
            return
        self.bar.say(candidate.name)
        try:
            self.quick[candidate.name] = self.clock.quick(candidate)
        except (Skipped, UserError) as error:
            self.failed[candidate.name] = str(error)
        else:
            self.rate = max(self.rate, self.batch * candidate.gmacs / self._middle(candidate) * 1000)
            if self._middle(candidate) > NEAR * self.budget_ms:
                self.clock.forget(candidate)
        self.bar.step()

    def _finish(self, near: list[Candidate]) -> None:
        if near and any(c.name not in self.final for c in near):
            self.bar.say(f"{len(near)} models in turns")
            self.final |= dict(zip([c.name for c in near], self.clock.together(near), strict=True))

    def _middle(self, candidate: Candidate) -> float:
        return statistics.median(self.quick[candidate.name])

    def _least(self, candidate: Candidate) -> float:
        """Milliseconds at MARGIN times the highest rate; 0 where none is known."""
        return self.batch * candidate.gmacs / (MARGIN * self.rate) * 1000 if self.rate else 0.0

    def interval(self, name: str) -> tuple[float, float]:
        """In turns with others with 95% confidence, otherwise the range of the quick calls."""
        if name in self.final:
            return median_interval(self.final[name])
        return min(self.quick[name]), max(self.quick[name])

    def verdict(self, name: str) -> str:
        low, high = self.interval(name)
        if name not in self.final:
            return OVER
        return MEETS if high <= self.budget_ms else OVER if low > self.budget_ms else STRADDLES

    def found(self, candidate: Candidate) -> Found:
        name = candidate.name
        times = self.final.get(name) or self.quick[name]
        return Found(
            name, candidate.top1, candidate.known.source, candidate.gmacs, *candidate.size, statistics.median(times),
            self.interval(name), self.verdict(name), name not in self.final, _weights(name),
        )  # fmt: skip


def _budget(latency: str | None, throughput: float | None, batch: int) -> float:
    if (latency is None) == (throughput is None):
        raise UserError("give one budget: --latency 20ms, or --throughput 50 for images a second")
    if batch < 1:
        raise UserError(f"batch {batch} cannot be measured; give at least 1")
    if latency is not None:
        return parse_latency(latency)
    if throughput is None or not throughput > 0:
        raise UserError(f"throughput {throughput} cannot be met; give images a second, above 0")
    return 1000 * batch / throughput


def choose(
    latency: str | None = None,
    throughput: float | None = None,
    *,
    engine: str = "eager",
    precision: str = "float32",
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    threads: int | None = None,
    among: Sequence[str] = ("*",),
    device: str | None = None,
    rounds: int = 10,
    seconds: float = 2.0,
    progress: bool = True,
) -> Choice:
    """Find the most accurate model, as published, that meets a budget on this machine.

    latency: of one call, "20ms", "900us" or "0.5s"; throughput: images a second. One of the two.
    engine, precision, threads, device: as in `bench`, one each. batch: images in a call.
    size: side or (height, width) in pixels, by default each model's own, which its accuracy holds for.
    among: patterns of listed models, or targets such as "timm:mobilenetv3_large_100".
    rounds, seconds: of the measurement in turns, for each model near the budget.
    Raises UserError for a budget that cannot be read, an unknown name, engine or precision, a missing package.
    """
    budget = _budget(latency, throughput, batch)
    check_engines([engine])
    full = full_precision(precision)
    ordered, left_out = candidates(among, (size, size) if isinstance(size, int) else size)
    where = device_of(device)
    described = machine(where)
    with (
        timing.threads_of(threads or torch.get_num_threads()),
        torch.random.fork_rng(),
        tempfile.TemporaryDirectory(prefix="muntin-choose-") as folder,
        Bar("choose", len(ordered), progress) as bar,
    ):
        torch.manual_seed(0)
        workshop = Workshop(Models(0), where, Path(folder))
        search = Search(budget, batch, MachineClock(workshop, engine, full, batch, rounds, seconds), bar)
        found = [search.found(candidate) for candidate in search.run(ordered)]
        used = torch.get_num_threads()
    return Choice(
        budget_ms=budget,
        engine=engine,
        precision=full,
        batch=batch,
        found=found,
        skipped=search.skipped,
        failed=search.failed,
        left_out=left_out,
        unseen=len(ordered) - len(found) - len(search.skipped) - len(search.failed),
        protocol={
            "threads": used,
            "size_given": size is not None,
            "device": str(where),
            "rounds": rounds,
            "seconds_per_model": seconds,
            "margin": MARGIN,
            "near": NEAR,
            "highest_gmacs_per_s": search.rate,
        },
        machine=described,
        versions=versions(),
        commit=commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        chosen=next((row.model for row in found if row.verdict == MEETS), None),
    )
