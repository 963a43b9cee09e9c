"""Latency of each family against the libraries that people use, with the same weights.

    python benchmarks/peers.py                       # the tables of docs/speed.md
    python benchmarks/peers.py --models efficientvit_m5 --batch 8 --seconds 5

Each peer is built with random weights, norms and bias tables among them, and its own state dict is loaded into
Muntin's model. Outputs are compared before anything is timed; then all take turns (muntin.measure.bench). Peers
run with fused attention where they have it. Results go to benchmarks/results/peers_FAMILY.json and .md.

Swin-Free is in none of these libraries: its peers are put together from a library's own blocks, one window per
stage and no shift, which the blocks' own constructors take. RMT is in none either: its peer is the authors' form of
the computation (benchmarks/rmt_authors.py). EfficientViT is timm's, also with its BatchNorms folded by timm itself.
"""

import argparse
import copy
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rmt_authors import authors_form
from torch import Tensor, nn

import muntin
from muntin.measure import BenchReport, bench
from muntin.measure.bench import LogitsOnly, Row, transformers_swin
from muntin.measure.statistics import rounded
from muntin.run import atomic_write
from muntin.runtime import fold
from muntin.weights import convert

MODELS = {
    "swin": ("swin_t", "swin_b", "swin_free_t", "swin_free_b"),
    "swinv2": ("swinv2_t",),
    "efficientvit": ("efficientvit_m0", "efficientvit_m5"),
    "rmt": ("rmt_t", "rmt_s"),
}
RESULTS = Path(__file__).parent / "results"
BOUND = 1e-4  # largest difference of outputs, in standard deviations
SIZE = 224
SIZES = {"swinv2": 256}  # pixels, of the other families 224
Peers = dict[str, nn.Module]


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


def peer_of_timm(name: str) -> nn.Module:
    """timm's Swin in the shape of our variant."""
    with torch.device("meta"):
        config = muntin.create_model(name).config
    return timm_peer(config, fused=False)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights under which a missing or transposed part shows; running statistics near those of an image, since with
    random ones a deep model amplifies rounding.
    """
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
        norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.9
        if norms:
            model.train()(torch.randn(4, 3, SIZE, SIZE, generator=generator))
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    return model.eval()


def difference(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().std()).item()


def swin_peers(name: str, seed: int) -> Peers:
    """Muntin's model first, then its copies and the peers, all with timm's random weights."""
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
    return peers


def swinv2_peers(name: str, seed: int) -> Peers:
    """The libraries' SwinV2; none of them has fused attention for it."""
    import timm
    import transformers
    from torchvision import models

    ours = muntin.create_model(name).eval()
    c = ours.config
    first = randomise(timm.create_model(f"swinv2_{WORDS[name[-1]]}_window8_256", img_size=SIZES["swinv2"]), seed)
    muntin.load_checkpoint(ours, first.state_dict())
    shape = {"image_size": SIZES["swinv2"], "embed_dim": c.dim, "depths": list(c.depths), "num_heads": list(c.heads)}
    config: Any = transformers.Swinv2Config(window_size=8, **shape)
    config.num_labels = 1000
    peers = {
        "muntin": ours,
        "muntin.optimize": muntin.optimize(ours),
        "timm": first,
        "torchvision": models.get_model(f"swin_v2_{name[-1]}", weights=None),
        "transformers": LogitsOnly(transformers.Swinv2ForImageClassification(config)),
    }
    # torchvision has a bias of the keys, which its forward sets to zero: `share` would not know what belongs there
    peers["torchvision"].load_state_dict(convert(ours.state_dict(), "torchvision"), strict=False)
    share(ours, peers["transformers"])
    return peers


WORDS = {"t": "tiny", "s": "small", "b": "base"}


def efficientvit_peers(name: str, seed: int) -> Peers:
    """timm's EfficientViT as it is created, with its BatchNorms folded by timm, and that in channels-last memory."""
    import timm
    from timm.utils import reparameterize_model

    ours = muntin.create_model(name).eval()
    first = randomise(timm.create_model(name), seed)
    muntin.load_checkpoint(ours, first.state_dict())
    folded = reparameterize_model(first)
    return {
        "muntin": ours,
        "muntin (BN folded)": fold(ours),
        "muntin.optimize": muntin.optimize(ours),
        "timm": first,
        "timm (BN folded)": folded,
        "timm (BN folded, channels last)": ChannelsLast(copy.deepcopy(folded)),
    }


