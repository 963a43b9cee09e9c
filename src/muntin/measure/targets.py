"""What a user names, as something to measure: our models, runs, exported files, other libraries' models, modules.

B batch, H W image
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muntin.errors import UserError, nearest
from muntin.heads import HEADS
from muntin.measure import peers

Given = str | tuple[str, nn.Module]
Size = tuple[int, int]

LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers", "hf": "transformers"}
PREFIXES = ("muntin", "muntin+optimize", *LIBRARIES, *HEADS)
ENGINE_OF = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}
"""The engine that runs a file, by its suffix."""
DENSE: dict[str, tuple[int, Size]] = {"detect": (80, (800, 1280)), "instance": (80, (800, 1280))}
DENSE["segment"] = (150, (512, 2048))
"""Classes and (H, W) for which a task's costs are published: those of COCO and of ADE20K."""


@dataclass(frozen=True)
class Target:
    """A model as the user named it.

    kind: "muntin", "dense", "run", "file", "module", or the library that it comes from. name: what builds it, of that
    kind.
    size: (H, W) in pixels that it is for. only: the one engine that it can run in, or None.
    counterpart: our listed model of the same architecture, whose weights a peer is given.
    """

    label: str
    kind: str
    name: Any
    size: Size
    only: str | None = None
    counterpart: str | None = None
    opened: Any = None
    load_s: float = 0.0

    @property
    def peer(self) -> bool:
        return self.kind in LIBRARIES.values()

    @property
    def detector(self) -> bool:
        """Whether it finds as many objects as there are, so that its outputs have no shape of their own."""
        task = HEADS[self.name[0]] if self.kind == "dense" else getattr(self.name, "task", "")
        return task in ("detect", "instance")


def pair(size: Any) -> Size:
    """A side, or (height, width), as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def parse(given: Given) -> list[Target]:
    """The target that is meant; a run's folder also gives the exported files in it, for where no engine is named.

    Raises UserError for what is no model, with what is valid.
    """
    if isinstance(given, tuple):
        label, module = given
        return [Target(label, "module", module, (224, 224))]
    prefix, colon, name = given.partition(":")
    if colon and prefix in PREFIXES:
        return [_prefixed(prefix, name, given)]
    path = Path(given)
    if path.is_dir() or path.suffix == ".safetensors":
        return _run(path)
    if path.suffix in ENGINE_OF or path.is_file():
        return [_file(path)]
    if colon:
        valid = ", ".join(f"{p}:NAME" for p in PREFIXES)
        raise UserError(f"unknown kind of target {given!r}{nearest(prefix, PREFIXES)}; valid are NAME and {valid}")
    return [_ours(given)]


def _prefixed(prefix: str, name: str, given: str) -> Target:
    if prefix == "muntin":
        return _ours(name)
    if prefix == "muntin+optimize":
        target = _run(Path(name))[0] if Path(name).is_dir() else _ours(name)
        return Target(target.label, target.kind, target.name, target.size, only="optimize")
    if prefix in HEADS:
        _ours(name)
        return Target(given, "dense", (prefix, name), DENSE[HEADS[prefix]][1])
    library = LIBRARIES[prefix]
    try:
        size = _peer_size(library, name)
    except ImportError as error:
        raise UserError(f"{given} needs the package {library}; install it with: pip install {library}") from error
    return Target(given, library, name, size, counterpart=peers.counterpart(library, name))


def _peer_size(library: str, name: str) -> Size:
    if library == "timm":
        return peers.timm_size(name)
    if library == "torchvision":
        with torch.device("meta"):
            peers.torchvision_model(name, (224, 224))  # its error says which names are valid
        return (256, 256) if name.startswith("swin_v2") else (224, 224)
    import transformers  # noqa: F401

    return _ours(peers.ours_by_hub_name(name)).size


def _ours(name: str) -> Target:
    import muntin
    from muntin.models import published

    with torch.device("meta"):
        muntin.create_model(name)  # its error names what is near
    return Target(name, "muntin", name, pair(published(name).get("size", 224)))


def _run(path: Path) -> list[Target]:
    from muntin.run import Run

    run = Run.open(path)
    size = pair(run.preprocessing["size"])
    targets = [Target(str(path), "run", run, size)]
    if path.is_dir():
        targets += [_file(path / f"model{suffix}", size) for suffix in ENGINE_OF if (path / f"model{suffix}").exists()]
    return targets


def _file(path: Path, size: Size | None = None) -> Target:
    from muntin.runtime.engines import load

    if path.suffix not in ENGINE_OF:
        valid = ", ".join(ENGINE_OF)
        raise UserError(f"{path} is no model that can be measured; give a name, a run's folder or a file of {valid}")
    load(path)  # importing the engine's package is no part of loading a file
    start = time.perf_counter()
    engine = load(path)
    seconds = time.perf_counter() - start
    own = pair(engine.fixed[1:] if engine.fixed else engine.preprocessing.get("size", 224))
    return Target(str(path), "file", path, size or own, ENGINE_OF[path.suffix], opened=engine, load_s=seconds)


class Models:
    """Targets as modules in float32 on the CPU, in evaluation mode; each is built once, a peer once for each size.

    Our models by name get random weights that show a difference in any part; a peer gets the same ones, converted,
    where we have its architecture. Files, runs and modules keep their own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._built: dict[tuple[str, Size | None], nn.Module] = {}

    def get(self, target: Target, size: Size) -> nn.Module:
        """The module of a target at a size."""
        if target.kind == "module":
            return target.name
        if target.kind == "run":
            return self._once(target.label, None, target.name.model)
        if target.kind == "muntin":
            return self.ours(target.name)
        if target.kind == "dense":
            return self._once(target.label, None, lambda: build_dense(target))
        return self._once(target.label, size, lambda: self._peer(target, size))

    def forget_sizes(self) -> None:
        """Drop what was built for one size."""
        self._built = {key: model for key, model in self._built.items() if key[1] is None}

    def ours(self, name: str) -> nn.Module:
        """A model of ours by name."""
        import muntin
        from muntin.models import published

        side = min(published(name).get("size", 224), 224)
        return self._once(name, None, lambda: peers.randomise(muntin.create_model(name), (side, side)))

    def _once(self, label: str, size: Size | None, build: Callable[[], nn.Module]) -> nn.Module:
        key = (label, size)
        if key not in self._built:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + zlib.crc32(label.encode()) % 2**16)
                self._built[key] = build().eval().requires_grad_(False)
        return self._built[key]

    def _peer(self, target: Target, size: Size) -> nn.Module:
        model = build_peer(target, size)
        if target.counterpart is None:
            return model
        return peers.give_weights(model, self.ours(target.counterpart), target.kind)


def build_dense(target: Target) -> nn.Module:
    """A head on a backbone, for the classes of the data that its costs are published for."""
    import muntin

    head, name = target.name
    return muntin.create_dense(head, name, DENSE[HEADS[head]][0])


def build_peer(target: Target, size: Size) -> nn.Module:
    """Another library's model as it is created, for images of a size. UserError where it refuses that size."""
    builders: dict[str, Callable[[str, Size], nn.Module]] = {
        "timm": peers.timm_model,
        "torchvision": peers.torchvision_model,
        "transformers": peers.transformers_swin,
    }
    return builders[target.kind](target.name, size)
