"""Engines: a target, an engine and a precision become one call.

B batch, H W image
"""

import copy
import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError, nearest
from muntin.measure import peers
from muntin.measure.targets import ENGINE_OF, Models, Size, Target
from muntin.measure.timing import Call, interleaved
from muntin.runtime.compile import RECOMPILES
from muntin.runtime.graphs import CudaGraphs
from muntin.runtime.precision import DTYPES

ENGINES = {
    "eager": "the model as it is created",
    "optimize": "muntin.optimize",
    "compile": "muntin.compile, for other libraries' models torch.compile",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "pt2": "torch.export",
}
NEEDS = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}
SUFFIXES = {engine: suffix for suffix, engine in ENGINE_OF.items()}


class Skipped(Exception):
    """This combination is not measured; the message says why."""


@dataclass
class Runner:
    """A target in an engine and a precision. `call` takes (B, 3, H, W) images of `dtype` on the device.

    settings: what is set beyond the engine's defaults. load_s: seconds from a module in memory, or from the file,
    to the callable; export_s: to write the file that an engine reads.
    """

    target: Target
    engine: str
    precision: str
    call: Call
    dtype: torch.dtype
    settings: list[str] = field(default_factory=list)
    load_s: float = 0.0
    export_s: float | None = None
    path: Path | None = None

    def given(self, images: Tensor, device: torch.device) -> Tensor:
        """(B, 3, H, W) normal numbers as this runner takes them: of its type, or as bytes (B, H, W, 3)."""
        if self.dtype == torch.uint8:
            return (images * 50 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return images.to(device, self.dtype)


def check_engines(engines: list[str]) -> None:
    """UserError for an engine that does not exist, or whose package is missing."""
    for engine in engines:
        if engine not in ENGINES:
            valid = ", ".join(ENGINES)
            raise UserError(f"engine {engine!r} is unknown{nearest(engine, ENGINES)}; valid are {valid}")
        for package in NEEDS.get(engine, ()):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f'engine {engine} needs the package {package}; install it with: pip install "muntin[export]"'
                )
        if engine == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise UserError("engine compile needs a C++ compiler; install one, such as g++, or leave it out")


def refusal(target: Target, engine: str, precision: str, device: torch.device) -> str | None:
    """Why a combination makes no sense, or None."""
    if target.only not in (None, engine):
        return f"it runs in {ENGINES[target.only or engine]} only"
    if target.opened is not None and (has := getattr(target.opened, "precision", "float32")) != precision:
        return f"the file is in {has}"
    if engine == "optimize" and target.peer:
        return "muntin.optimize is for Muntin's own models"
    if engine == "compile" and target.detector:
        return "a detector's steps hang on what it finds, where torch.compile breaks its graph; see optimize and onnx"
    if engine == "onnx" and precision == "bfloat16":
        return "ONNX Runtime's CPU has no bfloat16 convolution; see engine openvino"
    if engine in SUFFIXES and device.type != "cpu":
        return f"{ENGINES[engine]} is measured on the CPU only"
    return None


class Workshop:
    """Makes runners, and keeps those that serve every shape."""

    def __init__(self, models: Models, device: torch.device, folder: Path, cuda_graphs: bool = False) -> None:
        self.models, self.device, self.folder, self.cuda_graphs = models, device, folder, cuda_graphs
        self._kept: dict[tuple[int, str, str, tuple[int, int, int] | None], Runner] = {}
        self._files = 0

    def runner(self, target: Target, engine: str, precision: str, batch: int, size: Size) -> Runner:
        """The call for one shape. Raises Skipped with the reason where it cannot be made."""
        if target.opened is not None:
            opened, settings = target.opened, ["as exported"]
            if opened.dtype == torch.uint8:
                settings.append("preprocessing inside")
            return Runner(target, engine, precision, opened, opened.dtype, settings, target.load_s, path=target.name)
        if engine in SUFFIXES:
            return self._exported(target, engine, precision, batch, size)
        key = (id(target), engine, precision, (batch, *size) if target.peer else None)
        if key not in self._kept:
            self._kept[key] = self._in_torch(target, engine, precision, batch, size)
        return self._kept[key]

    def forget_sizes(self) -> None:
        """Drop what was made for one size."""
        self.models.forget_sizes()
        self._kept = {key: runner for key, runner in self._kept.items() if key[3] is None}

    def forget_files(self) -> None:
        """Remove what was exported for one batch and size."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _in_torch(self, target: Target, engine: str, precision: str, batch: int, size: Size) -> Runner:
        import muntin

        model, settings = self.models.get(target, size), list[str]()
        dtype = DTYPES[precision]
        if target.peer:
            model, settings = peers.tuned(model, target.kind, size)
        if target.peer and peers.convolutional(model):
            images = torch.randn(batch, 3, *size).to(self.device, dtype)
            model, layout = faster_layout(placed(model, self.device, dtype), images)
            settings.append(layout)
        start = time.perf_counter()
        model = placed(model, self.device, dtype)
        call: Callable[[Tensor], Any] = model
        if engine == "optimize":
            call = muntin.optimize(model)
        elif engine == "compile":
            own = hasattr(getattr(getattr(model, "backbone", model), "stem", None), "stride")
            call = muntin.compile(model) if own and not target.peer else Compiled(model)
        seconds = time.perf_counter() - start
        if self.cuda_graphs:
            call, settings = CudaGraphs(call), [*settings, "CUDA graph"]
        return Runner(target, engine, precision, call, dtype, settings, seconds)

    def _exported(self, target: Target, engine: str, precision: str, batch: int, size: Size) -> Runner:
        import muntin
        from muntin.runtime.export import ExportError

        model = self.models.get(target, size)
        if target.peer:
            model, _ = peers.tuned(model, target.kind, size)
        self._files += 1
        path = self.folder / f"{self._files}{SUFFIXES[engine]}"
        start = time.perf_counter()
        try:
            muntin.export(model, path, fixed=(batch, *size), precision=precision, progress=False)
            export_s = time.perf_counter() - start
            start = time.perf_counter()
            opened = muntin.runtime.load(path)
        except (UserError, ExportError) as error:
            raise Skipped(str(error)) from error
        seconds = time.perf_counter() - start
        settings = [f"fixed at {batch}x3x{size[0]}x{size[1]}"]
        return Runner(target, engine, precision, opened, torch.float32, settings, seconds, export_s, path)


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module as it is where it is ready to run so, otherwise a copy that is."""
    tensors = [*model.parameters(), *model.buffers()]
    ready = all(t.device.type == device.type for t in tensors) and all(
        t.dtype == dtype for t in tensors if t.is_floating_point()
    )
    return model if ready and not model.training else copy.deepcopy(model).eval().to(device, dtype)


def faster_layout(model: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """The model in the memory layout that a quick comparison finds the faster one, and its name."""
    import random

    last = peers.ChannelsLast(copy.deepcopy(model)).eval()
    plain, other = interleaved([(model, images), (last, images)], 3, 0.0, random.Random(0))
    faster = sorted(other.medians())[1] < sorted(plain.medians())[1]
    return (last, "channels-last") if faster else (model, "channels-first")


class Compiled(nn.Module):
    """Another library's model in torch.compile, one graph for each shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.call = torch.compile(model, dynamic=False)

    def forward(self, images: Tensor) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            return self.call(images)
