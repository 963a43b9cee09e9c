"""Published checkpoints: which there are (index.toml), where they are kept, and how they get there.

A file is downloaded beside its place as NAME.part, continued where a connection broke off, checked, and renamed.
Processes that want the same file wait for each other.
"""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import torch

from muntin.errors import UserError, nearest
from muntin.weights.files import is_whole

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHUNK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be another one later
_COMMON = ("model.safetensors", "pytorch_model.bin")  # names that say nothing


@dataclass(frozen=True)
class Checkpoint:
    """A published file and what it was measured with. `sha256` may be the first digits only, or empty: not given.

    classes: of the last layer, 0 for the backbone of a detector or segmenter; size: sides of the input; resize: the
    shorter side before the centre crop, None where the whole image is resized to `size`; top1: percent of
    ImageNet-1k, as published; figure: what else is published; config: fields that differ from the model's row.
    """

    model: str
    tag: str
    address: str
    publisher: str
    licence: str
    classes: int
    size: int = 0
    resize: int | None = None
    top1: str = ""
    figure: str = ""
    sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What `muntin.data.transforms.Evaluate` takes."""
        if not self.classes:
            raise UserError(
                f"{self.model} {self.tag} is a backbone for images of any size: take what its detector takes"
            )
        size = (self.size, self.size)
        return {"size": size, "resize": self.resize, "mean": MEAN, "std": STD} | {
            "interpolation": "bicubic",
            "channels": "RGB",
        }

    def fetch(self, **options: Any) -> Path:
        """The file, downloaded unless it is there; the options are those of `fetch`."""
        return fetch(self.address, self.sha256, **options)


@lru_cache(maxsize=1)
def _index() -> dict[str, Any]:
    return tomllib.loads((resources.files("muntin") / "weights" / "index.toml").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def published() -> tuple[Checkpoint, ...]:
    """Every published checkpoint; the first of a model is its default."""
    index = dict(_index())
    publishers, _ = index.pop("publishers"), index.pop("elsewhere")
    found = []
    for model, tags in index.items():
        for tag, row in tags.items():
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in row.get("config", {}).items()}
            row = row | {"config": config, "licence": publishers[row["publisher"]]["licence"]}
            found.append(Checkpoint(model, tag, **row))
    return tuple(found)


def find(model: str, tag: str | None = None) -> Checkpoint:
    """A model's checkpoint by tag, by default its first. UserError with what there is, or how to get one."""
    tags = {c.tag: c for c in published() if c.model == model}
    if not tags:
        reason = next((text for name, text in _index()["elsewhere"].items() if model.startswith(name)), "")
        near = nearest(model, {c.model: None for c in published()})
        raise UserError(
            f"no weights of {model} are published" + (f": {reason}" if reason else f"{near}; give pretrained='FILE'")
        )
    if tag is None:
        return next(iter(tags.values()))
    if tag not in tags:
        raise UserError(f"{model} has no weights {tag!r}{nearest(tag, tags)}; there are {', '.join(tags)}")
    return tags[tag]


def resolve(model: str, pretrained: str | os.PathLike[str] | bool) -> Checkpoint | str:
    """What `pretrained` means for a model: one of its tags (True: the default), or an address or path as it is."""
    if pretrained is True:
        return find(model)
    text = os.fspath(pretrained)  # type: ignore[arg-type]
    if any(text == c.tag for c in published() if c.model == model):
        return find(model, text)
    path_like = "/" in text or os.sep in text or Path(text).suffix or Path(text).exists()
    if path_like or isinstance(pretrained, os.PathLike):
        return text
    return find(model, text)  # its error names the tags


def local_file(source: str | os.PathLike[str], **options: Any) -> Path:
    """The path of an address (http, https or file) or path."""
    text = os.fspath(source)
    return fetch(text, **options) if re.match(r"(https?|file)://", text) else Path(text)


def cache_folder() -> Path:
    """$MUNTIN_HOME/weights, or else torch.hub's folder of checkpoints, which is $TORCH_HOME/hub/checkpoints, or
    $XDG_CACHE_HOME/torch/hub/checkpoints, or ~/.cache/torch/hub/checkpoints."""
    home = os.environ.get("MUNTIN_HOME")
    return Path(home).expanduser() / "weights" if home else Path(torch.hub.get_dir()) / "checkpoints"


