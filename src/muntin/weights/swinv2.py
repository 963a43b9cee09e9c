"""Names of SwinV2 weights in every dialect that exists.

One rule per kind of weight (see `rules` for the notation). Merging stands at the start of a stage here, in timm since
0.9 and in mmpretrain, at the end of the stage before elsewhere; before 0.9 timm had the authors' names. q and v have
biases and k has none: others keep two vectors, torchvision one with zeros in its middle. The dialect mm is
mmpretrain's, the only one of that house with SwinV2.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muntin.weights.rules import Rule
from muntin.weights.swin import from_unfold, to_unfold


def _without_key(bias: Tensor) -> Tensor:
    """Biases of q, k and v -> those of q and v. torchvision multiplies by zero what stands for k."""
    q, _, v = bias.chunk(3)
    return torch.cat([q, v])


def _with_key(bias: Tensor) -> Tensor:
    q, v = bias.chunk(2)
    return torch.cat([q, torch.zeros_like(q), v])


def _flat(scale: Tensor) -> Tensor:
    return scale.flatten()


def _per_head(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1)


_OURS = "stages.{s}.blocks.{b}."
_AUTHORS = "layers.{s}.blocks.{b}."
_VISION = "features.{2s+1}.{b}."
_FACE = "(swinv2.)encoder.layers.{s}.blocks.{b}."
_MM = "stages.{s}.blocks.{b}."


def _block(
    ours: str, authors: str, vision: str, face: str, mm: str, to_ours: Any = None, to_theirs: Any = None
) -> Rule:
    """A rule inside of a block; timm calls it what the authors do."""
    theirs = {"timm": _AUTHORS + authors, "authors": _AUTHORS + authors, "torchvision": _VISION + vision}
    theirs |= {"transformers": _FACE + face, "mm": _MM + mm}
    return Rule(_OURS + ours, theirs) if to_ours is None else Rule(_OURS + ours, theirs, to_ours, to_theirs)


def _cpb(ours: str, theirs: str) -> Rule:
    """A rule for the network of the position bias."""
    return _block(
        f"attention.position.{ours}.*",
        f"attn.cpb_mlp.{theirs}.*",
        f"attn.cpb_mlp.{theirs}.*",
        f"attention.self.continuous_position_bias_mlp.{theirs}.*",
        f"attn.w_msa.cpb_mlp.{theirs}.*",
    )


RULES = [
    Rule(
        "stem.proj.*",
        {
            "timm": "patch_embed.proj.*",
            "authors": "patch_embed.proj.*",
            "torchvision": "features.0.0.*",
            "transformers": "(swinv2.)embeddings.patch_embeddings.projection.*",
            "mm": "patch_embed.projection.*",
        },
    ),
    Rule(
        "stem.norm.*",
        {
            "timm": "patch_embed.norm.*",
            "authors": "patch_embed.norm.*",
            "torchvision": "features.0.2.*",
            "transformers": "(swinv2.)embeddings.norm.*",
            "mm": "patch_embed.norm.*",
        },
    ),
    Rule(
        "stages.{m}.merge.norm.*",
        {
            "timm": "layers.{m}.downsample.norm.*",
            "authors": "layers.{m-1}.downsample.norm.*",
            "torchvision": "features.{2m}.norm.*",
            "transformers": "(swinv2.)encoder.layers.{m-1}.downsample.norm.*",
            "mm": "stages.{m}.downsample.norm.*",
        },
    ),
    Rule(
        "stages.{m}.merge.reduction.*",
        {
            "timm": "layers.{m}.downsample.reduction.*",
            "authors": "layers.{m-1}.downsample.reduction.*",
            "torchvision": "features.{2m}.reduction.*",
            "transformers": "(swinv2.)encoder.layers.{m-1}.downsample.reduction.*",
        },
    ),
    Rule("stages.{m}.merge.reduction.*", {"mm": "stages.{m}.downsample.reduction.*"}, from_unfold, to_unfold),
    Rule(
        _OURS + "attention.qkv.weight",
        {
            "timm": _AUTHORS + "attn.qkv.weight",
            "authors": _AUTHORS + "attn.qkv.weight",
            "torchvision": _VISION + "attn.qkv.weight",
            "transformers": tuple(_FACE + f"attention.self.{name}.weight" for name in ("query", "key", "value")),
            "mm": _MM + "attn.w_msa.qkv.weight",
        },
    ),
    Rule(
        _OURS + "attention.qv_bias",
        {
            "timm": (_AUTHORS + "attn.q_bias", _AUTHORS + "attn.v_bias"),
            "authors": (_AUTHORS + "attn.q_bias", _AUTHORS + "attn.v_bias"),
            "transformers": (_FACE + "attention.self.query.bias", _FACE + "attention.self.value.bias"),
            "mm": (_MM + "attn.w_msa.q_bias", _MM + "attn.w_msa.v_bias"),
        },
    ),
    Rule(_OURS + "attention.qv_bias", {"torchvision": _VISION + "attn.qkv.bias"}, _without_key, _with_key),
    _block(
        "attention.logit_scale",
        "attn.logit_scale",
        "attn.logit_scale",
        "attention.self.logit_scale",
        "attn.w_msa.logit_scale",
        _flat,
        _per_head,
    ),
    _cpb("fc1", "0"),
    _cpb("fc2", "2"),
    _block("attention.proj.*", "attn.proj.*", "attn.proj.*", "attention.output.dense.*", "attn.w_msa.proj.*"),
    _block("norm1.*", "norm1.*", "norm1.*", "layernorm_before.*", "norm1.*"),
    _block("mlp.fc1.*", "mlp.fc1.*", "mlp.0.*", "intermediate.dense.*", "ffn.layers.0.0.*"),
    _block("mlp.fc2.*", "mlp.fc2.*", "mlp.3.*", "output.dense.*", "ffn.layers.1.*"),
    _block("norm2.*", "norm2.*", "norm2.*", "layernorm_after.*", "norm2.*"),
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
            "transformers": "(swinv2.)layernorm.*",
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
    """What the shapes of weights under our names show of their configuration: `dim`, `depths`, `heads`."""
    blocks: dict[int, int] = {}
    heads: dict[int, int] = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            if match[3] == "attention.logit_scale":
                heads[stage] = tensor.numel()
    shown: dict[str, Any] = {}
    if "stem.proj.weight" in weights:
        shown["dim"] = weights["stem.proj.weight"].shape[0]
    shown["depths"] = tuple(blocks[stage] for stage in sorted(blocks))
    shown["heads"] = tuple(heads[stage] for stage in sorted(heads))
    return shown
