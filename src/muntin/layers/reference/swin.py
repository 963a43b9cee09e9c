"""Slow, obvious versions of the layers, which the fast ones are tested against.

Nothing here imports from the package, and nothing is shared with the fast forward but the names of the
weights: windows are lists of token positions, made one by one with Python integers, heads and windows are
loops, a position bias is looked up offset by offset, norms and activations are written out.

B batch, H W map, C channels, h heads, d = C / h, w window, n tokens of one window
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Config = Mapping[str, Any]
LAYER_EPS = 1e-5
BATCH_EPS = 1e-5
MASKED = -100.0  # added to the logits of two tokens that were not neighbours before the cyclic shift


class Axis(NamedTuple):
    """How one axis of a map is divided: `length` is `side` plus padding, a whole number of windows."""

    side: int
    length: int
    window: int
    shift: int


class Place(NamedTuple):
    """One token of a window: its row and column, and whether the roll carried it around each edge."""

    row: int
    column: int
    wrapped: tuple[bool, bool]


def divide_axis(side: int, window: int, shifted: bool, small_maps: str) -> Axis:
    """The window, shift and padding of one axis (spec/swin: "shrink" for classifiers, "pad" for dense maps)."""
    if small_maps == "shrink" and window >= side:
        return Axis(side, side, side, 0)
    length = math.ceil(side / window) * window
    return Axis(side, length, window, window // 2 if shifted else 0)


def windows_of(rows: Axis, columns: Axis) -> list[list[Place]]:
    """Every window of the padded, then rolled map, as the list of the places its tokens come from."""
    windows = []
    for top in range(0, rows.length, rows.window):
        for left in range(0, columns.length, columns.window):
            places = []
            for y in range(top, top + rows.window):
                for x in range(left, left + columns.window):
                    row, column = y + rows.shift, x + columns.shift
                    wrapped = (row >= rows.length, column >= columns.length)
                    places.append(Place(row % rows.length, column % columns.length, wrapped))
            windows.append(places)
    return windows


def position_bias(table: Tensor, head: int, window: int, shape: tuple[int, int]) -> Tensor:
    """Bias between the tokens of a window of `shape`: entry (dy + w - 1, dx + w - 1) of the (2w-1)^2 table."""
    height, width = shape
    rows = []
    for i in range(height * width):
        for j in range(height * width):
            dy = i // width - j // width
            dx = i % width - j % width
            rows.append((dy + window - 1) * (2 * window - 1) + dx + window - 1)
    return table[rows, head].view(height * width, height * width)


def neighbour_mask(places: list[Place]) -> Tensor:
    """-100 between tokens of a window that the roll brought together, 0 between old neighbours."""
    return torch.tensor(
        [[0.0 if one.wrapped == other.wrapped else MASKED for other in places] for one in places],
    )


def project(x: Tensor, state: State, name: str, head: int, d: int) -> list[Tensor]:
    """q, k and v (B, n, d) of one head: its rows of the three blocks that make up the qkv weight."""
    weight, bias = state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"]
    parts = []
    for which in range(3):
        first = which * (weight.shape[0] // 3) + head * d
        parts.append(x @ weight[first : first + d].T + bias[first : first + d])
    return parts


def window_attention(x: Tensor, state: State, name: str, window: int, shifted: bool, config: Config) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v in every window of a normalised map (B, H, W, C)."""
    rows = divide_axis(x.shape[1], window, shifted, config["small_maps"])
    columns = divide_axis(x.shape[2], window, shifted, config["small_maps"])
    batch, height, width, channels = x.shape
    heads = config["heads"]
    d = channels // heads
    padded = x.new_zeros(batch, rows.length, columns.length, channels)
    padded[:, :height, :width] = x
    mixed = torch.zeros_like(padded)
    table = state[f"{name}.bias_table"]
    biases = [position_bias(table, head, window, (rows.window, columns.window)) for head in range(heads)]
    for places in windows_of(rows, columns):
        tokens = torch.stack([padded[:, place.row, place.column] for place in places], dim=1)  # (B, n, C)
        mask = neighbour_mask(places).to(x)
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            seen = tokens[..., own] if config["split_heads"] else tokens
            q, k, v = project(seen, state, name, head, d)
            logits = q @ k.transpose(1, 2) / math.sqrt(d) + biases[head] + mask  # (B, n, n)
            out = torch.softmax(logits, dim=-1) @ v
            for n, place in enumerate(places):
                mixed[:, place.row, place.column, own] = out[:, n]
    mixed = mixed[:, :height, :width]
    return mixed @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]


