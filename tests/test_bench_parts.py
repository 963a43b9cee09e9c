"""The parts of Bench with known answers: growth with pixels, stored results side by side, memory, energy, peers."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from muntin.cli import main
from muntin.errors import UserError
from muntin.measure import energy, memory, peers, scaling
from muntin.measure.command import numbers, words
from muntin.measure.compare import compare, ratio
from muntin.measure.results import BenchReport, Row
from muntin.measure.timing import Series, figures, timed
from muntin.runtime.graphs import CudaGraphs

MACHINE = {"cpu": "A", "cores": 2, "flags": ["avx2"], "system": "Linux"}
ROW = Row(
    target="m", model="m", batch=1, height=32, width=32, median_ms=10.0, p90_ms=11.0, p99_ms=12.0, iqr_ms=0.5,
    interval_ms=(9.5, 10.5), throughput=100.0, speed=1.0, speed_interval=(1.0, 1.0), calls=10, warmup_calls=4,
    stable=True, base="m",
)  # fmt: skip


def stored(path: Path, rows: list[Row], threads: int = 2, cpu: str = "A", torch_version: str = "2.15") -> Path:
    report = BenchReport(
        rows,
        {"threads": threads, "rounds": 10, "bounds": {"float32": 1e-4}},
        MACHINE | {"cpu": cpu},
        {"torch": torch_version},
        None,
        "2026-01-01T00:00:00+00:00",
    )
    path.write_text(report.json())
    return path


# ------------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exponent_of_a_power_is_exact(power):
    pixels = [side * side for side in (224, 320, 448, 1024)]
    found, (low, high) = scaling.exponent(pixels, [3e-5 * p**power for p in pixels])
    assert found == pytest.approx(power, abs=1e-9) and high - low < 1e-6


def test_exponent_interval_holds_the_power_under_noise():
    """A slope of six noisy points lies within its interval about 19 times in 20."""
    generator = torch.Generator().manual_seed(0)
    pixels = [float(side * side) for side in (224, 288, 416, 544, 768, 1024)]
    held = 0
    for _ in range(400):
        noise = torch.randn(6, generator=generator, dtype=torch.float64) * 0.1
        low, high = scaling.exponent(pixels, [p**1.5 * e for p, e in zip(pixels, noise.exp().tolist(), strict=True)])[1]
        held += low <= 1.5 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_growth_of_rows_by_target_and_batch():
    linear = [replace(ROW, height=s, width=s, median_ms=s * s / 1000, memory_mb=s**4 / 1e6) for s in (32, 64, 128)]
    two_sizes = [replace(row, target="few") for row in linear[:2]]
    (found,) = scaling.growth(linear + two_sizes)
    assert found["target"] == "m" and found["sizes"][0] == [32, 32]
    assert found["time_exponent"] == pytest.approx(1.0) and found["memory_exponent"] == pytest.approx(2.0)
    assert "time grows with pixels^1.00" in scaling.lines([found])[0]
    unknown = scaling.growth([replace(row, memory_mb=None) for row in linear])[0]
    assert "memory_exponent" not in unknown and "memory" not in scaling.lines([unknown])[0]


def test_sizes_of_lists_and_ranges():
    assert scaling.sizes("224,384") == [224, 384]
    assert scaling.sizes("224:1024:160") == [224, 384, 544, 704, 864, 1024]
    spread = scaling.sizes("224:1024")
    assert len(spread) == 6 and (spread[0], spread[-1]) == (224, 1024)
    assert spread == sorted(set(spread)) and all(side % 32 == 0 for side in spread)
    assert scaling.sizes("33:33") == [33]


@pytest.mark.parametrize("text", ["big", "224:100", "224:448:0", "-5", "1:2:3:4"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="size"):
        scaling.sizes(text)


def test_pictures(tmp_path):
    rows = [replace(ROW, height=s, width=s, median_ms=s * s / 1000, memory_mb=float(s)) for s in (32, 64, 128)]
    assert scaling.plot(rows, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = scaling.plot(rows, tmp_path / "a.html").read_text()
    assert "128x128" in page and 'src="http' not in page
    with pytest.raises(UserError, match=r"\.png or \.html"):
        scaling.plot(rows, tmp_path / "a.gif")


# ------------------------------------------------------------------------------------------------------- compare


def test_compare_gives_ratios_and_ties(tmp_path):
    same = replace(ROW, target="tie", model="tie")
    a = stored(tmp_path / "a.json", [ROW, same, replace(ROW, target="old", model="old")])
    faster = replace(ROW, median_ms=5.0, interval_ms=(4.9, 5.1))
    b = stored(tmp_path / "b.json", [faster, replace(same, median_ms=10.3, interval_ms=(10.0, 10.6))])
    lines = compare(a, b).splitlines()
    assert "2.0x (1.9 to 2.1)" in next(line for line in lines if line.startswith("m "))
    assert next(line for line in lines if line.startswith("tie")).endswith("tie")
    assert any(line.startswith(f"only in {a}: old") for line in lines)
    assert not any(line.startswith("warning") for line in lines)
    assert ratio(ROW, faster)[1] == pytest.approx((9.5 / 5.1, 10.5 / 4.9))


def test_compare_warns_where_the_conditions_differ(tmp_path):
    a = stored(tmp_path / "a.json", [ROW])
    b = stored(tmp_path / "b.json", [ROW], threads=8, cpu="B", torch_version="2.16")
    text = compare(a, b)
    assert "warning: cpu differs: A against B" in text
    assert "warning: threads differs: 2 against 8" in text
    assert "warning: torch differs: 2.15 against 2.16" in text


def test_compare_refuses_what_holds_no_results(tmp_path):
    a = stored(tmp_path / "a.json", [ROW])
    other = stored(tmp_path / "other.json", [replace(ROW, batch=8)])
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"rows": [{"speed": 3}]}))
    for second, told in ((other, "no row in common"), (broken, "no results"), (tmp_path / "none.json", "no file")):
        with pytest.raises(UserError, match=told):
            compare(a, second)


def test_results_of_before_the_engines_are_still_read():
    old = {key: value for key, value in asdict(ROW).items() if key in list(asdict(ROW))[:15]}
    assert Row(**old).engine == "eager"


# -------------------------------------------------------------------------------------------------------- memory


KNOWN = """
import torch
from muntin.measure.memory import peak

