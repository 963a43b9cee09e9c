"""Swin-Free's table 5 on the handwritten digits: do windows that change help at equal cost?

    python benchmarks/digits_windows.py --seeds 0 1 2      # the sweep digits_windows; called again it goes on

Results go to benchmarks/results/digits_windows.json, .md and .png. Rows of one seed share its images, so each row is
compared with the one without change or shift seed by seed.
"""

import argparse
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from muntin.measure.machine import machine, versions
from muntin.run import atomic_write, write_json
from muntin.tasks.sweep import Row, picture, sweep

RESULTS = Path(__file__).parent / "results"
FOLDER = Path("runs/digits-windows")
PLAIN = "2-2-2-2"


def gain(row: Row, plain: Row) -> tuple[float, float]:
    """Mean of the differences in accuracy over the seeds that both have, and its standard error."""
    differences = [row.accuracies[seed] - plain.accuracies[seed] for seed in row.accuracies.keys() & plain.accuracies]
    if len(differences) < 2:
        return (differences[0] if differences else math.nan), math.nan
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def noise(rows: list[Row]) -> float:
    """Standard deviation of a run's accuracy over seeds, pooled over the rows; NaN with one seed."""
    variances = [deviation**2 for row in rows if (deviation := row.deviation()) is not None]
    return math.sqrt(statistics.fmean(variances)) if variances else math.nan


def table(rows: list[Row]) -> str:
    seeds = sorted({seed for row in rows for seed in row.accuracies})
    plain = next(row for row in rows if row.name == PLAIN)
    heads = ["windows", "MMACs", "parameters", "test accuracy", *(f"seed {seed}" for seed in seeds), f"over {PLAIN}"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in rows:
        mean, (difference, error) = row.mean(), gain(row, plain)
        accuracy = "diverged" if mean is None else f"{mean:.2%}"
        cells = [row.name, f"{1e3 * row.gmacs:.2f}", f"{row.parameters:,}", accuracy]
        cells += [f"{row.accuracies[seed]:.2%}" if seed in row.accuracies else "-" for seed in seeds]
        cells.append("-" if row is plain else f"{100 * difference:+.2f} ± {100 * error:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    by_chance = 100 * noise(rows) * math.sqrt(2 / len(seeds))
    said = (
        f"A run's standard deviation over seeds, pooled over the rows, is {100 * noise(rows):.2f} points; the means of "
        f"two rows that are equally good differ by {by_chance:.2f} (standard error)."
    )
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, help="processes that read images, instead of the recipe's one")
    args = parser.parse_args()
    rows = sweep("digits_windows", FOLDER, seeds=args.seeds, workers=args.workers)
    found = {"rows": [asdict(row) for row in rows], "noise": noise(rows), "versions": versions()}
    write_json(RESULTS / "digits_windows.json", found | {"machine": machine(torch.device("cpu"))})
    atomic_write(RESULTS / "digits_windows.md", (table(rows) + "\n").encode())
    picture(rows, RESULTS / "digits_windows.png")
    print(table(rows))


if __name__ == "__main__":
    main()
