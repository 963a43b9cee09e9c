"""Whether modules still hold what they held."""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

_VERSION = attrgetter("_version")


class Contents:
    """Every part, parameter and buffer of some modules; of tensors how often they were written to, and where they are:
    a move to another type or device counts as no writing. Asked before every call, so in loops that C runs.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._groups: Any = [g for m in modules for g in (m._modules, m._parameters, m._buffers)]
        self._held = self._values()
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = self._numbers()

    def unchanged(self) -> bool:
        found = self._values()
        same = len(found) == len(self._held) and all(map(is_, found, self._held))
        return same and self._numbers() == self._versions

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._groups)))

    def _numbers(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self._counted)), list(map(Tensor.data_ptr, self._tensors))
