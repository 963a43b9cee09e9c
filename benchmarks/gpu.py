"""Speed on a GPU: attention operators alone, whole models in inference, and training steps with their memory.

    python benchmarks/gpu.py                              # all, about 20 minutes: results and tables for this GPU
    python benchmarks/gpu.py --parts operators --seconds 0.5
    python benchmarks/gpu.py --device cpu --quick         # the same code on small inputs, to see that it runs

Everything in bfloat16, at 224 pixels (SwinV2 256), same weights, outputs compared before anything is timed, all in
turns of shuffled rounds. Models: as created, `muntin.optimize`, `muntin.compile`, and at batch 1 CUDA graphs of the
optimised copy; peers as created, compiled, and at batch 1 compiled with CUDA graphs ("reduce-overhead"). Training: a
forward, backward and AdamW (fused) step under autocast; peak memory is what the allocator held at most.
Results: gpu.json and .md in benchmarks/results/GPU.
"""

import argparse
import copy
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import FAMILIES, SIZE, SIZES, build, difference
from peers import here
from torch import Tensor, nn

import muntin
from muntin import kernels
from muntin.layers.position import bias_matrix, relative_index
from muntin.layers.window import Grid, window_masks
from muntin.measure import bench
from muntin.measure.machine import commit, machine, versions
from muntin.measure.statistics import median_interval, rounded
from muntin.run import atomic_write
from muntin.runtime.graphs import CudaGraphs

