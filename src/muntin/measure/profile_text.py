"""A profile as text to read, alone and beside others."""

from collections.abc import Sequence

from muntin.measure.kinds import GROUPS, KINDS, UNATTRIBUTED
from muntin.measure.machine import threads_in_words
from muntin.measure.profile import Profile

SLOWED = 1.3  # times the pass alone from which a profile says so
SHOWN = 12  # operations in the table of one profile


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]).rstrip()


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_row(rows[0], widths), "  ".join("-" * width for width in widths), *(_row(r, widths) for r in rows[1:])]


def text(found: Profile) -> str:
    """Kinds, groups, stages, bounds and the longest operations of one profile."""
    size = "x".join(map(str, found.shape))
    title = f"{found.label}: {size}, {found.precision}, {found.device}, {threads_in_words(found.threads)}"
    rows = [["kind", "ms", "share"]]
    for kind, ms in sorted(found.kinds.items(), key=lambda item: -item[1]):
        if ms > 0:
            rows.append([kind, f"{ms:.3f}", f"{found.share(kind):.1%}"])
    rows.append(["measured", f"{found.wall_ms:.3f}", "100.0%"])
    lines = [title, *_lines(rows)]
    lines.append(
        f"without the profiler {found.plain_ms:.3f} ms; memory-bound in the paper's words (all but products) "
        f"{found.memory_bound / found.wall_ms:.1%}"
    )
    if found.wall_ms > SLOWED * found.plain_ms:
        lines.append(
            f"profiled, the pass takes {found.wall_ms / found.plain_ms:.1f} times as long: shares of small operations "
            "are largely the profiler's own cost"
        )
    hidden = [f"{kind} in {ms:.2f} ms" for kind, ms in found.fused.items() if kind == "window shifting"]
    if hidden:
        lines.append(f"fused into kernels of another kind: {', '.join(hidden)}")
    if found.groups:
        lines += ["", *_lines(_grouped(found))]
    if len(found.stages) > 1:
        lines += ["", *_lines(_staged(found))]
    lines += _bounded(found)
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _grouped(found: Profile) -> list[list[str]]:
    rows = [["as in EfficientViT's figure 2", "ms", "share"]]
    for group in (*GROUPS, UNATTRIBUTED):
        rows.append([group, f"{found.groups[group]:.3f}", f"{found.groups[group] / found.wall_ms:.1%}"])
    return rows


def _staged(found: Profile) -> list[list[str]]:
    rows = [["stage", "ms", "share", "most of it"]]
    for stage, kinds in found.stages.items():
        ms = sum(kinds.values())
        most = sorted(kinds.items(), key=lambda item: -item[1])[:2]
        told = ", ".join(f"{kind} {part / ms:.0%}" for kind, part in most) if ms else ""
        rows.append([stage, f"{ms:.3f}", f"{ms / found.wall_ms:.1%}", told])
    return rows


def _bounded(found: Profile) -> list[str]:
    p, b = found.peaks, found.bounds
    if p is None or b is None:
        return []
    rows = [["bound by", "ms", "share"]]
    named = (
        ("computing", b.compute),
        ("memory", b.memory),
        ("overhead in operations", b.overhead),
        ("outside operations", b.outside),
    )
    rows += [[name, f"{ms:.3f}", f"{ms / found.wall_ms:.1%}"] for name, ms in named]
    cached = ", ".join(f"{rate:.0f} GB/s within {size >> 20} MB" for size, rate in p.cached)
    lines = ["", *_lines(rows)]
    lines.append(
        f"peaks measured in this run: {p.gflops:.0f} GFLOP/s, {p.gbps:.1f} GB/s from memory"
        + (f" ({cached})" if cached else "")
        + f"; ridge {p.ridge:.1f} FLOP/byte"
    )
    lines.append(
        f"floor of the products {b.floor_ms:.2f} ms: the pass without the profiler takes {found.distance:.2f} times it"
    )
    rows = [["operation", "stage", "ms", "calls", "MFLOP", "MB", "FLOP/byte", "bound", "times its bound"]]
    for o in found.operators[:SHOWN]:
        times = f"{o.ms / o.bound_ms:.1f}" if o.bound_ms else "-"
        name = o.name if len(o.name) <= 52 else f"{o.name[:24]}...{o.name[-25:]}"
        intensity = f"{o.intensity:.1f}" if o.flops else "0"
        figures = [f"{o.ms:.3f}", str(o.calls), f"{o.flops / 1e6:.1f}", f"{o.bytes / 1e6:.2f}", intensity]
        rows.append([name, o.stage, *figures, o.bound, times])
    return [*lines, "", *_lines(rows)]


def beside(profiles: Sequence[Profile]) -> str:
    """Shares of the wall time by kind, one column for each profile."""
    head = ["kind", *(p.label for p in profiles)]
    rows = [head]
    for kind in KINDS:
        if any(p.kinds[kind] > 0 for p in profiles):
            rows.append([kind, *(f"{p.kinds[kind]:.2f} ms {p.share(kind):>6.1%}" for p in profiles)])
    rows.append(["measured", *(f"{p.wall_ms:.2f} ms 100.0%" for p in profiles)])
    return "\n".join(_lines(rows))
