"""timm's plain vision transformer and ConvNeXt, small, as models that `train` takes by their dotted path.

    PYTHONPATH=benchmarks muntin train --data digits --model digits_peers.vit --set size=32

What a family's file has: a configuration, VARIANTS, a backbone and a head. B batch, C channels
"""

from dataclasses import dataclass
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """Configuration: `depths` and `dims` have one value for each stage; `heads` are 0 for a ConvNeXt; `size` is the
    input's side in pixels, which a ViT's position embedding is made for.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int
    heads: int = 0
    size: int = 32

    def __post_init__(self) -> None:
        for field in ("dims", "depths"):
            object.__setattr__(self, field, tuple(getattr(self, field)))


class PeerBackbone(nn.Module):
    """(B, 3, size, size) -> [(B, C)], the pooled and normalised features of timm's model."""

    def __init__(self, config: Peer, out_indices: tuple[int, ...] | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.body: Any
        if config.heads:
            self.body = VisionTransformer(
                img_size=config.size,
                patch_size=config.patch,
                num_classes=0,
                global_pool="avg",
                class_token=False,
                embed_dim=config.dims[0],
                depth=config.depths[0],
                num_heads=config.heads,
                drop_path_rate=drop_path,
            )
        else:
            self.body = ConvNeXt(
                num_classes=0,
                patch_size=config.patch,
                depths=config.depths,
                dims=config.dims,
                drop_path_rate=drop_path,
            )

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.body(image)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)


class PeerHead(nn.Module):
    """(B, C) -> (B, num_classes), initialised as timm does for both."""

    def __init__(self, config: Peer, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(config.dims[-1], num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


VARIANTS = {
    "vit": Peer((24,), (4,), patch=4, heads=2),
    "vit_p8": Peer((48,), (4,), patch=8, heads=4),
    "convnext": Peer((32, 48, 64, 96), (1, 2, 1, 1), patch=4),
}
CONFIG = Peer
BACKBONE = PeerBackbone
HEAD = PeerHead
