"""A CSV of labels: `image,label` and, if wanted, `split`.

Paths are relative to the file's folder. Labels with semicolons between them give an image several classes, and then
every image has a list of them; an empty label is none of the classes.
"""

import csv
from pathlib import Path

from muntin.data.datasets import PARTS, Images, Label, from_files
from muntin.errors import UserError, nearest

SPLIT = {name: name for name in PARTS} | {"validation": "val", "": "all"}


def table_parts(data: str) -> dict[str, Images]:
    """Images by part, in the table's order. Raises `UserError` naming the line at fault."""
    path = Path(data)
    rows = _rows(path)
    multiple = any(";" in label or not label.strip() for _, label, _ in rows)
    names = [[name.strip() for name in label.split(";") if name.strip()] for _, label, _ in rows]
    classes = sorted({name for some in names for name in some})
    if len(classes) < 2:
        raise UserError(f"{path} has {len(classes)} different labels; classification needs at least two")
    numbers = {name: label for label, name in enumerate(classes)}
    seen: set[str] = set()
    parts: dict[str, tuple[list[str], list[Label]]] = {}
    for line, ((image, _, split), some) in enumerate(zip(rows, names, strict=True), start=2):
        if image in seen:
            raise UserError(f"{path}, line {line}: {image} is there twice; keep one line for each image")
        seen.add(image)
        keys, labels = parts.setdefault(SPLIT[split], ([], []))
        keys.append(image)
        labels.append([numbers[name] for name in some] if multiple else numbers[some[0]])
    return {name: from_files(path.parent, list(keys), labels, classes) for name, (keys, labels) in parts.items()}


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Image, label and split of every line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            heads = reader.fieldnames or []
            missing = [name for name in ("image", "label") if name not in heads]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}{nearest(missing[0], heads)}; begin it with image,label"
                )
            rows = [(row["image"] or "", row["label"] or "", row.get("split") or "") for row in reader]
    except FileNotFoundError as error:
        raise UserError(f"there is no table at {path}; check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); give a CSV in UTF-8 that begins with image,label") from error
    if not rows:
        raise UserError(f"{path} has no images; add a line for each, below image,label")
    for line, (image, _, split) in enumerate(rows, start=2):
        if not image:
            raise UserError(f"{path}, line {line} has no image; give its path, relative to {path.parent}")
        if split not in SPLIT:
            raise UserError(
                f"{path}, line {line}: the split {split!r} is unknown; valid are {', '.join(PARTS)} or nothing"
            )
    return rows
