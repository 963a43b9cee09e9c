"""Counted costs against the papers' tables, PyTorch's own counter and counts by hand."""

import json
import re
import tomllib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import muntin
from muntin.cli import main
from muntin.errors import UserError
from muntin.measure import cost
from muntin.measure.cost import MODELS, OperatorCounter, costs, table, table_text

PUBLISHED = tomllib.loads((MODELS / "published.toml").read_text())
SPEC = [name for name in PUBLISHED if "parameters" in PUBLISHED[name]]
TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}


def _digits(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.fixture(scope="module")
def generated():
    """The text of the generated table; every listed model is counted for it once."""
    return table_text()


@pytest.fixture(scope="module")
def rows(generated):
    return {row["name"]: row for row in json.loads(generated)}


@pytest.mark.parametrize("name", SPEC)
def test_the_stated_costs_to_the_digit(rows, name):
    stated, found = PUBLISHED[name], rows[name]
    assert (found["size"], found["parameters"]) == (stated["size"], stated["parameters"])
    assert _digits(found["gmacs"], stated["gmacs"]) == stated["gmacs"]
    if "exported" in stated:
        assert _digits(found["exported_parameters"] / 1e6, stated["exported"]) == stated["exported"]
    if "folded" in stated:
        assert found["folded_parameters"] == stated["folded"]


def test_costs_are_stated_for_every_published_model():
    assert set(muntin.list_models()) - set(SPEC) == {"swin_free_digits", "swinv2_l"}  # ours; no cost is stated


@pytest.mark.parametrize(("name", "gmacs"), [("swinv2_t", "6.661"), ("swinv2_s", "12.783"), ("swinv2_b", "21.969")])
def test_swinv2_with_windows_of_16(name, gmacs):
    with torch.device("meta"):
        assert _digits(cost(muntin.create_model(name, window=16), 256).gmacs, gmacs) == gmacs


@pytest.mark.parametrize("name", [n for n in SPEC if n.startswith("swin_free") and "_br" not in n])
def test_br_twins_cost_what_their_twins_cost(name):
    base, cut, rest = name.partition("_dr")
    with torch.device("meta"):
        twin = cost(muntin.create_model(f"{base}_br{cut}{rest}"), 224)
        plain = cost(muntin.create_model(name), 224)
    assert (twin.parameters, twin.macs) == (plain.parameters, plain.macs)


@pytest.mark.parametrize("name", [name for name in SPEC if name.startswith(("swin_b", "swin_free"))])
def test_swin_frees_own_table_within_half_a_percent(rows, name):
    paper = re.match(r"(\d+\.\d)M, ", PUBLISHED[name].get("paper", ""))
    if paper is None:
        assert name in ("swin_b_br", "swin_free_b_br_dr10")  # no count of parameters in the paper
        return
    assert rows[name]["exported_parameters"] / 1e6 == pytest.approx(float(paper[1]), rel=0.005)


PEERS = {"resnet50": "ResNet50_Weights.IMAGENET1K_V2", "swin_t": "Swin_T_Weights.IMAGENET1K_V1",
         "swin_v2_t": "Swin_V2_T_Weights.IMAGENET1K_V1", "vit_b_16": "ViT_B_16_Weights.IMAGENET1K_V1",
         "mobilenet_v3_large": "MobileNet_V3_Large_Weights.IMAGENET1K_V2"}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_torchvisions_models_cost_what_it_states(name):
    models = pytest.importorskip("torchvision.models")
    stated = models.get_weight(PEERS[name]).meta
    found = costs([f"torchvision:{name}"], training=False)[f"torchvision:{name}"]
    assert found.parameters == stated["num_params"]
    assert round(found.gmacs, 3) == stated["_ops"]


FORMS: dict[str, dict[str, Any]] = {
    "swin_t": TINY,
    "swin_free_t_br": TINY,
    "swinv2_t": TINY,
    "efficientvit_m0": {"dims": (16, 32, 48), "depths": (1, 1, 1), "heads": (1, 2, 2)},
    "rmt_t": {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 2)},
}


