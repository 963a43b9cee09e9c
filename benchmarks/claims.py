"""Every speed and size claim of the papers, beside what this machine says: docs/claims.md.

    python benchmarks/claims.py                        # all, about half an hour on two quiet cores
    python benchmarks/claims.py --only mobile growth   # some, merged into what is stored
    python benchmarks/claims.py --tables               # measure nothing; write the table of what is stored

Contests are interleaved (`muntin.measure.bench`): peers by their `timm:` name with BatchNorms folded and the faster
memory layout, everybody with the same threads; exported files are for one size. The shares of shifting and of norms
and activations are those of benchmarks/profiles.py, which runs first. Results: benchmarks/results/claims.json, .md.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import ratio, read

import muntin
from muntin.measure import bench
from muntin.measure.bench import Row
from muntin.measure.cost import MODELS
from muntin.measure.machine import commit, machine, threads_in_words, versions
from muntin.measure.peers import randomise, timm_model
from muntin.measure.profile import profile
from muntin.measure.scaling import growth as fitted
from muntin.measure.scaling import sizes as sides
from muntin.measure.statistics import rounded
from muntin.measure.timing import threads_of
from muntin.run import atomic_write

RESULTS = Path(__file__).parent / "results"
FAST = {"rounds": 10, "seconds": 4.0, "progress": True}
TORCH, RUNTIMES = ("eager", "optimize"), ("onnx", "openvino")
TITLES = {"eager": "PyTorch", "optimize": "PyTorch, muntin.optimize", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
SWIN_FREE = ("swin_b", "swin_free_b", "swin_free_b_br", "swin_free_b_dr12", "swin_free_b_br_dr12", "swin_b_br")
MILLISECONDS = {  # Swin-Free's PyTorch latencies on an RTX 3080, batch 1, whole milliseconds
    "swin_free_t": 6, "swin_free_s": 12, "swin_free_b": 12, "swin_free_t_br": 7, "swin_free_s_br": 13,
    "swin_free_b_br": 13, "swin_free_b_dr10": 9, "swin_free_b_dr12": 9, "swin_free_b_dr14": 10,
    "swin_free_b_dr16": 11, "swin_free_b_br_dr12": 10, "swin_free_b_br_dr14": 11, "swin_free_b_br_dr16": 12,
    "swin_b_br": 15, "swinv2_b": 21, "swin_b": 14.3,
}  # fmt: skip
GROWING = ("swin_t", "swin_free_t", "efficientvit_m5", "rmt_t", "timm:deit_tiny_patch16_224")
GPU = "not run here: no GPU"


# ------------------------------------------------------------------------------------------------------ measurements


def mobile(name: str, peer: str, batches: Sequence[int]) -> dict[str, Any]:
    """One of EfficientViT's against a mobile network, each at its own size, on one core as in the paper."""
    return asdict(bench([name, peer], batches, engine=[*TORCH, "onnx"], threads=1, **FAST))  # type: ignore[arg-type]


def deployed() -> dict[str, Any]:
    """Swin-Free's claims against Swin-B in each engine, batch 1."""
    return asdict(bench(list(SWIN_FREE), [1], 224, engine=["eager", *RUNTIMES], **FAST))  # type: ignore[arg-type]


def milliseconds() -> dict[str, Any]:
    """The paper's PyTorch column, all variants in turns; SwinV2 with windows of 7, as 224 pixels need."""
    torch.manual_seed(0)
    v2 = randomise(muntin.create_model("swinv2_b", window=7), (224, 224))
    targets = [(name, v2) if name == "swinv2_b" else name for name in MILLISECONDS]
    return asdict(bench(targets, [1], 224, engine="eager", base="swin_b", **FAST))  # type: ignore[arg-type]


def shares() -> dict[str, Any]:
    """Swin-T's and DeiT-T's time by kind, in timm's form with fused attention, eager."""
    found = {}
    for name in ("swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"):
        model = timm_model(name, (224, 224)).eval().requires_grad_(False)
        for batch in (1, 8):
            one = profile(model, torch.randn(batch, 3, 224, 224), name=f"timm:{name}", calls=7, roofline=False)
            found[f"{name}, batch {batch}"] = {"kinds": one.kinds, "wall_ms": one.wall_ms, "bound": one.memory_bound}
    return found


def growth() -> dict[str, Any]:
    """Time against pixels from 224 to 1024, eager, batch 1."""
    return asdict(bench(list(GROWING), [1], sides("224:1024"), engine="eager", rounds=7, seconds=3.0))


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "mobilenet": lambda: mobile("efficientvit_m5", "timm:mobilenetv3_large_100", (1, 16)),
    "mobilevit": lambda: mobile("efficientvit_m2", "timm:mobilevit_xxs", (1, 16)),
    "deployed": deployed,
    "milliseconds": milliseconds,
    "shares": shares,
    "growth": growth,
}


