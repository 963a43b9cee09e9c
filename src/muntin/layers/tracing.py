"""What the forward pass may do while a graph is made of it."""

import torch


def symbolic(side: int) -> bool:
    """Whether sizes may be symbols: under `muntin.compile`, and under export unless it is for one size."""
    if torch.compiler.is_exporting():
        return isinstance(side, torch.SymInt)
    return torch.compiler.is_compiling()


def in_graph() -> bool:
    """Whether biases are computed by differentiable, traceable operators and not kept: in training and under export."""
    return torch.is_grad_enabled() or torch.compiler.is_exporting()
