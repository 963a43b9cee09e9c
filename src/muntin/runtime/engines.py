"""Exported files, runs and weights behind one call: images in, logits out.

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

if TYPE_CHECKING:
    import numpy as np  # optional for torch, so only loaded when an array is used

Images = TypeVar("Images", "np.ndarray", Tensor)

INSTALL = "install it with: pip install 'muntin[export]'"
READABLE = ("a run's folder", "a .safetensors file", "an .onnx file")


class Engine:
    """A model ready to run: `engine(images)` takes a float (B, 3, H, W) array or tensor and returns (B, K) of
    the same kind, on the same device.

    `path` and `engine` ("torch" or "onnx") say what runs; `name`, `classes` and `preprocessing` are what the
    file says about itself (empty where it says nothing), `metadata` all of it.
    """

    def __init__(self, path: Path, engine: str, run: Callable[[Tensor], Tensor], metadata: dict[str, Any]) -> None:
        self.path = path
        self.engine = engine
        self.metadata = metadata
        self.name: str = metadata.get("model", "")
        self.classes: list[str] = metadata.get("classes", [])
        self.preprocessing: dict[str, Any] = metadata.get("preprocessing", {})
        self._run = run

    def __call__(self, images: Images) -> Images:
        import numpy as np

        if isinstance(images, Tensor):
            self._check(tuple(images.shape))
            return self._run(images)
        if isinstance(images, np.ndarray):
            self._check(images.shape)
            return self._run(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        raise UserError(f"{type(images).__name__} given; images are a numpy array or a torch tensor, (B, 3, H, W)")

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
            raise UserError(f"images of shape {shape} given to {self.path}; it takes (batch, 3, height, width)")

    def __repr__(self) -> str:
        return f"Engine({self.name or self.path.name}, {self.engine})"


def open_onnx(path: Path) -> tuple[Any, dict[str, Any]]:
    """An ONNX Runtime session on the CPU, with as many threads as torch has, and the file's metadata.

    Raises UserError for a file that ONNX Runtime does not read, or that is no image classifier.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs the package onnxruntime; {INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is not an ONNX file that ONNX Runtime can run ({reason}); export it again") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs) != 1:
        described = ", ".join(f"{i.name}{i.shape}" for i in inputs) or "nothing"
        raise UserError(
            f"{path} takes {described} and returns {len(outputs)} outputs; a file exported by Muntin takes "
            "one batch of images and returns their logits"
        )
    metadata = session.get_modelmeta().custom_metadata_map
    return session, {key: _plain(value) for key, value in metadata.items()}


def _plain(text: str) -> Any:
    """ONNX metadata holds strings; ours hold JSON where they are not plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load_onnx(path: Path) -> Engine:
    session, metadata = open_onnx(path)
    given = session.get_inputs()[0]

    def run(images: Tensor) -> Tensor:
        array = images.detach().cpu().float().numpy()
        for axis, (expected, actual) in enumerate(zip(given.shape, array.shape, strict=True)):
            if isinstance(expected, int) and expected != actual:
                raise UserError(
                    f"{path} was exported for {expected} along axis {axis} and got {actual}; "
                    "resize the images or export with dynamic sizes"
                )
        return torch.from_numpy(session.run(None, {given.name: array})[0]).to(images.device)

    return Engine(path, "onnx", run, metadata)


def _load_run(path: Path) -> Engine:
    from muntin.run import Run

    opened = Run.open(path)
    model = opened.model()

    def run(images: Tensor) -> Tensor:
        parameter = next(model.parameters())
        with torch.inference_mode():
            logits = model(images.to(parameter.device, parameter.dtype))
        return logits.to(images.device)

    metadata = {"model": opened.name, "classes": opened.classes, "preprocessing": opened.preprocessing}
    return Engine(path, "torch", run, metadata)


def load(path: str | os.PathLike[str]) -> Engine:
    """Open an exported file, a run's folder or its weights as a callable with one interface.

    path: `model.onnx` runs in ONNX Runtime, a run's folder or `model.safetensors` in PyTorch.
    Raises UserError where the file is missing, of another kind, damaged, or its engine is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}; give {', '.join(READABLE[:-1])} or {READABLE[-1]}")
    if path.is_dir() or path.suffix == ".safetensors":
        return _load_run(path)
    if path.suffix == ".onnx":
        return _load_onnx(path)
    raise UserError(f"{path} is of a kind that Muntin does not run; give {', '.join(READABLE[:-1])} or {READABLE[-1]}")
