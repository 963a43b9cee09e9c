"""What a user may name for an export: a run, its weights, or a model with weights from elsewhere."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Dense

HELD_OUT = "held_out"
SUFFIXES = (".png", ".jpg", ".jpeg")
PICTURES = 4
"""Of a run's held-out images in its folder, as many as an export is compared on."""


@dataclass(frozen=True)
class Weights:
    """Where a named model's weights come from: a tag, path or address; `random` for none, said on purpose."""

    given: str | bool = False
    random: bool = False


@dataclass(frozen=True)
class Source:
    """A model to export, what belongs to its metadata, and the file's folder and stem by default.

    pictures: (3, H, W) uint8, which a detector or segmenter is compared on.
    """

    model: nn.Module
    classes: list[str] | None
    preprocessing: dict[str, Any]
    folder: Path
    stem: str
    multi_label: bool = False
    pictures: tuple[Tensor, ...] = ()


def open_source(
    source: str | os.PathLike[str],
    weights: Weights,
    size: tuple[int, int] | None = None,
    backbone: bool = False,
    out_indices: tuple[int, ...] | None = None,
) -> Source:
    """A run's folder, a model.safetensors or a model's name, as a classifier or a backbone; HEAD:MODEL as a detector or
    segmenter.

    size: (height, width) of the input, where it is another than the run's or the weights' own.
    Raises UserError where there is nothing of this name, and for a name without weights.
    """
    if out_indices is not None and not backbone:
        raise UserError("--out-indices chooses maps of a backbone: give --backbone too")
    path = Path(source)
    if path.exists() or path.suffix == ".safetensors" or len(path.parts) > 1:
        return _of_run(path, weights, size, backbone, out_indices)
    head, colon, name = str(source).partition(":")
    if colon:
        if backbone:
            raise UserError(f"{source} is exported whole: leave --backbone out, or name {name} alone")
        return _of_head(head, name, weights, size)
    return _of_name(str(source), weights, size, backbone, out_indices)


def _of_run(
    path: Path, weights: Weights, size: tuple[int, int] | None, backbone: bool, out_indices: tuple[int, ...] | None
) -> Source:
    import muntin
    from muntin.models import _find
    from muntin.run import Run

    if weights.given or weights.random:
        raise UserError(f"{path} has weights of its own: leave --weights, --pretrained and --random-weights out")
    run = Run.open(path)
    preprocessing = run.preprocessing | ({"size": list(size)} if size else {})
    stem = "model"
    model: nn.Module = run.model()
    if isinstance(model, Dense):
        if backbone:
            raise UserError(f"{path} is a {model.head_name}, which is exported whole: leave --backbone out")
        preprocessing |= {"palette": run.palette} if run.palette else {}
        return Source(model.eval(), run.classes, preprocessing, run.path, stem, pictures=_pictures(run.path))
    if backbone:
        usual = getattr(_find(run.name)[0], "DENSE", {})
        config = {key: value for key, value in run.model_config.items() if key not in usual}
        stem = "backbone"
        model = muntin.create_backbone(run.name, out_indices, pretrained=run.weights, **config)
    if backbone:
        return Source(model.eval(), None, preprocessing, run.path, stem)
    return Source(model.eval(), run.classes, preprocessing, run.path, stem, run.multi_label)


def _pictures(folder: Path) -> tuple[Tensor, ...]:
    """A few of a run's held-out images, (3, H, W) uint8; none where it has none."""
    import numpy as np
    from PIL import Image, ImageOps

    files = [file for file in sorted((folder / HELD_OUT).rglob("*")) if file.suffix.lower() in SUFFIXES]
    found = []
    for file in files[:PICTURES]:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        found.append(torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous())
    return tuple(found)


def _of_name(
    name: str, weights: Weights, size: tuple[int, int] | None, backbone: bool, out_indices: tuple[int, ...] | None
) -> Source:
    import muntin
    from muntin.data.transforms import CROP, IMAGENET_MEAN, IMAGENET_STD
    from muntin.models import _find, published
    from muntin.weights.download import Checkpoint, resolve

    _find(name)  # a wrong name is said first
    if not (weights.given or weights.random):
        raise UserError(
            f"{name} is a model's name, without weights: give --weights FILE or a tag (muntin weights {name} lists "
            "them), --pretrained for the first of those, or --random-weights if only the graph matters"
        )
    found = resolve(name, weights.given) if weights.given else None
    tagged = found if isinstance(found, Checkpoint) else None
    file = found if isinstance(found, str) else None
    model: nn.Module
    if backbone:
        model = muntin.create_backbone(name, out_indices, pretrained=tagged.tag if tagged else file or False)
    else:
        classes = tagged.classes or 1000 if tagged else 1000
        model = muntin.create_model(name, num_classes=classes, pretrained=tagged.tag if tagged else False)
        if file:
            _load(model, file)
    side = (tagged.size if tagged else 0) or published(name).get("size", 224)
    height, width = size or (side, side)
    resize = tagged.resize if tagged and tagged.resize and not size else round(min(height, width) / CROP)
    preprocessing = {
        "size": [height, width],
        "resize": resize,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bicubic",
        "channels": "RGB",
    }
    return Source(model.eval(), None, preprocessing, Path(), f"{name}-backbone" if backbone else name)


def _of_head(head: str, name: str, weights: Weights, size: tuple[int, int] | None) -> Source:
    import muntin
    from muntin.data.dense import LONGER, dense_preprocessing
    from muntin.measure.targets import DENSE
    from muntin.weights.download import resolve

    with torch.device("meta"):
        model = muntin.create_dense(head, name, 1)  # a wrong name is said first
    if not (weights.given or weights.random):
        raise UserError(
            f"{head}:{name} is a model's name, without weights: give --weights FILE, export a run, or give "
            "--random-weights if only the graph matters"
        )
    file = resolve(name, weights.given) if weights.given else None
    if file is not None and not isinstance(file, str):
        raise UserError(f"published weights of {name} are a classifier's: {head} would stay random; export a run")
    classes, usual = DENSE[model.task]
    model = muntin.create_dense(head, name, classes)
    if file:
        _load(model, file)
    height, width = size or usual
    shorter = min(height, width)
    preprocessing = dense_preprocessing((height, width), shorter, round(shorter * LONGER[model.task]))
    return Source(model.eval(), None, preprocessing, Path(), f"{head}-{name}")


def _load(model: Any, file: str) -> None:
    """A head that the file does not fill would stay random: refuse it."""
    import muntin
    from muntin.weights.download import local_file

    path = local_file(file)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {file}; check the path, or give a tag that muntin weights lists")
    with torch.no_grad():
        report = muntin.load_checkpoint(model, path)
    if report.replaced:
        raise UserError(
            f"{file} has another last layer than {model.name} with its {model.num_classes} classes, or none, which "
            "would stay random; export a run, or call muntin.export with a model of its number of classes"
        )
