"""Kernels for training on a CPU: values and gradients equal to float64, and nothing that PyTorch offers lost."""

import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muntin
from muntin.layers.conv import ConvMlp, ConvNorm
from muntin.layers.mlp import Mlp
from muntin.layers.tokens import on_map
from muntin.layers.window import make_grid
from muntin.models import efficientvit, rmt, swin, swinv2
from muntin.native import build, maps, training
from test_models import tiny
from test_native import EFFICIENTVIT, RMT, SWIN, WIDTHS

pytestmark = pytest.mark.skipif(
    not training._lanes(), reason="the kernels need g++ with OpenMP, and MUNTIN_NATIVE is not to be 0"
)

HALVES = pytest.param(True, marks=pytest.mark.skipif(not training._halves(), reason="this CPU has no AVX512-BF16"))
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "swin": (swin, SWIN),
    "swin, padded maps": (swin, SWIN | {"small_maps": "pad"}),
    "swin, BR without shift": (swin, SWIN | {"norm": "batch", "act": "relu", "shift": False}),
    "swin, blocks without attention": (swin, SWIN | {"attend": (0, 3)}),
    "swinv2": (swinv2, SWIN | {"pretrained_window": (0, 6)}),
    "efficientvit": (efficientvit, EFFICIENTVIT),
    "efficientvit, hardswish": (efficientvit, EFFICIENTVIT | {"act": "hardswish"}),
    "rmt": (rmt, RMT),
}
models = pytest.mark.parametrize("name", MODELS)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def compare(ours: Callable[..., Tensor], exact: Callable[..., Tensor], given: Sequence[Tensor], half: bool) -> None:
    """Values and the gradients of all that is given."""
    leaves = [t.clone().requires_grad_() for t in given]
    doubles = [t.double().requires_grad_() for t in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = ours(*leaves)
    wanted = exact(*doubles)
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    into = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    bound = 2e-2 if half else 5e-6
    assert off(found, wanted) < bound
    got = torch.autograd.grad(found, leaves, into.to(found.dtype))
    for i, (ours_, exact_) in enumerate(zip(got, torch.autograd.grad(wanted, doubles, into.double()), strict=True)):
        assert off(ours_, exact_) < bound, f"gradient {i}"


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -------------------------------------------------------------------------------------------------- layers of a block


@pytest.mark.parametrize("half", [False, HALVES], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "tokens", "inputs", "outputs"), [(1, 1, 32, 64), (3, 49, 96, 32), (2, 411, 64, 192)])
def test_linear_layers(
    batch: int, tokens: int, inputs: int, outputs: int, threads: int, half: bool, settled: Any
) -> None:
    settled(threads)
    scale = torch.linspace(0.5, 2, batch)
    given = [
        numbers(batch, tokens, inputs),
        numbers(outputs, inputs, scale=inputs**-0.5),
        numbers(outputs),
        1 + numbers(inputs, scale=0.3),
        numbers(inputs, seed=1),
        numbers(batch, tokens, outputs),
    ]

    def ours(x: Tensor, w: Tensor, b: Tensor, nw: Tensor, nb: Tensor, residual: Tensor) -> Tensor:
        return training._Linear.apply(training._rows(x), w, b, nw, nb, 1e-5, training._rows(residual), scale)

    def exact(x: Tensor, w: Tensor, b: Tensor, nw: Tensor, nb: Tensor, residual: Tensor) -> Tensor:
        return residual + scale.view(-1, 1, 1) * F.linear(F.layer_norm(x, nw.shape, nw, nb, 1e-5), w, b)

    compare(ours, exact, given, half)
    plain = nn.Linear(inputs, outputs, bias=False)

    def bare(x: Tensor, w: Tensor) -> Tensor:
        return training._Linear.apply(training._rows(x), w, None, None, None, 0.0, None, None)

    compare(bare, F.linear, [given[0], plain.weight.detach()], half)


