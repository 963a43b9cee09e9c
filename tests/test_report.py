"""The report: complete, self-contained, escaped, right, and honest about what is missing."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import muntin
from muntin.data.sources import open_splits
from muntin.errors import UserError
from muntin.measure import report, svg
from muntin.measure.bench import bench
from muntin.measure.report import pareto
from muntin.measure.seen import calibration, look, wilson
from muntin.run import Run, atomic_write, save_model, write_json
from muntin.runtime.export import export
from muntin.tasks.inference import calibration_error

CLASSES = ["<script>alert(1)</script>"[:8] + "&", "b'\"c", "plain"]
PREPROCESSING: dict[str, Any] = {
    "size": (32, 32),
    "resize": None,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bicubic",
    "channels": "RGB",
}
HISTORY = """epoch,train_loss,val_loss,val_accuracy,lr,seconds
1,1.2,1.1,0.4,0.001,1.5
2,0.9,0.8,0.7,0.002,1.4
3,0.8,0.9,0.6,0.0001,1.4
"""
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Tags are balanced; collects ids, links and whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a":
            self.links.add(found["href"])
        else:
            self.fetched += [found[name] or "" for name in ("src", "href", "xlink:href", "data") if name in found]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def _read(path) -> tuple[str, Checker]:
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return page, checker


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on an image folder whose class names are markup, without training."""
    root = tmp_path_factory.mktemp("report")
    images = root / "data"
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (images / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(images / name / f"{i}<i>.png")
    folder = root / "a run"
    torch.manual_seed(0)
    model = muntin.create_model("swin_t", num_classes=3, dim=16, depths=(1, 1, 2, 1), heads=(1, 2, 4, 8))
    splits = open_splits(str(images), 0, 32)
    save_model(folder / "model.safetensors", model, classes=splits.train.classes, preprocessing=PREPROCESSING)
    write_json(folder / "split.json", splits.json())
    atomic_write(folder / "config.yaml", f"data: {json.dumps(str(images))}\nmodel: swin_t\n".encode())
    atomic_write(folder / "history.csv", HISTORY.encode())
    Run.open(folder).update_metrics(
        model="swin_t", test_accuracy=None, epochs=3, seconds=4.3, weights="ema", best_epoch=2
    )
    return folder


def test_a_page_before_bench_and_export(trained):
    path = report(str(trained))
    assert path == trained / "report.html"
    page, checker = _read(path)
    # nothing from elsewhere: every source is inside, no style imports, no address of a server
    assert checker.fetched and all(source.startswith("data:image/") for source in checker.fetched)
    assert not re.search(r"https?://|@import|url\(", page)
    # every section, and links that lead somewhere
    wanted = {"training", "confusion", "samples", "mistakes", "calibration", "latency", "time", "export"}
    assert wanted | {"configuration", "reproduce"} <= checker.ids
    assert {link.removeprefix("#") for link in checker.links} <= checker.ids
    # what is missing says how to make it, with the path quoted for a shell
    assert f"muntin bench '{trained}'" in checker.text
    assert f"muntin export '{trained}' --to onnx" in checker.text
    assert f"muntin train --config '{trained}'/config.yaml" in checker.text
    assert "prefers-color-scheme:dark" in page and "@media print" in page and "width=device-width" in page
    assert "70.00%" in checker.text and "after epoch 2 of 3" in checker.text


def test_names_are_text_and_never_markup(trained):
    page, checker = _read(report(trained))
    for name in CLASSES:
        assert name in checker.text
    assert "<script" not in page and CLASSES[0] not in page
    assert "<i>.png" not in page  # file names in tooltips


def test_the_page_says_what_the_model_does(trained):
    run = Run.open(trained)
    seen = look(run, run.model())
    assert len(seen.labels) == len(seen.images) == 12 and seen.split == "test"
    _, checker = _read(report(run))
    right = int(seen.right.sum())
    assert f"{right} of 12 images" in checker.text
    assert f"{seen.accuracy:.2%}" in checker.text
    wrong = seen.losses[~seen.right].max()
    assert f"loss {float(wrong):.2f}" in checker.text
    logits = seen.probabilities.log()
    torch.testing.assert_close(seen.losses, nn.functional.cross_entropy(logits, seen.labels, reduction="none"))
    assert sum(map(sum, seen.confusion())) == 12
    assert sum(seen.confusion()[i][i] for i in range(3)) == right


def test_with_bench_and_export(trained, monkeypatch):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    toy = Toy().eval()
    monkeypatch.setattr(Run, "model", lambda self: toy)
    export(toy, trained / "model.onnx", preprocessing=PREPROCESSING, progress=False)
    bench([str(trained)], (1, 2), rounds=3, seconds=0.03, progress=False)
    try:
        _, checker = _read(report(trained))
        assert "model.onnx agrees with PyTorch" in checker.text
        assert "this run/model.onnx (ONNX Runtime)" in checker.text and "interleaved rounds" in checker.text
        assert "muntin bench" not in checker.text.split("Reproduce")[0].split("Where the time goes")[0]
        with torch.no_grad():
            toy.conv.weight += 0.1
        assert "model.onnx does not agree with PyTorch" in _read(report(trained))[1].text
    finally:
        (trained / "model.onnx").unlink()
        (trained / "bench.json").unlink()


def test_images_that_are_gone_are_said_to_be(trained, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model.safetensors", "metrics.json"):
        (folder / name).write_bytes((trained / name).read_bytes())
    _, checker = _read(report(folder))
    assert "not at hand" in checker.text and "no history" in checker.text
    assert {"confusion", "time", "configuration"} <= checker.ids


def test_a_model_without_mistakes(trained, monkeypatch):
    run = Run.open(trained)
    labels = look(run, run.model()).labels

    class Oracle(nn.Module):
        def forward(self, x):
            if len(x) != len(labels):
                return torch.zeros(len(x), 3)
            return 5 * nn.functional.one_hot(labels, 3).float()

    monkeypatch.setattr(Run, "model", lambda self: Oracle())
    _, checker = _read(report(trained))
    assert "100.00%" in checker.text and "All 12 are right" in checker.text
    assert "No held-out image is taken for another class" in checker.text


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="no run"):
        report(tmp_path / "missing")
    with pytest.raises(UserError, match="no checkpoint"):
        report(tmp_path)


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0


def test_calibration_is_that_of_eval():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 7, generator=generator, dtype=torch.double).mul(2).softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    bins, gap = calibration(probabilities, labels)
    assert gap == pytest.approx(calibration_error(probabilities, labels))
    assert sum(count for *_, count in bins) == 500
    assert all(low < mean <= high for low, high, mean, _, _ in bins)


