"""Bench: the protocol, the statistics, the targets, and what it refuses."""

import importlib.util
import json
import random
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from muntin.errors import UserError
from muntin.measure import bench
from muntin.measure.bench import transformers_swin
from muntin.measure.statistics import median_interval, percentile, rounded
from muntin.measure.targets import LIBRARIES
from muntin.models import published
from muntin.run import Run, save_model

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1), "heads": (1, 2)}
QUICK: dict[str, Any] = {"rounds": 3, "seconds": 0.03, "progress": False}
PREPROCESSING: dict[str, Any] = {
    "size": (32, 32),
    "resize": None,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bicubic",
    "channels": "RGB",
}


class Sleeper(nn.Module):
    """Takes a known time and writes down that it was called."""

    def __init__(self, seconds, log=None, name=""):
        super().__init__()
        self.seconds, self.log, self.name = seconds, log, name
        self.eval()

    def forward(self, x):
        assert torch.is_inference_mode_enabled()
        if self.log is not None:
            self.log.append(self.name)
        time.sleep(self.seconds)
        return x


@pytest.fixture
def run_folder(tmp_path):
    model = muntin.create_model("swin_t", num_classes=3, **TINY)
    folder = tmp_path / "run"
    save_model(folder / "model.safetensors", model, classes=["a", "b", "c"], preprocessing=PREPROCESSING)
    Run.open(folder).update_metrics(model="swin_t", test_accuracy=0.5)
    return folder


def test_known_times_and_speeds():
    report = bench([("slow", Sleeper(0.008)), ("fast", Sleeper(0.002))], (1, 4), 8, rounds=6, seconds=0.1)
    slow, fast, *_ = report.rows
    assert [(r.target, r.batch) for r in report.rows] == [("slow", 1), ("fast", 1), ("slow", 4), ("fast", 4)]
    assert 8 <= slow.median_ms <= slow.p90_ms <= slow.p99_ms
    assert slow.interval_ms[0] <= slow.interval_ms[1]
    assert slow.throughput == pytest.approx(1000 / slow.median_ms)
    assert slow.speed == 1.0
    assert 1.5 < fast.speed and fast.speed_interval[0] > 1
    assert report.rows[2].throughput == pytest.approx(4000 / report.rows[2].median_ms)


def test_turns_are_interleaved_and_shuffled():
    log: list[str] = []
    names = ["a", "b", "c"]
    bench([(n, Sleeper(0.001, log, n)) for n in names], (1,), 8, rounds=8, seconds=0.008, seed=1, progress=False)
    turns = [n for i, n in enumerate(log) if i == 0 or log[i - 1] != n]
    turns = turns[3:]  # after the warm-up of each
    assert len(turns) >= 20  # equal neighbours across two rounds merge
    orders = {tuple(turns[i : i + 3]) for i in range(len(turns) - 2)}
    assert len({o for o in orders if len(set(o)) == 3}) > 1
    calls = {n: log.count(n) for n in names}
    assert min(calls.values()) >= 3 + 8 * 2  # warm-up, then one untimed and at least one timed call per turn


def test_ties_are_called_ties():
    model = Sleeper(0.002)
    report = bench([("one", model), ("same", model)], (1,), 8, rounds=10, seconds=0.1, progress=False)
    low, high = report.rows[1].speed_interval
    table = report.table()
    assert ("tie" in table) == (low <= 1 <= high)
    assert "95% confidence" in table and "base" in table


def test_json_records_the_protocol():
    content = json.loads(bench([("x", Sleeper(0.001))], (1,), (9, 7), **QUICK).json())
    assert content["protocol"]["threads"] == torch.get_num_threads()
    assert content["protocol"]["rounds"] == 3 and content["protocol"]["dtype"] == "float32"
    assert content["machine"]["cores"] and content["machine"]["cpu"]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"]["torch"]
    row = content["rows"][0]
    assert (row["height"], row["width"], row["target"]) == (9, 7, "x")
    assert {"median_ms", "p90_ms", "p99_ms", "throughput", "iqr_ms", "calls"} <= row.keys()


def test_threads_and_random_state_are_put_back():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    report = bench([("x", Sleeper(0.001))], (1,), 8, threads=2, **QUICK)
    assert report.protocol["threads"] == 2
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_in_training_is_not_touched():
    model = muntin.create_model("swin_t", num_classes=3, **TINY).train()
    bench([("mine", model)], (1,), 32, precision="bfloat16", **QUICK)
    assert model.training and next(model.parameters()).dtype == torch.float32


def test_a_run_gets_its_results(run_folder):
    report = bench([str(run_folder)], (1, 2), **QUICK)
    assert (report.rows[0].height, report.rows[0].width) == (32, 32)
    kept = json.loads((run_folder / "bench.json").read_text())
    assert [row["batch"] for row in kept["rows"]] == [1, 2]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["latency_ms"] == pytest.approx(report.rows[0].median_ms, abs=1e-3)
    assert metrics["test_accuracy"] == 0.5


