"""One model to several targets, told in one table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muntin.errors import UserError, nearest
from muntin.runtime.export import OPSET, ExportReport, export
from muntin.runtime.precision import precision as full_precision
from muntin.runtime.sources import Source
from muntin.runtime.targets import TARGETS, ExportError, Fixed


@dataclass(frozen=True)
class Outcome:
    """One target's report, or why there is none: `failed` a check, or `refused` before one."""

    target: str
    path: Path
    precision: str
    report: ExportReport | None = None
    failed: str = ""
    refused: str = ""

    @property
    def result(self) -> str:
        if self.report is not None:
            return self.report.result
        return "failed" if self.failed else "refused"

    def json(self) -> dict[str, Any]:
        if self.report is not None:
            return json.loads(self.report.json())
        reason = self.failed or self.refused
        return {"target": self.target, "path": str(self.path), "result": self.result, "reason": reason}


def suffixes(names: Sequence[str]) -> list[str]:
    """The suffixes of targets by name. UserError for an unknown one."""
    by_name = {target.name: suffix for suffix, target in TARGETS.items()}
    for name in names:
        if name not in by_name:
            raise UserError(f"--to {name} is unknown{nearest(name, by_name)}; valid are {', '.join(by_name)}")
    return list(dict.fromkeys(by_name[name] for name in names))


def places(source: Source, names: Sequence[str], out: str | None) -> list[Path]:
    """Where each target's file goes: `out` is a file for one target, a folder for several."""
    if out is None:
        return [source.folder / f"{source.stem}{suffix}" for suffix in suffixes(names or ["onnx"])]
    path = Path(out)
    if path.suffix in TARGETS:
        own = TARGETS[path.suffix].name
        if set(names) - {own}:
            raise UserError(f"--out {out} is a file of {own}; for --to {','.join(names)} give a folder")
        return [path]
    wanted = suffixes(names or ["onnx"])
    if path.suffix and not path.is_dir() and len(wanted) == 1:
        raise UserError(f"--out {out}: a file of {TARGETS[wanted[0]].name} ends in {wanted[0]}")
    return [path / f"{source.stem}{suffix}" for suffix in wanted]


def export_several(
    source: Source,
    paths: Sequence[Path],
    *,
    precision: str = "float32",
    fixed: Fixed | None = None,
    with_preprocessing: bool = False,
    opset: int | None = None,
) -> list[Outcome]:
    """Export to each path, whatever happens to the others. A single one's UserError is raised."""
    precision = full_precision(precision)
    outcomes = []
    for path in paths:
        name = TARGETS[path.suffix].title
        try:
            report = export(
                source.model,
                path,
                classes=source.classes,
                multi_label=source.multi_label,
                preprocessing=source.preprocessing,
                with_preprocessing=with_preprocessing,
                precision=precision,
                fixed=fixed,
                opset=opset or OPSET,
                pictures=source.pictures,
            )
            outcomes.append(Outcome(name, report.path, precision, report))
        except ExportError as error:
            outcomes.append(Outcome(name, path, precision, failed=str(error)))
        except UserError as error:
            if len(paths) == 1:
                raise
            outcomes.append(Outcome(name, path, precision, refused=str(error)))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each target; below it, what could not be run and why, and notes."""
    rows = [("target", "file", "precision", "size", "checks", "largest error", "bound", "result")]
    below = []
    for outcome in outcomes:
        report, result = outcome.report, outcome.result
        if report is None:
            rows.append((outcome.target, str(outcome.path), outcome.precision, "-", "-", "-", "-", result))
            below.append(f"{outcome.target} {result}: {outcome.failed or outcome.refused}")
            continue
        size = f"{report.bytes / 1e6:.1f} MB"
        error = "-" if report.max_error is None else f"{report.max_error:.1e}"
        checks, bound = (str(len(report.checks)), f"{report.tolerance:g}") if report.checks else ("-", "-")
        rows.append((outcome.target, str(report.path), report.precision, size, checks, error, bound, result))
        below += [f"{outcome.target}: {note}" for note in report.notes]
        if report.not_run is not None:
            below.append(f"{outcome.target} not run: {report.not_run}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{text:>{w}}" if 3 <= i <= 6 else f"{text:<{w}}"
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *below])


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 where a check failed, 2 where something was refused, otherwise 0."""
    results = {outcome.result for outcome in outcomes}
    return 1 if "failed" in results else 2 if "refused" in results else 0


def parse_sides(text: str, option: str, count: int) -> tuple[int, ...]:
    """ "1x224x224" as numbers. UserError where there are not `count` of them, each of at least 1."""
    parts = text.lower().split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) for part in parts):
        example = "1x224x224, which is batch, height and width" if count == 3 else "224x320, which is height and width"
        raise UserError(f"{option} {text}: give numbers such as {example}")
    return tuple(map(int, parts))


def parse_size(text: str) -> tuple[int, int]:
    """ "224" or "224x320" as height and width."""
    sides = parse_sides(text if "x" in text.lower() else f"{text}x{text}", "--size", 2)
    return sides[0], sides[1]


def parse_indices(text: str) -> tuple[int, ...]:
    """ "1,2,3" as stage numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--out-indices {text}: give stage numbers such as 1,2,3") from None
