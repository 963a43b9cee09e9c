"""Layers that several heads are made of, and how they begin."""

from typing import Any

import torch
from torch import Tensor, nn

from muntin.layers.conv import ConvNorm


def normal(layer: Any, std: float) -> Any:
    """A layer whose weights are drawn with a standard deviation, without bias at first."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def kaiming(layer: Any) -> Any:
    """A layer whose weights are drawn for a ReLU behind it, without bias at first."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def xavier(layer: Any) -> Any:
    """A layer whose weights are drawn for no function behind it, without bias at first."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv_act(channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """3x3 convolution, norm ("batch", "layer" or "none"), ReLU."""
    if norm != "none":
        return nn.Sequential(ConvNorm(channels, out_channels, 3, norm=norm), nn.ReLU())
    return nn.Sequential(kaiming(nn.Conv2d(channels, out_channels, 3, padding=1)), nn.ReLU(inplace=True))


class GridPool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two products, which trace for maps of any size: (B, C, H, W) -> (B, C, side, side)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return _means(self.side, x.shape[2], x) @ x @ _means(self.side, x.shape[3], x).t()


def _means(cells: int, side: int, like: Tensor) -> Tensor:
    """(cells, side): cell i takes the mean from floor(i side / cells) to ceil((i + 1) side / cells)."""
    whole = torch.scalar_tensor(side, dtype=torch.int64, device=like.device)  # a symbol in a graph
    first = torch.arange(cells, device=like.device)[:, None] * whole
    places = torch.arange(side, device=like.device) * cells
    inside = torch.logical_and(places > first - cells, places < first + whole).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
