"""EfficientViT (Microsoft's; MIT's model of the same name is another).

EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (arXiv 2305.07027).

Legend: B batch, H W map, C channels, h heads, K channels of a query or key. Everything is a map (B, C, H, W),
in channels-last memory. Each unit, interaction, feed-forward layer or attention, is x + f(x).
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.cascaded import CascadedAttention, MapAttention, PlainAttention
from muntin.layers.conv import MAP_ACTIVATIONS, MAP_NORMS, ConvMlp, ConvNorm, Residual, in_turn, renew
from muntin.layers.folding import FoldedHead, fold_before, note, with_weights
from muntin.layers.opaque import OpaqueStage
from muntin.layers.patch import check_image
from muntin.layers.tracing import symbolic
from muntin.layers.window import SymbolicGrid, symbolic_grid
from muntin.models.backbone import Backbone, call_block, select_outputs
from muntin.native.program import Program, convolutions
from muntin.native.steps import Unsuitable, Value, activation

ATTENTIONS = ("cascaded", "plain")


@dataclass(frozen=True)
class EfficientViT:
    """Configuration. `dims, depths, heads, windows` have an entry for each stage, `kernels` for each head.

    key_dim: channels of a query and of a key, per head. distilled: a second head, for a teacher's labels.
    The paper's studies: `attention` "plain" lets each head see all channels, without cascade and convolved
    queries; `cascade` adds a head's output to the next head's input; `ffns` are the feed-forward layers, each
    after a depthwise convolution, before attention and again after it; `interaction` is these convolutions, also
    those between stages; `value_ratio` is the width of all values together to that of the input.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...] = (7, 7, 4)
    kernels: tuple[int, ...] = (5, 5, 5, 5)
    key_dim: int = 16
    distilled: bool = False
    attention: str = "cascaded"
    cascade: bool = True
    ffns: int = 1
    interaction: bool = True
    value_ratio: float = 1.0
    act: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        for field in ("dims", "depths", "heads", "windows", "kernels"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        _check(self)

    def value_dim(self, stage: int) -> int:
        """Channels of a value in one head."""
        return int(self.dims[stage] / self.heads[stage] * self.value_ratio)


def _check(config: EfficientViT) -> None:
    """Raises UserError naming the first field whose value is impossible, and what is valid."""
    _check_stages(config)
    if not _is_count(config.key_dim):
        raise UserError(f"key_dim={config.key_dim!r}: give a whole number of at least 1")
    if not (_is_count(config.ffns) or (config.ffns == 0 and not isinstance(config.ffns, bool))):
        raise UserError(f"ffns={config.ffns!r}: give a whole number of at least 0")
    for field in ("distilled", "cascade", "interaction"):
        if not isinstance(getattr(config, field), bool):
            raise UserError(f"{field}={getattr(config, field)!r}: give True or False")
    ratio = config.value_ratio
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio < float("inf")
    if not number or not all(config.value_dim(s) for s in range(len(config.dims))):
        raise UserError(f"value_ratio={ratio!r}: give a positive number that leaves each head at least one channel")
    choices: dict[str, Collection[str]] = {"attention": ATTENTIONS, "act": MAP_ACTIVATIONS, "norm": MAP_NORMS}
    for field, valid in choices.items():
        value = getattr(config, field)
        if not isinstance(value, str) or value not in valid:
            raise UserError(f"{field}={value!r}: valid are {', '.join(map(repr, valid))}")


def _check_stages(config: EfficientViT) -> None:
    for field in ("dims", "depths", "heads", "windows", "kernels"):
        value = getattr(config, field)
        if not isinstance(value, tuple) or not value or not all(_is_count(v) for v in value):
            raise UserError(f"{field}={value!r}: give whole numbers of at least 1, in a tuple")
    for field in ("depths", "heads", "windows"):
        value = getattr(config, field)
        if len(value) != len(config.dims):
            raise UserError(
                f"{field}={value} has {len(value)} entries for {len(config.dims)} stages: give one for each"
            )
    for dim, heads in zip(config.dims, config.heads, strict=True):
        if dim % heads:
            raise UserError(f"dims={config.dims}: {dim} is no multiple of its {heads} heads: change dims or heads")
    if config.dims[0] % 8:
        raise UserError(f"dims={config.dims}: the stem begins with an eighth of {config.dims[0]}: give a multiple of 8")
    if len(config.kernels) < max(config.heads) or not all(k % 2 for k in config.kernels):
        raise UserError(f"kernels={config.kernels}: give an odd number for each of {max(config.heads)} heads")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Stem(OpaqueStage, nn.Sequential):
    """Four 3x3 convolutions of stride 2: image (B, 3, H, W) -> (B, C, ceil(H / 16), ceil(W / 16))."""

    def __init__(self, config: EfficientViT) -> None:
        widths = 3, *(config.dims[0] // part for part in (8, 4, 2, 1))
        layers: list[nn.Module] = []
        for width, out in zip(widths[:-1], widths[1:], strict=True):
            layers += [ConvNorm(width, out, 3, 2, norm=config.norm), MAP_ACTIVATIONS[config.act]()]
        super().__init__(config.dims[0], 16, *layers[:-1])

    def forward(self, input: Tensor) -> Tensor:
        if self.opaque:
            return self.by_operator(input, (input.shape[2], input.shape[3]))[0]
        program = self.serving(input)
        if program is not None:
            return program(input)
        # under export and compile: a convolution guards on sizes that it has hints of
        x, first = renew(input), self[0]
        if not (isinstance(first, ConvNorm) and first.trains(x)):  # which reads an image as it is
            x = x.contiguous(memory_format=torch.channels_last)
        return renew(in_turn(self, x))

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self(x)

    def programmed(self) -> Program:
        return convolutions(self)


def _unit(config: EfficientViT, dim: int) -> nn.Sequential:
    """Token interaction, a depthwise 3x3 convolution, then a feed-forward layer of twice the width."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if config.interaction:
        parts["interaction"] = Residual(ConvNorm(dim, dim, 3, groups=dim, scale=0.0, norm=config.norm))
    parts["ffn"] = Residual(ConvMlp(dim, 2 * dim, config.act, config.norm))
    return nn.Sequential(parts)


class EfficientViTBlock(nn.Module):
    """The sandwich: units, attention, units. (B, C, H, W) -> the same."""

    def __init__(self, config: EfficientViT, stage: int) -> None:
        super().__init__()
        dim = config.dims[stage]
        common = dim, config.heads[stage], config.windows[stage], config.key_dim, config.value_dim(stage)
        self.before = nn.Sequential(*(_unit(config, dim) for _ in range(config.ffns)))
        self.attention: MapAttention
        if config.attention == "plain":
            self.attention = PlainAttention(*common, config.act, config.norm)
        else:
            self.attention = CascadedAttention(*common, config.act, config.norm, config.kernels, config.cascade)
        self.after = nn.Sequential(*(_unit(config, dim) for _ in range(config.ffns)))

    def forward(self, x: Tensor, grid: SymbolicGrid | None) -> Tensor:
        return self.after(self.attention(self.before(x), grid))


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(act(reduce(mean(x))))), the mean over the map: (B, C, H, W) -> the same."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, hidden)
        self.act = MAP_ACTIVATIONS[act]()
        self.expand = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.act(self.reduce(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Reduction(nn.Sequential):
    """Layers one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        return in_turn(self, input)


def _subsample(config: EfficientViT, stage: int) -> nn.Sequential:
    """Between stages: a unit, an inverted residual of stride 2, a unit."""
    dim, out, hidden = config.dims[stage - 1], config.dims[stage], 4 * config.dims[stage - 1]
    reduce = Reduction(
        OrderedDict(
            expand=ConvNorm(dim, hidden, norm=config.norm),
            act1=MAP_ACTIVATIONS[config.act](),
            conv=ConvNorm(hidden, hidden, 3, 2, hidden, norm=config.norm),
            act2=MAP_ACTIVATIONS[config.act](),
            gate=SqueezeExcite(hidden, dim, config.act),
            project=ConvNorm(hidden, out, norm=config.norm),
        )
    )
    return nn.Sequential(OrderedDict(before=_unit(config, dim), reduce=reduce, after=_unit(config, out)))


class EfficientViTStage(OpaqueStage):
    """Subsampling, but for the first stage, then blocks on maps of one size."""

    def __init__(self, config: EfficientViT, stage: int) -> None:
        super().__init__(config.dims[stage], 2 if stage else 1)
        self.window = config.windows[stage]
        self.taken = config.dims[max(0, stage - 1)]  # channels of the input
        self.subsample = _subsample(config, stage) if stage else None
        self.blocks = nn.ModuleList(EfficientViTBlock(config, stage) for _ in range(config.depths[stage]))

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """`run(block, ...)` calls a block."""
        if self.opaque:
            return self.by_operator(x, (x.shape[2], x.shape[3]))[0]
        program = self.serving(x)
        if program is not None:
            return program(x)
        if self.subsample is not None:
            x = renew(self.subsample(x))
        grid = None
        # gathers serve sizes that are symbols; in training a small map's statistics must not see their padding
        if symbolic(x.shape[2]) and not self.training:
            grid = symbolic_grid(x.shape[2], x.shape[3], self.window, False, "pad", x.device)
        for block in self.blocks:
            x = run(block, x, grid)
        return x

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self(x, call_block)

    def programmed(self) -> Program:
        program = Program(self.taken)
        x = program.input
        subsample: Any = self.subsample
        if subsample is not None:
            reduce = subsample.reduce
            x = _add_unit(program, x, subsample.before)
            y = program.linear(x, reduce.expand, activation(reduce.act1))
            y = program.depthwise(y, reduce.conv, activation(reduce.act2))
            y = program.gated(y, reduce.gate.reduce, activation(reduce.gate.act), reduce.gate.expand)
            x = _add_unit(program, program.linear(y, reduce.project), subsample.after)
        for block in self.blocks:
            x = self._add_block(program, x, block)
        return program

    def _add_block(self, program: Program, x: Value, block: Any) -> Value:
        if not isinstance(block.attention, CascadedAttention):
            raise Unsuitable(repr(block.attention))
        for unit in block.before:
            x = _add_unit(program, x, unit)
        projection: Any = block.attention.proj.branch
        act, project = projection
        x = program.linear(program.cascade(x, block.attention, activation(act)), project, residual=x)
        for unit in block.after:
            x = _add_unit(program, x, unit)
        return x


def _add_unit(program: Program, x: Value, unit: Any) -> Value:
    if "interaction" in unit._modules:
        x = program.depthwise(x, unit.interaction)
    expand, act, project = unit.ffn.branch
    return program.linear(program.linear(x, expand, activation(act)), project, residual=x)


class EfficientViTBackbone(Backbone):
    """Image (B, 3, H, W) -> NCHW maps of the stages in `out_indices`, at strides 16, 32 and 64.

    out_norm: a norm of its own on each map that is returned. drop_path: the architecture has none, so 0 alone.
    """

    def __init__(
        self,
        config: EfficientViT,
        out_indices: tuple[int, ...] | None = None,
        out_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if drop_path:
            raise UserError(f"drop_path={drop_path}: EfficientViT has no stochastic depth; leave it at 0")
        self.config = config
        self.out_indices = select_outputs(out_indices, len(config.dims))
        self.channels = tuple(config.dims[s] for s in self.out_indices)
        self.stem = Stem(config)
        self.strides = tuple(self.stem.stride * 2**s for s in self.out_indices)
        self.stages = nn.ModuleList(EfficientViTStage(config, s) for s in range(len(config.dims)))
        self.norms = nn.ModuleDict()
        if out_norm:
            self.norms.update({str(s): MAP_NORMS[config.norm](config.dims[s]) for s in self.out_indices})

    def forward(self, image: Tensor) -> list[Tensor]:
        check_image(image)
        x = self.stem(image)
        maps = []
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x = stage(x, self.run_block)
            if number in self.out_indices:
                maps.append(self.norms[str(number)](x) if str(number) in self.norms else x)
        return maps


class EfficientViTHead(nn.Module):
    """Mean over the map, norm, linear: (B, C, H, W) -> (B, num_classes).

    Distilled there are two such heads: in training the logits of both, in evaluation their mean.
    """

    def __init__(self, config: EfficientViT, num_classes: int) -> None:
        super().__init__()
        norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[config.norm]
        dim = config.dims[-1]
        self.norm = norm(dim)
        self.fc: nn.Module = _linear(dim, num_classes)
        self.norm_distilled = norm(dim) if config.distilled else None
        self.fc_distilled = _linear(dim, num_classes) if config.distilled else None

    def reset(self, num_classes: int) -> None:
        for name in ("fc", "fc_distilled"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, _linear(old.in_features, num_classes).to(old.weight))

    def features(self, x: Tensor) -> Tensor:
        """The last map as it is: this head's norm stands after the mean."""
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """What `fc` takes: (B, C, H, W) -> (B, C)."""
        return self.norm(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = x.mean((2, 3))
        logits = self.fc(self.norm(x))
        if self.fc_distilled is None or self.norm_distilled is None:
            return logits
        distilled = self.fc_distilled(self.norm_distilled(x))
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def folded(self) -> nn.Module:
        """The mean over the map and one linear layer."""
        if not (isinstance(self.norm, nn.BatchNorm1d) and isinstance(self.fc, nn.Linear)):
            return self
        fc: Any = fold_before(self.norm, self.fc)
        if self.fc_distilled is not None:
            other = fold_before(self.norm_distilled, self.fc_distilled)
            note("two heads into one")
            fc = with_weights(fc, (fc.weight + other.weight) / 2, (fc.bias + other.bias) / 2)
        return FoldedHead(fc)


def _linear(dim: int, num_classes: int) -> nn.Linear:
    made = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(made.weight, std=0.02)
    nn.init.zeros_(made.bias)
    return made


_ODD = (7, 5, 3, 3)

VARIANTS: dict[str, EfficientViT] = {
    "efficientvit_m0": EfficientViT((64, 128, 192), (1, 2, 3), (4, 4, 4)),
    "efficientvit_m1": EfficientViT((128, 144, 192), (1, 2, 3), (2, 3, 3), kernels=_ODD),
    "efficientvit_m2": EfficientViT((128, 192, 224), (1, 2, 3), (4, 3, 2), kernels=_ODD),
    "efficientvit_m3": EfficientViT((128, 240, 320), (1, 2, 3), (4, 3, 4)),
    "efficientvit_m4": EfficientViT((128, 256, 384), (1, 2, 3), (4, 4, 4), kernels=_ODD),
    "efficientvit_m5": EfficientViT((192, 288, 384), (1, 3, 4), (3, 3, 4), kernels=_ODD),
}
"""Every listed model, the paper's table 1."""

TINY = EfficientViT((16, 24, 32), (1, 2, 1), (2, 3, 2), (3, 2, 2), (5, 3, 3), 4)
"""A configuration for tests: every mechanism, few operations. At 64 pixels the first stage pads its windows."""

DENSE = {"windows": (7, 7, 7)}
"""What `create_backbone` takes unless told otherwise: the windows of the authors' detection backbone."""

CONFIG = EfficientViT
BACKBONE = EfficientViTBackbone
HEAD = EfficientViTHead
