"""RMT in plain loops. Nothing here imports from the package; the fast model is held against it.

Convolutions are sums over their taps, rotation turns one pair of channels after the other, and decay is the full
matrix over all tokens, made one pair of tokens after the other; attention along rows or columns is the same
matrix with every other pair shut out.

B batch, H W map, C channels, h heads, d = C / h, N = H * W tokens in raster order; maps are (B, H, W, C)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Config = Mapping[str, Any]
BLOCK_EPS = 1e-6
EPS = 1e-5  # of every other norm

DEFAULTS: dict[str, Any] = {
    "decay_min": 2,
    "projection": 1024,
    "token_label": False,
    "stem": "conv",
    "patch": 4,
    "patch_norm": True,
    "downsample": "conv",
    "position_conv": True,
    "local_enhancement": True,
    "ffn_conv": True,
    "decay": "softmax",
}


def linear(x: Tensor, state: State, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(x: Tensor, state: State, name: str, training: bool) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        others = list(range(x.dim() - 1))
        mean, var = x.mean(others), x.var(others, unbiased=False)
    return (x - mean) / torch.sqrt(var + EPS) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def convolution(x: Tensor, state: State, name: str, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution of a map (B, H, W, C), depthwise where its weight says so: the sum over the kernel's taps."""
    weight = state[f"{name}.weight"]  # (C', C, k, k) or (C, 1, k, k)
    kernel = weight.shape[-1]
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = x
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    depthwise = weight.shape[1] == 1 and channels > 1
    total = state[f"{name}.bias"].expand(batch, rows, columns, -1)
    for row in range(kernel):
        for column in range(kernel):
            seen = padded[:, row : row + stride * rows : stride, column : column + stride * columns : stride]
            tap = weight[:, :, row, column]
            total = total + (seen * tap[:, 0] if depthwise else seen @ tap.T)
    return total


def stem(image: Tensor, state: State, config: Config) -> Tensor:
    x = image.permute(0, 2, 3, 1)
    if config["stem"] == "conv":
        for number, stride in enumerate((2, 1, 2, 1)):
            x = convolution(x, state, f"stem.convs.{2 * number}.conv", stride, 1)
            x = batch_norm(x, state, f"stem.convs.{2 * number}.norm", config["training"])
            x = gelu(x) if number < 3 else x
        return x
    patch = config["patch"]
    batch, height, width, _ = x.shape
    padded = x.new_zeros(batch, math.ceil(height / patch) * patch, math.ceil(width / patch) * patch, 3)
    padded[:, :height, :width] = x
    x = convolution(padded, state, "stem.proj", patch)
    return layer_norm(x, state, "stem.norm", EPS) if config["patch_norm"] else x


def downsample(x: Tensor, state: State, name: str, config: Config) -> Tensor:
    if config["downsample"] == "conv":
        x = convolution(x, state, f"{name}.conv.conv", 2, 1)
        return batch_norm(x, state, f"{name}.conv.norm", config["training"])
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + height % 2, width + width % 2, channels)
    padded[:, :height, :width] = x
    corners = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return linear(layer_norm(torch.cat(corners, -1), state, f"{name}.norm", EPS), state, f"{name}.reduction")