class ChannelsLast(nn.Module):
    """A model in channels-last memory, its image too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))


def rmt_peers(name: str, seed: int) -> Peers:
    """The authors' form of the computation; no library has RMT."""
    ours = randomise(muntin.create_model(name), seed)
    return {
        "muntin": ours,
        "muntin (BN folded)": fold(ours),
        "muntin.optimize": muntin.optimize(ours),
        "authors' form": authors_form(ours),
    }


FAMILIES: dict[str, Callable[[str, int], Peers]] = {
    "swin": swin_peers,
    "swinv2": swinv2_peers,
    "efficientvit": efficientvit_peers,
    "rmt": rmt_peers,
}


def build(family: str, name: str, seed: int = 0) -> tuple[list[tuple[str, nn.Module]], dict[str, float]]:
    """Muntin's model, its copies and the peers, and how far each one's outputs are from Muntin's in standard
    deviations.

    Raises SystemExit where a peer computes something else.
    """
    peers = FAMILIES[family](name, seed)
    size = SIZES.get(family, SIZE)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        wanted = peers["muntin"](images)
        errors = {label: difference(peer.eval()(images), wanted) for label, peer in peers.items()}
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


def markdown(family: str, reports: dict[str, BenchReport], errors: dict[str, dict[str, float]]) -> str:
    """One table per batch size: milliseconds, and how much faster Muntin is than the best peer, as it is created (with
    its BatchNorms folded where the peers' are) and optimised.
    """
    lines = []
    some = next(iter(reports.values()))
    for batch in sorted({row.batch for row in some.rows}):
        labels = [row.target for row in some.rows if row.batch == batch]
        lines += [f"Batch {batch}, {SIZES.get(family, SIZE)} pixels, {some.protocol['dtype']}, ms (median ± 95%)", ""]
        lines += [
            "| model | " + " | ".join(labels) + f" | best peer over {_base(labels)} | over optimize |",
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
            eager, optimized = (
                f"{rounded(rows[label].speed / best.speed, rows[label].speed * (high - low) / 2)}x"
                for label in (_base(labels), "muntin.optimize")
            )
            eager += f" ({best.target})"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {eager} | {optimized} |")
        lines.append("")
    m, p, v = some.machine, some.protocol, some.versions
    worst = max(error for by_peer in errors.values() for error in by_peer.values())
    libraries = ", ".join(f"{name} {v[name]}" for name in ("torch", "timm", "torchvision", "transformers"))
    lines.append(
        f"{m.get('gpu') or m['cpu']}, {m['cores']} cores ({', '.join(m['flags'])}), {p['threads']} threads, "
        f"{p['rounds']} interleaved rounds; {libraries}; same weights, outputs equal to {worst:.0e} "
        f"standard deviations; commit {some.commit}."
    )
    return "\n".join(lines) + "\n"


def _base(labels: list[str]) -> str:
    folded = any("BN folded" in label for label in labels if not label.startswith("muntin"))
    return "muntin (BN folded)" if folded else "muntin"


def main() -> None:
    every = [name for names in MODELS.values() for name in names]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed per model and batch size")
    parser.add_argument("--out", default=str(RESULTS), help="folder for peers_FAMILY.json and .md")
    parser.add_argument("--tables", action="store_true", help="time nothing; write the .md of what is in --out")
    args = parser.parse_args()
    if args.tables:
        for path in sorted(Path(args.out).glob("peers_*.json")):
            content = json.loads(path.read_text())
            stored = {name: read_report(report) for name, report in content["reports"].items()}
            text = markdown(path.stem.removeprefix("peers_"), stored, content["errors"])
            atomic_write(path.with_suffix(".md"), text.encode())
        return
    for family, names in MODELS.items():
        chosen = [name for name in names if name in args.models]
        if chosen:
            _run(family, chosen, args)


def read_report(content: dict[str, Any]) -> BenchReport:
    """What `asdict` made of a report, as a report."""
    return BenchReport(**content | {"rows": [Row(**row) for row in content["rows"]]})


def _run(family: str, names: list[str], args: argparse.Namespace) -> None:
    reports, errors = {}, {}
    for name in names:
        targets, errors[name] = build(family, name)
        print(f"{name}: outputs equal to {max(errors[name].values()):.1e} standard deviations", flush=True)
        reports[name] = bench(
            targets,
            args.batch,
            SIZES.get(family, SIZE),
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
    out = Path(args.out) / f"peers_{family}.json"
    atomic_write(out, (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(family, reports, errors).encode())
    print(markdown(family, reports, errors))
    print(f"written: {os.fspath(out)} and {out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
