"""The same training for every row of a grid: the papers' ablations, or one's own.

A sweep is a YAML file: `recipe` (what all rows start from), settings that all share, and `runs`, from a row's name to
its departures from them. Every row is trained from each seed into OUT/ROW/seed-S, as `muntin train` would; what is
finished stays when the sweep is called again, and what was stopped goes on.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from muntin.errors import UserError, nearest
from muntin.run import TITLES, Run, atomic_write, read_json, write_json
from muntin.tasks.asked import ask, stored_settings
from muntin.tasks.base import Diverged
from muntin.tasks.ranks import Ranks
from muntin.tasks.recipes import read_config
from muntin.tasks.resuming import changed
from muntin.tasks.settings import settings_from

SHARED = ("recipe", "runs")


@dataclass(frozen=True)
class Sweep:
    """What is trained: `runs` maps a row's name to its settings, over `settings`, over those of `recipe`."""

    name: str
    recipe: str | None
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]


@dataclass
class Row:
    """A row's outcome: `accuracies` (0 to 1, on the test split, or the validation split where there is none) by seed in
    the order trained, `diverged` the seeds whose training failed, with the reason. On data of several labels they are
    mean average precisions: `metric` is "map".
    """

    name: str
    parameters: int = 0
    gmacs: float = 0.0
    latency_ms: float | None = None
    accuracies: dict[int, float] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    metric: str = "accuracy"

    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None


def sweeps() -> dict[str, Path]:
    """The sweeps that come with the package, by name."""
    folder = Path(str(resources.files("muntin"))) / "recipes" / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_sweep(given: str | os.PathLike[str]) -> Sweep:
    """A sweep by its name or file. Raises `UserError` naming what is wrong with it."""
    known = sweeps()
    name = os.fspath(given)
    if name not in known and not Path(name).exists():
        raise UserError(
            f"there is no sweep {name!r}{nearest(name, known)}; valid are {', '.join(known)}, or a YAML file with runs"
        )
    values = read_config(known.get(name, Path(name)))
    runs = values.get("runs")
    if not isinstance(runs, dict) or not runs or not all(isinstance(row, dict) for row in runs.values()):
        raise UserError(f"{name} has no rows; write them as in runs: {{wide: {{model.dim: 128}}, narrow: {{...}}}}")
    named = {str(row): dict(departures) for row, departures in runs.items()}
    if odd := [row for row in named if not row or row.startswith(".") or "/" in row or os.sep in row]:
        raise UserError(f"{name}: the row {odd[0]!r} is no name of a folder; use letters, digits and hyphens")
    settings = {key: value for key, value in values.items() if key not in SHARED}
    return Sweep(Path(name).stem, values.get("recipe"), settings, named)


def sweep(
    given: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    report: Callable[[str], None] = print,
    **settings: Any,
) -> list[Row]:
    """Train every row of a sweep from every seed, then time the models interleaved.

    OUT (default runs/NAME) then holds sweep.json, sweep.md and sweep.png beside the runs' folders. `settings` are as in
    `train` and hold for all rows. A row whose training diverges is a result, not an error. Raises `UserError` as
    `train` does. Several processes, each of which calls it, train one row after another together.
    """
    from muntin.tasks.training import train

    ranks = Ranks()
    if not ranks.first:
        report = _nothing
    plan = read_sweep(given)
    folder = Path(out) if out is not None else Path("runs") / plan.name
    stored = ranks.agree(lambda: _stored(folder))
    rows = [stored.get(name, Row(name)) for name in plan.runs]
    _refuse_wrong_rows(plan, settings)
    total = len(rows) * len(seeds)
    for number, (row, seed) in enumerate(((row, seed) for seed in seeds for row in rows), start=1):
        place = folder / row.name / f"seed-{seed}"
        told = plan.settings | plan.runs[row.name] | settings | {"seed": seed}
        if seed in row.diverged and not _told_otherwise(place, plan.recipe, told):
            report(f"[{number}/{total}] {place}: diverged before ({row.diverged[seed]})")
            continue
        report(f"[{number}/{total}] {place}")
        try:
            run = train(place, resume=True, recipe=plan.recipe, report=report, **told)
        except Diverged as error:
            row.diverged[seed] = str(error)
            report(f"{place} diverged: {error}")
        else:
            _note(row, seed, run)
        if ranks.first:
            _write(folder, plan, rows)
    if ranks.first:
        _time(folder, rows)
        _write(folder, plan, rows)
        picture(rows, folder / "sweep.png")
    ranks.wait()
    return rows


