"""Latency of each family against the libraries that people use, with the same weights.

    python benchmarks/peers.py                       # results, the tables of README.md and docs/speed.md, the plot
    python benchmarks/peers.py --models efficientvit_m5 --batch 8 --seconds 5 --engines pytorch bf16

Outputs are compared before anything is timed; then all take turns (muntin.measure.bench). Peers run as their own
docs recommend: fused attention where they have it, BatchNorms folded, channels-last memory for convolutional models.
In PyTorch, in float32 and with weights and images in bfloat16, and exported to ONNX Runtime and OpenVINO: ours as it
is exported by default, for any batch and size, and for a fixed one; peers for a fixed one. "deployed" has everybody in
every runtime at once, for a fixed size, and ours as an optimised copy too: the best of ours beside the best of theirs.
With --compile also compiled, which takes minutes for each model.

Results: peers.json, peers.md, peers_FAMILY.md and peers.png in benchmarks/results/MACHINE, where what is not measured
stays as it is.
"""

import argparse
import copy
import gc
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import BOUND, LAYERS, MODELS, SIZE, SIZES, build, by_layers, difference
from plots import forest
from torch import Tensor, nn

import muntin
from muntin.measure import BenchReport, bench
from muntin.measure.bench import Row
from muntin.measure.machine import machine, threads_in_words
from muntin.measure.runners import Compiled
from muntin.measure.statistics import median_interval, rounded
from muntin.run import atomic_write
from muntin.runtime import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
RUNTIMES = {  # engine: suffix, precision, title
    "onnx": (".onnx", "float32", "ONNX Runtime"),
    "openvino": (".xml", "float32", "OpenVINO"),
    "openvino-bf16": (".xml", "bfloat16", "OpenVINO, bf16"),
}
IN_PYTORCH = {"pytorch": "PyTorch", "bf16": "PyTorch, bf16", "compile": "compiled"}
BEST = {"deployed": ("onnx", "openvino"), "deployed-bf16": ("openvino-bf16",)}  # the runtimes of a contest of all
WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
ENGINES = (*IN_PYTORCH, *RUNTIMES, *BEST)
HALF_BOUND = 0.15  # of bfloat16, in standard deviations, as in muntin bench
EXPORTED = {  # the peers that are taken into runtimes, without what only PyTorch has (fused attention, memory formats)
    "swin": ("timm", "torchvision", "transformers (SDPA)"),
    "swinv2": ("timm", "torchvision"),
    "efficientvit": ("timm (BN folded)",),
    "rmt": ("authors' form",),
}
COMPILED = EXPORTED | {"efficientvit": ("timm (BN folded)", "timm (BN folded, channels last)")}
Targets = list[tuple[str, nn.Module]]


class Deployed(nn.Module):
    """An exported file as a module, for the benchmark."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.engine = load(path)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images)


def deployed(peers: Targets, family: str, engine: str, batch: int, folder: Path) -> Targets:
    """Ours with dynamic and with fixed sizes, and the peers with fixed ones, in one runtime."""
    suffix, precision, _ = RUNTIMES[engine]
    side = SIZES.get(family, SIZE)
    wanted: list[tuple[str, nn.Module, bool]] = [("muntin", peers[0][1], False), ("muntin, fixed", peers[0][1], True)]
    wanted += [(label, model, True) for label, model in peers if label in EXPORTED[family]]
    found: Targets = []
    for number, (label, model, fixed) in enumerate(wanted):
        path = folder / f"{engine}-{batch}-{number}{suffix}"
        if fixed:
            muntin.export(model, path, precision=precision, fixed=(batch, side, side), progress=False)
        else:
            muntin.export(model, path, precision=precision, sizes=[(side, side)], batches=[1, batch], progress=False)
        found.append((label, Deployed(path)))
    return found


class InHalf(nn.Module):
    """A model in bfloat16 that takes and gives float32, as files do; nobody casts its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = [model]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.held[0](images.bfloat16()).float()


def everywhere(peers: Targets, family: str, engine: str, batch: int, folder: Path) -> Targets:
    """All in each runtime of a contest, for a fixed size, and our optimised copy."""
    half = engine.endswith("bf16")
    copies = halved(peers) if half else peers
    optimised = dict(copies)["muntin.optimize"]
    found: Targets = [("muntin.optimize", InHalf(optimised) if half else optimised)]
    for runtime in BEST[engine]:
        for label, module in deployed(peers, family, runtime, batch, folder):
            if label != "muntin":
                found.append((f"{label.removesuffix(', fixed')}, {RUNTIMES[runtime][2]}", module))
    return found