# ------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Line:
    """A row of the page. holds: "yes", "partly" (the direction, not the size), "no", "tie", or why it was not run."""

    claim: str
    setting: str
    published: str
    ours: str
    holds: str
    why: str = ""


def judged(found: tuple[float, float, float], published: float) -> str:
    """A ratio with its interval against a published one above 1."""
    value, low, high = found
    if high >= published:
        return "yes"
    if low <= 1 <= high:
        return "tie"
    return "partly" if value > 1 else "no"


def with_interval(found: tuple[float, float, float]) -> str:
    value, low, high = found
    half = (high - low) / 2
    return f"{rounded(value, half)}x ({rounded(low, half)} to {rounded(high, half)})"


def rows_of(content: dict[str, Any]) -> dict[tuple[str, str, int], Row]:
    return {(row.model, row.engine, row.batch): row for row in read(content).rows}


def against_mobile(
    content: dict[str, Any], name: str, peer: str, published: dict[str, float], why: dict[str, str]
) -> list[Line]:
    """A line for each engine and batch; the peer in PyTorch is its faster, eager setting."""
    rows, lines = rows_of(content), []
    claim = f"{name} over {peer}"
    for batch in sorted({batch for _, _, batch in rows}):
        for engine in (*TORCH, "onnx"):
            theirs = rows.get((peer, "eager" if engine in TORCH else engine, batch))
            ours = rows.get((name, engine, batch))
            if ours is None or theirs is None:
                continue
            figure = published.get("onnx" if engine == "onnx" else "cpu")
            if figure is None:
                continue
            found = ratio(ours, theirs)
            verdict = judged(found, figure)
            setting = f"{TITLES[engine]}, batch {batch}, 1 thread"
            lines.append(Line(claim, setting, f"{figure}x", with_interval(found), verdict,
                              "" if verdict == "yes" else why.get(engine, why["all"])))  # fmt: skip
    return lines


LESS = {"swin_free_b_br": 19, "swin_free_b_dr12": 33, "swin_free_b_br_dr12": 38}


def against_swin(content: dict[str, Any]) -> list[Line]:
    """Latency below Swin-B's in per cent, as the paper states it for TensorRT in FP16."""
    rows, lines = rows_of(content), []
    for name in ("swin_free_b", *LESS):
        for engine in ("eager", *RUNTIMES):
            found = ratio(rows[name, engine, 1], rows["swin_b", engine, 1])
            less, low, high = (100 * (1 - 1 / value) for value in found)
            stated = LESS.get(name)
            published = f"{stated}% less" if stated else "2.0 ms against 2.1"
            verdict = judged(found, 1 / (1 - stated / 100) if stated else 2.1 / 2.0)
            why = "" if verdict == "yes" else WHY_FREE["br" if "_br" in name else "free"]
            lines.append(Line(f"{name} below swin_b", f"{TITLES[engine]}, batch 1", f"{published} (TensorRT FP16)",
                              f"{less:.0f}% ({low:.0f} to {high:.0f})", verdict, why))  # fmt: skip
    return lines


WHY_FREE = {
    "free": "likely: products take most of the time on two cores, on a GPU in FP16 little of it",
    "br": "likely: products take most of the time on two cores, and LayerNorm is one kernel: less to save",
}