def norm(x: Tensor, state: State, name: str, config: Config) -> Tensor:
    """LayerNorm over C, or BatchNorm over every other axis (with the batch's statistics in training)."""
    if config["norm"] == "layer":
        mean, var, eps = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False), LAYER_EPS
    elif config["training"]:
        others = list(range(x.dim() - 1))
        mean, var, eps = x.mean(others), x.var(others, unbiased=False), BATCH_EPS
    else:
        mean, var, eps = state[f"{name}.running_mean"], state[f"{name}.running_var"], BATCH_EPS
    return (x - mean) / torch.sqrt(var + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def activation(x: Tensor, config: Config) -> Tensor:
    """The exact GELU, x times the normal distribution function, or ReLU."""
    if config["act"] == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def embed_patches(image: Tensor, state: State, config: Config) -> Tensor:
    """Zero-pad the image at the bottom and right to whole patches, one linear map per patch, then norm."""
    patch = config["patch"]
    batch, colours, height, width = image.shape
    rows, columns = math.ceil(height / patch), math.ceil(width / patch)
    padded = image.new_zeros(batch, colours, rows * patch, columns * patch)
    padded[:, :, :height, :width] = image
    weight = state["stem.proj.weight"]  # (C, 3, p, p)
    x = state["stem.proj.bias"].expand(batch, rows, columns, -1)
    for y in range(patch):
        for z in range(patch):
            pixels = padded[:, :, y::patch, z::patch].permute(0, 2, 3, 1)  # (B, H, W, 3)
            x = x + pixels @ weight[:, :, y, z].T
    return norm(x, state, "stem.norm", config)


def merge_patches(x: Tensor, state: State, name: str, config: Config) -> Tensor:
    """2x2 neighbours in the order (0,0), (1,0), (0,1), (1,1) as (row, column), then norm and reduction."""
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + height % 2, width + width % 2, channels)
    padded[:, :height, :width] = x
    corners = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    x = norm(torch.cat(corners, dim=-1), state, f"{name}.norm", config)  # (B, H/2, W/2, 4C)
    return x @ state[f"{name}.reduction.weight"].T


def swin_block(x: Tensor, state: State, name: str, window: int, shifted: bool, config: Config) -> Tensor:
    """x + WMSA(norm(x)), then x + MLP(norm(x)); padding comes after norm1 and so is zero itself."""
    if config["attended"]:
        y = norm(x, state, f"{name}.norm1", config)
        x = x + window_attention(y, state, f"{name}.attention", window, shifted, config)
    y = norm(x, state, f"{name}.norm2", config)
    y = activation(y @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"], config)
    return x + y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]


def swin(image: Tensor, state: State, config: Config, training: bool = False) -> list[Tensor]:
    """Swin and Swin-Free: the map (B, C, H, W) of every stage for an image (B, 3, H, W).

    `state` holds a backbone's or a classifier's weights under this project's names; with `norms.{stage}` in it
    the maps are normalised as the detection code does. `config` holds plain values (`dim`, `depths`, `heads`,
    `window`, ... as in the design); of them `depths`, `heads` and `window` are needed.
    """
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    full: dict[str, Any] = {"shift": True, "norm": "layer", "act": "gelu", "small_maps": "shrink", "patch": 4}
    full |= {"split_heads": False, "attend": None, **config, "training": training}
    x = embed_patches(image, state, full)
    maps = []
    for stage, depth in enumerate(full["depths"]):
        window = full["window"] if isinstance(full["window"], int) else full["window"][stage]
        shift = full["shift"] if isinstance(full["shift"], bool) else full["shift"][stage]
        if stage > 0:
            x = merge_patches(x, state, f"stages.{stage}.merge", full)
        for block in range(depth):
            number = sum(full["depths"][:stage]) + block
            attended = full["attend"] is None or number in full["attend"]
            here = full | {"heads": full["heads"][stage], "attended": attended}
            x = swin_block(x, state, f"stages.{stage}.blocks.{block}", window, shift and block % 2 == 1, here)
        normed = norm(x, state, f"norms.{stage}", full) if f"norms.{stage}.weight" in state else x
        maps.append(normed.permute(0, 3, 1, 2))
    return maps


def swin_logits(image: Tensor, state: State, config: Config, training: bool = False) -> Tensor:
    """Logits (B, classes) of a classifier: last map -> norm -> mean over the tokens -> linear."""
    x = swin(image, state, config, training)[-1].permute(0, 2, 3, 1)
    x = norm(x, state, "head.norm", {"norm": config.get("norm", "layer"), "training": training})
    x = x.mean(dim=(1, 2))
    return x @ state["head.fc.weight"].T + state["head.fc.bias"]
