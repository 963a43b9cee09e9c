"""Small charts as SVG text: lines, heat map, reliability, shares, scatter.

They take their colours from the page's CSS variables (see report.py), so that light, dark and print agree. Every
string that comes from outside is escaped here.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 230  # of a line chart: small enough that its type stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 34


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_out(low: float, high: float, count: int = 4) -> Point:
    """The range, widened to the ticks around it."""
    inner = ticks(low, high, count)
    step = inner[1] - inner[0] if len(inner) > 1 else high - low
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)


def _number(value: float) -> str:
    if value and (abs(value) < 1e-4 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


class _Axes:
    """Data coordinates to the drawing's, with grid, ticks and labels."""

    def __init__(self, x: Point, y: Point, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
        self.x, self.y, self.size = x, y, size

    def at(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1), (width, height) = self.x, self.y, self.size
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    def grid(self, x_label: str, y_ticks: Sequence[float], x_ticks: Sequence[float], percent: bool = False) -> str:
        width, height = self.size
        parts = []
        for tick in y_ticks:
            _, y = self.at(self.x[0], tick)
            text = f"{tick:.0%}" if percent and (tick * 100) % 1 < 1e-6 else _number(tick)
            if percent and not text.endswith("%"):
                text = f"{tick:.1%}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        for tick in x_ticks:
            x, _ = self.at(tick, self.y[0])
            parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">'
                         f"{_number(tick)}</text>")  # fmt: skip
        middle = (LEFT + width - RIGHT) / 2
        parts.append(f'<text class="tick" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)


def _svg(width: float, height: float, label: str, content: str, style: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width * 1.6:g}px;{style}">{content}</svg>'
    )