def distances(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """|dy| and |dx| between every two tokens: (N, N) each."""
    places = [(y, x) for y in range(height) for x in range(width)]
    dy = [[abs(one[0] - other[0]) for other in places] for one in places]
    dx = [[abs(one[1] - other[1]) for other in places] for one in places]
    return torch.tensor(dy).to(like), torch.tensor(dx).to(like)


def rotate(x: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 of token n, turned by n / 10000^(j / (d / 2 - 1)): (B, N, d)."""
    pairs = x.shape[-1] // 2
    token = torch.arange(x.shape[1]).to(x)
    turned = torch.empty_like(x)
    for j in range(pairs):
        power = torch.tensor(j / (pairs - 1) if pairs > 1 else 0.0, dtype=x.dtype)
        angle = token * (1 / 10000**power)  # in the precision of x, as the authors do
        cos, sin = torch.cos(angle), torch.sin(angle)
        turned[..., 2 * j] = x[..., 2 * j] * cos - x[..., 2 * j + 1] * sin
        turned[..., 2 * j + 1] = x[..., 2 * j + 1] * cos + x[..., 2 * j] * sin
    return turned


def weigh(logits: Tensor, gamma: float, distance: Tensor, shut: Tensor, kind: str) -> Tensor:
    """The attention matrix (B, N, N) of products q k^T; pairs that are `shut` out have no part in it."""
    if kind == "no_softmax":
        return torch.where(shut, 0.0, logits * gamma**distance)
    if kind == "softmax":
        logits = logits + math.log(gamma) * distance
    return torch.softmax(torch.where(shut, -math.inf, logits), -1)


def attention(x: Tensor, state: State, name: str, config: Config) -> Tensor:
    """Manhattan self-attention of a normalised map (B, H, W, C)."""
    batch, height, width, channels = x.shape
    d = channels // config["heads"]
    tokens = x.reshape(batch, height * width, channels)
    qk, v = linear(tokens, state, f"{name}.qk"), linear(tokens, state, f"{name}.v")
    q, k = qk[..., :channels], qk[..., channels:]
    dy, dx = distances(height, width, x)
    parts = []
    for head in range(config["heads"]):
        gamma = 1 - 2 ** (-config["decay_min"] - config["decay_range"] * head / config["heads"])
        own = slice(head * d, (head + 1) * d)
        logits = rotate(q[..., own]) @ rotate(k[..., own] / math.sqrt(d)).transpose(1, 2)  # (B, N, N)
        if config["decomposed"]:
            along_rows = weigh(logits, gamma, dx, dy > 0, config["decay"])
            along_columns = weigh(logits, gamma, dy, dx > 0, config["decay"])
            parts.append(along_columns @ (along_rows @ v[..., own]))
        else:
            parts.append(weigh(logits, gamma, dx + dy, dx < 0, config["decay"]) @ v[..., own])
    mixed = torch.cat(parts, -1).reshape(x.shape)
    if config["local_enhancement"]:
        mixed = mixed + convolution(v.reshape(x.shape), state, f"{name}.local", 1, 2)
    return linear(mixed, state, f"{name}.proj")


def block(x: Tensor, state: State, name: str, config: Config) -> Tensor:
    if config["position_conv"]:
        x = x + convolution(x, state, f"{name}.position.conv", 1, 1)
    y = attention(layer_norm(x, state, f"{name}.norm1", BLOCK_EPS), state, f"{name}.attention", config)
    x = x + (state[f"{name}.scale1"] * y if config["layer_scale"] else y)
    y = gelu(linear(layer_norm(x, state, f"{name}.norm2", BLOCK_EPS), state, f"{name}.mlp.fc1"))
    if config["ffn_conv"]:
        y = y + convolution(y, state, f"{name}.mlp.mix.conv", 1, 1)
    y = linear(y, state, f"{name}.mlp.fc2")
    return x + (state[f"{name}.scale2"] * y if config["layer_scale"] else y)


def rmt(image: Tensor, state: State, config: Config, training: bool = False) -> list[Tensor]:
    """The map (B, C, H, W) of every stage for an image (B, 3, H, W).

    `state` holds a backbone's or a classifier's weights under this project's names; with `norms.{stage}` in it the
    maps are normalised as the detection code does. `config` holds plain values in the design's names.
    """
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    full: dict[str, Any] = DEFAULTS | dict(config) | {"training": training}
    x = stem(image, state, full)
    maps = []
    for stage, depth in enumerate(full["depths"]):
        if stage > 0:
            x = downsample(x, state, f"stages.{stage}.merge", full)
        own = {field: full[field][stage] for field in ("heads", "decay_range", "decomposed", "layer_scale")}
        for number in range(depth):
            x = block(x, state, f"stages.{stage}.blocks.{number}", full | own)
        normed = layer_norm(x, state, f"norms.{stage}", EPS) if f"norms.{stage}.weight" in state else x
        maps.append(normed.permute(0, 3, 1, 2))
    return maps


def rmt_logits(image: Tensor, state: State, config: Config, training: bool = False) -> Any:
    """Logits (B, classes) of a classifier; with token labels in training also (B, N, classes)."""
    full: dict[str, Any] = DEFAULTS | dict(config)
    tokens = rmt(image, state, config, training)[-1].flatten(2).transpose(1, 2)  # (B, N, C)
    if full["projection"]:
        x = batch_norm(linear(tokens, state, "head.norm.linear"), state, "head.norm.norm", training)
        x = x / (1 + torch.exp(-x))
    else:
        x = layer_norm(tokens, state, "head.norm", EPS)
    logits = linear(x.mean(1), state, "head.fc")
    if not full["token_label"]:
        return logits
    labels = linear(tokens if full["token_label"] == "stage" else x, state, "head.fc_tokens")
    return (logits, labels) if training else logits + 0.5 * labels.max(1).values
