"""A training step on the CPU beside the libraries that have these models: milliseconds, and peak memory.

    python benchmarks/training.py                           # every model in float32 and bfloat16, about 12 minutes
    python benchmarks/training.py --models swin_t --rounds 5 --precision fp32
    python benchmarks/training.py --tables                  # the tables of all machines again, from stored results

A step is forward, cross-entropy, backward and AdamW (fused), from the same weights at 224 pixels (SwinV2 256), under
autocast in bfloat16 (by default only where the machine has instructions for it), without stochastic depth. All
contestants run in turns, in shuffled rounds; before that, the gradients of their first convolutions are compared, in
float32. Memory is what a step takes at most above what a process with model and optimiser held before it, each in a
process of its own. Results: training.json and .md in benchmarks/results/MACHINE.
"""

import argparse
import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import contestants
import torch
import torch.nn.functional as F
from contestants import FAMILIES, SIZE, SIZES
from gpu import compared, told
from peers import RESULTS, here
from torch import Tensor, nn
from tqdm import tqdm

from muntin.measure import memory
from muntin.measure.machine import commit, machine, versions
from muntin.run import atomic_write

MODELS = {  # name: family, images of a step, peers; the first peer is what gpu.py compares with
    "swin_t": ("swin", 8, ("timm", "timm (SDPA)", "torchvision", "transformers (SDPA)")),
    "swinv2_t": ("swinv2", 8, ("timm", "torchvision", "transformers")),
    "swin_free_t": ("swin", 8, ("timm", "timm (SDPA)", "torchvision", "transformers (SDPA)")),
    "efficientvit_m0": ("efficientvit", 16, ("timm",)),
    "efficientvit_m5": ("efficientvit", 16, ("timm",)),
    "rmt_t": ("rmt", 8, ("authors' form",)),
}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
BOUND = 2e-2  # between gradients of the first convolution, in parts of the norm: BatchNorms of random weights amplify


def certain(model: nn.Module) -> nn.Module:
    """In training, without the stochastic depth and dropout that some libraries' models come with."""
    for module in model.modules():
        for rate in ("drop_prob", "p"):  # timm's and transformers' paths; torchvision's, and dropout
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model.train()


def stepping(model: nn.Module, images: Tensor, labels: Tensor, half: bool) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def given(name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a step."""
    family, batch, _ = MODELS[name]
    side, generator = SIZES.get(family, SIZE), torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    return images, torch.randint(1000, (batch,), generator=generator)


def stem_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of the first convolution, in training, in float32."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    loss = F.cross_entropy(model(images), labels)
    (gradient,) = torch.autograd.grad(loss, [first.weight])
    return gradient


def contest(name: str, precision: str, rounds: int, progress: Any) -> dict[str, Any]:
    """Milliseconds of a step in turns, and how far the gradients are apart."""
    family, _, labels = MODELS[name]
    peers, half = FAMILIES[family](name, 0), precision == "bf16"
    images, classes = given(name)
    models = {label: certain(copy.deepcopy(peers[label])) for label in ("muntin", *labels)}
    del peers
    wanted = stem_gradient(copy.deepcopy(models["muntin"]), images, classes)
    apart = {}
    for label in labels:
        found = stem_gradient(copy.deepcopy(models[label]), images, classes)
        apart[label] = ((found - wanted).norm() / wanted.norm()).item()
        if not apart[label] <= BOUND:
            sys.exit(f"{name}: {label}'s gradient is {apart[label]:.1e} off; nothing was timed")
    steps = {label: stepping(model, images, classes, half) for label, model in models.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    order, shuffle = list(steps), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for label in order:
            start = time.perf_counter()
            steps[label]()
            if number:  # the first warms up
                times[label].append(1000 * (time.perf_counter() - start))
            progress.update()
    best = min(labels, key=lambda label: sorted(times[label])[rounds // 2])
    return {"best": best, "gradients_apart": apart, "steps": compared(times, best)}


def peak(name: str, label: str, precision: str) -> float:
    """MB that a step takes above what was held before it, in this process."""
    contestants.share = lambda *_: None  # any weights take as much
    family, _, _ = MODELS[name]
    model = certain(FAMILIES[family](name, 0)[label])
    step = stepping(model, *given(name), precision == "bf16")
    for _ in range(2):
        step()
    model.zero_grad(set_to_none=True)
    before = memory._rest()
    memory._forget_peak()
    step()
    return (memory._status("VmHWM") - before) / memory.MB


def peak_apart(name: str, label: str, precision: str) -> float:
    run = subprocess.run(
        [sys.executable, __file__, "--peak", name, label, precision], capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"memory of {label}: {run.stderr.strip()}")
    return float(run.stdout.strip().splitlines()[-1])


def markdown(results: dict[str, Any]) -> str:
    described = results["machine"]
    lines = [
        f"{described['cpu']}, {results['threads']} threads, torch {results['versions']['torch']}.",
        "",
        "| model | precision | images | step, ms | best peer | over it | memory, MB | least of the peers | of that |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, precisions in results["models"].items():
        for precision, row in precisions.items():
            mine, held = row["steps"]["muntin"], row["memory_mb"]
            least = min(mb for label, mb in held.items() if label != "muntin")
            cells = [PRECISIONS[precision], str(MODELS[name][1]), f"{mine['ms']:.3g}", row["best"], told(mine)]
            cells += [f"{held['muntin']:.0f}", f"{least:.0f}", f"{held['muntin'] / least:.2f}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    commits = {row["commit"][:12] for precisions in results["models"].values() for row in precisions.values()}
    return "\n".join([*lines, "", f"Commit {', '.join(sorted(commits))}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    half = {"amx_bf16", "avx512_bf16"} & {*machine(torch.device("cpu"))["flags"]}
    usual = list(PRECISIONS) if half else ["fp32"]
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=usual)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", action="store_true", help="only write the tables of all machines")
    parser.add_argument(
        "--peak", nargs=3, metavar=("NAME", "PEER", "PRECISION"), help="print one peak of memory, in MB"
    )
    args = parser.parse_args()
    if args.peak:
        print(peak(*args.peak))
        return 0
    if args.tables:
        for path in sorted(RESULTS.glob("*/training.json")):
            atomic_write(path.with_suffix(".md"), markdown(json.loads(path.read_text())).encode())
        return 0
    out = here() / "training.json"
    out.parent.mkdir(exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {"models": {}}
    contests = [(n, p) for n in args.models for p in args.precision]
    count = sum((1 + len(MODELS[n][2])) * (args.rounds + 2) for n, _ in contests)
    with tqdm(total=count, unit="step") as progress:
        for name, precision in contests:
            progress.set_description(f"{name} {precision}")
            row = contest(name, precision, args.rounds, progress)
            labels = "muntin", *MODELS[name][2]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # nothing is timed here
                found = pool.map(lambda label, n=name, p=precision: peak_apart(n, label, p), labels)
                row["memory_mb"] = dict(zip(labels, found, strict=True))
            progress.update(len(labels))
            row["commit"] = commit()
            results |= {"machine": machine(torch.device("cpu")), "versions": versions()}
            results["threads"] = torch.get_num_threads()
            results["models"].setdefault(name, {})[precision] = row
            atomic_write(out, (json.dumps(results, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(results).encode())
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
