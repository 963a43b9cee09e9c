"""Patch embedding and patch merging (Swin, arXiv 2103.14030, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.layers.folding import fold_after, fold_before
from muntin.layers.mlp import NORMS, TokenBatchNorm
from muntin.layers.opaque import OpaqueStage
from muntin.layers.tracing import flat_rows, symbolic
from muntin.layers.window import Grid, fresh, merge_move
from muntin.native import training
from muntin.native.program import Program
from muntin.native.steps import Value


def check_image(image: Tensor) -> None:
    """UserError where it is no batch (B, 3, H, W) of images."""
    if not torch.compiler.is_compiling() and (image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape):
        raise UserError(f"image of shape {tuple(image.shape)}: give a batch (B, 3, height, width), none of them 0")


class PatchEmbed(OpaqueStage):
    """Image (B, 3, H, W) -> tokens (B, N, C) and the map's sides, ceil(H / patch) and ceil(W / patch).

    An image that the patch does not divide is padded with zeros at the bottom and right.
    """

    def __init__(self, dim: int, patch: int = 4, norm: str = "layer") -> None:
        super().__init__(dim, patch)
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm: nn.Module = NORMS[norm](dim)

    def folded(self) -> nn.Module:
        if isinstance(self.norm, TokenBatchNorm):
            self.proj, self.norm = fold_after(self.norm, self.proj), nn.Identity()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        patch = self.stride
        check_image(image)
        height, width = image.shape[-2:]
        if self.opaque:
            x, height, width = self.by_operator(image, (height, width))
            return x.flatten(2).transpose(1, 2), height, width
        program = self.serving(image)
        if program is not None:
            x = program(image)
            return x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3]
        renewed = torch.compiler.is_exporting() and symbolic(height)
        if renewed:
            # a convolution specialises sizes: give it symbols of their own
            height, width = fresh((height + patch - 1) // patch), fresh((width + patch - 1) // patch)
            image = _pad_by_gather(_pad_by_gather(image, 2, height * patch), 3, width * patch)
        elif symbolic(height) or height % patch or width % patch:
            image = F.pad(image, (0, -width % patch, 0, -height % patch))
        x = self.proj(image)  # (B, C, H, W)
        if not renewed:
            height, width = fresh(x.shape[2]), fresh(x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()), height, width

    def whole(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        tokens, height, width = self(x)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def programmed(self) -> Program:
        program = Program(3, planes=True)
        program.norm(program.conv(program.input, self.proj), self.norm)
        return program


def _pad_by_gather(image: Tensor, axis: int, size: int) -> Tensor:
    """Zeros after the end of an axis up to `size`, which may be a symbol."""
    place = torch.arange(size, device=image.device)
    last = torch.scalar_tensor(image.shape[axis], dtype=torch.int64, device=image.device) - 1
    keep = (place <= last).to(image.dtype).view([-1 if i == axis else 1 for i in range(4)])
    return image.index_select(axis, torch.minimum(place, last)) * keep


class PatchMerging(nn.Module):
    """The 2x2 neighbours of a token, normalised and reduced to twice the width: 4C -> 2C."""

    def __init__(self, dim: int, norm: str = "layer") -> None:
        super().__init__()
        self.norm: nn.Module = NORMS[norm](4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def folded(self) -> nn.Module:
        if isinstance(self.norm, TokenBatchNorm):
            self.reduction, self.norm = fold_before(self.norm, self.reduction), nn.Identity()
        return self

    def forward(self, x: Tensor, source: Grid | None, target: Grid | None, size: tuple[int, int]) -> Tensor:
        """Stream (n, B, A, C) of a map of this size, in the source's order -> stream in the target's order."""
        x = neighbours(x, source, target, size)
        return self.reduction(self.norm(flat_rows(x))).view(*x.shape[:-1], -1)

    def trains(self) -> bool:
        """Whether the kernels for training on a CPU compute the reduction."""
        return type(self) is PatchMerging and training.unhooked(self) and training.fits(self.reduction)

    def trained(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, B, N, C) in raster order of a map of this size -> (B, N / 4, 2C), by these kernels."""
        return training.linear(neighbours(x, None, None, size)[0], self.reduction, self.norm)

    def add_to(self, program: Program, x: Value) -> Value:
        """Adds the folded layer to a program. Raises Unsuitable."""
        return program.linear(program.norm(program.merge(x), self.norm), self.reduction)

    def forward_symbolic(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """(B, N, C) in raster order -> (B, N / 4, 2C), and the sides of the map."""
        x, half_h, half_w = symbolic_neighbours(x, height, width)
        return self.reduction(self.norm(x)), half_h, half_w


def neighbours(x: Tensor, source: Grid | None, target: Grid | None, size: tuple[int, int]) -> Tensor:
    """2x2 neighbours side by side: stream (n, B, A, C) in the source's order -> (n', B, A', 4C) in the target's."""
    batch, channels = x.shape[1], x.shape[-1]
    merge = merge_move(source, target, size, batch, x.device)
    area = target.area if target else ((size[0] + 1) // 2) * ((size[1] + 1) // 2)
    return merge(x.reshape(-1, channels)).view(-1, batch, area, 4 * channels)


def symbolic_neighbours(x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
    """(B, N, C) in raster order -> (B, N / 4, 4C), and the sides of the map."""
    half_h, half_w = fresh((height + 1) // 2), fresh((width + 1) // 2)
    y, keep_y = _pairs(half_h, height, (0, 1, 0, 1), x.device)  # (half_h, 4)
    z, keep_z = _pairs(half_w, width, (0, 0, 1, 1), x.device)
    columns = torch.scalar_tensor(width, dtype=torch.int64, device=x.device)
    index = y[:, None] * columns + z[None]  # (half_h, half_w, 4)
    keep = torch.logical_and(keep_y[:, None], keep_z[None]).to(x.dtype)
    x = x.index_select(1, index.reshape(-1)) * keep.reshape(-1, 1)
    return x.view(-1, half_h * half_w, 4 * x.shape[-1]), half_h, half_w


def _pairs(half: int, side: int, offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    place = 2 * torch.arange(half, device=device)[:, None] + torch.tensor(offsets, device=device)
    last = torch.scalar_tensor(side, dtype=torch.int64, device=device) - 1
    return torch.minimum(place, last), place <= last
