"""One self-contained page about a run, and the picture of published accuracy over cost.

The page asks for nothing from elsewhere: styles, charts (svg.py) and images are inside. Whatever a user named
(classes, files, settings) is escaped. A part that needs something not there yet says which command makes it.
"""

import argparse
import json
import os
import random
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn

from muntin.errors import UserError
from muntin.measure import labels_page, svg
from muntin.measure.bench import MODELS
from muntin.measure.labels_page import SeenLabels
from muntin.measure.page import data_uri, document, figure, key, meter, missing, section, table
from muntin.measure.profile import KINDS, Profile, profile
from muntin.measure.run_page import (
    RunPage,
    configuration,
    curves,
    duration,
    headline,
    latency,
    millions,
    reproduce,
    several,
)
from muntin.measure.seen import BINS, Seen, calibration, look, wilson
from muntin.measure.statistics import rounded
from muntin.run import TITLES, Run, atomic_write

SAMPLES = 24  # images shown with their predictions
WORST = 12  # mistakes shown
NUMBERED = 40  # classes up to which a confusion matrix is drawn


@dataclass(frozen=True)
class _Page(RunPage):
    """What the sections draw from. `seen` is None, with `why` not, where the held-out images are not there."""

    model: nn.Module
    seen: Seen | SeenLabels | None
    why: str


# ---------------------------------------------------------------------------------------------------- the parts


def _headline(page: _Page) -> str:
    run, metrics = page.run, page.run.metrics
    from muntin.measure.cost import cost

    height, width = run.preprocessing["size"]
    found = cost(page.model, (height, width))
    cards: list[tuple[str, str, str]] = []
    if isinstance(page.seen, SeenLabels):
        cards += labels_page.cards(page.seen)
    elif page.seen is not None:
        right, total = int(page.seen.right.sum()), len(page.seen.labels)
        low, high = wilson(right, total)
        detail = f"{right} of {total} images; 95% between {low:.1%} and {high:.1%}"
        cards.append((f"{page.seen.accuracy:.2%}", f"{escape(page.seen.split)} accuracy", detail))
        cards.append((f"{calibration(page.seen.probabilities, page.seen.labels)[1]:.1%}", "calibration error",
                      f"mean gap of confidence and accuracy, {BINS} bins"))  # fmt: skip
    elif metrics.get(f"test_{run.metric}") is not None:
        cards.append(
            (f"{metrics[f'test_{run.metric}']:.2%}", f"test {TITLES[run.metric]}", "as recorded after training")
        )
    if metrics.get("latency_ms") is not None:
        cards.append(
            (
                f"{rounded(metrics['latency_ms'], 0.05 * metrics['latency_ms'])} ms",
                "latency, batch 1",
                "median, PyTorch",
            )
        )
    cards.append((millions(found.parameters), "parameters", f"{found.gmacs:.3g} GMACs at {height} × {width} pixels"))
    if metrics.get("seconds"):
        cards.append((duration(metrics["seconds"]), "training", f"{metrics.get('epochs', '?')} epochs"))
    return headline(cards)


def _confusions(seen: Seen) -> list[tuple[int, str, str]]:
    matrix = seen.confusion()
    pairs = [
        (matrix[i][j], seen.classes[i], seen.classes[j])
        for i in range(len(matrix))
        for j in range(len(matrix))
        if i != j and matrix[i][j]
    ]
    return sorted(pairs, reverse=True)


def _confusion(page: _Page) -> str:
    if page.seen is None:
        return section("confusion", "Confusion", "", f'<p class="missing">{escape(page.why)}</p>')
    seen = page.seen
    if isinstance(seen, SeenLabels):
        return labels_page.classes(seen)
    wrong = _confusions(seen)
    lead = "No held-out image is taken for another class."
    if wrong:
        told = [f"<b>{escape(a)}</b> taken for <b>{escape(b)}</b> ({n})" for n, a, b in wrong[:3]]
        lead = "Most frequent mistakes: " + ", ".join(told) + "."
    if len(seen.classes) <= NUMBERED:
        body = svg.heat_map(seen.confusion(), seen.classes)
    else:
        rows = [[escape(a), escape(b), str(n)] for n, a, b in wrong[:30]]
        body = table(("true class", "taken for", "images"), rows)
    body += _classes(seen)
    return section("confusion", "Classes", lead, f'<div class="two">{body}</div>')


