"""Two stored measurements side by side: what became faster, what slower, and where that cannot be said."""

import json
from pathlib import Path
from typing import Any

from muntin.errors import UserError
from muntin.measure.results import Row, aligned
from muntin.measure.statistics import rounded

Key = tuple[str, str, str, int, int, int]
MACHINE = ("cpu", "cores", "flags", "system", "gpu", "cuda")
PROTOCOL = ("threads", "device", "timer", "cuda_graphs", "rounds", "seconds_per_target")


def read(path: str | Path) -> dict[str, Any]:
    """A stored measurement. UserError where the file is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content["rows"]]
        return content | {"rows": rows, "machine": content["machine"], "versions": content["versions"]}
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; write one with: muntin bench NAME --json {path}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no results of muntin bench ({error}); write some with --json") from error


def compare(a: str | Path, b: str | Path) -> str:
    """A table of the rows that both hold, with how many times faster b is and that ratio's interval, and warnings
    where they were not measured alike. UserError where a file holds no results or they share no row.
    """
    first, second = read(a), read(b)
    before, after = ({_key(row): row for row in content["rows"]} for content in (first, second))
    shared = [key for key in before if key in after]
    if not shared:
        raise UserError(
            f"{a} and {b} have no row in common (model, engine, precision, batch, size): nothing to compare"
        )
    pairs = [(before[key], after[key]) for key in shared]
    columns = [
        ["model", *(key[0] for key in shared)],
        ["engine", *(key[1] for key in shared)],
        ["precision", *(key[2] for key in shared)],
        ["batch", *(str(key[3]) for key in shared)],
        ["size", *(f"{key[4]}x{key[5]}" for key in shared)],
        [f"{Path(a).name} ms", *(_time(x) for x, _ in pairs)],
        [f"{Path(b).name} ms", *(_time(y) for _, y in pairs)],
        ["speed of the second", *(_verdict(x, y) for x, y in pairs)],
    ]
    lines = [*aligned(columns), ""]
    lines += [f"only in {a}: {_name(row)}" for key, row in before.items() if key not in after]
    lines += [f"only in {b}: {_name(row)}" for key, row in after.items() if key not in before]
    lines += ["ratios are of medians measured apart: their intervals hold only if the machine was as idle both times"]
    return "\n".join(lines + [f"warning: {text}" for text in differences(first, second)])


def ratio(before: Row, after: Row) -> tuple[float, tuple[float, float]]:
    """Time before over time after, and the interval that the two medians' intervals allow."""
    low, high = before.interval_ms[0] / after.interval_ms[1], before.interval_ms[1] / after.interval_ms[0]
    return before.median_ms / after.median_ms, (low, high)


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Where machine, protocol or versions differ."""
    found = []
    for part, names in (("machine", MACHINE), ("protocol", PROTOCOL), ("versions", None)):
        one, two = first.get(part, {}), second.get(part, {})
        for name in names or dict.fromkeys([*one, *two]):
            if one.get(name) != two.get(name):
                found.append(f"{name} differs: {_said(one.get(name))} against {_said(two.get(name))}")
    return found


def _key(row: Row) -> Key:
    return (row.model or row.target, row.engine, row.precision, row.batch, row.height, row.width)


def _name(row: Row) -> str:
    model, engine, precision, batch, height, width = _key(row)
    return f"{model}, {engine}, {precision}, batch {batch}, {height}x{width}"


def _time(row: Row) -> str:
    half = (row.interval_ms[1] - row.interval_ms[0]) / 2
    return f"{rounded(row.median_ms, half)} ± {rounded(half, half)}"


def _verdict(before: Row, after: Row) -> str:
    times, (low, high) = ratio(before, after)
    if low <= 1 <= high:
        return "tie"
    half = (high - low) / 2
    return f"{rounded(times, half)}x ({rounded(low, half)} to {rounded(high, half)})"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "unknown" if value is None else str(value)