def offline() -> bool:
    """Whether MUNTIN_OFFLINE or HF_HUB_OFFLINE is set to something that means yes."""
    values = [os.environ.get(name, "") for name in ("MUNTIN_OFFLINE", "HF_HUB_OFFLINE")]
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def file_name(address: str) -> str:
    """The name under which an address is kept: its last part, where that says something. Two addresses outside of
    the index never share a name."""
    parts = [unquote(part) for part in urlsplit(address).path.split("/") if part]
    name = re.sub(r"[^\w.+-]", "_", parts[-1] if parts else "file")
    if name in _COMMON and len(parts) > 3:
        name = re.sub(r"[^\w.+-]", "_", parts[-4]) + Path(name).suffix  # .../NAME/resolve/main/model.safetensors
    known = any(c.address == address for c in published())
    return name if known else f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"


def fetch(
    address: str,
    sha256: str = "",
    *,
    folder: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
    attempts: int = 4,
    wait: float = 1.0,
    shown: bool = True,
) -> Path:
    """The file at an address, downloaded into `folder` (default: `cache_folder()`) unless it is there.

    address: http, https, or file, which is read where it is. It may end in #sha256=HEX.
    sha256: of the file, or its first digits; a file with another one is kept aside as NAME.wrong and refused. Where
    none is given, what Hugging Face's hub states is checked.
    timeout: seconds without a byte after which a connection counts as broken. attempts: tries in a row that bring
    nothing new, `wait` seconds apart, doubled each time; what a broken try has brought is kept and continued.
    shown: with a bar in a terminal.

    Raises UserError that says which file to fetch by other means and where to put it; `Absent` where the server has
    none.
    """
    address, _, fragment = address.partition("#")
    sha256 = (sha256 or fragment.removeprefix("sha256=")).lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}|", sha256):
        raise UserError(f"sha256={sha256!r}: give 8 to 64 hexadecimal digits, the beginning of the file's hash")
    if urlsplit(address).scheme == "file":
        path = Path(unquote(urlsplit(address).path))
        _check(path, sha256, aside=False)
        return path
    path = Path(folder or cache_folder()) / file_name(address)
    if path.is_file():
        _check(path, sha256)
        return path
    if offline():
        raise UserError(
            f"{path.name} is not here, and MUNTIN_OFFLINE or HF_HUB_OFFLINE is set: {_by_hand(address, path)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as part:
            if part is not None:
                stated = _download(_Transfer(address, path, timeout, shown), part, attempts, wait)
                sha256 = sha256 or stated
                part.flush()
                os.fsync(part.fileno())
                if fcntl is not None:  # the lock is held until the file has its name
                    _finish(Path(part.name), path, sha256)
        if fcntl is None and part is not None:  # Windows renames closed files only
            _finish(Path(part.name), path, sha256)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free some space, or choose another folder with "
            "MUNTIN_HOME"
        ) from error
    return path


def _finish(part: Path, path: Path, sha256: str) -> None:
    _check(part, sha256, path)
    if not is_whole(part):
        part.unlink()
        raise UserError(f"what came for {path.name} is empty or cut off, and was not kept: run this again")
    os.replace(part, path)
    _validator(path).unlink(missing_ok=True)


def _by_hand(address: str, path: Path) -> str:
    return f"fetch {address} where there is a network and put it at {path}"


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _validator(path: Path) -> Path:
    """Beside a part: what the server said that it is a part of."""
    return path.with_name(path.name + ".part.json")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[bytes] | None]:
    """The part of a file, open for this process alone; None where another process has finished the file meanwhile."""
    if fcntl is None:  # no lock: a part of its own for each process, which is not continued later
        part = _part(path).with_suffix(f".{os.getpid()}.part")
        with part.open("wb+") as file:
            yield file
        return
    while True:
        with _part(path).open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.is_file():  # the other process has renamed the part that we waited for
                if os.fstat(file.fileno()).st_size == 0:
                    _part(path).unlink(missing_ok=True)
                yield None
                return
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(_part(path)))
            except FileNotFoundError:
                same = False  # it was set aside
            if same:
                yield file
                return


@dataclass(frozen=True)
class _Transfer:
    address: str
    path: Path
    timeout: float
    shown: bool


class Absent(UserError):
    """There is no such file on the server."""


class _Broken(Exception):
    """A try that failed in a way that another one may not."""


