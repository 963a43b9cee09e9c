"""Latency of Swin and Swin-Free against the libraries that people use, with the same weights.

    python benchmarks/peers.py                       # the table of the README
    python benchmarks/peers.py --models swin_t --batch 8 --seconds 5

Each peer is built with random weights, norms and bias tables among them, and its own state dict is loaded into
Muntin's model. Outputs are compared before anything is timed; then all take turns (muntin.measure.bench). Peers
run with fused attention where they have it. Results go to benchmarks/results/ as JSON and as a Markdown table.

Swin-Free is in none of these libraries: its peers are put together from a library's own blocks, one window per
stage and no shift, which the blocks' own constructors take.
"""

import argparse
import copy
import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import muntin
from muntin.measure import BenchReport, bench
from muntin.measure.bench import rounded, transformers_swin
from muntin.run import atomic_write

MODELS = ("swin_t", "swin_s", "swin_b", "swin_free_t", "swin_free_b")
RESULTS = Path(__file__).parent / "results"
BOUND = 1e-4  # largest difference of outputs, in standard deviations
SIZE = 224


def _free(config: Any) -> bool:
    return not any(config.per_stage("shift"))


def timm_peer(config: Any, fused: bool, classes: int = 1000) -> nn.Module:
    """timm's Swin; its fused attention is behind an experimental switch."""
    from timm import layers
    from timm.layers import config as switches
    from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

    before = switches._USE_FUSED_ATTN
    layers.set_fused_attn(fused, experimental=fused)
    try:
        model = SwinTransformer(
            img_size=SIZE,
            embed_dim=config.dim,
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.per_stage("window")[0],
            num_classes=classes,
            drop_path_rate=0.0,
        )
        if _free(config):
            stages: Any = model.layers
            for s, stage in enumerate(stages):
                stage.blocks = nn.Sequential(
                    *(
                        SwinTransformerBlock(
                            config.dim * 2**s,
                            stage.output_resolution,
                            config.heads[s],
                            window_size=config.per_stage("window")[s],
                            shift_size=0,
                        )
                        for _ in stage.blocks
                    )
                )
    finally:
        switches._USE_FUSED_ATTN = before
    return model


def torchvision_peer(config: Any, classes: int = 1000) -> nn.Module:
    """torchvision's Swin; it has no fused attention."""
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock

    window = config.per_stage("window")
    model = SwinTransformer(
        [config.patch, config.patch],
        config.dim,
        list(config.depths),
        list(config.heads),
        [window[0], window[0]],
        stochastic_depth_prob=0.0,
        num_classes=classes,
    )
    if _free(config):
        for s, heads in enumerate(config.heads):
            model.features[2 * s + 1] = nn.Sequential(
                *(
                    SwinTransformerBlock(config.dim * 2**s, heads, [window[s], window[s]], [0, 0])
                    for _ in range(config.depths[s])
                )
            )
    return model


def transformers_peer(name: str, config: Any, classes: int = 1000) -> nn.Module:
    """transformers' Swin with scaled_dot_product_attention."""
    from transformers.models.swin.modeling_swin import SwinLayer

    wrapped = transformers_swin(name.replace("_free", ""), (SIZE, SIZE), classes)
    if _free(config):
        for s, stage in enumerate(wrapped.model.swin.encoder.layers):
            own = copy.deepcopy(stage.config)
            own.window_size = config.per_stage("window")[s]
            own._attn_implementation = "sdpa"
            resolution = stage.blocks[0].input_resolution
            stage.blocks = nn.ModuleList(
                SwinLayer(own, config.dim * 2**s, resolution, config.heads[s], shift_size=0) for _ in stage.blocks
            )
    return wrapped


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights under which a missing or transposed part shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif "table" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return model.eval()


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().std()).item()


def build(name: str, seed: int = 0) -> tuple[list[tuple[str, nn.Module]], dict[str, float]]:
    """Muntin's model, its optimised copy and the peers, all with timm's random weights, and how far each one's
    outputs are from Muntin's in standard deviations.

    Raises SystemExit where a peer computes something else.
    """
    ours = muntin.create_model(name).eval()
    config = ours.backbone.config
    first = randomise(timm_peer(config, fused=False), seed)
    muntin.load_checkpoint(ours, first.state_dict())
    peers = {
        "muntin": ours,
        "muntin.optimize": muntin.optimize(ours),
        "timm": first,
        "timm (SDPA)": timm_peer(config, fused=True),
        "torchvision": torchvision_peer(config),
        "transformers (SDPA)": transformers_peer(name, config),
    }
    for label in ("timm (SDPA)", "torchvision", "transformers (SDPA)"):
        share(ours, peers[label])
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        wanted = ours(images)
        errors = {label: _difference(peer.eval()(images), wanted) for label, peer in peers.items()}
    for label, error in errors.items():
        if not error <= BOUND:
            sys.exit(f"{name}: {label} differs by {error:.1e} standard deviations; nothing was timed")
    return list(peers.items()), errors


