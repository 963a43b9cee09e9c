"""Where the time of each family goes, beside its peer's: the figures and the picture of docs/profile.md.

    python benchmarks/profiles.py                    # all, under ten minutes on two quiet cores
    python benchmarks/profiles.py --models efficientvit_m5 --engines eager,onnx     # into what is there
    python benchmarks/profiles.py --tables           # profile nothing; write tables and picture of what is stored
    python benchmarks/profiles.py --example          # only swin_t in eager mode, into docs/profile.md

Peers: timm's swin_base, timm's EfficientViT with its BatchNorms folded in channels-last memory, the authors' form of
RMT (benchmarks/rmt_authors.py), and DeiT-S, whose memory-bound share EfficientViT's figure 2 shows beside Swin's.
Peers run with fused attention where they have it; "optimize" is for Muntin's own models alone. At batch 1 every engine
runs, at batch 8 eager. Compiled code serves any size for Muntin's models, and one size for peers. Results go to
benchmarks/results/profiles.json and .md, the picture to docs/profiles.png.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rmt_authors import authors_form
from torch import nn

import muntin
from muntin.errors import UserError
from muntin.measure.kinds import KINDS, UNATTRIBUTED
from muntin.measure.machine import threads_in_words
from muntin.measure.peers import ChannelsLast, timm_model
from muntin.measure.profile import ENGINES, Operator, Profile, profile
from muntin.measure.profile_page import picture
from muntin.measure.profiles import content, profiles, words
from muntin.measure.roofline import Bounds, Peaks
from muntin.measure.timing import threads_of
from muntin.run import atomic_write

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results", HERE.parent / "docs" / "profiles.png"
SIZE = 224


def _timm(name: str) -> nn.Module:
    return timm_model(name, (SIZE, SIZE))


def _folded(name: str) -> nn.Module:
    from timm.utils import reparameterize_model

    return ChannelsLast(reparameterize_model(_timm(name).eval()))


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "swin_b": ("timm swin_base", lambda: _timm("swin_base_patch4_window7_224")),
    "swin_free_b": ("", lambda: nn.Identity()),
    "efficientvit_m5": ("timm efficientvit_m5 (BN folded, channels last)", lambda: _folded("efficientvit_m5")),
    "rmt_s": ("rmt_s, authors' form", lambda: authors_form(muntin.create_model("rmt_s"))),
    "deit_small": ("timm deit_small", lambda: _timm("deit_small_patch16_224")),
}
"""Ours, and its peer. Swin-Free's peer is Swin; DeiT is a peer alone."""


Planned = tuple[str, Callable[[], nn.Module], list[tuple[str, int]]]


def plan(models: list[str], engines: list[str]) -> list[Planned]:
    """Label, what builds it, and the engines and batch sizes that it is profiled in."""
    found: list[Planned] = []
    for name in models:
        peer, build = MODELS[name]
        runs = [(engine, 1) for engine in engines] + ([("eager", 8)] if "eager" in engines else [])
        if name in muntin.list_models():
            found.append((name, lambda name=name: muntin.create_model(name), runs))  # type: ignore[misc]
        if peer:
            found.append((peer, build, [run for run in runs if run[0] != "optimize"]))
    return found


def measure(models: list[str], engines: list[str], calls: int, size: int) -> list[Profile]:
    found, begin = [], time.perf_counter()
    for label, build, runs in plan(models, engines):
        torch.manual_seed(0)
        model = build().eval().requires_grad_(False)
        for engine, batch in runs:
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            try:
                one = profile(model, x, engine=engine, name=label, calls=calls)
            except UserError as error:  # an engine that does not express a peer: said, and left out
                print(f"{label}, {engine}: not run: {error}", flush=True)
                continue
            found.append(one)
            seconds = time.perf_counter() - begin
            print(f"[{seconds:4.0f} s] {one.label}: {one.wall_ms:.1f} ms, {one.kinds[UNATTRIBUTED]:.1f} unattributed",
                  flush=True)  # fmt: skip
        del model
        gc.collect()
    return found