def compiled(peers: Targets, family: str) -> Targets:
    """Ours by muntin.compile, the peers by torch.compile."""
    chosen = [(label, Compiled(model)) for label, model in peers if label in COMPILED[family]]
    return [("muntin", muntin.compile(peers[0][1])), *chosen]


def halved(peers: Targets) -> Targets:
    """All in bfloat16; ours optimised in it, not after."""
    found: Targets = []
    for label, model in peers:
        half = copy.deepcopy(peers[0][1] if label in ("muntin.optimize", LAYERS) else model).bfloat16()
        if label in ("muntin.optimize", LAYERS):
            half = muntin.optimize(half)
        found.append((label, by_layers(half) if label == LAYERS else half))
    return found


def contests(family: str, name: str, args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int, Targets, Any]]:
    """Engine, batch, who takes part, and how far each is from Muntin's model in PyTorch."""
    peers, errors = build(family, name)
    side = SIZES.get(family, SIZE)
    for batch in args.batch:
        images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            wanted = peers[0][1](images)
        for engine in args.engines:
            if engine == "pytorch":
                yield engine, batch, peers, errors
                continue
            if engine in IN_PYTORCH:
                targets = compiled(peers, family) if engine == "compile" else halved(peers)
            elif engine in BEST:
                targets = everywhere(peers, family, engine, batch, folder)
            else:
                targets = deployed(peers, family, engine, batch, folder)
            given = images.bfloat16() if engine == "bf16" else images
            with torch.inference_mode():
                off = {label: difference(model(given), wanted) for label, model in targets}
            bound = HALF_BOUND if "bf16" in engine else BOUND
            if not max(off.values()) <= bound:
                sys.exit(f"{name} in {engine}: {off} standard deviations off; nothing was timed")
            yield engine, batch, targets, off


def slug(described: dict[str, Any]) -> str:
    """A machine's name for a folder, with the instructions that make the difference: amd-epyc-avx2-2-cores."""
    widest = next((flag for flag in WIDEST if flag in described["flags"]), "")
    name = described.get("gpu") or f"{described['cpu']} {widest} {described['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def here(device: str = "cpu") -> Path:
    """The folder of this machine's results, or of its GPU's."""
    return RESULTS / slug(machine(torch.device(device)))


def ratio(ours: Row, peer: Row) -> tuple[float, float, float]:
    """How much faster ours is: the median over the rounds, and its 95% interval."""
    speeds = [p / o for o, p in zip(ours.round_ms, peer.round_ms, strict=True)]
    return median(speeds), *median_interval(speeds)


def told(found: tuple[float, float, float]) -> str:
    value, low, high = found
    text = f"{rounded(value, (high - low) / 2)}x"
    return f"{text} (tie)" if low <= 1 <= high else text


def milliseconds(row: Row) -> str:
    half = (row.interval_ms[1] - row.interval_ms[0]) / 2
    return f"{rounded(row.median_ms, half)} ± {rounded(half, half)}"


def best_peer(rows: Sequence[Row]) -> Row:
    return min((row for row in rows if not row.target.startswith("muntin")), key=lambda row: row.median_ms)


def best_of_ours(rows: Sequence[Row]) -> Row:
    return min((row for row in rows if row.target.startswith("muntin")), key=lambda row: row.median_ms)


def compared(rows: Sequence[Row]) -> list[tuple[str, tuple[float, float, float]]]:
    """Each of ours against the best peer."""
    best = best_peer(rows)
    return [(row.target, ratio(row, best)) for row in rows if row.target.startswith("muntin")]


