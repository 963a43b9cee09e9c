"""How time and memory grow from 224 to 1024 pixels: windowed and decomposed attention beside a vision transformer.

    python benchmarks/growth.py            # about 6 minutes
    python benchmarks/growth.py --tables   # tables and pictures of all machines again

Ours as `muntin.optimize` leaves them, the transformer with fused attention, batch 1, in turns at each size; memory in a
process of its own. The exponent of the pixels is fitted by least squares of the logarithms, with its 95% interval.
rmt_t stands there twice: as published its last stage (and the one before, see its `decomposed`) attends to the whole
map, "decomposed" has rows and columns in every stage. Results: growth.json, .md and .png in benchmarks/results/MACHINE.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from peers import RESULTS, here, read
from torch import nn
from tqdm import tqdm

import muntin
from muntin.measure import bench, memory
from muntin.measure.peers import timm_model
from muntin.measure.scaling import growth, plot, sizes
from muntin.measure.statistics import rounded
from muntin.run import atomic_write

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_t": ("swin_t", {}),
    "swinv2_t": ("swinv2_t", {}),
    "swin_free_t": ("swin_free_t", {}),
    "efficientvit_m5": ("efficientvit_m5", {}),
    "rmt_t, decomposed": ("rmt_t", {"decomposed": (True, True, True, True)}),
    "rmt_t": ("rmt_t", {}),
}
PEER = "timm:deit_tiny_patch16_224"
LINEAR = 1.1  # an exponent up to which growth counts as linear


def model_of(label: str, side: int) -> nn.Module:
    if label == PEER:
        return timm_model(PEER.partition(":")[2], (side, side)).eval()
    name, changes = OURS[label]
    torch.manual_seed(0)
    return muntin.optimize(muntin.create_model(name, **changes).eval())


def peak_apart(label: str, side: int) -> float:
    """MB in a process of its own."""
    command = [sys.executable, __file__, "--peak", label, str(side)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"memory of {label}: {run.stderr.strip()}")
    return float(run.stdout.strip().splitlines()[-1])


def measured(rounds: int, seconds: float) -> dict[str, Any]:
    sides = sizes("224:1024")
    targets: list[Any] = [*((label, model_of(label, 224)) for label in OURS), PEER]
    report = bench(targets, [1], sides, engine="eager", rounds=rounds, seconds=seconds)
    rows = []
    for row in tqdm(report.rows, desc="memory"):
        rows.append(replace(row, memory_mb=peak_apart(row.target, row.height)))
    return asdict(replace(report, rows=rows, scaling=growth(rows)))


def markdown(content: dict[str, Any]) -> str:
    def told(entry: dict[str, Any], what: str) -> str:
        low, high = entry[f"{what}_interval"]
        half = (high - low) / 2
        return f"{rounded(entry[f'{what}_exponent'], half)} ± {rounded(half, half)}"

    rows = read(content).rows
    lines = [
        "| model | time ~ pixels^ | memory ~ pixels^ | linear | ms at 224 | at 1024 | MB at 224 | at 1024 |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for entry in content["scaling"]:
        its = sorted((row for row in rows if row.target == entry["target"]), key=lambda row: row.height)
        linear = max(entry["time_exponent"], entry["memory_exponent"]) <= LINEAR
        cells = [told(entry, "time"), told(entry, "memory"), "yes" if linear else "no"]
        cells += [f"{its[i].median_ms:.3g}" for i in (0, -1)]
        cells += [f"{its[i].memory_mb:.0f}" for i in (0, -1)]
        lines.append(f"| {entry['target']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per row")
    parser.add_argument("--tables", action="store_true", help="only write tables and pictures of all machines")
    parser.add_argument("--peak", nargs=2, metavar=("LABEL", "SIDE"), help="print one peak of memory, in MB")
    args = parser.parse_args()
    if args.peak:
        label, side = args.peak[0], int(args.peak[1])
        images = torch.randn(1, 3, side, side)
        print(memory.peak(lambda: model_of(label, side), images).run_mb)
        return 0
    paths = sorted(RESULTS.glob("*/growth.json")) if args.tables else [here() / "growth.json"]
    if not args.tables:
        paths[0].parent.mkdir(exist_ok=True)
        atomic_write(paths[0], (json.dumps(measured(args.rounds, args.seconds), indent=1) + "\n").encode())
    for path in paths:
        content = json.loads(path.read_text())
        atomic_write(path.with_suffix(".md"), markdown(content).encode())
        plot(read(content).rows, path.with_suffix(".png"))
        print(markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