@pytest.mark.parametrize("half", [False, HALVES], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 7, 32), (3, 150, 64)])
def test_feed_forward_layers(batch: int, tokens: int, dim: int, act: str, residual: bool, half: bool) -> None:
    torch.manual_seed(0)
    layers, norm = Mlp(dim, 4 * dim, act), nn.LayerNorm(dim)
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    x = numbers(batch, tokens, dim)
    if act == "relu":  # away from the corner, where a rounded input has the other slope
        x = x.abs()
        with torch.no_grad():
            layers.fc1.weight.abs_()
            layers.fc1.bias.fill_(1)
    given = [x, *(dict(layers.named_parameters())[n].detach() for n in names), numbers(dim), numbers(dim, seed=2)]
    if act == "relu":
        given[5], given[6] = given[5] * 0, given[6].abs()

    def ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, nw: Tensor, nb: Tensor) -> Tensor:
        number = training._ACTS[type(layers.act)]
        return training._Mlp.apply(training._rows(x), w1, b1, w2, b2, nw, nb, norm.eps, number, residual, None)

    def exact(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, nw: Tensor, nb: Tensor) -> Tensor:
        y = F.linear(F.layer_norm(x, (dim,), nw, nb, norm.eps), w1, b1)
        y = F.linear(F.gelu(y) if act == "gelu" else F.relu(y), w2, b2)
        return x + y if residual else y

    compare(ours, exact, given, half)


