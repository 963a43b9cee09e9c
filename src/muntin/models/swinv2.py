"""SwinV2: Swin with norms after the branches, cosine attention and a position bias computed from coordinates.

Swin Transformer V2: Scaling Up Capacity and Resolution (arXiv 2111.09883), sections 3.2 and 3.3.

Legend: B batch, H W map, N = H * W tokens, C channels, h heads, d = C / h, A tokens of a window, n windows. Between
blocks the tokens are a stream (n, B, A, C) in the order of the last block's windows; raster order, the
single window that is the map, is (1, B, N, C). See layers/window.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.attention import WindowAttention
from muntin.layers.drop import DropPath
from muntin.layers.folding import note, with_weights
from muntin.layers.mlp import Mlp
from muntin.layers.patch import PatchEmbed, neighbours, symbolic_neighbours
from muntin.layers.position import BiasCache, bias_matrix, constant_relative_index, constants
from muntin.layers.tracing import flat_rows, in_graph, symbolic
from muntin.layers.window import Grid, SymbolicGrid, make_grid, move, pieces, reorder, same_order
from muntin.models.windowed import MeanHead, WindowBackbone, WindowStage, drop_rates, initialise
from muntin.native import training
from muntin.native.program import Program
from muntin.native.steps import Value, activation


@dataclass(frozen=True)
class SwinV2:
    """Configuration. `window` and `pretrained_window` take one value, or one for each stage.

    pretrained_window: the window whose coordinates the position bias was trained with; 0 or None where that is
    the window itself. small_maps: what happens where a window is no smaller than the map ("shrink" for
    classifiers, "pad" for dense prediction).
    """

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int | tuple[int, ...] = 8
    pretrained_window: int | tuple[int | None, ...] | None = None
    small_maps: str = "shrink"

    def __post_init__(self) -> None:
        for field in ("depths", "heads", "window", "pretrained_window"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        _check(self)

    def per_stage(self, field: str) -> tuple[int, ...]:
        value = getattr(self, field)
        values = value if isinstance(value, tuple) else (value,) * len(self.depths)
        return tuple(0 if v is None else v for v in values)


def _check(config: SwinV2) -> None:
    """Raises UserError naming the first field whose value is impossible, and what is valid."""
    stages = len(config.depths) if isinstance(config.depths, tuple) else 0
    if not stages or not isinstance(config.heads, tuple):
        raise UserError(f"depths={config.depths!r}, heads={config.heads!r}: give one number for each stage, in a tuple")
    for field in ("depths", "heads", "window", "pretrained_window"):
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != stages:
            raise UserError(f"{field}={value} has {len(value)} entries for {stages} stages: give one for each")
    for field in ("dim", "depths", "heads", "window"):
        if not all(_is_count(v, 1) for v in config.per_stage(field)):
            raise UserError(f"{field}={getattr(config, field)!r}: give whole numbers of at least 1")
    if not all(_is_count(v, 0) for v in config.per_stage("pretrained_window")):
        raise UserError(
            f"pretrained_window={config.pretrained_window!r}: give whole numbers, or 0 or None where the window is"
            " the one of the training"
        )
    for s, heads in enumerate(config.heads):
        if (config.dim * 2**s) % heads:
            raise UserError(
                f"dim={config.dim} gives {config.dim * 2**s} channels in stage {s}, which heads={heads} does not"
                f" divide: change dim or heads"
            )
    if config.small_maps not in ("shrink", "pad"):
        raise UserError(f"small_maps={config.small_maps!r}: valid are 'shrink', 'pad'")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def log_coordinates(offsets: Tensor, extent: Tensor | int) -> Tensor:
    """Offsets between tokens -> sign(x) log2(1 + |x|) / log2(8) with x = 8 offset / (extent - 1) (equation 4).

    extent: the side of the window that the coordinates are measured in. A window of one token has no offset but 0.
    """
    # sign and absolute value of what is known beforehand: OpenVINO 2026.4 makes NaN of these beside a logarithm
    scaled = 8 * offsets.abs() / (extent - 1 if isinstance(extent, Tensor) else max(extent - 1, 1))
    return offsets.sign() * torch.log2(1 + scaled) / 3


def _grid(rows: Tensor, columns: Tensor) -> Tensor:
    """(R,) and (S,) coordinates -> (R * S, 2), row by row."""
    pair = rows[:, None].expand(-1, len(columns)), columns[None, :].expand(len(rows), -1)
    return torch.stack(pair, dim=-1).reshape(-1, 2)


@lru_cache(maxsize=64)
def coordinates(window: tuple[int, int], extent: tuple[int, int], like: tuple[torch.device, torch.dtype]) -> Tensor:
    """The coordinates of each relative offset in a window: ((2 w_h - 1) (2 w_w - 1), 2)."""
    with constants():
        axes = [
            log_coordinates(torch.arange(1 - side, side, dtype=torch.float64), whole)
            for side, whole in zip(window, extent, strict=True)
        ]
        return _grid(*axes).to(*like)


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32 or better, whatever the model's dtype and autocast."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        device = self.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return F.linear(input.to(dtype), self.weight.to(dtype), bias)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class PositionMlp(nn.Module):
    """Continuous position bias: coordinates (S, 2) -> 16 sigmoid(MLP(coordinates)), (S, h).

    Not rounded to bfloat16: biases near 16 would be off by 0.03, as much as a logit says.
    """

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc1 = ExactLinear(2, hidden)
        self.fc2 = ExactLinear(hidden, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 16 * self.fc2(self.fc1(x).relu()).sigmoid()


class CosineAttention(WindowAttention):
    """softmax(s cos(q, k) + bias) v within windows: (M, A, C) -> (M, A, C).

    s = exp(min(logit_scale, ln 100)) for each head. q and v have biases, k has none. The bias is a function of the
    relative coordinates, which are measured in `pretrained_window`, or where it is 0 in the window itself.
    """

    qv_bias: Tensor | None
    factors: Tensor | None

    def __init__(self, dim: int, heads: int, window: int, pretrained_window: int = 0) -> None:
        nn.Module.__init__(self)  # not WindowAttention's, which makes a table
        self.heads = heads
        self.window = window
        self.pretrained_window = pretrained_window
        self.scale = 1.0  # of the logits, on top of what q has
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qv_bias = nn.Parameter(torch.zeros(2 * dim))
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((heads,), math.log(10)))
        self.position = PositionMlp(heads)
        self.register_buffer("factors", None)
        self._cache = BiasCache()

    def folded(self, norm: nn.Module | None = None) -> "CosineAttention":
        """For inference: the biases in one linear layer, the scales of the logits computed."""
        if self.qv_bias is not None:
            factors = self._factors()
            note("biases of q and v into one product, its scales computed")
            self.qkv = with_weights(self.qkv, self.qkv.weight, self._qkv_bias(self.qv_bias))
            self.register_parameter("qv_bias", None)
            self.factors = factors
        return self

    def project(self, x: Tensor, real: Tensor | None) -> Tensor:
        if self.qv_bias is None:
            return self.qkv(x)
        return F.linear(x, self.qkv.weight, self._qkv_bias(self.qv_bias))

    @staticmethod
    def _qkv_bias(qv_bias: Tensor) -> Tensor:
        q, v = qv_bias.chunk(2)
        return torch.cat([q, torch.zeros_like(q), v])

    def _factors(self) -> Tensor:
        """What the unit vectors q and k are multiplied by: (2, h, 1), the second 1."""
        if self.factors is not None:
            return self.factors
        scale = self.logit_scale.to(*self._exact()).clamp(max=math.log(100)).exp()
        return torch.stack([scale, torch.ones_like(scale)]).unsqueeze(-1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, A, 3C) -> q, k and v of each head: (M, h, A, d), q and k of unit length, q times the logits' scale.

        A zero vector, the k of a padded token, stays zero and has no gradient: one through 0 / |0| overflows
        float16. Lengths are float32 at least.
        """
        qk, v = self._unit(qkv)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v.transpose(1, 2)

    def _unit(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 3C) -> q and k as above (..., 2, h, d), and v (..., h, d)."""
        heads = qkv.unflatten(-1, (3, self.heads, -1))
        qk = heads[..., :2, :, :]
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=dtype)
        length = length.masked_fill(length <= 1e-12, math.inf)
        return (qk * (self._factors() / length)).to(qkv.dtype), heads[..., 2, :, :]

    def forward_raster(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) in raster order -> the same, by the operator that cuts the windows itself."""
        from muntin.kernels.window import window_attention

        qkv, padding = self._whole(self.project(x, None)), self._whole(self.padded())
        extent = (self.window, self.window) if symbolic(grid.height) else grid.window
        table = self.symbolic_table(grid.window) if symbolic(grid.height) else self.table(grid.window)
        return self.proj(window_attention(qkv, table, padding, self.heads, grid, extent, self.scale))

    def trained(self, x: Tensor, grid: Grid, norm: nn.Module | None = None) -> Tensor:
        qkv_bias = self.padded()
        qkv = training.linear(x, self.qkv, norm, bias=qkv_bias)
        bias = self._matrix(self.table(grid.window), grid.window)
        return training.window(qkv, bias, qkv_bias, grid, factors=self._factors()[0, :, 0])

    def padded(self) -> Tensor:
        return self.qkv.bias if self.qv_bias is None else self._qkv_bias(self.qv_bias)

    def _whole(self, qkv: Tensor) -> Tensor:
        """(..., 3C) -> the same with q and k as above."""
        qk, v = self._unit(qkv)
        return torch.cat([qk.flatten(-3), v.flatten(-2)], -1)

    def bias_sources(self) -> tuple[Tensor, ...]:
        return tuple(self.position.parameters())

    def table(self, window: tuple[int, int]) -> Tensor:
        """((2 w_h - 1) (2 w_w - 1), h)"""
        extent = (self.pretrained_window,) * 2 if self.pretrained_window else window
        return self.position(coordinates(window, extent, self._exact()))

    def symbolic_table(self, window: tuple[int, int]) -> Tensor:
        """((2w - 1)^2, h), w being the configured window: offsets that a shrunk window lacks are never read."""
        device, dtype = self._exact()
        offsets = torch.arange(1 - self.window, self.window, device=device, dtype=dtype)
        axes = []
        for side in window:
            if self.pretrained_window:
                axes.append(log_coordinates(offsets, self.pretrained_window))
            else:
                extent = torch.scalar_tensor(torch.sym_max(side, 2), dtype=dtype, device=device)
                axes.append(log_coordinates(offsets, extent))
        return self.position(_grid(*axes))

    def _exact(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what the position bias is computed."""
        scale = self.logit_scale
        return scale.device, torch.promote_types(scale.dtype, torch.float32)

    def _matrix(self, table: Tensor, window: tuple[int, int]) -> Tensor:
        index = constant_relative_index(*window, window, table.device)
        return bias_matrix(table, index, window[0] * window[1])  # (h, A, A)


class SwinV2Block(nn.Module):
    """x + norm(Attention(x)), then x + norm(Mlp(x)). Both norms start at zero, and so do the branches."""

    def __init__(self, config: SwinV2, stage: int, number: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dim * 2**stage
        self.window = config.per_stage("window")[stage]
        self.shifted = number % 2 == 1
        self.small_maps = config.small_maps
        pretrained = config.per_stage("pretrained_window")[stage]
        self.attention = CosineAttention(dim, config.heads[stage], self.window, pretrained)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)

    def order(self, source: Grid | None, size: tuple[int, int]) -> Grid | None:
        """The order in which this block leaves the tokens: its windows', or raster where they need padding."""
        grid = make_grid(*size, self.window, self.shifted, self.small_maps)
        return grid if grid.aligned else None

    def forward(self, x: Tensor, source: Grid | None, size: tuple[int, int]) -> Tensor:
        """Stream in the source's order -> stream in `self.order(source, size)`."""
        grid = make_grid(*size, self.window, self.shifted, self.small_maps)
        target = grid if grid.aligned else None
        if x.device.type == "cpu" and not (in_graph() or self.training) and target is not None:
            return self._window_by_window(x, source, grid, size)
        x = reorder(x, source, target, size)
        y = self.attention.forward_stream(reorder(x, target, grid, size), grid)  # padding is zero, and is cropped
        x = x + self.drop_path(self.norm1(flat_rows(reorder(y, grid, target, size))).view_as(x))
        return x + self.drop_path(self.norm2(self.mlp(flat_rows(x))).view_as(x))

    def _window_by_window(self, x: Tensor, source: Grid | None, grid: Grid, size: tuple[int, int]) -> Tensor:
        """Inference on a CPU: the whole block for a few windows at a time, whose intermediates stay in cache."""
        batch, channels = x.shape[1], x.shape[-1]
        rows = x.reshape(-1, channels)
        index = None if same_order(source, grid) else move(source, grid, size, batch, x.device).index
        biases = self.attention.kind_biases(grid, x.dtype)
        out = torch.empty_like(rows)
        for start, stop, runs in pieces(grid, batch, channels):
            part = rows[start:stop] if index is None else rows.index_select(0, index[start:stop])
            y = self.attention.forward_runs(part.view(-1, grid.area, channels), biases, runs)
            y = torch.add(part, self.norm1(y).view_as(part), out=out[start:stop])
            y.add_(self.norm2(self.mlp(y)))
        return out.view(-1, batch, grid.area, channels)

    def trains(self) -> bool:
        """Whether the kernels for training on a CPU compute this block."""
        layers = self.mlp.fc1, self.mlp.act, self.mlp.fc2, self.attention.qkv, self.attention.proj
        exact = type(self) is SwinV2Block and type(self.mlp) is Mlp and type(self.attention) is CosineAttention
        return exact and self.attention.trains() and training.unhooked(self, self.mlp) and training.fits(*layers)

    def forward_trained(self, x: Tensor, grid: Grid) -> Tensor:
        """The same as `forward_raster`, by these kernels."""
        y = training.linear(self.attention.trained(x, grid), self.attention.proj)
        x = x + self.drop_path(self.norm1(y))
        return x + self.drop_path(self.norm2(training.mlp(x, self.mlp, residual=False)))

    def add_to(self, program: Program, x: Value) -> Value:
        """Adds the folded block to a program. Raises Unsuitable."""
        qkv = program.linear(x, self.attention.qkv)
        y = program.window(qkv, self.attention, (self.window, self.shifted, self.small_maps))
        x = program.norm(program.linear(y, self.attention.proj), self.norm1, residual=x)
        y = program.linear(x, self.mlp.fc1, activation(self.mlp.act))
        return program.norm(program.linear(y, self.mlp.fc2), self.norm2, residual=x)

    def forward_raster(self, x: Tensor, grid: SymbolicGrid | Grid) -> Tensor:
        """(B, N, C) in raster order -> the same, for sizes that may be symbols; a `Grid` where kernels serve."""
        if isinstance(grid, Grid):
            y = self.attention.forward_raster(x, grid)
        else:
            batch, _, channels = x.shape
            y = x.index_select(1, grid.enter) * grid.keep.to(x.dtype)
            y = y.view(batch * grid.count, grid.area, channels)
            y = self.attention(y, self.attention.symbolic_bias(grid))
            y = y.view(batch, grid.count * grid.area, channels).index_select(1, grid.leave)
        x = x + self.drop_path(self.norm1(y))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PostNormMerging(nn.Module):
    """The 2x2 neighbours of a token, reduced to twice the width and then normalised: 4C -> 2C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def trains(self) -> bool:
        """Whether the kernels for training on a CPU compute the reduction."""
        return type(self) is PostNormMerging and training.unhooked(self) and training.fits(self.reduction)

    def trained(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, B, N, C) in raster order of a map of this size -> (B, N / 4, 2C), by these kernels."""
        return self.norm(training.linear(neighbours(x, None, None, size)[0], self.reduction))

    def add_to(self, program: Program, x: Value) -> Value:
        """Adds the layer to a program. Raises Unsuitable."""
        return program.norm(program.linear(program.merge(x), self.reduction), self.norm)

    def forward(self, x: Tensor, source: Grid | None, target: Grid | None, size: tuple[int, int]) -> Tensor:
        """Stream (n, B, A, C) of a map of this size, in the source's order -> stream in the target's order."""
        x = neighbours(x, source, target, size)
        return self.norm(self.reduction(flat_rows(x))).view(*x.shape[:-1], -1)

    def forward_symbolic(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """(B, N, C) in raster order -> (B, N / 4, 2C), and the sides of the map."""
        x, half_h, half_w = symbolic_neighbours(x, height, width)
        return self.norm(self.reduction(x)), half_h, half_w


class SwinV2Backbone(WindowBackbone):
    """Image (B, 3, H, W) -> NCHW maps of the stages in `out_indices`, at strides 4, 8, 16, 32.

    out_norm: a norm of its own on each map that is returned, as detection code expects.
    """

    def __init__(
        self,
        config: SwinV2,
        out_indices: tuple[int, ...] | None = None,
        out_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        stem = PatchEmbed(config.dim)
        stages = []
        for s, rates in enumerate(drop_rates(config.depths, drop_path)):
            dim = config.dim * 2**s
            merge = PostNormMerging(dim // 2) if s else None
            stages.append(WindowStage(dim, merge, [SwinV2Block(config, s, b, rate) for b, rate in enumerate(rates)]))
        super().__init__(config, stem, stages, nn.LayerNorm, out_indices, out_norm)
        self.apply(initialise)


class SwinV2Head(MeanHead):
    """Norm, mean over the map, linear: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: SwinV2, num_classes: int) -> None:
        super().__init__(config, nn.LayerNorm, num_classes)


VARIANTS: dict[str, SwinV2] = {
    "swinv2_t": SwinV2(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swinv2_s": SwinV2(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swinv2_b": SwinV2(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swinv2_l": SwinV2(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
"""Table 7 of the paper, for 256 pixels and windows of 8; window=16 is the other published setting."""

TINY = SwinV2(16, (1, 2, 2, 1), (1, 2, 4, 8), (4, 4, 4, 2), (0, 6, 0, 0))
"""A configuration for tests: every mechanism, few operations."""

DENSE = {"small_maps": "pad"}
"""What `create_backbone` sets unless told otherwise."""

CONFIG = SwinV2
BACKBONE = SwinV2Backbone
HEAD = SwinV2Head
