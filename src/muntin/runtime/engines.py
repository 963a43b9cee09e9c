"""Exported files, runs and weights behind one call: images in, logits or maps out.

B batch, H W image, K classes
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.heads.dense import Dense, Detector
from muntin.runtime.inputs import described
from muntin.runtime.targets import TARGETS, Fixed, Opened
from muntin.runtime.verify import as_list

if TYPE_CHECKING:
    import numpy as np  # optional for torch, so only loaded when an array is used

Images = TypeVar("Images", "np.ndarray", Tensor)

READABLE = "give a run's folder, a .safetensors file or an exported file: " + ", ".join(TARGETS)


class Engine:
    """A model ready to run: `engine(images)` takes a batch of images and returns what the model does.

    Images are (B, 3, H, W) numbers, or (B, H, W, 3) bytes where the file normalises itself: `layout` is "NCHW" or
    "NHWC", `dtype` torch.float32 or torch.uint8. An array gives an array, a tensor a tensor on its own device:
    logits (B, K), of a segmenter (B, K, H, W), a list of maps (B, C, H', W') of a backbone, or of a detector, which
    takes one image at a time, a dictionary of what it found, as docs/export.md says.

    `path` and `engine` ("torch" or a target's name, such as "onnx") say what runs; `name`, `classes`, `multi_label`
    (an image may have several of them), `preprocessing` and `precision` are what the file says about itself (empty
    where it says nothing), `metadata` all of it. `fixed` is (batch, height, width) where the file is for these alone,
    else None; `least_side` is the smallest height and width that it takes.
    """

    def __init__(self, path: Path, engine: str, opened: Opened) -> None:
        self.path = path
        self.engine = engine
        self.metadata: dict[str, Any] = {key: _plain(value) for key, value in opened.metadata.items()}
        self.name: str = str(self.metadata.get("model", ""))
        self.classes: list[str] = self.metadata.get("classes", [])
        self.multi_label = bool(self.metadata.get("multi_label", False))
        self.preprocessing: dict[str, Any] = self.metadata.get("preprocessing", {})
        self.precision: str = self.metadata.get("precision", "float32")
        self.dtype = opened.dtype
        self.layout = "NHWC" if opened.dtype == torch.uint8 else "NCHW"
        self.least_side = opened.least
        batch, height, width = self._shape = opened.shape
        whole = batch is not None and height is not None and width is not None
        self.fixed: Fixed | None = (batch, height, width) if whole else None  # type: ignore[assignment]
        self._names: list[str] = self.metadata.get("outputs", [])
        self._several = str(self.metadata.get("outputs", [""])[0]).startswith("map")
        self._run = opened.run

    def __call__(self, images: Images) -> Any:
        import numpy as np

        if isinstance(images, Tensor):
            found = self._outputs(images)
        elif isinstance(images, np.ndarray):
            given = torch.from_numpy(np.require(images, requirements=("C", "W")))  # torch has no read-only tensors
            found = [tensor.numpy() for tensor in self._outputs(given)]
        else:
            kind = type(images).__name__
            raise UserError(f"{kind} given; images are a numpy array or a torch tensor, {self._takes()}")
        if self._names[:1] == ["boxes"]:
            return dict(zip(self._names, found, strict=True))
        return found if self._several or len(found) != 1 else found[0]

    def _outputs(self, images: Tensor) -> list[Tensor]:
        self._check(images)
        given = images.detach()
        if self.engine != "torch":
            given = given.to("cpu", self.dtype).contiguous()
        return [output.to(images.device) for output in self._run(given)]

    def _takes(self) -> str:
        return "(batch, height, width, 3) bytes" if self.layout == "NHWC" else "(batch, 3, height, width) numbers"

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        channels = 3 if self.layout == "NHWC" else 1
        if len(shape) != 4 or shape[channels] != 3 or min(shape) < 1:
            raise UserError(f"images of shape {shape} given to {self.path}; it takes {self._takes()}")
        if (images.dtype == torch.uint8) != (self.dtype == torch.uint8):
            inside = "it normalises itself" if self.dtype == torch.uint8 else "normalise them first"
            raise UserError(f"images of {images.dtype} given to {self.path}; it takes {self._takes()}: {inside}")
        sides = [shape[axis] for axis in range(4) if axis != channels]
        if self._names[:1] == ["boxes"] and sides[0] != 1:
            raise UserError(f"{self.path} is a detector for one image at a time and got {sides[0]}; give (1, 3, H, W)")
        if any(has not in (None, is_) for has, is_ in zip(self._shape, sides, strict=True)):
            batch, height, width = ("any" if side is None else side for side in self._shape)
            raise UserError(
                f"{self.path} was exported for batch {batch} at {height}x{width} and got batch {sides[0]} at "
                f"{sides[1]}x{sides[2]}; resize the images, or export with dynamic sizes or for these "
                f"(--fixed {sides[0]}x{sides[1]}x{sides[2]})"
            )
        if min(sides[1:]) < self.least_side:
            raise UserError(
                f"{self.path} takes images from {self.least_side} pixels a side and got {sides[1]}x{sides[2]}; "
                "resize them, or export to ONNX or OpenVINO, which take any"
            )

    def __repr__(self) -> str:
        return f"Engine({self.name or self.path.name}, {self.engine})"


def in_batches(call: Callable[[Tensor], Tensor], images: Tensor, size: int | None) -> Tensor:
    """An engine called for any number of images: those of one batch size alone with its last image repeated."""
    if size is None:
        return call(images)
    parts = []
    for part in images.split(size):
        filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
        parts.append(call(filled)[: len(part)])
    return torch.cat(parts)


def _plain(value: Any) -> Any:
    """Exported files hold strings; ours hold JSON where they are not plain text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _load_run(path: Path) -> Engine:
    from muntin.run import Run

    opened = Run.open(path)
    model = opened.model()

    detects = isinstance(model, Detector)

    def run(images: Tensor) -> list[Tensor]:
        parameter = next(model.parameters())
        with torch.inference_mode():
            found = model(images.to(parameter.device, parameter.dtype))
        return list(found[0].values()) if detects else as_list(found)

    metadata: dict[str, Any] = {
        "model": opened.name,
        "classes": opened.classes,
        "multi_label": opened.multi_label,
        "preprocessing": opened.preprocessing,
    }
    if isinstance(model, Dense):
        metadata |= described(model)
    if detects:
        metadata["outputs"] = ["boxes", "scores", "labels", *(["masks"] if model.task == "instance" else [])]
    return Engine(path, "torch", Opened(run, metadata))


def open_engine(path: Path) -> Engine:
    """An exported file by its suffix."""
    target = TARGETS[path.suffix]
    opened = target.module().open(path)
    return Engine(path, opened.engine or target.name, opened)


def load(path: str | os.PathLike[str]) -> Engine:
    """Open an exported file, a run's folder or its weights as a callable with one interface.

    path: an exported file runs in its target's engine (`model.onnx` in ONNX Runtime), a run's folder or
    `model.safetensors` in PyTorch.
    Raises UserError where the file is missing, of another kind, damaged, or its engine is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}; {READABLE}")
    if path.suffix in TARGETS:
        reason = TARGETS[path.suffix].module().unavailable()
        if reason is not None:
            raise UserError(f"{path} cannot run here: {reason}")
        return open_engine(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _load_run(path)
    raise UserError(f"{path} is of a kind that Muntin does not run; {READABLE}")