def build():
    weights = torch.ones(25 * 2**20)  # 100 MB that stay
    scratch = torch.ones(50 * 2**20)  # 200 MB while loading
    del scratch
    return lambda images: (torch.ones(10 * 2**20) + weights[: 10 * 2**20]).sum()  # 2 times 40 MB while called

found = peak(build, torch.zeros(1))
print(found.load_mb, found.run_mb)
"""


@pytest.mark.skipif(memory.known() is not None, reason="only Linux tells the peak of a part of a process")
def test_memory_of_a_known_amount():
    run = subprocess.run([sys.executable, "-c", KNOWN], capture_output=True, text=True, check=True)
    load, run_peak = map(float, run.stdout.split())
    assert 295 <= load <= 330  # 100 and 200
    assert 175 <= run_peak <= 205  # 100 and twice 40


@pytest.mark.skipif(memory.known() is not None, reason="only Linux tells the peak of a part of a process")
def test_memory_in_a_fresh_process():
    request = memory.Request("swin_free_digits", "eager", "float32", 1, 32, 32, threads=1, device="cpu")
    found = memory.measure(request)
    assert 0 < found.run_mb < 200
    with pytest.raises(RuntimeError, match="no model"):
        memory.measure(replace(request, given="swin_free_digit"))


def test_not_enough_memory_names_what_fits():
    def need(batch, size):
        return batch * size[0] * size[1]

    memory.check("m", need, 8, (100, 100), 80_000)
    with pytest.raises(UserError, match=r"batch 4 fits"):
        memory.check("m", need, 16, (100, 100), 50_000)
    with pytest.raises(UserError, match=r"batch 1 at 192x192 fits"):
        memory.check("m", need, 1, (400, 400), 50_000)
    with pytest.raises(UserError, match=r"no size fits"):
        memory.check("m", need, 1, (400, 400), 5)


def test_need_is_the_activations_and_the_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU())
    need = memory.need_of(model, 4)
    pixels = 64 * 64
    assert need(2, (64, 64)) == 4 * (24 + 2 * pixels * (3 + 8 + 8))  # the image, and what ReLU reads and writes
    assert need(4, (64, 64)) - need(2, (64, 64)) == 4 * 2 * pixels * 19
    assert memory.need_of(model, 2)(2, (64, 64)) * 2 == need(2, (64, 64))
    assert next(model.parameters()).device.type == "cpu"


# -------------------------------------------------------------------------------------------------------- energy


def rapl(folder: Path, name: str, kind: str, joules: float, wrap: float = 1000.0) -> Path:
    zone = folder / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(kind + "\n")
    (zone / "max_energy_range_uj").write_text(str(int(wrap * 1e6)))
    (zone / "energy_uj").write_text(str(int(joules * 1e6)))
    return zone / "energy_uj"


def test_energy_sums_packages_and_survives_the_counter_starting_again(tmp_path):
    first = rapl(tmp_path, "intel-rapl:0", "package-0", 10)
    second = rapl(tmp_path, "intel-rapl:1", "package-1", 990)
    rapl(tmp_path, "intel-rapl:0:0", "core", 5)
    rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 7)
    found, told = energy.meter(torch.device("cpu"), tmp_path)
    assert found is not None and told == "energy: RAPL, processor packages"
    before = found.joules()
    first.write_text(str(12_000_000))
    second.write_text(str(5_000_000))  # past its range of 1000 J
    assert found.joules() - before == pytest.approx(2 + 15)


def test_energy_says_why_there_is_none(tmp_path):
    found, told = energy.meter(torch.device("cpu"), tmp_path)
    assert found is None and "no RAPL" in told


def test_figures_are_per_image_and_absent_where_unknown():
    series = Series(4, visits=[[0.002] * 3] * 6, joules=[0.5, 0.7, 0.6])
    assert figures(series, series)["energy_j"] == 0.6
    assert figures(Series(4, visits=[[0.002]] * 6), series)["energy_j"] is None
    slow = Series(4, visits=[[0.004] * 3] * 6)
    assert figures(series, slow)["speed"] == pytest.approx(2.0)
    assert figures(series, slow)["throughput"] == pytest.approx(2000)


# --------------------------------------------------------------------------------------------------------- peers


class Net(nn.Module):
    """A convolution and its norm, twice; with `shared` the second convolution's output is read twice."""

    def __init__(self, shared):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)  # not in the order in which they run
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared = shared

    def forward(self, x):
        x = self.conv2(self.norm1(self.conv1(x)).relu())
        return self.norm2(x) + (x if self.shared else 0)


