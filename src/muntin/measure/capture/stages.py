"""Which stage of a model a module belongs to: the stem, stage 1, 2, ..., the head.

A stage is what its module runs. What runs outside any belongs to the stage before it, to the stem where none came
before, and to the head after the last. A model in which no stages are found is one.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from muntin.layers.opaque import Programmed

STEM, HEAD, WHOLE = "stem", "head", "whole model"
_CONTAINERS = ("stages", "layers", "blocks", "features")


class Stages:
    """The stages of a model by the paths of their modules."""

    def __init__(self, model: nn.Module) -> None:
        self.prefixes = _find(model)
        self.names = [STEM, *dict.fromkeys(self.prefixes.values()), HEAD] if self.prefixes else [WHOLE]

    def of(self, path: str) -> str | None:
        """The stage of a module, or None outside all."""
        for prefix, name in self.prefixes.items():
            if path == prefix or path.startswith(prefix + "."):
                return name
        return None

    def fill(self, known: list[str | None]) -> list[str]:
        """The stage of each operation of a run, in order, from those that are known."""
        if not self.prefixes:
            return [WHOLE] * len(known)
        last = max((i for i, stage in enumerate(known) if stage is not None), default=-1)
        filled, current = [], STEM
        for i, stage in enumerate(known):
            current = stage or current
            filled.append(current if i <= last or last < 0 else HEAD)
        return filled

    @contextmanager
    def tracked(
        self, modules: Iterable[tuple[str, nn.Module]], enter: Callable[[str | None, nn.Module | None], None]
    ) -> Iterator[None]:
        """Tell `enter` the stage and the module when one of the modules begins, and when it ends those around it.

        modules: with their paths in the model. Those below a module that runs as a program do not run themselves.
        """
        modules = list(modules)
        whole = tuple(f"{p}." for p, m in modules if isinstance(m, Programmed) and m.program is not None)
        around: list[tuple[str | None, nn.Module | None]] = [(None, None)]

        def begin(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                around.append((self.of(path), module))
                enter(*around[-1])

            return hook

        def end(module: nn.Module, args: Any, out: Any) -> None:
            around.pop()
            enter(*around[-1])

        hooks: list[Any] = []
        for path, module in (item for item in modules if not item[0].startswith(whole)):
            hooks += [module.register_forward_pre_hook(begin(path)), module.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _find(model: nn.Module) -> dict[str, str]:
    """Paths of the stages' modules: the children of the outermost list of stages. A plain sequence of equal blocks, as
    in a ViT, is one stage. Failing such a list, children that are numbered (`layer1`, ...).
    """
    for path, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        last = path.rpartition(".")[2]
        if not listed or last not in _CONTAINERS:
            continue
        children = list(module.named_children())
        if last == "blocks" and not isinstance(children[0][1], nn.ModuleList | nn.Sequential):
            return {path: "stage 1"}
        return {f"{path}.{name}": f"stage {i + 1}" for i, (name, _) in enumerate(children)}
    numbered = [path for path, _ in model.named_children() if re.fullmatch(r"(layer|stage|block)_?\d+", path)]
    return {path: f"stage {i + 1}" for i, path in enumerate(numbered)}
