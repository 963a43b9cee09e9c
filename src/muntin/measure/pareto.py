"""Published accuracy against latency as it was measured: a picture, or a page whose points tell their figures.

What has no complete published figure is not drawn; it is listed below with what is known.
"""

import importlib.util
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from muntin.errors import UserError, nearest
from muntin.measure.accuracy import accuracy
from muntin.measure.results import aligned
from muntin.measure.statistics import rounded
from muntin.run import atomic_write

FORMATS = {".html": "plotly", ".png": "matplotlib"}
"""Suffix of a picture -> the package that draws it."""

FAMILIES = {"swin_free": "Swin-Free", "swinv2": "SwinV2", "swin": "Swin", "efficientvit": "EfficientViT", "rmt": "RMT"}
COLOURS = ("#b42318", "#175cd3", "#087443", "#b54708", "#6941c6", "#475467", "#c11574", "#0e7090")
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("*", "star"),
)
FRONT: dict[str, Any] = {"color": "#98a2b3", "linewidth": 1}
MS, TOP1 = "latency of one call, ms (log)", "published ImageNet-1K top-1, %"


@dataclass(frozen=True)
class Point:
    """One row of a measurement with its published accuracy; times in milliseconds, `front` where no other point of
    the same batch is both faster and at least as accurate.
    """

    model: str
    family: str
    how: str
    batch: int
    height: int
    width: int
    ms: float
    interval_ms: tuple[float, float]
    throughput: float
    top1: float
    source: str
    front: bool = False

    def told(self) -> list[str]:
        half = (self.interval_ms[1] - self.interval_ms[0]) / 2
        return [
            f"{self.model}, {self.how}",
            f"{rounded(self.ms, half)} ms (95%: {rounded(self.interval_ms[0], half)} to "
            f"{rounded(self.interval_ms[1], half)}), batch {self.batch}, {self.height}x{self.width}",
            f"{self.throughput:.4g} images/s",
            f"top-1 {self.top1:g}%: {self.source}",
        ]


@dataclass(frozen=True)
class Pareto:
    """points: by batch, then by latency. left_out: what was measured and is not drawn, with the reason."""

    points: list[Point]
    left_out: list[str]
    notes: list[str]

    def __str__(self) -> str:
        """The front as a table, and what is not drawn."""
        lines = [["on the front", "engine", "batch", "ms", "top-1"]]
        for p in self.points:
            if p.front:
                half = (p.interval_ms[1] - p.interval_ms[0]) / 2
                lines.append([p.model, p.how, str(p.batch), rounded(p.ms, half), f"{p.top1:g}"])
        left = [f"not drawn: {line}" for line in self.left_out]
        return "\n".join([*aligned(list(zip(*lines, strict=True))), *left])


def _rows(report: Any) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The rows, protocol and machine of a BenchReport, of its JSON, or of the JSON's file."""
    name = "this report"
    if isinstance(report, (str, os.PathLike)):
        name = str(report)
        try:
            report = json.loads(Path(report).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name} cannot be read as JSON ({error}); give a file that muntin bench --json wrote"
            ) from error
    found = report if isinstance(report, Mapping) else asdict(report)
    rows = found.get("rows")
    needed = {"target", "batch", "height", "width", "median_ms", "interval_ms", "throughput"}
    if not rows or not all(isinstance(row, Mapping) and needed <= row.keys() for row in rows):
        raise UserError(f"{name} holds no measured rows; give a file that muntin bench --json wrote")
    return list(rows), found.get("protocol", {}), found.get("machine", {})


def _family(model: str) -> str:
    library, colon, _ = model.partition(":")
    if colon and not library.startswith("muntin"):
        return {"hf": "transformers"}.get(library, library)
    name = model.rpartition(":")[2]
    return next((title for start, title in FAMILIES.items() if name.startswith(start)), "others")


def pareto(*reports: Any) -> Pareto:
    """Join measurements with published accuracy.

    reports: BenchReports, their JSON, or files that `muntin bench --json` wrote.
    Raises UserError for a file that is none, and where nothing measured has a complete published accuracy.
    """
    points: list[Point] = []
    left_out: dict[str, None] = {}
    notes: dict[str, None] = {}
    for report in reports:
        rows, protocol, machine = _rows(report)
        place = machine.get("gpu") or machine.get("cpu") or "machine not stated"
        notes[f"{place}, {protocol.get('threads', '?')} threads; {protocol.get('rounds', '?')} interleaved rounds"] = (
            None
        )
        for row in rows:
            model = row.get("model") or row["target"]
            known = accuracy(model)
            if known is None or known.top1 is None:
                left_out[f"{model}: {f'{known.text} ({known.source})' if known else 'no published accuracy'}"] = None
                continue
            how = f"{row.get('engine', 'eager')} {row.get('precision', protocol.get('dtype', 'float32'))}"
            low, high = row["interval_ms"]
            points.append(
                Point(model, _family(model), how, row["batch"], row["height"], row["width"], row["median_ms"],
                      (low, high), row["throughput"], known.top1, known.source)
            )  # fmt: skip
    if not points:
        raise UserError(
            "nothing to draw: no model measured has a complete published accuracy ("
            + "; ".join(left_out)
            + "); see which have one with: muntin models"
        )
    ordered = sorted(points, key=lambda p: (p.batch, p.ms))
    return Pareto([_placed(point, ordered) for point in ordered], list(left_out), list(notes))


def _placed(point: Point, others: Sequence[Point]) -> Point:
    beaten = any(
        o.batch == point.batch
        and o.ms <= point.ms
        and o.top1 >= point.top1
        and (o.ms, o.top1) != (point.ms, point.top1)
        for o in others
    )
    return Point(**(vars(point) | {"front": not beaten}))