def _classes(seen: Seen) -> str:
    matrix = seen.confusion()
    rows = []
    for i, name in enumerate(seen.classes):
        total, taken, right = sum(matrix[i]), sum(row[i] for row in matrix), matrix[i][i]
        recall, precision = right / total if total else 0.0, right / taken if taken else 0.0
        f1 = 2 * right / (total + taken) if total + taken else 0.0
        rows.append((f1, [escape(name), str(total), meter(recall), meter(precision), f"{f1:.3f}"]))
    shown = [cells for _, cells in rows]
    note = ""
    if len(rows) > NUMBERED:
        shown = [cells for _, cells in sorted(rows, key=lambda row: row[0])[:NUMBERED]]
        note = f'<p class="note">The {NUMBERED} classes with the lowest F1 of {len(rows)}.</p>'
    return "<div>" + table(("class", "images", "recall", "precision", "F1"), shown) + note + "</div>"


def _tile(seen: Seen | SeenLabels, index: int, full: bool) -> str:
    if isinstance(seen, SeenLabels):
        return labels_page.tile(seen, index, full)
    uri, small = data_uri(seen.picture(seen.images.open(index)))
    label, guess = int(seen.labels[index]), int(seen.predicted[index])
    confidence = float(seen.probabilities[index, guess])
    true, said = seen.classes[label], seen.classes[guess]
    key = str(seen.images.keys[index])
    state = "right" if label == guess else "wrong"
    text = f"<b>{escape(said)}</b> {confidence:.0%}"
    if label != guess:
        text += f'<br><span class="muted">is {escape(true)}</span>'
    if full:
        text += f'<br><span class="muted">loss {float(seen.losses[index]):.2f}</span>'
    truth = float(seen.probabilities[index, label])
    tip = f"{key}: predicted {said} with {confidence:.1%}, truly {true} with {truth:.1%}"
    pixels = ' class="pixels"' if small else ""
    return (
        f'<figure class="tile {state}" title="{escape(tip)}"><img{pixels} src="{uri}" alt="{escape(key)}" '
        f'width="96" height="96" loading="lazy"><figcaption>{text}</figcaption></figure>'
    )


def _samples(page: _Page) -> str:
    if page.seen is None:
        return ""
    seen = page.seen
    chosen = sorted(random.Random(0).sample(range(len(seen.labels)), min(SAMPLES, len(seen.labels))))
    tiles = "".join(_tile(seen, i, full=False) for i in chosen)
    lead = (
        f"{len(chosen)} of {len(seen.labels)} {escape(seen.split)} images, drawn at random; red where the model errs."
    )
    return section("samples", "Predictions", lead, f'<div class="tiles">{tiles}</div>')


def _mistakes(page: _Page) -> str:
    if page.seen is None:
        return ""
    seen = page.seen
    wrong = [i for i in seen.losses.argsort(descending=True).tolist() if not bool(seen.right[i])]
    if not wrong:
        chosen = seen.losses.argsort(descending=True)[:WORST].tolist()
        lead = f"All {len(seen.labels)} are right; these are the least certain."
    else:
        chosen, lead = wrong[:WORST], f"{len(wrong)} of {len(seen.labels)} are wrong; these by the largest loss."
    tiles = "".join(_tile(seen, i, full=True) for i in chosen)
    return section("mistakes", "Worst mistakes", lead, f'<div class="tiles">{tiles}</div>')


def _calibrated(page: _Page) -> str:
    if page.seen is None:
        return ""
    if isinstance(page.seen, SeenLabels):
        return labels_page.calibrated(page.seen)
    bins, gap = calibration(page.seen.probabilities, page.seen.labels)
    mean = float(page.seen.probabilities.max(1).values.mean())
    tends = "modest: it is right more often than it says" if mean < page.seen.accuracy else "overconfident"
    lead = (
        f"The predictions are made with {mean:.1%} confidence on average and {page.seen.accuracy:.1%} are right; "
        f"the model is {tends}. Expected calibration error <b>{gap:.2%}</b>."
    )
    confidence = page.seen.probabilities.max(1).values
    number = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    counts = [torch.bincount(number[chosen], minlength=BINS).tolist() for chosen in (page.seen.right, ~page.seen.right)]
    piles = [(b / BINS, (b + 1) / BINS, counts[0][b], counts[1][b]) for b in range(BINS)]
    body = '<div class="two">'
    body += figure(svg.reliability(bins), "Share that is right")
    body += figure(svg.histogram(piles), "Images", key(["right", "wrong"]))
    note = '<p class="note">On the dashed line confidence is accuracy. The stronger a bar, the more images.</p>'
    return section("calibration", "Calibration", lead, body + "</div>" + note)


