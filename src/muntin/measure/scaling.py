"""How time and memory grow with the number of pixels: ranges of sizes, the fitted exponent, and its picture.

A model of windows grows linearly (exponent 1); global attention adds a part that grows with the square.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muntin.errors import UserError
from muntin.measure.results import Row
from muntin.measure.statistics import rounded

STEPS = 6  # sizes in a range whose step is not given
MULTIPLE = 32
LEAST = 3  # sizes for an exponent with an interval
# Student's t for 95% confidence, two-sided, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def sizes(text: str) -> list[int]:
    """Sides of "224", "224,384" or a range: "224:1024" has about six, multiples of 32 between its ends, "224:1024:160"
    goes in steps of 160. UserError for anything else.
    """
    found: list[int] = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        if not re.fullmatch(r"\d+(:\d+){0,2}", part):
            raise UserError(f"size {part!r} is none; give a side (224), several (224,384) or a range (224:1024:160)")
        first, *rest = map(int, part.split(":"))
        if not rest:
            found.append(first)
            continue
        last, step = rest[0], rest[1] if len(rest) > 1 else 0
        if last < first or (len(rest) > 1 and step < 1):
            raise UserError(f"size range {part!r} is empty; give FIRST:LAST or FIRST:LAST:STEP with FIRST below LAST")
        found += list(range(first, last + 1, step)) if step else _spread(first, last)
    return list(dict.fromkeys(found))


def _spread(first: int, last: int) -> list[int]:
    """About STEPS sides from first to last, evenly spaced as logarithms, those between them multiples of 32."""
    ratio = (last / max(first, 1)) ** (1 / (STEPS - 1))
    between = [round(first * ratio**k / MULTIPLE) * MULTIPLE for k in range(1, STEPS - 1)]
    return sorted({first, *(side for side in between if first < side < last), last})


def exponent(pixels: Sequence[float], values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The p of values = c * pixels^p by least squares of the logarithms, and its 95% interval (Student's t on the
    residuals): the interval says how well a power of the pixels describes the growth.
    """
    x, y = [math.log(p) for p in pixels], [math.log(v) for v in values]
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    half = T95[min(n - 2, len(T95)) - 1] * math.sqrt(left / (n - 2) / spread)
    return slope, (slope - half, slope + half)


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The exponent of time, and of memory where it is known, for each target and batch at three sizes or more."""
    series: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        series.setdefault((row.target, row.batch), []).append(row)
    found = []
    for (target, batch), its in series.items():
        pixels = [row.height * row.width for row in its]
        if len(set(pixels)) < LEAST:
            continue
        time, interval = exponent(pixels, [row.median_ms for row in its])
        entry: dict[str, Any] = {"target": target, "batch": batch, "sizes": [[row.height, row.width] for row in its]}
        entry |= {"time_exponent": time, "time_interval": interval}
        if all(row.memory_mb for row in its):
            memory, interval = exponent(pixels, [row.memory_mb or 0.0 for row in its])
            entry |= {"memory_exponent": memory, "memory_interval": interval}
        found.append(entry)
    return found


def lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The exponents in words."""
    told = []
    for entry in found:
        text = f"{entry['target']}, batch {entry['batch']}: time grows with pixels^{_shown(entry, 'time')}"
        if "memory_exponent" in entry:
            text += f", memory with pixels^{_shown(entry, 'memory')}"
        told.append(text)
    return told


def _shown(entry: dict[str, Any], what: str) -> str:
    half = (entry[f"{what}_interval"][1] - entry[f"{what}_interval"][0]) / 2
    return f"{rounded(entry[f'{what}_exponent'], half)} ± {rounded(half, half)}"


def plot(rows: Sequence[Row], path: str | Path) -> Path:
    """Time, and memory where it is known, against pixels, both axes logarithmic: .png, or .html to explore.

    Raises UserError for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".png", ".html"):
        raise UserError(f"{path}: no picture of kind {path.suffix or 'none'}; give a name that ends in .png or .html")
    panels = [("median of a call, ms", [(row, row.median_ms) for row in rows])]
    if any(row.memory_mb for row in rows):
        panels.append(("peak memory, MB", [(row, row.memory_mb) for row in rows if row.memory_mb]))
    drawn = [(title, _series(points)) for title, points in panels]
    return _png(drawn, path) if path.suffix == ".png" else _html(drawn, path)


Series = dict[str, list[tuple[int, float, str]]]


def _series(points: Sequence[tuple[Row, float]]) -> Series:
    """(pixels, value, size) in order of the pixels, by target and batch."""
    found: Series = {}
    batches = {row.batch for row, _ in points}
    for row, value in points:
        name = row.target if len(batches) == 1 else f"{row.target}, batch {row.batch}"
        found.setdefault(name, []).append((row.height * row.width, value, f"{row.height}x{row.width}"))
    return {name: sorted(its) for name, its in found.items()}


def _png(panels: list[tuple[str, Series]], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from muntin.run import atomic_write

    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, its in series.items():
            axes.loglog([p for p, _, _ in its], [v for _, v, _ in its], marker="o", label=name)
        ticks = {p: size for its in series.values() for p, _, size in its}
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=45)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="size of the image (axis: pixels)", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return atomic_write(path, lambda file: figure.savefig(file, format="png"))


def _html(panels: list[tuple[str, Series]], path: Path) -> Path:
    from plotly.colors import qualitative
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    from muntin.run import atomic_write

    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _ in panels])
    for column, (_, series) in enumerate(panels, 1):
        for place, (name, its) in enumerate(series.items()):
            colour = qualitative.Plotly[place % len(qualitative.Plotly)]
            pixels, values, names = zip(*its, strict=True)
            figure.add_trace(
                Scatter(x=pixels, y=values, text=names, name=name, legendgroup=name, showlegend=column == 1,
                        mode="lines+markers", line={"color": colour}),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(type="log", title="pixels").update_yaxes(type="log")
    return atomic_write(path, figure.to_html(include_plotlyjs=True, full_html=True).encode())
