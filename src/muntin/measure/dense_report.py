"""One self-contained page about a run of detection or segmentation, from what training and evaluation left there."""

import base64
import io
import shlex
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from muntin.measure import svg
from muntin.measure.page import document, figure, key, meter, missing, section, table
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
from muntin.measure.statistics import rounded
from muntin.run import TITLES, Run, atomic_write, read_json

ROWS = 40  # classes shown
PICTURES = 8  # shown
WIDE = 1000  # pixels of a picture, at most
KINDS = {"box": "boxes", "mask": "masks"}
SIZES = {
    "ap_small": "small, below 32 × 32 pixels",
    "ap_medium": "medium, below 96 × 96",
    "ap_large": "large",
}


def dense_report(run: Run) -> Path:
    """Write `<run>/report.html` and return its path.

    It shows training, figures of evaluation.json (`muntin train` and `muntin eval` write it), overall and by class,
    what is annotated beside what is predicted (`<run>/pictures`), latency where `muntin bench` has measured it, and the
    configuration. What is missing says which command makes it. Raises `UserError` where a file is damaged.
    """
    page = RunPage(run, str(run.path))
    path = run.path / "evaluation.json"
    found = read_json(path) if path.exists() else None
    accuracy = _detection if run.task != "segment" else _segmentation
    sections: tuple[Callable[[], str], ...] = (
        lambda: curves(page),
        lambda: accuracy(page, found),
        lambda: _pictures(page),
        lambda: latency(page),
        lambda: configuration(page),
        lambda: _commands(page),
    )
    title = escape(run.path.resolve().name)
    data = str(run.metrics.get("data") or (found or {}).get("data", "images"))
    count = len(run.classes)
    told = f"<b>{escape(run.head)}</b> on <b>{escape(run.name)}</b>, trained on {escape(data)}: " + (
        "1 class" if count == 1 else f"{count} classes"
    )
    body = "".join(draw() for draw in sections)
    html = document(
        f"{title}: {escape(run.head)} on {escape(run.name)}", title, told, _headline(page, found), body,
        "Made by <code>muntin report</code>.",
    )  # fmt: skip
    return atomic_write(run.path / "report.html", html.encode())


def _headline(page: RunPage, found: dict[str, Any] | None) -> str:
    metrics, cards = page.run.metrics, []
    if found is not None and "figures" in found:
        for kind in KINDS:
            ap, ap50 = found["figures"].get(f"{kind}_ap"), found["figures"].get(f"{kind}_ap50")
            if ap is not None:
                detail = f"IoU .5:.95; {ap50:.1%} at IoU .5; {several(found['images'], 'image')}"
                cards.append((f"{ap:.1%}", f"{escape(found['split'])} {TITLES[f'{kind}_ap']}", detail))
    elif found is not None:
        detail = f"{found['aacc']:.1%} of all pixels right; {several(found['images'], 'image')}"
        cards.append((f"{found['miou']:.1%}", f"{escape(found['split'])} mIoU", detail))
    if metrics.get("latency_ms") is not None:
        side = " × ".join(map(str, page.run.preprocessing["size"]))
        cards.append(
            (f"{rounded(metrics['latency_ms'], 0.05 * metrics['latency_ms'])} ms", "latency, batch 1",
             f"median, PyTorch, {side} pixels")
        )  # fmt: skip
    if metrics.get("parameters"):
        cards.append((millions(metrics["parameters"]), "parameters", f"{page.run.head} on {page.run.name}"))
    if metrics.get("seconds"):
        cards.append((duration(metrics["seconds"]), "training", f"{metrics.get('epochs', '?')} epochs"))
    return headline(cards)


