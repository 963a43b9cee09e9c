"""What every backbone must do, on the tiny configuration of each family, and the public names."""

import copy
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import muntin
from conftest import error_of, settle
from muntin.layers.drop import DropPath
from muntin.models import FAMILIES
from muntin.models.classifier import Classifier
from muntin.runtime.packed import Packed, pack

SIZES = ((64, 64), (61, 83), (9, 70), (5, 3), (1, 1))


def tiny(family: Any, **changes: Any) -> Classifier:
    row = dataclasses.replace(family.TINY, **changes)
    return Classifier("tiny", family.BACKBONE(row, out_indices=(-1,)), family.HEAD(row, 10), 10)


def small(family: Any) -> Classifier:
    """Two stages of `tiny`, with every mechanism still, for what takes as long as a graph has operations."""
    chosen = (0, 3) if family.__name__.endswith("rmt") else (0, 1)  # decomposed and whole
    stages = len(family.TINY.depths)
    rows = {field.name: getattr(family.TINY, field.name) for field in dataclasses.fields(family.TINY)}
    per_stage = {name: row for name, row in rows.items() if isinstance(row, tuple) and name != "kernels"}
    assert all(len(row) == stages for row in per_stage.values())
    return tiny(family, **{name: tuple(row[i] for i in chosen) for name, row in per_stage.items()})


def with_fixed_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms in evaluation mode, whatever the mode of the rest."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def families() -> Any:
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rpartition(".")[2])


@families()
@pytest.mark.parametrize("size", SIZES)
def test_maps_have_the_stated_channels_and_strides(family: Any, size: tuple[int, int]) -> None:
    backbone = family.BACKBONE(family.TINY).eval()
    maps = backbone(torch.randn(2, 3, *size))
    assert len(maps) == len(backbone.channels) == len(backbone.strides)
    for found, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert found.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@families()
def test_out_indices_select_from_all_maps(family: Any, randomise: Any) -> None:
    every = randomise(family.BACKBONE(family.TINY)).eval()
    some = family.BACKBONE(family.TINY, out_indices=(0, -1)).eval()
    some.load_state_dict(every.state_dict())
    image = torch.randn(1, 3, 61, 83)
    maps, chosen = every(image), some(image)
    assert torch.equal(chosen[0], maps[0]) and torch.equal(chosen[1], maps[-1])
    assert some.channels == (every.channels[0], every.channels[-1])
    with pytest.raises(muntin.UserError, match="out_indices=.*rising order"):
        family.BACKBONE(family.TINY, out_indices=(9,))


@families()
@pytest.mark.parametrize("size", SIZES)
def test_inference_equals_training_forward(family: Any, size: tuple[int, int], randomise: Any) -> None:
    model = settle(randomise(tiny(family))).eval()
    image = torch.randn(3, 3, *size)
    with torch.inference_mode():
        fast = model(image)
    assert error_of(fast, model(image)) < 1e-5
    assert error_of(with_fixed_statistics(model.train())(image), fast) < 1e-5  # nothing else depends on the mode


@families()
def test_images_do_not_see_each_other(family: Any, randomise: Any) -> None:
    model = settle(randomise(tiny(family))).eval()
    images = torch.randn(5, 3, 72, 56)
    with torch.inference_mode():
        together = model(images)
        apart = torch.cat([model(image[None]) for image in images])
    assert error_of(together, apart) < 1e-5


@families()
def test_gradients_reach_every_parameter(family: Any, randomise: Any) -> None:
    model = randomise(tiny(family)).train()
    model(torch.randn(2, 3, 61, 83)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@families()
def test_gradient_checkpointing_changes_nothing(family: Any, randomise: Any) -> None:
    plain = randomise(tiny(family)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    image = torch.randn(2, 3, 61, 83)
    for model in (plain, saving):
        model(image).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), name  # running statistics are updated once


@families()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_optimize_equals_the_model(family: Any, dtype: torch.dtype, bound: float, randomise: Any) -> None:
    """As a classifier, and with the windows of dense prediction."""
    for dense in ({}, family.DENSE):
        model = settle(randomise(tiny(family, **dense))).to(dtype).eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fast = muntin.optimize(model)
        twin = copy.deepcopy(fast)
        for size in (*SIZES, (224, 224)) if dtype == torch.float64 else SIZES:
            image = torch.randn(2, 3, *size, dtype=dtype)
            with torch.inference_mode():
                assert error_of(fast(image), model(image)) < bound, size
                assert torch.equal(twin(image), fast(image))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["swin_t", "swinv2_t", "swin_free_t_br", "efficientvit_m0", "rmt_t"])