def markdown(family: str, results: dict[str, Any]) -> str:
    """The tables of a family: PyTorch by batch with everybody, runtimes with the best peer."""
    lines: list[str] = []
    batches = sorted({int(batch) for models in results.values() for by in models.values() for batch in by})
    for batch in batches:
        for engine in IN_PYTORCH:
            rows = _rows(results, engine, batch)
            if rows:
                lines += [*_everybody(rows, family, engine, batch), ""]
        exported = {(n, e): r for e in RUNTIMES for n, r in _rows(results, e, batch).items()}
        if exported:
            lines += [*_runtimes(exported, family, batch), ""]
        contests = {(n, e): r for e in BEST for n, r in _rows(results, e, batch).items()}
        if contests:
            lines += [*_best(contests, family, batch), ""]
    stored = [entry for models in results.values() for by in models.values() for entry in by.values()]
    off = max((e for s in stored for label, e in s["errors"].items() if s["report"]["protocol"]["dtype"] == "float32"
               and "bf16" not in s["engine"]), default=0.0)  # fmt: skip
    m, v, p = (stored[0]["report"][key] for key in ("machine", "versions", "protocol"))
    libraries = ", ".join(f"{n} {v[n]}" for n in ("torch", "timm", "torchvision", "transformers", "onnxruntime",
                                                  "openvino") if n in v)  # fmt: skip
    commits = sorted({s["report"]["commit"][:12] for s in stored if s["report"]["commit"]})
    where = (
        f"{m.get('gpu') or m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}), {threads_in_words(p['threads'])}"
    )
    equal = f"same weights, float32 outputs equal to {off:.0e} standard deviations"
    rounds = " or ".join(sorted({str(s["report"]["protocol"]["rounds"]) for s in stored}, key=int))
    lines.append(f"{where}, {rounds} interleaved rounds; {libraries}; {equal}; commit {', '.join(commits)}.")
    return "\n".join(lines) + "\n"


def _rows(results: dict[str, Any], engine: str, batch: int) -> dict[str, list[Row]]:
    found = {name: engines.get(engine, {}).get(str(batch)) for name, engines in results.items()}
    return {name: read(entry["report"]).rows for name, entry in found.items() if entry}


