"""Triton kernels in its interpreter against float64, and the operators inside whole models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin import kernels
from muntin.layers.window import Grid

pytest.importorskip("triton", reason="Triton is not installed")

from muntin.kernels import cascade, manhattan, window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU in the interpreter, see conftest.py
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # in units of the largest value
gpu_only = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16's bits as integers")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, bound: float) -> None:
    assert found.shape == wanted.shape
    assert (found.double().cpu() - wanted).abs().max() <= bound * wanted.abs().max().clamp(min=1e-3)


GRIDS = {
    "one window": (1, Grid(4, 4, (4, 4), (0, 0)), 4),
    "shifted": (2, Grid(8, 8, (4, 4), (2, 2)), 4),
    "shifted on one axis": (1, Grid(3, 8, (3, 4), (0, 2)), 4),
    "not divided": (2, Grid(7, 10, (4, 4), (2, 2)), 4),
    "49 tokens": (1, Grid(13, 8, (7, 7), (3, 3)), 7),
    "several tiles": (1, Grid(10, 9, (9, 9), (4, 4)), 9),
    "smaller than its table": (1, Grid(2, 5, (2, 5), (0, 0)), 6),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (1, 24)])
def test_window_attention(name: str, dtype: torch.dtype, heads: int, width: int) -> None:
    batch, grid, side = GRIDS[name]
    channels, tokens = heads * width, grid.height * grid.width
    exact = [random(batch, tokens, 3 * channels), random((2 * side - 1) ** 2, heads, seed=1), random(3 * channels)]
    scale, grad = width**-0.5, random(batch, tokens, channels, seed=2)
    rounded = [t.to(dtype).double().requires_grad_() for t in exact]
    wanted, sums = window.reference(*rounded, heads, grid, (side, side), scale)
    wanted_grads = torch.autograd.grad(wanted, rounded, grad.to(dtype).double(), allow_unused=True)
    given = [t.to(dtype).to(DEVICE) for t in exact]
    out, lse = window.forward(*given, heads, grid, (side, side), scale)
    close(out, wanted.detach(), BOUNDS[dtype])
    close(lse, sums.detach(), BOUNDS[dtype])
    grads = window.backward(grad.to(dtype).to(DEVICE), *given, out, lse, heads, grid, (side, side), scale)
    for found, expected in zip(grads, wanted_grads, strict=True):
        close(found, torch.zeros_like(found).double().cpu() if expected is None else expected, 4 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lines", [manhattan.WHOLE, manhattan.ROWS, manhattan.COLUMNS])
@pytest.mark.parametrize(
    ("batch", "size", "heads", "width"),
    [(2, (5, 7), 2, 16), (1, (3, 70), 1, 8), (2, (9, 9), 1, 24), (2, (1, 1), 1, 2)],  # 70 lines take long enough
)
def test_manhattan_attention(
    batch: int, size: tuple[int, int], heads: int, width: int, lines: int, dtype: torch.dtype
) -> None:
    channels, tokens = heads * width, size[0] * size[1]
    exact = [random(batch, tokens, 2 * channels), random(batch, tokens, channels, seed=1)]
    slopes = -torch.linspace(0.01, 0.3, heads, dtype=torch.float64)
    grad = random(batch, tokens, channels, seed=2).to(dtype)
    rounded = [t.to(dtype).double().requires_grad_() for t in exact]
    wanted, sums = manhattan.reference(*rounded, slopes, *size, lines)
    wanted_grads = torch.autograd.grad(wanted, rounded, grad.double())
    given = [t.to(dtype).to(DEVICE) for t in exact]
    slopes = slopes.to(DEVICE)
    out, lse = manhattan.forward(*given, slopes, *size, lines)
    close(out, wanted.detach(), 4 * BOUNDS[dtype])
    close(lse, sums.detach(), 4 * BOUNDS[dtype])
    grads = manhattan.backward(grad.to(DEVICE), *given, slopes, out, lse, *size, lines)
    for found, expected in zip(grads, wanted_grads, strict=True):
        close(found, expected, 8 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("size", "wide"), [((4, 4), 4), ((7, 9), 4), ((3, 5), 7), ((8, 14), 7)])
def test_cascaded_attention(size: tuple[int, int], wide: int, chained: bool, dtype: torch.dtype) -> None:
    heads, group, key, sides = 3, 24, 8, (5, 3, 3)
    exact = cascade.Weights(
        random(heads, 2 * key + group, group) / 5,
        random(heads, 2 * key + group, seed=1),
        random(heads, key, 5, 5, seed=2) / 5,
        random(heads, key, seed=3),
        random(wide * wide, heads, seed=4),
    )
    exact.taps[1:, :, [0, -1], :] = 0
    exact.taps[1:, :, :, [0, -1]] = 0
    x = random(2, size[0] * size[1], heads * group, seed=5)
    fits = size[0] <= wide and size[1] <= wide
    rule = size, size if fits else (wide, wide), wide, key**-0.5, chained
    wanted = cascade.reference(x.to(dtype).double(), cascade.Weights(*(w.to(dtype).double() for w in exact)), *rule)
    on_device = cascade.Weights(*(w.to(dtype).to(DEVICE) for w in exact))
    found = cascade.forward(x.to(dtype).to(DEVICE), on_device, sides, *rule)
    close(found, wanted, 4 * BOUNDS[dtype])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the check itself
def test_operators_are_well_formed() -> None:
    """Schemas, fake implementations, gradients and what a compiler asks of an operator."""
    grid = [7, 5, 4, 4, 2, 2]
    qkv, table, padding = (t.float().requires_grad_() for t in (random(2, 35, 24), random(49, 2), random(24)))
    torch.library.opcheck(torch.ops.muntin.window_attention, (qkv, table, padding, 2, grid, [4, 4], 0.5))
    torch.library.opcheck(torch.ops.muntin.window_attention, (qkv, table, None, 2, grid, [4, 4], 0.5))
    qk, v = (t.float().requires_grad_() for t in (random(2, 35, 16), random(2, 35, 8)))
    for lines in (manhattan.WHOLE, manhattan.ROWS, manhattan.COLUMNS):
        torch.library.opcheck(torch.ops.muntin.manhattan_attention, (qk, v, -torch.ones(2), 7, 5, lines))
    weights = [random(2, 12, 4), random(2, 12), random(2, 4, 3, 3), random(2, 4), random(16, 2)]
    inputs = [t.float().requires_grad_() for t in (random(2, 35, 8), *weights)]
    torch.library.opcheck(torch.ops.muntin.cascaded_attention, (*inputs, [3, 3], [7, 5], [4, 4], 4, 0.5, True))


MODELS: dict[str, dict[str, Any]] = {
    "swin": {"name": "swin_t", "dim": 16, "depths": (1, 2), "heads": (1, 2), "window": 4},
    "swin, dense": {"name": "swin_t", "dim": 16, "depths": (1, 2), "heads": (1, 2), "window": 4, "small_maps": "pad"},
    "swin_free_br": {"name": "swin_free_t_br", "dim": 16, "depths": (1, 2), "heads": (1, 2), "window": (4, 8),
                     "shift": False},
    "swinv2": {"name": "swinv2_t", "dim": 16, "depths": (1, 2), "heads": (1, 2), "window": 4},
    "rmt": {"name": "rmt_t", "dims": (16, 32), "depths": (1, 1), "heads": (2, 2), "mlp_ratios": (2, 2),
            "decay_range": (3, 3), "decomposed": (True, False), "layer_scale": (False, True), "projection": 0},
    "efficientvit": {"name": "efficientvit_m0", "dims": (16, 24), "depths": (1, 2), "heads": (2, 3), "windows": (4, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (1, 50, 71), (2, 9, 20)])
def test_models_compute_the_same_by_operators(
    name: str, batch: int, height: int, width: int, randomise: Callable[..., nn.Module]
) -> None:
    """Several images where maps are small: the interpreter takes as long for each window of each image, and what a
    kernel does with several is tested above.
    """
    options = dict(MODELS[name])
    model = randomise(muntin.create_model(options.pop("name"), num_classes=5, **options)).double().eval()
    image = random(batch, 3, height, width)
    with kernels.use(False):
        wanted = model(image)
        wanted_grads = torch.autograd.grad(wanted.square().sum(), list(model.parameters()), allow_unused=True)
    with kernels.use(True):
        found = model(image)
        grads = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
        with torch.inference_mode():
            close(muntin.optimize(model)(image), wanted.detach(), 1e-9)
    close(found.detach(), wanted.detach(), 1e-6 if name == "rmt" else 1e-9)
    for found, expected in zip(grads, wanted_grads, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            close(found, expected, 1e-5 if name == "rmt" else 1e-8)


def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """For compute capability 9.0, in the shared memory that smaller GPUs have too."""
    script = Path(__file__).with_name("kernels_ahead.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case["kernel"].partition(".")[0] for case in found} == {"window", "manhattan", "cascade"}
    assert max(case["shared"] for case in found) <= 99 << 10


def test_a_cuda_graph_needs_a_gpu() -> None:
    model = muntin.create_model("swin_t", 5, dim=16, depths=(1,), heads=(1,)).eval()
    with pytest.raises(muntin.UserError, match="the model is on cpu; move it to a GPU"):
        muntin.optimize(model, cuda_graph=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_on_a_gpu(name: str, randomise: Callable[..., nn.Module]) -> None:
    """By kernels, without them, and replayed from CUDA graphs, in float32."""
    options = dict(MODELS[name])
    model = randomise(muntin.create_model(options.pop("name"), num_classes=5, **options)).eval()
    wanted = [model(torch.randn(batch, 3, 50, 71, generator=torch.Generator().manual_seed(batch))) for batch in (1, 3)]
    model.cuda()
    fast = muntin.optimize(model, cuda_graph=True)
    for _ in range(2):
        for batch, expected in zip((1, 3), wanted, strict=True):
            image = torch.randn(batch, 3, 50, 71, generator=torch.Generator().manual_seed(batch)).cuda()
            with torch.no_grad():
                close(model(image), expected.detach().double(), 1e-3)
                close(fast(image), expected.detach().double(), 1e-3)
                with kernels.use(False):
                    close(model(image), expected.detach().double(), 1e-3)
