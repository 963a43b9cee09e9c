"""A whole Mask R-CNN on one image of 800x1280: ours with swin_t beside torchvision's own on timm's Swin-T, on the CPU.

    python benchmarks/detection.py                  # about 5 minutes
    python benchmarks/detection.py --rounds 15
    python benchmarks/detection.py --tables         # the table again from stored results

All have the same random weights, so that they compute the same function: timm's Swin-T by its features_only, a norm on
each map, torchvision's feature pyramid, proposals and heads. From the image to boxes and masks within them; reading,
resizing and pasting masks are no part of it. torchvision's takes its settings from its best form here: weights
channels-last or not, timm's fused attention or not; the fastest of them counts. Ours is measured as `create_dense`
makes it and as `muntin.optimize` does. So that neither spends its time on suppressing what chance proposes, the least
score is set to let a thousand candidates through.

Their outputs are compared at 448x672, where windows divide all maps: at other sizes timm pads after the roll and the
authors before it. Our pooling is given the torchvision's rules (two samples a cell, values at corners), torchvision our
anchors, since its own guess strides of 61 pixels where they are 64.

Contestants take turns, in shuffled rounds; ratios are medians over rounds with 95% intervals, of wall time and of the
process's CPU time, on which others on the machine have less influence. Results: detection.json and .md in
benchmarks/results/MACHINE.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import timm
import torch
from peers import RESULTS, here
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

import muntin
from muntin.heads.pyramid import Anchors
from muntin.measure.machine import commit, machine, versions
from muntin.measure.statistics import median_interval
from muntin.run import atomic_write

SIZE, COMPARED = (800, 1280), (448, 672)
CLASSES, CANDIDATES = 80, 1000
STRIDES = (4, 8, 16, 32, 64)
OURS = ("muntin", "muntin, optimised")
Call = Callable[[Tensor], Any]


class TimmPyramid(nn.Module):
    """timm's Swin-T with a norm on each map, and torchvision's pyramid."""

    body: Any

    def __init__(self, fused: bool) -> None:
        super().__init__()
        set_fused_attn(fused, experimental=fused)
        name = "swin_tiny_patch4_window7_224"
        self.body = timm.create_model(name, features_only=True, img_size=SIZE, strict_img_size=False)
        channels = self.body.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(each) for each in channels)
        self.fpn = FeaturePyramidNetwork(channels, 256, LastLevelMaxPool())
        self.out_channels = 256

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps = zip(self.norms, self.body(image), strict=True)  # of timm's Swin the channels are last
        return self.fpn({str(i): norm(x).permute(0, 3, 1, 2) for i, (norm, x) in enumerate(maps)})


def torchvisions(weights: dict[str, Tensor] | None, threshold: float, fused: bool, last: bool) -> Any:
    """torchvision's Mask R-CNN; its first weights are its own initial ones, with a classifier that chooses."""
    anchors = Anchors(STRIDES, (8.0,), (0.5, 1.0, 2.0))
    model = MaskRCNN(TimmPyramid(fused), CLASSES + 1, rpn_anchor_generator=anchors, box_score_thresh=threshold)
    if weights is None:
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    else:
        model.load_state_dict(weights)
    return model.to(memory_format=torch.channels_last if last else torch.contiguous_format).eval()


def through(model: Any) -> Call:
    """Its parts in turn, without what resizes images and pastes masks."""

    def call(image: Tensor) -> list[dict[str, Tensor]]:
        sizes = [(image.shape[2], image.shape[3])] * len(image)
        levels = model.backbone(image)
        proposals, _ = model.rpn(ImageList(image, sizes), levels)
        return model.roi_heads(levels, proposals, sizes)[0]

    return call


