"""Published accuracy over measured latency: what is on the front, what is drawn, what stays out."""

import json
import re
from typing import Any

import pytest

from muntin import cli
from muntin.errors import UserError
from muntin.measure.pareto import figure, page, pareto, write_pareto

FIGURES: dict[str, float] = {  # ms at batch 1, made up
    "efficientvit_m0": 10.0,
    "efficientvit_m5": 30.0,
    "swin_t": 100.0,
    "swin_free_t": 90.0,
    "rmt_t": 80.0,
    "timm:deit_tiny_patch16_224": 40.0,
    "runs/photos": 5.0,
}


def rows(engine: str = "eager", batch: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "target": name if engine == "eager" else f"{name} ({engine})", "model": name, "engine": engine,
            "precision": "float32", "batch": batch, "height": 224, "width": 224, "median_ms": ms * batch,
            "interval_ms": [0.9 * ms * batch, 1.2 * ms * batch], "throughput": 1000 / ms,
        }
        for name, ms in FIGURES.items()
    ]  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "bench.json"
    found = rows() + rows("onnx") + rows(batch=8)
    path.write_text(json.dumps({"rows": found, "protocol": {"threads": 2, "rounds": 10}, "machine": {"cpu": "a CPU"}}))
    return path


def test_the_front_and_what_is_left_out(stored):
    found = pareto(stored)
    first = [p for p in found.points if p.batch == 1 and p.how == "eager float32"]
    assert {p.model for p in first if p.front} == {"efficientvit_m0", "efficientvit_m5", "rmt_t"}
    assert {p.model for p in first} == FIGURES.keys() - {"swin_free_t", "runs/photos"}
    assert found.left_out == ["swin_free_t: 82.x (Swin-Free (arXiv 2306.13776))", "runs/photos: no published accuracy"]
    assert "a CPU, 2 threads; 10 interleaved rounds" in found.notes
    assert next(p.top1 for p in first if p.model == "timm:deit_tiny_patch16_224") == 72.2


def test_a_report_as_it_is_and_as_a_file_are_the_same(stored):
    assert pareto(json.loads(stored.read_text())) == pareto(stored)


def test_the_picture_holds_each_point_with_its_interval(stored):
    drawn = figure(pareto(stored))
    single, eight = drawn.axes
    assert (single.get_title(), eight.get_title()) == ("batch 1", "batch 8")
    shown: dict[tuple[float, float], tuple[float, float]] = {}
    for bars in single.containers:
        xs, ys = bars.lines[0].get_data()
        for x, y, segment in zip(xs, ys, bars.lines[2][0].get_segments(), strict=True):
            shown[float(x), float(y)] = segment[0][0], segment[1][0]
    assert shown.keys() == {(10, 63.2), (30, 77.1), (100, 81.2), (80, 82.4), (40, 72.2)}
    assert shown[10, 63.2] == pytest.approx((9, 12))
    assert {text.get_text() for text in single.texts} == FIGURES.keys() - {"swin_free_t", "runs/photos"}
    front = next(line for line in single.lines if line.get_label() == "front")
    assert list(map(float, front.get_xdata())) == [10, 10, 30, 30, 80, 80]  # in both engines, which took as long
    assert single.get_xscale() == "log" and front.get_drawstyle() == "steps-post"
    assert "not drawn: swin_free_t: 82.x" in drawn._supxlabel.get_text()


def test_the_page_holds_each_point_with_figures_and_source_and_needs_no_network(stored):
    text = page(pareto(stored))
    call = re.search(r'Plotly\.newPlot\(\s*"pareto",\s*(\[.*?\]),\s*\{"template"', text, re.DOTALL)
    assert call is not None
    traces = json.loads(call[1])
    told = [words for trace in traces for words in trace.get("hovertext", ())]
    assert len(told) == 3 * 5  # models in two engines, and at two batches
    (one,) = [words for words in told if words.startswith("efficientvit_m5, onnx float32")]
    for part in (
        "30 ms (95%: 27 to 36)",
        "batch 1, 224x224",
        "33.33 images/s",
        "top-1 77.1%: EfficientViT (arXiv 2305.07027)",
    ):
        assert part in one
    assert not any("swin_free_t" in words for words in told)
    below = text[call.end() :]
    assert "<li>swin_free_t: 82.x (Swin-Free (arXiv 2306.13776))</li>" in below
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)


def test_names_cannot_break_the_page():
    text = page(pareto({"rows": [*rows(), {**rows()[-1], "model": "<script>x</script>"}]}))
    assert "<script>x" not in text and "&lt;script&gt;x" in text


def test_the_command_writes_both(stored, tmp_path, capsys):
    outs = [tmp_path / "a.png", tmp_path / "a.html"]
    assert cli.main(["pareto", str(stored), "--out", *map(str, outs)]) == 0
    assert outs[0].read_bytes()[:4] == b"\x89PNG" and outs[1].read_text().startswith("<!doctype html>")
    shown = capsys.readouterr().out
    assert re.search(r"rmt_t +eager float32 +1 +80 +82.4", shown) and "not drawn: runs/photos" in shown


def test_bad_input(stored, tmp_path, capsys):
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text("{")
    other.write_text('{"rows": [{"name": 1}]}')
    with pytest.raises(UserError, match=r"\.html or \.png"):
        write_pareto(pareto(stored), tmp_path / "a.pdf")
    for path in (broken, other, tmp_path / "none.json"):
        assert cli.main(["pareto", str(path)]) == 2
        assert "muntin bench --json" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"nothing to draw.*swin_free_t: 82.x"):
        pareto({"rows": [row for row in rows() if row["model"] == "swin_free_t"]})


def test_bench_draws_one(tmp_path, capsys):
    out = tmp_path / "front.html"
    command = [
        "bench",
        "efficientvit_m0",
        "--batch",
        "1",
        "--size",
        "64",
        "--rounds",
        "2",
        "--seconds",
        "0.05",
        "--no-memory",
    ]
    assert cli.main([*command, "--pareto", str(out)]) == 0
    assert "efficientvit_m0, eager float32" in out.read_text()
    assert cli.main([*command, "--pareto", str(tmp_path / "front.gif")]) == 2
    assert ".html or .png" in capsys.readouterr().err


def test_a_missing_package(monkeypatch, tmp_path, stored):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs the package plotly.*pip install "muntin\[analysis\]"'):
        write_pareto(pareto(stored), tmp_path / "a.html")