def test_peers_by_name():
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    before = timm.layers.config._USE_FUSED_ATTN
    report = bench(["timm:resnet10t", "torchvision:squeezenet1_1"], (1,), 32, **QUICK)
    assert [row.target for row in report.rows] == ["timm:resnet10t", "torchvision:squeezenet1_1"]
    assert timm.layers.config._USE_FUSED_ATTN == before


def test_transformers_peer_has_our_shape():
    pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers_swin("swin_t", (224, 224))
        ours = muntin.create_model("swin_t")
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert peer.model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="swin_free_t.*one window"):
        transformers_swin("swin_free_t", (224, 224))


def test_default_sizes_are_the_published_ones():
    assert published("swin_free_digits")["size"] == 32
    assert published("swin_t")["size"] == 224


@pytest.mark.parametrize(
    ("targets", "options", "words"),
    [
        ([], {}, "no target"),
        (["swin_q"], {}, "swin_t"),
        (["timm:resnet5"], {}, "resnet50"),
        (["torchvision:swn_t"], {}, "swin_t"),
        (["tim:swin"], {}, "did you mean 'timm'"),
        (["hf:swin_q"], {}, "swin_t"),
        (["missing.onnx"], {}, "missing.onnx"),
        (["swin_t"], {"batch_sizes": (0,)}, "at least 1"),
        (["swin_t"], {"size": 0}, "at least 1 pixel"),
        (["swin_t"], {"precision": "bfloat"}, "bfloat16"),
        (["swin_t"], {"device": "gpu"}, "cuda"),
        (["swin_t"], {"rounds": 1}, "at least 2"),
        (["swin_t"], {"threads": 0}, "at least 1"),
        (["swin_t"], {"engine": "onx"}, "did you mean 'onnx'"),
        (["swin_t"], {"cuda_graphs": True}, "need a GPU"),
        ([__file__], {}, "no model that can be measured"),
    ],
)
def test_bad_input_names_the_remedy(targets, options, words):
    prefix, colon, _ = targets[0].partition(":") if targets else ("", "", "")
    if colon and prefix in LIBRARIES:
        pytest.importorskip(LIBRARIES[prefix])
    with pytest.raises(UserError, match=words):
        bench(targets, **options)


