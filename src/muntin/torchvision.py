"""Muntin's backbones in torchvision's detectors.

```python
pyramid = Pyramid(muntin.create_backbone("swin_t", out_norm=True))
model = torchvision.models.detection.FasterRCNN(pyramid, num_classes=91, rpn_anchor_generator=anchors(pyramid))
```

Any backbone fits torchvision's defaults: five levels, of which pooling of boxes and masks reads the first four.
For RetinaNet: `create_backbone(name, out_indices=...)` from stride 8 on, `Pyramid(backbone, strides=(8, 16, 32, 64,
128))` and `anchors(pyramid, scales=RETINA)`. Whole detectors of our own are made by `muntin.create_dense`.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from muntin.heads.pyramid import RETINA, Anchors, FeaturePyramid
from muntin.models.backbone import Backbone

__all__ = ["RETINA", "Pyramid", "anchors"]


class Pyramid(FeaturePyramid):
    """A backbone and a feature pyramid: image (B, 3, H, W) -> {"0": (B, channels, H / strides[0], ...), "1": ...}.

    Finer and coarser levels than the backbone's as in `muntin.heads.pyramid.FeaturePyramid`.
    strides: of the levels, each twice the one before; all of the backbone's are among them.
    Raises UserError for strides that do not fit.
    """

    def __init__(self, backbone: Backbone, channels: int = 256, strides: Sequence[int] = (4, 8, 16, 32, 64)) -> None:
        super().__init__(backbone.channels, backbone.strides, channels, strides)
        self.backbone = backbone

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        levels = self.levels(self.backbone(image), image.shape[2:])
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def anchors(
    pyramid: Pyramid, scales: Sequence[float] = (8,), ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> AnchorGenerator:
    """Anchors for each level of a pyramid: sides of scales * stride, of each ratio of height to width."""
    return Anchors(pyramid.strides, scales, ratios)
