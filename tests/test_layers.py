"""The fast model against the slow reference, and the reference against the authors.

Each mutation in the list at the end is a mistake that is easily made: with any of them the comparison fails.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import error_of, filled
from muntin.layers import attention, position, window
from muntin.layers import patch as patches
from muntin.layers.reference import swin as reference
from muntin.models import create_backbone, create_model
from muntin.weights import convert

BASE: dict[str, Any] = {"dim": 8, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 4}
SIZES = [(1, 1), (3, 5), (16, 16), (23, 37), (64, 64), (61, 83), (96, 40), (5, 70), (130, 9)]
WINDOWS: list[Any] = [4, 3, 5, (7, 4, 3, 2), (4, 8, 4, 2), 1]
SHIFTS: list[Any] = [True, False, (True, False, True, False)]
EXTRAS: list[dict[str, Any]] = [
    {},
    {},
    {"norm": "batch", "act": "relu"},
    {"split_heads": True},
    {"attend": (0, 3, 4, 7)},
    {"patch": 2, "depths": (1, 1, 2, 1)},
    {"patch": 3, "mlp_ratio": 2.5, "act": "relu"},
]


def _cases(count: int) -> Iterator[Any]:
    """Every size under both rules, the rest drawn with a seed."""
    draw = random.Random(2)
    for number in range(count):
        extra = draw.choice(EXTRAS)
        config = BASE | extra | {"window": draw.choice(WINDOWS), "shift": draw.choice(SHIFTS)}
        config["small_maps"] = ("shrink", "pad")[number % 2]
        if config.get("attend"):
            config["attend"] = tuple(b for b in config["attend"] if b < sum(config["depths"]))
        size = SIZES[number // 2 % len(SIZES)]
        chosen = {k: v for k, v in config.items() if k not in ("dim", "heads") and BASE.get(k) != v}
        text = "-".join(f"{key}={value}".replace(" ", "") for key, value in chosen.items())
        yield pytest.param(config, size, id=f"{size[0]}x{size[1]}-{text}")


def inference(model: Any, image: Tensor) -> list[Tensor]:
    """The windows of a block a few at a time, with biases that are kept."""
    with torch.inference_mode():
        return model(image)


def gradients(model: Any, image: Tensor) -> list[Tensor]:
    """The forward of training."""
    return [y.detach() for y in model(image)]


def symbolic(model: Any, image: Tensor) -> list[Tensor]:
    """What export and compile trace: gathers alone."""
    with torch.no_grad():
        return model._forward_raster(image)


PATHS: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "inference": inference,
    "gradients": gradients,
    "symbolic": symbolic,
}


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [y.shape for y in found] == [y.shape for y in wanted]
    # a map of one token may have no deviation of its own worth the name: one scale for each map
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", ["swin", "swin_any_size", "swin_free"])
def test_reference_is_the_authors(name: str, golden: Any) -> None:
    file = golden(name)
    state = convert(file.weights)
    for image, wanted in file.pairs:
        if "num_classes" in file.config:
            found = [reference.swin_logits(image, state, file.config)]
        else:
            found = reference.swin(image, state, file.config)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert error_of(one, other) < 1e-5


@pytest.mark.parametrize(("config", "size"), list(_cases(36)))
def test_fast_equals_reference(config: dict[str, Any], size: tuple[int, int], randomise: Any) -> None:
    model = randomise(create_backbone("swin_t", out_norm=True, **config)).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = reference.swin(image, model.state_dict(), asdict(model.config))
    for name, run in PATHS.items():
        assert _largest(run(model, image), wanted) < 1e-10, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("size", [(61, 83), (32, 32)])
def test_dtypes(dtype: torch.dtype, bound: float, size: tuple[int, int], randomise: Any) -> None:
    model = randomise(create_model("swin_t", 10, **BASE)).to(dtype).eval()
    image = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    wanted = reference.swin_logits(image.double(), state, asdict(model.config))
    with torch.no_grad():
        assert error_of(model(image), wanted) < bound


@pytest.mark.parametrize("extra", [{}, {"norm": "batch", "act": "relu"}, {"split_heads": True, "window": (3, 5, 2, 2)}])
@pytest.mark.parametrize("small_maps", ["shrink", "pad"])
def test_gradients_equal_reference(extra: dict[str, Any], small_maps: str, randomise: Any) -> None:
    config = BASE | {"depths": (1, 2), "heads": (1, 2), "small_maps": small_maps} | extra
    config["window"] = config["window"][:2] if isinstance(config["window"], tuple) else config["window"]
    model = randomise(create_model("swin_t", 5, **config)).double().train()
    image = torch.randn(2, 3, 27, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    wanted = reference.swin_logits(image, state, asdict(model.config), training=True)
    found = model(image)
    assert error_of(found, wanted) < 1e-10
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in model.named_parameters():
        # a bias in front of a BatchNorm, and k's in front of a softmax, have no gradient but rounding
        assert (parameter.grad - state[name].grad).abs().max() < 1e-8, name
    assert model.backbone.stages[0].blocks[0].attention.bias_table.grad.abs().max() > 1e-3


@pytest.mark.parametrize("path", sorted(Path(reference.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_references_share_nothing_with_the_package(path: Path) -> None:
    """A reference may build on another; then it shares that one's mistakes, not the package's."""
    imports = [line for line in path.read_text().splitlines() if "muntin" in line]
    assert all(line.startswith("from muntin.layers.reference.") for line in imports), imports


# Mutations: each makes one mistake in the fast model, or in the layers that it calls.

MUTATED = BASE | {"window": (4, 3, 5, 4), "small_maps": "shrink"}
MUTATED_SIZE = (61, 83)  # maps 16x21, 8x11, 4x6 and 2x3: whole, padded on one axis or both, cropped on one or both


def _attentions(model: nn.Module) -> list[attention.WindowAttention]:
    return [module for module in model.modules() if isinstance(module, attention.WindowAttention)]


def _tables(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces each bias table, given as (2w-1, 2w-1, h)."""
    for layer in _attentions(model):
        side = 2 * layer.window - 1
        table = layer.bias_table.detach().view(side, side, -1)
        layer.bias_table = nn.Parameter(change(table).reshape(side * side, -1))


