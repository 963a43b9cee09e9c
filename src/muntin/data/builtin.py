"""torchvision's own data sets: `torchvision:NAME[:ROOT[:download]]`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from muntin.data.datasets import Images
from muntin.data.decode import Picture, read_image
from muntin.errors import UserError, nearest

# By name: parts with the arguments that choose them. What a set calls trainval is train here, and its val is drawn.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": {"train": {"train": True}, "test": {"train": False}},
    "CIFAR100": {"train": {"train": True}, "test": {"train": False}},
    "Flowers102": {name: {"split": name} for name in ("train", "val", "test")},
    "StanfordCars": {name: {"split": name} for name in ("train", "test")},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
ROOT = "data"


def parse(data: str) -> tuple[str, str, bool]:
    """Name, root folder, and whether to download. Raises `UserError` naming what is wrong."""
    name, *rest = data.removeprefix("torchvision:").split(":")
    if name not in SETS:
        raise UserError(f"{data}: {name!r} is none of {', '.join(SETS)}{nearest(name, SETS)}; give one of them")
    if len(rest) > 2 or (len(rest) == 2 and rest[1] != "download"):
        raise UserError(
            f"{data} is not understood; write torchvision:{name}:FOLDER or torchvision:{name}:FOLDER:download"
        )
    return name, (rest[0] if rest else "") or ROOT, len(rest) == 2


def builtin_parts(data: str) -> dict[str, Images]:
    """A set's images by part. Raises `UserError` where it is not there and no download was asked for."""
    name, root, download = parse(data)
    return {part: _images(name, part, root, download, chosen) for part, chosen in SETS[name].items()}


def _images(name: str, part: str, root: str, download: bool, chosen: dict[str, Any]) -> Images:
    from torchvision import datasets

    if name in ("Flowers102", "StanfordCars"):
        chosen = chosen | {"loader": Path}  # paths instead of decoded images: they are decoded when they are needed
    try:
        found = getattr(datasets, name)(root, download=download, **chosen)
    except (RuntimeError, OSError) as error:
        remedy = "put it there by hand" if download else f"or download it: --data torchvision:{name}:{root}:download"
        raise UserError(
            f"{name} is not complete in {Path(root).absolute()} ({error}); name its folder, {remedy}"
        ) from error
    if name.startswith("CIFAR"):
        return _whole(part, found.targets, found.classes, lambda position: Image.fromarray(found.data[position]))
    if name == "OxfordIIITPet":  # it takes no loader
        files, labels = found._images, found._labels
    else:
        files, labels = zip(*(found[i] for i in range(len(found))), strict=True)
    return _whole(part, labels, found.classes, lambda position: read_image(Path(files[position])))


def _whole(part: str, labels: Any, classes: list[str], read: Callable[[int], Picture]) -> Images:
    return Images([f"{part}/{i}" for i in range(len(labels))], [int(label) for label in labels], list(classes), read)