def _detection(page: RunPage, found: dict[str, Any] | None) -> str:
    if found is None:
        body = missing("There is no evaluation of this run.", page.command("eval"))
        return section("accuracy", "Average precision", "", body)
    figures = found["figures"]
    kinds = [kind for kind in KINDS if f"{kind}_ap" in figures]
    lines = [("AP, mean over IoU .5:.95", "ap"), ("AP50, IoU .5", "ap50"), ("AP75, IoU .75", "ap75")]
    lines += [(title, name) for name, title in SIZES.items()] + [("AR100, recall of 100 an image", "ar100")]
    rows = [[title, *(_metered(figures.get(f"{kind}_{name}")) for kind in kinds)] for title, name in lines]
    named = {KINDS[kind]: found["curves"][f"{kind}_curve50"] for kind in kinds if f"{kind}_curve50" in found["curves"]}
    body = f'<div class="two">{table(("", *(KINDS[kind] for kind in kinds)), rows)}'
    body += figure(svg.precision_recall(named), "Precision at IoU .5", key(list(named))) + "</div>"
    columns = [
        (f"{kind} {title}", f"{kind}_{name}") for kind in kinds for title, name in (("AP", "ap"), ("AP50", "ap50"))
    ]
    columns += [(f"{kind} recall", f"{kind}_ar100") for kind in kinds]
    body += _classes(found["per_class"], "objects", columns, f"{kinds[-1]}_ap")
    lead = (
        f"{escape(found['data'])}, {escape(found['split'])}: {several(found['objects'], 'object')} on "
        f"{several(found['images'], 'image')}, measured as COCO does. The curve is the mean of the classes'."
    )
    return section("accuracy", "Average precision", lead, body)


def _segmentation(page: RunPage, found: dict[str, Any] | None) -> str:
    if found is None:
        body = missing("There is no evaluation of this run.", page.command("eval"))
        return section("accuracy", "Agreement", "", body)
    lines = [("mean IoU", "miou"), ("mean accuracy of the classes", "macc"), ("accuracy of all pixels", "aacc")]
    body = table((), [[title, _metered(found[name])] for title, name in lines], "compact")
    body += _classes(found["per_class"], "pixels", [("IoU", "iou"), ("accuracy", "acc")], "iou")
    lead = (
        f"{escape(found['data'])}, {escape(found['split'])}: {found['pixels']:,} annotated pixels of "
        f"{several(found['images'], 'image')}, compared at the images' own size."
    )
    return section("accuracy", "Agreement", lead, body)


def _classes(rows: Sequence[dict[str, Any]], counted: str, columns: Sequence[tuple[str, str]], by: str) -> str:
    """A table of the classes, the worst first where not all are shown."""
    note, shown = "", list(rows)
    if len(shown) > ROWS:
        known = [row for row in rows if row[by] is not None]
        shown = sorted(known, key=lambda row: row[by])[:ROWS]
        note = f'<p class="note">The {len(shown)} classes with the lowest figures of {len(rows)}.</p>'
    cells = [
        [escape(row["class"]), f"{row[counted]:,}", *(_metered(row[name]) for _, name in columns)] for row in shown
    ]
    return table(("class", counted, *(title for title, _ in columns)), cells) + note


def _metered(value: float | None) -> str:
    return "-" if value is None else meter(value)


def _pictures(page: RunPage) -> str:
    files = sorted((page.run.path / "pictures").glob("*.png"))
    if not files:
        body = '<p class="missing">There are no pictures in this run&rsquo;s folder; see what it predicts with</p>'
        body += f"<pre><code>{escape(page.command('predict', ' IMAGES --out predictions'))}</code></pre>"
        return section("pictures", "Pictures", "", body)
    shown = "".join(
        f'<figure style="margin-bottom:26px"><img src="{_embedded(file)}" alt="{escape(file.stem)}" loading="lazy" '
        f'style="max-width:100%;height:auto;border-radius:4px"><figcaption>{escape(file.stem)}</figcaption></figure>'
        for file in files[:PICTURES]
    )
    lead = "What is annotated and what is predicted, of images that were not trained on."
    if len(files) > PICTURES:
        lead += f" {PICTURES} of {len(files)} in <code>{escape(str(page.run.path / 'pictures'))}</code>."
    return section("pictures", "Pictures", lead, shown)


def _embedded(path: Path) -> str:
    """A picture inside the page, no wider than it is shown."""
    from muntin.data.images import open_image

    picture, file = open_image(path), io.BytesIO()
    picture.thumbnail((WIDE, WIDE))
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _commands(page: RunPage) -> str:
    where = shlex.quote(page.path)
    held = f"{where}/held_out" if (page.run.path / "held_out").is_dir() else "IMAGES"
    return reproduce(
        page,
        [
            page.command("eval"),
            page.command("predict", f" {held} --out {where}/predictions"),
            page.command("export", " --to onnx"),
            page.command("bench"),
            page.command("report"),
        ],
    )