def _everybody(rows: dict[str, list[Row]], family: str, engine: str, batch: int) -> list[str]:
    labels = [row.target for row in max(rows.values(), key=len)]
    ours = [label for label in labels if label.startswith("muntin")]
    precision = "" if engine == "bf16" else ", float32"
    lines = [
        f"{IN_PYTORCH[engine]}, batch {batch}, {SIZES.get(family, SIZE)} pixels{precision}, ms (median ± 95%)",
        "",
        "| model | " + " | ".join([*labels, "best peer", *(f"over {label}" for label in ours)]) + " |",
        "| --- |" + " ---: |" * (len(labels) + 1 + len(ours)),
    ]
    for name, found in rows.items():
        timed, ratios = {row.target: row for row in found}, dict(compared(found))
        cells = [milliseconds(timed[label]) if label in timed else "-" for label in labels]
        cells += [best_peer(found).target, *(told(ratios[label]) if label in ratios else "-" for label in ours)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _runtimes(rows: dict[tuple[str, str], list[Row]], family: str, batch: int) -> list[str]:
    lines = [
        f"Exported, batch {batch}, {SIZES.get(family, SIZE)} pixels, ms (median ± 95%); ratios to the best peer",
        "",
        "| model | runtime | muntin | muntin, fixed | best peer | its ms | over muntin | over fixed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, engine), found in sorted(rows.items(), key=lambda item: list(rows).index(item[0])):
        best = best_peer(found)
        cells = [name, RUNTIMES[engine][2], *(milliseconds(r) for r in found if r.target.startswith("muntin"))]
        cells += [best.target, milliseconds(best), *(told(value) for _, value in compared(found))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _best(rows: dict[tuple[str, str], list[Row]], family: str, batch: int) -> list[str]:
    lines = [
        f"All runtimes in one contest, batch {batch}, {SIZES.get(family, SIZE)} pixels, ms (median ± 95%)",
        "",
        "| model | precision | the best of ours | ms | the best of theirs | ms | over it |",
        "| --- | --- | --- | ---: | --- | ---: | ---: |",
    ]
    for (name, engine), found in sorted(rows.items(), key=lambda item: list(rows).index(item[0])):
        ours, best = best_of_ours(found), best_peer(found)
        cells = [name, "bfloat16" if engine.endswith("bf16") else "float32", ours.target, milliseconds(ours)]
        cells += [best.target, milliseconds(best), told(ratio(ours, best))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SUMMARY = {  # of README.md: engine, ours, head
    "PyTorch": ("pytorch", "muntin"),
    "PyTorch, muntin.optimize": ("pytorch", "muntin.optimize"),
    "bf16, muntin.optimize": ("bf16", "muntin.optimize"),
    "compiled": ("compile", "muntin"),
    "ONNX Runtime": ("onnx", "muntin, fixed"),
    "OpenVINO": ("openvino", "muntin, fixed"),
    "OpenVINO, bf16": ("openvino-bf16", "muntin, fixed"),
    "best of all runtimes": ("deployed", ""),
}


def summary(families: dict[str, Any]) -> str:
    """How many times as fast as the best peer in the same engine, a line for each model and batch."""
    lines = ["| model | batch | " + " | ".join(SUMMARY) + " |", "| --- | ---: |" + " ---: |" * len(SUMMARY)]
    for models in families.values():
        for name, engines in models.items():
            for batch in sorted({int(b) for by in engines.values() for b in by}):
                cells = []
                for engine, ours in SUMMARY.values():
                    entry = engines.get(engine, {}).get(str(batch))
                    rows = read(entry["report"]).rows if entry else []
                    ratios = dict(compared(rows)) if entry else {}
                    label = ours or (best_of_ours(rows).target if rows else "")
                    cells.append(told(ratios[label]) if label in ratios else "-")
                lines.append(f"| `{name}` | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read(content: dict[str, Any]) -> BenchReport:
    """What `asdict` made of a report, as a report."""
    return BenchReport(**content | {"rows": [Row(**row) for row in content["rows"]]})


def write(folder: Path, results: dict[str, Any]) -> None:
    """The JSON, the tables and the plot of what has been measured so far."""
    atomic_write(folder / "peers.json", (json.dumps(results, indent=1) + "\n").encode())
    points = []
    results["families"] = {
        family: {name: models[name] for name in MODELS[family] if name in models}
        for family, models in results["families"].items()
    }
    for family, models in results["families"].items():
        atomic_write(folder / f"peers_{family}.md", markdown(family, models).encode())
        for name, engines in models.items():
            for engine, by_batch in engines.items():
                if engine in BEST:
                    continue
                title = RUNTIMES[engine][2] if engine in RUNTIMES else IN_PYTORCH[engine]
                for batch, entry in by_batch.items():
                    found = [
                        c for c in compared(read(entry["report"]).rows) if c[0] not in ("muntin (BN folded)", LAYERS)
                    ]
                    points += [(f"{name}, batch {batch}", f"{title}, {label}", *values) for label, values in found]
    atomic_write(folder / "peers.md", summary(results["families"]).encode())
    atomic_write(folder / "peers.png", lambda path: forest(points, "times as fast as the best peer there", path))


def main() -> int:
    every = [name for names in MODELS.values() for name in names]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["pytorch", "bf16", *RUNTIMES, *BEST], metavar="ENGINE"
    )
    parser.add_argument("--compile", action="store_true", help="also compiled")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed per contestant")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/MACHINE)")
    parser.add_argument("--tables", action="store_true", help="time nothing; write tables and plots of all machines")
    args = parser.parse_args()
    if args.tables:
        for path in sorted(RESULTS.glob("*/peers.json")):
            write(path.parent, json.loads(path.read_text()))
        return 0
    args.engines = [*args.engines, *(["compile"] if args.compile else [])]
    folder = args.out or here()
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "peers.json"
    described = machine(torch.device("cpu"))
    results = json.loads(stored.read_text()) if stored.exists() else {"machine": described, "families": {}}
    for family, names in MODELS.items():
        for name in [name for name in names if name in args.models]:
            with tempfile.TemporaryDirectory() as exported:
                for engine, batch, targets, errors in contests(family, name, args, Path(exported)):
                    print(f"{name}, {engine}, batch {batch}: equal to {max(errors.values()):.1e}", flush=True)
                    report = bench(
                        targets,
                        [batch],
                        SIZES.get(family, SIZE),
                        precision="bfloat16" if engine == "bf16" else None,
                        threads=args.threads,
                        rounds=args.rounds,
                        seconds=args.seconds,
                    )
                    print(report.table(), "\n", flush=True)
                    entry = {"engine": engine, "errors": errors, "report": asdict(report)}
                    results["families"].setdefault(family, {}).setdefault(name, {}).setdefault(engine, {})[
                        str(batch)
                    ] = entry
                    atomic_write(stored, (json.dumps(results, indent=1) + "\n").encode())
                    del targets
                    gc.collect()
    write(folder, results)
    print(f"written: {folder}; put its tables into the docs with: make docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
