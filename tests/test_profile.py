"""Where the time goes: kinds, stages and bounds add up, and known work lands in its kind, in every engine."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import muntin
import test_models
from muntin.errors import UserError
from muntin.measure import profile
from muntin.measure.capture import Piece, median_pass
from muntin.measure.capture.stages import Stages
from muntin.measure.kinds import GROUPS, cuts_windows, group_of, kind_of_fused, kind_of_node
from muntin.measure.profile import KINDS, UNATTRIBUTED, kind_of
from muntin.measure.profile_page import html, picture
from muntin.measure.profile_text import beside
from muntin.measure.profiles import check_files, numbers, profiles, words, write
from muntin.measure.roofline import Peaks, bounds, peaks
from muntin.measure.trace import trace
from muntin.models import efficientvit, rmt, swin

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}
PEAKS = Peaks(gflops=100.0, gbps=10.0, cached=((1 << 20, 50.0),), precision="float32", threads=1, device="cpu")


def tiny(name="swin_t"):
    torch.manual_seed(0)
    return muntin.create_model(name, num_classes=10, **TINY)


@pytest.fixture(scope="module")
def found():
    return profile(tiny(), torch.randn(2, 3, 64, 64), calls=3, name="tiny")


def adds_up(found):
    wall = found.wall_ms
    assert set(found.kinds) == set(KINDS)
    assert math.isclose(sum(found.kinds.values()), wall, rel_tol=1e-9)
    assert math.isclose(sum(found.groups.values()), wall, rel_tol=1e-9)
    assert math.isclose(sum(sum(kinds.values()) for kinds in found.stages.values()), wall, rel_tol=1e-9)
    assert math.isclose(found.bounds.wall_ms, wall, rel_tol=1e-9)
    assert all(ms >= 0 for ms in (*found.kinds.values(), *found.groups.values()))
    by_kind = {kind: sum(o.ms for o in found.operators if o.kind == kind) for kind in KINDS if kind != UNATTRIBUTED}
    assert by_kind == pytest.approx({kind: found.kinds[kind] for kind in by_kind})


def test_everything_adds_up_to_the_wall_time(found):
    adds_up(found)
    for kind in ("matrix product", "convolution", "attention", "normalisation", "activation", "window shifting"):
        assert found.kinds[kind] > 0, kind
    assert list(found.stages) == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head", UNATTRIBUTED]
    assert all(sum(kinds.values()) > 0 for stage, kinds in found.stages.items() if stage != UNATTRIBUTED)


def test_the_model_is_left_as_it_was():
    model = tiny()
    model.backbone.stages[1].eval()
    profile(model, torch.randn(1, 3, 64, 64), calls=1, roofline=False)
    assert model.training and not model.backbone.stages[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_operator_of_the_model_is_of_unknown_kind():
    found = profile(tiny("swin_free_t_br"), torch.randn(2, 3, 64, 64), calls=1, roofline=False)
    other = {o.name for o in found.operators if o.kind == "other"}
    assert other <= {"aten::mean", "aten::sum", "aten::equal", "aten::is_same_size"}


@pytest.mark.parametrize("name", ["swin_t", "efficientvit_m0", "rmt_t"])
@pytest.mark.parametrize("engine", ["eager", "optimize"])
def test_flops_are_those_that_cost_counts(name, engine):
    shape: dict[str, Any] = TINY if name == "swin_t" else {}
    model = muntin.create_model(name, num_classes=10, **shape).eval()
    size = 112  # whose maps windows fill: an optimised copy leaves out the products of padding
    found = profile(model, torch.randn(1, 3, size, size), engine=engine, calls=1, roofline=False)
    counted = 2 * muntin.measure.cost(model, size).macs
    assert sum(o.flops for o in found.operators) == pytest.approx(counted, rel=0.01 if engine == "optimize" else 1e-9)
    assert not found.notes


def test_channels_that_onnx_runtime_pads_are_not_counted():
    model = muntin.create_model("efficientvit_m0", num_classes=10).eval()  # whose first convolution has 8 channels
    found = profile(model, torch.randn(1, 3, 64, 64), engine="onnx", calls=1, roofline=False)
    assert sum(o.flops for o in found.operators) == 2 * muntin.measure.cost(model, 64).macs


# ------------------------------------------------------------------------------------------- known work, by engine

HEAVY = 96
TIMES = {
    "copy and reshape": 16,
    "activation": 8,
    "normalisation": 8,
    "window shifting": 8,
    "softmax": 4,
    "element-wise": 4,
}
"""How often a kind is done in one layer: what is cheap as often as leaves no doubt beside the stem's convolution."""