def _download(transfer: _Transfer, part: IO[bytes], attempts: int, wait: float) -> str:
    """Fill the part; the hash that the server states, or nothing.

    UserError where the server refuses, or after `attempts` tries in a row without a new byte.
    """
    failed = 0
    while True:
        before = part.seek(0, os.SEEK_END)
        try:
            return _attempt(transfer, part)
        except _Broken as error:
            failed = failed + 1 if part.seek(0, os.SEEK_END) <= before else 1
            if failed >= attempts:
                host = urlsplit(transfer.address).netloc
                raise UserError(
                    f"no answer that is of use from {host} after {failed} tries ({error}): run this again, or "
                    f"{_by_hand(transfer.address, transfer.path)}"
                ) from error
        time.sleep(wait * 2 ** (failed - 1) * random.uniform(0.75, 1.25))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Hugging Face's hub states the sha256 of a large file when it redirects to where the file is stored."""

    sha256 = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        stated = headers.get("X-Linked-ETag", "").strip('"').lower()
        self.sha256 = stated if re.fullmatch(r"[0-9a-f]{64}", stated) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _attempt(transfer: _Transfer, part: IO[bytes]) -> str:
    start = part.seek(0, os.SEEK_END)
    headers = {"User-Agent": "muntin", "Accept-Encoding": "identity"}
    validator = _read_validator(transfer.path)
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    redirects = _Redirects()
    try:
        request = urllib.request.Request(transfer.address, headers=headers)
        with urllib.request.build_opener(redirects).open(request, timeout=transfer.timeout) as answer:
            _receive(transfer, answer, part, start if answer.status == 206 else 0)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return redirects.sha256  # all of it is here
            part.truncate(0)
            raise _Broken("the part did not fit the file") from error
        if error.code in _AGAIN:
            raise _Broken(f"{error.code} {error.reason}") from error
        raise (Absent if error.code in (404, 410) else UserError)(
            f"{transfer.address} was refused with {error.code} {error.reason}: check the address, or "
            f"{_by_hand(transfer.address, transfer.path)}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{transfer.address!r} is no address ({error}): give http://, https:// or a path") from error
    return redirects.sha256


def _receive(transfer: _Transfer, answer: Any, part: IO[bytes], start: int) -> None:
    """Append what the server sends from byte `start` on."""
    if answer.headers.get_content_type() == "text/html":
        raise UserError(
            f"{transfer.address} gives a web page and not a file: is a login or a proxy in between? "
            f"{_by_hand(transfer.address, transfer.path).capitalize()}"
        )
    span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if start and (span is None or int(span[1]) != start):
        part.truncate(0)
        raise _Broken("the server continued at another byte")
    if not start:
        part.truncate(0)
        strong = answer.headers.get("ETag", "")
        _write_validator(transfer.path, answer.headers.get("Last-Modified", "") if strong[:2] in ("", "W/") else strong)
    length = answer.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    part.seek(0, os.SEEK_END)
    with _bar(transfer, total, start) as advance:
        while chunk := _read(answer):
            part.write(chunk)
            advance(len(chunk))
    part.flush()
    found = part.seek(0, os.SEEK_END)
    if not found:
        raise _Broken("the answer was empty")
    if total is not None and found != total:
        raise _Broken(f"the connection ended after {found} of {total} bytes")


def _read(answer: Any) -> bytes:
    try:
        return answer.read1(_CHUNK)  # what has come, and not only whole chunks
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _read_validator(path: Path) -> str:
    try:
        return str(json.loads(_validator(path).read_text(encoding="utf-8"))["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write_validator(path: Path, value: str) -> None:
    _validator(path).write_text(json.dumps({"validator": value}), encoding="utf-8")


@contextlib.contextmanager
def _bar(transfer: _Transfer, total: int | None, start: int) -> Iterator[Any]:
    """A function that moves a bar on stderr, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda count: None
        return
    hidden = not (transfer.shown and sys.stderr.isatty())
    name = transfer.path.name
    with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        yield bar.update


def _check(path: Path, sha256: str, place: Path | None = None, aside: bool = True) -> None:
    """UserError where the file's hash does not begin with `sha256`; the file is then renamed to NAME.wrong."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if not sha256:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found.startswith(sha256):
        return
    place = place or path
    kept = place.with_name(place.name + ".wrong") if aside else path
    if aside:
        os.replace(path, kept)
        _validator(place).unlink(missing_ok=True)
    raise UserError(
        f"{place.name} has the sha256 {found} and should have {sha256}: it was changed or damaged on its way and is "
        f"kept aside as {kept}; run this again to download it anew"
    )


def index_table() -> str:
    """The index as a table for the documentation."""
    lines = [
        "| model | tag | pixels | classes | published | licence | settings |",
        "| --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for c in published():
        settings = ", ".join(f"`{name}={value}`" for name, value in c.config.items()) or "-"
        classes, size = (f"{c.classes:,}", str(c.size)) if c.classes else ("-", "-")
        cells = [f"`{c.model}`", f"[`{c.tag}`]({c.address})", size, classes, c.top1 or c.figure or "-", c.licence]
        lines.append("| " + " | ".join([*cells, settings]) + " |")
    return "\n".join(lines)