def _time(page: _Page) -> str:
    height, width = page.run.preprocessing["size"]
    profiles: list[Profile] = []
    for batch in (1, 8):
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        profiles.append(profile(page.model, images, calls=5))
    body = ""
    order = sorted(KINDS, key=lambda kind: -profiles[-1].kinds[kind])
    for found in profiles:
        parts = [(kind, f"k{KINDS.index(kind)}", found.share(kind)) for kind in order if found.share(kind) > 0]
        body += f'<p class="barname">batch {found.shape[0]}</p>' + svg.shares(parts, f"time at batch {found.shape[0]}")
    rows = [
        [f'<span class="swatch k{KINDS.index(kind)}"></span>{kind}']
        + [cell for found in profiles for cell in (f"{found.kinds[kind]:.2f}", f"{found.share(kind):.1%}")]
        for kind in order
        if any(found.share(kind) >= 0.0005 for found in profiles)
    ]
    rows.append(["measured wall time"] + [c for found in profiles for c in (f"{found.wall_ms:.2f}", "100.0%")])
    head = ("kind of operation", "ms, batch 1", "share", "ms, batch 8", "share")
    lead = f"At batch 8, <b>{order[0]}</b> takes {profiles[-1].share(order[0]):.0%} of the time."
    note = (
        f"PyTorch, {several(profiles[0].threads, 'thread')}, measured while this page was made with the profiler on; "
        f"without it {profiles[0].plain_ms:.2f} ms and {profiles[1].plain_ms:.2f} ms. Unattributed is Python and "
        "launching; window shifting counts every roll and gather."
    )
    return section("time", "Where the time goes", lead, body + table(head, rows) + f'<p class="note">{note}</p>')


def _export(page: _Page) -> str:
    path = page.run.path / "model.onnx"
    if not path.exists():
        body = missing("This run has not been exported yet.", page.command("export", " --to onnx"))
        return section("export", "Export", "", body)
    import onnx

    from muntin.runtime.engines import load
    from muntin.runtime.export import TOLERANCE, default_sizes, verify

    height, width = page.run.preprocessing["size"]
    sizes, batches = default_sizes((height, width)), (1, 2, 5)
    checks = verify(page.model, load(path), sizes, batches)
    by_case = {(c.height, c.width, c.batch): c.error for c in checks}
    rows = [[f"{h} × {w}", *(f"{by_case[h, w, b]:.1e}" for b in batches)] for h, w in sizes]
    worst = max(c.error for c in checks)
    passed = all(c.error <= TOLERANCE for c in checks)
    verdict = '<b class="good">agrees</b>' if passed else '<b class="bad">does not agree</b>'
    lead = (
        f"<code>model.onnx</code> {verdict} with PyTorch: the largest difference is {worst:.1e} standard deviations of "
        f"the logits, the bound {TOLERANCE:.0e}."
    )
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node).most_common(8)
    told = ", ".join(f"{count} {escape(kind)}" for kind, count in kinds)
    note = (
        f"{path.stat().st_size / 1e6:.1f} MB, {len(graph.node)} nodes, most of them {told}. Any batch, height and "
        "width. Compared in ONNX Runtime while this page was made."
    )
    body = table(("image", *(f"batch {b}" for b in batches)), rows, "compact")
    return section("export", "Export check", lead, body + f'<p class="note">{note}</p>')


def _commands(page: _Page) -> str:
    where = shlex.quote(page.path)
    held = f"{where}/held_out" if (page.run.path / "held_out").is_dir() else "IMAGES"
    lines = [
        page.command("eval"),
        page.command("export", " --to onnx"),
        page.command("predict", f" {held} --out {where}/predictions.csv"),
        page.command("bench"),
        page.command("report"),
    ]
    return reproduce(page, lines)


SECTIONS: tuple[tuple[str, Callable[[_Page], str]], ...] = (
    ("training curves", curves),
    ("confusion", _confusion),
    ("samples", _samples),
    ("mistakes", _mistakes),
    ("calibration", _calibrated),
    ("latency", latency),
    ("profile", _time),
    ("export check", _export),
    ("configuration", configuration),
    ("commands", _commands),
)


