"""Swin and Swin-Free, one family: windows and shifts per stage.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (arXiv 2103.14030).
Swin-Free: Achieving Better Cross-Window Attention and Efficiency with Size-varying Window (arXiv 2306.13776):
no shift, another window in each stage; BR has BatchNorm for LayerNorm and ReLU for GELU, DRx has x blocks in
its third stage.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, A tokens of a window, n windows. Between
blocks the tokens are a stream (n, B, A, C) in the order of the last block's windows; raster order, the
single window that is the map, is (1, B, N, C). See layers/window.py.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.attention import WindowAttention
from muntin.layers.conv import fold_before
from muntin.layers.drop import DropPath
from muntin.layers.mlp import ACTIVATIONS, NORMS, Mlp, TokenBatchNorm
from muntin.layers.patch import PatchEmbed, PatchMerging
from muntin.layers.window import (
    Grid,
    SymbolicGrid,
    make_grid,
    move,
    pieces,
    reorder,
    same_order,
    symbolic_grid,
)
from muntin.models.backbone import Backbone, select_outputs


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
            chunked = x.device.type == "cpu" and not (torch.is_grad_enabled() or self.training)
            if chunked and target is not None:
                return self._window_by_window(x, source, grid, size)
            x = reorder(x, source, target, size)
            y = reorder(self.norm1(x), target, grid, size)
            y = self.attention.forward_stream(y, grid)
            x = x + self.drop_path(reorder(y, grid, target, size))
        return x + self.drop_path(self.mlp(self.norm2(x)))

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

    def forward_symbolic(self, x: Tensor, grid: SymbolicGrid) -> Tensor:
        """(B, N, C) in raster order -> the same, for sizes that may be symbols."""
        if self.norm1 is not None and self.attention is not None:
            batch, _, channels = x.shape
            real = grid.keep.to(x.dtype)  # (n * A, 1)
            y = self.norm1(x).index_select(1, grid.enter) * real
            y = y.view(batch * grid.count, grid.area, channels)
            real = real.expand(batch, -1, -1).reshape(batch * grid.count, grid.area, 1)
            y = self.attention(y, self.attention.symbolic_bias(grid), real)
            y = y.view(batch, grid.count * grid.area, channels).index_select(1, grid.leave)
            x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinStage(nn.Module):
    """Patch merging, but for the first stage, then blocks on maps of one size."""

    def __init__(self, config: Swin, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.merge = PatchMerging(config.dim * 2 ** (stage - 1), config.norm) if stage else None
        self.blocks = nn.ModuleList(SwinBlock(config, stage, b, rate) for b, rate in enumerate(drop_paths))

    def forward(
        self, x: Tensor, source: Grid | None, size: tuple[int, int], run: Callable[..., Tensor]
    ) -> tuple[Tensor, Grid | None, tuple[int, int]]:
        """Stream, its order and its map's sides -> the same after the stage. `run(block, ...)` calls a block."""
        if self.merge is not None:
            half = (size[0] + 1) // 2, (size[1] + 1) // 2
            first: Any = self.blocks[0]
            target = first.order(None, half)
            x, source, size = self.merge(x, source, target, size), target, half
        block: Any
        for block in self.blocks:
            x = run(block, x, source, size)
            source = block.order(source, size)
        return x, source, size

    def forward_symbolic(
        self, x: Tensor, height: int, width: int, run: Callable[..., Tensor]
    ) -> tuple[Tensor, int, int]:
        """(B, N, C) in raster order and the map's sides -> the same after the stage."""
        if self.merge is not None:
            x, height, width = self.merge.forward_symbolic(x, height, width)
        grids: dict[bool, SymbolicGrid] = {}
        block: Any
        for block in self.blocks:
            if block.shifted not in grids:
                grids[block.shifted] = symbolic_grid(
                    height, width, block.window, block.shifted, block.small_maps, x.device
                )
            x = run(block.forward_symbolic, x, grids[block.shifted])
        return x, height, width


class SwinBackbone(Backbone):
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
        super().__init__()
        count = len(config.depths)
        self.config = config
        self.out_indices = select_outputs(out_indices, count)
        self.channels = tuple(config.dim * 2**s for s in self.out_indices)
        self.strides = tuple(config.patch * 2**s for s in self.out_indices)
        self.stem = PatchEmbed(config.dim, config.patch, config.norm)
        rates = torch.linspace(0, drop_path, sum(config.depths), device="cpu").split(list(config.depths))
        self.stages = nn.ModuleList(SwinStage(config, s, r.tolist()) for s, r in enumerate(rates))
        self.norms = nn.ModuleDict()
        if out_norm:
            self.norms.update({str(s): NORMS[config.norm](config.dim * 2**s) for s in self.out_indices})
        self.apply(_initialise)

    def forward(self, image: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return self._forward_symbolic(image)
        x, height, width = self.stem(image)
        x, order, size = x[None], None, (height, width)
        maps = []
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x, order, size = stage(x, order, size, self.run_block)
            if number in self.out_indices:
                maps.append(self._map(number, reorder(x, order, None, size)[0], *size))
        return maps

    def _forward_symbolic(self, image: Tensor) -> list[Tensor]:
        x, height, width = self.stem(image)
        maps: list[Tensor] = []
        stage: Any
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x, height, width = stage.forward_symbolic(x, height, width, self.run_block)
            if number in self.out_indices:
                maps.append(self._map(number, x, height, width))
        return maps

    def _map(self, number: int, x: Tensor, height: int, width: int) -> Tensor:
        if str(number) in self.norms:
            x = self.norms[str(number)](x)
        return x.view(x.shape[0], height, width, x.shape[-1]).permute(0, 3, 1, 2)


class SwinHead(nn.Module):
    """Norm, mean over the map, linear: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: Swin, num_classes: int) -> None:
        super().__init__()
        dim = config.dim * 2 ** (len(config.depths) - 1)
        self.norm = NORMS[config.norm](dim)
        self.fc = nn.Linear(dim, num_classes)
        self.apply(_initialise)

    def reset(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.fc.in_features, num_classes, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        _initialise(self.fc)

    def features(self, x: Tensor) -> Tensor:
        """The last map, normalised: (B, C, H, W) -> the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """What `fc` takes: (B, C, H, W) -> (B, C)."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), a view of the tokens that made the map
        return self.norm(tokens).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
