"""What a measurement found: rows, what is needed to judge and repeat them, and the table to read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from muntin.measure.machine import threads_in_words
from muntin.measure.statistics import rounded


@dataclass(frozen=True)
class Row:
    """One target in one engine and precision at one batch and size. Times are milliseconds per call of the batch.

    `target` is the model with what sets it apart from the other rows. `median_ms` is p50 and `interval_ms` holds it
    with 95% confidence, from the rounds' medians, `round_ms`; `iqr_ms` is the distance between the quartiles of all
    calls. `speed` is the time of `base` over this one's (2: twice as fast), the median over the rounds, and
    `speed_interval` holds it with 95% confidence; where that contains 1 the two are a tie. `throughput` is images per
    second at the median. `memory_mb` is the most that calls hold above the bare runtime, `load_memory_mb` the same
    while loading and in the first call, both in a process of their own; `energy_j` is joules per image.

    `difference` is how far outputs are from eager float32 of the same model, in standard deviations. `shared` names
    our model whose weights a peer runs with and `shared_difference` how far its outputs are from ours;
    `another_model` is a peer with no counterpart here.
    """

    target: str
    batch: int
    height: int
    width: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    iqr_ms: float
    interval_ms: tuple[float, float]
    throughput: float
    speed: float
    speed_interval: tuple[float, float]
    calls: int
    warmup_calls: int
    stable: bool
    round_ms: list[float] = field(default_factory=list)
    model: str = ""
    engine: str = "eager"
    precision: str = "float32"
    base: str = ""
    settings: list[str] = field(default_factory=list)
    difference: float | None = None
    shared: str | None = None
    shared_difference: float | None = None
    another_model: bool = False
    load_s: float | None = None
    export_s: float | None = None
    first_call_ms: float | None = None
    memory_mb: float | None = None
    load_memory_mb: float | None = None
    energy_j: float | None = None

    @property
    def tie(self) -> bool:
        """Whether the interval of the ratio holds 1."""
        return self.speed_interval[0] <= 1 <= self.speed_interval[1]


@dataclass(frozen=True)
class BenchReport:
    """Rows in the order given, with everything needed to judge and repeat them.

    `skipped` says which combinations were not measured and why; `scaling` holds the growth with pixels by target
    and batch where a range of sizes was asked for.
    """

    rows: list[Row]
    protocol: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    created: str
    skipped: list[str] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)

    def json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """A readable table; no figure has more digits than its interval supports."""
        lines = aligned([[title, *map(cell, self.rows)] for title, cell in self._columns()])
        return "\n".join([*lines, "", *self._notes()])

    def _columns(self) -> list[tuple[str, Callable[[Row], str]]]:
        """The columns that say something: what is alike in all rows stands in the notes."""
        several = {name: len({getattr(row, name) for row in self.rows}) > 1 for name in ("engine", "precision", "base")}
        bases = {row.base or self.rows[0].target for row in self.rows}
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("model", lambda row: row.model or row.target),
            ("engine", lambda row: row.engine),
            ("precision", lambda row: row.precision),
            ("batch", lambda row: str(row.batch)),
            ("size", lambda row: f"{row.height}x{row.width}"),
            ("median ms", lambda row: f"{rounded(row.median_ms, _half(row))} ± {rounded(_half(row), _half(row))}"),
            ("p90", lambda row: rounded(row.p90_ms, _half(row))),
            ("p99", lambda row: rounded(row.p99_ms, _half(row))),
            ("images/s", lambda row: rounded(row.throughput, row.throughput * _half(row) / row.median_ms)),
            ("first ms", lambda row: _short(row.first_call_ms)),
            ("load s", lambda row: _short(row.load_s)),
            ("memory MB", lambda row: _short(row.memory_mb)),
            ("J/image", lambda row: _short(row.energy_j)),
            (f"speed vs {bases.pop()}" if len(bases) == 1 else "speed", self._speed),
        ]
        empty = {
            "engine": not several["engine"],
            "precision": not several["precision"],
            "first ms": all(row.first_call_ms is None for row in self.rows),
            "load s": all(row.load_s is None for row in self.rows),
            "memory MB": all(row.memory_mb is None for row in self.rows),
            "J/image": all(row.energy_j is None for row in self.rows),
        }
        return [(title, cell) for title, cell in columns if not empty.get(title, False)]

    def _speed(self, row: Row) -> str:
        if row.target == (row.base or self.rows[0].target):
            return "base"
        low, high = row.speed_interval
        if row.tie:
            return "tie"
        half = (high - low) / 2
        return f"{rounded(row.speed, half)}x ({rounded(low, half)} to {rounded(high, half)})"

    def _notes(self) -> list[str]:
        m, p = self.machine, self.protocol
        where = m.get("gpu") or f"{m['cpu']}, {m['cores']} cores"
        engines, precisions = ({getattr(row, name) for row in self.rows} for name in ("engine", "precision"))
        threads = threads_in_words(p["threads"])
        alike = [*(engines if len(engines) == 1 else ()), *(precisions if len(precisions) == 1 else ())]
        notes = [
            f"{where}; {', '.join([*alike, threads])}; {p['rounds']} interleaved rounds, "
            f"{min(row.calls for row in self.rows)} calls or more per row; torch {self.versions['torch']}",
            "± and ties: 95% confidence over the rounds"
            if p["rounds"] >= 6
            else "± and ties: the range of the rounds; six rounds or more give 95% confidence",
        ]
        if any(row.calls < 100 for row in self.rows):
            notes.append("p99 of fewer than 100 calls is close to the slowest call; more --seconds sharpen it")
        unstable = [f"{row.target} at batch {row.batch}" for row in self.rows if not row.stable]
        if unstable:
            notes.append(f"not stable when the warm-up ended: {', '.join(unstable)}; is the machine busy?")
        notes += self._about_bases() + self._about_outputs() + self._about_settings()
        notes += [p[name] for name in ("energy", "memory") if p.get(name)]
        return notes + [f"skipped: {line}" for line in self.skipped]

    def _about_bases(self) -> list[str]:
        bases = list(dict.fromkeys(row.base for row in self.rows))
        if len(bases) < 2:
            return []
        first = {base: next(row for row in self.rows if row.base == base) for base in bases}
        which = ", ".join(f"{base} (batch {row.batch}, {row.height}x{row.width})" for base, row in first.items())
        return [f"speed is against {which}: the base named was not measured everywhere"]

    def _about_outputs(self) -> list[str]:
        """What was compared before the timing."""
        notes = []
        for precision in dict.fromkeys(row.precision for row in self.rows):
            known = [row for row in self.rows if row.difference is not None and row.precision == precision]
            if known:
                worst = max(known, key=lambda row: row.difference or 0.0)
                notes.append(
                    f"outputs in {precision} against eager float32 of the same model: largest difference "
                    f"{worst.difference:.1e} standard deviations ({worst.target}), "
                    f"bound {self.protocol['bounds'][precision]:g}"
                )
        shared = {row.model: row for row in self.rows if row.shared}
        for model, row in shared.items():
            far = max(r.shared_difference or 0.0 for r in self.rows if r.model == model)
            notes.append(f"{model}: the weights of {row.shared}, outputs equal to {far:.1e} standard deviations")
        others = dict.fromkeys(row.model for row in self.rows if row.another_model)
        return notes + [f"{model}: another model, weights of its own" for model in others]

    def _about_settings(self) -> list[str]:
        texts: dict[str, dict[str, None]] = {}
        for row in self.rows:
            if row.settings:
                texts.setdefault(row.model, {})[", ".join(s for s in row.settings if not s.startswith("fixed"))] = None
        return [f"{model}: {'; '.join(filter(None, found))}" for model, found in texts.items() if any(found)]


def _half(row: Row) -> float:
    return (row.interval_ms[1] - row.interval_ms[0]) / 2


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table from its columns, each with its title first: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *rest in zip(*columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines
