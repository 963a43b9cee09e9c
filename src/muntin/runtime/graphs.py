"""CUDA graphs: a small batch's hundreds of kernels launched by one call."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

KEPT = 8
"""Shapes whose graphs are kept, each with the memory of a forward pass."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Any


class CudaGraphs(nn.Module):
    """A call captured once for each shape as a CUDA graph and replayed; its input is copied to where it was captured.

    Follows PyTorch's documentation: a few calls on a side stream first, so that nothing is allocated or tuned while
    the graph is captured. Of the shapes the eight last used are kept. Inference alone: where a gradient is asked for
    it is the call itself.
    """

    def __init__(self, call: Callable[[Tensor], Any], warmups: int = 3) -> None:
        super().__init__()
        self.call, self.warmups = call, warmups
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget)

    def forward(self, images: Tensor) -> Any:
        if torch.is_grad_enabled() and images.requires_grad:
            return self.call(images)
        key = (tuple(images.shape), images.dtype, images.device)
        if key not in self._captured:
            while len(self._captured) >= KEPT:
                self._captured.popitem(last=False)
            self._captured[key] = self._capture(images.clone())
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.images.copy_(images)
        captured.graph.replay()
        return tree_map(torch.clone, captured.result)  # the next replay writes to the same place

    def _capture(self, images: Tensor) -> _Captured:
        with torch.no_grad():
            side = torch.cuda.Stream(images.device)
            side.wait_stream(torch.cuda.current_stream(images.device))
            with torch.cuda.stream(side):
                for _ in range(self.warmups):
                    self.call(images)
            torch.cuda.current_stream(images.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.call(images)
        return _Captured(graph, images, result)

    def _apply(self, fn: Any, recurse: bool = True) -> "CudaGraphs":
        self._captured.clear()  # the graphs read where the weights were
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_captured": OrderedDict()}  # a graph is of one process


def _forget(graphs: Any, _: Any) -> None:
    """What is derived from the weights may be made anew, elsewhere."""
    graphs._captured.clear()
