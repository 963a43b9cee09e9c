"""Tar shards: written by webdataset and by `muntin shard`, indexed, read at random, named where they are broken."""

import http.server
import io
import json
import os
import re
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from muntin.cli import main
from muntin.data import remote
from muntin.data.augment import Plain
from muntin.data.images import BadImage
from muntin.data.indexing import index_shard
from muntin.data.loading import EpochBatches, TrainingSet, training_loader
from muntin.data.pack import write_shards
from muntin.data.remote import Cache
from muntin.data.shards import expand, local_shards, part_of
from muntin.data.sources import open_parts, open_splits, splits_from_json
from muntin.data.transforms import Evaluate
from muntin.errors import UserError
from muntin.tasks.units import BadShard, shard_unit


def encoded(number, kind="JPEG", side=12):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def webdataset_shards(folder, counts, label=lambda i: {"cls": i % 3}, kind="jpg"):
    """Shards of webdataset's own writer, by name, with so many samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, count in counts.items():
        with webdataset.TarWriter(str(folder / name)) as writer:
            for _ in range(count):
                image = encoded(number, {"jpg": "JPEG", "png": "PNG"}[kind])
                writer.write({"__key__": f"sample{number:04}", kind: image} | label(number))
                number += 1
    return folder


def class_folder(root, counts, parts=("",)):
    number = 0
    for part in parts:
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                (root / part / name / f"{i}.jpg").write_bytes(encoded(number))
                number += 1
    return root


# Reading


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_webdatasets_shards_are_read_at_random(tmp_path, kind):
    webdataset_shards(tmp_path, {"train-000000.tar": 5, "train-000001.tar": 4, "val-000000.tar": 3}, kind=kind)
    parts = local_shards(str(tmp_path))
    assert {name: len(part) for name, part in parts.items()} == {"train": 9, "val": 3}
    assert parts["train"].keys[6] == "train-000001.tar/sample0006"
    assert parts["train"].labels == [i % 3 for i in range(9)] and parts["val"].classes == ["0", "1", "2"]
    for position in (7, 0, 5):
        assert parts["train"].read(position).data == encoded(position, {"jpg": "JPEG", "png": "PNG"}[kind])
    assert parts["val"].open(2).size == (12, 12)


def test_webdatasets_rotating_writer_and_json_names(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "data-%06d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            sample = {"__key__": f"{i:03}", "jpg": encoded(i), "json": {"label": ["cat", "dog"][i % 2], "note": "x"}}
            writer.write(sample)
    images = local_shards(str(tmp_path / "data-{000000..000002}.tar"))["all"]
    assert len(images) == 10 and images.classes == ["cat", "dog"] and images.labels[:3] == [0, 1, 0]
    assert images.read(9).data == encoded(9)


def test_a_list_of_labels_makes_the_data_multi_label(tmp_path):
    lists = [[0], [], [0, 2], [1]] * 10
    webdataset_shards(tmp_path, {"all.tar": 40}, label=lambda i: {"json": {"labels": lists[i]}})
    splits = open_splits(str(tmp_path), 0, 16)
    assert splits.multi_label and splits.train.classes == ["0", "1", "2"]
    place = {key: label for part in splits.parts().values() for key, label in zip(part.keys, part.labels, strict=True)}
    assert [place[f"all.tar/sample{i:04}"] for i in range(40)] == lists


def test_the_index_is_made_once_and_again_for_what_has_changed(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 3, "train-1.tar": 3})
    local_shards(str(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["labels"] = [2, 2, 2]  # read from here, not from the shard
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert local_shards(str(tmp_path))["train"].labels[:3] == [2, 2, 2]
    webdataset_shards(tmp_path, {"train-0.tar": 30})
    assert local_shards(str(tmp_path))["train"].labels[:4] == [0, 1, 2, 0]


def test_shards_that_cannot_be_written_beside_are_indexed_in_the_cache(tmp_path, monkeypatch):
    webdataset_shards(tmp_path / "shards", {"train-0.tar": 3})
    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("os.access", lambda *_: False)
    local_shards(str(tmp_path / "shards"))
    assert not (tmp_path / "shards/index.json").exists()
    (made,) = (tmp_path / "home/data/indexes").iterdir()
    before = made.stat().st_mtime_ns
    assert len(local_shards(str(tmp_path / "shards"))["train"]) == 3 and made.stat().st_mtime_ns == before


def test_patterns():
    assert expand("x-{08..11}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]
    assert expand("{train,val}-{0..1}.tar") == ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]
    with pytest.raises(UserError, match=r"\{a\} is no range"):
        expand("{a}.tar")
    with pytest.raises(UserError, match=r"all-\{5..2\}.tar: the range \{5..2\} is empty"):
        open_parts("tars/all-{5..2}.tar")
    names = (
        "train-0.tar",
        "a/validation/00.tar",
        "imagenet1k-train-0001.tar",
        "training.tar",
        "test.tar",
        "x_val_1.tar",
    )
    assert [part_of(name) for name in names] == ["train", "val", "train", "all", "test", "val"]


# Bad input


def test_missing_keys_are_named(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 2}, label=lambda i: {"cls": 0} if i == 0 else {})
    with pytest.raises(UserError, match=r"train-0.tar: the sample 'sample0001' has no label \(.cls"):
        local_shards(str(tmp_path))
    webdataset_shards(tmp_path, {"train-0.tar": 2}, label=lambda i: {"json": {"caption": "x"}})
    with pytest.raises(UserError, match="'sample0000' has no label"):
        local_shards(str(tmp_path))
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "a", "cls": 1})
    with pytest.raises(UserError, match="'a' has no image"):
        local_shards(str(tmp_path))


@pytest.mark.parametrize("keep, where", [(3000, "sample0000"), (100, "its beginning"), (0, "its beginning")])
def test_a_shard_that_was_cut_short_is_named(tmp_path, keep, where):
    webdataset_shards(tmp_path, {"train-0.tar": 6})
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"train-0.tar is no readable shard .* after {where}"):
        index_shard(path, "train-0.tar")


def second_member(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()[1].offset


def harmed(path, harm):
    """The shard with a harm at its second member; where that begins."""
    content, start = bytearray(path.read_bytes()), second_member(path)
    if harm == "a flipped byte in a header":
        content[start + 10] ^= 1
    elif harm == "a header of zeros":
        content[start : start + 512] = bytes(512)
    else:
        del content[start + {"cut in a header": 100, "cut between members": 0}[harm] :]
    path.write_bytes(content)
    return start


HARMS = ["a flipped byte in a header", "a header of zeros", "cut in a header", "cut between members"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_shard_is_read_to_its_end_or_refused(tmp_path, harm):
    path = webdataset_shards(tmp_path, {"train-0.tar": 6}) / "train-0.tar"
    start = harmed(path, harm)
    told = rf"train-0.tar is no readable shard \(damaged or cut short at byte {start:,}, after sample0000"
    with pytest.raises(UserError, match=told):
        local_shards(str(tmp_path))
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(BadShard, match=rf"train-0.tar cannot be read .*cut short at byte {start:,}"):
        list(shard_unit(str(path)).samples())


def test_two_blocks_of_zeros_end_a_shard(tmp_path):
    path = webdataset_shards(tmp_path, {"train-0.tar": 2}) / "train-0.tar"
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    content = path.read_bytes()
    path.write_bytes(content[: end + 1024])
    assert len(local_shards(str(tmp_path))["train"]) == 2
    path.write_bytes(content[: end + 512])
    with pytest.raises(UserError, match=f"cut short at byte {end:,}"):
        local_shards(str(tmp_path))


def test_corrected_labels_in_a_shard_of_the_same_size_are_read(tmp_path):
    def stamped(folder, label, time):
        webdataset_shards(folder, {"train-0.tar": 3}, label=lambda i: {"cls": label})
        os.utime(folder / "train-0.tar", ns=(time, time))

    stamped(tmp_path / "data", 0, 10**18)
    assert local_shards(str(tmp_path / "data"))["train"].labels == [0, 0, 0]
    stamped(tmp_path / "corrected", 1, 10**18 - 10**9)  # made before the index
    os.replace(tmp_path / "corrected/train-0.tar", tmp_path / "data/train-0.tar")
    assert local_shards(str(tmp_path / "data"))["train"].labels == [1, 1, 1]


def test_a_shard_that_was_changed_after_sharding_is_read(tmp_path):
    write_shards(str(class_folder(tmp_path / "photos", {"a": 3, "b": 3})), str(tmp_path / "out"))
    path, index = tmp_path / "out/all-000000.tar", tmp_path / "out/index.json"
    before = index.read_bytes()
    labels = local_shards(str(tmp_path / "out"))["all"].labels
    assert index.read_bytes() == before  # it needs no times
    path.write_bytes(turned(path))
    later = index.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert local_shards(str(tmp_path / "out"))["all"].labels == [1 - label for label in labels]


def turned(path):
    """A shard whose labels are 0 where they were 1, and the other way round."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".cls"):
                content[member.offset_data] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "names, told",
    [
        (["a.jpg", "a.cls", "a.png"], "the sample 'a' has two images, a.jpg and a.png"),
        (["a.jpg", "a.cls", "a.jpg"], "the sample 'a' has two images, a.jpg and a.jpg"),
        (["x/a.jpg", "x/a.cls", "x/a.cls"], "the sample 'x/a' has two labels, x/a.cls and x/a.cls"),
    ],
)
def test_a_sample_that_is_there_twice_is_named(tmp_path, names, told):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in names:
            content = b"1" if name.endswith("cls") else encoded(0)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=f"train-0.tar: {told}"):
        local_shards(str(tmp_path))


