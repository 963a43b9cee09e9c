"""Swin and Swin-Free, one family: windows and shifts per stage.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (arXiv 2103.14030).
Swin-Free: Achieving Better Cross-Window Attention and Efficiency with Size-varying Window (arXiv 2306.13776):
no shift, another window in each stage; BR has BatchNorm for LayerNorm and ReLU for GELU, DRx has x blocks in
its third stage.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, A tokens of a window, n windows. Between
blocks the tokens are a stream (n, B, A, C) in the order of the last block's windows; raster order, the
single window that is the map, is (1, B, N, C). See layers/window.py.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.attention import WindowAttention
from muntin.layers.drop import DropPath
from muntin.layers.folding import fold_before
from muntin.layers.mlp import ACTIVATIONS, NORMS, Mlp, TokenBatchNorm
from muntin.layers.patch import PatchEmbed, PatchMerging
from muntin.layers.tracing import flat_rows, in_graph
from muntin.layers.window import (
    Grid,
    SymbolicGrid,
    make_grid,
    move,
    pieces,
    reorder,
    same_order,
)
from muntin.models.windowed import MeanHead, WindowBackbone, WindowStage, drop_rates, initialise
from muntin.native import training
from muntin.native.program import Program
from muntin.native.steps import Value, activation


@dataclass(frozen=True)
class Swin:
    """Configuration. `window` and `shift` take one value, or one for each stage.

    small_maps: what happens where a window is no smaller than the map ("shrink" for classifiers, "pad" for
    dense prediction). `split_heads` and `attend` are the EfficientViT paper's studies: each head sees only
    its own C / h channels; the numbers of the blocks, counted through the network, that have attention.
    """

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int | tuple[int, ...] = 7
    shift: bool | tuple[bool, ...] = True
    mlp_ratio: float = 4.0
    norm: str = "layer"
    act: str = "gelu"
    small_maps: str = "shrink"
    patch: int = 4
    split_heads: bool = False
    attend: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("depths", "heads", "window", "shift", "attend"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        _check(self)

    def per_stage(self, field: str) -> tuple[int, ...]:
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * len(self.depths)


def _check(config: Swin) -> None:
    """Raises UserError naming the first field whose value is impossible, and what is valid."""
    stages = len(config.depths) if isinstance(config.depths, tuple) else 0
    if not stages or not isinstance(config.heads, tuple):
        raise UserError(f"depths={config.depths!r}, heads={config.heads!r}: give one number for each stage, in a tuple")
    for field in ("depths", "heads", "window", "shift"):
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != stages:
            raise UserError(f"{field}={value} has {len(value)} entries for {stages} stages: give one for each")
    for field in ("dim", "patch", "depths", "heads", "window"):
        if not all(_is_count(v) for v in config.per_stage(field)):
            raise UserError(f"{field}={getattr(config, field)!r}: give whole numbers of at least 1")
    for field in ("shift", "split_heads"):
        if not all(isinstance(v, bool) for v in config.per_stage(field)):
            raise UserError(f"{field}={getattr(config, field)!r}: give True or False, for shift also one per stage")
    ratio = config.mlp_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= config.dim * ratio < float("inf"):
        raise UserError(f"mlp_ratio={ratio!r}: give a positive number that leaves at least one hidden channel")
    for s, heads in enumerate(config.heads):
        if (config.dim * 2**s) % heads:
            raise UserError(
                f"dim={config.dim} gives {config.dim * 2**s} channels in stage {s}, which heads={heads} does not"
                f" divide: change dim or heads"
            )
    choices: dict[str, Collection[str]] = {"norm": NORMS, "act": ACTIVATIONS, "small_maps": ("shrink", "pad")}
    for field, valid in choices.items():
        value = getattr(config, field)
        if not isinstance(value, str) or value not in valid:
            raise UserError(f"{field}={value!r}: valid are {', '.join(map(repr, valid))}")
    blocks = sum(config.depths)
    if config.attend is not None and not (
        isinstance(config.attend, tuple) and all(b in range(blocks) and not isinstance(b, bool) for b in config.attend)
    ):
        raise UserError(f"attend={config.attend!r}: give a tuple of block numbers out of 0 to {blocks - 1}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class SwinBlock(nn.Module):
    """x + Attention(norm(x)), then x + Mlp(norm(x)). A block without attention is its second half."""

    def __init__(self, config: Swin, stage: int, number: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dim * 2**stage
        self.window = config.per_stage("window")[stage]
        self.shifted = bool(config.per_stage("shift")[stage]) and number % 2 == 1
        self.small_maps = config.small_maps
        self.norm1: nn.Module | None = None
        self.attention: WindowAttention | None = None
        if config.attend is None or sum(config.depths[:stage]) + number in config.attend:
            self.norm1 = NORMS[config.norm](dim)
            self.attention = WindowAttention(dim, config.heads[stage], self.window, config.split_heads)
        self.norm2: nn.Module = NORMS[config.norm](dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.act)
        self.drop_path = DropPath(drop_path)

    def folded(self) -> nn.Module:
        """BatchNorms in the products that follow them."""
        if isinstance(self.norm1, TokenBatchNorm) and self.attention is not None:
            if isinstance(self.attention.qkv, nn.Linear):
                self.attention, self.norm1 = self.attention.folded(self.norm1), nn.Identity()
        if isinstance(self.norm2, TokenBatchNorm):
            self.mlp.fc1, self.norm2 = fold_before(self.norm2, self.mlp.fc1), nn.Identity()
        return self

    def order(self, source: Grid | None, size: tuple[int, int]) -> Grid | None:
        """The order in which this block leaves the tokens: its windows', or raster where they need padding."""
        if self.attention is None:
            return source
        grid = make_grid(*size, self.window, self.shifted, self.small_maps)
        return grid if grid.aligned else None

    def forward(self, x: Tensor, source: Grid | None, size: tuple[int, int]) -> Tensor:
        """Stream in the source's order -> stream in `self.order(source, size)`."""
        if self.norm1 is not None and self.attention is not None:
            grid = make_grid(*size, self.window, self.shifted, self.small_maps)
            target = grid if grid.aligned else None
            chunked = x.device.type == "cpu" and not (in_graph() or self.training)
            if chunked and target is not None:
                return self._window_by_window(x, source, grid, size)
            x = reorder(x, source, target, size)
            y = reorder(self.norm1(flat_rows(x)).view_as(x), target, grid, size)
            y = self.attention.forward_stream(y, grid)
            x = x + self.drop_path(reorder(y, grid, target, size))
        return x + self.drop_path(self.mlp(self.norm2(flat_rows(x))).view_as(x))

    def _window_by_window(self, x: Tensor, source: Grid | None, grid: Grid, size: tuple[int, int]) -> Tensor:
        """Inference on a CPU: the whole block for a few windows at a time, whose intermediates stay in cache."""
        assert self.norm1 is not None and self.attention is not None
        batch, channels = x.shape[1], x.shape[-1]
        rows = x.reshape(-1, channels)
        index = None if same_order(source, grid) else move(source, grid, size, batch, x.device).index
        biases = self.attention.kind_biases(grid, x.dtype)
        out = torch.empty_like(rows)
        for start, stop, runs in pieces(grid, batch, channels):
            part = rows[start:stop] if index is None else rows.index_select(0, index[start:stop])
            y = self.attention.forward_runs(self.norm1(part).view(-1, grid.area, channels), biases, runs)
            y = torch.add(part, y.view_as(part), out=out[start:stop])
            y.add_(self.mlp(self.norm2(y)))
        return out.view(-1, batch, grid.area, channels)

    def forward_raster(self, x: Tensor, grid: SymbolicGrid | Grid) -> Tensor:
        """(B, N, C) in raster order -> the same, for sizes that may be symbols; a `Grid` where kernels serve."""
        if self.norm1 is not None and self.attention is not None:
            y = self.norm1(x)
            y = self.attention.forward_raster(y, grid) if isinstance(grid, Grid) else self._by_gathers(y, grid)
            x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def trains(self) -> bool:
        """Whether the kernels for training on a CPU compute this block."""
        layers = [self.mlp.fc1, self.mlp.act, self.mlp.fc2, self.drop_path]
        if self.attention is not None:
            layers += [self.attention.qkv, self.attention.proj]
            if type(self.attention) is not WindowAttention or not self.attention.trains():
                return False
        exact = type(self) is SwinBlock and type(self.mlp) is Mlp
        return exact and training.unhooked(self, self.mlp) and training.fits(*layers)

    def forward_trained(self, x: Tensor, grid: Grid) -> Tensor:
        """The same as `forward_raster`, by these kernels."""
        if self.norm1 is not None and self.attention is not None:
            y = self.attention.trained(x, grid, self.norm1)
            x = training.linear(y, self.attention.proj, None, x, self.drop_path)
        return training.mlp(x, self.mlp, self.norm2, self.drop_path)

    def add_to(self, program: Program, x: Value) -> Value:
        """Adds the folded block to a program. Raises Unsuitable."""
        if self.norm1 is not None and self.attention is not None:
            qkv = program.linear(program.norm(x, self.norm1), self.attention.qkv)
            y = program.window(qkv, self.attention, (self.window, self.shifted, self.small_maps))
            x = program.linear(y, self.attention.proj, residual=x)
        y = program.linear(program.norm(x, self.norm2), self.mlp.fc1, activation(self.mlp.act))
        return program.linear(y, self.mlp.fc2, residual=x)

    def _by_gathers(self, x: Tensor, grid: SymbolicGrid) -> Tensor:
        """Attention on (B, N, C) in raster order -> the same."""
        assert self.attention is not None
        batch, _, channels = x.shape
        real = grid.keep.to(x.dtype)  # (n * A, 1)
        x = x.index_select(1, grid.enter) * real
        x = x.view(batch * grid.count, grid.area, channels)
        real = real.expand(batch, -1, -1).reshape(batch * grid.count, grid.area, 1)
        x = self.attention(x, self.attention.symbolic_bias(grid), real)
        return x.view(batch, grid.count * grid.area, channels).index_select(1, grid.leave)


