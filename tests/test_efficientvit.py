"""EfficientViT against the slow reference, the authors and timm; its weights; what optimising makes of it.

Each mutation of the reference in the list is a mistake that is easily made: with any of them the comparison fails.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import timm
import timm.models.efficientvit_msra as timm_msra
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muntin
from conftest import error_of, settle
from muntin.errors import UserError
from muntin.layers.cascaded import MapAttention
from muntin.layers.conv import ConvNorm, Residual
from muntin.layers.reference import efficientvit as reference
from muntin.measure.cost import cost
from muntin.models import create_backbone, create_model, efficientvit
from muntin.native import program
from muntin.runtime import fold, packed
from muntin.weights import convert, load_checkpoint

TINY = asdict(efficientvit.TINY)
SIZES = [(1, 1), (5, 3), (16, 16), (33, 47), (61, 83), (64, 64), (100, 20), (9, 130)]
STATED = {  # parameters, after folding, GMACs at 224
    "efficientvit_m0": (2_349_436, 2_334_916, 0.0792),
    "efficientvit_m1": (2_980_560, 2_964_256, 0.1671),
    "efficientvit_m2": (4_187_554, 4_168_338, 0.2010),
    "efficientvit_m3": (6_900_722, 6_875_890, 0.2627),
    "efficientvit_m4": (8_804_228, 8_776_340, 0.2993),
    "efficientvit_m5": (12_473_772, 12_436_260, 0.5216),
}
ABLATIONS: list[dict[str, Any]] = [
    {"attention": "plain"},
    {"attention": "plain", "value_ratio": 0.5},
    {"cascade": False},
    {"ffns": 2},
    {"ffns": 0},
    {"interaction": False},
    {"value_ratio": 0.5},
    {"value_ratio": 1.5},
    {"act": "hardswish"},
    {"norm": "layer"},
    {"norm": "layer", "attention": "plain", "act": "hardswish"},
    {"key_dim": 7},
    {"kernels": (1, 7, 5)},
    {"windows": (5, 3, 1)},
    {"distilled": True},
]


def _image(size: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def _backbone(randomise: Any, **config: Any) -> Any:
    return settle(randomise(create_backbone("efficientvit_m0", **TINY | config)).double()).eval()


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [y.shape for y in found] == [y.shape for y in wanted]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def inference(model: Any, image: Tensor) -> list[Tensor]:
    """With biases that are kept."""
    with torch.inference_mode():
        return model(image)


def gradients(model: Any, image: Tensor) -> list[Tensor]:
    return [y.detach() for y in model(image)]


def symbolic(model: Any, image: Tensor) -> list[Tensor]:
    """What export and compile trace: gathers alone, in windows of one size."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return model(image)


PATHS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "inference": inference,
    "gradients": gradients,
    "symbolic": symbolic,
    "folded": lambda model, image: inference(fold(model), image),
    "folded and symbolic": lambda model, image: symbolic(fold(model), image),
    "optimised": lambda model, image: inference(muntin.optimize(model), image),
}


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit_maps"])
def test_reference_is_the_authors(name: str, golden: Any) -> None:
    file = golden(name)
    state, config = convert(file.weights), asdict(dataclasses.replace(efficientvit.TINY, **_fields(file.config)))
    config["key_dim"] = 16
    for image, wanted in file.pairs:
        if "num_classes" in file.config:
            found = reference.efficientvit_logits(image, state, config)
        else:
            image, wanted = image[:1], [y[:1] for y in wanted]
            found = reference.efficientvit(image, {k.removeprefix("backbone."): t for k, t in state.items()}, config)
        for one, other in zip(found, wanted, strict=True):
            assert error_of(one, other) < 1e-5


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in TINY}


