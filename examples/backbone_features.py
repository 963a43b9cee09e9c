"""Maps of several strides from a backbone, as detection and segmentation heads take them, at any image size.

python examples/backbone_features.py
"""

import torch

import muntin

backbone = muntin.create_backbone("swin_free_t", out_norm=True).eval()
image = torch.randn(1, 3, 250, 333)
with torch.inference_mode():
    maps = backbone(image)
for features, stride, channels in zip(maps, backbone.strides, backbone.channels, strict=True):
    print(f"stride {stride:>2}: {channels} channels, {features.shape[2]} x {features.shape[3]}")
