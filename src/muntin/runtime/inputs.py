"""What stands around a model in an exported file: number formats, preprocessing, what it says about itself.

B batch, H W image
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Dense, Detector
from muntin.models.backbone import Backbone
from muntin.runtime.precision import DTYPES
from muntin.runtime.verify import as_list


class Around(nn.Module):
    """A model in another number format, float32 in and out; with `normalise` it takes bytes (B, H, W, 3)."""

    def __init__(self, model: nn.Module, precision: str, normalise: "Normalise | None") -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.model = model.to(self.dtype)
        self.normalise = normalise

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.normalise is not None:
            image = self.normalise(image)
        outputs = self.model(image.to(self.dtype))
        return _wide(outputs) if isinstance(outputs, Tensor) else [_wide(output) for output in outputs]


def _wide(output: Tensor) -> Tensor:
    return output.float() if output.is_floating_point() else output


class Normalise(nn.Module):
    """Bytes (B, H, W, 3) -> (B, 3, H, W) float32: (bytes / 255 - mean) / std, as one product and one sum."""

    factor: Tensor
    summand: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        wide, narrow = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("factor", (1 / (255 * narrow)).float())
        self.register_buffer("summand", (-wide / narrow).float())

    def forward(self, image: Tensor) -> Tensor:
        return (image.float() * self.factor + self.summand).permute(0, 3, 1, 2)


def normalised(image: Tensor, preprocessing: dict[str, Any]) -> Tensor:
    """What `Normalise` is held to: bytes (B, H, W, 3) -> (B, 3, H, W)."""
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float64) for key in ("mean", "std"))
    return ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()


def check_preprocessing(preprocessing: dict[str, Any] | None) -> None:
    """UserError where it does not say how images are normalised."""
    for key in ("mean", "std"):
        values = (preprocessing or {}).get(key)
        if not isinstance(values, (list, tuple)) or len(values) != 3:
            raise UserError(
                f"with_preprocessing needs the {key} of the three channels, as in preprocessing={{'mean': [0.485, "
                f"0.456, 0.406], 'std': [0.229, 0.224, 0.225]}}; given was {values!r}"
            )


def output_names(model: nn.Module, image: Tensor) -> tuple[str, ...]:
    """ "logits" for one tensor, "map0", "map1", ... for a list of maps, what a detector finds.

    image: suits the model.
    """
    if isinstance(model, Detector):
        masks = ("masks",) if model.task == "instance" else ()
        return ("boxes", "scores", "labels", *masks, *(("proposals",) if hasattr(model, "rpn") else ()))
    if isinstance(model, Backbone):
        return tuple(f"map{i}" for i in range(len(model.channels)))
    if hasattr(model, "num_classes") and isinstance(getattr(model, "backbone", None), Backbone):
        return ("logits",)
    with torch.inference_mode():
        outputs = model(image)
    tensors = isinstance(outputs, (list, tuple)) and all(isinstance(output, Tensor) for output in outputs)
    if not (isinstance(outputs, Tensor) or tensors):
        raise UserError(
            f"the model returns {type(outputs).__name__}; export takes a model that returns a tensor or a list of them"
        )
    return ("logits",) if isinstance(outputs, Tensor) else tuple(f"map{i}" for i in range(len(as_list(outputs))))


def described(model: Dense) -> dict[str, Any]:
    """What a detector or segmenter is, beside its backbone."""
    found = {"task": model.task, "head": model.head_name, "num_classes": model.num_classes}
    return found | {"head_config": asdict(model.head_config)}


def describe(
    model: nn.Module,
    *,
    classes: Sequence[str] | None,
    multi_label: bool,
    preprocessing: dict[str, Any] | None,
    inside: bool,
    precision: str,
    outputs: tuple[str, ...],
    least: int,
) -> dict[str, str]:
    """A file's metadata. Values that are not plain text are JSON.

    inside: the graph normalises, so that it takes bytes. preprocessing: `palette`, which it may have, stands apart.
    """
    layout = "NHWC" if inside else "NCHW"
    found: dict[str, Any] = {
        "model": str(getattr(model, "name", "") or type(model).__name__),
        "layout": layout,
        "dtype": "uint8" if inside else "float32",
        "precision": precision,
        "outputs": list(outputs),
        "least_side": least,
    }
    if isinstance(model, Dense):
        found |= described(model)
    config = getattr(model, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        found["config"] = asdict(config)
    if isinstance(model, Backbone):
        found |= {"channels": list(model.channels), "strides": list(model.strides)}
    if classes is not None:
        found["classes"] = list(classes)
    if multi_label:
        found["multi_label"] = True
    if preprocessing is not None:
        apart = {key: value for key, value in preprocessing.items() if key == "palette"}
        kept = {key: value for key, value in preprocessing.items() if key not in apart}
        found |= apart | {"preprocessing": {"layout": layout, **kept} | ({"inside": True} if inside else {})}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
