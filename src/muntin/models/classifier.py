"""Backbone + head: image -> logits.

A head maps the last map to logits by its last layer, `fc`, and has `features(map)`, the map after the head's norm,
`pooled(map)`, what `fc` takes, and `reset(num_classes)`.
"""

from typing import Any

from torch import Tensor, nn

from muntin.errors import UserError
from muntin.models.backbone import Backbone


class Classifier(nn.Module):
    """(B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, name: str, backbone: Backbone, head: Any, num_classes: int) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.backbone = backbone
        self.head: Any = head

    @property
    def config(self) -> Any:
        """The frozen configuration that the backbone was built from."""
        return self.backbone.config

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image)[-1])

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map, normalised: (B, 3, H, W) -> (B, C, H / stride, W / stride)."""
        return self.head.features(self.backbone(image)[-1])

    def reset_classifier(self, num_classes: int) -> None:
        """A new, randomly initialised last layer for another number of classes."""
        check_classes(num_classes)
        if getattr(self, "optimized", False):
            raise UserError("an optimised copy keeps its head: reset the model's, then optimise again")
        self.head.reset(num_classes)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def check_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes={num_classes!r}: give a whole number of at least 1")
