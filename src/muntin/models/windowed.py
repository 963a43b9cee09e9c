"""What Swin and SwinV2 have in common: stages of windowed blocks, their order of tokens, and the head.

A block has `window`, `shifted`, `small_maps`, `order(source, size)`, `forward(x, source, size)` and
`forward_raster(x, grid)`; a merging layer `forward(x, source, target, size)` and `forward_symbolic(x, H, W)`. Both add
themselves to a program of compiled kernels (`add_to`), and may say that kernels train them on a CPU (`trains`), which
is then done by `forward_trained(x, grid)` of a block and `trained(x, size)` of a merging layer.

Legend: B batch, H W map, N = H * W tokens, C channels, A tokens of a window, n windows. Between blocks the tokens are
a stream (n, B, A, C) in the order of the last block's windows; raster order, the single window that is the map,
is (1, B, N, C). See layers/window.py. Where sizes are symbols, and where kernels compute the attention, tokens stay in
raster order: (B, N, C).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muntin import kernels
from muntin.layers.folding import FoldedHead, fold_before
from muntin.layers.mlp import TokenBatchNorm
from muntin.layers.opaque import OpaqueStage
from muntin.layers.patch import PatchEmbed
from muntin.layers.tracing import symbolic
from muntin.layers.window import Grid, SymbolicGrid, make_grid, reorder, symbolic_grid
from muntin.models.backbone import Backbone, call_block, select_outputs
from muntin.native import training
from muntin.native.program import Program


class WindowStage(OpaqueStage):
    """Patch merging, but for the first stage, then blocks on maps of one size."""

    def __init__(self, channels: int, merge: nn.Module | None, blocks: Iterable[nn.Module]) -> None:
        super().__init__(channels, 1 if merge is None else 2)
        self.merge: Any = merge
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x: Tensor, source: Grid | None, size: tuple[int, int], run: Callable[..., Tensor]
    ) -> tuple[Tensor, Grid | None, tuple[int, int]]:
        """Stream, its order and its map's sides -> the same after the stage. `run(block, ...)` calls a block."""
        program = self.serving(x) if source is None else None
        if program is not None:
            y = program(x[0].unflatten(1, size).permute(0, 3, 1, 2))
            return y.flatten(2).transpose(1, 2)[None], None, (y.shape[2], y.shape[3])
        if source is None and self.trains(x):
            x, size = self._trained(x, size, run)
            return x[None], None, size
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

    def trains(self, x: Tensor) -> bool:
        """Whether the kernels for training on a CPU compute the stage."""
        if not training.serve(x):
            return False
        # asked of the class: a wrapper may pass on what it is asked, and is to be called itself
        parts = [*self.blocks] if self.merge is None else [self.merge, *self.blocks]
        return all(hasattr(type(part), "trains") and part.trains() for part in parts)

    def _trained(self, x: Tensor, size: tuple[int, int], run: Callable[..., Tensor]) -> tuple[Tensor, tuple[int, int]]:
        """(1, B, N, C) in raster order -> (B, N', C'), and the sides of its map."""
        if self.merge is None:
            x = x[0]
        else:
            x, size = self.merge.trained(x, size), ((size[0] + 1) // 2, (size[1] + 1) // 2)
        block: Any
        for block in self.blocks:
            grid = make_grid(*size, block.window, block.shifted, block.small_maps)
            x = run(block.forward_trained, x, grid)
        return x, size

    def programmed(self) -> Program:
        program = Program(self.channels // 2 if self.merge else self.channels)
        x = program.input if self.merge is None else self.merge.add_to(program, program.input)
        block: Any
        for block in self.blocks:
            x = block.add_to(program, x)
        return program

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x, order, size = self(x[None], None, size, call_block)
        return reorder(x, order, None, size)[0]

    def forward_raster(self, x: Tensor, height: int, width: int, run: Callable[..., Tensor]) -> tuple[Tensor, int, int]:
        """(B, N, C) in raster order and the map's sides -> the same after the stage."""
        if self.opaque:
            return self.by_operator(x, (height, width))
        by_kernels = kernels.serve(x)
        if self.merge is not None and by_kernels and not symbolic(height):
            x = self.merge(x[None], None, None, (height, width))[0]
            height, width = (height + 1) // 2, (width + 1) // 2
        elif self.merge is not None:
            x, height, width = self.merge.forward_symbolic(x, height, width)
        grids: dict[bool, SymbolicGrid | Grid] = {}
        block: Any
        for block in self.blocks:
            if block.shifted not in grids:
                rule = height, width, block.window, block.shifted, block.small_maps
                grids[block.shifted] = make_grid(*rule) if by_kernels else symbolic_grid(*rule, x.device)
            x = run(block.forward_raster, x, grids[block.shifted])
        return x, height, width


class WindowBackbone(Backbone):
    """Image (B, 3, H, W) -> NCHW maps of the stages in `out_indices`, at strides patch * (1, 2, 4, 8).

    out_norm: a norm of its own on each map that is returned, as in the authors' detection code.
    """

    def __init__(
        self,
        config: Any,
        stem: PatchEmbed,
        stages: Iterable[WindowStage],
        norm: Callable[[int], nn.Module],
        out_indices: tuple[int, ...] | None,
        out_norm: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.out_indices = select_outputs(out_indices, len(config.depths))
        self.channels = tuple(config.dim * 2**s for s in self.out_indices)
        self.strides = tuple(stem.stride * 2**s for s in self.out_indices)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleDict()
        if out_norm:
            self.norms.update({str(s): norm(config.dim * 2**s) for s in self.out_indices})

    def forward(self, image: Tensor) -> list[Tensor]:
        if symbolic(image.shape[2]) or kernels.serve(image):
            return self._forward_raster(image)
        x, height, width = self.stem(image)
        x, order, size = x[None], None, (height, width)
        maps = []
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x, order, size = stage(x, order, size, self.run_block)
            if number in self.out_indices:
                maps.append(self._map(number, reorder(x, order, None, size)[0], *size))
        return maps

    def _forward_raster(self, image: Tensor) -> list[Tensor]:
        x, height, width = self.stem(image)
        maps: list[Tensor] = []
        stage: Any
        for number, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x, height, width = stage.forward_raster(x, height, width, self.run_block)
            if number in self.out_indices:
                maps.append(self._map(number, x, height, width))
        return maps

    def _map(self, number: int, x: Tensor, height: int, width: int) -> Tensor:
        if str(number) in self.norms:
            x = self.norms[str(number)](x)
        return x.view(x.shape[0], height, width, x.shape[-1]).permute(0, 3, 1, 2)


class MeanHead(nn.Module):
    """Norm, mean over the map, linear: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, config: Any, norm: Callable[[int], nn.Module], num_classes: int) -> None:
        super().__init__()
        dim = config.dim * 2 ** (len(config.depths) - 1)
        self.norm = norm(dim)
        self.fc = nn.Linear(dim, num_classes)
        self.apply(initialise)

    def reset(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.fc.in_features, num_classes, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        initialise(self.fc)

    def features(self, x: Tensor) -> Tensor:
        """The last map, normalised: (B, C, H, W) -> the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """What `fc` takes: (B, C, H, W) -> (B, C)."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), a view of the tokens that made the map
        return self.norm(tokens).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))

    def folded(self) -> nn.Module:
        """A BatchNorm in the linear layer: a mean of what it makes is what it makes of the mean."""
        if not (isinstance(self.norm, TokenBatchNorm) and isinstance(self.fc, nn.Linear)):
            return self
        return FoldedHead(fold_before(self.norm, self.fc), self.norm)


def drop_rates(depths: tuple[int, ...], drop_path: float) -> list[list[float]]:
    """Stochastic depth of each block by stage: from 0 at the first block linearly to `drop_path` at the last."""
    return [part.tolist() for part in torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))]


def initialise(module: nn.Module) -> None:
    """Linear layers as in the authors' code; to be applied to every module."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