def markdown(found: list[Profile], where: str) -> str:
    """Shares by kind, then bounds, one line for each profile."""
    kinds = [kind for kind in KINDS if any(p.share(kind) >= 0.0005 for p in found)]
    lines = ["| model, engine | ms | " + " | ".join(kinds) + " | memory-bound (figure 2) |"]
    lines.append("| --- |" + " ---: |" * (len(kinds) + 2))
    for p in found:
        shares = " | ".join(f"{p.share(kind):.1%}" if p.kinds[kind] else "" for kind in kinds)
        lines.append(f"| {p.label} | {p.wall_ms:.1f} | {shares} | {p.memory_bound / p.wall_ms:.1%} |")
    head = (
        "ms without the profiler | computing | memory | overhead in operations | outside | floor, ms | times the floor"
    )
    lines += ["", f"| model, engine | {head} |", "| --- |" + " ---: |" * 7]
    for p in found:
        b = p.bounds
        assert b is not None  # measured with the roofline
        shares = " | ".join(f"{ms / p.wall_ms:.1%}" for ms in (b.compute, b.memory, b.overhead, b.outside))
        lines.append(f"| {p.label} | {p.plain_ms:.1f} | {shares} | {b.floor_ms:.2f} | {p.distance:.2f} |")
    k = found[0].peaks
    assert k is not None
    lines += [
        "",
        f"{where}; {threads_in_words(k.threads)}, {k.precision}; peaks measured in the same run: "
        f"{k.gflops:.0f} GFLOP/s, {k.gbps:.1f} GB/s from memory, ridge {k.ridge:.1f} FLOP/byte. "
        "Command: `python benchmarks/profiles.py`.",
    ]
    return "\n".join(lines) + "\n"


def stored(told: dict[str, Any]) -> Profile:
    """What `Profile.plain` made of a profile, as a profile."""
    known = {field.name for field in fields(Profile)}
    kept = {key: value for key, value in told.items() if key in known}
    peaks, limits = dict(told["peaks"]), dict(told["bounds"])
    del peaks["ridge"]
    kept |= {"peaks": Peaks(**peaks), "bounds": Bounds(**limits)}
    return Profile(**kept | {"operators": [Operator(**operator) for operator in told["operators"]]})


def write(told: dict[str, Any], out: Path, plot: Path) -> None:
    found = [stored(one) for one in told["profiles"]]
    m, v = told["machine"], told["versions"]
    versions = ", ".join(f"{name} {v[name]}" for name in ("torch", "timm", "onnxruntime") if name in v)
    where = f"{m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}); {versions}; commit {told['commit']}"
    atomic_write(out / "profiles.md", markdown(found, where).encode())
    at_one = [p for p in found if p.shape[0] == 1 and p.engine in ("eager", "onnx")]
    atomic_write(plot, picture(at_one or found))


def example(threads: int | None, calls: int, docs: Path) -> None:
    """The output of `muntin profile swin_t` into the page that explains it, in place of the last one."""
    found = profiles(["swin_t"], threads=threads, calls=calls)[0]
    before, mark, rest = docs.read_text().partition("## swin_t, eager\n")
    head, fence, after = rest.partition("```\n")
    if not (mark and fence):
        sys.exit(f"{docs} has no place for the example")
    _, fence, after = after.partition("```\n")
    told = re.sub(r"--threads \d+", f"--threads {found.threads}", head)
    text = f"{before}{mark}{told}```\n{found.table()}\n```\n{after}"
    atomic_write(docs, text.encode())


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is stored with what has been profiled anew in its place, and both commits."""

    def key(entry: dict[str, Any]) -> tuple[str, str, int]:
        return entry["name"], entry["engine"], entry["shape"][0]

    fresh = {key(entry): entry for entry in new["profiles"]}
    kept = [fresh.pop(key(entry), entry) for entry in old["profiles"]]
    commits = dict.fromkeys([*str(old["commit"]).split(", "), str(new["commit"])] if kept else [str(new["commit"])])
    return new | {"profiles": [*kept, *fresh.values()], "commit": ", ".join(commits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help=", ".join(ENGINES))
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", default=str(RESULTS), help="folder for profiles.json and .md")
    parser.add_argument("--plot", default=str(PICTURE))
    parser.add_argument("--tables", action="store_true", help="profile nothing; write the tables of what is in --out")
    parser.add_argument("--example", action="store_true", help="only write the example of docs/profile.md")
    args = parser.parse_args()
    out = Path(args.out)
    if args.example:
        example(args.threads, args.calls, HERE.parent / "docs" / "profile.md")
        return
    if args.tables:
        write(json.loads((out / "profiles.json").read_text()), out, Path(args.plot))
        return
    with threads_of(args.threads or torch.get_num_threads()):
        found = measure(args.models, words(args.engines), args.calls, args.size)
    if not found:
        sys.exit("nothing could be profiled")
    path, told = out / "profiles.json", content(found)
    if path.exists():
        told = merged(json.loads(path.read_text()), told)
    atomic_write(path, (json.dumps(told, separators=(",", ":")) + "\n").encode())
    write(told, out, Path(args.plot))
    print((out / "profiles.md").read_text())


if __name__ == "__main__":
    main()
