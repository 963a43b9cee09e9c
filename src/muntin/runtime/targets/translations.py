"""Operators of our own in a graph, in ONNX's."""

from collections.abc import Callable
from typing import Any

import torch

EVERY = 2**31 - 1
"""Boxes that a group may keep: all."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx writes for each. Imports onnxscript."""
    from onnxscript import opset18 as op

    from muntin.heads import suppression  # noqa: F401  # registers the operator

    def suppress(boxes: Any, scores: Any, iou: float, least: float) -> Any:
        every: Any = op.Constant(value_ints=[EVERY])
        overlap: Any = op.Constant(value_floats=[iou])
        threshold: Any = op.Constant(value_floats=[least])
        return op.NonMaxSuppression(boxes, scores, every, overlap, threshold)

    return {torch.ops.muntin.suppress.default: suppress}