def _series(found: Pareto) -> list[tuple[str, str, tuple[str, str], list[Point]]]:
    """A name, colour and marker for each family in each engine and precision."""
    families = list(dict.fromkeys(p.family for p in found.points))
    hows = list(dict.fromkeys(p.how for p in found.points))
    return [
        (
            family if len(hows) == 1 else f"{family}, {how}",
            COLOURS[families.index(family) % len(COLOURS)],
            MARKERS[hows.index(how) % len(MARKERS)],
            [p for p in found.points if (p.family, p.how) == (family, how)],
        )
        for family in families
        for how in hows
        if any((p.family, p.how) == (family, how) for p in found.points)
    ]


def figure(found: Pareto) -> Any:
    """A matplotlib figure: a panel for each batch size, the front as a line, intervals as bars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    batches = sorted({p.batch for p in found.points})
    drawn = Figure(figsize=(7.5 * len(batches), 5.2 + 0.18 * len(found.left_out)), dpi=150, layout="constrained")
    middle = {batch: statistics.geometric_mean(p.ms for p in found.points if p.batch == batch) for batch in batches}
    panels = drawn.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        for name, colour, (marker, _), points in _series(found):
            here = [p for p in points if p.batch == batch]
            if not here:
                continue
            x, y = [p.ms for p in here], [p.top1 for p in here]
            bars = [[p.ms - p.interval_ms[0] for p in here], [p.interval_ms[1] - p.ms for p in here]]
            panel.errorbar(x, y, xerr=bars, fmt=marker, color=colour, markersize=5, linewidth=1, label=name)
            for p in here:
                left = p.ms > middle[batch]  # names point inwards
                place = {"xytext": (-4 if left else 4, 4), "textcoords": "offset points", "fontsize": 6.5}
                panel.annotate(p.model, (p.ms, p.top1), ha="right" if left else "left", **place)
        line = [p for p in found.points if p.batch == batch and p.front]
        panel.plot(
            [p.ms for p in line], [p.top1 for p in line], drawstyle="steps-post", **FRONT, zorder=0, label="front"
        )
        panel.set_xscale("log", subs=(2, 5))
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set(xlabel=MS, ylabel=TOP1, title=f"batch {batch}")
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(fontsize=7, loc="lower right")
    drawn.supxlabel("\n".join([*found.notes, *(f"not drawn: {line}" for line in found.left_out)]), fontsize=7)
    return drawn


def page(found: Pareto) -> str:
    """One HTML file that needs no network: the same picture, each point with its figures and source."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    batches = sorted({p.batch for p in found.points})
    drawn = make_subplots(1, len(batches), subplot_titles=[f"batch {batch}" for batch in batches])
    for name, colour, (_, symbol), points in _series(found):
        for column, batch in enumerate(batches, 1):
            here = [p for p in points if p.batch == batch]
            if not here:
                continue
            trace = go.Scatter(
                x=[p.ms for p in here],
                y=[p.top1 for p in here],
                error_x={
                    "type": "data",
                    "array": [p.interval_ms[1] - p.ms for p in here],
                    "arrayminus": [p.ms - p.interval_ms[0] for p in here],
                    "thickness": 1,
                },
                mode="markers+text",
                text=[escape(p.model) for p in here],
                textposition="top center",
                textfont={"size": 9},
                hovertext=["<br>".join(map(escape, p.told())) for p in here],
                hoverinfo="text",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=name,
                legendgroup=name,
                showlegend=batch == min(p.batch for p in points),
            )
            drawn.add_trace(trace, 1, column)
    for column, batch in enumerate(batches, 1):
        line = [p for p in found.points if p.batch == batch and p.front]
        drawn.add_trace(
            go.Scatter(
                x=[p.ms for p in line],
                y=[p.top1 for p in line],
                mode="lines",
                line={"color": FRONT["color"], "width": 1, "shape": "hv"},
                hoverinfo="skip",
                name="front",
                legendgroup="front",
                showlegend=column == 1,
            ),
            1,
            column,
        )
    drawn.update_xaxes(type="log", title=MS)
    drawn.update_yaxes(title=TOP1)
    drawn.update_layout(template="plotly_white", height=620)
    body = drawn.to_html(full_html=False, include_plotlyjs=True, div_id="pareto")
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    rest = "".join(f"<li>{escape(line)}</li>" for line in found.left_out)
    below = f"<p>Measured and not drawn, for want of a complete published figure:</p><ul>{rest}</ul>" if rest else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Accuracy and latency</title></head>\n'
        '<body style="font: 15px system-ui, sans-serif; max-width: 1200px; margin: 2em auto">\n'
        f"<h1>Published accuracy, measured latency</h1>\n{body}\n{notes}\n{below}\n</body></html>\n"
    )


def check_out(out: str | os.PathLike[str]) -> Path:
    """The path of a picture to write. UserError for a suffix that is none of FORMATS, and for a missing package."""
    path = Path(out)
    if path.suffix not in FORMATS:
        near = nearest(path.suffix, FORMATS)
        raise UserError(
            f"{path}: a picture is written as {' or '.join(FORMATS)}, not as {path.suffix or 'that'!r}{near}"
        )
    package = FORMATS[path.suffix]
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{path} needs the package {package}; install it with: pip install "muntin[analysis]"')
    return path


def write_pareto(found: Pareto, out: str | os.PathLike[str]) -> Path:
    """Write the picture: `.png`, or an interactive `.html`. Raises UserError for another suffix."""
    path = check_out(out)
    if path.suffix == ".html":
        return atomic_write(path, page(found).encode())
    return atomic_write(path, lambda partial: figure(found).savefig(partial))
