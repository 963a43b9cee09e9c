"""Images/s of one core from JPEG files to normalised batches, beside timm's loader and torchvision's plain one.

    python benchmarks/loading.py                            # about 5 minutes
    python benchmarks/loading.py --images 300 --rounds 9
    python benchmarks/loading.py --tables                   # the table again from stored results

The images are made here: 500 pixels wide or high, smooth noise at all scales under grain, most JPEGs of 40 to 110 KB.
Every contestant reads them from the same folder (or, where it says so, from tar shards of the same files), in one
process and one thread, into float batches of 64 at 224 pixels. Training: random resized crop (bicubic), flip, timm's
RandAugment rand-m9-mstd0.5-inc1, normalisation, random erasing of a quarter of the images. Evaluation: the shorter side
to 256 (bicubic), the centre of 224, normalisation. timm has two forms: everything in the worker, and uint8 batches that
are normalised and erased as a whole (its prefetcher, here on the CPU); the better one counts.

Contestants take turns, in shuffled rounds; rates are of the process's own CPU time, so that others on the machine count
little; ratios are medians over rounds. Results: loading.json and .md in benchmarks/results/MACHINE.
"""

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from peers import RESULTS, here
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from muntin.data.augment import Photographs, posterize
from muntin.data.device import Erase, Prepare
from muntin.data.loading import EpochBatches, EvaluationSet, TrainingSet, evaluation_loader, training_loader
from muntin.data.pack import write_shards
from muntin.data.sources import open_parts
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Evaluate
from muntin.measure.machine import commit, machine, versions
from muntin.run import atomic_write

SIZE, RESIZE, BATCH = 224, 256, 64
POLICY, ERASING = "rand-m9-mstd0.5-inc1", 0.25
SIDES = ((500, 375), (375, 500), (500, 333), (500, 500))  # width and height, as in ImageNet
OURS = ("muntin", "muntin, shards")
BICUBIC = transforms.InterpolationMode.BICUBIC

Loading = Callable[[], Iterable[Tensor]]  # one pass


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG with structure at all scales and some grain."""
    generator, (width, height) = np.random.default_rng(seed), size
    values = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        coarse = generator.standard_normal((2**octave, 2**octave, 3)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(3)]
        values += 0.66**octave * (0.8 * layers[0][..., None] + 0.2 * np.stack(layers, -1))
    values += generator.uniform(0.04, 0.1) * generator.standard_normal((height, width, 1))
    pixels = (120 + 50 * values / values.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(generator.integers(90, 95)))
    return file.getvalue()


def make_folder(root: Path, count: int) -> list[int]:
    """Photographs in two class folders; their sizes in bytes."""
    sizes = []
    for number in tqdm(range(count), desc="making images", disable=not sys.stderr.isatty()):
        data = photograph(number, SIDES[number % len(SIDES)])
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(data)
        sizes.append(len(data))
    return sizes


def ours(data: str, training: bool) -> Loading:
    images = open_parts(data)["all"]
    prepare, erase = Prepare(IMAGENET_MEAN, IMAGENET_STD), Erase(ERASING)
    if training:
        loader = training_loader(
            TrainingSet(images, Photographs((SIZE, SIZE), IMAGENET_MEAN, POLICY), 0),
            EpochBatches(len(images), BATCH, 0),
            workers=0,
        )
        return lambda: (erase(prepare(batch)) for batch, _ in loader)
    plain = evaluation_loader(EvaluationSet(images, Evaluate((SIZE, SIZE), RESIZE).bytes), BATCH, workers=0)
    return lambda: (prepare(batch) for batch, _ in plain)


def timms(folder: str, training: bool, whole: bool) -> Loading:
    """timm's loader; `whole`: uint8 batches, normalised and erased as a whole."""
    loader = timm.data.create_loader(
        timm.data.create_dataset("", folder),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=training,
        use_prefetcher=whole,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_pct=SIZE / RESIZE,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
        auto_augment=POLICY if training else None,
        re_prob=ERASING if training else 0.0,
        re_mode="pixel",
    )
    return lambda: (batch for batch, _ in loader)