def test_an_optimised_copy_says_what_was_folded(name: str) -> None:
    model = muntin.create_model(name)
    fast: Any = muntin.optimize(model)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    folds = fast.folds
    assert sum(count for what, count in folds.items() if what.startswith("BatchNorm")) == norms
    packed = sum(isinstance(module, Packed) for module in fast.modules())
    assert folds["weights packed for oneDNN"] == packed > 0
    fused = sum(module.act != "none" for module in fast.modules() if isinstance(module, Packed))
    assert folds["activation into the product before it"] == fused > 0


@families()
def test_an_optimised_copy_follows_what_is_done_to_it(family: Any, randomise: Any) -> None:
    """Loading, another dtype, autocast and gradients: packed products serve none of them as they are."""
    models = [settle(randomise(tiny(family), seed=seed)).eval() for seed in (1, 2)]
    one, two = (muntin.optimize(model) for model in models)
    image = torch.randn(2, 3, 61, 83)
    with torch.inference_mode():
        wanted = two(image)
        one(image)  # what it keeps is of its own weights
        one.load_state_dict(two.state_dict())
        assert torch.equal(one(image), wanted)
        exact = copy.deepcopy(one).double()
        assert error_of(copy.deepcopy(exact)(image.double()), wanted) < 2e-5
        assert error_of(exact.float()(image), wanted) < 2e-5  # packed again
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-5 < error_of(one(image), wanted) < 0.3
    gradients = []
    for model in (one, models[1]):
        seen = image.clone().requires_grad_()
        model(seen).square().sum().backward()
        gradients.append(seen.grad)
    assert error_of(gradients[0], gradients[1]) < 1e-3
    assert muntin.optimize(one) is one


@families()
def test_what_an_optimised_copy_refuses(family: Any, tmp_path: Path) -> None:
    fast: Any = muntin.optimize(tiny(family))
    for refused in (
        lambda: muntin.export(fast, tmp_path / "m.onnx"),
        lambda: fast.reset_classifier(3),
        lambda: muntin.load_checkpoint(fast, tiny(family).state_dict()),
    ):
        with pytest.raises(muntin.UserError, match="optimised copy"):
            refused()


@families()
def test_autocast_stays_close(family: Any, randomise: Any) -> None:
    model = settle(randomise(tiny(family))).eval()
    image = torch.randn(2, 3, 61, 83, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image)
        low = model.bfloat16()(image.bfloat16())
    assert 1e-5 < ((rough - exact).std() / exact.std()).item() < 0.1
    assert low.dtype == torch.bfloat16 and ((low - exact).std() / exact.std()).item() < 0.2


@families()
def test_layout_of_the_image_in_memory_does_not_matter(family: Any, randomise: Any) -> None:
    model = settle(randomise(tiny(family))).eval()
    image = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        assert error_of(model(image.contiguous(memory_format=torch.channels_last)), model(image)) < 1e-5


@families()
def test_training_after_inference_mode_at_another_size(family: Any, randomise: Any) -> None:
    model = randomise(tiny(family))
    image = torch.randn(2, 3, 61, 83)
    with torch.inference_mode():
        model.eval()(image)
    model.train()(image).sum().backward()
    with torch.inference_mode():
        model.eval()(torch.randn(1, 3, 33, 17))
        again = model(image)
    assert error_of(again, model(image)) < 1e-5


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    for shape, axis in (((4000, 3, 2), 0), ((2, 4000, 3, 2), 1)):
        out = drop(torch.ones(shape)).movedim(axis, 0).flatten(1)
        assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert bool((out == out[:, :1]).all())
        assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))


