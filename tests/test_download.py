"""Downloads from a server on this machine that stalls, cuts off, redirects, corrupts and refuses."""

import hashlib
import io
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from muntin.cli import main
from muntin.errors import UserError
from muntin.models import create_backbone, create_model, list_models
from muntin.weights import convert
from muntin.weights.download import cache_folder, fetch, file_name, find, index_table, local_file, published, resolve

CONTENT = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
QUICK = {"timeout": 0.3, "wait": 0.01}


class Server(ThreadingHTTPServer):
    """What it does depends on the path; `asked` has the path and Range of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.asked: list[tuple[str, str | None]] = []

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.strip("/").partition(".")[0]
        number = sum(asked == self.path for asked, _ in self.server.asked)  # of this request, from 0
        self.server.asked.append((self.path, self.headers["Range"]))
        if path in ("redirect", "hub"):
            self.send_response(302)
            self.send_header("Location", "/file.bin")
            if path == "hub":
                self.send_header("X-Linked-ETag", f'"{SHA}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.isdigit():
            self._answer(int(path), b"")
        elif path == "busy" and number < 2:
            self._answer(503, b"")
        elif path == "page":
            self._answer(200, b"<html>log in</html>", "text/html; charset=utf-8")
        elif path == "unsized":
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.content)
        else:
            self._send(path, number)

    def _answer(self, code: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, path: str, number: int) -> None:
        content = self.server.content
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if path in ("deaf", "deafcut") or (self.headers["If-Range"] or tag) != tag:
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if path != "untagged":
            self.send_header("ETag", tag)
        if start:
            start += 7 if path == "astray" and number == 1 else 0
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        whole = path in ("file", "deaf") or number >= (1000 if path == "deafcut" else 2)
        self.wfile.write(content[start:] if whole else content[start : start + 100_000])
        if not whole:
            self.wfile.flush()
            if path == "stall":
                time.sleep(0.6)
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MUNTIN_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What arrives


def test_a_file_is_fetched_once(server: Server, home: Path) -> None:
    path = fetch(server.address("file.bin"), SHA, **QUICK)
    assert path.read_bytes() == CONTENT
    assert path.parent == home / "weights"
    assert _left(path.parent) == [path.name]  # no part stays
    assert fetch(server.address("file.bin"), SHA[:8], **QUICK) == path
    assert len(server.asked) == 1


@pytest.mark.parametrize("path", ["redirect.bin", "busy.bin", "unsized.bin", "deaf.bin"])
def test_redirected_busy_and_without_length(path: str, server: Server) -> None:
    assert fetch(server.address(path), SHA, **QUICK).read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["cut.bin", "stall.bin"])
def test_a_broken_download_is_continued(path: str, server: Server) -> None:
    assert fetch(server.address(path), SHA, attempts=2, **QUICK).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-", "bytes=200000-"]  # two tries failed, but not in vain


def test_a_later_call_continues_too(server: Server, home: Path) -> None:
    with pytest.raises(UserError, match=r"after 1 tries \(the connection ended after 100000 of 300000 bytes\)"):
        fetch(server.address("cut.bin"), SHA, attempts=1, **QUICK)
    name = file_name(server.address("cut.bin"))
    assert _left(home / "weights") == [f"{name}.part", f"{name}.part.json"]
    assert fetch(server.address("cut.bin"), SHA, **QUICK).read_bytes() == CONTENT
    assert server.ranges()[1] == "bytes=100000-"
    assert _left(home / "weights") == [name]


@pytest.mark.parametrize("path", ["cut.bin", "untagged.bin"])
def test_a_file_that_changed_is_begun_anew(path: str, server: Server) -> None:
    """Also where the server does not say which version of a file it sends."""
    with pytest.raises(UserError, match="after 1 tries"):
        fetch(server.address(path), attempts=1, **QUICK)
    server.content = CONTENT[::-1]
    assert fetch(server.address(path), **QUICK).read_bytes() == CONTENT[::-1]


def test_a_server_that_continues_at_another_byte(server: Server) -> None:
    assert fetch(server.address("astray.bin"), **QUICK).read_bytes() == CONTENT


def test_a_server_that_ignores_ranges(server: Server) -> None:
    with pytest.raises(UserError, match="after 3 tries"):
        fetch(server.address("deafcut.bin"), attempts=3, **QUICK)
    assert len(server.asked) == 3


def test_a_part_that_is_whole_already(server: Server, home: Path) -> None:
    """Stopped between the last byte and the renaming."""
    with pytest.raises(UserError):
        fetch(server.address("cut.bin"), attempts=1, **QUICK)
    part = home / "weights" / (file_name(server.address("cut.bin")) + ".part")
    part.write_bytes(CONTENT)
    assert fetch(server.address("cut.bin"), SHA, **QUICK).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=300000-"]
    other = home / "weights" / (file_name(server.address("file.bin")) + ".part")
    other.write_bytes(CONTENT + b"more")
    other.with_name(other.name + ".json").write_text("damaged")
    assert fetch(server.address("file.bin"), SHA, **QUICK).read_bytes() == CONTENT


def test_several_at_once(server: Server, home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(server.address("stall.bin"), SHA, **QUICK), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-", "bytes=200000-"]  # one of them worked, the others waited
    assert _left(home / "weights") == [paths[0].name]


# What does not


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_not_repeated(code: int, server: Server, home: Path) -> None:
    place = home / "weights" / file_name(server.address(f"{code}.bin"))
    with pytest.raises(UserError) as caught:
        fetch(server.address(f"{code}.bin"), **QUICK)
    assert str(code) in str(caught.value)
    assert f"put it at {place}" in str(caught.value)
    assert len(server.asked) == 1


def test_a_server_that_stays_broken(server: Server) -> None:
    with pytest.raises(UserError, match=r"after 4 tries \(500 Internal Server Error\).*put it at"):
        fetch(server.address("500.bin"), **QUICK)
    assert len(server.asked) == 4


def test_no_server(server: Server) -> None:
    address = server.address("file.bin")
    server.server_close()
    with pytest.raises(UserError, match="Connection refused") as caught:
        fetch(address.replace(str(server.server_port), "9"), **QUICK)
    assert "fetch http://127.0.0.1:9/file.bin where there is a network and put it at" in str(caught.value)


def test_a_page_is_no_file(server: Server, home: Path) -> None:
    with pytest.raises(UserError, match="web page"):
        fetch(server.address("page.bin"), **QUICK)
    assert not list((home / "weights").glob("*.bin"))


@pytest.mark.parametrize("cut", [0, 0.5])
def test_an_answer_without_length_that_is_cut_off_is_not_kept(cut: float, server: Server, home: Path) -> None:
    whole = safetensors.torch.save({"weight": torch.zeros(100)})
    for content in (whole, _zipped({"weight": torch.zeros(100)})):
        server.content = content[: int(cut * len(content))]
        with pytest.raises(UserError, match="empty"):
            fetch(server.address("unsized"), attempts=1, **QUICK)
        server.content = content
        assert fetch(server.address("unsized"), **QUICK).read_bytes() == content
        fetch(server.address("unsized"), **QUICK).unlink()


def _zipped(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_a_wrong_hash_keeps_the_file_aside(server: Server, home: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(UserError) as caught:
        fetch(server.address("file.bin"), wrong, **QUICK)
    kept = home / "weights" / (file_name(server.address("file.bin")) + ".wrong")
    assert all(text in str(caught.value) for text in (SHA, wrong, str(kept)))
    assert kept.read_bytes() == CONTENT
    assert _left(home / "weights") == [kept.name]
    fetch(server.address("file.bin"), SHA, **QUICK).write_bytes(b"changed")  # a file that is there is checked too
    with pytest.raises(UserError, match=hashlib.sha256(b"changed").hexdigest()):
        fetch(server.address("file.bin"), SHA, **QUICK)
    assert fetch(server.address("file.bin"), SHA, **QUICK).read_bytes() == CONTENT


def test_a_hash_that_the_server_states(server: Server, home: Path) -> None:
    """As Hugging Face's hub does."""
    assert fetch(server.address("hub.bin"), **QUICK).read_bytes() == CONTENT
    server.content = CONTENT[::-1]
    with pytest.raises(UserError, match=f"should have {SHA}"):
        fetch(server.address("hub.2.bin"), **QUICK)


