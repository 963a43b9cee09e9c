"""Where the time goes: kinds add up, and known work lands in its kind."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import muntin
from muntin.errors import UserError
from muntin.measure import profile
from muntin.measure.profile import KINDS, UNATTRIBUTED, kind_of

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}


def test_kinds_add_up_to_the_wall_time():
    model = muntin.create_model("swin_t", num_classes=10, **TINY)
    found = profile(model, torch.randn(2, 3, 64, 64), calls=3)
    assert set(found.kinds) == set(KINDS)
    assert math.isclose(sum(found.kinds.values()), found.wall_ms, rel_tol=1e-9)
    assert all(ms >= 0 for ms in found.kinds.values())
    for kind in ("matrix product", "convolution", "attention", "normalisation", "activation", "window shifting"):
        assert found.kinds[kind] > 0, kind
    by_kind = {kind: sum(o.ms for o in found.operators if o.kind == kind) for kind in KINDS if kind != UNATTRIBUTED}
    assert by_kind == pytest.approx({kind: found.kinds[kind] for kind in by_kind})
    assert model.training  # left as it was


def test_no_operator_of_the_model_is_of_unknown_kind():
    model = muntin.create_model("swin_free_t_br", num_classes=10, **TINY)
    found = profile(model, torch.randn(2, 3, 64, 64), calls=1)
    other = {o.name for o in found.operators if o.kind == "other"}
    assert other <= {"aten::mean", "aten::sum", "aten::equal", "aten::is_same_size", "aten::arange"}


WEIGHT = torch.ones(8, 3, 3, 3)


class _Work(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, x):
        for _ in range(4):
            self.work(x)
        return x


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("matrix product", lambda x: x.flatten(1).T @ x.flatten(1)),
        ("window shifting", lambda x: torch.roll(x, (3, 3), (2, 3))),
        ("softmax", lambda x: x.softmax(-1)),
        ("activation", lambda x: nn.functional.gelu(x)),
        ("copy and reshape", lambda x: x.transpose(2, 3).contiguous()),
        ("element-wise", lambda x: x * 2),
        ("normalisation", lambda x: nn.functional.layer_norm(x, x.shape[1:])),
        ("convolution", lambda x: nn.functional.conv2d(x, WEIGHT)),
    ],
)
def test_known_work_lands_in_its_kind(kind, work):
    found = profile(_Work(work), torch.randn(1, 3, 16, 16), calls=1, warmup=1)
    kinds = {operator.kind for operator in found.operators}
    assert kind in kinds and kinds <= {kind, "copy and reshape"}
    # views around a product, and a Python number that becomes a tensor
    assert "copy and reshape" not in kinds or kind in ("copy and reshape", "matrix product", "element-wise")


def test_names_of_operators():
    assert kind_of("aten::add_") == "element-wise"
    assert kind_of("mkldnn::_linear_pointwise") == "matrix product"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("my::fancy_kernel") == "other"


def test_text_and_json_tell_the_same():
    found = profile(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 16, 16), calls=1)
    assert json.loads(found.json())["kinds"] == found.kinds
    assert "100.0%" in found.table() and "convolution" in found.table()


def test_nothing_to_run_is_refused():
    with pytest.raises(UserError, match="measure nothing"):
        profile(nn.Identity(), torch.empty(0, 3, 8, 8))
    with pytest.raises(UserError, match="0 calls"):
        profile(nn.Identity(), torch.ones(1, 3, 8, 8), calls=0)