class Work(nn.Module):
    """A convolution for a stem, twelve times the work that is asked for, and a linear head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HEAVY, 4, 4).to(memory_format=torch.channels_last)
        self.stages = nn.ModuleList([Once(kind), nn.Sequential(*(Once(kind) for _ in range(11)))])
        self.head = nn.Linear(HEAVY, 2)

    def forward(self, x):
        x = self.stem(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((1, 2)))


class Once(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.linear = nn.LayerNorm(HEAVY), nn.Linear(HEAVY, HEAVY)
        self.conv = nn.Conv2d(HEAVY, HEAVY, 3, padding=1)

    def forward(self, x):
        for _ in range(TIMES.get(self.kind, 1)):
            x = self.once(x)
        return x

    def once(self, x):  # (B, H, W, C), H and W divisible by 8
        if self.kind == "window shifting":  # a roll and a partition, as timm and torchvision write them
            x = torch.roll(x, (3, 3), (1, 2))
            b, h, w, c = x.shape
            x = x.view(b, h // 8, 8, w // 8, 8, c).permute(0, 1, 3, 2, 4, 5).contiguous()
            return x.view(b, h // 8, w // 8, 8, 8, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
        if self.kind == "attention":
            q = x.flatten(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0].view_as(x)
        works: dict[str, Any] = {
            "matrix product": self.linear,
            "softmax": lambda y: y.softmax(1),
            "activation": nn.functional.gelu,
            "copy and reshape": lambda y: y.transpose(1, 2).contiguous(),
            "element-wise": lambda y: y * y * y * y * y * y * y * y * y,
            "normalisation": self.norm,
            "convolution": lambda y: self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        }
        return works[self.kind](x)


WORKS = [
    "matrix product",
    "convolution",
    "attention",
    "softmax",
    "normalisation",
    "activation",
    "window shifting",
    "copy and reshape",
    "element-wise",
]


def dominated(found, kind):
    """Whether a kind takes more than any other, and the second stage most of it."""
    adds_up(found)
    attributed = {k: ms for k, ms in found.kinds.items() if k != UNATTRIBUTED}
    assert max(attributed, key=attributed.__getitem__) == kind, attributed
    by_stage = {stage: kinds.get(kind, 0.0) for stage, kinds in found.stages.items()}
    assert max(by_stage, key=by_stage.__getitem__) == "stage 2", by_stage
    assert list(found.stages) == ["stem", "stage 1", "stage 2", "head", UNATTRIBUTED]


@pytest.mark.parametrize("kind", WORKS)
def test_known_work_lands_in_its_kind_and_stage(kind):
    dominated(profile(Work(kind), torch.randn(1, 3, 128, 128), calls=9), kind)


@pytest.mark.parametrize("kind", ["matrix product", "convolution", "normalisation", "window shifting", "activation"])
def test_known_work_in_onnx_runtime(kind):
    found = profile(Work(kind), torch.randn(1, 3, 64, 64), calls=9, engine="onnx")
    dominated(found, kind)
    flops = profile(Work(kind), torch.randn(1, 3, 64, 64), calls=1, roofline=False)
    assert sum(o.flops for o in found.operators) == sum(o.flops for o in flops.operators)


def test_known_work_in_compiled_code():
    x = torch.randn(1, 3, 64, 64)
    found = profile(Work("matrix product"), x, calls=3, engine="compile")
    dominated(found, "matrix product")
    assert not found.notes
    eager = profile(Work("matrix product"), x, calls=1, roofline=False)
    assert sum(o.flops for o in found.operators) == sum(o.flops for o in eager.operators)


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("family", [swin, efficientvit, rmt], ids=["swin", "efficientvit", "rmt"])
def test_compiled_models_are_seen_through_the_operators_that_are_stages(family):
    model = test_models.tiny(family).eval()
    found = profile(model, torch.randn(1, 3, 64, 128), engine="compile", calls=1, roofline=False)
    assert sum(o.flops for o in found.operators) == 2 * muntin.measure.cost(model, (64, 128)).macs
    assert not found.notes
    for stage, kinds in found.stages.items():
        products = kinds.get("matrix product", 0) + kinds.get("convolution", 0)
        assert products > 0 or stage == UNATTRIBUTED, stage


def test_onnx_runtime_in_another_precision():
    found = profile(tiny().half(), torch.randn(1, 3, 64, 64).half(), calls=1, engine="onnx", roofline=False)
    assert found.precision == "float16"
    assert list(found.stages)[1:5] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert all(found.stages[f"stage {i}"].get("matrix product", 0) > 0 for i in (1, 2, 3, 4))
    with pytest.raises(UserError, match="ONNX Runtime cannot run"):
        profile(tiny().bfloat16(), torch.randn(1, 3, 64, 64).bfloat16(), calls=1, engine="onnx", roofline=False)


def test_packed_products_of_an_optimised_copy():
    found = profile(tiny("swin_free_t_br"), torch.randn(1, 3, 64, 64), calls=1, engine="optimize", roofline=False)
    kinds = {o.name: o.kind for o in found.operators if "mkldnn" in o.name}
    assert kinds.get("mkldnn::_linear_pointwise", "matrix product") == "matrix product"
    assert kinds.get("mkldnn::_convolution_pointwise", "convolution") == "convolution"
    assert found.kinds["matrix product"] > 0 and found.kinds["convolution"] > 0


def test_our_own_operators_count_as_the_convolutions_that_they_are():
    from muntin.layers import tokens
    from muntin.layers.conv import convolution
    from muntin.measure.counter import OperatorCounter

    x, weight, depthwise = torch.randn(2, 8, 14, 14), torch.randn(16, 8, 3, 3), torch.randn(8, 1, 5, 5)
    conv2d, rows = nn.functional.conv2d, x.flatten(2).transpose(1, 2)

    def macs(call):
        with torch.no_grad(), OperatorCounter([x]) as counter:
            call()
        return counter.macs.total()

    whole = macs(lambda: conv2d(x, weight, None, 2, 1))
    assert macs(lambda: convolution(x, weight, None, 2, 1, 1)) == whole > 0
    whole = macs(lambda: conv2d(x, depthwise, None, 1, 2, 1, 8))
    assert macs(lambda: tokens._opaque(rows, depthwise, None, 14, 14, 1, 2, 8)) == whole > 0


def test_another_librarys_model_is_optimised_by_folding():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3))

    x = torch.randn(1, 3, 32, 32)
    assert profile(Folds(), x, calls=1, roofline=False).kinds["normalisation"] > 0
    assert profile(Folds(), x, calls=1, roofline=False, engine="optimize").kinds["normalisation"] == 0


# ------------------------------------------------------------------------------------------------------ the kinds


def test_names_of_operators():
    assert kind_of("aten::add_") == "element-wise"
    assert kind_of("mkldnn::_linear_pointwise") == "matrix product"
    assert kind_of("muntin::convolution") == kind_of("muntin::token_convolution") == "convolution"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("aten.native_layer_norm.default") == "normalisation"
    assert kind_of("my::fancy_kernel") == "other"
    assert kind_of_node("FusedMatMul") == "matrix product" and kind_of_node("Erf") == "activation"
    assert kind_of_fused(["copy and reshape", "activation", "normalisation"]) == "normalisation"


def test_groups_of_figure_2():
    assert group_of("aten::convolution", "convolution") == group_of("MatMul", "matrix product") == GROUPS[0]
    assert group_of("aten::roll", "window shifting") == group_of("aten::view", "copy and reshape") == "reshape"
    assert group_of("aten::clone", "copy and reshape") == "copy"
    assert group_of("aten::add_", "element-wise") == group_of("Add", "element-wise") == "addition"
    assert group_of("aten::mul", "element-wise") == group_of("aten::gelu", "activation") == "others"


def test_what_cuts_a_map_into_windows():
    x = torch.randn(2, 8, 12, 5)
    cut = x.view(2, 2, 4, 3, 4, 5).permute(0, 1, 3, 2, 4, 5)
    assert cuts_windows(cut.shape, cut.stride())
    back = cut.contiguous().permute(0, 1, 3, 2, 4, 5)
    assert cuts_windows(back.shape, back.stride())
    patches = x.view(2, 4, 2, 6, 2, 5).permute(0, 1, 3, 4, 2, 5)  # timm's patch merging
    assert not cuts_windows(patches.shape, patches.stride())
    plain = torch.randn(2, 2, 3, 4, 4, 5)
    assert not cuts_windows(plain.shape, plain.stride())


def test_a_gather_of_biases_or_of_patches_is_no_shifting():
    found = profile(tiny("swin_free_t"), torch.randn(1, 3, 224, 224), calls=1, roofline=False)
    gathers = [o for o in found.operators if o.name == "aten::index_select"]
    assert {o.kind for o in gathers if o.stage == "stage 2"} == {"copy and reshape"}  # patch merging's
    assert {o.kind for o in gathers if o.stage == "stage 1"} == {"window shifting"}  # into windows of stage 1
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 2), num_heads=(1, 2))
    found = profile(model, torch.randn(1, 3, 224, 224), calls=1, roofline=False)
    kinds = {(o.name, o.kind) for o in found.operators}
    assert {("aten::index", "copy and reshape"), ("aten::roll", "window shifting")} <= kinds
    assert ("aten::clone", "window shifting") in kinds and ("aten::index", "window shifting") not in kinds


@pytest.mark.parametrize(
    ("build", "stages"),
    [
        (
            lambda: nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))}),
            ["stem", "stage 1", "head"],
        ),
        (
            lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.ReLU()])}),
            ["stem", "stage 1", "stage 2", "head"],
        ),
        (lambda: nn.ModuleDict({"conv": nn.ReLU(), "layer1": nn.ReLU()}), ["stem", "stage 1", "head"]),
        (lambda: nn.Linear(1, 1), ["whole model"]),
    ],
)
def test_stages_of_models(build, stages):
    assert Stages(build()).names == stages


def test_what_runs_outside_stages_belongs_to_the_one_before():
    stages = Stages(nn.ModuleDict({"stages": nn.ModuleList([nn.ReLU(), nn.ReLU()])}))
    known = [None, "stage 1", None, "stage 2", None]
    assert stages.fill(known) == ["stem", "stage 1", "stage 1", "stage 2", "head"]


# --------------------------------------------------------------------------------------------------- the roofline


def piece(ms, flops, moved, kind="matrix product"):
    return Piece("aten::mm", kind, "tensor multiplication", "stem", ms, 0.0, ms, flops, moved)


def test_bounds_by_hand():
    pieces = [
        piece(3.0, 200_000_000, 1000),  # 2 ms at 100 GFLOP/s, and 1 ms beyond
        piece(5.0, 0, 20_000_000, "element-wise"),  # 2 ms at 10 GB/s, and 3 ms beyond
        piece(0.5, 0, 50_000_000, "copy and reshape"),  # faster than its bound: nothing beyond
        piece(1.0, 0, 1_000_000, "softmax"),  # 0.02 ms at the cache's 50 GB/s
        Piece("call", UNATTRIBUTED, UNATTRIBUTED, UNATTRIBUTED, 9.0, 0.0, 9.0),
    ]
    found = bounds(pieces, 12.0, PEAKS)
    assert found.compute == pytest.approx(2.0) and found.memory == pytest.approx(2.0 + 0.5 + 0.02)
    assert found.overhead == pytest.approx(1.0 + 3.0 + 0.98) and found.outside == pytest.approx(2.5)
    assert found.floor_ms == pytest.approx(2.0)


def test_bandwidth_is_that_of_a_set_of_this_size():
    assert PEAKS.ridge == 10.0
    assert PEAKS.bandwidth(1 << 20) == 50.0 and PEAKS.bandwidth((1 << 20) + 1) == 10.0
    assert PEAKS.floor_ms(10**8, 10**9) == PEAKS.memory_ms(10**9) == 100.0


def test_measured_peaks_are_of_this_precision_and_number_of_threads():
    found = peaks(torch.float32, torch.device("cpu"))
    assert (found.precision, found.threads) == ("float32", torch.get_num_threads())
    assert found.gflops > 1 and found.gbps > 0.5
    assert all(rate >= found.gbps for _, rate in found.cached)
    assert peaks(torch.float32, torch.device("cpu")) is found


def test_one_pass_of_several_has_medians():
    runs = [(float(wall), [piece(ms, 0, 0)]) for wall, ms in ((9, 3.0), (7, 1.0), (8, 2.5))]
    wall, pieces = median_pass(runs)
    assert (wall, pieces[0].ms) == (8.0, 2.5)
    assert median_pass([*runs, (8.5, [])])[0] == 8.5  # another sequence of operators: one pass as it was


# -------------------------------------------------------------------------------------------------- what is shown


def test_text_and_json_tell_the_same(found):
    told = json.loads(found.json())
    assert told["kinds"] == found.kinds and told["distance"] == found.distance == found.plain_ms / found.bounds.floor_ms
    text = found.table()
    assert "100.0%" in text and "stage 4" in text and "ridge" in text and "times it" in text
    assert "tiny, eager, batch 2" in beside([found, found])


def test_a_trace_has_nested_operations_and_stages_in_order(found):
    events = json.loads(trace([found]))["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    stages = [e for e in slices if e["cat"] == "stage"]
    assert [e["name"] for e in stages] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in zip(stages, stages[1:], strict=False))
    operations = sorted((e for e in slices if e["cat"] != "stage"), key=lambda e: (e["ts"], -e["dur"]))
    assert {e["name"] for e in operations} >= {"aten::addmm", "aten::native_layer_norm"}
    ends: list[float] = []
    for e in operations:
        while ends and ends[-1] <= e["ts"] + 0.002:
            ends.pop()
        assert not ends or e["ts"] + e["dur"] <= ends[-1] + 0.002  # inside what is open, never across its end
        ends.append(e["ts"] + e["dur"])
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"tiny, eager, batch 2", "stages", "operations"}


def test_files_are_written_and_escape_what_was_named(found, tmp_path):
    from dataclasses import replace

    other = replace(found, name="<b>other</b>", engine="compile")
    paths = {kind: str(tmp_path / f"p.{kind}") for kind in ("json", "png", "html", "trace")}
    write([found, other], to_json=paths["json"], plot=paths["png"], html=paths["html"], trace=paths["trace"])
    told = json.loads((tmp_path / "p.json").read_text())
    assert [p["name"] for p in told["profiles"]] == ["tiny", "<b>other</b>"] and told["versions"]["torch"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "p.html").read_text()
    assert "<b>other</b>" not in page and "&lt;b&gt;other&lt;/b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert html([found], "here").count("<section") == 6
    assert len(picture([found])) > 1000


# ------------------------------------------------------------------------------------------------------ bad input


def test_nothing_to_run_is_refused():
    with pytest.raises(UserError, match="measure nothing"):
        profile(nn.Identity(), torch.empty(0, 3, 8, 8))
    with pytest.raises(UserError, match="0 calls"):
        profile(nn.Identity(), torch.ones(1, 3, 8, 8), calls=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engines": ["onxx"]}, "did you mean 'onnx'"),
        ({"targets": ["swin_tt"]}, "did you mean"),
        ({"targets": ["timm:efficientvit_m9"]}, "did you mean"),
        ({"size": (0, 64)}, "size 0 is not possible"),
        ({"batches": [0]}, "batch 0 is not possible"),
        ({"precision": "fp31"}, "precision 'fp31' is unknown"),
        ({"device": "tpu7"}, "device 'tpu7'"),
        ({"targets": [("fixed", nn.Sequential(nn.Flatten(), nn.Linear(3, 3)))]}, "does not take images of 32x32"),
    ],
)
def test_bad_input_says_what_is_valid(given, message):
    targets = given.pop("targets", [("identity", nn.Identity())])
    with pytest.raises(UserError, match=message):
        profiles(targets, **{"size": (32, 32)} | given)


def test_a_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "muntin\[export\]"'):
        profile(nn.Identity(), torch.ones(1, 3, 8, 8), engine="onnx")


def test_lists_and_files_of_the_command(tmp_path):
    assert words(["eager,onnx", "compile"]) == ["eager", "onnx", "compile"]
    assert numbers(["1,8"], "--batch") == [1, 8]
    with pytest.raises(UserError, match="whole numbers"):
        numbers(["one"], "--batch")
    with pytest.raises(UserError, match="ends in .png"):
        check_files(plot="p.svg")
    with pytest.raises(UserError, match="there is no folder"):
        check_files(html=str(tmp_path / "no" / "p.html"))
