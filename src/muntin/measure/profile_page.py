"""Profiles side by side: a stacked picture, and an HTML page."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

from muntin.measure import page, svg
from muntin.measure.kinds import GROUPS, KINDS, UNATTRIBUTED
from muntin.measure.machine import threads_in_words
from muntin.measure.profile import Profile

SHOWN = 25  # operations of each profile on the page
_GROUP_CSS = dict(zip((*GROUPS, UNATTRIBUTED), ("k0", "k7", "k4", "k6", "k8", "k9", "k10"), strict=True))
_BOUND_CSS = {"computing": "k0", "memory": "k6", "overhead in operations": "k9", "outside operations": "k10"}


def _colours(dark: bool = False) -> dict[str, str]:
    return dict(zip(KINDS, page.KIND_COLOURS[int(dark)].split(), strict=True))


def picture(profiles: Sequence[Profile]) -> bytes:
    """A PNG: one stacked bar of milliseconds by kind for each profile, and below it one of shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = _colours()
    shown = [kind for kind in KINDS if any(p.share(kind) >= 0.001 for p in profiles)]
    width = max(7.0, 1.15 * len(profiles) + 3.5)
    figure, (left, right) = pyplot.subplots(2, 1, figsize=(width, 8.5), sharex=True, layout="constrained")
    try:
        labels = ["\n".join(_lines(p)) for p in profiles]
        for axis, scale in ((left, None), (right, 100.0)):
            base = [0.0] * len(profiles)
            for kind in shown:
                heights = [scale * p.share(kind) if scale else p.kinds[kind] for p in profiles]
                axis.bar(
                    range(len(profiles)),
                    heights,
                    0.72,
                    base,
                    color=colours[kind],
                    label=kind,
                    edgecolor="white",
                    linewidth=0.5,
                )
                for i, height in enumerate(heights):
                    if scale and height > 6:
                        tone = "black" if kind == UNATTRIBUTED else "white"
                        text = f"{height:.0f}"
                        axis.text(i, base[i] + height / 2, text, ha="center", va="center", fontsize=8, color=tone)
                base = [b + h for b, h in zip(base, heights, strict=True)]
            axis.spines[["top", "right"]].set_visible(False)
        for i, p in enumerate(profiles):
            left.text(i, p.wall_ms, f"{p.wall_ms:.3g}", ha="center", va="bottom", fontsize=8)
        left.set_ylabel("ms of one pass")
        right.set_ylabel("% of the wall time")
        right.set_xticks(range(len(profiles)), labels, fontsize=7.5)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False, fontsize=8.5)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()
    finally:
        pyplot.close(figure)


def _lines(found: Profile) -> list[str]:
    """A profile's label in lines short enough to stand under a bar or over a column."""
    lines, line = [], ""
    for part in re.split(r"(?<=[_:/ ])", found.name or "model"):
        if line and len(line) + len(part) > 15:
            lines.append(line)
            line = ""
        line += part
    return [*lines, line, *found.label.split(", ")[-2:]]


def html(profiles: Sequence[Profile], where: str) -> str:
    """One self-contained page. where: the machine and the versions, in words."""
    body = _kinds(profiles) + _groups(profiles) + _stages(profiles) + _bounds(profiles)
    body += "".join(_operations(found, number) for number, found in enumerate(profiles, 1)) + _attribution(profiles)
    first = profiles[0]
    told = f"{escape(where)}; {threads_in_words(first.threads)}, {first.precision}, {escape(first.device)}"
    names = ", ".join(dict.fromkeys(p.name or "model" for p in profiles))
    footer = "Made by <code>muntin profile</code>."
    return page.document("Where the time goes", "Where the time goes", f"{escape(names)}. {told}", "", body, footer)


def _legend(css: Mapping[str, str]) -> str:
    marks = "".join(f'<span><span class="swatch {c}"></span>{escape(name)}</span>' for name, c in css.items())
    return f'<p class="note" style="display:flex;flex-wrap:wrap;gap:2px 18px">{marks}</p>'


def _bars(profiles: Sequence[Profile], values: Sequence[Mapping[str, float]], css: Mapping[str, str]) -> str:
    bars = [
        (p.label, [(name, css[name], found[name]) for name in css if found.get(name, 0.0) > 0])
        for p, found in zip(profiles, values, strict=True)
    ]
    used = {name: c for name, c in css.items() if any(found.get(name, 0.0) > 0 for found in values)}
    return svg.stacks(bars, "ms", "milliseconds of one pass") + _legend(used)


def _matrix(profiles: Sequence[Profile], values: Sequence[Mapping[str, float]], names: Sequence[str], what: str) -> str:
    rows = []
    for name in names:
        if any(found.get(name, 0.0) > 0 for found in values):
            cells = [
                f"{found.get(name, 0.0):.2f} <span class='muted'>{found.get(name, 0.0) / p.wall_ms:.1%}</span>"
                for p, found in zip(profiles, values, strict=True)
            ]
            rows.append([_whole(name), *cells])
    rows.append([_whole("measured"), *(f"{p.wall_ms:.2f} <span class='muted'>100.0%</span>" for p in profiles)])
    return page.table([_whole(what), *("<br>".join(map(escape, _lines(p))) for p in profiles)], rows)