def torchvisions(folder: str, training: bool) -> Loading:
    """ImageFolder and its transforms; RandAugment is timm's, so that all do the same."""
    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    policy = {"translate_const": int(SIZE * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    first = [
        transforms.RandomResizedCrop(SIZE, interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        auto_augment.rand_augment_transform(POLICY, policy),
    ]
    if not training:
        first = [transforms.Resize(RESIZE, interpolation=BICUBIC), transforms.CenterCrop(SIZE)]
    last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    last += [transforms.RandomErasing(ERASING, scale=(0.02, 1 / 3), value="random")] * training
    data = ImageFolder(folder, transforms.Compose([*first, *last]))
    loader: Any = DataLoader(data, BATCH, shuffle=training, drop_last=training)
    return lambda: (batch for batch, _ in loader)


def contestants(folder: str, shards: str, training: bool) -> dict[str, Loading]:
    return {
        "muntin": ours(folder, training),
        "muntin, shards": ours(shards, training),
        "timm": timms(folder, training, False),
        "timm, uint8 batches": timms(folder, training, True),
        "torchvision": torchvisions(folder, training),
    }


def rate(loading: Loading) -> tuple[float, float]:
    """Images per second of CPU time, and of the clock."""
    clock, start = time.perf_counter(), time.process_time()
    count = 0
    for batch in loading():
        if batch.dtype != torch.float32 or batch.shape[1:] != (3, SIZE, SIZE):
            sys.exit(f"a batch is {batch.dtype} of shape {tuple(batch.shape)}")
        count += len(batch)
    return count / (time.process_time() - start), count / (time.perf_counter() - clock)


def contest(loadings: dict[str, Loading], rounds: int, steps: Iterator[Any]) -> dict[str, Any]:
    """Rates in turns, and ours over each peer's within a round."""
    rates: dict[str, list[tuple[float, float]]] = {label: [] for label in loadings}
    order, shuffle = list(loadings), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for label in order:
            found = rate(loadings[label])
            next(steps)
            if number:  # the first warms up
                rates[label].append(found)
    return {
        "images_per_cpu_second": {label: [round(cpu, 2) for cpu, _ in found] for label, found in rates.items()},
        "images_per_second": {label: [round(wall, 2) for _, wall in found] for label, found in rates.items()},
    }


def over(row: dict[str, Any], mine: str, peer: str) -> float:
    """The median over rounds of one rate over the other."""
    rates = row["images_per_cpu_second"]
    return statistics.median(a / b for a, b in zip(rates[mine], rates[peer], strict=True))


def best_timm(row: dict[str, Any]) -> str:
    return max(
        ("timm", "timm, uint8 batches"), key=lambda label: statistics.median(row["images_per_cpu_second"][label])
    )


def markdown(results: dict[str, Any]) -> str:
    sizes = results["bytes"]
    lines = [
        f"{results['machine']['cpu']}, one thread, torch {results['versions']['torch']}, "
        f"{len(sizes)} JPEGs of {min(sizes) / 1e3:.0f} to {max(sizes) / 1e3:.0f} KB "
        f"(mean {statistics.mean(sizes) / 1e3:.0f}), {results['rounds']} rounds.",
        "",
        "| | images/s of a core | over timm | over torchvision |",
        "| --- | ---: | ---: | ---: |",
    ]
    for task, row in results["tasks"].items():
        for label, rates in row["images_per_cpu_second"].items():
            cells = ["-", "-"]
            if label in OURS:
                cells = [f"{over(row, label, peer):.2f}x" for peer in (best_timm(row), "torchvision")]
            lines.append(f"| {task}: {label} | {statistics.median(rates):.0f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Commit {results['commit'][:12]}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tables", action="store_true", help="only write the tables of all machines")
    args = parser.parse_args()
    if args.tables:
        for path in sorted(RESULTS.glob("*/loading.json")):
            atomic_write(path.with_suffix(".md"), markdown(json.loads(path.read_text())).encode())
        return 0
    torch.set_num_threads(1)
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize  # timm's own fails with recent Pillow
    results: dict[str, Any] = {"rounds": args.rounds, "tasks": {}}
    with tempfile.TemporaryDirectory() as place:
        folder, shards = f"{place}/photographs", f"{place}/shards"
        results["bytes"] = make_folder(Path(folder), args.images)
        write_shards(folder, shards, per_shard=100)
        tasks = {"training": True, "evaluation": False}
        steps = iter(tqdm(range(10 * (args.rounds + 1)), unit="turn", disable=not sys.stderr.isatty()))
        for task, training in tasks.items():
            results["tasks"][task] = contest(contestants(folder, shards, training), args.rounds, steps)
    results |= {"machine": machine(torch.device("cpu")), "versions": versions(), "commit": commit()}
    out = here() / "loading.json"
    out.parent.mkdir(exist_ok=True)
    atomic_write(out, (json.dumps(results, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(results).encode())
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
