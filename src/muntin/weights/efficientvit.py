"""Names of EfficientViT weights: the authors' classification and detection code, which share them, and timm's.

The authors number what stands between two stages before its blocks: 0 a unit, 1 the subsampling, 2 a unit.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from muntin.weights.rules import Rule


def _turned(table: Tensor) -> Tensor:
    """A bias table (heads, offsets) <-> (offsets, heads)."""
    return table.t()


def _flat(tensor: Tensor) -> Tensor:
    """The weight of a 1x1 convolution -> that of a linear layer; a bias stays."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def _unflat(tensor: Tensor) -> Tensor:
    """The weight of a linear layer -> that of a 1x1 convolution; a bias stays."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _conv(ours: str, authors: str, timm: str) -> list[Rule]:
    """The rules of a convolution with its norm."""
    return [
        Rule(f"{ours}.conv.*", {"timm": f"{timm}.conv.*", "authors": f"{authors}.c.*"}),
        Rule(f"{ours}.norm.*", {"timm": f"{timm}.bn.*", "authors": f"{authors}.bn.*"}),
    ]


def _unit(ours: str, authors: tuple[str, str], timm: tuple[str, str]) -> list[Rule]:
    """The rules of a token interaction and of a feed-forward layer."""
    return [
        *_conv(f"{ours}.interaction.branch", f"{authors[0]}.m", f"{timm[0]}.m"),
        *_conv(f"{ours}.ffn.branch.expand", f"{authors[1]}.m.pw1", f"{timm[1]}.m.pw1"),
        *_conv(f"{ours}.ffn.branch.project", f"{authors[1]}.m.pw2", f"{timm[1]}.m.pw2"),
    ]


def _block(ours: str, authors: str) -> list[Rule]:
    """The rules of a block; timm has our numbers and the authors' names."""
    timm, mixer = ours, "mixer.m.attn"
    return [
        *_unit(f"{ours}.before.0", (f"{authors}.dw0", f"{authors}.ffn0"), (f"{timm}.dw0", f"{timm}.ffn0")),
        *_conv(f"{ours}.attention.qkvs.{{i}}", f"{authors}.{mixer}.qkvs.{{i}}", f"{timm}.{mixer}.qkvs.{{i}}"),
        *_conv(f"{ours}.attention.dws.{{i}}", f"{authors}.{mixer}.dws.{{i}}", f"{timm}.{mixer}.dws.{{i}}"),
        *_conv(f"{ours}.attention.proj.branch.1", f"{authors}.{mixer}.proj.1", f"{timm}.{mixer}.proj.1"),
        Rule(
            f"{ours}.attention.bias_table",
            {"timm": f"{timm}.{mixer}.attention_biases", "authors": f"{authors}.{mixer}.attention_biases"},
            _turned,
            _turned,
        ),
        *_unit(f"{ours}.after.0", (f"{authors}.dw1", f"{authors}.ffn1"), (f"{timm}.dw1", f"{timm}.ffn1")),
    ]


_OURS, _AUTHORS, _TIMM = "stages.{m}.subsample", "blocks{m+1}", "stages.{m}.downsample"


def _side(ours: str, authors: str, timm: str) -> list[Rule]:
    """The rules of a unit before or after the subsampling."""
    theirs, timms = f"{_AUTHORS}.{authors}", f"{_TIMM}.{timm}"
    return _unit(f"{_OURS}.{ours}", (f"{theirs}.0", f"{theirs}.1"), (f"{timms}.0", f"{timms}.1"))


def _own(ours: str) -> list[Rule]:
    """The rules of a convolution with its norm that nobody else has."""
    return [Rule(f"{ours}.conv.*", {}), Rule(f"{ours}.norm.*", {})]


def _more(ours: str) -> list[Rule]:
    """The rules of a further unit of a block."""
    parts = ("interaction.branch", "ffn.branch.expand", "ffn.branch.project")
    return [rule for part in parts for rule in _own(f"{ours}.{part}")]


RULES = [
    *_conv("stem.{2i}", "patch_embed.{2i}", "patch_embed.conv{i+1}"),
    *_block("stages.0.blocks.{b}", "blocks1.{b}"),
    *_block("stages.{m}.blocks.{b}", "blocks{m+1}.{b+3}"),
    *_side("before", "0", "res1"),
    *_conv(f"{_OURS}.reduce.expand", f"{_AUTHORS}.1.conv1", f"{_TIMM}.patchmerge.conv1"),
    *_conv(f"{_OURS}.reduce.conv", f"{_AUTHORS}.1.conv2", f"{_TIMM}.patchmerge.conv2"),
    Rule(
        f"{_OURS}.reduce.gate.reduce.*",
        {"timm": f"{_TIMM}.patchmerge.se.fc1.*", "authors": f"{_AUTHORS}.1.se.fc1.*"},
        _flat,
        _unflat,
    ),
    Rule(
        f"{_OURS}.reduce.gate.expand.*",
        {"timm": f"{_TIMM}.patchmerge.se.fc2.*", "authors": f"{_AUTHORS}.1.se.fc2.*"},
        _flat,
        _unflat,
    ),
    *_conv(f"{_OURS}.reduce.project", f"{_AUTHORS}.1.conv3", f"{_TIMM}.patchmerge.conv3"),
    *_side("after", "2", "res2"),
    Rule("norms.{s}.*", {}),
    # the paper's studies, of which nothing is published
    *_own("stages.{s}.blocks.{b}.attention.qkv"),
    *(rule for side in ("before", "after") for rule in _more(f"stages.{{s}}.blocks.{{b}}.{side}.{{n}}")),
    Rule("head.norm.*", {"timm": "head.bn.*", "authors": "head.bn.*"}),
    Rule("head.fc.*", {"timm": "head.linear.*", "authors": "head.l.*"}),
    Rule("head.norm_distilled.*", {"authors": "head_dist.bn.*"}),
    Rule("head.fc_distilled.*", {"authors": "head_dist.l.*"}),
]


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of weights under our names show of their configuration: `dims`, `depths`, `heads`."""
    blocks: dict[int, int] = {}
    dims: dict[int, int] = {}
    heads: dict[int, int] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.attention\.(.+)", name)
        if match is None:
            continue
        stage, block = int(match[1]), int(match[2])
        blocks[stage] = max(blocks.get(stage, 0), block + 1)
        if match[3] == "proj.branch.1.conv.weight":
            dims[stage] = tensor.shape[0]
        elif match[3] == "bias_table":
            heads[stage] = tensor.shape[-1]
    shown: dict[str, Any] = {}
    for field, found in (("dims", dims), ("depths", blocks), ("heads", heads)):
        shown[field] = tuple(found[stage] for stage in sorted(found))
    if any(name.startswith("head.fc_distilled.") for name in weights):
        shown["distilled"] = True
    return shown