def _whole(text: str) -> str:
    """Text that is not broken where a table is wider than the page."""
    return f'<span style="white-space:nowrap">{escape(text)}</span>'


def _kinds(profiles: Sequence[Profile]) -> str:
    css = {kind: f"k{i}" for i, kind in enumerate(KINDS)}
    values = [p.kinds for p in profiles]
    note = "; ".join(f"{escape(p.label)} {p.plain_ms:.2f} ms" for p in profiles)
    note = f"Milliseconds of one pass with the profiler on. Without it: {note}."
    if len({p.engine for p in profiles}) > 1 and any(p.kinds["attention"] for p in profiles):
        note += (
            " Where an engine has no kernel for a whole attention, its parts stand under matrix product and softmax."
        )
    body = _bars(profiles, values, css)
    if len(profiles) > 1:
        shares = [
            (p.label, [(kind, css[kind], 100 * p.share(kind)) for kind in KINDS if p.kinds[kind] > 0]) for p in profiles
        ]
        body += svg.stacks(shares, "%", "per cent of the wall time")
    body += _matrix(profiles, values, KINDS, "kind, ms") + f'<p class="note">{note}</p>'
    return page.section("kinds", "By kind of operation", "", body)


def _groups(profiles: Sequence[Profile]) -> str:
    values = [p.groups for p in profiles]
    rest = ", ".join(f"{escape(p.label)} {p.memory_bound / p.wall_ms:.0%}" for p in profiles)
    lead = f"The kinds of EfficientViT's figure 2. Memory-bound, that is all but multiplication: {rest}."
    names = (*GROUPS, UNATTRIBUTED)
    body = _bars(profiles, values, _GROUP_CSS) + _matrix(profiles, values, names, "kind, ms")
    return page.section("groups", "As in figure 2", lead, body)


def _stages(profiles: Sequence[Profile]) -> str:
    values = [{stage: sum(kinds.values()) for stage, kinds in p.stages.items()} for p in profiles]
    names = list(dict.fromkeys(stage for found in values for stage in found if stage not in ("head", UNATTRIBUTED)))
    names += ["head", UNATTRIBUTED]
    css = {stage: f"k{i % 9}" for i, stage in enumerate(names)} | {UNATTRIBUTED: "k10"}
    body = _bars(profiles, values, css) + _matrix(profiles, values, names, "stage, ms")
    return page.section("stages", "By stage", "", body)


def _bounds(profiles: Sequence[Profile]) -> str:
    bounded = [(p, p.bounds, p.peaks) for p in profiles if p.bounds is not None and p.peaks is not None]
    if not bounded:
        return ""
    shown = [p for p, *_ in bounded]
    values = [dict(zip(_BOUND_CSS, (b.compute, b.memory, b.overhead, b.outside), strict=True)) for _, b, _ in bounded]
    floors = [
        [
            escape(p.label),
            f"{b.floor_ms:.2f}",
            f"{p.distance:.2f}",
            f"{k.gflops:.0f}",
            f"{k.gbps:.1f}",
            f"{k.ridge:.1f}",
        ]
        for p, b, k in bounded
    ]
    lead = (
        "An operation's time up to its bound, which is the larger of its FLOPs at the machine's measured best and its "
        "bytes at the measured bandwidth, and its time beyond. The floor is the sum of the bounds of products alone."
    )
    head = ("profile", "floor, ms", "times the floor", "GFLOP/s", "GB/s", "ridge, FLOP/byte")
    body = _bars(shown, values, _BOUND_CSS) + _matrix(shown, values, list(_BOUND_CSS), "bound by, ms")
    return page.section("bounds", "Against the machine", lead, body + page.table(head, floors))


def _operations(found: Profile, number: int) -> str:
    rows = [
        [
            f'<span class="swatch k{KINDS.index(o.kind)}"></span><span style="display:inline-block;width:17em;'
            f'vertical-align:top">{escape(o.name)}</span>',
            escape(o.stage),
            f"{o.ms:.3f}",
            f"{o.ms / found.wall_ms:.1%}",
            str(o.calls),
            f"{o.flops / 1e6:.1f}",
            f"{o.bytes / 1e6:.2f}",
            f"{o.intensity:.1f}",
            o.bound,
            f"{o.ms / o.bound_ms:.1f}" if o.bound_ms else "",
        ]
        for o in found.operators[:SHOWN]
    ]
    head = ("operation", "stage", "ms", "share", "calls", "MFLOP", "MB", "FLOP/byte", "bound", "times its bound")
    return page.section(f"operations-{number}", escape(found.label), "", page.table(head, rows))


def _attribution(profiles: Sequence[Profile]) -> str:
    by_engine = {p.engine: p.how for p in profiles}
    text = "".join(f"<p><b>{escape(engine)}</b>: {escape(how)}.</p>" for engine, how in by_engine.items())
    notes = [f"{escape(p.label)}: {escape(note)}" for p in profiles for note in p.notes]
    text += "".join(f'<p class="note">{note}</p>' for note in notes)
    return page.section("attribution", "How the time was attributed", "", text)
