"""RMT: Manhattan self-attention in four stages, and the paper's RMT-Swin and RMT-DeiT.

RMT: Retentive Networks Meet Vision Transformers (arXiv 2309.11523).

Legend: B batch, H W map, N = H * W tokens in raster order, C channels, h heads, d channels per head.
Between blocks the tokens are (B, N, C), whose map (B, C, H, W) is a view in channels-last order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.conv import ConvNorm
from muntin.layers.drop import DropPath
from muntin.layers.folding import RESIDUAL, fold_after, note, with_weights
from muntin.layers.manhattan import DECAYS, ManhattanAttention
from muntin.layers.mlp import Mlp, TokenBatchNorm
from muntin.layers.opaque import OpaqueStage
from muntin.layers.patch import PatchEmbed, PatchMerging, check_image
from muntin.layers.tokens import after, on_map
from muntin.layers.tracing import symbolic
from muntin.layers.window import fresh
from muntin.models.backbone import Backbone, call_block, select_outputs
from muntin.models.classifier import Classifier
from muntin.native import training
from muntin.native.program import Program, convolutions
from muntin.native.steps import Unsuitable, Value, activation

SWITCHES = ("decomposed", "layer_scale", "patch_norm", "position_conv", "local_enhancement", "ffn_conv")
PER_STAGE = ("dims", "depths", "heads", "mlp_ratios", "decay_range", "decomposed", "layer_scale")


@dataclass(frozen=True)
class Rmt:
    """Configuration; `dims` to `layer_scale` but for `decay_min` have one value for each stage.

    Head i of h decays by 1 - 2^(-decay_min - decay_range * i / h) per step. decomposed: rows, then columns, instead
    of the whole map. layer_scale: a factor for each channel of a residual branch. projection: width of the head
    before the mean; 0 for LayerNorm alone. token_label: an auxiliary head for each token, on the projection
    ("projection", which True stands for) or on the last stage's own channels ("stage").

    The ablations: stem "conv" or "patch" (one convolution of side `patch`, with a LayerNorm where patch_norm);
    downsample "conv" or "merge" (Swin's patch merging); position_conv, local_enhancement and ffn_conv, the
    depthwise convolutions in front of a block, beside attention and in the feed-forward part; decay "softmax",
    "no_softmax" (products times gamma^distance) or "none" (softmax alone).
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    decay_min: float = 2
    decay_range: tuple[float, ...] = (4, 4, 6, 6)
    decomposed: tuple[bool, ...] = (True, True, True, False)
    layer_scale: tuple[bool, ...] = (False, False, False, False)
    projection: int = 1024
    token_label: bool | str = False
    stem: str = "conv"
    patch: int = 4
    patch_norm: bool = True
    downsample: str = "conv"
    position_conv: bool = True
    local_enhancement: bool = True
    ffn_conv: bool = True
    decay: str = "softmax"

    def __post_init__(self) -> None:
        for field in PER_STAGE:
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        if self.token_label is True:
            object.__setattr__(self, "token_label", "projection")
        _check(self)


def _check(config: Rmt) -> None:
    """Raises UserError naming the first field whose value is impossible, and what is valid."""
    stages = len(config.depths) if isinstance(config.depths, tuple) else 0
    for field in PER_STAGE:
        value = getattr(config, field)
        if not stages or not isinstance(value, tuple) or len(value) != stages:
            count = f"the {stages} stages of depths" if stages else "each stage"
            raise UserError(f"{field}={value!r}: give a tuple with one value for {count}")
    _check_values(config)
    for s, (dim, heads, ratio) in enumerate(zip(config.dims, config.heads, config.mlp_ratios, strict=True)):
        if not dim * ratio >= 1:
            raise UserError(f"mlp_ratios={config.mlp_ratios}: stage {s} of {dim} channels is left no hidden channel")
        if dim % (2 * heads):
            raise UserError(
                f"dims={config.dims}: {dim} channels in stage {s} do not split into heads={heads} of an even width: "
                "change dims or heads"
            )
    if config.token_label == "projection" and not config.projection:
        raise UserError("token_label='projection' needs a projection: give a width for it, or token_label='stage'")
    if config.stem == "conv" and (config.dims[0] % 2 or config.patch != 4):
        raise UserError(
            f"stem='conv' begins with dims[0] / 2 channels and has a stride of 4: dims[0]={config.dims[0]} must be "
            f"even and patch={config.patch} be 4; or give stem='patch'"
        )
    if config.downsample == "merge" and any(b != 2 * a for a, b in pairwise(config.dims)):
        raise UserError(f"downsample='merge' doubles the channels, dims={config.dims} do not: give dims that double")


def _check_values(config: Rmt) -> None:
    """Each value by itself."""
    rules: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (("dims", "depths", "heads", "patch"), lambda v: _is_number(v, int) and v >= 1, "whole numbers of at least 1"),
        (("projection",), lambda v: _is_number(v, int) and v >= 0, "a width, or 0 for none"),
        (SWITCHES, lambda v: isinstance(v, bool), "True or False, one for each stage where the field has a tuple"),
        (("mlp_ratios",), lambda v: _is_number(v, int, float) and 0 < v < 1000, "positive numbers"),
        (("decay_min",), lambda v: _is_number(v, int, float) and 0 < v < 16, "a number above 0 and below 16"),
        (("decay_range",), lambda v: _is_number(v, int, float) and 0 <= v < 16, "numbers from 0 up, below 16"),
    ]
    for names, valid, words in rules:
        for field in names:
            value = getattr(config, field)
            if not all(valid(v) for v in (value if field in PER_STAGE else (value,))):
                raise UserError(f"{field}={value!r}: give {words}")
    choices: dict[str, tuple[object, ...]] = {
        "stem": ("conv", "patch"),
        "downsample": ("conv", "merge"),
        "decay": DECAYS,
        "token_label": (False, True, "projection", "stage"),
    }
    for field, valid_values in choices.items():
        value = getattr(config, field)
        if not isinstance(value, (str, bool)) or value not in valid_values:
            raise UserError(f"{field}={value!r}: valid are {', '.join(map(repr, valid_values))}")


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