def _assemble(page: _Page, body: str) -> str:
    run = page.run
    title = escape(run.path.resolve().name)
    data = page.seen.data if page.seen else str(run.metrics.get("data", "images"))
    told = f"<b>{escape(run.name)}</b>, trained on {escape(data)}: {len(run.classes)} classes"
    return document(
        f"{title}: {escape(run.name)}", title, told, _headline(page), body, "Made by <code>muntin report</code>."
    )


def report(run: Run | str | os.PathLike[str]) -> Path:
    """Write `<run>/report.html`, one self-contained page, and return its path. Of a detector or a segmenter see
    `muntin.measure.dense_report`.

    run: a finished run or its folder. Held-out images are evaluated, the model is profiled and an exported file
    compared while the page is made; `muntin bench` and `muntin export` add their parts when they have run.
    Raises UserError where the folder holds no finished run or cannot be written.
    """
    from muntin.progress import progress

    opened = run if isinstance(run, Run) else Run.open(run)
    if opened.task != "classify":
        from muntin.measure.dense_report import dense_report

        return dense_report(opened)
    path = opened.path
    model = opened.model()
    seen, why = None, ""
    try:
        seen = look(opened, model)
    except UserError as error:
        why = f"The held-out images are not at hand: {error}"
    page = _Page(opened, str(path), model, seen, why)
    parts = [draw(page) for _, draw in progress(SECTIONS, len(SECTIONS), "report")]
    return atomic_write(path / "report.html", _assemble(page, "".join(parts)).encode())


def summary(run: Run) -> str:
    """What a run has come to, as a short table of names and values."""
    metrics, path = run.metrics, run.path
    name = f"{run.head} on {run.name}" if run.head else run.name
    rows = [("model", f"{name}, {metrics.get('parameters', 0):,} parameters")]
    if run.head:
        split = metrics.get("split", "test")
        told = [(kind, metrics.get(kind)) for kind in ("box_ap", "mask_ap", "miou")]
        rows += [(f"{split} {TITLES[kind]}", f"{value:.2%}") for kind, value in told if value is not None]
    for split in ("test", "val"):
        if (value := metrics.get(f"{split}_{run.metric}")) is not None:
            rows.append((f"{split} {TITLES[run.metric]}", f"{value:.2%}"))
    if metrics.get("seconds") is not None:
        rows.append(("trained", f"{metrics.get('epochs')} epochs in {duration(metrics['seconds'])}"))
    if metrics.get("latency_ms") is not None:
        rows.append(("latency", f"{metrics['latency_ms']:.3g} ms for one image"))
    for name, what in (("model.onnx", "exported"), ("predictions.csv", "predictions"), ("report.html", "report")):
        if (path / name).exists():
            rows.append((what, str(path / name)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def pareto(table: Path | None = None) -> str:
    """Published top-1 over GMACs as an SVG, from the generated table of models.

    A row without a complete figure is left out: text such as "82.x", or a figure after other pre-training.
    """
    rows = json.loads((table or MODELS / "table.json").read_text(encoding="utf-8"))
    families: dict[str, list[tuple[str, float, float]]] = {}
    for row in rows:
        if re.fullmatch(r"\d+(\.\d+)?", str(row.get("top1") or "")):
            family = "Swin-Free" if row["name"].startswith("swin_free") else row["name"].split("_")[0].capitalize()
            families.setdefault(family, []).append((row["name"], row["gmacs"], float(row["top1"])))
    if not families:
        raise UserError("no row of the table has a complete accuracy; write it first: python -m muntin.measure.cost")
    return svg.scatter(
        "Accuracy and cost of the models",
        "GMACs of one image, every matrix product counted",
        "ImageNet-1K top-1, %, as published",
        families,
        "Figures known in part are left out.",
    )


def main() -> None:
    """`python -m muntin.measure.report --pareto docs/pareto.svg`."""
    parser = argparse.ArgumentParser(description="draw published accuracy over cost")
    parser.add_argument("--pareto", nargs="?", const="docs/pareto.svg", required=True, help="the SVG to write")
    atomic_write(parser.parse_args().pareto, pareto().encode())


if __name__ == "__main__":
    main()
