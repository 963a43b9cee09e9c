"""Pictures of results, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path


def forest(points: Sequence[tuple[str, str, float, float, float]], axis: str, path: Path) -> None:
    """Ratios with their intervals, a line each: (group, series, value, low, high). 1 is marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(group for group, *_ in points))
    series = list(dict.fromkeys(name for _, name, *_ in points))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.14 * len(points) + 0.1 * len(groups)), layout="constrained")
    at = 0.0
    marks, names = [], []
    for group in groups:
        inside = [point for point in points if point[0] == group]
        marks.append(at + (len(inside) - 1) / 2)
        names.append(group)
        for _, name, value, low, high in inside:
            colour = f"C{series.index(name) % 10}"
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            axes.errorbar(
                value, at, xerr=[[value - low], [high - value]], fmt="o", ms=3.5, lw=1, color=colour, label=label
            )
            at += 1
        at += 0.8
    axes.axvline(1, color="0.5", lw=0.8)
    axes.set_yticks(marks, names, fontsize=8)
    axes.set_ylim(at, -1)
    axes.set_xlabel(axis)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
