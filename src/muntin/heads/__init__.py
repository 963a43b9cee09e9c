"""Detectors and segmenters by name: a head on any backbone. Nothing heavy is imported before one is made.

A new head is one file here, with CONFIGS and MODEL, and one line in HEADS.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from muntin.errors import UserError, nearest
from muntin.heads.dense import Dense
from muntin.heads.paste import paste_masks

__all__ = ["HEADS", "create_dense", "paste_masks"]

HEADS = {
    "retinanet": "detect",
    "faster_rcnn": "detect",
    "mask_rcnn": "instance",
    "cascade_mask_rcnn": "instance",
    "upernet": "segment",
    "semantic_fpn": "segment",
}
"""The task of each head: "detect" finds boxes, "instance" boxes and masks, "segment" a class for every pixel."""

_MODULES = {"faster_rcnn": "rcnn", "mask_rcnn": "rcnn", "cascade_mask_rcnn": "rcnn"}
"""Where a head is, unless in the module of its own name. Each has CONFIGS, by the heads' names, and MODEL."""


def create_dense(
    head: str,
    name: str,
    num_classes: int,
    drop_path: float = 0.0,
    head_config: Mapping[str, Any] | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    **config: Any,
) -> Dense:
    """A detector or segmenter: a head of HEADS on a backbone.

    name, drop_path, pretrained and config, of the backbone, are as in `muntin.create_backbone`; its maps are normed.
    num_classes: without background.
    head_config: any field of the head's configuration, such as {"anchor_scale": 4}.

    Raises UserError for unknown names and fields (with the nearest valid ones), impossible values, and where a
    package of `muntin[detection]` is missing.
    """
    from muntin.models.classifier import check_classes

    module, row = _configure(head, head_config or {})
    check_classes(num_classes)
    return module.MODEL(head, row, name, num_classes, {"drop_path": drop_path, "pretrained": pretrained, **config})


def _configure(head: str, overrides: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    if head not in HEADS:
        raise UserError(f"no head {head!r}{nearest(str(head), HEADS)}; valid are {', '.join(HEADS)}")
    try:
        module = importlib.import_module(f"muntin.heads.{_MODULES.get(head, head)}")
    except ModuleNotFoundError as error:
        raise UserError(f"{head} needs the package {error.name}: pip install 'muntin[detection]'") from error
    row = module.CONFIGS[head]
    valid = [field.name for field in fields(row)]
    for key in overrides:
        if key not in valid:
            raise UserError(f"{head} has no field {key!r}{nearest(str(key), valid)}; valid are {', '.join(valid)}")
    return module, replace(row, **overrides)
