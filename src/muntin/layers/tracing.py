"""What the forward pass may do while a graph is made of it."""

import torch
from torch import Tensor


def symbolic(side: int) -> bool:
    """Whether sizes may be symbols: under `muntin.compile`, and under export unless it is for one size."""
    if torch.compiler.is_exporting():
        return isinstance(side, torch.SymInt)
    return torch.compiler.is_compiling()


def flat_rows(x: Tensor) -> Tensor:
    """Under export a stream (n, B, A, C) as (n * B, A, C): runtimes are faster on linear layers and norms of rank 3."""
    return x.flatten(0, 1) if torch.compiler.is_exporting() and x.ndim == 4 else x


def in_graph() -> bool:
    """Whether biases are computed by differentiable, traceable operators and not kept: in training and under export."""
    return torch.is_grad_enabled() or torch.compiler.is_exporting()


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation runs the model, which take no autograd function of our own."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
