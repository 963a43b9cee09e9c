"""Layers that several heads are made of, and how they begin."""

from typing import Any

from torch import nn

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