def test_a_hash_in_the_address(server: Server) -> None:
    address = server.address("file.bin")
    assert fetch(f"{address}#sha256={SHA}", **QUICK).read_bytes() == CONTENT
    with pytest.raises(UserError, match="should have ffffffff"):
        fetch(f"{address}#sha256=ffffffff", **QUICK)
    with pytest.raises(UserError, match="hexadecimal"):
        fetch(address, "none", **QUICK)


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*MUNTIN_HOME"):
        fetch(server.address("file.bin"), folder=tmp_path / "file" / "folder", **QUICK)


@pytest.mark.parametrize("address", ["http://", "ht!tp://x/y", "http://exa mple/x"])
def test_no_address(address: str) -> None:
    with pytest.raises(UserError):
        fetch(address, attempts=1, **QUICK)


# Without a network


@pytest.mark.parametrize("name", ["MUNTIN_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(name: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    address = server.address("file.bin")
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"{name}.*fetch {address} where there is a network and put it at"):
        fetch(address, **QUICK)
    assert not server.asked
    monkeypatch.setenv(name, "0")
    fetch(address, **QUICK)
    monkeypatch.setenv(name, "yes")
    assert fetch(address, **QUICK).read_bytes() == CONTENT


def test_a_file_address_is_read_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a file.bin"
    path.write_bytes(CONTENT)
    assert local_file(path.as_uri()) == path
    with pytest.raises(UserError, match=SHA):
        fetch(path.as_uri(), "0" * 8)
    assert path.exists()  # somebody else's file is not moved
    with pytest.raises(UserError, match="no file at"):
        local_file((tmp_path / "none.bin").as_uri())
    assert local_file("some/file.pth") == Path("some/file.pth")


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "home" / "weights"
    monkeypatch.delenv("MUNTIN_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert cache_folder() == tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.delenv("TORCH_HOME")
    assert cache_folder() == tmp_path / "xdg" / "torch" / "hub" / "checkpoints"


def test_names_of_files() -> None:
    assert file_name(find("swin_t").address) == "swin_tiny_patch4_window7_224.pth"
    assert file_name(find("swin_t", "timm_in1k").address) == "swin_tiny_patch4_window7_224.ms_in1k.safetensors"
    names = [file_name(c.address) for c in published()]
    assert len(set(names)) == len(names)
    one, two = (file_name(f"https://{host}.org/model.safetensors") for host in "ab")
    assert one != two and one.endswith("-model.safetensors")


# The index


def test_every_entry_is_sound() -> None:
    for c in published():
        assert c.model in list_models(), c
        assert c.address.startswith("https://")
        assert c.classes in (0, 1000, 21841)
        assert bool(c.classes) == bool(c.size) != bool(c.figure)
        assert c.resize is None or c.size < c.resize < 1.2 * c.size
        with torch.device("meta"):
            create_model(c.model, c.classes or 1000, **c.config)
    assert {c.model for c in published()} >= {*(f"swin_{s}" for s in "tsbl"), *(f"swinv2_{s}" for s in "tsbl")}
    assert all(c.address.rpartition("-")[2] == f"{c.sha256}.pth" for c in published() if c.sha256)
    assert sum(bool(c.sha256) for c in published()) == 6
    assert index_table().count("\n") == len(published()) + 1


def test_what_pretrained_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("swin_b", True) is find("swin_b", "in1k")
    assert resolve("swin_b", "in22k_384") is find("swin_b", "in22k_384")
    assert resolve("swin_b", "weights/file.pth") == "weights/file.pth"
    assert resolve("swin_b", Path("file")) == "file"
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert resolve("swin_b", "run") == "run"
    with pytest.raises(UserError, match="swin_b has no weights 'in1k_348'.*did you mean 'in1k_384'.*torchvision_in1k"):
        create_model("swin_b", pretrained="in1k_348")
    for name, words in (("rmt_s", "file-sharing site"), ("swin_free_t", "Swin-Free"), ("swin_b_br", "BatchNorm")):
        with pytest.raises(UserError, match=f"no weights of {name} are published: .*{words}"):
            create_model(name, pretrained=True)


def test_the_command_lists_and_fetches(home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["weights", "swinv2_t"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "tag", "size", "classes", "published", "licence", "address"]
    assert [line.split()[1] for line in lines[1:]] == [c.tag for c in published() if c.model == "swinv2_t"]
    assert main(["weights", "swin_x"]) == 2
    assert "did you mean" in capsys.readouterr().err
    monkeypatch.setenv("MUNTIN_OFFLINE", "1")
    assert main(["weights", "swin_t", "--fetch", "in1k"]) == 2
    place = home / "weights" / "swin_tiny_patch4_window7_224.pth"
    assert f"put it at {place}" in capsys.readouterr().err
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert main(["weights", "swin_t", "--fetch", "in1k"]) == 0
    assert capsys.readouterr().out.strip() == str(place)


def test_the_preprocessing_of_a_checkpoint() -> None:
    from muntin.data.transforms import Evaluate

    shown = find("swin_b", "in22k_ft_in1k_384").preprocessing
    assert (shown["size"], shown["resize"]) == ((384, 384), None)
    assert Evaluate(**find("efficientvit_m0").preprocessing) is not None
    with pytest.raises(UserError, match="backbone for images of any size"):
        _ = find("swin_t", "coco_mask_rcnn_3x").preprocessing


def test_the_backbone_of_a_detector(home: Path, randomise: Any) -> None:
    small: dict[str, Any] = {"dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    one = randomise(create_backbone("swin_t", out_norm=True, **small))
    path = home / "weights" / "mask_rcnn_swin_tiny_patch4_window7.pth"
    path.parent.mkdir(parents=True)
    state = {f"backbone.{n}": t for n, t in convert(one.state_dict(), "authors").items()}
    torch.save({"state_dict": state | {"neck.x": torch.ones(2)}, "meta": {"epoch": 36}}, path)
    two = create_backbone("swin_t", out_norm=True, pretrained="coco_mask_rcnn_3x", **small)
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in two.state_dict().items())
    with pytest.raises(UserError, match="create_backbone"):
        create_model("swin_t", pretrained="coco_mask_rcnn_3x")


def test_a_model_with_published_weights(home: Path, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, under the name that the index gives; the tag's window is set unless another is asked for."""
    small: dict[str, Any] = {"dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    monkeypatch.setenv("MUNTIN_OFFLINE", "1")
    with pytest.raises(UserError, match="swin_base_patch4_window12_384.pth"):
        create_model("swin_b", pretrained="in1k_384")
    one = randomise(create_model("swin_b", 1000, window=12, **small))
    (home / "weights").mkdir(parents=True)
    path = home / "weights" / "swin_base_patch4_window12_384.pth"
    torch.save({"model": convert(one.state_dict(), "authors")}, path)
    two = create_model("swin_b", pretrained="in1k_384", **small)
    assert two.config.window == 12
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in two.state_dict().items())
    assert create_model("swin_b", pretrained="in1k_384", **small | {"window": 7}).config.window == 7
    backbone = create_backbone("swin_b", pretrained="in1k_384", **small)
    assert (backbone.config.window, backbone.config.small_maps) == (12, "pad")
    assert torch.equal(backbone.stem.proj.weight, one.backbone.stem.proj.weight)


def test_a_head_of_22k_classes_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    one = create_model("swin_t", 21841, **small)
    path = home / "weights" / "swin_tiny_patch4_window7_224_22k.pth"
    path.parent.mkdir(parents=True)
    torch.save({"model": convert(one.state_dict(), "authors")}, path)
    monkeypatch.setenv("MUNTIN_OFFLINE", "1")
    with pytest.warns(UserWarning, match="num_classes=21841 keeps its own"):
        create_model("swin_t", pretrained="in22k", **small)
    kept = create_model("swin_t", 21841, pretrained="in22k", **small)
    assert torch.equal(kept.head.fc.weight, one.head.fc.weight)
    create_model("swin_t", 10, pretrained="in22k", **small)  # whoever asks for 10 classes knows


def test_a_model_from_an_address(server: Server, randomise: Any) -> None:
    small: dict[str, Any] = {"dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    one = randomise(create_model("swin_t", 5, **small))
    server.content = safetensors.torch.save(dict(one.state_dict()))
    two = create_model("swin_t", 5, pretrained=server.address("file.safetensors"), **small)
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in two.state_dict().items())