class ConvStem(OpaqueStage):
    """Four 3x3 convolutions with BatchNorm: image (B, 3, H, W) -> tokens (B, N, C), and the map's sides."""

    strides = (2, 1, 2, 1)

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 4)
        widths = (3, dim // 2, dim // 2, dim, dim)
        layers: list[nn.Module] = []
        for i, stride in enumerate(self.strides):
            layers += [ConvNorm(widths[i], widths[i + 1], 3, stride, bias=True), nn.GELU()]
        self.convs = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        check_image(image)
        if self.opaque:
            x, height, width = self.by_operator(image, (image.shape[2], image.shape[3]))
            return x.flatten(2).transpose(1, 2), height, width
        if not torch.compiler.is_compiling():
            x = self.whole(image, (image.shape[2], image.shape[3]))
            return x.flatten(2).transpose(1, 2).contiguous(), x.shape[2], x.shape[3]
        size = fresh(image.shape[2]), fresh(image.shape[3])
        x = image.flatten(2).transpose(1, 2).contiguous()
        if torch.compiler.is_exporting() and symbolic(size[0]):
            # a strided convolution specialises the sides that it sees
            x = x.index_select(1, torch.arange(size[0] * size[1], device=x.device))
        strides = iter(self.strides)
        for layer in self.convs:
            if isinstance(layer, nn.GELU):
                x = layer(x)
            else:
                x, size = _convolve(layer, x, size, next(strides))
        return x, *size

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        program = self.serving(x)
        return self.convs(x.contiguous(memory_format=torch.channels_last)) if program is None else program(x)

    def programmed(self) -> Program:
        return convolutions(self.convs)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 with BatchNorm: tokens (B, N, C) of a map -> (B, N / 4, C'), and the map's sides."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, out_dim, 3, 2, bias=True)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, int, int]:
        x, size = _convolve(self.conv, x, size, 2)
        return x, *size


def _convolve(layer: nn.Module, x: Tensor, size: tuple[int, int], stride: int) -> tuple[Tensor, tuple[int, int]]:
    """ConvNorm, or the convolution that it was folded into, and the sides of the map after it.

    The sides are symbols of their own under export and `muntin.compile`.
    """
    x = on_map(layer, x, size)
    height, width = (fresh(after(side, 3, stride, 1)) for side in size)
    if torch.compiler.is_exporting() and symbolic(height) and stride > 1:
        x = x.index_select(1, torch.arange(height * width, device=x.device))
    return x, (height, width)


class Merge(PatchMerging):
    """Swin's patch merging: tokens (B, N, C) of a map -> (B, N / 4, 2C), and the map's sides."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, int, int]:  # type: ignore[override]
        if symbolic(size[0]):
            return self.forward_symbolic(x, *size)
        return super().forward(x[None], None, None, size)[0], (size[0] + 1) // 2, (size[1] + 1) // 2


class ResidualConv(nn.Module):
    """x + DWConv3x3(x) on the map of tokens (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.residual = True

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y = on_map(self.conv, x, size)
        return x + y if self.residual else y

    def folded(self) -> nn.Module:
        """1 added to the centre tap in place of the residual."""
        weight = self.conv.weight.double().clone()
        weight[:, 0, 1, 1] += 1
        note(RESIDUAL)
        self.conv, self.residual = with_weights(self.conv, weight, self.conv.bias), False
        return self


class FeedForward(Mlp):
    """Linear, GELU, y + DWConv3x3(y), linear: (B, N, C) -> the same."""

    def __init__(self, dim: int, hidden: int, conv: bool) -> None:
        super().__init__(dim, hidden)
        self.mix: nn.Module | None = ResidualConv(hidden) if conv else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        x = self.act(training.applied(self.fc1, x))
        return training.applied(self.fc2, x if self.mix is None else self.mix(x, size))


class RmtBlock(nn.Module):
    """x + DWConv(x), then x + g1 * Attention(norm(x)), then x + g2 * FeedForward(norm(x))."""

    def __init__(self, config: Rmt, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.position: nn.Module | None = ResidualConv(dim) if config.position_conv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = ManhattanAttention(
            dim,
            config.heads[stage],
            config.decay_min,
            config.decay_range[stage],
            config.decomposed[stage],
            config.local_enhancement,
            config.decay,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * config.mlp_ratios[stage]), config.ffn_conv)
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if config.layer_scale[stage]:  # in the authors' shape, which their optimiser decays as it does matrices
            self.scale1 = nn.Parameter(torch.full((1, 1, 1, dim), 1e-6))
            self.scale2 = nn.Parameter(torch.full((1, 1, 1, dim), 1e-6))
        self.drop_path = DropPath(drop_path)

    def folded(self) -> nn.Module:
        """The layer scales in the products before them."""
        if self.scale1 is not None and self.scale2 is not None:
            self.attention.proj = _scaled(self.attention.proj, self.scale1)
            self.mlp.fc2 = _scaled(self.mlp.fc2, self.scale2)
            self.scale1 = self.scale2 = None
            note("layer scale into the product before it", 2)
        return self

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.position is not None:
            x = self.position(x, size)
        x = x + self._branch(self.attention(self.norm1(x), size), self.scale1)
        return x + self._branch(self.mlp(self.norm2(x), size), self.scale2)

    def _branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return self.drop_path(y if scale is None else y * scale.view(-1))


def _scaled(linear: nn.Linear, scale: Tensor) -> nn.Linear:
    factor = scale.view(-1)
    return with_weights(linear, linear.weight * factor[:, None], linear.bias * factor)


class RmtStage(OpaqueStage):
    """Downsampling, but for the first stage, then blocks on maps of one size."""

    def __init__(self, config: Rmt, stage: int, drop_paths: list[float]) -> None:
        super().__init__(config.dims[stage], 2 if stage else 1)
        self.taken = config.dims[max(0, stage - 1)]  # channels of the input
        self.merge: nn.Module | None = None
        if stage:
            before, dim = config.dims[stage - 1 : stage + 1]
            self.merge = Merge(before, "layer") if config.downsample == "merge" else Downsample(before, dim)
        self.blocks = nn.ModuleList(RmtBlock(config, stage, rate) for rate in drop_paths)

    def forward(self, x: Tensor, height: int, width: int, run: Callable[..., Tensor]) -> tuple[Tensor, int, int]:
        """Tokens (B, N, C) and the map's sides -> the same after the stage. `run(block, ...)` calls a block."""
        if self.opaque:
            return self.by_operator(x, (height, width))
        program = self.serving(x)
        if program is not None:
            x = program(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
            return x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3]
        if self.merge is not None:
            x, height, width = self.merge(x, (height, width))
        for block in self.blocks:
            x = run(block, x, (height, width))
        return x, height, width

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self(x, *size, call_block)[0]

    def programmed(self) -> Program:
        program = Program(self.taken)
        x = program.input
        if self.merge is not None:
            if not isinstance(self.merge, Downsample):
                raise Unsuitable(repr(self.merge))
            x = program.conv(x, self.merge.conv)
        for block in self.blocks:
            x = _add_block(program, x, block)
        return program


def _add_block(program: Program, x: Value, block: Any) -> Value:
    """A block whose layer scales are folded."""
    attention, mlp = block.attention, block.mlp
    if block.position is not None:
        x = program.depthwise(x, block.position.conv)
    y = program.norm(x, block.norm1)
    v = program.linear(y, attention.v)
    mixed = program.mix(program.linear(y, attention.qk), v, attention)
    if attention.local is not None:
        mixed = program.depthwise(v, attention.local, residual=mixed)
    x = program.linear(mixed, attention.proj, residual=x)
    y = program.linear(program.norm(x, block.norm2), mlp.fc1, activation(mlp.act))
    if mlp.mix is not None:
        y = program.depthwise(y, mlp.mix.conv)
    return program.linear(y, mlp.fc2, residual=x)


class RmtBackbone(Backbone):
    """Image (B, 3, H, W) -> NCHW maps of the stages in `out_indices`, at strides 4, 8, 16, 32 (patch * 2^s).

    out_norm: a LayerNorm (eps 1e-5) on each map that is returned, as in the authors' detection code.
    """

    def __init__(
        self,
        config: Rmt,
        out_indices: tuple[int, ...] | None = None,
        out_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.out_indices = select_outputs(out_indices, len(config.depths))
        self.channels = tuple(config.dims[s] for s in self.out_indices)
        self.strides = tuple(config.patch * 2**s for s in self.out_indices)
        if config.stem == "conv":
            self.stem: Any = ConvStem(config.dims[0])
        else:
            self.stem = PatchEmbed(config.dims[0], config.patch)
            if not config.patch_norm:
                self.stem.norm = nn.Identity()
        rates = torch.linspace(0, drop_path, sum(config.depths), device="cpu").split(list(config.depths))
        self.stages = nn.ModuleList(RmtStage(config, s, r.tolist()) for s, r in enumerate(rates))
        self.norms = nn.ModuleDict()
        if out_norm:
            self.norms.update({str(s): nn.LayerNorm(config.dims[s]) for s in self.out_indices})
        self.apply(_initialise)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.forward_tokens(*self.stem(image))

    def forward_mixed(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """As `forward`, with the stem's tokens from the reversed batch where `mask`, (H, W) of the last stage, is set.

        Raises UserError where the sides are no multiple of the last stage's stride or the mask is another map's.
        """
        x, height, width = self.stem(image)
        cell = 2 ** (len(self.stages) - 1)  # tokens of the stem along a side of a token of the last stage
        stride = self.config.patch * cell
        if tuple(image.shape[2:]) != (stride * mask.shape[0], stride * mask.shape[1]):
            raise UserError(
                f"images of {image.shape[2]}x{image.shape[3]} pixels are mixed by whole tokens of the last stage: give "
                f"sides that are multiples of {stride}, and a mask with one value for each {stride}x{stride} pixels"
            )
        mask = mask.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return self.forward_tokens(from_reversed(x, mask.flatten()), height, width)

    def forward_tokens(self, x: Tensor, height: int, width: int) -> list[Tensor]:
        """The stem's tokens (B, N, C) and their map's sides -> the maps of `forward`."""
        maps = []
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x, height, width = stage(x, height, width, self.run_block)
            if number in self.out_indices:
                y = self.norms[str(number)](x) if str(number) in self.norms else x
                maps.append(y.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return maps


def from_reversed(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens (B, N, C), those of the reversed batch where mask (N,) is set."""
    return torch.where(mask[:, None], x.flip(0), x)


class Projection(nn.Module):
    """Linear, then BatchNorm over the channels: (B, N, C) -> (B, N, C')."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.norm = TokenBatchNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))

    def folded(self) -> nn.Module:
        return fold_after(self.norm, self.linear)


class RmtHead(nn.Module):
    """Projection, BatchNorm, SiLU, mean over the map, linear: (B, C, H, W) -> (B, num_classes).

    Without a projection: LayerNorm, mean, linear. With an auxiliary head for tokens: in training the class logits
    and the tokens' logits (B, N, num_classes), in evaluation class logits + half the tokens' largest.
    """

    def __init__(self, config: Rmt, num_classes: int) -> None:
        super().__init__()
        dim = config.dims[-1]
        self.token_label = config.token_label
        self.norm: nn.Module = Projection(dim, config.projection) if config.projection else nn.LayerNorm(dim)
        self.act: nn.Module = nn.SiLU() if config.projection else nn.Identity()
        self.fc = nn.Linear(config.projection or dim, num_classes)
        self.fc_tokens: nn.Linear | None = None
        if config.token_label:
            self.fc_tokens = nn.Linear(dim if config.token_label == "stage" else config.projection, num_classes)
        self.apply(_initialise)

    def reset(self, num_classes: int) -> None:
        for name in ("fc", "fc_tokens"):
            old = getattr(self, name)
            if old is not None:
                new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
                _initialise(new)
                setattr(self, name, new)

    def features(self, x: Tensor) -> Tensor:
        """The last map, projected where there is a projection, and normalised: (B, C, H, W) -> (B, C', H, W)."""
        projected = self._project(x.flatten(2).transpose(1, 2))
        return projected.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """What `fc` takes: (B, C, H, W) -> (B, C')."""
        return self._project(x.flatten(2).transpose(1, 2)).mean(1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), a view of the tokens that made the map
        projected = self._project(tokens)
        logits = self.fc(projected.mean(1))
        if self.fc_tokens is None:
            return logits
        labels = self.fc_tokens(tokens if self.token_label == "stage" else projected)  # (B, N, num_classes)
        return (logits, labels) if self.training else logits + 0.5 * labels.amax(1)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.act(self.norm(tokens))


def forward_mixed(model: Classifier, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A token-labelled model in training under MixToken (Jiang et al., arXiv 2104.10858).

    image: (B, 3, H, W), sides multiples of the last stage's stride; mask: which of that stage's (h, w) tokens come
    from the reversed batch, pasted after the stem. Class logits (B, K) of the mixed images, and the tokens' logits
    (B, N, K), each back with its own image.
    """
    backbone: Any = model.backbone
    logits, tokens = model.head(backbone.forward_mixed(image, mask)[-1])
    return logits, from_reversed(tokens, mask.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_LATE = (False, False, True, True)
_SWIN: dict[str, Any] = {
    "mlp_ratios": (4, 4, 4, 4),
    "decay_range": (6, 6, 6, 6),
    "decomposed": (True, True, False, False),
    "projection": 0,
    "stem": "patch",
    "downsample": "merge",
    "position_conv": False,
    "ffn_conv": False,
}

VARIANTS: dict[str, Rmt] = {
    "rmt_t": Rmt((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3, 3, 3, 3), decomposed=(True, True, False, False)),
    "rmt_s": Rmt((64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 3, 3)),
    "rmt_b": Rmt(
        (80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4, 4, 3, 3), decay_range=(5, 5, 6, 6), layer_scale=_LATE
    ),
    "rmt_l": Rmt(
        (112, 224, 448, 640), (4, 8, 25, 8), (7, 7, 14, 20), (4, 4, 3, 3), decay_range=(6, 6, 6, 6), layer_scale=_LATE
    ),
    "rmt_swin_t": Rmt((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), **_SWIN),
    "rmt_swin_s": Rmt((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), **_SWIN),
    "rmt_deit_s": Rmt(
        (384,),
        (12,),
        (6,),
        (4,),
        decay_range=(6,),
        decomposed=(False,),
        layer_scale=(False,),
        projection=0,
        stem="patch",
        patch=16,
        patch_norm=False,
        position_conv=False,
        ffn_conv=False,
    ),
}
"""Every listed model: the paper's T, S, B and L, and those of its ablations."""

TINY = Rmt(
    (16, 16, 32, 32),
    (1, 1, 2, 1),
    (2, 1, 4, 2),
    (2, 3, 2, 2),
    layer_scale=_LATE,
    projection=24,
)
"""A configuration for tests: every mechanism, few operations."""

DENSE: dict[str, Any] = {}
"""What `create_backbone` overrides unless told otherwise."""

CONFIG = Rmt
BACKBONE = RmtBackbone
HEAD = RmtHead