@pytest.mark.parametrize("half", [False, HALVES], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("unit", [False, True], ids=["scaled", "unit vectors"])
@pytest.mark.parametrize("size", [(14, 14, 7, True), (14, 14, 7, False), (13, 20, 7, True), (5, 9, 12, True)], ids=str)
def test_window_attention(size: tuple[int, int, int, bool], unit: bool, half: bool) -> None:
    grid = make_grid(*size, "pad")
    heads, dim = 3, 32
    given = [
        numbers(2, size[0] * size[1], 3 * heads * dim),
        numbers(heads, grid.area, grid.area),
        numbers(3 * heads * dim, seed=3),
        1 + numbers(heads).abs(),
    ]

    def ours(qkv: Tensor, bias: Tensor, padding: Tensor, factors: Tensor) -> Tensor:
        y = training.window(qkv, bias, padding, grid, 0.2, factors if unit else None)
        return y + 0 * (padding.sum() + factors.sum()).to(y.dtype)

    def exact(qkv: Tensor, bias: Tensor, padding: Tensor, factors: Tensor) -> Tensor:
        y = by_windows(qkv, bias, padding, factors if unit else None, grid, 0.2)
        return y + 0 * (padding.sum() + factors.sum())

    compare(ours, exact, given, half)


def by_windows(qkv: Tensor, bias: Tensor, padding: Tensor, factors: Tensor | None, grid: Any, scale: float) -> Tensor:
    """By hand: pad, roll, cut, attend under a mask of regions, and back."""
    batch, heads = len(qkv), len(bias)
    (wh, ww), (rows, columns) = grid.window, grid.counts
    high, wide = rows * wh, columns * ww
    x = padding.expand(batch, high, wide, -1).clone()
    x[:, : grid.height, : grid.width] = qkv.unflatten(1, (grid.height, grid.width))
    region = torch.zeros(high, wide)
    for axis, (side, window, shift) in enumerate(zip((high, wide), grid.window, grid.shift, strict=True)):
        marks = torch.zeros(side)
        marks[side - window :] += 1
        marks[side - shift :] += 1 if shift else 0
        region += (3 * marks[:, None]) if axis == 0 else marks
    region = region if any(grid.shift) else torch.zeros_like(region)
    x = x.roll((-grid.shift[0], -grid.shift[1]), (1, 2))

    def cut(t: Tensor) -> Tensor:  # (B, H, W, C) -> (B, n, A, C)
        t = t.unflatten(1, (rows, wh)).unflatten(3, (columns, ww)).transpose(2, 3)
        return t.flatten(3, 4).flatten(1, 2)

    q, k, v = cut(x).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    if factors is None:
        q = q * scale
    else:
        q, k = q / q.norm(dim=-1, keepdim=True) * factors[:, None, None], k / k.norm(dim=-1, keepdim=True)
    labels = cut(region[None, :, :, None])[0, :, :, 0]
    mask = torch.where(labels[:, :, None] != labels[:, None, :], -100.0, 0.0)
    y = ((q @ k.transpose(-2, -1) + bias + mask[:, None]).softmax(-1) @ v).transpose(2, 3).flatten(3)  # (B, n, A, C)
    y = y.unflatten(1, (rows, columns)).unflatten(3, (wh, ww)).transpose(2, 3)
    y = y.flatten(3, 4).flatten(1, 2).roll(grid.shift, (1, 2))
    return y[:, : grid.height, : grid.width].flatten(1, 2)


# ------------------------------------------------------------------------------------------ convolutions, BatchNorms

CONVOLUTIONS = {  # channels, outputs, kernel, stride, groups
    "pixels": (32, 48, 1, 1, 1),
    "pixels, many": (16, 96, 1, 1, 1),
    "dense": (16, 24, 3, 2, 1),
    "dense, few channels": (3, 8, 3, 2, 1),
    "dense, 5x5": (16, 16, 5, 1, 1),
    "depthwise": (48, 48, 3, 1, 48),
    "depthwise, stride": (32, 32, 3, 2, 32),
    "depthwise, 5x5": (16, 16, 5, 1, 16),
    "depthwise, 7x7, stride": (16, 16, 7, 2, 16),
}


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.Hardswish()], ids=["none", "relu", "hardswish"])
@pytest.mark.parametrize("size", [(2, 12, 12), (3, 7, 31)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_batch_norm(
    name: str, size: tuple[int, int, int], act: nn.Module | None, randomise: Any
) -> None:
    channels, outputs, kernel, stride, groups = CONVOLUTIONS[name]
    layer = randomise(ConvNorm(channels, outputs, kernel, stride, groups)).train()
    exact = copy.deepcopy(layer).double()
    x = 3 + numbers(size[0], channels, *size[1:])
    assert layer.trains(x)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    found = maps.conv_norm(leaf, layer, act)
    wanted = exact.norm(exact.conv(double))
    wanted = wanted if act is None else act(wanted)
    into = numbers(*wanted.shape)
    found.backward(into)
    wanted.backward(into.double())
    assert off(found, wanted) < 2e-5
    assert off(leaf.grad, double.grad) < 5e-5
    for (n, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert off(p.grad, q.grad) < 5e-5, n
    for (n, p), q in zip(layer.named_buffers(), exact.buffers(), strict=True):
        assert off(p, q.double()) < 1e-5, n


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [(2, 12, 12), (3, 7, 31)], ids=str)
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name.startswith("depthwise")])
def test_depthwise_convolutions(name: str, size: tuple[int, int, int], biased: bool, randomise: Any) -> None:
    """On tokens, with their first and second derivatives."""
    channels, outputs, kernel, stride, groups = CONVOLUTIONS[name]
    layer = randomise(nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=biased))
    exact = copy.deepcopy(layer).double()
    x = 3 + numbers(size[0], size[1] * size[2], channels)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    assert maps.fits_depthwise(layer)
    found, wanted = (on_map(conv, tokens, size[1:]) for conv, tokens in ((layer, leaf), (exact, double)))
    assert found.grad_fn.next_functions[0][0].next_functions[0][0].name() == "_DepthwiseBackward"
    assert off(found, wanted) < 1e-5
    into = numbers(*wanted.shape)
    pairs = [(leaf, double), *zip(layer.parameters(), exact.parameters(), strict=True)]
    ours = torch.autograd.grad(found, [a for a, _ in pairs], into, retain_graph=True)
    true = torch.autograd.grad(wanted, [b for _, b in pairs], into.double(), create_graph=True)
    for a, b in zip(ours, true, strict=True):
        assert off(a, b) < 2e-5
    again = torch.autograd.grad(found, [a for a, _ in pairs], into, create_graph=True)
    twice = torch.autograd.grad(again[0].square().sum(), layer.weight)
    assert off(twice[0], torch.autograd.grad(true[0].square().sum(), exact.weight)[0]) < 2e-5