@pytest.mark.parametrize("size", SIZES)
def test_fast_equals_reference(size: tuple[int, int], randomise: Any) -> None:
    model = _backbone(randomise)
    image = _image(size, dtype=torch.float64)
    wanted = reference.efficientvit(image, model.state_dict(), asdict(model.config))
    for name, run in PATHS.items():
        assert _largest(run(model, image), wanted) < 1e-10, name


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_study_loads_its_own_weights(changes: dict[str, Any], randomise: Any) -> None:
    source, target = (
        randomise(create_model("muntin.models.efficientvit.TINY", 10, **changes), seed=seed) for seed in (1, 2)
    )
    report = load_checkpoint(target, source.state_dict())
    assert len(report.loaded) == len(target.state_dict())
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_ablations_equal_reference_and_change_something(changes: dict[str, Any], randomise: Any) -> None:
    model, plain = _backbone(randomise, **changes), _backbone(randomise)
    for size in ((61, 83), (20, 36)):
        image = _image(size, dtype=torch.float64)
        wanted = reference.efficientvit(image, model.state_dict(), asdict(model.config))
        for name, run in PATHS.items():
            assert _largest(run(model, image), wanted) < 1e-10, (size, name)
    shapes, others = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, plain))
    if shapes == others and not changes.get("distilled"):
        image = _image((61, 83), dtype=torch.float64)
        assert _largest(inference(model, image), inference(plain, image)) > 1e-3


