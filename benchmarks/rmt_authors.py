"""RMT as its authors compute it, with the weights of one of Muntin's models: the peer that nobody packages.

Rotation and decay tables are made anew in every stage of every forward pass, the decay as a full mask for each
head; q, k and v are three products; attention is explicit products and a softmax; residual convolutions and norms
stand as they are. benchmarks/peers.py compares and times it.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def authors_form(model: nn.Module) -> nn.Module:
    """A classifier of the RMT family (conv stem, softmax decay) in the authors' form, with the model's own weights."""
    return AuthorsForm(model).eval()


def _split(linear: nn.Linear) -> list[nn.Linear]:
    parts = []
    for weight, bias in zip(linear.weight.chunk(2), linear.bias.chunk(2), strict=True):
        part = nn.Linear(linear.in_features, len(bias))
        part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        parts.append(part)
    return parts


def _nhwc(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    partner = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + partner * sin


class Positions(nn.Module):
    """Rotation and decay of one stage, made in every call."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        heads, d = attention.heads, attention.width
        self.decomposed = attention.decomposed
        self.register_buffer("angle", (1.0 / 10000 ** torch.linspace(0, 1, d // 2)).repeat_interleave(2))
        steps = attention.least + attention.reach * torch.arange(heads, dtype=torch.float32) / heads
        self.register_buffer("decay", torch.log(1 - 2**-steps))

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        angle: Any = self.angle
        decay: Any = self.decay
        index = torch.arange(height * width).to(angle)
        sin = torch.sin(index[:, None] * angle).view(height, width, -1)
        cos = torch.cos(index[:, None] * angle).view(height, width, -1)
        if self.decomposed:
            sides = [torch.arange(side).to(angle) for side in (width, height)]
            masks = [(side[:, None] - side[None]).abs() * decay[:, None, None] for side in sides]
        else:
            grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
            places = grid.view(-1, 2).to(angle)
            masks = [(places[:, None] - places[None]).abs().sum(-1) * decay[:, None, None]]
        return sin, cos, masks


class Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attention
        self.heads, self.scale = attention.heads, attention.width**-0.5
        self.position, self.norm1, self.norm2 = block.position.conv, block.norm1, block.norm2
        self.q, self.k = _split(attention.qk)
        self.v, self.local, self.proj = attention.v, attention.local, attention.proj
        self.fc1, self.fc2, self.mix = block.mlp.fc1, block.mlp.fc2, block.mlp.mix.conv
        self.scale1, self.scale2 = block.scale1, block.scale2

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
        x = x + _nhwc(self.position, x)
        y = self.attend(self.norm1(x), *positions)
        x = x + (y if self.scale1 is None else self.scale1 * y)
        y = F.gelu(self.fc1(self.norm2(x)))
        y = self.fc2(y + _nhwc(self.mix, y))
        return x + (y if self.scale2 is None else self.scale2 * y)

    def attend(self, x: Tensor, sin: Tensor, cos: Tensor, masks: list[Tensor]) -> Tensor:
        batch, height, width, _ = x.shape
        q, k, v = self.q(x), self.k(x) * self.scale, self.v(x)
        local = _nhwc(self.local, v)
        q, k = (t.view(batch, height, width, self.heads, -1).permute(0, 3, 1, 2, 4) for t in (q, k))  # (B, h, H, W, d)
        q, k = _turn(q, sin, cos), _turn(k, sin, cos)
        v = v.view(batch, height, width, self.heads, -1)
        if len(masks) == 2:
            rows = torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2) + masks[0], -1)
            v = rows @ v.permute(0, 1, 3, 2, 4)  # (B, H, h, W, d)
            columns = q.permute(0, 3, 1, 2, 4) @ k.permute(0, 3, 1, 2, 4).transpose(-1, -2) + masks[1]
            out = torch.softmax(columns, -1) @ v.permute(0, 3, 2, 1, 4)  # (B, W, h, H, d)
            out = out.permute(0, 3, 1, 2, 4).flatten(-2)
        else:
            q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, h, N, d)
            out = torch.softmax(q @ k.transpose(-1, -2) + masks[0], -1) @ v
            out = out.transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(out + local)


class AuthorsForm(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.stem = model.backbone.stem.convs
        self.downs = nn.ModuleList(stage.merge.conv for stage in model.backbone.stages[1:])
        self.positions = nn.ModuleList(Positions(stage.blocks[0].attention) for stage in model.backbone.stages)
        self.stages = nn.ModuleList(nn.ModuleList(map(Block, stage.blocks)) for stage in model.backbone.stages)
        self.proj, self.norm, self.fc = model.head.norm.linear, model.head.norm.norm, model.head.fc

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)  # (B, H, W, C)
        blocks: Any
        for number, (blocks, positions) in enumerate(zip(self.stages, self.positions, strict=True)):
            if number:
                x = _nhwc(self.downs[number - 1], x)
            tables = positions(x.shape[1], x.shape[2])
            for block in blocks:
                x = block(x, tables)
        return self.fc(F.silu(self.norm(self.proj(x))).flatten(1, 2).mean(1))
