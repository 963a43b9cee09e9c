"""What only Swin and Swin-Free have; what every backbone must do is in test_models.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from conftest import error_of
from muntin.layers.attention import WindowAttention
from muntin.layers.drop import DropPath
from muntin.models import swin
from test_models import SIZES, tiny


@pytest.mark.parametrize("small_maps", ["pad", "shrink"])
@pytest.mark.parametrize(
    ("changes", "dtype", "bound"),
    [
        ({"split_heads": True}, torch.float32, 1e-5),
        ({"attend": (0, 3)}, torch.float32, 1e-5),
        ({"norm": "batch", "act": "relu"}, torch.float64, 1e-10),  # in float64, since these weights amplify rounding
        ({"norm": "batch", "split_heads": True}, torch.float64, 1e-10),
    ],
    ids=str,
)
def test_optimize_equals_each_kind_of_model(
    small_maps: str, changes: dict[str, Any], dtype: torch.dtype, bound: float, randomise: Any
) -> None:
    model = randomise(tiny(swin, small_maps=small_maps, **changes)).to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = muntin.optimize(model)
    twin = copy.deepcopy(fast)
    for size in (*SIZES, (224, 224)) if dtype == torch.float64 else SIZES:
        image = torch.randn(2, 3, *size, dtype=dtype)
        with torch.inference_mode():
            assert error_of(fast(image), model(image)) < bound, size
            assert torch.equal(twin(image), fast(image))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", SIZES)
def test_fused_attention_equals_explicit_products_in_training(
    size: tuple[int, int], randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does in training, on the CPU."""
    model = randomise(tiny(swin)).train()
    image = torch.randn(3, 3, *size)
    wanted = model(image)
    monkeypatch.setattr(WindowAttention, "_fused", staticmethod(lambda x: True))
    assert error_of(model(image), wanted) < 1e-5


def test_batch_norm_under_gradient_checkpointing(randomise: Any) -> None:
    """Gradients reach every parameter, and running statistics are updated once."""
    plain = randomise(tiny(swin, norm="batch")).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    image = torch.randn(2, 3, 61, 83)
    for model in (plain, saving):
        model(image).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad.abs().sum() > 0, name
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_optimize_leaves_no_batch_norm_but_for_features(randomise: Any) -> None:
    model: Any = randomise(muntin.create_model("swin_free_t_br", 10, dim=32, heads=(1, 2, 4, 8))).eval()
    fast: Any = muntin.optimize(model)
    assert [name for name, module in fast.named_modules() if isinstance(module, nn.BatchNorm1d)] == ["head.norm"]
    image = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    maps = model.double().backbone(image)[-1]
    head = muntin.runtime.fold(model).head
    with torch.no_grad():
        assert error_of(head(maps), model.head(maps)) < 1e-12
        assert error_of(head.features(maps), model.head.features(maps)) < 1e-12
        assert error_of(head.fc(head.pooled(maps)), model.head(maps)) < 1e-12


def test_bias_cache_follows_the_weights() -> None:
    model = muntin.create_model("swin_t", 10, dim=16, depths=(2, 2), heads=(1, 2), window=4).eval()
    image = torch.randn(1, 3, 64, 64)
    for edit in ("data", "load", "dtype"):
        with torch.inference_mode():
            stale = model(image)
        if edit == "data":
            for module in model.modules():
                if isinstance(module, WindowAttention):
                    module.bias_table.data.normal_()  # no version counter sees this
        elif edit == "load":
            model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        else:
            model.double()
            image = image.double()
        with torch.inference_mode():
            found = model(image)
        wanted = model(image)  # with gradients: nothing cached
        assert error_of(found, wanted) < 1e-5
        assert edit == "dtype" or error_of(found, stale) > 1e-3


def test_batch_norm_statistics_ignore_padding(randomise: Any) -> None:
    model = randomise(muntin.create_model("swin_b_br", 10, dim=16, depths=(2,), heads=(2,), window=7)).train()
    seen: list[Tensor] = []
    block: Any = model.backbone.stages[0].blocks[0]
    block.norm1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(torch.randn(2, 3, 36, 40))  # a 9 x 10 map, padded to 14 x 14 for windows of 7
    assert seen[0].numel() == 2 * 9 * 10 * 16


def test_rows_of_the_ablation_tables_are_overrides() -> None:
    with torch.device("meta"):
        model = muntin.create_model("swin_b", window=(7, 14, 14, 7), shift=False)
        free = muntin.create_model("swin_free_b")
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in free.named_parameters()}
        some = muntin.create_model("swin_b", shift=(True, True, False, True))
    shifted = [[block.shifted for block in stage.blocks] for stage in some.backbone.stages]
    assert shifted == [[False, True], [False, True], [False] * 18, [False, True]]


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_drop_path_grows_linearly(rate: float) -> None:
    model = muntin.create_model("swin_t", dim=32, heads=(1, 2, 4, 8), drop_path=rate)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([rate * i / 11 for i in range(12)])