def test_ablations_change_the_parameters_as_they_say() -> None:
    def count(**config: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in create_model("efficientvit_m0", **config).parameters())

    base, dims = count(), (64, 128, 192)
    units = [dims[0], *[dims[1]] * 2, *[dims[2]] * 3]  # the width of each block
    interaction = [11 * dim for dim in units] * 2 + [11 * dim for dim in (64, 128, 128, 192)]
    assert count(interaction=False) == base - sum(interaction)
    ffn = [(2 * dim * dim + 2 * 2 * dim) + (2 * dim * dim + 2 * dim) + 11 * dim for dim in units]
    assert count(ffns=2) == base + 2 * sum(ffn) and count(ffns=0) == base - 2 * sum(ffn)
    assert count(distilled=True) == base + 2 * 192 + 193 * 1000
    keys = sum(4 * (2 * dim // 4 + 2 * 2 + 25 + 2) for dim in units)  # one more channel of q and k in each head
    assert count(key_dim=17) == base + keys
    assert count(kernels=(3, 5, 5, 5)) == base - 6 * 16 * 16
    assert count(cascade=False) == base == count(act="hardswish") == count(norm="layer")
    values = sum(4 * (dim // 8 * (dim // 4) + 2 * (dim // 8)) + dim // 2 * dim for dim in units)
    assert count(value_ratio=0.5) == base - values


def test_plain_attention_is_multi_head_attention(randomise: Any) -> None:
    """Written out with PyTorch's own operators, for a map that fits its window."""
    model = _backbone(randomise, attention="plain", windows=(4, 4, 4))
    layer: Any = model.stages[0].blocks[0].attention
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    qkv = F.conv2d(x, layer.qkv.conv.weight)
    norm = layer.qkv.norm
    qkv = F.batch_norm(qkv, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    q, k, v = (t.view(2, 2, -1, 12).transpose(2, 3) for t in qkv.split([8, 8, 16], 1))
    y, z = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    y, z = y.reshape(-1), z.reshape(-1)
    bias = layer.bias_table[(y[:, None] - y).abs() * 4 + (z[:, None] - z).abs()].permute(2, 0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(2, 3).reshape(2, 16, 3, 4)
    conv = layer.proj.branch[1]
    norm = conv.norm
    out = F.conv2d(F.relu(out), conv.conv.weight)
    out = F.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert error_of(layer(x).detach(), (x + out).detach()) < 1e-10


def test_without_cascade_heads_are_on_their_own(randomise: Any) -> None:
    """Each head alone is the first head of a layer, which no cascade reaches."""
    model = _backbone(randomise, cascade=False)
    layer: Any = model.stages[0].blocks[0].attention
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)
    bias = layer._bias(3, 3, x.dtype)
    whole = layer.attend(x, bias)
    for head in range(2):
        alone = copy.deepcopy(layer)
        alone.qkvs, alone.dws = layer.qkvs[head : head + 1], layer.dws[head : head + 1]
        part = slice(8 * head, 8 * head + 8)
        assert error_of(alone.attend(x[:, part], bias[head : head + 1]).detach(), whole[:, part].detach()) < 1e-12
        other = x.clone()
        other[:, 8 - 8 * head : 16 - 8 * head] += 1
        assert torch.equal(layer.attend(other, bias)[:, part], whole[:, part])


def test_a_block_is_the_sandwich(randomise: Any) -> None:
    model = _backbone(randomise, ffns=2)
    block: Any = model.stages[0].blocks[0]
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    y = x
    for part in (block.before, None, block.after):
        if part is None:
            y = block.attention(y)
            continue
        assert len(part) == 2
        for unit in part:
            y = y + unit.interaction.branch(y)
            y = y + unit.ffn.branch.project(torch.relu(unit.ffn.branch.expand(y)))
    assert error_of(block(x, None).detach(), y.detach()) < 1e-12


@pytest.mark.parametrize("changes", [{}, {"attention": "plain"}, {"norm": "layer", "act": "hardswish"}], ids=str)
@pytest.mark.parametrize("distilled", [False, True])
def test_gradients_equal_reference(changes: dict[str, Any], distilled: bool, randomise: Any) -> None:
    """Statistics of the batch too: padding of windows is in them, as with the authors."""
    config: Any = TINY | changes | {"distilled": distilled}
    model: Any = randomise(create_model("efficientvit_m0", 5, **config)).double().train()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    image = _image((61, 83), dtype=torch.float64)
    wanted = reference.efficientvit_logits(image, state, asdict(model.config), training=True)
    found = model(image)
    found = list(found) if distilled else [found]
    assert len(found) == len(wanted) and _largest(found, wanted) < 1e-10
    for outputs in (found, wanted):
        sum((i + 1) * y.square().sum() for i, y in enumerate(outputs)).backward()
    for name, parameter in model.named_parameters():
        scale = state[name].grad.abs().max().clamp(min=1)
        assert (parameter.grad - state[name].grad).abs().max() < 1e-7 * scale, name
    assert model.backbone.stages[0].blocks[0].attention.bias_table.grad.abs().max() > 1e-6


# Mutations: each makes one mistake in the reference.

Network = reference.Network


class ScaleLeftOut(Network):
    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return super().weigh(q * self.config["key_dim"] ** 0.5, k, v, bias)


class QueriesForKeys(Network):
    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return super().weigh(k, q, v, bias)


class BiasLeftOut(Network):
    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return super().weigh(q, k, v, bias * 0)


class BiasTransposed(Network):
    def bias(self, name: str, head: int, window: int, shape: tuple[int, int]) -> Tensor:
        height, width = shape
        found = super().bias(name, head, window, (width, height))
        order = torch.arange(height * width).view(width, height).t().reshape(-1)
        return found[order][:, order]


class BiasOfTheNextHead(Network):
    def bias(self, name: str, head: int, window: int, shape: tuple[int, int]) -> Tensor:
        return super().bias(name, (head + 1) % 2, window, shape)


class BiasOfTheMapsWidth(Network):
    def bias(self, name: str, head: int, window: int, shape: tuple[int, int]) -> Tensor:
        return super().bias(name, head, shape[1], shape)


class CascadeLeftOut(Network):
    def __init__(self, state: Any, config: Any, training: bool) -> None:
        super().__init__(state, config | {"cascade": False}, training)


class CascadeOfTheInput(Network):
    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        super().weigh(q, k, v, bias)
        return v


class QueriesNotConvolved(Network):
    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return x if ".dws." in name else super().conv(x, name, stride)


class KernelsReversed(Network):
    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        if ".dws." in name:
            name = name[:-1] + str(len(self.config["kernels"]) - 1 - int(name[-1]))
            name = name if f"{name}.conv.weight" in self.state else name[:-1] + "0"
        return super().conv(x, name, stride)


class Linear(Network):
    def act(self, x: Tensor) -> Tensor:
        return x


class NoActivationBeforeTheProjection(Network):
    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        return Linear(self.state, self.config, self.training).attention(x, name, stage)


class PaddingAtTheTop(Network):
    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        return super().attention(x.flip(2), name, stage).flip(2)


class SmallMapsPadded(Network):
    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        window = self.config["windows"][stage]
        height, width = x.shape[2:]
        below, right = max(window - height, 0), max(window - width, 0)
        return super().attention(F.pad(x, (0, right, 0, below)), name, stage)[:, :, :height, :width]


class WindowsShrunkAlongEachAxis(Network):
    """Swin's rule: a side that is smaller than the window is not padded, whatever the other one is."""

    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        window, width = self.config["windows"][stage], x.shape[3]
        if x.shape[2] >= window:
            return super().attention(x, name, stage)
        parts = F.pad(x, (0, -width % window)).split(window, 3)
        return torch.cat([Network.attention(self, part, name, stage) for part in parts], 3)[:, :, :, :width]


class FeedForwardFirst(Network):
    def unit(self, x: Tensor, name: str) -> Tensor:
        hidden = self.act(self.conv(x, f"{name}.ffn.branch.expand"))
        x = x + self.conv(hidden, f"{name}.ffn.branch.project")
        return x + self.conv(x, f"{name}.interaction.branch")


class InteractionWithoutResidual(Network):
    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        found = super().conv(x, name, stride)
        return found - x if name.endswith("interaction.branch") else found


class GateLeftOut(Network):
    def gate(self, x: Tensor, name: str) -> Tensor:
        return x


class ActivationAfterTheStem(Network):
    def stem(self, x: Tensor) -> Tensor:
        return self.act(super().stem(x))


class EpsOfLayerNorm(Network):
    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        running = f"{name}.norm.running_var"
        changed = dict(self.state) | {running: self.state[running] + 1e-6 - 1e-5}
        return Network.conv(Network(changed, self.config, self.training), x, name, stride)


class StridedFromTheSecondPixel(Network):
    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        if stride == 2:
            x = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return super().conv(x, name, stride)


MUTATIONS = [
    ScaleLeftOut,
    QueriesForKeys,
    BiasLeftOut,
    BiasTransposed,
    BiasOfTheNextHead,
    BiasOfTheMapsWidth,
    CascadeLeftOut,
    CascadeOfTheInput,
    QueriesNotConvolved,
    KernelsReversed,
    NoActivationBeforeTheProjection,
    PaddingAtTheTop,
    SmallMapsPadded,
    WindowsShrunkAlongEachAxis,
    FeedForwardFirst,
    InteractionWithoutResidual,
    GateLeftOut,
    ActivationAfterTheStem,
    EpsOfLayerNorm,
    StridedFromTheSecondPixel,
]


@pytest.mark.parametrize("mutation", [Network, *MUTATIONS])
def test_mutations_show(mutation: Any, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of 61x83: 4x6 in windows of 5, 2x3 in a window of 4 (whole) and 1x2 in windows of 1."""
    model = _backbone(randomise, kernels=(5, 3, 5), heads=(2, 3, 2), windows=(5, 4, 1))
    monkeypatch.setattr(reference, "Network", mutation)
    image = _image((61, 83), dtype=torch.float64)
    try:
        wanted = reference.efficientvit(image, model.state_dict(), asdict(model.config))
        error = _largest(inference(model, image), wanted)
    except RuntimeError:  # a mistake that does not even fit
        error = float("inf")
    assert error < 1e-10 if mutation is Network else error > 1e-7


# The authors, timm, weights.


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit_distilled", "efficientvit_maps"])
def test_authors(name: str, golden: Any) -> None:
    file = golden(name)
    config = dict(file.config)
    variant, classes = config.pop("model"), config.pop("num_classes", None)
    if classes is not None:
        model: Any = create_model(variant, classes, **config).eval()
    else:
        model = create_backbone(variant, **config).eval()
    report = load_checkpoint(model, file.weights)
    assert report.dialect == "authors" and len(report.loaded) == len(file.weights)
    for image, wanted in file.pairs:
        for form in (model, muntin.optimize(model)):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    found = form(image) if classes is None else [form(image)]
                assert len(found) == len(wanted)
                for one, other in zip(found, wanted, strict=True):
                    assert error_of(one.detach(), other) < 1e-5


def _warm(model: nn.Module, image: Tensor) -> nn.Module:
    """Statistics of this image, or a deep model with random weights amplifies rounding without a bound."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(image)
    return model.eval()


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_timm_at_224(name: str, randomise: Any) -> None:
    image = _image((224, 224))
    other = _warm(randomise(timm.create_model(name, num_classes=10)), image)
    model = create_model(name, 10).eval()
    report = load_checkpoint(model, other.state_dict())
    assert report.dialect == "timm" and len(report.loaded) == len(model.state_dict())
    with torch.no_grad():
        wanted = other(image)
        assert error_of(model(image), wanted) < 1e-4
        assert error_of(muntin.optimize(model)(image), wanted) < 1e-4
        assert error_of(model.double()(image.double()), other.double()(image.double())) < 1e-9


@pytest.mark.parametrize("side", [256, 320, 96])
def test_timm_at_other_sizes(side: int, randomise: Any) -> None:
    """timm builds its windows for a size: never larger than the map."""
    small: Any = {"depths": (1, 1, 1), "dims": (32, 48, 64), "heads": (2, 3, 4), "kernels": (7, 5, 3, 3)}
    other = timm_msra.EfficientVitMsra(
        side, embed_dim=small["dims"], depth=small["depths"], num_heads=small["heads"], kernels=small["kernels"],
        num_classes=10,
    )  # fmt: skip
    image = _image((side, side))
    _warm(randomise(other), image)
    windows = [min(7, -(-side // stride)) for stride in (16, 32, 64)]
    model: Any = create_model("efficientvit_m0", 10, windows=windows, **small).eval()
    load_checkpoint(model, other.state_dict())
    with torch.no_grad():
        assert error_of(model(image), other(image)) < 1e-4


def test_tables_of_another_window_are_resized_as_the_authors_do(randomise: Any) -> None:
    """Weights of 224 pixels, windows 7, 7, 4, for 448 pixels, windows 7, 7, 7. timm's bicubic has another constant."""
    image = _image((448, 448), 1)
    other: Any = _warm(randomise(timm.create_model("efficientvit_m0", num_classes=10)), _image((448, 448)))
    model: Any = create_model("efficientvit_m0", 10, windows=(7, 7, 7)).eval()
    report = load_checkpoint(model, other.state_dict())
    assert list(report.resized) == [f"backbone.stages.2.blocks.{b}.attention.bias_table" for b in range(3)]
    for block, theirs in zip(model.backbone.stages[2].blocks, other.stages[2].blocks, strict=True):
        table = theirs.mixer.m.attn.attention_biases.detach().view(1, 4, 4, 4)
        wanted = F.interpolate(table, (7, 7), mode="bicubic").view(4, 49)
        assert error_of(block.attention.bias_table.detach().t(), wanted) < 1e-6
    other.set_input_size(448)
    load_checkpoint(model, other.state_dict())
    with torch.no_grad():
        assert error_of(model(image), other(image)) < 1e-4


def test_weights_go_there_and_back(randomise: Any) -> None:
    model = randomise(create_model("efficientvit_m0", 10, **TINY | {"distilled": True}))
    state = model.state_dict()
    theirs = convert(state, "authors")
    assert "blocks1.0.mixer.m.attn.qkvs.1.c.weight" in theirs and "head_dist.l.bias" in theirs
    assert theirs["blocks2.1.se.fc1.weight"].shape == (16, 64, 1, 1)
    assert theirs["blocks2.4.mixer.m.attn.attention_biases"].shape == (3, 4)
    plain = {k: t for k, t in state.items() if "distilled" not in k}
    for there, wanted in ((theirs, state), (convert(plain, "timm"), plain)):
        back = convert(there)
        assert back.keys() == wanted.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())


def test_names_in_timm_are_timms(randomise: Any) -> None:
    model = create_model("efficientvit_m5", 10)
    assert convert(model.state_dict(), "timm").keys() == timm.create_model("efficientvit_m5").state_dict().keys()


def test_derived_buffers_of_the_authors_are_ignored(randomise: Any) -> None:
    model = randomise(create_model("efficientvit_m0", 10, **TINY))
    theirs = convert(model.state_dict(), "authors")
    derived = {
        "blocks1.0.mixer.m.attn.attention_bias_idxs": torch.zeros(9, 9, dtype=torch.int64),
        "blocks1.0.mixer.m.attn.ab": torch.zeros(2, 9, 9),
    }
    report = load_checkpoint(create_model("efficientvit_m0", 10, **TINY), theirs | derived)
    assert set(report.ignored) == set(derived)


def test_weights_of_another_variant_are_named() -> None:
    with pytest.raises(UserError, match="efficientvit_m1"):
        load_checkpoint(create_model("efficientvit_m0"), create_model("efficientvit_m1").state_dict())


# Numbers, defaults, heads.


@pytest.mark.parametrize("name", list(STATED))
def test_parameters_and_operations_are_the_stated_ones(name: str) -> None:
    parameters, folded, gmacs = STATED[name]
    with torch.device("meta"):
        model = create_model(name)
    found = cost(model, 224)
    assert found.parameters == parameters and round(found.gmacs, 4) == gmacs
    small = fold(create_model(name))
    assert sum(p.numel() for p in small.parameters()) == folded
    assert round(cost(small, 224).gmacs, 4) == gmacs


def test_backbones_have_the_detection_windows() -> None:
    backbone: Any = create_backbone("efficientvit_m4")
    assert backbone.config.windows == (7, 7, 7) and create_model("efficientvit_m4").config.windows == (7, 7, 4)
    assert backbone.strides == (16, 32, 64) and backbone.channels == (128, 256, 384)


def test_residual_branches_start_at_zero() -> None:
    backbone: Any = create_backbone("efficientvit_m0", **TINY).train()
    block = backbone.stages[1].blocks[0]
    x = torch.randn(3, 24, 5, 4)
    assert torch.equal(block(x, None), x)


def test_two_heads_in_training_and_their_mean_in_evaluation(randomise: Any) -> None:
    model: Any = settle(randomise(create_model("efficientvit_m0", 10, **TINY | {"distilled": True}))).eval()
    image = _image((64, 64))
    features = model.forward_features(image).mean((2, 3))
    head = model.head
    one, other = head.fc(head.norm(features)), head.fc_distilled(head.norm_distilled(features))
    assert error_of(model(image).detach(), ((one + other) / 2).detach()) < 1e-5
    assert error_of(one.detach(), other.detach()) > 0.1
    fast = muntin.optimize(model)
    assert error_of(fast(image), model(image).detach()) < 1e-5
    logits = model.train()(image)
    assert isinstance(logits, tuple) and [y.shape for y in logits] == [(2, 10)] * 2
    model.reset_classifier(3)
    assert [y.shape for y in model(image)] == [(2, 3)] * 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dims": 64}, "dims=64.*in a tuple"),
        ({"dims": (60, 128, 192)}, "an eighth of 60.*multiple of 8"),
        ({"dims": (64, 130, 192)}, "130 is no multiple of its 4 heads"),
        ({"heads": (4, 4)}, "2 entries for 3 stages"),
        ({"windows": (7, 7)}, "2 entries for 3 stages"),
        ({"windows": (7, 7, 0)}, "windows=.*at least 1"),
        ({"depths": (1, 2, 0)}, "depths=.*at least 1"),
        ({"kernels": (5, 5)}, "kernels=.*each of 4 heads"),
        ({"kernels": (5, 5, 4, 5)}, "kernels=.*odd number"),
        ({"key_dim": 0}, "key_dim=0.*at least 1"),
        ({"ffns": -1}, "ffns=-1.*at least 0"),
        ({"ffns": True}, "ffns=True"),
        ({"value_ratio": 0}, "value_ratio=0.*positive"),
        ({"value_ratio": 0.01}, "value_ratio=0.01.*at least one channel"),
        ({"value_ratio": float("nan")}, "value_ratio=nan"),
        ({"attention": "linear"}, "attention='linear'.*'cascaded', 'plain'"),
        ({"act": "gelu"}, "act='gelu'.*'relu', 'hardswish'"),
        ({"norm": "group"}, "norm='group'.*'batch', 'layer'"),
        ({"cascade": 1}, "cascade=1.*True or False"),
        ({"distilled": "yes"}, "distilled='yes'.*True or False"),
        ({"drop_path": 0.1}, "drop_path=0.1.*no stochastic depth"),
        ({"image": 5}, "no field 'image'"),
    ],
    ids=str,
)
def test_bad_values_say_what_is_valid(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_model("efficientvit_m0", **config)


# Optimising.


def test_optimising_leaves_no_batch_norm_and_no_residual_convolution(randomise: Any) -> None:
    for config in ({}, {"distilled": True}, {"attention": "plain"}, {"act": "hardswish"}):
        model = create_model("efficientvit_m0", 10, **TINY | config)
        for form in (fold(model), muntin.optimize(model)):
            kinds = {type(module) for module in form.modules()}
            assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm | ConvNorm) for kind in kinds)
            residuals = [m.branch for m in form.modules() if isinstance(m, Residual)]
            assert not any(isinstance(branch, nn.Conv2d) for branch in residuals)
            attentions = [m for m in form.modules() if isinstance(m, MapAttention)]
            assert len(attentions) == 4 and all(layer.scale == 1.0 for layer in attentions)


def test_folding_twice_changes_nothing(randomise: Any) -> None:
    model = _backbone(randomise)
    image = _image((61, 83), dtype=torch.float64)
    assert _largest(inference(fold(fold(model)), image), inference(fold(model), image)) < 1e-12


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    packed._computes_the_same.cache_clear()
    yield
    packed._computes_the_same.cache_clear()


def packs_bfloat16() -> bool:
    """Whether oneDNN computes convolutions of bfloat16 on this processor: not with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, nn.GELU])
def test_packed_layers_compute_the_same(act: Any, dtype: torch.dtype, fresh_probes: None) -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), act(), Residual(nn.Conv2d(8, 8, 5, padding=2, groups=8)),
        Residual(nn.Sequential(nn.Conv2d(8, 12, 1), act(), nn.Conv2d(12, 8, 1))), nn.Conv2d(8, 6, 4, 4),
    ).to(dtype).eval()  # fmt: skip
    fast = packed.pack(copy.deepcopy(layers))
    kinds = [type(module) for module in fast.modules()]
    if torch.backends.mkldnn.is_available() and (dtype == torch.float32 or packs_bfloat16()):
        assert kinds.count(packed.PackedConv) == 3 and kinds.count(packed.PackedPointwise) == 2
        assert kinds.count(packed.PackedResidual) == 2 and act not in kinds
    twin = copy.deepcopy(fast)
    with torch.inference_mode():
        for size in ((16, 16), (9, 31), (31, 9), (16, 16)):
            x = torch.randn(2, 3, *size, dtype=dtype)
            wanted = layers(x)
            for image in (x, x.contiguous(memory_format=torch.channels_last)):
                found = fast(image)
                assert found.dtype == dtype and error_of(found, wanted) < (1e-5 if dtype == torch.float32 else 0.05)
                assert torch.equal(twin(image), found)


def test_packing_falls_back_where_an_operator_is_missing(
    randomise: Any, monkeypatch: pytest.MonkeyPatch, fresh_probes: None
) -> None:
    def missing(*args: Any) -> None:
        raise RuntimeError("no such operator")

    for kind in (packed.PackedLinear, packed.PackedPointwise, packed.PackedConv):
        monkeypatch.setattr(kind, "forward", missing)
    monkeypatch.setattr(program, "kernels", lambda: None)
    model = settle(randomise(create_model("efficientvit_m0", 10, **TINY))).eval()
    fast = muntin.optimize(model)
    assert not any(isinstance(module, packed.Packed) for module in fast.modules())
    image = _image((61, 83))
    with torch.inference_mode():
        assert error_of(fast(image), model(image)) < 1e-5


def test_packing_refuses_an_operator_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, fresh_probes: None
) -> None:
    right = packed.PackedConv.forward
    monkeypatch.setattr(packed.PackedConv, "forward", lambda self, x: right(self, x) + 0.01)
    layer = nn.Conv2d(3, 8, 3)
    assert packed.pack(layer) is layer


def test_a_packed_residual_leaves_its_input_alone() -> None:
    fast = packed.pack(Residual(nn.Conv2d(4, 4, 1)).eval())
    x = torch.randn(2, 4, 5, 6)
    before = x.clone()
    with torch.inference_mode():
        fast(x)
    assert torch.equal(x, before)
