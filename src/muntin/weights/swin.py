"""Names of Swin and Swin-Free weights in every dialect that exists.

One rule per kind of weight (see `rules` for the notation). Merging stands at the start of a stage here and in
timm since 0.9, at the end of the stage before elsewhere. Before 0.9 timm had the authors' names. transformers
published its files under names of its own and renamed its modules later: the published ones are written.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from muntin.weights.rules import Rule

# nn.Unfold lists a 2x2 patch as (channel, row, column); the authors list the four pixels in the order (0,0), (1,0),
# (0,1), (1,1) of (row, column), and the channels within each. The order of the pixels is its own inverse.
_PIXELS = [0, 2, 1, 3]


def from_unfold(tensor: Tensor) -> Tensor:
    """(..., 4C) in the order of nn.Unfold -> the authors' order."""
    by_channel = tensor.unflatten(-1, (-1, 4))[..., _PIXELS]  # (..., C, 4)
    return by_channel.transpose(-1, -2).flatten(-2)


def to_unfold(tensor: Tensor) -> Tensor:
    """(..., 4C) in the authors' order -> the order of nn.Unfold."""
    by_pixel = tensor.unflatten(-1, (4, -1))[..., _PIXELS, :]  # (..., 4, C)
    return by_pixel.transpose(-1, -2).flatten(-2)


_OURS = "stages.{s}.blocks.{b}."
_AUTHORS = "layers.{s}.blocks.{b}."
_VISION = "features.{2s+1}.{b}."
_FACE = "(swin.)encoder.layers.{s}.blocks.{b}."
_MM = "stages.{s}.blocks.{b}."


def _block(ours: str, authors: str, vision: str, face: str, mm: str) -> Rule:
    """A rule inside of a block; timm calls it what the authors do."""
    theirs = {"timm": _AUTHORS + authors, "authors": _AUTHORS + authors, "torchvision": _VISION + vision}
    return Rule(_OURS + ours, theirs | {"transformers": _FACE + face, "mm": _MM + mm})


def _joined(ours: str, *face: str) -> Rule:
    return Rule(_OURS + ours, {"transformers": tuple(_FACE + name for name in face)})


RULES = [
    Rule(
        "stem.proj.*",
        {
            "timm": "patch_embed.proj.*",
            "authors": "patch_embed.proj.*",
            "torchvision": "features.0.0.*",
            "transformers": "(swin.)embeddings.patch_embeddings.projection.*",
            "mm": "patch_embed.projection.*",
        },
    ),
    Rule(
        "stem.norm.*",
        {
            "timm": "patch_embed.norm.*",
            "authors": "patch_embed.norm.*",
            "torchvision": "features.0.2.*",
            "transformers": "(swin.)embeddings.norm.*",
            "mm": "patch_embed.norm.*",
        },
    ),
    Rule(
        "stages.{m}.merge.norm.*",
        {
            "timm": "layers.{m}.downsample.norm.*",
            "authors": "layers.{m-1}.downsample.norm.*",
            "torchvision": "features.{2m}.norm.*",
            "transformers": "(swin.)encoder.layers.{m-1}.downsample.norm.*",
        },
    ),
    Rule(
        "stages.{m}.merge.reduction.*",
        {
            "timm": "layers.{m}.downsample.reduction.*",
            "authors": "layers.{m-1}.downsample.reduction.*",
            "torchvision": "features.{2m}.reduction.*",
            "transformers": "(swin.)encoder.layers.{m-1}.downsample.reduction.*",
        },
    ),
    Rule("stages.{m}.merge.norm.*", {"mm": "stages.{m-1}.downsample.norm.*"}, from_unfold, to_unfold),
    Rule("stages.{m}.merge.reduction.*", {"mm": "stages.{m-1}.downsample.reduction.*"}, from_unfold, to_unfold),
    _block("norm1.*", "norm1.*", "norm1.*", "layernorm_before.*", "norm1.*"),
    Rule(
        _OURS + "attention.qkv.*",
        {
            "timm": _AUTHORS + "attn.qkv.*",
            "authors": _AUTHORS + "attn.qkv.*",
            "torchvision": _VISION + "attn.qkv.*",
            "transformers": tuple(_FACE + f"attention.self.{name}.*" for name in ("query", "key", "value")),
            "mm": _MM + "attn.w_msa.qkv.*",
        },
    ),
    _block("attention.proj.*", "attn.proj.*", "attn.proj.*", "attention.output.dense.*", "attn.w_msa.proj.*"),
    _block(
        "attention.bias_table",
        "attn.relative_position_bias_table",
        "attn.relative_position_bias_table",
        "attention.self.relative_position_bias_table",
        "attn.w_msa.relative_position_bias_table",
    ),
    _block("norm2.*", "norm2.*", "norm2.*", "layernorm_after.*", "norm2.*"),
    _block("mlp.fc1.*", "mlp.fc1.*", "mlp.0.*", "intermediate.dense.*", "ffn.layers.0.0.*"),
    _block("mlp.fc2.*", "mlp.fc2.*", "mlp.3.*", "output.dense.*", "ffn.layers.1.*"),
    _joined("attention.qkv.*", "attention.q_proj.*", "attention.k_proj.*", "attention.v_proj.*"),
    _joined("attention.proj.*", "attention.o_proj.*"),
    _joined("attention.bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    _joined("mlp.fc1.*", "mlp.fc1.*"),
    _joined("mlp.fc2.*", "mlp.fc2.*"),
    Rule(
        "norms.{s}.*",
        {
            "authors": "norm{s}.*",
            "transformers": "hidden_states_norms.stage{s+1}.*",
            "mm": "norm{s}.*",
            "mmpretrain": (),
        },
    ),
    Rule(
        "head.norm.*",
        {
            "timm": "norm.*",
            "authors": "norm.*",
            "torchvision": "norm.*",
            "transformers": "(swin.)layernorm.*",
            "mmpretrain": "norm3.*",
        },
    ),
    Rule(
        "head.fc.*",
        {
            "timm": "head.fc.*",
            "authors": "head.*",
            "torchvision": "head.*",
            "transformers": "classifier.*",
            "mmpretrain": "head.fc.*",
        },
    ),
]


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of weights under our names show of their configuration: `dim`, `depths`, `heads`, `norm`."""
    blocks: dict[int, int] = {}
    heads: dict[int, int] = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            if match[3] == "attention.bias_table":
                heads[stage] = tensor.shape[-1]
    shown: dict[str, Any] = {}
    if "stem.proj.weight" in weights:
        shown["dim"] = weights["stem.proj.weight"].shape[0]
    shown["depths"] = tuple(blocks[stage] for stage in sorted(blocks))
    shown["heads"] = tuple(heads[stage] for stage in sorted(heads))
    shown["norm"] = "batch" if any(name.endswith(".running_mean") for name in weights) else "layer"
    return shown
