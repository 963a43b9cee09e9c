"""Peak memory of RMT's attention, decomposed and whole, as images grow.

    python benchmarks/rmt_memory.py                      # blocks of stages 0 to 2 of rmt_s and its backbone

Each figure comes from a process of its own: a block of one stage (or the backbone, batch 1) runs once in inference
after one run on a small map, and the figure is the peak of the resident memory (VmHWM, reset before) beyond the
resident memory before the run (VmRSS). The input is not in it; the block's own tables of decay and rotation are.
Whole attention is left out where its decay alone would take more than --limit. Linux only.
Results go to benchmarks/results/ as JSON and as a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import muntin
from muntin.measure.machine import commit, machine, versions
from muntin.models.rmt import VARIANTS, RmtBlock
from muntin.run import atomic_write

SIDES = (224, 448, 672, 896, 1024)
FORMS = ("decomposed", "whole")
STAGES = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"


def _status(field: str) -> int:
    """Bytes in a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this measurement needs Linux")


def measure(what: str, form: str, side: int) -> int:
    """Peak bytes of one run beyond the memory before it; `what` is a stage's number or "backbone"."""
    row = VARIANTS["rmt_s"]
    small: tuple[Any, ...]
    args: tuple[Any, ...]
    if what == "backbone":
        run: Any = muntin.create_backbone("rmt_s").eval()
        small, args = (torch.randn(1, 3, 64, 64),), (torch.randn(1, 3, side, side),)
    else:
        stage = int(what)
        run = RmtBlock(row, stage, 0.0).eval()
        run.attention.decomposed = form == "decomposed"
        rows = side // (4 * 2**stage)
        small = (torch.randn(1, 64, row.dims[stage]), (8, 8))
        args = (torch.randn(1, rows * rows, row.dims[stage]), (rows, rows))
    with torch.inference_mode():
        run(*small)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = _status("VmRSS")
        run(*args)
    return _status("VmHWM") - before


def _apart(what: str, form: str, side: int) -> int:
    """`measure` in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--one", what, form, str(side)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def _cases(limit: float) -> list[tuple[str, str, int]]:
    heads = VARIANTS["rmt_s"].heads
    cases = [("backbone", "decomposed", side) for side in SIDES]
    for stage in STAGES:
        for side in SIDES:
            decay = 4 * heads[stage] * (side // (4 * 2**stage)) ** 4  # bytes
            cases += [(str(stage), form, side) for form in FORMS if form == "decomposed" or decay <= limit]
    return cases


def markdown(content: dict[str, Any]) -> str:
    """One row for each image side; bytes per token of the map beside each figure, constant where growth is linear."""
    found = {(row["what"], row["form"], row["side"]): row for row in content["rows"]}
    columns = [("backbone", "decomposed")] + [(str(stage), form) for stage in STAGES for form in FORMS]
    titles = ["backbone"] + [f"stage {stage}, {form}" for stage in STAGES for form in FORMS]
    lines = [
        "Peak memory in MB beyond the memory before the run (in kB per token of the map: the stage's, or the first)",
        "",
        "| pixels | " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * len(titles),
    ]
    for side in SIDES:
        cells = []
        for column in columns:
            row = found.get((*column, side))
            cells.append(f"{row['bytes'] / 1e6:.0f} ({row['bytes'] / row['tokens'] / 1e3:.1f})" if row else "-")
        lines.append(f"| {side} x {side} | " + " | ".join(cells) + " |")
    m, v = content["machine"], content["versions"]
    limit, commit_id = f"{content['limit'] / 1e9:.0f} GB", content["commit"]
    lines += ["", f"rmt_s, batch 1, float32, inference; -: not run, its decay alone takes more than {limit}."]
    lines += [f"{m['cpu']}, one thread; torch {v['torch']}; commit {commit_id}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=3e9, help="bytes of a decay table that whole attention may take")
    parser.add_argument("--out", default=str(RESULTS / "rmt_memory.json"))
    args = parser.parse_args()
    if args.one:
        what, form, side = args.one
        print(measure(what, form, int(side)))
        return
    rows = []
    for what, form, side in _cases(args.limit):
        tokens = (side // (4 if what == "backbone" else 4 * 2 ** int(what))) ** 2
        rows.append({"what": what, "form": form, "side": side, "tokens": tokens, "bytes": _apart(what, form, side)})
        print(rows[-1], flush=True)
    content = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "limit": args.limit,
        "rows": rows,
    }
    out = Path(args.out)
    atomic_write(out, (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(content).encode())
    print(markdown(content))


if __name__ == "__main__":
    main()
