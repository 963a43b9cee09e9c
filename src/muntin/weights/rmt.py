"""Names of RMT weights: the authors' classification and detection code, whose downsampling ends a stage.

Their files come from a file-sharing site alone, so users bring them. Buffers under `Relpos` are tables of sizes.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from muntin.weights.rules import Rule

_OURS = "stages.{s}.blocks.{b}."
_AUTHORS = "layers.{s}.blocks.{b}."


def _block(ours: str, *authors: str) -> Rule:
    return Rule(_OURS + ours, {"authors": tuple(_AUTHORS + name for name in authors)})


RULES = [
    *(
        rule
        for place in range(4)
        for rule in (
            Rule(f"stem.convs.{2 * place}.conv.*", {"authors": f"patch_embed.proj.{3 * place}.*"}),
            Rule(f"stem.convs.{2 * place}.norm.*", {"authors": f"patch_embed.proj.{3 * place + 1}.*"}),
        )
    ),
    Rule("stages.{m}.merge.conv.conv.*", {"authors": "layers.{m-1}.downsample.reduction.*"}),
    Rule("stages.{m}.merge.conv.norm.*", {"authors": "layers.{m-1}.downsample.norm.*"}),
    _block("position.conv.*", "pos.conv.*"),
    _block("norm1.*", "retention_layer_norm.*"),
    _block("attention.qk.*", "retention.q_proj.*", "retention.k_proj.*"),
    _block("attention.v.*", "retention.v_proj.*"),
    _block("attention.local.*", "retention.lepe.conv.*"),
    _block("attention.proj.*", "retention.out_proj.*"),
    _block("norm2.*", "final_layer_norm.*"),
    _block("mlp.fc1.*", "ffn.fc1.*"),
    _block("mlp.mix.conv.*", "ffn.dwconv.conv.*"),
    _block("mlp.fc2.*", "ffn.fc2.*"),
    _block("scale1", "gamma_1"),
    _block("scale2", "gamma_2"),
    Rule("norms.{s}.*", {"authors": "extra_norms.{s}.*"}),
    Rule("head.norm.linear.*", {"authors": "proj.*"}),
    Rule("head.norm.norm.*", {"authors": "norm.*"}),
    Rule("head.fc.*", {"authors": "head.*"}),
    Rule("head.fc_tokens.*", {"authors": "aux_head.*"}),
    # the ablation models and patch stems, of which the authors have published nothing
    Rule("stem.proj.*", {}),
    Rule("stem.norm.*", {}),
    Rule("stages.{m}.merge.norm.*", {}),
    Rule("stages.{m}.merge.reduction.*", {}),
    Rule("head.norm.*", {}),
]


def describe(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of weights under our names show of their configuration: `dims`, `depths`, `mlp_ratios`,
    `layer_scale`, and `token_label` where there is a head for tokens.
    """
    blocks: dict[int, int] = {}
    dims: dict[int, int] = {}
    ratios: dict[int, float] = {}
    scaled = set()
    for name, tensor in weights.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            if match[3] == "mlp.fc1.weight":
                hidden, dims[stage] = tensor.shape
                ratios[stage] = hidden // dims[stage] if hidden % dims[stage] == 0 else hidden / dims[stage]
            elif match[3] == "scale1":
                scaled.add(stage)
    shown: dict[str, Any] = {
        "dims": tuple(dims[stage] for stage in sorted(dims)),
        "depths": tuple(blocks[stage] for stage in sorted(blocks)),
        "mlp_ratios": tuple(ratios[stage] for stage in sorted(ratios)),
        "layer_scale": tuple(stage in scaled for stage in sorted(blocks)),
    }
    tokens, projection = weights.get("head.fc_tokens.weight"), weights.get("head.norm.linear.bias")
    if tokens is not None:
        projected = projection is not None and tokens.shape[1] == len(projection)
        shown["token_label"] = "projection" if projected else "stage"
    return shown