def _nothing(_line: str) -> None:
    """What processes but the first report."""


def _refuse_wrong_rows(plan: Sweep, settings: Mapping[str, Any]) -> None:
    """Raises `UserError` before the first training for what is wrong with the last."""
    from muntin.tasks.training import resolved

    for name, departures in plan.runs.items():
        try:
            resolved(plan.recipe, None, **(plan.settings | departures | dict(settings)))
        except UserError as error:
            raise UserError(f"{plan.name}, row {name}: {error}") from error


def _told_otherwise(place: Path, recipe: str | None, told: Mapping[str, Any]) -> bool:
    """Whether a run that was begun had other settings: `train` then says which."""
    if not (place / "config.yaml").exists():
        return True
    stored = stored_settings(place)
    return bool(changed(stored, settings_from(stored.flat(), ask(None, recipe, None, told).told)))


def _stored(folder: Path) -> dict[str, Row]:
    """The rows of an earlier call, without those of runs that are gone."""
    path = folder / "sweep.json"
    if not path.exists():
        return {}
    rows = {}
    for entry in read_json(path)["rows"]:
        for by_seed in ("accuracies", "diverged"):
            entry[by_seed] = {int(seed): value for seed, value in entry[by_seed].items()}
        entry.pop("mean"), entry.pop("deviation")
        rows[entry["name"]] = Row(**entry)
    return rows


def _note(row: Row, seed: int, run: Run) -> None:
    from muntin.measure.cost import costs

    if not row.gmacs:
        found = costs([str(run.path)], training=False)[str(run.path)]
        row.parameters, row.gmacs = found.parameters, found.gmacs
    row.metric = run.metric
    accuracy = run.metrics[f"test_{run.metric}"]
    if seed not in row.accuracies:
        row.seconds += run.metrics["seconds"]
    row.accuracies[seed] = run.metrics[f"val_{run.metric}"] if accuracy is None else accuracy


def _time(folder: Path, rows: Sequence[Row]) -> None:
    """Median latency of one image, all rows in turns in one measurement."""
    from muntin.measure import bench

    trained = {str(folder / row.name / f"seed-{min(row.accuracies)}"): row for row in rows if row.accuracies}
    if not trained:
        return
    found = bench(list(trained), batch_sizes=(1,), seconds=0.5, progress=False)
    for place, measured in zip(trained, found.rows, strict=True):
        trained[place].latency_ms = measured.median_ms


def _write(folder: Path, plan: Sweep, rows: Sequence[Row]) -> None:
    listed = [asdict(row) | {"mean": row.mean(), "deviation": row.deviation()} for row in rows]
    write_json(folder / "sweep.json", {"name": plan.name, "recipe": plan.recipe, "rows": listed})
    atomic_write(folder / "sweep.md", (table(rows) + "\n").encode())


def picture(rows: Sequence[Row], path: Path) -> None:
    """Accuracy of every row: a point for each seed, a line at their mean, the GMACs beside the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        values = [100 * accuracy for accuracy in row.accuracies.values()]
        axes.plot(values, [place] * len(values), "o", color="#2a6f97", alpha=0.6)
        if values:
            axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color="#2a6f97")
    names = [f"{row.name}  ({row.gmacs:.3g} GMACs{', diverged' if row.diverged else ''})" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{_title(rows)}, % (points: seeds, lines: means)")
    axes.grid(axis="x", alpha=0.3)
    atomic_write(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| row | test {_title(rows)} | seeds | diverged | parameters | GMACs | batch 1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mean, deviation = row.mean(), row.deviation()
        accuracy = "-" if mean is None else f"{mean:.2%}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")
        latency = "-" if row.latency_ms is None else f"{row.latency_ms:.2f} ms"
        lines.append(
            f"| {row.name} | {accuracy} | {len(row.accuracies)} | {len(row.diverged)} | "
            f"{f'{row.parameters:,} | {row.gmacs:.4f}' if row.parameters else '- | -'} | {latency} |"
        )
    return "\n".join(lines)


def _title(rows: Sequence[Row]) -> str:
    return TITLES[rows[0].metric]


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" as numbers. Raises `UserError` where it is something else."""
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--seeds {text}: give whole numbers with commas between, as in 0,1,2") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {text}: give each seed once, none below 0")
    return seeds