@pytest.mark.parametrize("label", [{"a": 1}, 1.5, True, [[1]]])
def test_a_label_of_no_use_is_named(tmp_path, label):
    webdataset_shards(tmp_path, {"train-0.tar": 1}, label=lambda i: {"json": {"label": label}})
    told = re.escape(f"train-0.tar/sample0000.json has the label {json.dumps(label)}; give a number, a name, or a list")
    with pytest.raises(UserError, match=told):
        local_shards(str(tmp_path))


def test_labels_beyond_the_class_map_are_named(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 3})
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=r"train-0.tar: the sample 'sample0002' has the label 2, which is none of"):
        local_shards(str(tmp_path))
    (tmp_path / "classes.json").write_text('["a", "a", "c"]')
    with pytest.raises(UserError, match="classes.json: give a JSON list of different class names"):
        local_shards(str(tmp_path))


def test_a_shard_that_breaks_later_gives_errors_that_name_the_sample(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 3})
    images = local_shards(str(tmp_path))["train"]
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadImage, match=r"train-0.tar/sample0002.jpg is cut short"):
        images.read(2)
    path.unlink()
    with pytest.raises(BadImage, match=r"train-0.tar/sample0000.jpg cannot be read"):
        images.read(0)


# muntin shard


def test_sharding_keeps_splits_classes_and_bytes(tmp_path, capsys):
    folder = class_folder(tmp_path / "photos", {"cat": 4, "dog": 3}, ("train", "val"))
    assert main(["shard", str(folder), str(tmp_path / "out"), "--per-shard", "3"]) == 0
    assert "train: 7 images in 3 shards" in capsys.readouterr().out
    assert main(["shard", str(folder), str(tmp_path / "one")]) == 0
    assert "train: 7 images in 1 shard\n" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    tars = [f"{part}-{i:06}.tar" for part in ("train", "val") for i in range(3)]
    assert names == sorted(["classes.json", "index.json", *tars])
    before, after = open_parts(str(folder)), open_parts(str(tmp_path / "out"))
    for part in ("train", "val"):
        ours = {after[part].read(i).data: after[part].labels[i] for i in range(7)}
        assert ours == {before[part].read(i).data: before[part].labels[i] for i in range(7)}
        assert after[part].classes == ["cat", "dog"]
    assert after["train"].labels != sorted(after["train"].labels)  # shuffled


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # webdataset leaves the file to be closed by itself
def test_webdataset_reads_our_shards(tmp_path):
    write_shards(str(class_folder(tmp_path / "photos", {"a": 5, "b": 5})), str(tmp_path / "out"))
    data = (
        webdataset.WebDataset(str(tmp_path / "out/all-000000.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    found = list(data)
    assert sorted(label for _, label in found) == [0] * 5 + [1] * 5 and found[0][0].size == (12, 12)


def test_sharding_is_deterministic_and_shuffled_by_the_seed(tmp_path):
    folder = str(class_folder(tmp_path / "photos", {"a": 6, "b": 6}))
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_shards(folder, str(tmp_path / name), megabytes=0.008, seed=seed)
    read = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "again", "two")
    }
    assert read["one"] == read["again"] != read["two"]
    sizes = [path.stat().st_size for path in (tmp_path / "one").glob("*.tar")]
    assert len(sizes) > 1
    with tarfile.open(tmp_path / "one/all-000000.tar") as tar:
        assert sum(512 + -(-member.size // 512) * 512 for member in tar) <= 8000


def test_sharding_refuses_to_overwrite_and_names_broken_images(tmp_path):
    folder = class_folder(tmp_path / "photos", {"a": 3, "b": 3})
    (folder / "a" / "1.jpg").write_bytes(encoded(1)[:200])
    with pytest.raises(UserError, match=r"a/1.jpg is damaged .*--on-bad-image skip"):
        write_shards(str(folder), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]  # nothing half written
    assert write_shards(str(folder), str(tmp_path / "out"), on_bad_image="skip") == {"all": (5, 1)}
    assert "a/1.jpg" in (tmp_path / "out/bad_files.csv").read_text()
    with pytest.raises(UserError, match="is there already"):
        write_shards(str(folder), str(tmp_path / "out"))
    with pytest.raises(UserError, match="--per-shard 0: give a whole number"):
        write_shards(str(folder), str(tmp_path / "new"), per_shard=0)


# Splits


def test_splits_of_shards_are_recorded_shortly_and_verified(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 30, "val-0.tar": 9})
    splits = open_splits(str(tmp_path), 0, 16)
    assert (len(splits.train), len(splits.val), splits.test, splits.given) == (30, 9, None, True)
    stored = json.loads(json.dumps(splits.json()))
    assert stored["given"]["train"]["images"] == 30 and "train" not in stored
    again = splits_from_json(str(tmp_path), stored, True)
    assert again.train.keys == splits.train.keys and again.val.labels == splits.val.labels
    webdataset_shards(tmp_path, {"train-0.tar": 31})
    with pytest.raises(UserError, match=r"the train part is not that of the run's split.json \(31 images, 30 then"):
        splits_from_json(str(tmp_path), stored, True)


def test_train_shards_alone_give_a_tenth_to_val_by_seed(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 60})
    splits = open_splits(str(tmp_path), 0, 16)
    assert (len(splits.train), len(splits.val), splits.test) == (54, 6, None)
    assert open_splits(str(tmp_path), 0, 16).val.keys == splits.val.keys != open_splits(str(tmp_path), 1, 16).val.keys
    again = splits_from_json(str(tmp_path), splits.json(), True)
    assert again.val.keys == splits.val.keys and again.train.labels == splits.train.labels


def test_a_class_without_training_images_is_named(tmp_path):
    webdataset_shards(tmp_path, {"train-0.tar": 2, "val-0.tar": 4})
    with pytest.raises(UserError, match="the class '2' has images in val and none in train"):
        open_splits(str(tmp_path), 0, 16)
    (tmp_path / "classes.json").write_text('["a", "b", "c", "d"]')
    webdataset_shards(tmp_path, {"train-0.tar": 3, "val-0.tar": 3})
    with pytest.raises(UserError, match="the class 'd' has no images; add some, or take its name from the list"):
        open_splits(str(tmp_path), 0, 16)


# Over HTTP


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP with Range; `cuts` answers end after so many bytes, `asked` lists what was asked for."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder, self.cuts, self.asked = folder, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def shards(self):
        return [name for name, _ in self.asked if name.endswith(".tar")]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.lstrip("/")
        path = self.server.folder / name
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.asked.append((name, start))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut = self.server.cuts.pop() if self.server.cuts and name.endswith(".tar") else None
        self.wfile.write(data[start:][:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path / "home"))
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.shutdown()
    server.server_close()


def served(server, parts=("train", "val"), count=12, per_shard=3):
    folder = class_folder(server.folder.parent / "photos", {"a": count // 2, "b": count // 2}, parts)
    server.folder.rmdir()
    write_shards(str(folder), str(server.folder), per_shard=per_shard)
    return local_shards(str(server.folder))


def test_shards_over_http_are_the_local_ones(server):
    local = served(server)
    for data in (f"{server.address}/index.json", f"{server.address}/{{train,val}}-{{000000..000003}}.tar"):
        remote = open_parts(data)
        assert {name: len(part) for name, part in remote.items()} == {"train": 12, "val": 12}
        for position in (11, 0, 5):
            assert remote["val"].read(position).data == local["val"].read(position).data
        assert remote["train"].keys == local["train"].keys and remote["train"].digest() == local["train"].digest()
        assert remote["train"].classes == ["a", "b"]
    assert server.shards().count("val-000003.tar") == 1  # whatever the data are called


def test_shards_without_an_index_are_read_once(server):
    local = served(server, ("",))
    (server.folder / "index.json").unlink()
    data = f"{server.address}/all-{{000000..000003}}.tar"
    for _ in range(2):
        assert open_parts(data)["all"].read(7).data == local["all"].read(7).data
    assert len(server.shards()) == 4


def test_broken_connections_are_continued_where_they_broke(server, monkeypatch):
    local = served(server, ("",))
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.cuts = [1500, 1000]
    assert open_parts(f"{server.address}/index.json")["all"].read(0).data == local["all"].read(0).data
    starts = [start for name, start in server.asked if name == "all-000000.tar"]
    assert starts == [0, 1000, 2500]


def cached_bytes(server):
    return sum(path.stat().st_size for path in (server.folder.parent / "home/data/shards").rglob("*.tar"))


def test_the_bound_of_the_cache_holds_for_all_data_together(server, monkeypatch):
    served(server, count=30, per_shard=5)
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    monkeypatch.setenv("MUNTIN_SHARD_CACHE_GB", str(4.5 * size / 1e9))
    for part in ("train", "val", "train"):
        images = open_parts(f"{server.address}/{part}-{{000000..000005}}.tar")[part]
        for position in range(0, 30, 5):
            images.read(position)
        assert cached_bytes(server) <= 4.5 * size


def test_a_damaged_shard_at_an_address_is_named_and_fetched_again(server):
    served(server, ("",))
    (server.folder / "index.json").unlink()
    path, data = server.folder / "all-000001.tar", f"{server.address}/all-{{000000..000003}}.tar"
    whole = path.read_bytes()
    start = harmed(path, "a header of zeros")
    with pytest.raises(UserError, match=rf"{server.address}/all-000001.tar is no readable shard .*at byte {start:,}"):
        open_parts(data)
    path.write_bytes(whole)
    assert len(open_parts(data)["all"]) == 12


def test_a_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="no answer that is of use from 127.0.0.1") as raised:
        open_parts(f"{server.address}/all-{{0..1}}.tar")
    path = Path(str(raised.value).rpartition(" put it at ")[2])  # what the message says helps
    assert path.parent.is_dir()
    path.write_text(json.dumps({"version": 1, "shards": []}))
    with pytest.raises(UserError, match="all-0.tar where there is a network"):
        open_parts(f"{server.address}/all-{{0..1}}.tar")


def test_the_cache_is_bounded_and_an_epoch_fetches_every_shard_once(server, monkeypatch):
    local = served(server, ("",), count=60, per_shard=5)
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    monkeypatch.setenv("MUNTIN_SHARD_CACHE_GB", str(4.5 * size / 1e9))
    images = open_parts(f"{server.address}/index.json")["all"]
    assert images.order.together == 2
    monkeypatch.setattr(images.order, "fetch", lambda numbers: None)  # without what is fetched ahead, for the count
    order = images.order(0, 0)
    for position in order.tolist():
        assert images.read(position).data == local["all"].read(position).data
        assert cached_bytes(server) <= 4.5 * size
    assert sorted(server.shards()) == [f"all-{i:06}.tar" for i in range(12)]


def test_the_next_shards_are_fetched_in_the_background(server):
    served(server, ("",))
    images = open_parts(f"{server.address}/index.json")["all"]
    images.order.ahead(images.order(0, 0))
    deadline = time.monotonic() + 20
    while len(server.shards()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.shards()) == 4
    for position in range(12):
        images.read(position)
    assert len(server.shards()) == 4


def test_workers_read_remote_shards_in_the_same_order(server):
    local = served(server, ("",))
    remote = open_parts(f"{server.address}/index.json")["all"]
    found = []
    for workers in (0, 2):
        data = TrainingSet(remote, Plain(Evaluate((8, 8), None).bytes), 0)
        found.append(list(training_loader(data, EpochBatches(12, 4, 0, order=remote.order), workers)))
    for (images, targets), (others, same) in zip(*found, strict=True):
        assert torch.equal(images, others) and torch.equal(targets, same)
    assert sorted(server.shards()) == [f"all-{i:06}.tar" for i in range(4)] and local["all"].order is None


def test_two_processes_may_fetch_the_index_at_once(server, tmp_path, monkeypatch):
    served(server)
    both = threading.Barrier(2, timeout=30)

    fetched = remote.fetch

    def fetch(*args, **options):
        found = fetched(*args, **options)
        both.wait()  # each has its file before either gives it its name
        return found

    monkeypatch.setattr(remote, "fetch", fetch)
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: remote._kept(folder, "index.json", f"{server.address}/index.json"), range(2)))
    wanted = (server.folder / "index.json").read_bytes()
    assert found == [wanted, wanted] and (folder / "index.json").read_bytes() == wanted
    assert [path.name for path in folder.iterdir()] == ["index.json"]