@pytest.mark.skipif(not training._halves(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_under_autocast(name: str, randomise: Any) -> None:
    """As near to float64 as PyTorch's own are; single pixels of odd widths are PyTorch's."""
    channels, outputs, kernel, stride, groups = CONVOLUTIONS[name]
    layer = randomise(ConvNorm(channels, outputs, kernel, stride, groups)).train()
    exact, plain = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    x = 1 + numbers(3, channels, 21, 30)
    leaves = [x.clone().requires_grad_(channels > 3), x.double().requires_grad_(), x.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.trains(x) == (kernel > 1 or not (channels % 32 or outputs % 32))
        found, other = layer(leaves[0]), plain.norm(plain.conv(leaves[2]))
    wanted = exact.norm(exact.conv(leaves[1]))
    assert found.dtype == torch.bfloat16
    into = numbers(*wanted.shape)
    found.backward(into.bfloat16())
    wanted.backward(into.double())
    other.backward(into.bfloat16())
    triples = [
        (p.grad, q.grad, r.grad) for p, q, r in zip(*(m.parameters() for m in (layer, exact, plain)), strict=True)
    ]
    triples += [tuple(t.grad for t in leaves)] if channels > 3 else []
    for ours, true, theirs in [(found, wanted, other), *triples]:
        far, its = ((t.double() - true).norm() / true.norm() for t in (ours, theirs))
        assert far < 2 * its + 1e-2


def test_an_image_is_read_as_it_is(randomise: Any) -> None:
    layer = randomise(ConvNorm(3, 16, 3, 2)).train()
    x = numbers(2, 3, 21, 30)
    found = []
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_()):
        layer.zero_grad()
        y = layer(image)
        y.backward(numbers(*y.shape))
        found.append([y.detach(), layer.conv.weight.grad, layer.norm.weight.grad])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("act", ["relu", "hardswish"])
def test_feed_forward_layers_of_pixels(act: str, randomise: Any) -> None:
    layers = randomise(ConvMlp(32, 64, act, "batch")).train()
    exact = copy.deepcopy(layers).double()
    x = numbers(2, 32, 9, 13)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    found, wanted = layers(leaf), exact(double)
    into = numbers(*wanted.shape)
    found.backward(into)
    wanted.backward(into.double())
    assert off(found, wanted) < 1e-5
    assert off(leaf.grad, double.grad) < 5e-5
    for (n, p), q in zip(layers.named_parameters(), exact.parameters(), strict=True):
        assert off(p.grad, q.grad) < 5e-5, n


def test_one_value_of_a_channel_is_refused_as_ever() -> None:
    layer = ConvNorm(16, 16, 3, 2).train()
    assert layer(torch.randn(2, 16, 2, 2)).shape == (2, 16, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 16, 2, 2))


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def settled() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def model_of(name: str, randomise: Any) -> nn.Module:
    family, changes = MODELS[name]
    return randomise(tiny(family, **changes)).train()


def image_for(name: str) -> Tensor:
    """Several images where BatchNorms are: of the few values that two leave in the last stage, rounding is a part."""
    return numbers(*((8, 3, 64, 64) if "efficient" in name else (2, 3, 61, 83)))


def learn(model: nn.Module, image: Tensor, seed: int = 0) -> dict[str, Tensor | None]:
    """Output and gradients of a step."""
    torch.manual_seed(seed)
    model.zero_grad()
    image = image.clone().requires_grad_()
    y = model(image)
    y.square().mean().backward()
    return {"output": y.detach(), "image": image.grad} | {n: p.grad for n, p in model.named_parameters()}


def distance(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest difference of any tensor, in parts of its norm; what is next to nothing counts by the largest."""
    most = max(t.norm().item() for t in wanted.values())
    parts = [
        (found[n].double() - t.double()).norm() / t.double().norm().clamp_min(1e-3 * most) for n, t in wanted.items()
    ]
    return max(p.item() for p in parts)


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run from now on."""
    seen: list[str] = []
    for module in (training, maps):
        run = module._run
        monkeypatch.setattr(module, "_run", lambda name, *a, run=run, **k: (seen.append(name), run(name, *a, **k))[1])
    return seen


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_lanes", lambda: 0)


@models
@pytest.mark.parametrize("size", [(3, 64, 64), (2, 61, 83), (3, 112, 96)], ids=str)
def test_models_have_the_gradients_of_float64(
    name: str, size: tuple[int, int, int], randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = size[0] + 5 * ("efficient" in name)  # see image_for
    model, image = model_of(name, randomise), numbers(batch, 3, *size[1:])
    wanted = learn(copy.deepcopy(model).double(), image.double())
    seen = used(monkeypatch)
    kernels = distance(learn(copy.deepcopy(model), image), wanted)
    assert seen
    without_kernels(monkeypatch)
    assert kernels < max(2e-4, 3 * distance(learn(model, image), wanted))


@pytest.mark.skipif(not training._halves(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("name", ["swin", "swinv2", "rmt", "efficientvit"])
def test_models_under_autocast(name: str, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_of(name, randomise), image_for(name)
    wanted = learn(copy.deepcopy(model).double(), image.double())
    with torch.autocast("cpu", torch.bfloat16):
        kernels = distance(learn(copy.deepcopy(model), image), wanted)
        without_kernels(monkeypatch)
        assert kernels < 1.5 * distance(learn(model, image), wanted)


@models
def test_a_step_is_the_same_to_the_bit(name: str, randomise: Any) -> None:
    model, image = model_of(name, randomise), numbers(2, 3, 61, 83)
    first, second = (learn(copy.deepcopy(model), image) for _ in range(2))
    for n, t in first.items():
        assert torch.equal(t, second[n]), n


@pytest.mark.parametrize("name", ["swin", "swinv2", "rmt"])
def test_stochastic_depth_draws_as_without_kernels(name: str, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_of(name, randomise), numbers(8, 3, 32, 32)
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = 0.5
    found = learn(copy.deepcopy(model), image, seed=3)
    without_kernels(monkeypatch)
    assert distance(found, learn(model, image, seed=3)) < 1e-3


@models
def test_gradient_checkpointing(name: str, randomise: Any) -> None:
    model, image = model_of(name, randomise), image_for(name)
    other = copy.deepcopy(model)
    other.backbone.set_grad_checkpointing()
    assert distance(learn(other, image), learn(model, image)) < 1e-6
    for (n, p), q in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(p, q), n


@models
def test_second_derivatives(name: str, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_of(name, randomise), image_for(name)

    def penalty(model: nn.Module, image: Tensor) -> list[Tensor]:
        image = image.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True))

    found = penalty(copy.deepcopy(model), image)
    exact = penalty(copy.deepcopy(model).double(), image.double())
    without_kernels(monkeypatch)
    plain = penalty(model, image)
    most = max(t.norm() for t in exact if t is not None)

    def worst(given: list[Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(given, exact, strict=True) if b is not None]
        return max(((a.double() - b).norm() / b.norm().clamp_min(1e-3 * most)).item() for a, b in pairs)

    assert worst(found) < max(1e-3, 3 * worst(plain))


@models
def test_what_is_frozen_gets_no_gradient(name: str, randomise: Any) -> None:
    model, image = model_of(name, randomise), image_for(name)
    wanted = learn(copy.deepcopy(model), image)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    found = learn(model, image)
    for n, p in model.named_parameters():
        assert (found[n] is None) != p.requires_grad
        if p.requires_grad:
            torch.testing.assert_close(found[n], wanted[n], rtol=1e-4, atol=1e-5)


@models
def test_every_layer_that_has_a_hook_is_called(name: str, randomise: Any) -> None:
    model, image = model_of(name, randomise), image_for(name)
    wanted = learn(copy.deepcopy(model), image)
    plain = copy.deepcopy(model)
    calls: dict[str, int] = {}

    def count(n: str) -> Callable[..., None]:
        return lambda *_: calls.__setitem__(n, calls.get(n, 0) + 1)

    inner = {
        n: m for n, m in plain.named_modules() if not (list(m.children()) or isinstance(m, nn.Identity | nn.ModuleDict))
    }
    for n, m in inner.items():
        m.register_forward_hook(count(n))
    assert distance(learn(plain, image), wanted) < 1e-2
    missed = [n for n in inner if n not in calls]
    assert not [n for n in missed if not (name == "swinv2" and n.endswith("qkv"))]  # whose weight is used with a bias


def test_hooks_of_all_modules_are_called(randomise: Any) -> None:
    model, seen = model_of("swin", randomise), []
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m))):
        learn(model, numbers(2, 3, 64, 64))
    assert {nn.Linear, nn.LayerNorm, nn.GELU} <= set(seen)


def test_other_peoples_layers_are_called(randomise: Any) -> None:
    class Adapted(nn.Linear):
        called = 0

        def forward(self, input: Tensor) -> Tensor:
            self.called += 1
            return 2 * super().forward(input)

    model = model_of("swin", randomise)
    fc1 = model.backbone.stages[0].blocks[0].mlp.fc1
    other = Adapted(fc1.in_features, fc1.out_features)
    model.backbone.stages[0].blocks[0].mlp.fc1 = other
    learn(model, numbers(2, 3, 64, 64))
    assert other.called == 1


@models
def test_transforms_of_functions(name: str, randomise: Any) -> None:
    model, image = model_of(name, randomise), image_for(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(given: dict[str, Tensor]) -> Tensor:
        kept = {n: b.clone() for n, b in buffers.items()}
        return torch.func.functional_call(model, given | kept, image).square().mean()

    found = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    wanted = learn(model, image)
    assert distance(found, {n: t for n, t in wanted.items() if n in found}) < 1e-2


@pytest.mark.filterwarnings("default")  # of torch's own
def test_forward_derivatives(randomise: Any) -> None:
    model, image = model_of("swin", randomise), numbers(1, 3, 32, 32)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(image, torch.ones_like(image)))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


def test_float64_and_half_precision_weights_train_without_kernels(
    randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = model_of("swin", randomise), numbers(2, 3, 64, 64)
    seen = used(monkeypatch)
    learn(copy.deepcopy(model).double(), image.double())
    learn(copy.deepcopy(model).bfloat16(), image.bfloat16())
    with torch.no_grad():
        model(image)
    assert not seen


def test_memory_of_a_step(randomise: Any) -> None:
    """What autograd holds: no attention weights, normalised inputs or activations."""
    held: dict[bool, int] = {}
    model, image = muntin.create_model("swin_t").train(), numbers(2, 3, 224, 224)
    parameters = {p.data_ptr() for p in model.parameters()}
    for kernels in (True, False):
        kept: dict[int, int] = {}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if t.data_ptr() not in parameters:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            if not kernels:
                without_kernels(patch)
            out = model(image)
        held[kernels] = sum(kept.values())
        del out
    assert held[True] < 0.6 * held[False]


@pytest.fixture(params=WIDTHS, ids=str)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[int]:
    """Kernels compiled for another machine, which this one can run."""
    name = WIDTHS[request.param]
    needed = {"x86-64": "", "haswell": "avx2", "skylake-avx512": "avx512f"}[name]
    if platform.machine() not in ("x86_64", "AMD64") or needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this machine does not run code for {name}")
    monkeypatch.setattr(build, "FLAGS", [f.replace("=native", f"={name}") for f in build.FLAGS])
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    cached = build.library, training._lanes, training._halves, maps._available
    for function in cached:
        function.cache_clear()
    yield int(request.param.split()[-1])
    for function in cached:
        function.cache_clear()


def test_every_width_of_vectors(width: int, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training._lanes() == width
    seen = used(monkeypatch)
    for name in ("swin", "swinv2", "efficientvit"):
        model, image = model_of(name, randomise), image_for(name)
        wanted = learn(copy.deepcopy(model).double(), image.double())
        assert distance(learn(model, image), wanted) < 2e-3, name
    assert {"muntin_linear_backward", "muntin_mlp_backward", "muntin_window_backward", "muntin_conv_backward"} <= set(
        seen
    )


def test_without_a_compiler_the_layers_train_themselves(monkeypatch: pytest.MonkeyPatch, randomise: Any) -> None:
    monkeypatch.setenv("MUNTIN_NATIVE", "0")
    cached = build.library, training._lanes, training._halves, maps._available
    for function in cached:
        function.cache_clear()
    try:
        seen = used(monkeypatch)
        learn(model_of("swin", randomise), numbers(2, 3, 64, 64))
        assert not seen
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()


# ------------------------------------------------------------------------------- what the kernels do not compute


def changed(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = ConvNorm(16, 16, 3).train()
        change(layer)
        return layer

    return build


def dilate(layer: Any) -> None:
    layer.conv.dilation = layer.conv.padding = (2, 2)


def transpose(layer: Any) -> None:
    layer.conv = type(layer.conv)(16, 16, 1, bias=False)
    layer.conv.weight = nn.Parameter(torch.randn(16, 16).t()[:, :, None, None])


def lie_in_channels_last(layer: Any) -> None:
    layer.to(memory_format=torch.channels_last)


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "dilation": changed(dilate),
    "circular padding": changed(lambda layer: setattr(layer.conv, "padding_mode", "circular")),
    "an even kernel": lambda: ConvNorm(16, 16, 2).train(),
    "an even kernel of stride 2": lambda: ConvNorm(16, 16, 4, 2).train(),
    "a weight that is transposed": changed(transpose),
    "weights in channels-last memory": changed(lie_in_channels_last),
    "frozen statistics": changed(lambda layer: layer.norm.eval()),
    "a cumulative average": changed(lambda layer: setattr(layer.norm, "momentum", None)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_convolutions_are_computed_as_they_are(name: str) -> None:
    layer, x = UNUSUAL[name](), numbers(2, 16, 12, 13)
    plain, leaves = copy.deepcopy(layer), [x.clone().requires_grad_(), x.clone().requires_grad_()]
    found, wanted = layer(leaves[0]), plain.norm(nn.Conv2d.forward(plain.conv, leaves[1]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    into = numbers(*wanted.shape)
    found.backward(into)
    wanted.backward(into)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.conv.weight.grad, plain.conv.weight.grad, rtol=1e-3, atol=1e-3)


def test_wrong_sizes_raise() -> None:
    for layer, x in (
        (ConvNorm(16, 32).train(), torch.randn(2, 8, 7, 7)),
        (ConvNorm(16, 32, 3).train(), torch.randn(2, 24, 7, 7)),
        (ConvMlp(32, 64, "relu", "batch").train(), torch.randn(2, 16, 7, 7)),
    ):
        with pytest.raises(RuntimeError):
            layer(x)
    for layer, x in ((nn.Linear(32, 48), torch.randn(2, 7, 64)), (nn.Linear(64, 48), torch.randn(2, 7, 32))):
        with pytest.raises(RuntimeError):
            training.applied(layer, x)
    mlp = Mlp(32, 64)
    mlp.fc2 = nn.Linear(128, 32)
    with pytest.raises(RuntimeError):
        training.mlp(torch.randn(2, 7, 32), mlp)


def test_feed_forward_layers_without_biases() -> None:
    layers, x = Mlp(32, 64), numbers(2, 9, 32)
    layers.fc1, layers.fc2 = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
    torch.testing.assert_close(training.mlp(x, layers), x + layers(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "efficientvit"])
def test_saved_tensors_may_be_moved(name: str, randomise: Any) -> None:
    """torch.autograd.graph.save_on_cpu lays a map out anew."""
    model, image = model_of(name, randomise), image_for(name)
    wanted = learn(copy.deepcopy(model), image)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: torch.empty(t.size()).copy_(t) if t.is_floating_point() else t, lambda t: t
    ):
        found = learn(model, image)
    assert distance(found, wanted) < 1e-3


def test_blocks_of_another_class_and_patched_ones_run_themselves(randomise: Any) -> None:
    calls: list[str] = []

    class Mine(swin.SwinBlock):
        def forward(self, *args: Any) -> Tensor:
            calls.append("class")
            return super().forward(*args)

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, *args: Any) -> Tensor:
            calls.append("wrapper")
            return self.inner(*args)

    model, image = model_of("swin", randomise), numbers(2, 3, 64, 64)
    wanted = learn(copy.deepcopy(model), image)
    stages: Any = model.backbone.stages
    stages[0].blocks[0].__class__ = Mine
    stages[1].blocks[1] = Wrapper(stages[1].blocks[1])
    found = learn(model, image)
    assert calls == ["class", "wrapper"]
    torch.testing.assert_close(found["output"], wanted["output"], rtol=1e-4, atol=1e-4)
    fc1 = stages[0].blocks[1].mlp.fc1
    fc1.forward = lambda x: calls.append("instance") or nn.Linear.forward(fc1, x)
    learn(model, image)
    assert calls[-2:] == ["instance", "wrapper"]


def test_many_gradients_at_once(randomise: Any) -> None:
    model, image = model_of("swin", randomise), numbers(1, 3, 40, 33).requires_grad_()
    y = model(image)[0, :3]
    (found,) = torch.autograd.grad(y, image, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (one,) = torch.autograd.grad(y[i], image, retain_graph=True)
        torch.testing.assert_close(found[i], one, rtol=1e-3, atol=1e-4)


def test_a_feed_forward_layer_without_activation() -> None:
    layers, x = Mlp(32, 64), numbers(2, 9, 32).requires_grad_()
    layers.act = nn.Identity()
    (slope,) = torch.autograd.grad(training.mlp(x, layers).square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad((x + layers(x)).square().sum(), x)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4)