def ours(theirs: dict[str, Tensor], threshold: float) -> Any:
    """Our Mask R-CNN with torchvision's weights."""
    config = {"samples_per_cell": 2, "aligned": False, "score_threshold": threshold}
    model: Any = muntin.create_dense("mask_rcnn", "swin_t", CLASSES, head_config=config)
    body = {n.removeprefix("backbone.body."): t for n, t in theirs.items() if n.startswith("backbone.body.")}
    muntin.load_checkpoint(model.backbone, body)
    named = {n.removeprefix("backbone."): t for n, t in theirs.items()}
    model.neck.load_state_dict({n: t for n, t in named.items() if n.startswith("fpn.")})
    model.rpn.load_state_dict({n.removeprefix("rpn."): t for n, t in named.items() if n.startswith("rpn.")})
    norms: Any = model.backbone.norms
    norms.load_state_dict({n.removeprefix("norms."): t for n, t in named.items() if n.startswith("norms.")})
    stage: Any = model.roi.stages[0]
    layers: dict[str, nn.Module] = {
        "box_head.fc6": stage.box.fcs[0],
        "box_head.fc7": stage.box.fcs[2],
        "box_predictor.cls_score": stage.box.classes,
        "box_predictor.bbox_pred": stage.box.boxes,
        **{f"mask_head.{i}.0": stage.mask.convs[i][0] for i in range(4)},
        "mask_predictor.conv5_mask": stage.mask.enlarge,
        "mask_predictor.mask_fcn_logits": stage.mask.classes,
    }
    for name, layer in layers.items():
        values = {end: named[f"roi_heads.{name}.{end}"] for end in ("weight", "bias")}
        if name.endswith("cls_score"):  # their background is first, ours last, and neither has boxes or masks
            values = {end: tensor.roll(-1, 0) for end, tensor in values.items()}
        elif name.endswith(("bbox_pred", "mask_fcn_logits")):
            values = {end: tensor[len(tensor) // (CLASSES + 1) :] for end, tensor in values.items()}
        layer.load_state_dict(values)
    return model.eval()


def least_score(model: Any, image: Tensor) -> float:
    """The score that lets so many candidates through."""
    seen: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.inference_mode():
        through(model)(image)
    hook.remove()
    scores = seen[0].softmax(1)[:, 1:].flatten()
    return scores.topk(CANDIDATES + 1).values[-1].item()


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """The largest differences of two outputs: boxes in pixels, scores and masks in 0 to 1."""
    theirs = wanted | {"masks": wanted["masks"][:, 0], "labels": wanted["labels"] - 1}
    if len(found["boxes"]) != len(theirs["boxes"]) or not torch.equal(found["labels"], theirs["labels"]):
        return {"of another number or class": float(len(found["boxes"]) - len(theirs["boxes"]))}
    return {key: (found[key] - theirs[key]).abs().max().item() for key in ("boxes", "scores", "masks")}


def timed(call: Call, image: Tensor) -> tuple[float, float]:
    """Seconds by the wall's clock and of the process."""
    wall, own = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        call(image)
    return time.perf_counter() - wall, time.process_time() - own


def contest(rounds: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    image, small = torch.randn(1, 3, *SIZE), torch.randn(1, 3, *COMPARED)
    first = torchvisions(None, 0.0, False, False)
    weights = first.state_dict()
    threshold = least_score(first, image)
    mine = ours(weights, threshold)
    fast = muntin.optimize(mine)
    forms = {
        f"torchvision, {'channels-last' if last else 'contiguous'}{', fused attention' if fused else ''}": (fused, last)
        for fused in (False, True)
        for last in (False, True)
    }
    calls: dict[str, Call] = {name: through(torchvisions(weights, threshold, *form)) for name, form in forms.items()}
    with torch.inference_mode():
        wanted = calls["torchvision, contiguous"](small)[0]
        equal: dict[str, Any] = {"found": len(wanted["boxes"])}
        equal |= {name: difference(model(small)[0], wanted) for name, model in zip(OURS, (mine, fast), strict=True)}
    for call in calls.values():  # a call each to warm up
        timed(call, image)
    tried = {name: min(timed(call, image)[0] for _ in range(2)) for name, call in calls.items()}
    best = min(tried, key=lambda name: tried[name])
    chosen: dict[str, Call] = {best: calls[best], "muntin": mine, "muntin, optimised": fast}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for call in chosen.values():
        timed(call, image)
    for number in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        names = list(chosen)
        random.Random(number).shuffle(names)
        for name in names:
            times[name].append(timed(chosen[name], image))
    return {"size": SIZE, "rounds": rounds, "peer": best, "tried_s": tried, "times_s": times, "differences": equal}


def ratio(results: dict[str, Any], name: str, clock: int) -> str:
    pairs = zip(results["times_s"][results["peer"]], results["times_s"][name], strict=True)
    ratios = [theirs[clock] / mine[clock] for theirs, mine in pairs]
    low, high = median_interval(ratios)
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"


def markdown(results: dict[str, Any]) -> str:
    where, peer = results["machine"], results["peer"]
    lines = [
        f"Mask R-CNN, Swin-T, one image of {SIZE[0]}x{SIZE[1]}, float32, {results['threads']} threads, "
        f"{results['rounds']} rounds; {where['cpu']}, load {where['load_before']} before.",
        "",
        "| | wall, s | CPU, s | times faster, wall | times faster, CPU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in (peer, *OURS):
        wall, own = (median(t[clock] for t in results["times_s"][name]) for clock in (0, 1))
        cells = ["1", "1"] if name == peer else [ratio(results, name, 0), ratio(results, name, 1)]
        lines.append(f"| {name} | {wall:.2f} | {own:.2f} | " + " | ".join(cells) + " |")
    told = {name: ", ".join(f"{k} {v:.1g}" for k, v in results["differences"][name].items()) for name in OURS}
    found = results["differences"]["found"]
    lines += ["", f"Largest differences from torchvision at {COMPARED[0]}x{COMPARED[1]} over {found} detections: "]
    lines[-1] += "; ".join(f"{name}: {text}" for name, text in told.items()) + "."
    return "\n".join([*lines, "", f"Commit {results['commit'][:12]}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="only write the tables of all machines")
    args = parser.parse_args()
    if args.tables:
        for path in sorted(RESULTS.glob("*/detection.json")):
            atomic_write(path.with_suffix(".md"), markdown(json.loads(path.read_text())).encode())
        return 0
    torch.set_num_threads(os.cpu_count() or 1)
    described = {"machine": machine(torch.device("cpu")), "versions": versions(), "commit": commit()}
    results = contest(args.rounds, args.seed) | described | {"threads": torch.get_num_threads()}
    out = here() / "detection.json"
    out.parent.mkdir(exist_ok=True)
    atomic_write(out, (json.dumps(results, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(results).encode())
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