def share(ours: nn.Module, peer: nn.Module) -> None:
    """Our weights into a peer, by the way back that loading the peer into ours shows.

    Every number of the peer gets a tag, and the tags are loaded into a copy of ours: what stands there now says
    where each of our numbers belongs, whatever the names, the order and the parts that a matrix is split into.
    """
    network = getattr(peer, "model", peer)
    tags, count = {}, 0
    for name, p in network.named_parameters():
        tags[name] = torch.arange(count, count + p.numel(), dtype=torch.float64).view_as(p)
        count += p.numel()
    tagged = copy.deepcopy(ours).double()
    muntin.load_checkpoint(tagged, tags)
    values = torch.full((count,), float("nan"))
    with torch.no_grad():
        for own, tag in zip(ours.parameters(), tagged.parameters(), strict=True):
            values[tag.flatten().long()] = own.flatten()
        if values.isnan().any():
            sys.exit(f"{type(network).__name__} has weights that Muntin's model has not; nothing was timed")
        for name, p in network.named_parameters():
            p.copy_(values[tags[name].flatten().long()].view_as(p))


def markdown(reports: dict[str, BenchReport], errors: dict[str, dict[str, float]]) -> str:
    """One table per batch size: milliseconds, and how much faster Muntin is than each peer."""
    lines = []
    some = next(iter(reports.values()))
    for batch in sorted({row.batch for row in some.rows}):
        labels = [row.target for row in some.rows if row.batch == batch]
        lines += [f"Batch {batch}, {SIZE} pixels, {some.protocol['dtype']}, ms (median ± 95%)", ""]
        lines += [
            "| model | " + " | ".join(labels) + " | best peer over ours | over optimize |",
            "| --- |" + " ---: |" * (len(labels) + 2),
        ]
        for name, report in reports.items():
            rows = {row.target: row for row in report.rows if row.batch == batch}
            cells = []
            for label in labels:
                half = (rows[label].interval_ms[1] - rows[label].interval_ms[0]) / 2
                cells.append(f"{rounded(rows[label].median_ms, half)} ± {rounded(half, half)}")
            best = max(
                (row for label, row in rows.items() if not label.startswith("muntin")), key=lambda row: row.speed
            )
            low, high = (1 / value for value in reversed(best.speed_interval))
            eager = f"{rounded(1 / best.speed, (high - low) / 2)}x ({best.target})"
            fast = rows["muntin.optimize"].speed
            optimized = f"{rounded(fast / best.speed, fast * (high - low) / 2)}x"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {eager} | {optimized} |")
        lines.append("")
    m, p, v = some.machine, some.protocol, some.versions
    worst = max(error for by_peer in errors.values() for error in by_peer.values())
    lines.append(
        f"{m.get('gpu') or m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}), {p['threads']} threads, "
        f"{p['rounds']} interleaved rounds; torch {v['torch']}, timm {v['timm']}, torchvision {v['torchvision']}, "
        f"transformers {v['transformers']}; same weights, outputs equal to {worst:.0e} "
        f"standard deviations; commit {some.commit}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed per model and batch size")
    parser.add_argument("--out", default=str(RESULTS / "peers.json"))
    args = parser.parse_args()
    reports, errors = {}, {}
    for name in args.models:
        targets, errors[name] = build(name)
        print(f"{name}: outputs equal to {max(errors[name].values()):.1e} standard deviations", flush=True)
        reports[name] = bench(
            targets,
            args.batch,
            SIZE,
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
            rounds=args.rounds,
            seconds=args.seconds,
        )
        print(reports[name].table(), "\n", flush=True)
        del targets
        gc.collect()
    content = {"errors": errors, "reports": {name: asdict(report) for name, report in reports.items()}}
    out = Path(args.out)
    atomic_write(out, (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(reports, errors).encode())
    print(markdown(reports, errors))
    print(f"written: {os.fspath(out)} and {out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