def table_of_milliseconds(content: dict[str, Any]) -> list[str]:
    """The paper's PyTorch column beside ours, both over Swin-B's."""
    rows = rows_of(content)
    base = rows["swin_b", "eager", 1]
    lines = ["| model | published, ms | over swin_b | here, ms | over swin_b | the same order |",
             "| --- | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name, stated in MILLISECONDS.items():
        row = rows[name, "eager", 1]
        half = (row.interval_ms[1] - row.interval_ms[0]) / 2
        slower = [o / b for o, b in zip(row.round_ms, base.round_ms, strict=True)]
        share = median(slower)
        low, high = (1 / r for r in ratio(row, base)[:0:-1])
        same = "-" if name == "swin_b" else "tie here" if low <= 1 <= high else \
            "yes" if (share > 1) == (stated > MILLISECONDS["swin_b"]) else "no"  # fmt: skip
        lines.append(
            f"| {name} | {stated} | {stated / MILLISECONDS['swin_b']:.2f} | {rounded(row.median_ms, half)} ± "
            f"{rounded(half, half)} | {rounded(share, (high - low) / 2)} | {same} |"
        )
    return lines


def by_kind(profiles: dict[str, Any], measured: dict[str, Any]) -> list[Line]:
    """Shares of shifting, and of norms and activations, in Swin-B; of memory-bound time in Swin-T and DeiT-T."""
    lines = []
    found = {(p["name"], p["engine"]): p for p in profiles["profiles"] if p["shape"][0] == 1}
    for label, engine in (("timm swin_base", "eager"), ("timm swin_base", "onnx"), ("swin_b", "eager"),
                          ("swin_b", "onnx")):  # fmt: skip
        one = found.get((label, engine))
        if one is None:
            continue
        wall, kinds = one["wall_ms"], one["kinds"]
        setting = f"{label}, {TITLES[engine]}, batch 1"
        shift = 100 * kinds["window shifting"] / wall
        rest = 100 * (kinds["normalisation"] + kinds["activation"]) / wall
        stated = "4.4% (PyTorch), 8.7% (TensorRT)"
        why = "one gather between two blocks partitions and shifts" if label == "swin_b" else "see docs/profile.md"
        lines.append(Line("time of shifting windows in Swin-B", setting, stated, f"{shift:.1f}%",
                          "yes" if shift >= 4 else "no", "" if shift >= 4 else why))  # fmt: skip
        lines.append(Line("LayerNorm and GELU in Swin-B", setting, "about 24% (TensorRT)", f"{rest:.0f}%",
                          "yes" if rest >= 20 else "no", "" if rest >= 20 else
                          "products take most of the time on two cores"))  # fmt: skip
    for label, one in measured.items():
        share = 100 * one["bound"] / one["wall_ms"]
        lines.append(Line("most time is memory-bound, as figure 2 calls all but products", f"timm:{label}, PyTorch",
                          "most of it (V100)", f"{share:.0f}%", "yes" if share > 50 else "no", "" if share > 50 else
                          "products take most of the time on two cores"))  # fmt: skip
    return lines


def growing(content: dict[str, Any]) -> list[Line]:
    lines = []
    for entry in fitted(read(content).rows):
        value, (low, high) = entry["time_exponent"], entry["time_interval"]
        half = (high - low) / 2
        peer = entry["target"].startswith("timm:")
        if peer:
            published, holds = "quadratic in tokens", "yes" if low > 1.1 else "no"
            why = "linear layers outweigh attention until the largest sizes"
        else:
            published, holds = "linear in pixels", "yes" if low <= 1.1 else "no"
            why = "likely: caches hold the smaller maps and not the larger"
            if entry["target"].startswith("rmt"):
                why = "attention over rows and columns costs H W (H + W), and the last stage attends to the whole map"
        why = "" if holds == "yes" else why
        its = sorted((row for row in read(content).rows if row.target == entry["target"]), key=lambda row: row.height)
        last = math.log(its[-1].median_ms / its[-2].median_ms) / (2 * math.log(its[-1].height / its[-2].height))
        told = f"time ~ pixels^{rounded(value, half)} ± {rounded(half, half)}, {last:.1f} between the largest two"
        setting = f"PyTorch, batch 1, {its[0].height} to {its[-1].height} pixels"
        lines.append(Line(f"growth of {entry['target']}", setting, published, told, holds, why))
    return lines


def gpu_lines() -> list[Line]:
    """What the papers measured on GPUs and phones."""
    told = (
        ("efficientvit_m5 over timm:mobilenetv3_large_100", "V100, batch 2048", "1.404x"),
        ("efficientvit_m2 over timm:mobilevit_xxs", "V100, batch 2048", "5.8x"),
    )
    lines = [Line(claim, setting, published, "-", GPU) for claim, setting, published in told]
    iphone = "not run here: Core ML runs on Apple's machines"
    return [*lines, Line("efficientvit_m2 over timm:mobilevit_xxs", "iPhone 11, Core ML", "2.3x", "-", iphone)]


WHY_M5 = {
    "all": "likely: timm's MobileNetV3 runs here with its BatchNorms folded, in its faster memory layout and on "
    "AVX-512, which the paper's Xeon E5-2690 v4 lacks"
}
WHY_M2 = {"all": WHY_M5["all"].replace("MobileNetV3", "MobileViT")}


def lines_of(stored: dict[str, Any]) -> list[Line]:
    profiles = json.loads((RESULTS / "profiles.json").read_text())
    lines = against_mobile(stored["mobilenet"], "efficientvit_m5", "timm:mobilenetv3_large_100", {"cpu": 1.452}, WHY_M5)
    lines += against_mobile(
        stored["mobilevit"], "efficientvit_m2", "timm:mobilevit_xxs", {"cpu": 3.7, "onnx": 7.4}, WHY_M2
    )
    lines += [*gpu_lines(), *against_swin(stored["deployed"]), *by_kind(profiles, stored["shares"])]
    return lines + growing(stored["growth"])


def one_core(content: dict[str, Any]) -> str:
    """The paper's one absolute figure."""
    rows = rows_of(content)
    here = {engine: rows["efficientvit_m5", engine, 1] for engine in (*TORCH, "onnx")}
    told = ", ".join(f"{1000 / row.median_ms:.0f} in {TITLES[engine]}" for engine, row in here.items())
    return (
        "EfficientViT's one absolute CPU figure, M5 at 56.8 images a second on one core of a Xeon E5-2690 v4, is of "
        f"another machine; one core of this one, batch 1: {told}."
    )


def sizes(rows: list[dict[str, Any]]) -> list[str]:
    """Figures stated to the digit, counted; the papers' rounded ones, a line each."""
    lines = ["| model | published | here | difference | agrees |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        for figure, unit in re.findall(r"([\d.]+)([MG])", row["stated"].get("paper", "")):
            lines.append(_size(row, figure, unit))
    keys = ("parameters", "gmacs", "folded", "exported")
    counted = sum(key in row["stated"] for row in rows for key in keys)
    exact = sum(_exact(row) for row in rows)
    lead = (
        f"Of {counted} figures that are known to the digit (learnable parameters, parameters with the bias matrices as "
        f"constants, parameters with BatchNorms folded, GMACs) {exact} are equal here to every digit. The papers' own, "
        "rounded figures:"
    )
    return [lead, "", *lines]


def _exact(row: dict[str, Any]) -> int:
    stated, gmacs = row["stated"], row["stated"].get("gmacs")
    equal = [
        stated.get("parameters") == row["parameters"],
        stated.get("folded") == row["folded_parameters"],
        gmacs is not None and f"{row['gmacs']:.{len(gmacs.partition('.')[2])}f}" == gmacs,
        "exported" in stated and f"{row['exported_parameters'] / 1e6:.2f}" == stated["exported"],
    ]
    return sum(equal)


def _size(row: dict[str, Any], figure: str, unit: str) -> str:
    published, digits = float(figure), len(figure.partition(".")[2])
    if unit == "G":
        ours, what = row["gmacs"], "GMACs"
    else:
        constants = row["family"] == "swin"
        ours = row["exported_parameters" if constants else "parameters"] / 1e6
        what = "parameters" + (" in the exported graph" if constants else "")
    off = ours / published - 1
    if abs(ours - published) <= 0.5 * 10**-digits:
        agrees = "to its digits"
    elif abs(off) <= 0.005:
        agrees = "within 0.5%"
    else:
        counts = "Swin-Free counted an exported graph, with operators that are no products"
        agrees = f"no: {counts}" if unit == "G" and row["family"] == "swin" else "no"
    return f"| {row['name']} | {figure}{unit} {what} | {ours:.{digits + 2}f}{unit} | {off:+.2%} | {agrees} |"


def markdown(stored: dict[str, Any]) -> str:
    lines = [
        "| claim | setting | published | here (95%) | holds here | why not |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = lines_of(stored)
    for line in found:
        lines.append(f"| {line.claim} | {line.setting} | {line.published} | {line.ours} | {line.holds} | {line.why} |")
    counts = ", ".join(f"{sum(line.holds == word for line in found)} {word}" for word in ("yes", "partly", "tie", "no"))
    m, v = stored["machine"], stored["versions"]
    about = (
        f"{counts}; {sum(line.holds.startswith('not run') for line in found)} not run here. "
        '"yes": the interval reaches the published figure or lies beyond; "partly": the direction, not the size.'
    )
    libraries = ", ".join(f"{n} {v[n]}" for n in ("torch", "timm", "onnxruntime", "openvino") if n in v)
    where = (
        f"{m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}), "
        f"{threads_in_words(stored['deployed']['protocol']['threads'])} where no other number is given; {libraries}; "
        f"commit {stored['commit']}. Command: `python benchmarks/claims.py`."
    )
    text = [*lines, "", about, "", one_core(stored["mobilenet"]), "", "### PyTorch, Swin-Free's latency table", ""]
    text += ["Published: RTX 3080, whole milliseconds, Swin-B 14.3. Here: the models as created, batch 1, float32.", ""]
    text += [*table_of_milliseconds(stored["milliseconds"]), "", "### Sizes", ""]
    rows = json.loads((MODELS / "table.json").read_text(encoding="utf-8"))
    return "\n".join([*text, *sizes(rows), "", where]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="NAME")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the table of what is stored")
    args = parser.parse_args()
    out = RESULTS / "claims.json"
    stored: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    with threads_of(args.threads or torch.get_num_threads()):
        for name in [] if args.tables else args.only:
            print(f"== {name}", flush=True)
            stored[name] = MEASURED[name]()
            stored |= {"machine": machine(torch.device("cpu")), "versions": versions(), "commit": commit()}
            atomic_write(out, (json.dumps(stored, indent=1) + "\n").encode())
    if missing := MEASURED.keys() - stored.keys():
        sys.exit(f"measure first: --only {' '.join(sorted(missing))}")
    atomic_write(RESULTS / "claims.md", markdown(stored).encode())
    print((RESULTS / "claims.md").read_text())


if __name__ == "__main__":
    main()
