"""`muntin shard`: labelled images as tar shards in WebDataset's form, shuffled once."""

import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from muntin.data.check import BadFiles
from muntin.data.datasets import Images
from muntin.data.decode import Encoded
from muntin.data.images import BadImage, check_image
from muntin.data.indexing import index_shard, write_index
from muntin.data.shards import CLASSES
from muntin.data.sources import open_parts
from muntin.errors import UserError
from muntin.progress import Bar
from muntin.run import write_json

MEGABYTES = 256.0  # of a shard: some thousand photographs
BLOCK = 512  # bytes that a tar rounds its files up to, and the size of a header


def write_shards(
    data: str,
    out: str,
    per_shard: int | None = None,
    megabytes: float = MEGABYTES,
    seed: int = 0,
    on_bad_image: str = "error",
) -> dict[str, tuple[int, int]]:
    """Write the images of any source as OUT/PART-000000.tar and so on, with classes.json and index.json.

    A shard ends after `per_shard` images, or before it exceeds `megabytes` (10^6 bytes). The same data and seed give
    the same bytes. OUT is there as a whole or not at all. Returns the numbers of images and shards by part; images that
    "skip" leaves out are in OUT/bad_files.csv.

    Raises `UserError` where OUT is not empty, a setting makes no sense, or, unless told to skip it, an image is bad.
    """
    _refuse(out, per_shard, megabytes, on_bad_image)
    parts = open_parts(data)
    target = Path(out)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        bad = BadFiles(partial / "bad_files.csv") if on_bad_image == "skip" else None
        counts = {}
        with Bar("shards", sum(map(len, parts.values()))) as bar:
            for number, (name, images) in enumerate(sorted(parts.items())):
                order = np.random.default_rng((seed, number)).permutation(len(images)).tolist()
                samples = _samples(images, order, bad, bar)
                counts[name] = _write_part(partial, name, samples, per_shard, round(megabytes * 1e6))
        write_json(partial / CLASSES, next(iter(parts.values())).classes)
        files = sorted(partial.glob("*.tar"))
        write_index(partial, [index_shard(file, file.name) for file in files])
        if target.exists():
            target.rmdir()  # it is empty
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _refuse(out: str, per_shard: int | None, megabytes: float, on_bad_image: str) -> None:
    if per_shard is not None and per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: give a whole number of at least 1")
    if not megabytes > 0:
        raise UserError(f"--megabytes {megabytes:g}: give a positive number")
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"--on-bad-image {on_bad_image}: valid are error and skip")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{out} is there already; remove it or choose another folder")


Sample = tuple[bytes, str, str, bytes]  # an image and its suffix, a label's suffix and its bytes


def _samples(images: Images, order: list[int], bad: BadFiles | None, bar: Bar) -> Iterator[Sample]:
    """The images that can be used, in this order."""
    for position in order:
        bar.step()
        label = images.labels[position]
        text = json.dumps({"labels": label}) if isinstance(label, list) else str(label)
        try:
            data, suffix = _encoded(images, position)
        except BadImage as error:
            if bad is None:
                raise UserError(f"{error}. Or leave such images out with: --on-bad-image skip") from error
            bad.add(images.name(position), str(error))
            continue
        yield data, suffix, "json" if isinstance(label, list) else "cls", text.encode()


def _encoded(images: Images, position: int) -> tuple[bytes, str]:
    """An image's own bytes and suffix; PNG where there are none."""
    found = images.read(position)
    if isinstance(found, Encoded):
        check_image(found.data, found.name)
        return found.data, suffix_of(found.data)
    file = io.BytesIO()
    found.save(file, "PNG")
    return file.getvalue(), "png"


def suffix_of(data: bytes) -> str:
    """By the first bytes, whatever the file was called."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg", "PPM": "ppm", "TIFF": "tif"}.get(str(image.format), str(image.format).lower())


def _write_part(
    folder: Path, part: str, samples: Iterator[Sample], per_shard: int | None, limit: int
) -> tuple[int, int]:
    """Shards of one part; the numbers of images and shards."""
    written = shards = 0
    waiting = next(samples, None)
    while waiting is not None:
        with tarfile.open(folder / f"{part}-{shards:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            inside = size = 0
            while waiting is not None:
                image, suffix, kind, label = waiting
                more = sum(BLOCK + -(-len(content) // BLOCK) * BLOCK for content in (image, label))
                if inside and (inside >= per_shard if per_shard else size + more > limit):
                    break
                for content, name in ((image, suffix), (label, kind)):
                    member = tarfile.TarInfo(f"{written:09}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                inside, size, written = inside + 1, size + more, written + 1
                waiting = next(samples, None)
        shards += 1
    return written, shards
