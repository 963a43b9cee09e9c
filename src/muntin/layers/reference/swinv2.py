"""Slow, obvious SwinV2: every pair of tokens has its own coordinates, every head and window its own turn.

Windows, padding, the mask and the patch embedding are Swin's, from the slow version of Swin beside this file.

B batch, H W map, C channels, h heads, d = C / h, w window, n tokens of one window
"""

import math
from typing import Any

import torch
from torch import Tensor

from .swin import Config, State, activation, divide_axis, embed_patches, neighbour_mask, norm, windows_of

LAYER: Config = {"norm": "layer", "act": "gelu", "patch": 4}


def coordinate(offset: int, extent: int) -> float:
    """sign(x) log2(1 + |x|) / log2(8), where x reaches from -8 to 8 over a window of `extent` tokens."""
    x = 8.0 * offset / (extent - 1) if extent > 1 else 8.0 * offset
    return math.copysign(math.log2(1 + abs(x)) / math.log2(8), x)


def continuous_bias(state: State, name: str, head: int, shape: tuple[int, int], trained: int) -> Tensor:
    """Bias (n, n) between the tokens of a window of `shape`: 16 sigmoid(MLP(coordinates)), pair by pair.

    trained: the window that the coordinates are measured in, 0 for the window itself.
    """
    height, width = shape
    pairs = []
    for i in range(height * width):
        for j in range(height * width):
            down, right = i // width - j // width, i % width - j % width
            pairs.append([coordinate(down, trained or height), coordinate(right, trained or width)])
    weight = state[f"{name}.position.fc1.weight"]
    x = torch.tensor(pairs, dtype=torch.float64).to(weight)  # (n * n, 2)
    x = x @ weight.T + state[f"{name}.position.fc1.bias"]
    x = torch.where(x > 0, x, torch.zeros_like(x)) @ state[f"{name}.position.fc2.weight"][head]
    return (16 / (1 + torch.exp(-x))).view(height * width, height * width)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays zero."""
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square > 0, x / torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def logit_scale(raw: Tensor) -> Tensor:
    """exp(min(raw, ln 100))"""
    return torch.exp(torch.clamp(raw, max=math.log(100)))


def project(x: Tensor, state: State, name: str, head: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, n, d) of one head: q and v with a bias, k without."""
    weight, bias = state[f"{name}.qkv.weight"], state[f"{name}.qv_bias"]
    channels = weight.shape[1]
    first = head * d
    q = x @ weight[first : first + d].T + bias[first : first + d]
    k = x @ weight[channels + first : channels + first + d].T
    v = x @ weight[2 * channels + first : 2 * channels + first + d].T + bias[channels + first : channels + first + d]
    return q, k, v


def cosine_attention(x: Tensor, state: State, name: str, shifted: bool, config: Config) -> Tensor:
    """softmax(s cos(q, k) + bias + mask) v in every window of a map (B, H, W, C), which is padded with zeros."""
    rows = divide_axis(x.shape[1], config["window"], shifted, config["small_maps"])
    columns = divide_axis(x.shape[2], config["window"], shifted, config["small_maps"])
    batch, height, width, channels = x.shape
    d = channels // config["heads"]
    padded = x.new_zeros(batch, rows.length, columns.length, channels)
    padded[:, :height, :width] = x
    mixed = torch.zeros_like(padded)
    for head in range(config["heads"]):
        scale = logit_scale(state[f"{name}.logit_scale"][head])
        bias = continuous_bias(state, name, head, (rows.window, columns.window), config["trained"])
        for places in windows_of(rows, columns):
            tokens = torch.stack([padded[:, place.row, place.column] for place in places], dim=1)  # (B, n, C)
            q, k, v = project(tokens, state, name, head, d)
            logits = scale * (unit(q) @ unit(k).transpose(1, 2)) + bias + neighbour_mask(places).to(x)
            out = torch.softmax(logits, dim=-1) @ v
            for n, place in enumerate(places):
                mixed[:, place.row, place.column, head * d : (head + 1) * d] = out[:, n]
    mixed = mixed[:, :height, :width]
    return mixed @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]


def merge_patches(x: Tensor, state: State, name: str) -> Tensor:
    """2x2 neighbours in the order (0,0), (1,0), (0,1), (1,1) as (row, column), then reduction and norm."""
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + height % 2, width + width % 2, channels)
    padded[:, :height, :width] = x
    corners = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return norm(torch.cat(corners, dim=-1) @ state[f"{name}.reduction.weight"].T, state, f"{name}.norm", LAYER)


def block(x: Tensor, state: State, name: str, shifted: bool, config: Config) -> Tensor:
    """x + norm(attention(x)), then x + norm(MLP(x)); the norm never sees padding."""
    x = x + norm(cosine_attention(x, state, f"{name}.attention", shifted, config), state, f"{name}.norm1", LAYER)
    y = activation(x @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"], LAYER)
    y = y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
    return x + norm(y, state, f"{name}.norm2", LAYER)


def swinv2(image: Tensor, state: State, config: Config) -> list[Tensor]:
    """The map (B, C, H, W) of every stage for an image (B, 3, H, W).

    `state` holds a backbone's or a classifier's weights under this project's names; with `norms.{stage}` in it the
    maps are normalised. `config` holds plain values: `depths`, `heads`, `window`, and where they are not the
    defaults `pretrained_window` and `small_maps`.
    """

    def at(field: str, stage: int) -> Any:
        value = config.get(field)
        return value[stage] if isinstance(value, (tuple, list)) else value

    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    x = embed_patches(image, state, LAYER)
    maps = []
    for stage, depth in enumerate(config["depths"]):
        if stage > 0:
            x = merge_patches(x, state, f"stages.{stage}.merge")
        here = {
            "heads": at("heads", stage),
            "window": at("window", stage),
            "trained": at("pretrained_window", stage) or 0,
            "small_maps": config.get("small_maps", "shrink"),
        }
        for number in range(depth):
            x = block(x, state, f"stages.{stage}.blocks.{number}", number % 2 == 1, here)
        out = norm(x, state, f"norms.{stage}", LAYER) if f"norms.{stage}.weight" in state else x
        maps.append(out.permute(0, 3, 1, 2))
    return maps


def swinv2_logits(image: Tensor, state: State, config: Config) -> Tensor:
    """Logits (B, classes) of a classifier: last map -> norm -> mean over the tokens -> linear."""
    x = norm(swinv2(image, state, config)[-1].permute(0, 2, 3, 1), state, "head.norm", LAYER)
    return x.mean(dim=(1, 2)) @ state["head.fc.weight"].T + state["head.fc.bias"]
