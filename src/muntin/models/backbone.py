"""The contract of every backbone: image -> list of NCHW maps.

A backbone has `stem`, `stages` (a ModuleList), `channels` and `strides` (one for each map that it returns),
and `forward(x)`. Consumers read `strides` and never assume four.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muntin.errors import UserError
from muntin.layers.mlp import recomputing

NO_DECAY = ("bias_table", "position.fc1.weight", "position.fc2.weight")
"""How the names end that take no weight decay, besides all one-dimensional parameters: tables of position biases, and
the network that makes SwinV2's."""


class Backbone(nn.Module):
    """Base of all families: which stages to return, and gradient checkpointing.

    `forward(image)`: (B, 3, H, W) -> maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).
    """

    name: str = ""
    stem: nn.Module
    stages: nn.ModuleList
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    out_indices: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its intermediates."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False, context_fn=_contexts)
        return block(*args)


def call_block(block: nn.Module, *args: Any) -> Tensor:
    """What a stage calls its blocks by outside a backbone."""
    return block(*args)


def select_outputs(out_indices: tuple[int, ...] | None, stages: int) -> tuple[int, ...]:
    """Stage numbers to return, all by default; negative ones count from the end. UserError where none is."""
    if out_indices is None:
        return tuple(range(stages))
    if isinstance(out_indices, int):
        raise UserError(f"out_indices={out_indices}: give a tuple of stage numbers, such as ({out_indices},)")
    chosen = tuple(i + stages if isinstance(i, int) and i < 0 else i for i in out_indices)
    if not chosen or any(i not in range(stages) for i in chosen) or list(chosen) != sorted(set(chosen)):
        raise UserError(
            f"out_indices={tuple(out_indices)}: give stage numbers in rising order, out of 0 to {stages - 1}"
        )
    return chosen


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _recompute()


@contextmanager
def _recompute() -> Iterator[None]:
    token = recomputing.set(True)
    try:
        yield
    finally:
        recomputing.reset(token)
