"""A run: the folder that training writes and that every other command reads.

```
runs/NAME/
  config.yaml          every training setting, the model's name and configuration
  split.json           which images are train, val and test, by index (digits) or relative path (folders)
  history.csv          epoch, train_loss, val_loss, val_accuracy (several labels: val_map), lr, seconds
  checkpoints/         last.ckpt, the saves before it and best.ckpt, for `muntin train --resume`
  tensorboard/         the same curves for TensorBoard
  model.safetensors    the weights; its metadata alone rebuilds the model
  metrics.json         model, parameters, test_accuracy, val_accuracy (several labels: test_map, val_map; detection:
                       box_ap, mask_ap; segmentation: miou, macc, aacc), epochs, ...
  held_out/CLASS/*.png the test images of `digits`, as files; of detection and segmentation held_out/*.png, some images
  pictures/*.png       detection and segmentation: what was annotated beside what is predicted
  evaluation.json      what `muntin eval` found on the test split: confusion matrix, classes, calibration
  predictions.csv      image, label, class1, probability1, ..., error: one row per image; of detection and
                       segmentation predictions/, a folder
  model.onnx, report.html
```
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from muntin.errors import UserError

if TYPE_CHECKING:
    from muntin.data.transforms import Evaluate

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk, a share of it or a file that can grow no more
TITLES = {  # of what a run is judged by
    "accuracy": "accuracy",
    "map": "mAP",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mIoU",
}
METRICS = {"classify": "accuracy", "detect": "box_ap", "instance": "mask_ap", "segment": "miou"}  # by task
METADATA = "muntin"  # the key of our JSON in a safetensors file's metadata


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[Path], object]) -> Path:
    """Write a file whole or not at all.

    `content` is the bytes, or a function that writes the file it is given (a temporary one in the same
    folder). It is flushed to the disk and renamed; whatever fails, the earlier file stays and nothing else.

    Raises `UserError` where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        remedy = "free some space" if error.errno in FULL else "choose a folder that you may write to (--out)"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or its folder is none
            partial.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; only POSIX lets a folder be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON atomically, indented, ending with a newline."""
    return atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises `UserError` naming the file where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; restore the file or train again") from error


def save_model(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    classes: list[str],
    preprocessing: dict[str, Any],
    multi_label: bool = False,
) -> Path:
    """Write the weights of a classifier, detector or segmenter with the metadata that rebuilds it (`Run.open`).

    multi_label: a classifier's logits go through a sigmoid each, because an image may have several classes or none.
    """
    from dataclasses import asdict

    from safetensors.torch import save

    described = {
        "name": model.name,
        "config": asdict(model.config),  # type: ignore[call-overload]
        "num_classes": model.num_classes,
        "classes": classes,
        "multi_label": multi_label,
        **preprocessing,
    }
    if hasattr(model, "head_name"):
        described |= {"task": model.task, "head": model.head_name, "head_config": asdict(model.head_config)}  # type: ignore[call-overload]
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return atomic_write(path, save(weights, {METADATA: json.dumps(described)}))


def _describe(weights: Path) -> dict[str, Any]:
    """The `muntin` metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{weights} is not a readable safetensors file ({error}); give a run's folder or its model.safetensors, or "
            "name the model of somebody else's checkpoint, as in: muntin eval CHECKPOINT --model swin_t --data FOLDER"
        ) from error
    fields = ("name", "config", "num_classes", "classes", *PREPROCESSING)
    missing = [field for field in fields if not isinstance(described, dict) or field not in described]
    if missing:
        raise UserError(
            f"{weights} does not say which model it holds (its metadata has no {METADATA}.{missing[0]}); "
            "name the model, as in: muntin eval CHECKPOINT --model swin_t --data FOLDER"
        )
    return described


PREPROCESSING = ("size", "resize", "mean", "std", "interpolation", "channels")