class Small(nn.Module):
    """Exports in a second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
        self.eval()

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def rows_by(report):
    return {(row.model, row.engine, row.precision, row.batch): row for row in report.rows}


def test_every_engine_and_precision_is_a_row():
    model = muntin.create_model("swin_t", num_classes=7, **TINY)
    engines = ["eager", "optimize", "pt2"]
    report = bench([("m", model)], (2,), 32, engine=engines, precision=["fp32", "bf16"], **QUICK)
    rows = rows_by(report)
    assert set(rows) == {("m", e, p, b) for e in engines for p in ("float32", "bfloat16") for b in (2,)}
    assert {row.base for row in report.rows} == {"m (float32)"}
    assert rows["m", "eager", "float32", 2].difference is None  # it is what the others are compared with
    for (_, engine, precision, _), row in rows.items():
        if (engine, precision) != ("eager", "float32"):
            assert row.difference is not None and row.difference <= report.protocol["bounds"][precision]
            assert (row.difference > 1e-3) == (precision == "bfloat16")
        assert row.first_call_ms > 0 and (row.export_s is not None) == (engine == "pt2")
    table = report.table()
    assert "engine" in table.splitlines()[0] and "precision" in table.splitlines()[0]


def test_onnx_runtime_is_not_measured_where_it_would_be_another():
    """Its CPU has no bfloat16 convolution; the file would run in OpenVINO."""
    pytest.importorskip("onnxruntime")
    model = muntin.create_model("swin_t", num_classes=7, **TINY)
    report = bench([("m", model)], (1,), 32, engine=["eager", "onnx"], precision=["fp32", "bf16"], **QUICK)
    assert ("onnx", "bfloat16") not in {(row.engine, row.precision) for row in report.rows}
    assert any("no bfloat16 convolution; see engine openvino" in line for line in report.skipped)


def test_what_computes_something_else_is_not_timed(monkeypatch):
    class Off(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * 1.001

    monkeypatch.setattr(muntin, "optimize", Off)
    report = bench([("m", Small())], (1,), 16, engine=["eager", "optimize"], **QUICK)
    assert [row.engine for row in report.rows] == ["eager"]
    assert "m (optimize)" in report.skipped[0] and "differ from eager float32" in report.skipped[0]
    with pytest.raises(UserError, match="nothing was measured: .*differ from eager"):
        bench([("m", Small())], (1,), 16, engine="optimize", **QUICK)


def test_a_base_by_name():
    models = [("slow", Sleeper(0.006)), ("fast", Sleeper(0.002))]
    slow, fast = bench(models, (1,), 8, base="fast", **QUICK).rows
    assert (slow.base, fast.base) == ("fast", "fast") and fast.speed == 1.0 and slow.speed < 0.7
    with pytest.raises(UserError, match="did you mean 'fast'"):
        bench(models, (1,), 8, base="fats", **QUICK)


def test_a_peer_has_our_weights_and_says_so():
    pytest.importorskip("timm")
    report = bench(["timm:efficientvit_m0", "timm:resnet10t"], (1,), rounds=2, seconds=0.01, progress=False)
    peer, other = report.rows
    assert (peer.shared, peer.another_model) == ("efficientvit_m0", False)
    assert 0 <= peer.shared_difference < 1e-4 and "BN folded" in peer.settings
    assert (other.shared, other.another_model) == (None, True)
    assert "timm:efficientvit_m0: the weights of efficientvit_m0" in report.table()
    assert "timm:resnet10t: another model" in report.table()


def test_a_peer_that_computes_something_else_at_a_size_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="with the weights of swin_t outputs differ .* at 256x256"):
        bench("timm:swin_tiny_patch4_window7_224", (1,), 256, **QUICK)  # padded after the roll


@pytest.fixture(scope="module")
def fixed_file(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("fixed") / "m.onnx"
    muntin.export(Small(), path, fixed=(2, 16, 24), progress=False)
    return str(path)


def test_a_file_runs_in_its_engine_and_precision_only(fixed_file):
    engines, precisions = ["eager", "compile", "onnx"], ["fp32", "bf16"]
    report = bench(
        [("m", Small()), fixed_file], (2,), engine=engines[::2], precision=precisions[0], size=(16, 24), **QUICK
    )
    assert [(row.model, row.engine) for row in report.rows] == [("m", "eager"), ("m", "onnx"), (fixed_file, "onnx")]
    assert report.skipped == [f"{fixed_file} (eager): it runs in ONNX Runtime only"]
    with pytest.raises(UserError, match="it runs in ONNX Runtime only"):
        bench(fixed_file, (2,), engine="compile", **QUICK)
    with pytest.raises(UserError, match="the file is in float32"):
        bench(fixed_file, (2,), precision="bf16", **QUICK)


def test_a_size_or_batch_outside_a_fixed_export(fixed_file):
    report = bench(fixed_file, (1, 2), **QUICK)
    assert [(row.batch, row.height, row.width) for row in report.rows] == [(2, 16, 24)]
    assert len(report.skipped) == 1 and "batch 1, 16x24" in report.skipped[0]
    with pytest.raises(UserError, match="nothing was measured: .*batch 2, 32x32"):
        bench(fixed_file, (2,), 32, **QUICK)


def test_growth_is_fitted_where_there_are_three_sizes():
    class Linear(nn.Module):
        def forward(self, x):
            time.sleep(x[0, 0].numel() * 2e-6)
            return x

    report = bench([("m", Linear().eval())], (1,), [32, 48, 64, 96], **QUICK)
    (found,) = report.scaling
    assert 0.5 < found["time_exponent"] < 1.5 and len(found["sizes"]) == 4


def test_an_engine_without_its_package(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(UserError, match=r'openvino; install it with: pip install "muntin\[export\]"'):
        bench("swin_t", engine="openvino")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        bench("swin_t", engine="compile")


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("muntin.measure.memory.available", lambda: 100_000)
    with pytest.raises(UserError, match=r"not enough memory: m at batch 64, 32x32 .* batch \d+ fits"):
        bench([("m", Small())], (64,), 32, **QUICK)


def test_an_error_inside_a_model_is_not_the_users():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        bench([("broken", Broken())], (1,), 8, **QUICK)


def test_percentile_is_numpys():
    values = random.Random(0).choices(range(1000), k=37)
    for share in (0.0, 0.25, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_median_interval_covers_the_median():
    assert median_interval(range(1, 11)) == (2, 9)  # 97.9%; (3, 8) would be 89%
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([1, 2, 3]) == (1, 3)
    source = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval([source.expovariate(1) for _ in range(12)])
        held += low <= 0.6931 <= high
    assert 0.95 <= held / 2000 <= 0.99
    assert statistics.median(range(1, 11)) == 5.5


@pytest.mark.parametrize(
    ("value", "uncertainty", "text"),
    [
        (123.456, 10, "120"),
        (123.456, 1, "123"),
        (12.3456, 0.04, "12.3"),
        (12.3456, 0.4, "12.3"),
        (9.87654, 0.04, "9.88"),
        (0.012345, 0, "0.0123"),
        (1087.0, 200, "1100"),
        (0, 1, "0"),
        (2.5, 10, "2"),
    ],
)
def test_no_more_digits_than_the_noise_supports(value, uncertainty, text):
    assert rounded(value, uncertainty) == text
