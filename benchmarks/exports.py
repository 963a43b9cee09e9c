"""Which variant passes which export: every one at its default size, one of each family at odd sizes too.

    python benchmarks/exports.py                                   # all; pt2 and TensorRT of one each
    python benchmarks/exports.py --targets pte --models swin_t     # some, merged into what is there

Weights are random, norms and position biases among them, so that a missing part shows. Each file is compared with
PyTorch in its runtime before it is kept, then removed. Core ML and ExecuTorch need environments of their own (docs/
export.md): run this there with --targets mlpackage or --targets pte. A target that cannot run on this machine is
written, checked structurally and listed as not run. Results: benchmarks/results/exports.json and exports.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import muntin
from muntin.measure.machine import commit, versions
from muntin.measure.peers import randomise
from muntin.models import published
from muntin.run import atomic_write
from muntin.runtime import ExportError

RESULTS = Path(__file__).parent / "results"
EVERY = ("onnx", "xml")  # of every variant
TARGETS = {
    "onnx": "ONNX",
    "xml": "OpenVINO",
    "pt2": "pt2",
    "engine": "TensorRT",
    "mlpackage": "Core ML",
    "pte": "ExecuTorch",
}
FIXED = ("mlpackage", "pte")  # one size by nature
ONE_EACH = ("swin_t", "swin_free_t_br", "swinv2_t", "efficientvit_m0", "rmt_t")
PRECISIONS = {"swin_t": ("float16", "bfloat16"), "efficientvit_m0": ("float16", "bfloat16")}
ODD = ((225, 171), (97, 200), (61, 83), (28, 15))


def sizes_of(name: str, target: str) -> list[list[tuple[int, int]]]:
    """The default size; of one model per family also odd sizes (of a fixed target an export each)."""
    side = published(name).get("size", 224)
    if name not in ONE_EACH:
        return [[(side, side)]]
    if target in FIXED:
        return [[(side, side)], [ODD[0]]]
    return [[(side, side), *ODD]]


def one(name: str, target: str, precision: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Export one model to one target; a row of the results."""
    torch.manual_seed(0)
    model = randomise(muntin.create_model(name), (224, 224), seed=0)
    row: dict[str, Any] = {"model": name, "target": target, "precision": precision, "sizes": sizes}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.{target}"
        fixed = (1, *sizes[0]) if target in FIXED else None
        batches = None if fixed else (1, 2, 3)
        try:
            report = muntin.export(
                model, path, precision=precision, fixed=fixed, sizes=None if fixed else sizes, batches=batches,
                progress=False,
            )  # fmt: skip
        except ExportError as error:
            row |= {"status": "failed", "reason": str(error).replace(folder, "")}
        except muntin.UserError as error:
            row |= {"status": "refused", "reason": str(error).replace(folder, "")}
        else:
            row |= {
                "status": "not run" if report.not_run else "passed",
                "reason": report.not_run,
                "checks": len(report.checks),
                "max_error": report.max_error if report.checks else None,
                "bound": report.tolerance,
                "bytes": report.bytes,
                "nodes": sum(report.nodes.values()),
                "max_rank": report.max_rank,
            }
    return row | {"seconds": round(time.perf_counter() - start, 1), "commit": commit(), "versions": versions()}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each model and precision, a column for each target."""
    lines = ["| model | precision | " + " | ".join(TARGETS.values()) + " |", "| --- | --- |" + " --- |" * len(TARGETS)]
    order = {name: i for i, name in enumerate(muntin.list_models())}
    for name, precision in sorted(
        {(row["model"], row["precision"]) for row in rows}, key=lambda key: (order[key[0]], key[1] != "float32", key[1])
    ):
        cells = []
        for target in TARGETS:
            found = [r for r in rows if (r["model"], r["precision"], r["target"]) == (name, precision, target)]
            cells.append("; ".join(cell(row) for row in found) or "-")
        lines.append(f"| {name} | {precision} | " + " | ".join(cells) + " |")
    passed = sum(row["status"] == "passed" for row in rows)
    other = sorted({row["status"] for row in rows} - {"passed"})
    counts = ", ".join(f"{sum(r['status'] == status for r in rows)} {status}" for status in other)
    reasons = sorted({f"{TARGETS[r['target']]} {r['precision']}: {r['reason']}" for r in rows if r.get("reason")})
    lines += ["", f"{passed} passed" + (f", {counts}" if counts else "") + ".", *(f"\n{reason}." for reason in reasons)]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    if row["status"] != "passed":
        return row["status"]
    return f"{row['max_error']:.0e} ({len(row['sizes'])} size{'s' * (len(row['sizes']) > 1)})"


def jobs(args: argparse.Namespace) -> list[tuple[str, str, str, list[tuple[int, int]]]]:
    wanted = []
    for name in args.models or muntin.list_models():
        targets = args.targets or (tuple(t for t in TARGETS if t not in FIXED) if name in ONE_EACH else EVERY)
        for target in targets:
            for precision in ("float32", *PRECISIONS.get(name, ())):
                wanted += [(name, target, precision, sizes) for sizes in sizes_of(name, target)]
    return wanted


def in_a_process(job: tuple[str, str, str, list[tuple[int, int]]], jobs: int) -> dict[str, Any]:
    """The row of a job, of a process of its own: converters keep what they allocate."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    run = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True,
                         check=False, env=os.environ | {"OMP_NUM_THREADS": threads})  # fmt: skip
    if run.returncode:
        message = f"the process ended with {run.returncode}: {run.stderr.strip()[-500:]}"
        name, target, precision, sizes = job
        return {"model": name, "target": target, "precision": precision, "sizes": sizes, "status": "failed",
                "reason": message, "seconds": None}  # fmt: skip
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, metavar="SUFFIX", help=", ".join(TARGETS))
    parser.add_argument("--out", default=str(RESULTS / "exports.json"))
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, target, precision, sizes = json.loads(args.job)
        print(json.dumps(one(name, target, precision, [tuple(size) for size in sizes])))
        return 0
    out = Path(args.out)
    rows = json.loads(out.read_text()) if out.exists() else []
    wanted = jobs(args)
    same = ("model", "target", "precision", "sizes")
    with ThreadPoolExecutor(args.jobs) as pool:
        done = as_completed([pool.submit(in_a_process, job, args.jobs) for job in wanted])
        for number, row in enumerate((future.result() for future in done), 1):
            rows = [r for r in rows if any(r[key] != row[key] for key in same)] + [row]
            print(f"{number}/{len(wanted)} {row['model']} {row['target']} {row['precision']}: {row['status']} "
                  f"{row.get('max_error') or row.get('reason') or ''} ({row['seconds']} s)", flush=True)  # fmt: skip
            atomic_write(out, (json.dumps(rows, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(rows).encode())
    print(markdown(rows))
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