class Run:
    """A trained model with its classes and preprocessing, from a run's folder or from its weights alone.

    `path` is the folder, `weights` the safetensors file, `name` and `model_config` what `create_model` takes,
    `classes` the class names in the order of the logits, `metrics` the contents of metrics.json. `multi_label` says
    that an image may have several of the classes or none: logits become probabilities by a sigmoid each, not by a
    softmax over all.
    `preprocessing` holds plain values: `size` (H, W) of the model's input, `resize` the length of the shorter
    side before the centre crop (None: the whole image is resized to `size`), `mean` and `std` per channel for
    values in 0..1, `interpolation` ("bicubic"), `channels` ("RGB": every image is converted to it).
    `task` is "classify", or "detect", "instance" or "segment"; of these `head` and `head_config` are what
    `create_dense` takes, and `preprocessing["fit"]` has the sides that images are resized to: `shorter`, and `longer`
    at most.
    `palette` are the colours of a segmentation's classes, where its data had some.
    """

    def __init__(self, path: Path, weights: Path, described: dict[str, Any], metrics: dict[str, Any]) -> None:
        self.path = path
        self.weights = weights
        self.name: str = described["name"]
        self.model_config: dict[str, Any] = {k: _tuples(v) for k, v in described["config"].items()}
        self.num_classes: int = described["num_classes"]
        self.classes: list[str] = described["classes"]
        self.multi_label = bool(described.get("multi_label", False))
        self.preprocessing: dict[str, Any] = {
            key: described[key] for key in (*PREPROCESSING, "fit") if key in described or key != "fit"
        }
        self.task: str = described.get("task", "classify")
        self.head: str = described.get("head", "")
        self.head_config: dict[str, Any] = {k: _tuples(v) for k, v in described.get("head_config", {}).items()}
        self.palette: list[tuple[int, int, int]] | None = (
            _tuples(described["palette"]) if "palette" in described else None
        )
        self.metrics = metrics

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Open a run's folder or a model.safetensors. Raises `UserError` naming what is missing."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"there is no run at {path}; train one with: muntin train --out {path}")
        folder = path if path.is_dir() else path.parent
        weights = path / "model.safetensors" if path.is_dir() else path
        if not weights.exists():
            if (folder / "checkpoints" / "last.ckpt").exists():
                raise UserError(
                    f"{folder} has no model.safetensors yet: its training has not finished; "
                    f"continue it with: muntin train --out {folder} --resume"
                )
            raise UserError(
                f"{folder} has no checkpoint (model.safetensors is missing), so it is not a finished run; "
                f"train one with: muntin train --out {folder}"
            )
        metrics = folder / "metrics.json"
        return cls(folder, weights, _describe(weights), read_json(metrics) if metrics.exists() else {})

    @property
    def metric(self) -> str:
        """What it is judged by, as in metrics.json: "accuracy", with several labels "map", otherwise by its task."""
        return "map" if self.multi_label else METRICS[self.task]

    def model(self) -> torch.nn.Module:
        """The model with its weights, in evaluation mode, on the CPU."""
        from safetensors.torch import load_file

        import muntin

        if "." in self.name and not self._trained_here():
            # A weights file must not be able to choose which Python module is imported.
            raise UserError(
                f"{self.weights} holds the model {self.name!r}, which is not part of Muntin; build it yourself "
                f"and load the weights with muntin.load_checkpoint(model, {str(self.weights)!r})"
            )
        model: torch.nn.Module
        if self.head:
            model = muntin.create_dense(
                self.head, self.name, self.num_classes, head_config=self.head_config, **self.model_config
            )
        else:
            model = muntin.create_model(self.name, num_classes=self.num_classes, **self.model_config)
        try:
            model.load_state_dict(load_file(self.weights))
        except RuntimeError as error:
            raise UserError(
                f"{self.weights} does not fit the model {self.name!r} that it names "
                f"({str(error).splitlines()[-1].strip()}); train again or restore the file"
            ) from error
        return model.eval()

    def _trained_here(self) -> bool:
        """Whether config.yaml beside the weights names the same model."""
        config = self.path / "config.yaml"
        return config.exists() and f"model: {self.name}" in config.read_text(encoding="utf-8").splitlines()

    def transform(self) -> "Evaluate":
        """Of a classifier: an encoded image, or a PIL image of any mode, to the model's input, (3, H, W) float."""
        from muntin.data.transforms import Evaluate

        return Evaluate(**self.preprocessing)

    def update_metrics(self, **values: Any) -> None:
        """Add to metrics.json, atomically, keeping what other commands wrote there meanwhile."""
        path = self.path / "metrics.json"
        self.metrics = (read_json(path) if path.exists() else {}) | values
        write_json(path, self.metrics)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that configurations hold."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
