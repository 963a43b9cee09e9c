"""SwinV2 against the slow reference, the authors, timm, torchvision and transformers; its weights; numbers that hold.

Each mutation of the reference in the list is a mistake that is easily made: with any of them the comparison fails.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import timm.models.swin_transformer_v2 as timm_swin
import torch
import torchvision.models.swin_transformer as vision_swin
import transformers
from torch import Tensor, nn

import muntin
from conftest import error_of
from muntin.errors import UserError
from muntin.layers.reference import swin as reference_swin
from muntin.layers.reference import swinv2 as reference
from muntin.measure.cost import cost
from muntin.models import create_backbone, create_model
from muntin.models.swinv2 import CosineAttention, SwinV2Block
from muntin.weights import convert, load_checkpoint

BASE: dict[str, Any] = {"dim": 8, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 4}
SIZES = [(1, 1), (3, 5), (16, 16), (23, 37), (64, 64), (61, 83), (96, 40), (5, 70), (130, 9)]
WINDOWS: list[Any] = [4, 3, 5, (7, 4, 3, 2), (4, 8, 4, 2), 1]
PRETRAINED: list[Any] = [None, None, 0, 6, 1, (3, 0, 5, 2)]


def _image(size: tuple[int, int], batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [y.shape for y in found] == [y.shape for y in wanted]
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, wanted, strict=True)
    )


# The slow reference, and the authors


def inference(model: Any, image: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return model(image)


def gradients(model: Any, image: Tensor) -> list[Tensor]:
    return [y.detach() for y in model(image)]


def symbolic(model: Any, image: Tensor) -> list[Tensor]:
    """What export and compile trace: gathers alone."""
    with torch.no_grad():
        return model._forward_raster(image)


def folded(model: Any, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return muntin.runtime.fold(model)(image)


PATHS: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "inference": inference,
    "gradients": gradients,
    "symbolic": symbolic,
    "folded": folded,
}


def _cases(count: int) -> Iterator[Any]:
    """Every size under both rules, the rest drawn with a seed."""
    draw = random.Random(4)
    for number in range(count):
        config = BASE | {"window": draw.choice(WINDOWS), "pretrained_window": draw.choice(PRETRAINED)}
        config["small_maps"] = ("shrink", "pad")[number % 2]
        size = SIZES[number // 2 % len(SIZES)]
        text = f"{config['small_maps']}-{config['window']}-{config['pretrained_window']}".replace(" ", "")
        yield pytest.param(config, size, id=f"{size[0]}x{size[1]}-{text}")


@pytest.mark.parametrize(("config", "size"), list(_cases(18)))
def test_fast_equals_reference(config: dict[str, Any], size: tuple[int, int], randomise: Any) -> None:
    model = randomise(create_backbone("swinv2_t", out_norm=True, **config)).double().eval()
    image = _image(size, batch=2, dtype=torch.float64)
    wanted = reference.swinv2(image, model.state_dict(), asdict(model.config))
    for name, run in PATHS.items():
        assert _largest(run(model, image), wanted) < 1e-10, name


@pytest.mark.parametrize("small_maps", ["shrink", "pad"])
def test_gradients_equal_reference(small_maps: str, randomise: Any) -> None:
    config = BASE | {"depths": (1, 2), "heads": (1, 2), "small_maps": small_maps}
    model = randomise(create_model("swinv2_t", 5, **config)).double().train()
    image = _image((27, 18), batch=2, dtype=torch.float64)
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
    wanted = reference.swinv2_logits(image, state, asdict(model.config))
    found = model(image)
    assert error_of(found.detach(), wanted.detach()) < 1e-10
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - state[name].grad).abs().max() < 1e-8, name
    attention: Any = model.backbone.stages[0].blocks[0].attention
    for parameter in (attention.logit_scale, attention.qv_bias, attention.position.fc1.weight):
        assert parameter.grad.abs().max() > 1e-4


def test_authors(golden: Any) -> None:
    file = golden("swinv2")
    config = dict(file.config)
    model = create_model(config.pop("model"), config.pop("num_classes"), **config).eval()
    assert load_checkpoint(model, file.weights).dialect == "authors"
    for image, wanted in file.pairs:
        slow = reference.swinv2_logits(image, model.state_dict(), asdict(model.config))
        assert error_of(slow.detach(), wanted[0]) < 1e-5
        for grad in (False, True):  # the forward of inference and that of training
            with torch.set_grad_enabled(grad):
                assert error_of(model(image).detach(), wanted[0]) < 1e-5


def test_reference_shares_nothing_with_the_package() -> None:
    with open(reference.__file__) as file:
        assert "muntin" not in file.read()


# Mutations: each makes one mistake in the reference, or in the weights that it is given.

MUTATED = BASE | {"window": (4, 3, 5, 4), "pretrained_window": (0, 5, 0, 0), "small_maps": "shrink"}
MUTATED_SIZE = (61, 83)  # maps 16x21, 8x11, 4x6 and 2x3: whole, padded on one axis or both, cropped on one or both
State = dict[str, Tensor]


def coordinates_without_log(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "coordinate", lambda offset, extent: offset / max(extent - 1, 1))


def coordinates_in_nats(state: State, patch: pytest.MonkeyPatch) -> None:
    right = reference.coordinate
    patch.setattr(reference, "coordinate", lambda offset, extent: right(offset, extent) * math.log(2))


def coordinates_without_sign(state: State, patch: pytest.MonkeyPatch) -> None:
    right = reference.coordinate
    patch.setattr(reference, "coordinate", lambda offset, extent: abs(right(offset, extent)))


def coordinates_by_the_whole_window(state: State, patch: pytest.MonkeyPatch) -> None:
    right = reference.coordinate
    patch.setattr(reference, "coordinate", lambda offset, extent: right(offset, extent + 1))


def coordinates_of_columns_first(state: State, patch: pytest.MonkeyPatch) -> None:
    _change(state, "fc1.weight", lambda weight: weight.flip(1))


def coordinates_reversed(state: State, patch: pytest.MonkeyPatch) -> None:
    _change(state, "fc1.weight", lambda weight: -weight)


def _bias(patch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    right = reference.continuous_bias
    patch.setattr(reference, "continuous_bias", lambda *args: change(right, *args))


def pretrained_window_ignored(state: State, patch: pytest.MonkeyPatch) -> None:
    _bias(patch, lambda right, *args: right(*args[:-1], 0))


def shrunk_window_measured_in_the_whole(state: State, patch: pytest.MonkeyPatch) -> None:
    _bias(patch, lambda right, *args: right(*args[:-1], args[-1] or 4))


def bias_not_times_16(state: State, patch: pytest.MonkeyPatch) -> None:
    _bias(patch, lambda right, *args: right(*args) / 16)


def bias_without_sigmoid(state: State, patch: pytest.MonkeyPatch) -> None:
    _bias(patch, lambda right, *args: (right(*args) / 16).logit())


def bias_of_another_head(state: State, patch: pytest.MonkeyPatch) -> None:
    _change(state, "fc2.weight", lambda weight: weight.flip(0))


def dot_products_for_cosines(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "unit", lambda x: x)


def scale_without_exp(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "logit_scale", lambda raw: raw)


def scale_without_limit(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "logit_scale", torch.exp)


def _project(patch: pytest.MonkeyPatch, change: Callable[..., tuple[Tensor, ...]]) -> None:
    right = reference.project
    patch.setattr(reference, "project", lambda *args: change(*right(*args), *args))


def a_bias_of_k(state: State, patch: pytest.MonkeyPatch) -> None:
    _project(patch, lambda q, k, v, *args: (q, k + 0.1, v))


def v_without_bias(state: State, patch: pytest.MonkeyPatch) -> None:
    for name in state:
        if name.endswith("qv_bias"):
            state[name] = torch.cat([state[name].chunk(2)[0], torch.zeros(len(state[name]) // 2).to(state[name])])


def queries_for_keys(state: State, patch: pytest.MonkeyPatch) -> None:
    _project(patch, lambda q, k, v, *args: (k, q, v))


def padding_shut_out(state: State, patch: pytest.MonkeyPatch) -> None:
    _project(patch, lambda q, k, v, x, *args: (q, k, v * (x != 0).any(-1, keepdim=True)))


def mask_left_out(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "neighbour_mask", lambda places: torch.zeros(len(places), len(places)))


def shift_off_by_one(state: State, patch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        axis = reference_swin.divide_axis(*args)
        return axis._replace(shift=axis.shift + 1) if axis.shift else axis

    patch.setattr(reference, "divide_axis", wrong)


def rule_for_small_maps_swapped(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "divide_axis", lambda *args: reference_swin.divide_axis(*args[:-1], "pad"))


def norms_before_the_branches(state: State, patch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weights: Any, name: str, shifted: bool, config: Any) -> Tensor:
        y = reference.norm(x, weights, f"{name}.norm1", reference.LAYER)
        x = x + reference.cosine_attention(y, weights, f"{name}.attention", shifted, config)
        y = reference.norm(x, weights, f"{name}.norm2", reference.LAYER)
        y = reference.activation(y @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"], {"act": ""})
        return x + y @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]

    patch.setattr(reference, "block", wrong)


def norms_swapped(state: State, patch: pytest.MonkeyPatch) -> None:
    for name in [name for name in state if ".norm1." in name]:
        other = name.replace("norm1", "norm2")
        state[name], state[other] = state[other], state[name]


def merge_row_by_row(state: State, patch: pytest.MonkeyPatch) -> None:
    _change(state, "reduction.weight", lambda weight: weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2))


def merge_without_norm(state: State, patch: pytest.MonkeyPatch) -> None:
    right = reference.norm

    def wrong(x: Tensor, weights: Any, name: str, config: Any) -> Tensor:
        return x if ".merge." in name else right(x, weights, name, config)

    patch.setattr(reference, "norm", wrong)


def eps_of_another_framework(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference_swin, "LAYER_EPS", 1e-6)


def gelu_by_tanh(state: State, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "activation", lambda x, config: nn.functional.gelu(x, approximate="tanh"))


def _change(state: State, ending: str, change: Callable[[Tensor], Tensor]) -> None:
    for name in state:
        if name.endswith(ending):
            state[name] = change(state[name])


MUTATIONS = [
    coordinates_without_log,
    coordinates_in_nats,
    coordinates_without_sign,
    coordinates_by_the_whole_window,
    coordinates_of_columns_first,
    coordinates_reversed,
    pretrained_window_ignored,
    shrunk_window_measured_in_the_whole,
    bias_not_times_16,
    bias_without_sigmoid,
    bias_of_another_head,
    dot_products_for_cosines,
    scale_without_exp,
    scale_without_limit,
    a_bias_of_k,
    v_without_bias,
    queries_for_keys,
    padding_shut_out,
    mask_left_out,
    shift_off_by_one,
    rule_for_small_maps_swapped,
    norms_before_the_branches,
    norms_swapped,
    merge_row_by_row,
    merge_without_norm,
    eps_of_another_framework,
    gelu_by_tanh,
]


@pytest.fixture(scope="module")
def intact() -> tuple[State, dict[str, Any], Tensor, list[Tensor]]:
    """Weights, configuration, image and the fast model's maps; one head's scale is above its limit."""
    model = create_backbone("swinv2_t", **MUTATED).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim == 1:
                tensor.copy_(1 + 0.3 * noise if name.endswith(("weight", "logit_scale")) else 0.3 * noise)
            else:
                tensor.copy_(1.3 * noise / tensor[0].numel() ** 0.5)
        model.stages[0].blocks[0].attention.logit_scale[0] = 5.0
    image = _image(MUTATED_SIZE, dtype=torch.float64)
    return dict(model.state_dict()), asdict(model.config), image, inference(model, image)


@pytest.mark.parametrize("mutate", [None, *MUTATIONS])
def test_mutations_show(mutate: Any, intact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config, image, found = intact
    state = dict(weights)
    if mutate is not None:
        mutate(state, monkeypatch)
    error = _largest(reference.swinv2(image, state, config), found)
    assert error < 1e-10 if mutate is None else error > 1e-7


# Other libraries

SMALL: dict[str, Any] = {"dim": 16, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 8}
FULL: dict[str, Any] = {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 8}
WIDE = SMALL | {"window": 16}
FINETUNED = SMALL | {"window": 16, "pretrained_window": (12, 12, 12, 6)}
DETAILED = SMALL | {"pretrained_window": 6}


def _trained(config: dict[str, Any]) -> tuple[int, ...]:
    trained = config.get("pretrained_window") or 0
    return trained if isinstance(trained, tuple) else (trained,) * 4


def _timm(config: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    return timm_swin.SwinTransformerV2(
        img_size=size,
        embed_dim=config["dim"],
        depths=config["depths"],
        num_heads=config["heads"],
        window_size=config["window"],
        pretrained_window_sizes=_trained(config),
        num_classes=10,
    )


def _torchvision(config: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    return vision_swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=config["dim"],
        depths=list(config["depths"]),
        num_heads=list(config["heads"]),
        window_size=[config["window"]] * 2,
        stochastic_depth_prob=0.0,
        num_classes=10,
        block=vision_swin.SwinTransformerBlockV2,
        downsample_layer=vision_swin.PatchMergingV2,
    )


def _transformers(config: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    return transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            image_size=size,
            embed_dim=config["dim"],
            depths=list(config["depths"]),
            num_heads=list(config["heads"]),
            window_size=config["window"],
            pretrained_window_sizes=list(_trained(config)),
            num_labels=10,
        )
    )


PEERS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}
CASES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    *(("timm", SMALL, size) for size in ((256, 256), (512, 512), (512, 256))),
    *((peer, SMALL, (size, size)) for peer in ("torchvision", "transformers") for size in (256, 320)),
    ("torchvision", SMALL, (240, 304)),
    *((peer, FULL, (256, 256)) for peer in PEERS),
    *((peer, WIDE, (256, 256)) for peer in ("timm", "transformers")),
    *((peer, FINETUNED, (256, 256)) for peer in ("timm", "transformers")),
    *((peer, DETAILED, (256, 256)) for peer in ("timm", "transformers")),
]


def _name(case: tuple[str, dict[str, Any], tuple[int, int]]) -> str:
    peer, config, size = case
    trained = f"-from{config['pretrained_window']}".replace(" ", "") if "pretrained_window" in config else ""
    return f"{peer}-{config['dim']}-{size[0]}x{size[1]}-{config['window']}{trained}"


@pytest.mark.parametrize(("peer", "config", "size"), CASES, ids=map(_name, CASES))
def test_peers(peer: str, config: dict[str, Any], size: tuple[int, int], randomise: Any) -> None:
    other = randomise(PEERS[peer](config, size)).eval()
    for module in other.modules():
        if isinstance(module, vision_swin.ShiftedWindowAttentionV2):
            module.define_relative_position_bias_table()  # a buffer, which was filled like a weight
    model = create_model("swinv2_t", 10, **config).eval()
    report = load_checkpoint(model, other.state_dict())
    assert report.dialect == peer
    assert len(report.loaded) == len(model.state_dict())
    image = _image(size)
    with torch.no_grad():
        wanted = other(image)
        found = model(image)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
    assert error_of(found, wanted) < 1e-4


@pytest.mark.parametrize(
    ("name", "window", "parameters", "gmacs"),
    [
        ("swinv2_t", 8, 28_347_154, 5.940),
        ("swinv2_t", 16, 28_347_154, 6.661),
        ("swinv2_s", 8, 49_728_418, 11.546),
        ("swinv2_s", 16, 49_728_418, 12.783),
        ("swinv2_b", 8, 87_918_816, 20.325),
        ("swinv2_b", 16, 87_918_816, 21.969),
    ],
)
def test_cost_is_the_published(name: str, window: int, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = create_model(name, window=window)
    found = cost(model, 256)
    assert found.parameters == parameters
    assert round(found.gmacs, 3) == gmacs


# Weights

NAMES = ["authors", "timm", "torchvision", "transformers", "mm", "mmpretrain"]


def _tiny(family: str, seed: int, randomise: Any) -> Any:
    return randomise(create_model(family, 10, **BASE), seed).eval()


def _equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dialect", [name for name in NAMES if name != "mm"])
def test_there_and_back_is_exact(dialect: str, randomise: Any) -> None:
    model, other = (_tiny("swinv2_t", seed, randomise) for seed in (1, 2))
    theirs = convert(model.state_dict(), dialect)
    assert _equal(convert(theirs), dict(model.state_dict()))
    report = load_checkpoint(other, theirs)
    assert report.dialect == dialect
    assert set(report.loaded) == set(model.state_dict())
    assert _equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("dialect", ["authors", "mm", "transformers"])
def test_there_and_back_is_exact_for_backbones(dialect: str, randomise: Any) -> None:
    model, other = (randomise(create_backbone("swinv2_t", out_norm=True, **BASE), seed) for seed in (1, 2))
    report = load_checkpoint(other, convert(model.state_dict(), dialect))
    assert report.dialect == dialect
    assert set(report.loaded) == set(model.state_dict())
    assert _equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("dialect", ["timm", "torchvision", "transformers"])
def test_names_and_shapes_are_those_of_the_libraries(dialect: str, randomise: Any) -> None:
    found = convert(_tiny("swinv2_t", 1, randomise).state_dict(), dialect)
    wanted = PEERS[dialect](BASE, (64, 64)).state_dict()
    derived = ("relative_position_index", "relative_coords_table")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in wanted.items() if not name.endswith(derived)
    }


def test_torchvision_has_zeros_for_k(randomise: Any) -> None:
    model = _tiny("swinv2_t", 1, randomise)
    theirs = convert(model.state_dict(), "torchvision")
    q, k, v = theirs["features.3.1.attn.qkv.bias"].chunk(3)
    assert not k.any()
    assert torch.equal(torch.cat([q, v]), model.backbone.stages[1].blocks[1].attention.qv_bias)


def test_timm_before_0_9_is_the_authors_dialect(randomise: Any) -> None:
    """Then downsampling stood at the end of a stage, the head had no `fc`, and buffers were in the file."""
    model, other = (_tiny("swinv2_t", seed, randomise) for seed in (1, 2))
    old = convert(model.state_dict(), "authors")
    assert "layers.0.downsample.reduction.weight" in old and "head.weight" in old
    derived = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16),
        "layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2),
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
    }
    report = load_checkpoint(other, old | derived)
    assert set(report.ignored) == set(derived)
    assert _equal(dict(other.state_dict()), dict(model.state_dict()))


def test_another_window_needs_no_resizing(randomise: Any) -> None:
    model = _tiny("swinv2_t", 1, randomise)
    wide = create_model("swinv2_t", 10, **BASE | {"window": 7, "pretrained_window": 4})
    report = load_checkpoint(wide, convert(model.state_dict(), "timm"))
    assert not report.resized and len(report.loaded) == len(model.state_dict())


@pytest.mark.parametrize("dialect", [*NAMES, "muntin"])
@pytest.mark.parametrize(("file", "into"), [("swinv2_t", "swin_t"), ("swin_t", "swinv2_t")])
def test_swin_and_swinv2_are_told_apart(dialect: str, file: str, into: str, randomise: Any) -> None:
    make = create_backbone if dialect == "mm" else create_model
    given, target = randomise(make(file, **BASE), 1), randomise(make(into, **BASE), 2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError, match=rf"weights of {file[:-2]}\b.*the model is \w+ \({into[:-2]}\)"):
        load_checkpoint(target, convert(given.state_dict(), dialect))
    assert _equal(dict(target.state_dict()), dict(before))


def test_weights_of_another_size() -> None:
    with torch.device("meta"):
        state = convert(create_model("swinv2_b").state_dict(), "authors")
    with pytest.raises(UserError, match="like swinv2_b .*dim 128.*swinv2_t"):
        load_checkpoint(create_model("swinv2_t"), state)


# Training, caches, low precision


def test_branches_start_at_zero() -> None:
    model = create_model("swinv2_t", 10, **BASE).eval()
    blocks = [module for module in model.modules() if isinstance(module, SwinV2Block)]
    for block in blocks:
        for norm in (block.norm1, block.norm2):
            assert not norm.weight.any() and not norm.bias.any()
        assert torch.allclose(block.attention.logit_scale.exp(), torch.tensor(10.0))
        assert block.attention.position.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    x = torch.randn(1, 2, 35, 8)
    assert torch.equal(blocks[0](x, None, (5, 7)), x)


@pytest.mark.parametrize("weight", ["fc1.weight", "fc1.bias", "fc2.weight"])
def test_kept_biases_follow_the_weights(weight: str, randomise: Any) -> None:
    model = _tiny("swinv2_t", 1, randomise)
    image = _image((61, 83))
    with torch.inference_mode():
        stale = model(image)
        for module in model.modules():
            if isinstance(module, CosineAttention):
                module.position.get_parameter(weight).data.mul_(-1)  # no version counter sees this
        found = model(image)
        assert error_of(found, stale) > 1e-4
    assert error_of(found, model(image).detach()) < 1e-5  # with gradients nothing is kept


def test_biases_are_computed_once(randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = CosineAttention.table
    monkeypatch.setattr(CosineAttention, "table", lambda self, window: calls.append(window) or right(self, window))
    model = _tiny("swinv2_t", 1, randomise)
    for fast in (model, muntin.optimize(model)):
        calls.clear()
        with torch.inference_mode():
            fast(_image((64, 64)))
            once = len(calls)
            fast.train(False)(_image((64, 64), batch=3))
        assert once == len(calls) == 8


def test_no_weight_decay_on_scales_and_position_biases() -> None:
    from muntin.models.backbone import NO_DECAY

    model = create_model("swinv2_t", 10, **BASE)
    decayed = [name for name, p in model.named_parameters() if not (p.ndim <= 1 or name.endswith(NO_DECAY))]
    kinds = {name.split(".", 5)[-1] for name in decayed if ".blocks." in name}
    assert kinds == {"attention.qkv.weight", "attention.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_low_precision_stays_close_where_scales_are_large(randomise: Any) -> None:
    model = randomise(create_model("swinv2_t", 10, **SMALL | {"dim": 32})).eval()  # heads of 32 channels
    for module in model.modules():
        if isinstance(module, CosineAttention):
            module.logit_scale.data.fill_(math.log(30))
    image = _image((61, 83), batch=4)
    with torch.inference_mode():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert error_of(model(image), exact) < 0.15
        for dtype, bound in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):
            low = copy.deepcopy(model).to(dtype)(image.to(dtype))
            assert low.dtype == dtype and error_of(low, exact) < bound


def test_position_bias_is_not_rounded_to_bfloat16(randomise: Any) -> None:
    attention = randomise(CosineAttention(8, 2, 4))
    wanted = attention.table((4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.table((4, 3)), wanted)
    assert attention.bfloat16().table((4, 3)).dtype == torch.float32


def test_padded_keys_have_finite_gradients_in_float16(randomise: Any) -> None:
    """They are zero vectors: a gradient through 0 / |0| would overflow, and times zero be NaN."""
    attention = randomise(CosineAttention(8, 2, 4)).half()
    x = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)).half()
    x[0, 5:] = 0
    x.requires_grad_()
    y = attention(x, torch.zeros(1, 2, 16, 16, dtype=torch.float16))
    assert not attention._split(attention.project(x, None))[1][0, :, 5:].any()
    y.float().square().sum().mul(512).backward()
    for tensor in (x, *attention.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


def test_a_step_of_training_and_what_follows(randomise: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = create_model("swinv2_t", 10, drop_path=0.2, dim=16, heads=(1, 2, 4, 8)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image, label = _image((64, 96), batch=4), torch.tensor([1, 2, 3, 4])
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = create_model("swinv2_t", 10, pretrained=str(tmp_path / "model.pth"), dim=16, heads=(1, 2, 4, 8)).eval()
    with torch.inference_mode():
        wanted = model.eval()(image)
        assert torch.equal(again(image), wanted)
        assert error_of(muntin.optimize(model)(image), wanted) < 1e-5


@pytest.mark.filterwarnings("default")  # the exporter's own
def test_openvino_computes_the_same_coordinates(randomise: Any, tmp_path: Any) -> None:
    """The last stage's windows shrink with the image, and their coordinates are computed in the graph."""
    openvino = pytest.importorskip("openvino")
    model = randomise(create_model("swinv2_t", 10, **BASE | {"depths": (2, 1), "heads": (1, 2)})).eval()
    muntin.export(model, tmp_path / "model.onnx", sizes=[(32, 32)], batches=[1], progress=False)
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    engine = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", precision)
    for size in ((32, 32), (20, 61), (9, 5)):
        image = _image(size, batch=2)
        with torch.inference_mode():
            assert error_of(torch.from_numpy(engine(image.numpy())[0]), model(image)) < 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"window": 0}, "window=0.*at least 1"),
        ({"window": (8, 8)}, "window=.*2 entries for 4 stages"),
        ({"pretrained_window": -1}, "pretrained_window=-1.*0 or None"),
        ({"pretrained_window": "8"}, "pretrained_window='8'.*whole numbers"),
        ({"pretrained_window": (8, 8)}, "pretrained_window=.*2 entries for 4 stages"),
        ({"pretrained_window": True}, "pretrained_window=True.*whole numbers"),
        ({"dim": 97}, "dim=97.*heads=3 does not divide"),
        ({"depths": 3}, "depths=3.*for each stage"),
        ({"small_maps": "crop"}, "small_maps='crop'.*'shrink', 'pad'"),
        ({"shift": False}, "no field 'shift'.*valid are dim, depths"),
    ],
)
def test_impossible_values_say_what_is_valid(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_model("swinv2_t", **config)


def test_no_pretrained_window_in_three_ways() -> None:
    with torch.device("meta"):
        models = [create_model("swinv2_t", pretrained_window=value) for value in (None, 0, (None, 0, 0, None))]
    for model in models:
        assert {m.pretrained_window for m in model.modules() if isinstance(m, CosineAttention)} == {0}