MODELS = {  # name: family and the peers that are timed beside it, the first the one that ratios are over
    "swin_t": ("swin", ("timm (SDPA)", "transformers (SDPA)")),
    "swin_b": ("swin", ("timm (SDPA)", "transformers (SDPA)")),
    "swinv2_t": ("swinv2", ("timm",)),
    "efficientvit_m5": ("efficientvit", ("timm (BN folded)", "timm (BN folded, channels last)")),
    "rmt_s": ("rmt", ("authors' form",)),
}
TRAINED = {"swin_t": "timm (SDPA)", "efficientvit_m5": "timm", "rmt_s": "authors' form"}
STAGES = ((56, 128, 4), (28, 256, 8), (14, 512, 16), (7, 1024, 32))  # Swin-B at 224: side, channels, heads
RMT_STAGES = ((56, 64, 4, True), (28, 128, 4, True), (14, 256, 8, True), (7, 512, 16, False))  # RMT-S; decomposed
HALF = 0.1  # largest difference of outputs in bfloat16, in standard deviations
Steps = dict[str, Callable[[], Any]]


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def burst(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """Milliseconds of a call, when so many follow each other."""
    settle(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    settle(device)
    return 1000 * (time.perf_counter() - start) / count


def in_turns(steps: Steps, rounds: int, seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each step by round: as many calls in a row as fill its share of the seconds."""
    counts = {}
    for label, step in steps.items():
        for _ in range(3):
            once = burst(step, 1, device)
        counts[label] = max(1, round(1000 * seconds / rounds / once))
    found: dict[str, list[float]] = {label: [] for label in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for label in order:
            found[label].append(burst(steps[label], counts[label], device))
    return found


def compared(times: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Of each step the median and how many times as fast as `base` it is, with its interval over the rounds."""
    rows = {}
    for label, ms in times.items():
        speeds = [b / m for b, m in zip(times[base], ms, strict=True)]
        rows[label] = {
            "ms": statistics.median(ms),
            "interval_ms": median_interval(ms),
            "speed": statistics.median(speeds),
            "speed_interval": median_interval(speeds),
        }
    return rows


# ------------------------------------------------------------------------------------------------ operators alone


def rolled(qkv: Tensor, bias: Tensor, heads: int, grid: Grid) -> Tensor:
    """Roll, partition, fused attention, merge, roll back, as libraries write it: (B, N, 3C) -> (B, N, C)."""
    batch, _, channels = qkv.shape
    (wh, ww), (sh, sw) = grid.window, grid.shift
    x = qkv.view(batch, grid.height, grid.width, channels)
    if sh or sw:
        x = torch.roll(x, (-sh, -sw), (1, 2))
    rows, columns = grid.counts
    x = x.view(batch, rows, wh, columns, ww, channels).transpose(2, 3).reshape(-1, wh * ww, 3, heads, 32)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    mask = bias if bias.ndim == 3 else bias.repeat(batch, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    y = y.reshape(batch, rows, columns, wh, ww, -1).transpose(2, 3).reshape(batch, grid.height, grid.width, -1)
    return (torch.roll(y, (sh, sw), (1, 2)) if sh or sw else y).flatten(1, 2)


class Materialised:
    """Manhattan attention by rotation, decay masks, explicit products and a softmax; angles and masks are made once."""

    def __init__(self, slopes: Tensor, side: int, dim: int, decomposed: bool, dtype: torch.dtype) -> None:
        angle = 1.0 / 10000 ** torch.linspace(0, 1, dim // 2, device=slopes.device)
        turns = (torch.arange(side**2, device=slopes.device)[:, None] * angle).repeat_interleave(2, -1)
        self.cos, self.sin = (t[:, None, None].to(dtype) for t in (turns.cos(), turns.sin()))  # (N, 1, 1, d)
        x = torch.arange(side, device=slopes.device, dtype=torch.float32)
        far = (x[:, None] - x).abs()
        if not decomposed:
            far = (far[:, None, :, None] + far[:, None, :]).reshape(side**2, side**2)
        self.mask = (slopes[:, None, None] * far).to(dtype)
        self.side, self.dim, self.decomposed = side, dim, decomposed

    def __call__(self, qk: Tensor, v: Tensor) -> Tensor:
        """(B, N, 2C) and (B, N, C) -> (B, N, C)."""
        batch, tokens, channels = v.shape
        heads = channels // self.dim
        parts = qk.view(batch, tokens, 2, heads, self.dim)
        partner = torch.stack((-parts[..., 1::2], parts[..., ::2]), -1).flatten(-2)
        q, k = (parts * self.cos + partner * self.sin).unbind(2)
        k, v = k * self.dim**-0.5, v.view(batch, tokens, heads, self.dim)
        if not self.decomposed:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return (torch.softmax(q @ k.transpose(-1, -2) + self.mask, -1) @ v).transpose(1, 2).flatten(2)
        q, k, v = (t.view(batch, self.side, self.side, heads, self.dim) for t in (q, k, v))
        for axis in (2, 1):
            lines = [t.movedim((axis, 3), (3, 2)) for t in (q, k, v)]  # (B, other, h, L, d)
            mixed = torch.softmax(lines[0] @ lines[1].transpose(-1, -2) + self.mask, -1) @ lines[2]
            v = mixed.movedim((3, 2), (axis, 3))
        return v.reshape(batch, tokens, channels)


def with_gradients(step: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().clone().requires_grad_() for t in given]

    def run() -> Any:
        out = step(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def operators(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Window attention of Swin-B's stages and Manhattan attention of RMT-S's, forward and with gradients."""
    from muntin.kernels.manhattan import COLUMNS, ROWS, WHOLE, manhattan_attention
    from muntin.kernels.window import window_attention

    make: dict[str, Any] = {"device": device, "dtype": torch.float32 if args.quick else torch.bfloat16}
    batch, rows = (1 if args.quick else args.batch), {}

    def contest(name: str, ours: Any, theirs: Any, given: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            off = difference(ours(*given), theirs(*given))
        if not off <= HALF:
            sys.exit(f"{name}: {off:.1e} standard deviations off; nothing was timed")
        steps: Steps = {"ours": lambda: ours(*given), "theirs": lambda: theirs(*given)}
        with torch.no_grad():
            forward = compared(in_turns(steps, args.rounds, args.seconds, device), "theirs")
        both: Steps = {"ours": with_gradients(ours, *given), "theirs": with_gradients(theirs, *given)}
        backward = compared(in_turns(both, args.rounds, args.seconds, device), "theirs")
        rows[name] = {"error": off, "forward": forward, "forward and backward": backward}
        print(f"{name}: {told(forward['ours'])} forward, {told(backward['ours'])} with gradients", flush=True)

    with kernels.use(True):
        for side, channels, heads in STAGES[2:] if args.quick else STAGES:
            for shift in (0, 3) if side > 7 else (0,):
                grid = Grid(side, side, (7, 7), (shift, shift))
                qkv, table = torch.randn(batch, side**2, 3 * channels, **make), torch.randn(169, heads, **make)

                def window(qkv: Tensor, table: Tensor, heads: int = heads, grid: Grid = grid) -> Tensor:
                    return window_attention(qkv, table, None, heads, grid, (7, 7), 32**-0.5)

                # as libraries do, the index and the masks are made once, the bias matrix at every call
                index = relative_index(7, 7, 7, device)
                masks = window_masks(grid, device)[:, None].to(qkv.dtype) if shift else None

                def roll(
                    qkv: Tensor,
                    table: Tensor,
                    heads: int = heads,
                    grid: Grid = grid,
                    index: Tensor = index,
                    masks: Tensor | None = masks,
                ) -> Tensor:
                    bias = bias_matrix(table, index, grid.area)
                    return rolled(qkv, bias if masks is None else bias + masks, heads, grid)

                contest(f"window, {side}x{side}, {heads} heads, shift {shift}", window, roll, (qkv, table))
        for side, channels, heads, decomposed in RMT_STAGES[2:] if args.quick else RMT_STAGES:
            qk, v = torch.randn(batch, side**2, 2 * channels, **make), torch.randn(batch, side**2, channels, **make)
            slopes = -torch.rand(heads, device=device)

            def mix(qk: Tensor, v: Tensor, slopes: Tensor = slopes, side: int = side, d: bool = decomposed) -> Tensor:
                for lines in (ROWS, COLUMNS) if d else (WHOLE,):
                    v = manhattan_attention(qk, v, slopes, side, side, lines)
                return v

            kind = "decomposed" if decomposed else "whole"
            full = Materialised(slopes, side, channels // heads, decomposed, v.dtype)
            contest(f"Manhattan {kind}, {side}x{side}, {heads} heads", mix, full, (qk, v))
    return rows


# ------------------------------------------------------------------------------------------------- whole models


class Called(nn.Module):
    """A callable as a module whose weights nobody else moves."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call = [call]
        self.eval()

    def forward(self, images: Tensor) -> Any:
        return self.call[0](images)


def inference(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Each model and its peer, at a large batch and at batch 1."""
    found: dict[str, Any] = {}
    dtype = torch.float32 if args.quick else torch.bfloat16
    for name in args.models:
        family, labels = MODELS[name]
        built = dict(build(family, name)[0])
        ours, *others = (copy.deepcopy(built[key]).to(device, dtype).eval() for key in ("muntin", *labels))
        peers = dict(zip(labels, others, strict=True))
        base = labels[0]
        side = SIZES.get(family, SIZE)
        for batch in (2,) if args.quick else (args.batch, 1):
            torch._dynamo.reset()
            targets: list[tuple[str, Any]] = [
                ("muntin", ours),
                ("muntin.optimize", muntin.optimize(ours)),
                ("muntin.compile", muntin.compile(ours)),
                *peers.items(),
                *((f"{key}, compiled", Called(torch.compile(peer, dynamic=False))) for key, peer in peers.items()),
            ]
            if device.type == "cuda" and batch == 1:
                targets.append(("muntin.optimize, CUDA graph", muntin.optimize(ours, cuda_graph=True)))
                for key, peer in peers.items():
                    reduced = torch.compile(peer, dynamic=False, mode="reduce-overhead")
                    targets += [
                        (f"{key}, CUDA graph", Called(CudaGraphs(peer))),
                        (f"{key}, reduce-overhead", Called(reduced)),
                    ]
            images = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
            with torch.inference_mode():
                wanted = peers[base](images).clone()
                off = {key: difference(model(images).clone(), wanted) for key, model in targets}
            if not max(off.values()) <= HALF:
                sys.exit(f"{name}, batch {batch}: {off} standard deviations off; nothing was timed")
            report = bench(targets, [batch], side, precision=str(dtype).split(".")[1], device=str(device),
                           rounds=args.rounds, seconds=args.seconds, base=base, progress=False)  # fmt: skip
            print(f"{name}, batch {batch}\n{report.table()}\n", flush=True)
            found.setdefault(name, {})[str(batch)] = {"errors": off, "report": asdict(report)}
            del targets
            gc.collect()
    return found


def stepping(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def training(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A step of each model and of its peer, from the same weights: milliseconds, and peak memory."""
    found: dict[str, Any] = {}
    batch = 2 if args.quick else args.batch
    for name in (name for name in TRAINED if name in args.models):
        family, label = MODELS[name][0], TRAINED[name]
        peers = FAMILIES[family](name, 0)
        side = SIZES.get(family, SIZE)
        images = torch.randn(batch, 3, side, side, device=device)
        labels = torch.randint(1000, (batch,), device=device)
        steps: Steps = {}
        memory = {}
        for key in ("muntin", label):
            model = copy.deepcopy(peers[key]).to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

            step = stepping(model, optimizer, images, labels)
            step()
            if device.type == "cuda":
                settle(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                step()
                memory[key] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            steps[key] = step
        found[name] = {
            "steps": compared(in_turns(steps, args.rounds, args.seconds, device), label),
            "memory_mb": memory,
        }
        print(f"{name}, training: {told(found[name]['steps']['muntin'])}, memory {memory}", flush=True)
        del steps
        gc.collect()
    return found


def told(row: dict[str, Any]) -> str:
    low, high = row["speed_interval"]
    return f"{rounded(row['speed'], (high - low) / 2)}x" + (" (tie)" if low <= 1 <= high else "")


def markdown(results: dict[str, Any]) -> str:
    """What has been measured, as tables."""
    described = results["machine"]
    lines = [f"{described.get('gpu') or described['cpu']}, torch {results['versions']['torch']}, bfloat16.", ""]
    if results.get("operators"):
        lines += ["| operator | ms | over PyTorch's form | with gradients, ms | over PyTorch's form |",
                  "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for name, row in results["operators"].items():
            forward, both = (row[key]["ours"] for key in ("forward", "forward and backward"))
            cells = [f"{forward['ms']:.3g}", told(forward), f"{both['ms']:.3g}", told(both)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if results.get("inference"):
        lines += ["| model | batch | form | ms | over the peer as created |", "| --- | ---: | --- | ---: | ---: |"]
        for name, batches in results["inference"].items():
            for batch, entry in batches.items():
                for row in entry["report"]["rows"]:
                    cells = [row["target"], f"{row['median_ms']:.3g}", told(row)]
                    lines.append(f"| {name} | {batch} | " + " | ".join(cells) + " |")
        lines.append("")
    if results.get("training"):
        lines += [
            "| training step | ms | over the peer | memory, MB | the peer's |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, row in results["training"].items():
            mine, *memory = row["steps"]["muntin"], *(f"{mb:.0f}" for mb in row["memory_mb"].values())
            lines.append(f"| {name} | {mine['ms']:.3g} | {told(mine)} | " + " | ".join(memory or ["-", "-"]) + " |")
        lines.append("")
    return "\n".join(lines)


PARTS = {"operators": operators, "inference": inference, "training": training}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per contestant")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small batches and sizes in float32; stores nothing")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/GPU)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is at hand; to see that the script runs: --device cpu --quick", file=sys.stderr)
        return 2
    path = (args.out or here(args.device)) / "gpu.json"
    results = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    results |= {"machine": machine(device), "versions": versions(), "commit": commit()}
    for part in args.parts:
        results[part] = results.get(part, {}) | PARTS[part](args, device)
        if not args.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, (json.dumps(results, indent=1) + "\n").encode())
            atomic_write(path.with_suffix(".md"), markdown(results).encode())
    print(markdown(results) if args.quick else f"written: {path} and {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