def test_a_shard_that_another_process_has_just_fetched_stays(server, tmp_path, monkeypatch):
    served(server)
    name = "train-000000.tar"
    whole = (server.folder / name).read_bytes()
    cache = Cache(tmp_path / "cache", [f"{server.address}/{name}"], [len(whole)], 10**9, tmp_path)
    looked = Cache._bytes

    def just_before(self, path):
        found = looked(self, path)
        if found is None:  # the other one is done between our look and what we do next
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole)
        return found

    monkeypatch.setattr(Cache, "_bytes", just_before)
    assert cache.path(0).read_bytes() == whole and not server.asked


def test_what_a_server_does_not_have_is_named(server, monkeypatch):
    served(server, ("",))
    with pytest.raises(UserError, match=r"there is nothing at http://.*/other/index.json"):
        open_parts(f"{server.address}/other/index.json")
    (server.folder / "all-000001.tar").unlink()
    images = open_parts(f"{server.address}/index.json")["all"]
    data = TrainingSet(images, Plain(Evaluate((8, 8), None).bytes), 0)
    with pytest.raises(UserError, match=r"all-000001.tar was refused with 404"):
        list(training_loader(data, EpochBatches(12, 4, 0), 1))
    monkeypatch.setenv("MUNTIN_SHARD_CACHE_GB", "0.000001")
    with pytest.raises(UserError, match="do not fit a cache of 0.00 GB, which has to hold two"):
        open_parts(f"{server.address}/index.json")


def test_a_shard_of_another_size_than_in_the_index_is_refused(server):
    served(server, ("",))
    path = server.folder / "all-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    images = open_parts(f"{server.address}/index.json")["all"]
    with pytest.raises(UserError, match=r"all-000002.tar has another size than the \d+ bytes in its index"):
        images.read(6)
