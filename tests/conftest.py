"""Fixtures that several test files share."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

# Models in tests are so small that threads spend their time waiting for each other, much more so under xdist.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and so in the processes that tests start
os.environ["OMP_WAIT_POLICY"] = "passive"  # there and in xdist's: threads that wait leave the cores to the others
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: they then run on a CPU

LONGEST = (
    "profile dense_export ranks exported engines batch export compile losing_nothing cli nodes models dense_training "
    "executorch swinv2 recipes cost export_command dense_recipes train dense_learning kernels native efficientvit rmt "
    "weights training_kernels bench choose sweep parity docs ecosystem bench_parts"
).split()
"""Files that take more than a minute, the longest first."""

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@dataclass(frozen=True)
class Golden:
    """Weights under the authors' names, and pairs of an input and the authors' outputs."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    pairs: list[tuple[Tensor, list[Tensor]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers take file by file, and the one without a last long file would wait for the other."""
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random images at every run: some amplify a model's rounding a hundredfold."""
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Reads a file of golden references by name."""

    def read(name: str) -> Golden:
        path = GOLDEN / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"the authors' outputs, {path.name}, are not beside this clone in shared/golden")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            config = json.loads(file.metadata()["config"])
        config.pop("note", None)
        weights = {k.removeprefix("weight/"): t for k, t in tensors.items() if k.startswith("weight/")}
        pairs = []
        for i in range(sum(key.startswith("input/") for key in tensors)):
            count = sum(key.startswith(f"output/{i}/") for key in tensors)
            pairs.append((tensors[f"input/{i}"], [tensors[f"output/{i}/{j}"] for j in range(count)]))
        return Golden(config, weights, pairs)

    return read


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model with weights under which every part of it shows: norms, tables and biases far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim == 1 and name.endswith("weight"):  # of a norm
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise)
            elif "table" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(1.3 * noise / tensor[0].numel() ** 0.5)
    return model


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """`filled`, for tests."""
    return filled


def settle(model: nn.Module) -> nn.Module:
    """Running statistics near those of an image, and half the weights of those norms: with others a deep model of many
    BatchNorms amplifies the rounding of any form tenfold, or is dead."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    training, dtype = model.training, next(model.parameters()).dtype
    for norm in norms:
        norm.momentum = 0.9
        norm.weight.data.mul_(0.5)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 61, 83, generator=torch.Generator().manual_seed(5)).to(dtype))
    for norm in norms:
        norm.momentum = 0.1
    return model.train(training)


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in standard deviations of what is wanted."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().std()).item()