def shift_off_by_one(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = window.axis_rule

    def wrong(*args: Any) -> tuple[int, int]:
        size, shift = right(*args)
        return size, shift + 1 if shift else 0

    patch.setattr(window, "axis_rule", wrong)


def shift_on_even_blocks(model: Any, patch: pytest.MonkeyPatch) -> None:
    for stage in model.stages:
        for block in stage.blocks:
            block.shifted = not block.shifted


def shift_where_the_window_is_the_map(model: Any, patch: pytest.MonkeyPatch) -> None:
    def wrong(side: int, size: int, shifted: bool, small_maps: str) -> tuple[int, int]:
        return min(size, side), min(size, side) // 2 if shifted else 0

    patch.setattr(window, "axis_rule", wrong)


def roll_the_other_way(model: Any, patch: pytest.MonkeyPatch) -> None:
    def wrong(side: int, size: int, shift: int, count: int) -> Tensor:
        return (torch.arange(count * size).view(count, size) - shift) % (count * size)

    patch.setattr(window, "_axis_source", wrong)


def padding_after_the_roll(model: Any, patch: pytest.MonkeyPatch) -> None:
    def wrong(side: int, size: int, shift: int, count: int) -> Tensor:
        slots = torch.arange(count * size)
        return torch.where(slots < side, (slots + shift) % side, slots).view(count, size)

    patch.setattr(window, "_axis_source", wrong)


def padding_not_zero(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = window._move_index

    def wrong(*args: Any) -> tuple[Tensor, None]:
        return right(*args)[0], None

    patch.setattr(window, "_move_index", wrong)


def padding_before_the_norm(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):  # what a padded token would be after the norm: its bias
        block = next(b for s in model.stages for b in s.blocks if b.attention is layer)
        bias = block.norm1.bias.detach().clone()
        right = layer.qkv.forward
        patch.setattr(layer.qkv, "forward", lambda x, f=right, b=bias: f(torch.where((x == 0).all(-1, True), b, x)))


def padding_shut_out(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):
        right = layer.qkv.forward
        patch.setattr(layer.qkv, "forward", lambda x, f=right: f(x) * (x != 0).any(-1, True))


def mask_left_out(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(position, "MASKED", 0.0)


def mask_along_one_axis_only(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = window.separation_mask
    patch.setattr(window, "separation_mask", lambda labels: right(labels % 2))


def mask_on_the_first_windows(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = window.kind_masks

    def wrong(*args: Any) -> Tensor:
        return right(*args).flip(0)

    patch.setattr(window, "kind_masks", wrong)
    patch.setattr(attention, "kind_masks", wrong)


def table_transposed(model: Any, patch: pytest.MonkeyPatch) -> None:
    _tables(model, lambda table: table.transpose(0, 1))


def table_reversed(model: Any, patch: pytest.MonkeyPatch) -> None:
    _tables(model, lambda table: table.flip(0, 1))


def table_of_another_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    _tables(model, lambda table: table.flip(2))


def table_cropped_at_its_corner(model: Any, patch: pytest.MonkeyPatch) -> None:
    def wrong(height: int, width: int, size: int, device: Any) -> Tensor:
        y, x = torch.arange(height), torch.arange(width)
        dy = y[:, None] - y[None] + height - 1
        dx = x[:, None] - x[None] + width - 1
        return (dy[:, None, :, None] * (2 * size - 1) + dx[None, :, None, :]).reshape(-1)

    patch.setattr(attention, "constant_relative_index", wrong)


def eps_of_another_framework(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def gelu_by_tanh(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def scale_left_out(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):
        layer.scale = 1.0


def scale_by_all_channels(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):
        layer.scale *= layer.heads**-0.5


def queries_for_keys(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):
        right = layer.qkv.forward

        def wrong(x: Tensor, f: Callable[[Tensor], Tensor] = right) -> Tensor:
            q, k, v = f(x).chunk(3, -1)
            return torch.cat([k, q, v], -1)

        patch.setattr(layer.qkv, "forward", wrong)


def heads_before_queries(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in _attentions(model):
        right = layer.qkv.forward

        def wrong(x: Tensor, f: Callable[[Tensor], Tensor] = right, h: int = layer.heads) -> Tensor:
            return f(x).unflatten(-1, (h, 3, -1)).transpose(-2, -3).flatten(-3)

        patch.setattr(layer.qkv, "forward", wrong)


def merge_row_by_row(model: Any, patch: pytest.MonkeyPatch) -> None:
    for stage in model.stages[1:]:
        for parameter in stage.merge.parameters():
            parameter.data = parameter.data.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)


def merge_padding_not_zero(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = patches.merge_move
    patch.setattr(patches, "merge_move", lambda *args: replace(right(*args), keep=None))


def norms_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    for stage in model.stages:
        for block in stage.blocks:
            block.norm1, block.norm2 = block.norm2, block.norm1


def rule_for_small_maps_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    for stage in model.stages:
        for block in stage.blocks:
            block.small_maps = "pad"


MUTATIONS = [
    shift_off_by_one,
    shift_on_even_blocks,
    shift_where_the_window_is_the_map,
    roll_the_other_way,
    padding_after_the_roll,
    padding_not_zero,
    padding_before_the_norm,
    padding_shut_out,
    mask_left_out,
    mask_along_one_axis_only,
    mask_on_the_first_windows,
    table_transposed,
    table_reversed,
    table_of_another_head,
    table_cropped_at_its_corner,
    eps_of_another_framework,
    gelu_by_tanh,
    scale_left_out,
    scale_by_all_channels,
    queries_for_keys,
    heads_before_queries,
    merge_row_by_row,
    merge_padding_not_zero,
    norms_swapped,
    rule_for_small_maps_swapped,
]


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Constants made by a mutated layer must not outlive it, nor right ones hide it."""

    def clear() -> None:
        for module in (attention, position, window):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture(scope="module")
def intact() -> tuple[Any, Tensor, list[Tensor]]:
    """A model that tests copy, an image and the reference's maps."""
    model = filled(create_backbone("swin_t", **MUTATED)).double().eval()
    image = torch.randn(2, 3, *MUTATED_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, image, reference.swin(image, model.state_dict(), asdict(model.config))


@pytest.mark.parametrize("path", ["inference", "gradients"])
@pytest.mark.parametrize("mutate", [None, *MUTATIONS])
def test_mutations_show(mutate: Any, path: str, intact: Any, fresh_caches: None) -> None:
    model, image, wanted = copy.deepcopy(intact[0]), *intact[1:]
    with pytest.MonkeyPatch.context() as patch:
        if mutate is not None:
            mutate(model, patch)
        error = _largest(PATHS[path](model, image), wanted)
    assert error < 1e-10 if mutate is None else error > 1e-7
