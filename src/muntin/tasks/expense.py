"""What an epoch costs where there is no GPU: said before it begins, since it may take days."""

import copy
import statistics
import time

import torch
from torch import nn

from muntin.tasks.settings import Settings

PASSES = 3  # forward, and twice as much backward
LONG = 4e5  # GMACs of an epoch from which it is said: more than an hour at the 100 GMACs/s of a few cores
LARGEST = 35.0  # GMACs of the largest model at 224 pixels: where its epoch would be short, any is
SMALLEST = "efficientvit_m0"
PRODUCT = 1024  # side of the matrices that the machine is timed with
MANY = 128  # images at once, from which memory is the next question


def long_epochs(model: nn.Module, name: str, settings: Settings, images: int, processes: int = 1) -> str:
    """A line for training without a GPU whose epochs are long, with what to do instead; "" for any other.

    images: of an epoch; processes: that share them.
    """
    assert settings.size is not None
    if torch.cuda.is_available() or PASSES * images * LARGEST * (settings.size / 224) ** 2 < LONG:
        return ""
    from muntin.measure.cost import cost

    work = PASSES * images * cost(copy.deepcopy(model).to("meta"), (settings.size, settings.size)).gmacs
    if work < LONG:
        return ""
    rate = products_per_second() * processes
    advice = ["a GPU", "fewer images"]
    if not settings.weights:
        advice.append("published weights and few epochs (--recipe finetune)")
    if name != SMALLEST:
        advice.append(f"a smaller model (--model {SMALLEST})")
    together = settings.batch_size // (settings.accumulate * processes)
    if together > MANY:
        advice.append(f"--set accumulate={settings.batch_size // (MANY * processes)} if memory is short")
    return (
        f"no GPU here: an epoch of {name} over {images:,} images at {settings.size} pixels takes {1e9 * work:.1e} "
        f"multiply-adds, {_long(work / rate)} or more at the {rate:,.0f}e9 a second of this machine's matrix products, "
        f"and there are {settings.epochs}; consider {', '.join(advice[:-1])}, or {advice[-1]}"
    )


def products_per_second() -> float:
    """10^9 multiply-adds a second of a float32 matrix product, the median of five."""
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    torch.mm(a, b)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return PRODUCT**3 / 1e9 / statistics.median(seconds)


def _long(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:,.0f} days" if hours >= 48 else f"{hours:.1f} hours"
