"""EfficientViT in plain loops: windows, heads, positions and offsets one by one.

Nothing here imports from the package, and nothing is shared with the fast forward but the names of the weights.

B batch, H W map, C channels, h heads, n tokens of one window
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Config = Mapping[str, Any]
EPS = 1e-5


def convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(B, C, H, W), zeros around it: one product for each output position, or for each tap where it is depthwise."""
    kernel, (batch, channels, height, width) = weight.shape[-1], x.shape
    edge = kernel // 2
    padded = x.new_zeros(batch, channels, height + 2 * edge, width + 2 * edge)
    padded[:, :, edge : edge + height, edge : edge + width] = x
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    out = x.new_zeros(batch, weight.shape[0], rows, columns)
    for dy in range(kernel):
        for dx in range(kernel):
            seen = padded[:, :, dy : dy + height : stride, dx : dx + width : stride]
            if weight.shape[1] == 1:
                out = out + seen * weight[:, 0, dy, dx].view(1, -1, 1, 1)
            else:
                out = out + torch.einsum("bchw,oc->bohw", seen, weight[:, :, dy, dx])
    return out


def normalise(x: Tensor, state: State, name: str, config: Config, training: bool) -> Tensor:
    """(B, C, ...): statistics of a channel over everything else, kept or of this batch; or those of a position."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    if config["norm"] == "layer":
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    elif training:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    else:
        mean, variance = state[f"{name}.running_mean"].view(shape), state[f"{name}.running_var"].view(shape)
    scaled = (x - mean) / torch.sqrt(variance + EPS)
    return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


class Network:
    """The state, the configuration and the mode, so that layers are functions of a map and a name."""

    def __init__(self, state: State, config: Config, training: bool) -> None:
        self.state, self.config, self.training = state, config, training

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        x = convolve(x, self.state[f"{name}.conv.weight"], stride)
        return normalise(x, self.state, f"{name}.norm", self.config, self.training)

    def act(self, x: Tensor) -> Tensor:
        positive = torch.where(x > 0, x, torch.zeros_like(x))
        if self.config["act"] == "relu":
            return positive
        return x * (x + 3).clamp(0, 6) / 6

    def unit(self, x: Tensor, name: str) -> Tensor:
        if self.config["interaction"]:
            x = x + self.conv(x, f"{name}.interaction.branch")
        hidden = self.act(self.conv(x, f"{name}.ffn.branch.expand"))
        return x + self.conv(hidden, f"{name}.ffn.branch.project")

    def gate(self, x: Tensor, name: str) -> Tensor:
        mean = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        for layer in ("reduce", "expand"):
            weight, bias = self.state[f"{name}.{layer}.weight"], self.state[f"{name}.{layer}.bias"]
            mean = mean @ weight.T + bias
            mean = self.act(mean) if layer == "reduce" else 1 / (1 + torch.exp(-mean))
        return x * mean[:, :, None, None]

    def subsample(self, x: Tensor, name: str) -> Tensor:
        x = self.unit(x, f"{name}.before")
        x = self.act(self.conv(x, f"{name}.reduce.expand"))
        x = self.act(self.conv(x, f"{name}.reduce.conv", stride=2))
        x = self.conv(self.gate(x, f"{name}.reduce.gate"), f"{name}.reduce.project")
        return self.unit(x, f"{name}.after")

    def stem(self, x: Tensor) -> Tensor:
        for layer in (0, 2, 4, 6):
            x = self.conv(x if layer == 0 else self.act(x), f"stem.{layer}", stride=2)
        return x

    def bias(self, name: str, head: int, window: int, shape: tuple[int, int]) -> Tensor:
        """Between the tokens of a map of `shape`: entry (|dy|, |dx|) of the w x w table."""
        table, (height, width) = self.state[f"{name}.bias_table"], shape
        rows = []
        for i in range(height * width):
            for j in range(height * width):
                rows.append(abs(i // width - j // width) * window + abs(i % width - j % width))
        return table[rows, head].view(height * width, height * width)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """(M, ., H, W) each -> (M, V, H, W), one window and one query at a time."""
        key_dim, shape = self.config["key_dim"], v.shape
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        windows = []
        for one in range(len(q)):
            columns = []
            for token in range(q.shape[2]):
                logits = (q[one, :, token] @ k[one]) / math.sqrt(key_dim) + bias[token]
                weights = torch.exp(logits - logits.max())
                columns.append(v[one] @ (weights / weights.sum()))
            windows.append(torch.stack(columns, 1))
        return torch.stack(windows).view(shape)

    def cascaded(self, x: Tensor, name: str, stage: int) -> Tensor:
        """(M, C, H, W), whole windows."""
        heads, key_dim = self.config["heads"][stage], self.config["key_dim"]
        group = x.shape[1] // heads
        outs: list[Tensor] = []
        for head in range(heads):
            seen = x[:, head * group : (head + 1) * group].clone()
            if head > 0 and self.config["cascade"]:
                shared = min(group, outs[-1].shape[1])
                seen[:, :shared] = seen[:, :shared] + outs[-1][:, :shared]
            qkv = self.conv(seen, f"{name}.qkvs.{head}")
            q = self.conv(qkv[:, :key_dim], f"{name}.dws.{head}")
            k, v = qkv[:, key_dim : 2 * key_dim], qkv[:, 2 * key_dim :]
            bias = self.bias(name, head, self.config["windows"][stage], (x.shape[2], x.shape[3]))
            outs.append(self.weigh(q, k, v, bias))
        return torch.cat(outs, 1)

    def plain(self, x: Tensor, name: str, stage: int) -> Tensor:
        """(M, C, H, W): queries of all heads, then keys, then values."""
        heads, key_dim = self.config["heads"][stage], self.config["key_dim"]
        qkv = self.conv(x, f"{name}.qkv")
        value_dim = qkv.shape[1] // heads - 2 * key_dim
        outs = []
        for head in range(heads):
            q = qkv[:, head * key_dim : (head + 1) * key_dim]
            k = qkv[:, (heads + head) * key_dim : (heads + head + 1) * key_dim]
            first = 2 * heads * key_dim + head * value_dim
            bias = self.bias(name, head, self.config["windows"][stage], (x.shape[2], x.shape[3]))
            outs.append(self.weigh(q, k, qkv[:, first : first + value_dim], bias))
        return torch.cat(outs, 1)

    def attention(self, x: Tensor, name: str, stage: int) -> Tensor:
        batch, channels, height, width = x.shape
        window = self.config["windows"][stage]
        heads = self.cascaded if self.config["attention"] == "cascaded" else self.plain
        if height <= window and width <= window:
            return x + self.conv(self.act(heads(x, name, stage)), f"{name}.proj.branch.1")
        rows, columns = math.ceil(height / window), math.ceil(width / window)
        padded = x.new_zeros(batch, channels, rows * window, columns * window)
        padded[:, :, :height, :width] = x
        tiles = []
        for row in range(rows):
            for column in range(columns):
                top, left = row * window, column * window
                tiles.append(padded[:, :, top : top + window, left : left + window])
        # all windows together, since a norm in training sees them as one batch
        found = self.conv(self.act(heads(torch.cat(tiles), name, stage)), f"{name}.proj.branch.1").split(batch)
        out = torch.zeros_like(padded)
        for number, tile in enumerate(found):
            top, left = number // columns * window, number % columns * window
            out[:, :, top : top + window, left : left + window] = tile
        return x + out[:, :, :height, :width]

    def block(self, x: Tensor, name: str, stage: int) -> Tensor:
        for number in range(self.config["ffns"]):
            x = self.unit(x, f"{name}.before.{number}")
        x = self.attention(x, f"{name}.attention", stage)
        for number in range(self.config["ffns"]):
            x = self.unit(x, f"{name}.after.{number}")
        return x


def efficientvit(image: Tensor, state: State, config: Config, training: bool = False) -> list[Tensor]:
    """The map of every stage, from the weights and the configuration of a backbone."""
    network = Network(state, config, training)
    x = network.stem(image)
    maps = []
    for stage, depth in enumerate(config["depths"]):
        if stage > 0:
            x = network.subsample(x, f"stages.{stage}.subsample")
        for block in range(depth):
            x = network.block(x, f"stages.{stage}.blocks.{block}", stage)
        maps.append(x)
    return maps


def efficientvit_logits(image: Tensor, state: State, config: Config, training: bool = False) -> list[Tensor]:
    """The logits of one head, or of two where distilled, from a classifier's weights."""
    inner = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    last = efficientvit(image, inner, config, training)[-1]
    mean = last.sum((2, 3)) / (last.shape[2] * last.shape[3])
    found = []
    for end in ("", "_distilled") if config["distilled"] else ("",):
        x = normalise(mean, state, f"head.norm{end}", config, training)
        found.append(x @ state[f"head.fc{end}.weight"].T + state[f"head.fc{end}.bias"])
    return found