class SwinBackbone(WindowBackbone):
    """Image (B, 3, H, W) -> NCHW maps of the stages in `out_indices`, at strides patch * (1, 2, 4, 8).

    out_norm: a norm of its own on each map that is returned, as in the authors' detection code.
    """

    def __init__(
        self,
        config: Swin,
        out_indices: tuple[int, ...] | None = None,
        out_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        stem = PatchEmbed(config.dim, config.patch, config.norm)
        stages = []
        for s, rates in enumerate(drop_rates(config.depths, drop_path)):
            dim = config.dim * 2**s
            merge = PatchMerging(dim // 2, config.norm) if s else None
            stages.append(WindowStage(dim, merge, [SwinBlock(config, s, b, rate) for b, rate in enumerate(rates)]))
        super().__init__(config, stem, stages, NORMS[config.norm], out_indices, out_norm)
        self.apply(initialise)


class SwinHead(MeanHead):
    """Norm, mean over the map, linear: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: Swin, num_classes: int) -> None:
        super().__init__(config, NORMS[config.norm], num_classes)


def _with_br(rows: dict[str, Swin]) -> dict[str, Swin]:
    """Each row, and its BR twin named before any `_dr`."""
    twins = {}
    for name, row in rows.items():
        base, _, cut = name.partition("_dr")
        twins[f"{base}_br" + (f"_dr{cut}" if cut else "")] = replace(row, norm="batch", act="relu")
    return rows | twins


_SWIN = {
    "swin_t": Swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": Swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": Swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": Swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_FREE = (7, 14, 14, 7)

VARIANTS: dict[str, Swin] = (
    _SWIN
    | {"swin_b_br": replace(_SWIN["swin_b"], norm="batch", act="relu")}
    | _with_br(
        {f"swin_free_{size}": replace(_SWIN[f"swin_{size}"], window=_FREE, shift=False) for size in "tsb"}
        | {
            f"swin_free_b_dr{x}": replace(_SWIN["swin_b"], depths=(2, 2, x, 2), window=_FREE, shift=False)
            for x in (10, 12, 14, 16)
        }
    )
    | {"swin_free_digits": Swin(32, (2, 2, 2), (2, 4, 8), (4, 4, 2), False)}
)
"""Every listed model. Swin-Free's windows at 224 pixels (maps 56, 28, 14, 7) from its section 4."""

TINY = Swin(16, (1, 2, 2, 1), (1, 2, 4, 8), (4, 4, 4, 2))
"""A configuration for tests: every mechanism, few operations."""

DENSE = {"small_maps": "pad"}
"""What `create_backbone` overrides unless told otherwise."""

CONFIG = Swin
BACKBONE = SwinBackbone
HEAD = SwinHead
