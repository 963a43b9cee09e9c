"""The parts of a run's page that all tasks have: training, latency, configuration, commands."""

import csv
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

import torch

from muntin.measure import svg
from muntin.measure.machine import commit, machine, versions
from muntin.measure.page import figure, key, missing, section, table
from muntin.measure.statistics import rounded
from muntin.run import TITLES, Run


@dataclass(frozen=True)
class RunPage:
    """What the sections draw from: a run, and its path as it was given."""

    run: Run
    path: str

    def command(self, name: str, rest: str = "") -> str:
        return f"muntin {name} {shlex.quote(self.path)}{rest}"


def duration(seconds: float) -> str:
    """As a person would say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def millions(count: int) -> str:
    """A count of parameters."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def curves(page: RunPage) -> str:
    """Losses, validation and learning rate over the epochs."""
    path = page.run.path / "history.csv"
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        body = missing("There is no history of this run's training.", "muntin train --out " + shlex.quote(page.path))
        return section("training", "Training", "", body)
    run = page.run
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    title = TITLES[run.metric]
    epochs, accuracy = columns["epoch"], columns[f"val_{run.metric}"]
    kept = int(run.metrics.get("best_epoch") or len(rows))
    known = {"training": "train_loss", "validation": "val_loss"}  # detectors have a loss in training alone
    loss = {name: columns[column] for name, column in known.items() if column in columns}
    body = '<div class="three">'
    body += figure(svg.lines("loss", epochs, loss, mark=kept), "Loss", key(list(loss)) if len(loss) > 1 else "")
    body += figure(
        svg.lines(f"validation {title}", epochs, {"validation": accuracy}, percent=True, mark=kept),
        f"Validation {title}",
    )
    body += figure(svg.lines("learning rate", epochs, {"rate": columns["lr"]}, from_zero=True), "Learning rate")
    lead = (
        f"The weights after epoch {kept} of {len(rows)} are kept (dashed), with a validation {title} of "
        f"<b>{accuracy[kept - 1]:.2%}</b>; {duration(sum(columns['seconds']))} in all."
    )
    if run.metrics.get("weights") == "ema":
        lead += " They are the moving average."
        lead += " Training loss is of augmented, smoothed targets." if run.task == "classify" else ""
    return section("training", "Training", lead, body + "</div>")


def latency(page: RunPage) -> str:
    """What `muntin bench` has measured."""
    path = page.run.path / "bench.json"
    if not path.exists():
        body = missing("This run has not been measured yet.", page.command("bench"))
        return section("latency", "Latency", "", body)
    bench = json.loads(path.read_text(encoding="utf-8"))
    most = {batch: max(r["median_ms"] for r in bench["rows"] if r["batch"] == batch) for batch in
            {row["batch"] for row in bench["rows"]}}  # fmt: skip
    rows = []
    for row in bench["rows"]:
        low, high = row["interval_ms"]
        half = (high - low) / 2
        bar = f'<span class="meter" style="--v:{100 * row["median_ms"] / most[row["batch"]]:.1f}%">'
        rows.append(
            [
                escape(_short(row["target"], page.path)),
                str(row["batch"]),
                f"{bar}{rounded(row['median_ms'], half)} ± {rounded(half, half)}</span>",
                rounded(row["p90_ms"], half),
                rounded(row["p99_ms"], half),
                rounded(row["throughput"], row["throughput"] * half / row["median_ms"]),
            ]
        )
    m, p = bench["machine"], bench["protocol"]
    where = m.get("gpu") or f"{m['cpu']}, {m['cores']} cores, {m.get('memory_gb', '?')} GB"
    lead = f"{escape(where)}; {p['dtype']}, {several(p['threads'], 'thread')}, {p['rounds']} interleaved rounds."
    body = table(("model", "batch", "median, ms", "p90", "p99", "images/s"), rows)
    note = f"± holds the median with 95% confidence. {_date(bench['created'])}, torch {bench['versions']['torch']}"
    flags = ", ".join(m.get("flags", []))
    note += f"; processor features {escape(flags)}." if flags else "."
    return section("latency", "Latency", lead, body + f'<p class="note">{note}</p>')


def _date(iso: str) -> str:
    when = datetime.fromisoformat(iso)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def several(count: int, what: str) -> str:
    """The count with its noun."""
    return f"{count} {what}" + ("s" if count != 1 else "")


def _short(target: str, path: str) -> str:
    return target.replace(path, "this run", 1) if target.startswith(path) else target


def configuration(page: RunPage) -> str:
    """The model, its preprocessing and the settings of its training."""
    run = page.run
    names = ", ".join(run.classes[:30]) + (", …" if len(run.classes) > 30 else "")
    about = {"model": run.name} | ({"head": run.head, "task": run.task} if run.head else {})
    about |= {"classes": f"{len(run.classes)}: {names}"}
    about |= {f"input {key}": plain(value) for key, value in run.preprocessing.items()}
    columns = [about, {key: plain(value) for key, value in run.model_config.items()}]
    if run.head:
        columns.append({f"head {key}": plain(value) for key, value in run.head_config.items()})
    tables = [table((), [[escape(key), escape(value)] for key, value in fields.items()], "plain") for fields in columns]
    body = f'<div class="two">{"".join(tables)}</div>'
    config = run.path / "config.yaml"
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        body += f"<details><summary>Training settings (config.yaml)</summary><pre><code>{text}</code></pre></details>"
    return section("configuration", "Configuration", "", body)


def plain(value: Any) -> str:
    """A value of a configuration as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return "none" if value is None else str(value)


def reproduce(page: RunPage, commands: Sequence[str]) -> str:
    """Commands that make the run and its files again, with the versions and the machine of this page."""
    where = shlex.quote(page.path)
    lines = list(commands)
    if (page.run.path / "config.yaml").exists():
        lines.insert(0, f"muntin train --config {where}/config.yaml --out {where}-again")
    text = escape("\n".join(lines))
    found = versions()
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    here = machine(torch.device("cpu"))
    source = commit()
    note = f"{escape(told)}; on {escape(here['cpu'])}, {here['cores']} cores"
    note += f"; source {escape(source[:12] + ('-dirty' if source.endswith('-dirty') else ''))}." if source else "."
    return section("reproduce", "Reproduce", "", f'<pre><code>{text}</code></pre><p class="note">{note}</p>')


def headline(cards: Sequence[tuple[str, str, str]]) -> str:
    """Figures for the head of the page: value, name (both HTML), explanation."""
    tiles = "".join(
        f"<div><dd>{value}</dd><dt>{label}</dt><p>{escape(detail)}</p></div>" for value, label, detail in cards
    )
    return f'<dl class="cards">{tiles}</dl>'
