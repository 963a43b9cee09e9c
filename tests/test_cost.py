"""Counted costs against the papers' tables, PyTorch's own counter and counts by hand."""

import json
import tomllib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import muntin
from muntin.errors import UserError
from muntin.measure import cost
from muntin.measure.cost import MODELS, OperatorCounter, table, table_text
from muntin.runtime import fold

PUBLISHED = tomllib.loads((MODELS / "published.toml").read_text())
SPEC = [name for name in PUBLISHED if "parameters" in PUBLISHED[name]]
TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}


def _digits(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", SPEC)
def test_the_stated_costs_to_the_digit(name):
    with torch.device("meta"):
        model = muntin.create_model(name)
    stated = PUBLISHED[name]
    found = cost(model, stated["size"])
    assert found.parameters == stated["parameters"]
    assert _digits(found.gmacs, stated["gmacs"]) == stated["gmacs"]
    if "exported" in stated:
        assert _digits(found.exported_parameters / 1e6, stated["exported"]) == stated["exported"]
    if "folded" in stated:
        assert sum(p.numel() for p in fold(model).parameters()) == stated["folded"]


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


@pytest.mark.parametrize("size", [(64, 64), (61, 83)])
def test_fused_and_explicit_attention_count_alike(size):
    model = muntin.create_model("swin_t", **TINY).eval()  # fused on the CPU without gradients, explicit with them
    fused = cost(model, size)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size))
    assert fused.macs == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["swin_t", "swin_free_t_br"])
def test_the_optimised_copy_multiplies_as_often(name):
    model = muntin.create_model(name, **TINY).eval()
    assert cost(muntin.optimize(model), 64).macs == cost(model, 64).macs


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


def test_a_published_figure_stays_text():
    rows = {row["name"]: row for row in table({"swin_t": {"size": 64, "top1": "82.x", "source": "a paper"}})}
    assert list(rows) == list(muntin.list_models())
    assert (rows["swin_t"]["top1"], rows["swin_t"]["source"], rows["swin_t"]["size"]) == ("82.x", "a paper", 64)
    assert rows["swin_s"]["top1"] is None


def test_the_generated_table_is_current():
    current = table_text()
    assert (MODELS / "table.json").read_text() == current, "run: python -m muntin.measure.cost --write-table"
    assert {row["name"] for row in json.loads(current)} == set(muntin.list_models())
