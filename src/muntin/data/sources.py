"""What `--data` names, recognised: one entry for every source of labelled images.

digits                                    scikit-learn's handwritten digits
FOLDER                                    FOLDER/CLASS/*, or FOLDER/{train,val[,test]}/CLASS/*
FOLDER, shards/train-{000000..000127}.tar tar shards, local; shards/*.tar
https://HOST/train-{000000..000127}.tar   tar shards over HTTP; or the address of their index.json
FOLDER                                    what Hugging Face's `save_to_disk` wrote, or a folder of Parquet files
labels.csv                                image,label[,split]; several labels with semicolons between
torchvision:CIFAR10[:ROOT[:download]]     torchvision's own sets
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from muntin.data.annotated import SCENES
from muntin.data.check import BadFiles, check_parts, refuse_or_report
from muntin.data.datasets import (
    PARTS,
    Images,
    Splits,
    empty_classes,
    folder_part,
    folder_parts,
    load_digits,
    read_folder,
    select,
    stratified,
)
from muntin.data.shards import local_shards
from muntin.errors import UserError

WHOLE = "all"  # the part of data that come in one


def is_address(data: str) -> bool:
    """Whether `--data` names something other than a path: it is the same from any folder."""
    return data in ("digits", SCENES) or bool(re.match(r"https?://|torchvision:", data))


def absolute(data: str) -> str:
    """The same data by a name that holds from any folder."""
    if data.startswith("torchvision:"):
        from muntin.data.builtin import parse

        name, root, download = parse(data)
        return f"torchvision:{name}:{os.path.abspath(root)}" + (":download" if download else "")
    return data if is_address(data) else os.path.abspath(data)


def short_name(data: str) -> str:
    """What a run on these data is called by default: the last folder, or torchvision's name."""
    if data.startswith("torchvision:"):
        return data.split(":")[1].lower()
    path = Path(data)
    return (path.parent if path.suffix in (".tar", ".parquet", ".csv", ".json") else path).name


def open_parts(data: str) -> dict[str, Images]:
    """The labelled images that `data` names, by part: "train", "val" and "test" as far as it has them, or "all".

    Raises `UserError` that says what is wrong with it and what is valid.
    """
    return _reader(data)(data)


def _reader(data: str) -> Callable[[str], dict[str, Images]]:
    """What reads this kind of source; what a kind needs is imported for it alone."""
    if data == "digits":
        return lambda _: {WHOLE: load_digits()}
    if data == SCENES:
        raise UserError(f"{SCENES} are for detection and segmentation: add --task detect, instance or segment")
    if data.startswith("torchvision:"):
        from muntin.data.builtin import builtin_parts

        return builtin_parts
    if is_address(data):
        from muntin.data.remote import remote_shards

        return remote_shards
    if data.endswith(".csv"):
        from muntin.data.table import table_parts

        return table_parts
    if data.endswith(".tar"):
        return local_shards
    root = read_folder(data) if not data.endswith(".parquet") else None
    if root is None or _holds(root, "*.parquet"):
        from muntin.data.arrow import parquet_parts

        return parquet_parts
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        from muntin.data.arrow import saved_parts

        return saved_parts
    return local_shards if _holds(root, "*.tar") else folder_parts


def _holds(root: Path, pattern: str) -> bool:
    """Whether there are such files in the folder or one below."""
    return any(True for level in ("", "*/") for _ in root.glob(level + pattern))


def open_splits(
    data: str, seed: int, size: int, on_bad_image: str = "error", bad_files: BadFiles | None = None
) -> Splits:
    """Train, val and test of what `data` names; what has no parts is split 70/10/20 by `seed`, and where there is no
    val, 10% of train are.

    size: side of the model's input, in pixels. on_bad_image: "error" names what cannot be used; "skip" leaves it out
    and lists it in `bad_files`.
    """
    parts = open_parts(data)
    learned = "train" if "train" in parts else WHOLE
    if learned not in parts:
        raise UserError(f"{data} has {' and '.join(parts)} but no train part; add it")
    checked = check_parts(parts, seed)
    refuse_or_report(checked, sum(map(len, parts.values())), on_bad_image, bad_files)
    given = {"train", "val"} <= set(parts)
    parts = without(parts, checked.bad)
    if learned == "train" or data != "digits":
        _refuse_unlearned(data, parts, learned)
    parts = _divided(data, parts, seed)
    test = parts.get("test")
    left_out = tuple(checked.bad) if given else ()
    whole = median(checked.sides) <= size
    return Splits(parts["train"], parts["val"], test if test and len(test) else None, whole, given, left_out)