@pytest.mark.parametrize("shared", [False, True])
def test_batch_norms_are_folded_only_where_that_changes_nothing(shared):
    torch.manual_seed(0)
    model = peers.randomise(Net(shared), (16, 16))
    image = torch.randn(2, 3, 16, 16)
    folded = peers.fold_batch_norms(model, image)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == (2 if shared else 0)
    assert torch.allclose(folded(image), model(image), atol=1e-5)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 2


@pytest.mark.parametrize(
    ("library", "name", "ours"),
    [
        ("timm", "swin_tiny_patch4_window7_224.ms_in1k", "swin_t"),
        ("timm", "swinv2_base_window8_256", "swinv2_b"),
        ("timm", "efficientvit_m3.r224_in1k", "efficientvit_m3"),
        ("timm", "swin_tiny_patch4_window7_224_x", None),
        ("timm", "swin_base_patch4_window12_384", None),
        ("timm", "mobilenetv3_large_100", None),
        ("torchvision", "swin_v2_s", "swinv2_s"),
        ("torchvision", "resnet50", None),
        ("transformers", "swin-b", "swin_b"),
        ("transformers", "microsoft/swin-tiny-patch4-window7-224", "swin_t"),
    ],
)
def test_counterparts(library, name, ours):
    assert peers.counterpart(library, name) == ours