@pytest.mark.parametrize("size", [(64, 64), (61, 83)])
@pytest.mark.parametrize("name", FORMS)
def test_fused_and_explicit_attention_count_alike(name, size):
    model = muntin.create_model(name, **FORMS[name]).eval()  # fused without gradients, explicit with them on the CPU
    fused = cost(model, size)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size))
    assert fused.macs == counter.get_total_flops() / 2 == sum(fused.macs_by_kind.values())


class Attention(nn.Module):
    """Attention of an image's pixels to one another, fused or explicit."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x):
        q = x.flatten(2).transpose(1, 2)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, q, q)
        return (q @ q.transpose(1, 2)).softmax(-1) @ q


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_by_hand(device):
    fused, explicit = (cost(Attention(form).to(device), 4, batch=2) for form in (True, False))
    assert fused.macs_by_kind == explicit.macs_by_kind == {"linear": 0, "attention": 2 * 16 * 16 * 6, "convolution": 0}
    image = 2 * 3 * 16 * 4
    assert fused.peak_bytes == 2 * image  # the image and the result
    assert explicit.peak_bytes == image + 2 * (2 * 16 * 16 * 4)  # the image, the logits and their softmax


def test_kinds_by_formula():
    with torch.device("meta"):
        found = cost(muntin.create_model("swin_t"))
    dims, depths, sides = (96, 192, 384, 768), (2, 2, 6, 2), (56, 28, 14, 7)
    stages = list(zip(dims, depths, sides, strict=True))
    blocks = sum(depth * side**2 * 12 * dim**2 for dim, depth, side in stages)
    merging = sum(side**2 * 2 * dim * dim for dim, _, side in stages[1:])  # 4 C/2 -> C at the smaller map
    assert found.macs_by_kind == {
        "linear": blocks + merging + 768 * 1000,
        "attention": sum(depth * side**2 * 2 * 49 * dim for dim, depth, side in stages),
        "convolution": 56**2 * 96 * 48,
    }


def test_products_with_weights_are_linear_whatever_their_operator():
    found = cost(muntin.create_model("swin_t", split_heads=True, **TINY).eval(), 64)  # by einsum, so by bmm
    assert found.macs_by_kind["attention"] == cost(muntin.create_model("swin_t", **TINY), 64).macs_by_kind["attention"]


UNIT = 3 * 4 * 4 * 4  # bytes of the image in the next tests


@pytest.mark.parametrize(("model", "images"), [
    (nn.Sequential(nn.ReLU(), nn.Sigmoid()), 3),  # the image is the caller's, and both results
    (nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Sigmoid()), 3),  # what nobody holds is freed
    (nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True), nn.Flatten(), nn.Unflatten(1, (3, 16))), 2),  # views, in place
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 5])
def test_memory_held_by_hand(model, images, batch):
    assert cost(model, 4, batch).peak_bytes == images * batch * UNIT


def test_memory_held_grows_with_the_batch_and_not_with_what_weights_make():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(7))

        def forward(self, x):
            return x + self.table.repeat(1000).sum()

    assert [cost(Biased(), 4, batch).peak_bytes for batch in (1, 3)] == [2 * UNIT, 6 * UNIT]
    with torch.device("meta"):
        model = muntin.create_model("swin_t", **TINY)
    assert cost(model, 64, 4).peak_bytes == 4 * cost(model, 64).peak_bytes


def test_memory_kept_for_the_backward_pass_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10))
    found = cost(model, 4, training=True)
    assert found.kept_bytes == UNIT + 20 * 4  # the image, and the ReLU's output, which two operators keep
    assert cost(model, 4).kept_bytes is None


def test_training_is_counted_without_a_trace(tmp_path):
    model = muntin.create_model("efficientvit_m0", **FORMS["efficientvit_m0"]).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert (cost(model, 64, training=True).kept_bytes or 0) > cost(model, 64).peak_bytes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_bytes_of_weights():
    found = cost(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 4)
    numbers = 3 * 4 + 4 + 4 * 4  # weight, bias; scale, shift, mean and variance, without the count of batches
    assert found.weight_bytes == {"float32": 4 * numbers, "float16": 2 * numbers, "bfloat16": 2 * numbers}


def test_other_libraries_bias_tables_become_matrices_too():
    found = costs(["swin_t", "timm:swin_tiny_patch4_window7_224", "torchvision:swin_t"], training=False)
    assert len({(c.parameters, c.exported_parameters, c.macs) for c in found.values()}) == 1
    assert found["swin_t"].folded_parameters == 28_288_354 and found["torchvision:swin_t"].folded_parameters is None


def test_the_command(tmp_path, capsys):
    out = tmp_path / "cost.json"
    assert main(["cost", "swin_t", "timm:resnet50", "--size", "64x96", "--batch", "2", "--json", str(out)]) == 0
    shown, (ours, peer) = capsys.readouterr().out, json.loads(out.read_text())["models"]
    assert re.search(r"images x height x width +2 x 64 x 96 +2 x 64 x 96", shown)
    assert f"{ours['gmacs']:.4f}" in shown and f"{peer['peak_bytes'] / 1e6:.1f}" in shown
    assert (ours["name"], ours["batch"], ours["height"], ours["width"]) == ("swin_t", 2, 64, 96)
    assert sum(peer["macs_by_kind"].values()) == peer["macs"] and peer["folded_parameters"] is None


@pytest.mark.parametrize(("arguments", "message"), [
    (["swint"], "did you mean 'swin_t'"),
    (["tim:resnet50"], "'timm'"),
    (["timm:resnet5"], "did you mean 'resnet50'"),
    (["torchvision:swint"], "did you mean 'swin_t'"),
    (["swin_t", "--size", "64x"], "HEIGHTxWIDTH"),
    (["swin_t", "--size", "0"], "at least 1 pixel"),
    (["swin_t", "--batch", "0"], "at least one image"),
    (["torchvision:vit_b_16", "--size", "100"], "give another --size"),
])  # fmt: skip
def test_bad_input(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["swin_t", "swin_free_t_br"])
def test_the_optimised_copy_multiplies_as_often(name):
    model = muntin.create_model(name, **TINY).eval()
    size = 112  # whose maps windows fill: a program leaves out the products of padding
    assert cost(muntin.optimize(model), size).macs == cost(model, size).macs


def test_inference_mode_is_counted_too():
    model = muntin.create_model("swin_t", **TINY).eval()
    with torch.inference_mode(), OperatorCounter() as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert counter.macs.total() == cost(model, 64).macs


def test_macs_of_convolutions_by_hand():
    grouped = nn.Conv2d(3, 12, 3, stride=2, padding=1, groups=3)
    assert cost(grouped, 8).macs == 4 * 4 * 12 * 9
    transposed = nn.ConvTranspose2d(3, 5, 2, stride=2)
    assert cost(transposed, 8).macs == 8 * 8 * 3 * 5 * 4


def test_bytes_by_hand():
    class Half(nn.Module):
        def forward(self, x):
            return x.flatten(1).unsqueeze(1).expand(-1, 7, -1).transpose(1, 2) + 1.0

    image = 3 * 4 * 4 * 4  # the views move nothing, the expanded input is read once, the sum is written whole
    assert cost(Half(), 4).bytes_moved == image + 7 * image


def test_the_model_is_left_as_it_was():
    model = muntin.create_model("swin_t", **TINY).train()
    model.head.eval()
    cost(model, 32)
    assert model.training and model.backbone.training and not model.head.training


def test_a_size_that_is_none():
    with pytest.raises(UserError, match="at least 1 pixel"):
        cost(nn.Conv2d(3, 4, 1), (0, 4))


def test_a_published_figure_stays_text(monkeypatch):
    monkeypatch.setattr(muntin, "list_models", lambda: ["swin_t", "efficientvit_m0"])
    rows = {row["name"]: row for row in table({"swin_t": {"size": 64, "top1": "82.x", "source": "a paper"}})}
    assert (rows["swin_t"]["top1"], rows["swin_t"]["source"], rows["swin_t"]["size"]) == ("82.x", "a paper", 64)
    assert rows["efficientvit_m0"]["top1"] is None


def test_the_generated_table_is_current(generated):
    assert (MODELS / "table.json").read_text() == generated, "run: python -m muntin.measure.cost --write-table"
    assert {row["name"] for row in json.loads(generated)} == set(muntin.list_models())