def _refuse_unlearned(data: str, parts: Mapping[str, Images], learned: str) -> None:
    """Raise `UserError` where a class has no images to learn it from."""
    empty = empty_classes(parts[learned])
    if not empty:
        return
    name = empty[0]
    others = [part for part, images in parts.items() if name not in empty_classes(images)]
    if others:
        raise UserError(
            f"{data}: the class {name!r} has images in {' and '.join(others)} and none in {learned}; add some there, "
            f"or remove those in {' and '.join(others)}"
        )
    raise UserError(f"{data}: the class {name!r} has no images; add some, or take its name from the list of classes")


def without(parts: Mapping[str, Images], left_out: Any) -> dict[str, Images]:
    """The parts without the images of these keys."""
    if not left_out:
        return dict(parts)
    return {
        name: select(part, [i for i, key in enumerate(part.keys) if key not in left_out])
        for name, part in parts.items()
    }


def _divided(data: str, parts: dict[str, Images], seed: int) -> dict[str, Images]:
    """The parts with a val among them."""
    if WHOLE in parts:
        whole = parts.pop(WHOLE)
        if parts:
            raise UserError(f"{data} has {' and '.join(parts)} beside files of no part; name those after one, too")
        positions = stratified(whole.labels, seed)
        parts = {name: select(whole, positions[name]) for name in PARTS}
    elif "val" not in parts:
        whole = parts["train"]
        positions = stratified(whole.labels, seed, test=0.0)
        parts |= {name: select(whole, positions[name]) for name in ("train", "val")}
    if not len(parts["val"]):
        raise UserError(
            f"{data} has too few images to set some aside for validation ({len(parts['train'])} in "
            f"{len(parts['train'].classes)} classes); add images so that a class has at least three"
        )
    return parts


def splits_from_json(data: str, stored: Mapping[str, Any], plain_resize: bool) -> Splits:
    """The splits of a run, from its split.json: the same images, with the same classes, or a `UserError`."""
    classes: list[str] = stored["classes"]
    parts = {name: _in_order_of(part, classes, data) for name, part in open_parts(data).items()}
    if "given" in stored:
        left_out = set(stored["left_out"])
        parts = without(parts, left_out)
        for name, was in stored["given"].items():
            _refuse_changed(data, name, parts, was)
        chosen = {name: parts[name] for name in stored["given"]}
    else:
        places = {key: (part, i) for part in parts.values() for i, key in enumerate(part.keys)}
        chosen = {name: _stored_part(data, stored[name], places) for name in PARTS if name in stored}
    splits = Splits(
        chosen["train"],
        chosen["val"],
        chosen.get("test"),
        plain_resize,
        "given" in stored,
        tuple(stored.get("left_out", ())),
    )
    if splits.multi_label != stored.get("multi_label", False):
        now, was = ("several labels", "one class") if splits.multi_label else ("one class", "several labels")
        raise UserError(f"{data} gives an image {now}, {was} when the run began; put the labels back as they were")
    for name, digest in stored.get("sha256", {}).items():
        _refuse_changed(data, name, splits.parts(), {"images": len(stored[name]), "sha256": digest})
    return splits


def _in_order_of(images: Images, classes: list[str], data: str) -> Images:
    if images.classes == classes:
        return images
    raise UserError(
        f"{data} has the classes {', '.join(images.classes[:10])} and the run's split.json {', '.join(classes[:10])}; "
        "put the data back as they were, or give others to evaluate with --data"
    )


def _refuse_changed(data: str, name: str, parts: Mapping[str, Images], was: Mapping[str, Any]) -> None:
    now = len(parts[name]) if name in parts else 0
    if name not in parts or parts[name].digest() != was["sha256"]:
        raise UserError(
            f"{data}: the {name} part is not that of the run's split.json ({now} images, {was['images']} then, or "
            "other names or labels); put it back, or start another run with --out"
        )


def _stored_part(data: str, keys: list[Any], places: Mapping[Any, tuple[Images, int]]) -> Images:
    gone = next((key for key in keys if key not in places), None)
    if gone is not None:
        name = gone if is_address(data) else Path(data) / str(gone)
        raise UserError(
            f"{name} is in the run's split.json but not on the disk; put it back, or give the images to evaluate with "
            "--data"
        )
    if not keys:
        return select(next(iter(places.values()))[0], [])
    return select(places[keys[0]][0], [places[key][1] for key in keys])


def open_part(data: str, split: str | None = None) -> tuple[Images, str]:
    """The images of one part, by default test, else val, else all there is, and the part's name.

    Raises `UserError` where the data have no such part.
    """
    reader = _reader(data)
    if reader is folder_parts:
        return folder_part(data, split)
    parts = reader(data)
    if data == "digits":
        parts, split = _divided(data, parts, seed=0), split or "test"
    if split is not None and split not in parts:
        raise UserError(f"{data} has no part {split}, but {', '.join(parts)}; leave --split out, or give one of these")
    chosen = split or next(name for name in ("test", "val", WHOLE, "train") if name in parts)
    return parts[chosen], chosen