def lines(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    percent: bool = False,
    from_zero: bool = False,
    mark: float | None = None,
) -> str:
    """Curves over epochs, with a tooltip per epoch; `mark` draws a vertical line at that x."""
    values = [v for ys in series.values() for v in ys if math.isfinite(v)] or [0.0]
    low, high = (0.0 if from_zero else min(values)), max(values)
    low, high = (low, high) if high > low else (low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1))
    if percent and 0.9 < high <= 1:
        high = 1.0
    low, high = _round_out(low, high)
    y_ticks = ticks(low, high, 4)
    axes = _Axes((min(x), max(x)) if len(x) > 1 else (x[0] - 1, x[0] + 1), (low, high))
    whole = [t for t in ticks(*axes.x, 5) if float(t).is_integer()]
    parts = [axes.grid("epoch", y_ticks, whole or list(x), percent)]
    if mark is not None:
        at, _ = axes.at(mark, low)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for number, (_name, ys) in enumerate(series.items()):
        points = [axes.at(a, b) for a, b in zip(x, ys, strict=True) if math.isfinite(b)]
        parts.append(f'<path class="line s{number}" d="{_path(points)}"/>')
        if len(points) < 25:
            parts += [f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in points]
    step = (WIDTH - LEFT - RIGHT) / max(len(x) - 1, 1)
    for i, epoch in enumerate(x):
        at, _ = axes.at(epoch, low)
        told = ", ".join(f"{name} {ys[i]:.2%}" if percent else f"{name} {ys[i]:.4g}" for name, ys in series.items())
        parts.append(
            f'<rect class="hit" x="{at - step / 2:.1f}" y="{TOP}" width="{step:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>epoch {_number(epoch)}: {escape(told)}</title></rect>"
        )
    return _svg(WIDTH, HEIGHT, title, "".join(parts))


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: rows are true classes, columns predictions, shade the share of the row."""
    n = len(names)
    short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    slanted = max(map(len, short)) > 3
    left = 14 + 6.4 * max(map(len, short)) + 14
    cell = 38 if n <= 12 else 26 if n <= 20 else 14
    top = (12 + 4.8 * max(map(len, short)) if slanted else 22) + 16
    parts = []
    for i, row in enumerate(matrix):
        total = sum(row)
        y = top + i * cell
        parts.append(f'<text class="name" x="{left - 6:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="end">'
                     f"{escape(short[i])}</text>")  # fmt: skip
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            kind = "right" if i == j else "wrong"
            shade = 0.04 if not count else 0.12 + 0.88 * share if i == j else min(1.0, 0.25 + 2.5 * share)
            tip = f"{names[i]} taken for {names[j]}: {count} of {total} ({share:.1%})"
            x = left + j * cell
            parts.append(
                f'<rect class="cell {kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1.5}" height="{cell - 1.5}" '
                f'rx="2.5" fill-opacity="{shade:.2f}"><title>{escape(tip)}</title></rect>'
            )
            if count and cell >= 26:
                tone = "on" if shade > 0.55 else "off"
                parts.append(f'<text class="count {tone}" x="{x + cell / 2 - 0.75:.1f}" y="{y + cell / 2 + 3.6:.1f}" '
                             f'text-anchor="middle">{count}</text>')  # fmt: skip
    for j, name in enumerate(short):
        x = left + j * cell + cell / 2
        turn = f' transform="rotate(-50 {x:.1f} {top - 7:.1f})"' if slanted else ""
        anchor = "start" if slanted else "middle"
        parts.append(
            f'<text class="name" x="{x:.1f}" y="{top - 7:.1f}" text-anchor="{anchor}"{turn}>{escape(name)}</text>'
        )
    room = 5 * max(map(len, short)) if slanted else 0
    width, height = left + n * cell + room, top + n * cell + 4
    parts.append(f'<text class="tick" x="{left:.1f}" y="10">predicted →</text>')
    parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{top - 7:.1f}" text-anchor="end">true ↓</text>')
    return _svg(width, height, "confusion matrix", "".join(parts), "max-width:" + f"{width * 1.15:.0f}px")


def reliability(
    bins: Sequence[tuple[float, float, float, float, int]],
    words: tuple[str, str, str] = ("images", "confidence", "right"),
) -> str:
    """Calibration: (from, to, mean confidence, accuracy, images) for each bin that holds images.

    words: what is counted, what the model gives to each, and what of them is shown.
    """
    counted, given, shown = words
    axes = _Axes((0, 1), (0, 1), (WIDTH, 300))
    most = max((count for *_, count in bins), default=1)
    a, b = axes.at(0, 0), axes.at(1, 1)
    parts = [
        axes.grid(f"{given} of the prediction", (0, 0.25, 0.5, 0.75, 1), (0, 0.25, 0.5, 0.75, 1), percent=True),
        f'<path class="ideal" d="{_path([a, b])}"/>',
    ]
    for low, high, confidence, accuracy, count in bins:
        (x0, y0), (x1, _) = axes.at(low, 0), axes.at(high, 0)
        _, y = axes.at(0, accuracy)
        tip = f"{count} {counted} with {given} {low:.0%} to {high:.0%} (mean {confidence:.1%})"
        tip += f": {accuracy:.1%} are {shown}"
        parts.append(
            f'<rect class="bar" x="{x0 + 1:.1f}" y="{y:.1f}" width="{x1 - x0 - 2:.1f}" height="{max(y0 - y, 1):.1f}" '
            f'fill-opacity="{0.18 + 0.72 * math.sqrt(count / most):.2f}"><title>{escape(tip)}</title></rect>'
        )
        cx, cy = axes.at(confidence, accuracy)
        parts.append(f'<circle class="dot s1" cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{escape(tip)}</title></circle>')
    return _svg(WIDTH, 300, "calibration: accuracy over confidence", "".join(parts))


def precision_recall(curves: Mapping[str, Sequence[float]]) -> str:
    """Precision over recall, each curve at recalls of equal distances from 0 to 1."""
    axes = _Axes((0, 1), (0, 1), (WIDTH, 300))
    quarters = (0, 0.25, 0.5, 0.75, 1)
    parts = [axes.grid("recall", quarters, quarters, percent=True)]
    for number, (name, values) in enumerate(curves.items()):
        recalls = [i / (len(values) - 1) for i in range(len(values))]
        points = [axes.at(x, y) for x, y in zip(recalls, values, strict=True)]
        parts.append(f'<path class="line s{number}" d="{_path(points)}"/>')
        for x, y in list(zip(recalls, values, strict=True))[:: max(1, len(values) // 20)]:
            cx, cy = axes.at(x, y)
            tip = f"{name}: precision {y:.1%} at a recall of {x:.0%}"
            parts.append(f'<circle class="dot s{number}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.4">'
                         f"<title>{escape(tip)}</title></circle>")  # fmt: skip
    return _svg(WIDTH, 300, "precision over recall", "".join(parts))


def histogram(bins: Sequence[tuple[float, float, int, int]]) -> str:
    """Confidence of right and wrong predictions: (from, to, right, wrong) for each bin."""
    most = max((right + wrong for _, _, right, wrong in bins), default=1)
    _, high = _round_out(0, most)
    axes = _Axes((0, 1), (0, high), (WIDTH, 300))
    whole = [tick for tick in ticks(0, high, 4) if float(tick).is_integer()]
    parts = [axes.grid("confidence of the prediction", whole, (0, 0.25, 0.5, 0.75, 1))]
    for low, to, right, wrong in bins:
        (x0, y0), (x1, y1) = axes.at(low, 0), axes.at(to, wrong)
        _, y2 = axes.at(to, wrong + right)
        tip = f"confidence {low:.0%} to {to:.0%}: {right} right, {wrong} wrong"
        for css, top, bottom in (("s1", y1, y0), ("s0", y2, y1)):
            if bottom - top > 0:
                parts.append(f'<rect class="pile {css}" x="{x0 + 1:.1f}" y="{top:.1f}" width="{x1 - x0 - 2:.1f}" '
                             f'height="{bottom - top:.1f}"><title>{escape(tip)}</title></rect>')  # fmt: skip
    return _svg(WIDTH, 300, "confidence of right and wrong predictions", "".join(parts))


def shares(parts_of: Sequence[tuple[str, str, float]], label: str) -> str:
    """One bar cut into (name, css class, share of 1)."""
    x, drawn = 0.0, []
    for name, css, share in parts_of:
        width = 720 * share
        tip = f"{name}: {share:.1%}"
        drawn.append(f'<rect class="kind {css}" x="{x:.2f}" y="0" width="{max(width - 1.2, 0.3):.2f}" height="34" '
                     f'rx="2"><title>{escape(tip)}</title></rect>')  # fmt: skip
        if share > 0.075:
            drawn.append(
                f'<text class="count {css}" x="{x + width / 2:.1f}" y="21.5" text-anchor="middle">{share:.0%}</text>'
            )
        x += width
    return _svg(720, 34, label, "".join(drawn), "max-width:none")


def stacks(bars: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], unit: str, label: str) -> str:
    """Bars on one scale, each with its name above it and cut into (name, css class, value)."""
    longest = max((sum(value for *_, value in parts) for _, parts in bars), default=1.0) or 1.0
    y, drawn = 0.0, []
    for name, parts in bars:
        total = sum(value for *_, value in parts)
        drawn.append(f'<text class="name" x="0" y="{y + 13:.0f}">{escape(name)}</text>')
        drawn.append(f'<text class="tick" x="720" y="{y + 13:.0f}" text-anchor="end">{total:.2f} {escape(unit)}</text>')
        x = 0.0
        for part, css, value in parts:
            width = 720 * value / longest
            tip = f"{name}: {part} {value:.3g} {unit}, {value / total:.1%}" if total else part
            drawn.append(f'<rect class="kind {css}" x="{x:.2f}" y="{y + 19:.0f}" width="{max(width - 1, 0.2):.2f}" '
                         f'height="26" rx="2"><title>{escape(tip)}</title></rect>')  # fmt: skip
            if width > 42:
                drawn.append(f'<text class="count {css}" x="{x + width / 2:.1f}" y="{y + 36:.1f}" '
                             f'text-anchor="middle">{value / total:.0%}</text>')  # fmt: skip
            x += width
        y += 62
    return _svg(720, max(y - 12, 1), label, "".join(drawn), "max-width:none")


_STANDALONE = """<style>
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1d2126}
.tick{font-size:12px;fill:#5d6670}.grid{stroke:#dcd9d2}.s0{--c:#1f5f8b}.s1{--c:#b4541a}
circle{fill:var(--c)}path{stroke:var(--c);fill:none;stroke-width:1.6;stroke-opacity:.55}.s0.key,.s1.key{fill:var(--c);
font-weight:600}.back{fill:#fff}.title{font-size:15px;font-weight:600}
@media(prefers-color-scheme:dark){text{fill:#e6e8ea}.tick{fill:#9aa4ae}.grid{stroke:#32383f}.s0{--c:#6cb2e6}
.s1{--c:#f0a36b}.back{fill:#14171a}}
</style>"""


def scatter(
    title: str, x_label: str, y_label: str, families: Mapping[str, Sequence[tuple[str, float, float]]], source: str
) -> str:
    """A picture of its own: (name, x, y) of each family, joined in the order of x."""
    width, height = 760, 440
    every = [(x, y) for rows in families.values() for _, x, y in rows]
    low = math.floor(min(y for _, y in every) - 0.15)
    high = math.ceil(max(y for _, y in every) + 0.15)
    right = max(x for x, _ in every) * 1.12
    axes = _Axes((0, right), (low, high), (width, height - 56))
    parts = [axes.grid(x_label, ticks(low, high, 5), ticks(0, right, 8))]
    taken = [(cx - 7, cy + 5, 14.0) for cx, cy in (axes.at(x, y) for x, y in every)]  # the points themselves
    keys = []
    for number, (family, rows) in enumerate(families.items()):
        ordered = sorted(rows, key=lambda row: row[1])
        points = [axes.at(x, y) for _, x, y in ordered]
        parts.append(f'<path class="s{number}" d="{_path(points)}"/>')
        for (name, x, y), (cx, cy) in zip(ordered, points, strict=True):
            tip = f"{name}: {y:g}% at {x:.2f} GMACs"
            parts.append(
                f'<circle class="s{number}" cx="{cx:.1f}" cy="{cy:.1f}" r="5"><title>{escape(tip)}</title></circle>'
            )
            parts.append(_label(name, cx, cy, width, taken))
        at = width - 14 - 100 * (len(families) - 1 - number)
        keys.append(f'<text class="s{number} key" x="{at}" y="26" text-anchor="end">● {escape(family)}</text>')
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">{_STANDALONE}<rect class="back" width="{width}" height="{height}" '
        f'rx="6"/><text class="title" x="{LEFT - 30}" y="26">{escape(title)}</text>'
        f'<text class="tick" x="{LEFT - 30}" y="43">{escape(y_label)}. {escape(source)}</text>'
        f'{"".join(keys)}<g transform="translate(0 52)">{body}</g></svg>\n'
    )


def _label(name: str, cx: float, cy: float, width: float, taken: list[tuple[float, float, float]]) -> str:
    """The name beside its point, in the first place that no other label holds."""
    wide = 7.0 * len(name)
    places = [(cx + 7, cy + 17), (cx - 7 - wide, cy - 8), (cx + 9, cy + 4.5), (cx - wide / 2, cy - 11)]
    free = [
        (x, y)
        for x, y in places
        if 0 < x < width - wide and all(abs(y - b) > 15 or x + wide < a or x >= a + w for a, b, w in taken)
    ]
    x, y = (free or places)[0]
    taken.append((x, y, wide))
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(name)}</text>'