def test_every_variant_builds_without_memory() -> None:
    with torch.device("meta"):
        for name in muntin.list_models():
            model = muntin.create_model(name).eval()
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000), name
            assert model.name == name and dataclasses.is_dataclass(model.config)


def test_classifier_head() -> None:
    model = muntin.create_model("swin_t", 10, dim=16, heads=(1, 2, 4, 8)).eval()
    image = torch.randn(2, 3, 70, 64)
    features = model.forward_features(image)
    assert features.shape == (2, 128, 3, 2)
    torch.testing.assert_close(model.head.fc(features.mean((2, 3))), model(image))
    model.reset_classifier(3)
    assert model(image).shape == (2, 3) and model.num_classes == 3


def test_configuration_round_trips_through_plain_data() -> None:
    import json

    for name in muntin.list_models():
        with torch.device("meta"):
            model = muntin.create_model(name)
            plain = json.loads(json.dumps(dataclasses.asdict(model.config)))
            assert muntin.create_model(name, **plain).config == model.config


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("swin_ty", {}, "no model 'swin_ty'.*'swin_t'.*muntin models"),
        ("swin_t", {"windw": 7}, "no field 'windw'.*'window'.*valid are dim, depths"),
        ("swin_t", {"dim": 97}, "dim=97.*heads=3 does not divide"),
        ("swin_t", {"window": 0}, "window=0.*at least 1"),
        ("swin_t", {"window": (7, 7)}, "window=.*2 entries for 4 stages"),
        ("swin_t", {"heads": (3, 6, 12)}, "heads=.*3 entries for 4 stages"),
        ("swin_t", {"norm": "group"}, "norm='group'.*'layer', 'batch'"),
        ("swin_t", {"act": "tanh"}, "act='tanh'.*'gelu', 'relu'"),
        ("swin_t", {"small_maps": "crop"}, "small_maps='crop'.*'shrink', 'pad'"),
        ("swin_t", {"shift": 3}, "shift=3.*True or False"),
        ("swin_t", {"mlp_ratio": 0}, "mlp_ratio=0.*positive"),
        ("swin_t", {"mlp_ratio": "a"}, "mlp_ratio='a'.*positive"),
        ("swin_t", {"mlp_ratio": float("nan")}, "mlp_ratio=nan.*positive"),
        ("swin_t", {"mlp_ratio": 0.001}, "mlp_ratio=0.001.*one hidden channel"),
        ("swin_t", {"depths": 3}, "depths=3.*for each stage"),
        ("swin_t", {"depths": ()}, "depths=.*for each stage"),
        ("swin_t", {"dim": True}, "dim=True.*at least 1"),
        ("swin_t", {"window": "abc"}, "window='abc'.*at least 1"),
        ("swin_t", {"norm": ["layer"]}, "norm=.*'layer', 'batch'"),
        ("swin_t", {"split_heads": 1}, "split_heads=1.*True or False"),
        ("swin_t", {"attend": 3}, "attend=3.*tuple of block numbers"),
        ("swin_t", {"drop_path": "x"}, "drop_path='x'.*below 1"),
        (5, {}, "name is text, not 5"),
        (".x", {}, "no model '.x'"),
        ("swin_t", {"attend": (99,)}, "attend=.*0 to 11"),
        ("swin_t", {"drop_path": 1.5}, "drop_path=1.5.*below 1"),
        ("swin_t", {"num_classes": 0}, "num_classes=0.*at least 1"),
        ("swin_t", {"pretrained": 1}, "pretrained=1.*a tag, an address or a path"),
        ("rmt_t", {"projection": (1,)}, "projection=.*a width"),
        ("rmt_t", {"decay_min": (2,)}, "decay_min=.*a number above 0"),
        ("rmt_t", {"position_conv": (True,)}, "position_conv=.*True or False"),
        ("swin_free_t", {"pretrained": True}, "no weights of Swin-Free are published"),
        ("nowhere.models.x", {}, "cannot import 'nowhere.models'"),
        ("muntin.models.swin.nothing", {}, "neither a variant nor a configuration 'nothing'"),
    ],
)
def test_bad_names_and_values_say_what_is_valid(name: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(muntin.UserError, match=words):
        muntin.create_model(name, **config)


@families()
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (2, 3, 0, 32), (0, 3, 32, 32)])
def test_images_of_another_shape_are_refused(family: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(muntin.UserError, match="shape .*give a batch"):
        tiny(family)(torch.zeros(shape))


def test_a_configuration_from_outside_keeps_its_windows_in_a_backbone() -> None:
    assert muntin.create_backbone("muntin.models.efficientvit.TINY").config.windows == (3, 2, 2)
    assert muntin.create_backbone("efficientvit_m0").config.windows == (7, 7, 7)
    assert muntin.create_backbone("muntin.models.swin.TINY").config.small_maps == "pad"


def test_out_indices_are_a_tuple() -> None:
    with pytest.raises(muntin.UserError, match=r"out_indices=2: give a tuple.*\(2,\)"):
        muntin.create_backbone("swin_t", out_indices=2)  # type: ignore[arg-type]


def test_a_configuration_from_outside_by_its_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("elsewhere")
    module.SMALL = FAMILIES[0].TINY
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    assert muntin.create_model("elsewhere.SMALL", 10).config == FAMILIES[0].TINY
    assert len(muntin.create_backbone("elsewhere.SMALL").channels) == 4


def test_listing() -> None:
    assert muntin.list_models("swin_free_b*")[:2] == ["swin_free_b", "swin_free_b_dr10"]
    published = set("swin_t swin_s swin_b swin_l swin_b_br".split())
    for size in "tsb":
        published |= {f"swin_free_{size}", f"swin_free_{size}_br"}
    published |= {f"swin_free_b{br}_dr{x}" for br in ("", "_br") for x in (10, 12, 14, 16)}
    published |= {f"swinv2_{size}" for size in "tsbl"} | {f"efficientvit_m{number}" for number in range(6)}
    published |= {f"rmt_{size}" for size in "tsbl"} | {"rmt_deit_s", "rmt_swin_t", "rmt_swin_s"}
    assert published | {"swin_free_digits"} == set(muntin.list_models())


def test_public_names_are_what_can_be_imported() -> None:
    assert sorted(muntin.__all__) == list(muntin.__all__)
    visible = {n for n, v in vars(muntin).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert visible == set(muntin.__all__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@families()
@pytest.mark.parametrize("size", SIZES)
def test_a_gpu_computes_the_same(family: Any, size: tuple[int, int], randomise: Any) -> None:
    model = randomise(tiny(family)).double()
    image = torch.randn(3, 3, *size, dtype=torch.float64)
    model(image).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu.zero_grad()
    on_gpu(image.cuda()).square().sum().backward()
    for name, parameter in on_gpu.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), wanted[name], msg=name)
    with torch.inference_mode():
        assert error_of(on_gpu.eval()(image.cuda()).cpu(), model.eval()(image)) < 1e-8
        assert error_of(on_gpu.float()(image.cuda().float()).cpu(), model(image)) < 1e-3


def test_small_products_equal_large_ones() -> None:
    """Below a number of operations a packed layer leaves oneDNN out: with the activation and the bias all the same."""
    layer = nn.Sequential(nn.Linear(24, 16), nn.ReLU()).eval()
    wide = pack(copy.deepcopy(layer))[0]
    assert isinstance(wide, Packed) and wide.act == "relu"
    tokens = torch.randn(4000, 24)  # times 24 x 16 more than a million
    with torch.inference_mode():
        whole, parts = wide(tokens), torch.cat([wide(part) for part in tokens.split(100)])
        assert error_of(whole, layer(tokens)) < 1e-5
        assert error_of(parts, layer(tokens)) < 1e-5
