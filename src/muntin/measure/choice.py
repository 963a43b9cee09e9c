"""What a search for the most accurate model within a budget has found."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from muntin.measure.accuracy import Published
from muntin.measure.machine import threads_in_words
from muntin.measure.results import aligned
from muntin.measure.runners import ENGINES
from muntin.measure.statistics import rounded

MEETS, STRADDLES, OVER = "meets it", "straddles it", "over it"


@dataclass(frozen=True)
class Candidate:
    """A model that may be chosen: at (height, width) it was published with `known`, and needs `gmacs` an image."""

    name: str
    known: Published
    gmacs: float
    size: tuple[int, int]

    @property
    def top1(self) -> float:
        return self.known.top1 or 0.0


@dataclass(frozen=True)
class Found:
    """A candidate that was measured. `verdict` is MEETS, STRADDLES or OVER: where the budget lies to its interval.

    `quick`: from the first measurement alone, which was far enough from the budget; the interval is then the range
    of its last calls.
    """

    model: str
    top1: float
    source: str
    gmacs: float
    height: int
    width: int
    median_ms: float
    interval_ms: tuple[float, float]
    verdict: str
    quick: bool
    weights: str


@dataclass(frozen=True)
class Choice:
    """What was found, the most accurate first. `chosen` is the first that meets the budget, None where none does.

    `skipped`: candidates that cannot meet it, with the least time that they need in ms. `failed` and `left_out`:
    with the reason. `unseen`: how many are less accurate than what was found.
    """

    budget_ms: float
    engine: str
    precision: str
    batch: int
    found: list[Found]
    skipped: dict[str, float]
    failed: dict[str, str]
    left_out: list[str]
    unseen: int
    protocol: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    created: str
    chosen: str | None

    def json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        lines = [
            ["model", "top-1 %", "GMACs", "size", "median ms", "95%: from", "to", "images/s", "the budget", "weights"]
        ]
        for row in self.found:
            half = (row.interval_ms[1] - row.interval_ms[0]) / 2
            lines.append([
                ("> " if row.model == self.chosen else "  ") + row.model,
                f"{row.top1:g}",
                f"{row.gmacs:.3f}",
                f"{row.height}x{row.width}",
                ("about " if row.quick else "") + rounded(row.median_ms, half),
                *(["", ""] if row.quick else [rounded(limit, half) for limit in row.interval_ms]),
                f"{1000 * self.batch / row.median_ms:.3g}",
                row.verdict,
                row.weights,
            ])  # fmt: skip
        return "\n".join([*aligned(list(zip(*lines, strict=True))), "", *self._notes()])

    def _notes(self) -> list[str]:
        place = self.machine.get("gpu") or f"{self.machine.get('cpu')}, {threads_in_words(self.protocol['threads'])}"
        notes = [
            f"budget {self.budget_ms:.4g} ms for a batch of {self.batch}; {ENGINES[self.engine]}, {self.precision}; "
            + place
        ]
        chosen = next((row for row in self.found if row.model == self.chosen), None)
        for row in self.found:
            if row.verdict == STRADDLES and (chosen is None or row.top1 > chosen.top1):
                notes.append(f"{row.model} straddles the budget: more --seconds may tell on which side it is")
        if self.skipped:
            told = ", ".join(f"{name} {least:.3g}" for name, least in self.skipped.items())
            notes.append(
                f"not measured: over the budget even at {self.protocol['margin']:g} times the highest rate measured "
                f"({self.protocol['highest_gmacs_per_s']:.3g} GMACs/s); least ms: {told}"
            )
        notes += [f"not measured: {name}: {reason}" for name, reason in self.failed.items()]
        if self.protocol["size_given"]:
            notes.append("the accuracies were published for each model's own size, not for this one")
        if self.unseen:
            notes.append(f"{self.unseen} less accurate models not measured")
        if self.left_out:
            notes.append(f"no complete accuracy is published of: {', '.join(self.left_out)}")
        if chosen is not None:
            notes.append(f"chosen: {chosen.model}, top-1 {chosen.top1:g}% ({chosen.source}); weights: {chosen.weights}")
        return notes

    def refusal(self) -> str:
        """What to say where nothing meets the budget."""
        straddling = [row.model for row in self.found if row.verdict == STRADDLES]
        if straddling:
            return (
                f"no model is within {self.budget_ms:.4g} ms for certain; {' and '.join(straddling)} may be: measure "
                "longer with --seconds, or allow a little more"
            )
        fastest = min(self.found, key=lambda row: row.median_ms, default=None)
        told = (
            "none could be measured"
            if fastest is None
            else f"the fastest is {fastest.model}, {fastest.median_ms:.3g} ms"
        )
        ways = ["a longer --latency", "a smaller --size"]
        ways += ["a smaller --batch"] if self.batch > 1 else []
        ways += ["--precision bf16"] if self.precision == "float32" else []
        ways += [f"--engine {name}" for name in ("openvino", "onnx", "optimize") if name != self.engine]
        return f"no model meets {self.budget_ms:.4g} ms for a batch of {self.batch}: {told}; try {', '.join(ways)}"
