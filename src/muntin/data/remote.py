"""Tar shards over HTTP: fetched whole into a cache folder of bounded size, those that are needed next first.

A download that breaks is continued where it was (`muntin.weights.download.fetch`), and a shard takes its name when it
is whole. Several processes share the folder: one fetches a shard, the others wait for it.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
from pathlib import Path

import numpy as np

from muntin.data.datasets import Images
from muntin.data.indexing import INDEX, Shard, cache_home, index_json, index_shard, read_index
from muntin.data.order import ShardsShuffled
from muntin.data.shards import CLASSES, class_map, expand, read_classes, shard_images
from muntin.errors import UserError
from muntin.progress import progress
from muntin.run import atomic_write
from muntin.weights.download import Absent, fetch, file_name

GIGABYTES = 50.0  # of the cache folder, unless $MUNTIN_SHARD_CACHE_GB says otherwise
TOGETHER = 8  # shards whose images are mixed


class Cache:
    """Shards on the disk, by address, of all data together. The least recently used ones make room for others.

    sizes: bytes of each shard where they are known, by the index kept in the folder `index`: a file of another size is
    fetched again.
    Raises `UserError` where not even two shards would fit.
    """

    def __init__(self, folder: Path, addresses: list[str], sizes: list[int] | None, limit: int, index: Path) -> None:
        self.folder = folder
        self.index = index
        self.addresses = addresses
        self.sizes = sizes
        self.limit = limit
        self._thread: threading.Thread | None = None
        self._wanted: list[int] = []
        if sizes and 2 * max(sizes) > limit:
            raise UserError(
                f"shards of {max(sizes) / 1e9:.2f} GB do not fit a cache of {limit / 1e9:.2f} GB, which has to hold "
                "two; set MUNTIN_SHARD_CACHE_GB higher, or make smaller shards"
            )

    def together(self) -> int:
        """Shards whose images can be mixed: two such groups fit the cache."""
        if not self.sizes:
            return TOGETHER
        return max(min(TOGETHER, self.limit // (2 * max(self.sizes))), 1)

    def path(self, number: int) -> Path:
        """A shard's file, fetched if it is not there. Raises `UserError` where it cannot be had."""
        address = self.addresses[number]
        path = self.folder / file_name(address)
        found = self._bytes(path)
        if found is None or found != (self._size(number) or found):
            if found is not None:  # of another size; one that another process has just fetched stays
                path.unlink(missing_ok=True)
            self._make_room(number)
            fetch(address, folder=self.folder, shown=False)
            if self._size(number) not in (None, self._bytes(path)):
                raise UserError(
                    f"{address} has another size than the {self._size(number)} bytes in its index; was it replaced? "
                    f"Remove {self.index} to have it read anew"
                )
        with contextlib.suppress(FileNotFoundError):  # another process needed the room
            os.utime(path)
        return path

    def ahead(self, numbers: list[int]) -> None:
        """Fetch these shards in the background, in this order."""
        self._wanted = numbers
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._thread.start()

    def _fetch_wanted(self) -> None:
        tried: set[int] = set()
        while todo := [number for number in self._wanted if number not in tried]:
            tried.add(todo[0])
            try:
                self.path(todo[0])
            except UserError:
                continue  # whoever needs it says so

    def _size(self, number: int) -> int | None:
        return self.sizes[number] if self.sizes else None

    def _bytes(self, path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def _make_room(self, number: int) -> None:
        """Remove the least recently used shards until this one fits."""
        files = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process has removed it
            files.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in files) + (self._size(number) or 0)
        for _, size, path in sorted(files):
            if used <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= size


def remote_shards(data: str) -> dict[str, Images]:
    """Images by part of the shards at an address with braces, or of an index.json that `muntin shard` wrote.

    Where there is no index.json beside the shards, all of them are fetched once to be indexed. The index and the class
    map are kept in a folder of these data, the shards in the one above, once for all data that name them.
    """
    folder = cache_home() / "shards"
    kept = folder / hashlib.sha256(data.encode()).hexdigest()[:16]
    stored = _kept(kept, INDEX, data if data.endswith(".json") else f"{_base(expand(data))}/{INDEX}")
    if data.endswith(".json"):
        if stored is None:
            raise UserError(f"there is nothing at {data}; give the address of an {INDEX} or of shards")
        shards = read_index(stored, data)
        addresses = [f"{_base([data])}/{shard.file}" for shard in shards]
    else:
        addresses = expand(data)
        shards = _indexed(addresses, stored, folder, kept)
    cache = Cache(folder, addresses, [shard.bytes for shard in shards], limit(), kept)
    known = _kept(kept, CLASSES, f"{_base(addresses)}/{CLASSES}")
    classes = class_map(shards, None if known is None else read_classes(known, f"{_base(addresses)}/{CLASSES}"))

    def order(which: np.ndarray) -> ShardsShuffled:
        return ShardsShuffled(which, cache.together(), cache.ahead)

    return shard_images(shards, addresses, classes, cache.path, order)


def _base(addresses: list[str]) -> str:
    """The address of the folder that holds them all."""
    return os.path.commonprefix([address.rpartition("/")[0] + "/" for address in addresses]).rpartition("/")[0]


def _indexed(addresses: list[str], stored: bytes | None, folder: Path, kept: Path) -> list[Shard]:
    """What each shard holds: from the index beside them, or by reading them all."""
    base = _base(addresses)
    files = [address.removeprefix(f"{base}/") for address in addresses]
    known = {shard.file: shard for shard in read_index(stored, f"{base}/{INDEX}")} if stored else {}
    missing = [number for number, file in enumerate(files) if file not in known]
    cache = Cache(folder, addresses, None, limit(), kept)
    for number in progress(missing, len(missing), "indexing shards"):
        path = cache.path(number)
        try:
            known[files[number]] = index_shard(path, files[number], addresses[number])
        except UserError:
            path.unlink(missing_ok=True)  # to be fetched again when it has been mended
            raise
    if missing:
        atomic_write(kept / INDEX, index_json(known.values()))
    return [known[file] for file in files]


def _kept(folder: Path, name: str, address: str) -> bytes | None:
    """A small file beside the shards, kept in the cache folder; None where the server has none.

    Each process fetches it into a folder of its own, and gives it its name when it is whole.
    Raises `UserError` where the server gives no answer, with the place where the file may be put.
    """
    path = folder / name
    if path.exists():
        return path.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as own:
        try:
            content = fetch(address, folder=own, shown=False).read_bytes()
        except Absent:
            return None
        except UserError as error:
            raise UserError(str(error).replace(str(Path(own) / file_name(address)), str(path))) from error
    atomic_write(path, content)
    return content


def limit() -> int:
    """Bytes of the cache folder."""
    text = os.environ.get("MUNTIN_SHARD_CACHE_GB", str(GIGABYTES))
    try:
        return int(float(text) * 1e9)
    except ValueError as error:
        raise UserError(f"MUNTIN_SHARD_CACHE_GB={text}: give a number of gigabytes") from error