@pytest.mark.parametrize("bounds", [(0, 1), (0.61, 1.97), (0, 3e-4), (1, 300), (-2.5, 2.5)])
def test_ticks_are_round_and_inside(bounds):
    found = svg.ticks(*bounds)
    assert 2 <= len(found) <= 11
    assert all(bounds[0] - 1e-9 <= t <= bounds[1] + 1e-9 for t in found)
    assert len({round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}) == 1


def test_curves_survive_odd_histories():
    for ys in ([0.5], [0.5, 0.5], [float("nan"), 0.2], [float("nan")]):
        drawing = svg.lines("loss", list(range(1, len(ys) + 1)), {"a": ys})
        assert "NaN" not in drawing and "nan" not in re.sub(r"<title>.*?</title>", "", drawing)


def test_figures_known_in_part_are_never_plotted(tmp_path):
    rows = [
        {"name": "swin_t", "gmacs": 4.491, "top1": "81.2"},
        {"name": "swin_s", "gmacs": 8.741, "top1": "83.2"},
        {"name": "swin_free_t", "gmacs": 4.712, "top1": "82.x"},
        {"name": "swin_l", "gmacs": 34.5, "top1": "86.3 (22k pre-training)"},
        {"name": "swin_free_b_br_dr12", "gmacs": 12.145, "top1": "83.3"},
        {"name": "swin_free_s", "gmacs": 9.2, "top1": None},
    ]
    table = tmp_path / "table.json"
    table.write_text(json.dumps(rows))
    drawing = pareto(table)
    assert all(name in drawing for name in ("swin_t:", "swin_s:", "swin_free_b_br_dr12:"))
    assert not any(name in drawing for name in ("swin_free_t:", "swin_l:", "swin_free_s:", "82.x"))
    table.write_text(json.dumps(rows[2:4]))
    with pytest.raises(UserError, match="complete accuracy"):
        pareto(table)