# ------------------------------------------------------------- on a GPU, with PyTorch's parts faked


def test_a_graph_is_captured_once_for_each_shape_and_replayed_on_new_images(monkeypatch):
    tape, log = [], []

    class Graph:
        def __init__(self):
            tape.append([])
            self.work = tape[-1]

        def replay(self):
            for step in self.work:
                step()

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            log.append("wait")

    @contextmanager
    def during(name):
        log.append(name)
        yield
        log.append(f"end {name}")

    def call(images):
        result = torch.empty_like(images)

        def work():
            return result.copy_(2 * images)

        work()
        log.append("call")
        if log.count("graph") > log.count("end graph"):
            tape[-1].append(work)
        return result

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: during("side"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: during("graph"))
    graphed = CudaGraphs(call)
    for value in (1.0, 3.0, 5.0):
        given = torch.full((2, 3), value)
        assert torch.equal(graphed(given), 2 * given) and given[0, 0] == value
    assert log == ["wait", "side", "call", "call", "call", "end side", "wait", "graph", "call", "end graph"]
    graphed(torch.ones(4, 3))
    assert log.count("graph") == 2
    for rows in range(5, 13):  # eight more shapes
        graphed(torch.ones(rows, 3))
    graphed(torch.ones(2, 3))
    assert log.count("graph") == 11  # the first has been forgotten
    first, second = (graphed(torch.full((2, 3), value)) for value in (1.0, 2.0))
    assert torch.equal(first, torch.full((2, 3), 2.0)) and torch.equal(second, torch.full((2, 3), 4.0))


def test_a_call_on_a_gpu_is_timed_between_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait for the event")

        def elapsed_time(self, other):
            return 12.5

    class Images:
        is_cuda, device = True, "cuda"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    seconds, result = timed(lambda images: log.append("call") or "out", Images())
    assert (seconds, result) == (0.0125, "out")
    assert log == ["synchronize", "record", "call", "record", "wait for the event"]


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_compares_and_measures_nothing(tmp_path, capsys):
    a, b = stored(tmp_path / "a.json", [ROW]), stored(tmp_path / "b.json", [ROW], threads=4)
    assert main(["bench", "--compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "tie" in shown and "threads differs: 2 against 4" in shown


def test_lists_are_separated_by_commas_spaces_or_both():
    assert words(["eager,onnx", "pt2"]) == ["eager", "onnx", "pt2"]
    assert numbers(["1,8", "16"], "--batch") == [1, 8, 16]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["swin_t", "--batch", "1,x"], "--batch 'x' is no number"),
        (["swin_t", "--size", "big"], "size 'big' is none"),
        (["swin_t", "--plot", "growth.gif"], ".png or .html"),
        (["swin_t", "--engine", "eager,onx"], "did you mean 'onnx'"),
        (["swin_t", "--precision", "fp8"], "precision 'fp8' is unknown"),
        (["swin_t", "--base", "swin_s"], "'swin_s' is not measured"),
        ([], "no target given"),
    ],
)
def test_the_command_refuses_in_one_line(options, word, capsys):
    assert main(["bench", *options]) == 2
    shown = capsys.readouterr()
    assert word in shown.err and shown.err.count("\n") == 1 and not shown.out
