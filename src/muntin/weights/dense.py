"""Whole detectors and segmenters: our own files, and those of mmdetection and mmsegmentation, heads included.

mmdetection's heads have the same layers in the same conventions (background last, boxes of a class side by side,
regions flattened by channel first), so their weights fit as they are, under other names. mmdetection's own backbone
names are read as for a backbone alone.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.heads.dense import Dense
from muntin.weights.files import unwrap
from muntin.weights.rules import forms, preview, read_name, write_name

if TYPE_CHECKING:
    from muntin.weights.load import LoadReport

_BOX, _MASK = "roi.stages.{s}.box.", "roi.stages.{s}.mask."
_BOXES, _MASKS = "roi_head.bbox_head.{s}.", "roi_head.mask_head.{s}."

_STAGED = {
    _BOXES + "shared_convs.{i}.conv.*": _BOX + "convs.{i}.0.conv.*",
    _BOXES + "shared_convs.{i}.bn.*": _BOX + "convs.{i}.0.norm.*",
    _BOXES + "shared_fcs.{i}.*": _BOX + "fcs.{2i}.*",
    _BOXES + "fc_cls.*": _BOX + "classes.*",
    _BOXES + "fc_reg.*": _BOX + "boxes.*",
    _MASKS + "convs.{i}.conv.*": _MASK + "convs.{i}.0.*",
    _MASKS + "upsample.*": _MASK + "enlarge.*",
    _MASKS + "conv_logits.*": _MASK + "classes.*",
}
_PYRAMID = {
    "neck.lateral_convs.{i}.conv.*": "neck.fpn.inner_blocks.{i}.0.*",
    "neck.fpn_convs.{i}.conv.*": "neck.fpn.layer_blocks.{i}.0.*",
}
_DETECTOR = {
    "rpn_head.rpn_conv.*": "rpn.head.conv.0.0.*",
    "rpn_head.rpn_cls.*": "rpn.head.cls_logits.*",
    "rpn_head.rpn_reg.*": "rpn.head.bbox_pred.*",
    **_STAGED,
    **{theirs.replace("{s}.", ""): ours.replace("{s}", "0") for theirs, ours in _STAGED.items()},
}
_RETINA = {
    "neck.fpn_convs.{i+3}.conv.*": "neck.shrink.{i}.*",  # behind three maps, of strides 8 to 32
    "bbox_head.cls_convs.{i}.conv.*": "head.classification_head.conv.{i}.0.*",
    "bbox_head.reg_convs.{i}.conv.*": "head.regression_head.conv.{i}.0.*",
    "bbox_head.retina_cls.*": "head.classification_head.cls_logits.*",
    "bbox_head.retina_reg.*": "head.regression_head.bbox_reg.*",
}
_NORMED = {
    "decode_head.psp_modules.{i}.1.": "decoder.psp.blocks.{i}.1.",
    "decode_head.bottleneck.": "decoder.psp.out_conv.",
    "decode_head.fpn_bottleneck.": "decoder.fusion_block.",
    # smp counts from the coarsest of three maps
    **{f"decode_head.lateral_convs.{i}.": f"decoder.fpn_lateral_blocks.{2 - i}.conv_norm_relu." for i in range(3)},
    **{f"decode_head.fpn_convs.{i}.": f"decoder.fpn_conv_blocks.{2 - i}." for i in range(3)},
}
_UPERNET = {
    **{f"{theirs}conv.*": f"{ours}0.*" for theirs, ours in _NORMED.items()},
    **{f"{theirs}bn.*": f"{ours}1.*" for theirs, ours in _NORMED.items()},
    "decode_head.conv_seg.*": "classes.1.*",
    "auxiliary_head.convs.0.conv.*": "auxiliary.0.conv.*",
    "auxiliary_head.convs.0.bn.*": "auxiliary.0.norm.*",
    "auxiliary_head.conv_seg.*": "auxiliary.3.*",
}
_SEMANTIC = {
    "decode_head.scale_heads.{i}.{2k}.conv.*": "climbs.{i}.convs.{k}.0.conv.*",
    "decode_head.scale_heads.{i}.{2k}.bn.*": "climbs.{i}.convs.{k}.0.norm.*",
    "decode_head.conv_seg.*": "classes.*",
}
RULES = {
    "faster_rcnn": _PYRAMID | _DETECTOR,
    "mask_rcnn": _PYRAMID | _DETECTOR,
    "cascade_mask_rcnn": _PYRAMID | _DETECTOR,
    "retinanet": _PYRAMID | _RETINA,
    "upernet": _UPERNET,
    "semantic_fpn": _PYRAMID | _SEMANTIC,
}
"""mmdetection's and mmsegmentation's names and ours, by head."""


def load_dense(
    model: Dense, source: str, content: Mapping[str, Any], strict: bool, load_backbone: Callable[[], "LoadReport"]
) -> "LoadReport":
    """The weights of a whole model, or of a backbone alone; heads that are not in the file keep the model's values.

    load_backbone: loads what of the file is the backbone's. Raises UserError as it does, and for a file of our own
    that does not fit.
    """
    state = unwrap(content)
    own = model.state_dict()
    ours = {name: form for name in state for form in forms(name) if form in own}
    if any(not name.startswith("backbone.") for name in ours.values()):
        return _load_own(model, source, {ours.get(name, name): tensor for name, tensor in state.items()}, strict)
    return _load_foreign(model, state, load_backbone())


def _load_own(model: Dense, source: str, state: Mapping[str, Tensor], strict: bool) -> "LoadReport":
    from muntin.weights.load import LoadReport

    own = model.state_dict()
    replaced: list[str] = []
    loaded: list[str] = []
    misfits: list[str] = []
    details: dict[str, str] = {}
    for name in [name for name in state if name in own]:
        theirs, mine = tuple(state[name].shape), tuple(own[name].shape)
        if theirs == mine:
            loaded.append(name)
            continue
        details[name] = f"{theirs} in the file, {mine} in the model"
        counted = theirs[1:] == mine[1:] and not name.startswith("backbone.")  # of another number of classes
        (replaced if counted else misfits).append(name)
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if strict and (misfits or missing or unexpected):
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": misfits}
        told = "; ".join(f"{len(names)} {what}: {preview(names)}" for what, names in lists.items() if names)
        raise UserError(f"{source} does not fit {model.head_name}:{model.name}: {told}. Pass strict=False for the rest")
    _copy(own, {name: state[name] for name in loaded})
    broken = tuple(name for name in loaded if not own[name].isfinite().all())
    return LoadReport(
        "muntin", tuple(loaded), (), tuple(replaced + misfits), tuple(missing), tuple(unexpected), (), broken, details
    )


def _load_foreign(model: Dense, state: Mapping[str, Tensor], backbone: "LoadReport") -> "LoadReport":
    """A backbone's report, with what of the rest of the file fits the model's heads."""
    from muntin.weights.load import LoadReport

    own = model.state_dict()
    rules = RULES.get(model.head_name, {})
    taken: dict[str, str] = {}
    details = {f"backbone.{name}": text for name, text in backbone.details.items()}
    for theirs in backbone.ignored:
        if (name := _ours(rules, theirs, own)) is not None:
            if state[theirs].shape == own[name].shape:
                taken[name] = theirs
            else:
                details[name] = f"{tuple(state[theirs].shape)} in the file, {tuple(own[name].shape)} in the model"
    _copy(own, {name: state[theirs] for name, theirs in taken.items()})
    named = {field: tuple(f"backbone.{n}" for n in getattr(backbone, field)) for field in ("loaded", "resized")}
    kept = tuple(name for name in own if not name.startswith("backbone.") and name not in taken)
    return LoadReport(
        backbone.dialect,
        named["loaded"] + tuple(taken),
        named["resized"],
        tuple(f"backbone.{n}" for n in backbone.replaced) + kept,
        tuple(f"backbone.{n}" for n in backbone.missing),
        backbone.unexpected,
        tuple(name for name in backbone.ignored if name not in taken.values()),
        tuple(f"backbone.{n}" for n in backbone.nonfinite),
        details,
    )


def _ours(rules: Mapping[str, str], theirs: str, own: Mapping[str, Tensor]) -> str | None:
    for pattern, ours in rules.items():
        if (places := read_name(pattern, theirs)) is not None and (name := write_name(ours, places)) in own:
            return name
    return None


def _copy(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in values.items():
            own[name].copy_(tensor)
