"""Muntin's backbones in torchvision's detectors.

```python
pyramid = Pyramid(muntin.create_backbone("swin_t", out_norm=True))
model = torchvision.models.detection.FasterRCNN(pyramid, num_classes=91, rpn_anchor_generator=anchors(pyramid))
```

Any backbone fits torchvision's defaults: five levels, of which pooling of boxes and masks reads the first four.
For RetinaNet: `create_backbone(name, out_indices=...)` from stride 8 on, `Pyramid(backbone, strides=(8, 16, 32, 64,
128))` and `anchors(pyramid, scales=RETINA)`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from muntin.errors import UserError
from muntin.models.backbone import Backbone

RETINA = tuple(4 * 2 ** (i / 3) for i in range(3))
"""Sides of RetinaNet's anchors over their level's stride."""


class Pyramid(nn.Module):
    """A backbone and a feature pyramid: image (B, 3, H, W) -> {"0": (B, channels, H / strides[0], ...), "1": ...}.

    Levels finer than the backbone's finest map grow out of that level by 2x2 transposed convolutions of stride 2, each
    with a 3x3 convolution behind it, as in EfficientViT's detectors; coarser ones take every second position of the
    level before, as in torchvision's.

    strides: of the levels, each twice the one before; all of the backbone's are among them.
    Raises UserError for strides that do not fit.
    """

    def __init__(self, backbone: Backbone, channels: int = 256, strides: Sequence[int] = (4, 8, 16, 32, 64)) -> None:
        super().__init__()
        self.strides = tuple(strides)
        own = backbone.strides
        doubled = all(b == 2 * a for s in (self.strides, own) for a, b in zip(s[:-1], s[1:], strict=True))
        if not self.strides or not doubled or not set(own) <= set(self.strides):
            raise UserError(
                f"strides={self.strides} for maps at strides {own}: each is twice the one before, and the maps' are "
                "among the levels'; choose maps with create_backbone(..., out_indices=...)"
            )
        self.out_channels = channels
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), channels)
        finer = self.strides.index(own[0])
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range(finer))
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(finer))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(image)
        levels = list(self.fpn(OrderedDict((str(i), each) for i, each in enumerate(maps))).values())
        x = levels[0]
        finer = [stride for stride in self.strides if stride < self.backbone.strides[0]]
        for stride, enlarge, smooth in zip(reversed(finer), self.enlarge, self.smooth, strict=True):
            height, width = (-(-side // stride) for side in image.shape[2:])
            x = enlarge(x)[:, :, :height, :width]
            levels.insert(0, smooth(x))
        while len(levels) < len(self.strides):
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class _Anchors(AnchorGenerator):
    """torchvision divides the image by the map to get a stride, which fails where the map was rounded up."""

    def __init__(self, strides: tuple[int, ...], scales: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__(
            tuple(tuple(stride * s for s in scales) for stride in strides), (tuple(ratios),) * len(strides)
        )
        self.strides = strides

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        steps = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        every = torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps))
        return [every for _ in image_list.image_sizes]


def anchors(
    pyramid: Pyramid, scales: Sequence[float] = (8,), ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> AnchorGenerator:
    """Anchors for each level of a pyramid: sides of scales * stride, of each ratio of height to width."""
    return _Anchors(pyramid.strides, scales, ratios)
