"""Several processes that train one model: which of them this one is, and what they agree on.

They are started by torchrun, on one machine by `muntin train --set devices=N` (`launch.py`).
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # of processes that wait for the first one's evaluation


class Ranks:
    """This process among those of the job: `rank` of `count`; one of one where nothing started several."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
        self._slow: Any = None
        if self.count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
            self._slow = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    @property
    def machines(self) -> int:
        return self.count // self.here

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them."""
        if self.count == 1:
            return decide()
        decided = [decide() if self.first else None]
        torch.distributed.broadcast_object_list(decided, src=0, group=self._slow)
        return decided[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier(group=self._slow)


def several() -> bool:
    """Whether this is one of several processes."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, in place."""
    if several():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value
