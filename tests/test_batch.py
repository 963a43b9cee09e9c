"""Batch prediction: what it reads, the folder that it writes, and a local Ray whose workers and drivers are killed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import muntin
from muntin.cli import main
from muntin.data.images import BadImage, open_image
from muntin.errors import UserError
from muntin.run import Run, save_model
from muntin.tasks import predict
from muntin.tasks.inference import Choice, Prediction
from muntin.tasks.units import BadShard, Sample, blocks, find_inputs, shard_unit

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray.data")

from muntin.tasks.batch import predict_batches  # noqa: E402
from muntin.tasks.parts import Keys, Predictions, table_of  # noqa: E402
from muntin.tasks.workers import TRIES, Attempts, Worker  # noqa: E402

PREPROCESSING = {
    "size": (32, 32),
    "resize": None,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.2, 0.2),
    "interpolation": "bicubic",
    "channels": "RGB",
}
IN_SHARD = 120
WORKING = "MapWorker(Map(Worker)).submit"  # in the title of a worker's process while it does a unit


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# What is read


def test_a_shard_is_read_sample_by_sample(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {
            "b/1.PNG": png(1),
            "b/1.cls": b"2\n",
            "b/1.json": b"{}",
            "b/2.cls": b"cat",
            "b/2.left.jpg": b"no image",
            "__meta.png": png(3),
            "v1.5/3.png": png(2),
            "4.json": b"{}",
            "5.png": b"",
        },
    )
    samples = list(shard_unit(str(path)).samples())
    assert [(sample.key, sample.label) for sample in samples] == [
        ("b/1", 2), ("b/2", "cat"), ("v1.5/3", ""), ("4", ""), ("5", "")
    ]  # fmt: skip
    assert np.array_equal(samples[0].open(), Image.open(io.BytesIO(png(1))))
    for sample, reason in [(samples[1], "b/2 in .*a.tar is not a readable image"), (samples[3], "4 in .* has no image"),
                           (samples[4], "5 in .* is empty")]:  # fmt: skip
        with pytest.raises(BadImage, match=reason):
            sample.open()


@pytest.mark.parametrize("harm", ["between members", "in a member", "in a header", "no tar", "empty", "gone"])
def test_a_shard_that_does_not_end_is_refused(tmp_path, harm):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(3)})
    content = path.read_bytes()
    second = 512 + -(-len(png(0)) // 512) * 512
    cut = {"between members": content[:second], "in a member": content[: second + 600], "no tar": b"x" * 2000,
           "empty": b"", "in a header": content[:second] + b"x" * 512 + content[second + 512 :]}  # fmt: skip
    path.unlink() if harm == "gone" else path.write_bytes(cut[harm])
    with pytest.raises(BadShard, match=r"a\.tar (is damaged or cut short|cannot be read)"):
        list(shard_unit(str(path)).samples())


def test_inputs_are_found_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/cat").mkdir(parents=True)
    for name in ("photos/cat/a.png", "photos/b.jpg"):
        Path(name).write_bytes(png(0))
    for name in ("train-008.tar", "train-009.tar", "train-010.tar", "photos/c.tar", "odd{0..1}.tar"):
        write_tar(tmp_path / name, {})
    Path("list.txt").write_text("photos/cat/../b.jpg\ntrain-010.tar\n")
    found = find_inputs(["photos", "train-{008..010}.tar", "list.txt", str(tmp_path / "photos/cat"), "odd{0..1}.tar"])
    assert found.files == [str(tmp_path / name) for name in ("photos/b.jpg", "photos/cat/a.png")]
    names = ("photos/c.tar", "train-008.tar", "train-009.tar", "train-010.tar", "odd{0..1}.tar")
    assert found.shards == [str(tmp_path / name) for name in names]
    assert found.duplicates == 2
    with pytest.raises(UserError, match=r"x\{3..1\}.tar: the range \{3..1\} is empty"):
        find_inputs(["x{3..1}.tar"])
    with pytest.raises(UserError, match="has a name that is no UTF-8"):
        find_inputs([b"\xff.png".decode(errors="surrogateescape")])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no images and no shards found in nothing"):
        find_inputs(["nothing"])


def test_units_are_named_by_what_is_in_them(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": png(1)})
    before = shard_unit(str(path))
    assert shard_unit(str(path)) == before
    write_tar(path, {"1.png": png(1), "2.png": png(2)})
    assert shard_unit(str(path)).name != before.name
    units = blocks([f"/{i}.png" for i in range(5)], 2)
    assert [unit.paths for unit in units] == [("/0.png", "/1.png"), ("/2.png", "/3.png"), ("/4.png",)]
    assert len({unit.name for unit in units}) == 3 and units == blocks([f"/{i}.png" for i in range(5)], 2)


# What is written


def rows_of(*images: str) -> "pa.Table":
    broken = [Prediction(image, "", [], [], f"{image} is damaged") for image in images if "bad" in image]
    good = [Prediction(image, "a", ["a", "b"], [0.75, 0.25]) for image in images if "bad" not in image]
    return table_of([*good, *broken], 2)


def test_an_image_is_in_one_part_only(tmp_path):
    with Predictions(tmp_path / "out", "m", 2) as predictions:
        assert predictions.add("u1", "", rows_of("x", "y", "bad")).unreadable == 1
        second = predictions.add("u2", "/s.tar", rows_of("y", "z", "z"))
        assert (second.images, second.duplicates) == (1, 2)
        predictions.finish(images=4)
    with Predictions(tmp_path / "out", "m", 2) as again:  # what the folder says of itself
        assert again.parts == predictions.parts
        again.begin({"/s.tar": "u2"})
        assert "z" in again.keys and "bad" in again.keys and "w" not in again.keys
        assert again.add("u3", "", rows_of("w", "x")).images == 1
        assert not (tmp_path / "out/_predictions.json").exists()
    table = pq.read_table(tmp_path / "out")
    assert sorted(table["image"].to_pylist()) == ["bad", "w", "x", "y", "z"]
    assert table.column_names == ["image", "label", "class1", "probability1", "class2", "probability2", "error"]
    row = table.filter(pa.compute.equal(table["image"], "bad")).to_pylist()[0]
    assert row["error"] == "bad is damaged" and {row["label"], row["class1"], row["probability2"]} == {None}


def test_a_part_of_a_shard_that_changed_goes(tmp_path):
    with Predictions(tmp_path, "m", 2) as predictions:
        predictions.add("old", "/s.tar", rows_of("x"))
        predictions.add("other", "/t.tar", rows_of("y"))
    with Predictions(tmp_path, "m", 2) as predictions:
        predictions.begin({"/s.tar": "new"})
        assert list(predictions.parts) == ["other"] and "x" not in predictions.keys
    assert [path.name for path in tmp_path.iterdir()] == ["part-other.parquet"]


def test_other_predictions_are_refused_or_replaced(tmp_path):
    with Predictions(tmp_path, "m", 2) as predictions:
        predictions.add("u", "", rows_of("x"))
        predictions.finish()
        with pytest.raises(UserError, match="another command is writing to"):
            Predictions(tmp_path, "m", 2).__enter__()
    for model, top, words in [("n", 2, "by another model; .* --overwrite"), ("m", 5, "with --top 2")]:
        with pytest.raises(UserError, match=words):
            Predictions(tmp_path, model, top).__enter__()
    (tmp_path / ".part-v.1234.tmp.parquet").write_bytes(b"of a process that was killed")
    with Predictions(tmp_path, "n", 2, overwrite=True) as predictions:
        assert not predictions.parts and not list(tmp_path.iterdir())
    pq.write_table(rows_of("x"), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match=r"foreign\.parquet is no file of predictions"):
        Predictions(tmp_path, "n", 2, overwrite=True).__enter__()
    (tmp_path / "foreign.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"foreign\.parquet is damaged"):
        Predictions(tmp_path, "n", 2).__enter__()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write to .*file: File exists; choose a folder"):
        Predictions(tmp_path / "file", "m", 2).__enter__()


def test_keys_are_told_apart():
    keys = Keys()
    assert keys.add(["a", "b", "a"]) == [True, True, False]
    assert keys.add(["b", "ä"]) == [False, True]
    assert "ä" in keys and "c" not in keys
    keys.close()


# The whole, on a local Ray


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for all tests here; what it warns of is its own."""
    import warnings

    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # its workers would give way to whatever else a busy machine does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init("local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False,
                 object_store_memory=100 << 20)  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, 200 files of which one is broken, and three shards, the last cut short; each image also as a file."""
    folder = tmp_path_factory.mktemp("batch")
    model = muntin.create_model("swin_t", num_classes=3, dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    save_model(folder / "run/model.safetensors", model, classes=["a", "b", "c"], preprocessing=PREPROCESSING)
    for i in range(200):
        path = folder / f"data/{'ab'[i % 2]}/{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i) if i != 77 else b"broken")
    for shard in range(3):
        images = {f"s{shard}_{i:03d}": png(1000 * (shard + 1) + i) for i in range(IN_SHARD)}
        members = {f"{key}{suffix}": data for key, image in images.items()
                   for suffix, data in ((".png", image), (".cls", b"1"))}  # fmt: skip
        write_tar(folder / f"shard-{shard}.tar", members)
        for key, image in images.items():
            path = folder / f"unpacked/{key}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
    whole = folder / "shard-2.tar"
    whole.rename(folder / "whole")
    whole.write_bytes((folder / "whole").read_bytes()[:100_000])
    return folder


def command(place: Path, out: Path, workers: int) -> list[str]:
    given = [place / "data", place / "data/a", place / "shard-{0..2}.tar", "--out", out]
    return ["predict", str(place / "run"), *map(str, given), "--engine=ray", "--top=3", f"--workers={workers}"]


def compare(place: Path, out: Path, shards: int) -> None:
    """The rows in `out` are those of `predict` without Ray, each once."""
    found = {row["image"]: row for row in pq.read_table(out).to_pylist()}
    assert pq.read_table(out).num_rows == len(found) == 200 + shards * IN_SHARD
    for row in predict(place / "run", [place / "data", place / "unpacked"], top=3):
        packed = "unpacked" in row.image
        other = found.pop(Path(row.image).stem if packed else row.image, None)
        if other is None:  # of the shard that is cut short
            assert packed and "/s2_" in row.image and shards == 2
        elif row.error:
            assert other["error"] == row.error and other["class1"] is None
        else:
            assert [other[f"class{i}"] for i in (1, 2, 3)] == row.classes
            assert [other[f"probability{i}"] for i in (1, 2, 3)] == pytest.approx(row.probabilities, abs=1e-5)
            assert other["error"] is None and other["label"] == ("b" if packed else row.label)
    assert not found


def parts_in(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def below(parent: int) -> dict[int, str]:
    """Processes that descend from one, with their titles."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    found = {parent}
    while more := {pid for pid, its in parents.items() if its in found and pid not in found}:
        found |= more
    return {pid: titles[pid] for pid in found - {parent} if pid in titles}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_killed_worker_is_replaced_and_its_unit_done_again(local_ray, place, tmp_path, capsys):
    out = tmp_path / "out"
    killed = []

    def kill_one() -> None:
        while not killed and not finished.wait(0.01):
            working = parts_in(out) and [pid for pid, title in below(os.getpid()).items() if WORKING in title]
            if working:
                os.kill(working[0], signal.SIGKILL)
                killed.append(len(parts_in(out)))

    finished = threading.Event()
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        assert main(command(place, out, workers=2)) == 2
    finally:
        finished.set()
        killer.join()
    assert killed and killed[0] < len(parts_in(out))
    shown = capsys.readouterr()
    assert "440 images in" in shown.out and "1 unreadable; 100 duplicates left out" in shown.out
    told = shown.err.splitlines()[-1]
    assert told.startswith("muntin: 1 failed:") and "shard-2.tar" in told and "tries again" in told
    assert not (out / "_predictions.json").exists()
    compare(place, out, shards=2)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_killed_driver_loses_nothing_that_it_wrote(local_ray, place, tmp_path, capsys):
    out = tmp_path / "out"
    start = "import sys; from muntin.cli import main; sys.exit(main())"
    driver = subprocess.Popen([sys.executable, "-c", start, *command(place, out, workers=1)], stderr=subprocess.PIPE)
    while driver.poll() is None and len(parts_in(out)) < 2:
        time.sleep(0.002)
    descendants = below(driver.pid)
    driver.kill()
    driver.communicate()
    done = {path: path.stat() for path in parts_in(out)}
    assert len(done) >= 2 and not (out / "_predictions.json").exists()

    (place / "whole").rename(place / "shard-2.tar")
    assert main(command(place, out, workers=1)) == 0
    shown = capsys.readouterr().out
    assert "560 images in" in shown and "of them from before" in shown and len(parts_in(out)) > len(done)
    assert json.loads((out / "_predictions.json").read_text())["images"] == 560
    compare(place, out, shards=3)
    for path, state in done.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (state.st_ino, state.st_mtime_ns)

    deadline = time.monotonic() + 60
    while (left := [pid for pid in descendants if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert descendants and not left


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_unit_under_which_workers_die_is_given_up(local_ray, place):
    attempts = local_ray.remote(num_cpus=0)(Attempts).remote()
    worker = Worker(str(place / "run/model.safetensors"), Choice(3), 16, 1, attempts)
    unit = {"unit": 4, "name": "n", "paths": [str(place / "data/a/000.png")], "shard": False}
    for _ in range(TRIES):
        assert worker(unit)["table"]
    assert "the worker died 3 times under it" in worker(unit)["failure"]
    assert worker(unit | {"unit": 5})["table"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_multi_label_run_gives_lists_of_classes(local_ray, place, tmp_path):
    run = Run.open(place / "run")
    model = run.model()
    with torch.no_grad():
        model.head.fc.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
        model.head.fc.weight.mul_(10)
    described = {"classes": run.classes, "preprocessing": PREPROCESSING, "multi_label": True}
    save_model(tmp_path / "run/model.safetensors", model, **described)
    out = tmp_path / "out"
    given = [str(tmp_path / "run"), str(place / "data/b"), "--engine=ray", "--workers=1", "--out", str(out)]
    assert main(["predict", *given, "--threshold=0.45"]) == 0
    found = {row["image"]: row for row in pq.read_table(out).to_pylist()}
    rows = predict(tmp_path / "run", [place / "data/b"], threshold=0.45)
    assert len(found) == len(rows) == 100 and len({len(row.classes) for row in rows if not row.error}) > 1
    for row in rows:
        other = found[row.image]
        assert other["error"] == (row.error or None)
        assert other["classes"] == (None if row.error else row.classes)
        assert row.error or other["probabilities"] == pytest.approx(row.probabilities, abs=1e-5)
    assert main(["predict", *given]) == 2  # with another threshold


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_reads_a_batch_ahead_and_no_more(place, threads):
    worker = Worker(str(place / "run/model.safetensors"), Choice(3), 16, threads, None)
    read = []

    def samples() -> Iterator[Sample]:
        for path in sorted((place / "unpacked").iterdir()):
            read.append(path)
            yield Sample(path.name, "", lambda path=path: open_image(path))

    batches = worker._decoded(samples())
    sizes = []
    for batch in batches:
        sizes.append(len(batch))
        assert len(read) <= sum(sizes) + (16 if threads > 1 else 0)
    assert sum(sizes) == 3 * IN_SHARD and max(sizes) == 16
    assert [row.image for row in worker._predictions(samples())] == [path.name for path in read[: 3 * IN_SHARD]]


def test_a_model_that_does_not_open_in_a_worker_is_refused_by_name(place, tmp_path):
    worker = Worker(str(tmp_path / "gone.safetensors"), Choice(3), 16, 1, None)
    assert "gone.safetensors" in worker({"unit": 0, "name": "n", "paths": [], "shard": False})["refusal"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "rai", "--out", "x"], "there is no engine 'rai' (did you mean 'ray'?); valid is ray"),
        (["--engine", "ray"], "--out is missing: with --engine ray give a folder"),
        (["--engine", "ray", "--out", "x.csv"], "--out x.csv: with --engine ray give a folder"),
        (["--engine", "ray", "--out", "x", "--workers", "-1"], "workers=-1: give a whole number"),
        (["--engine", "ray", "--out", "x", "--top", "0"], "top=0: give a whole number"),
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--overwrite"], "--overwrite is for --engine ray"),
    ],
)
def test_wrong_options_are_refused(place, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(place / "run"), str(place / "data"), *options]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_ray_the_package_is_named(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("batch", "workers"):
        monkeypatch.delitem(sys.modules, f"muntin.tasks.{name}")
    assert main(command(place, tmp_path / "out", workers=1)) == 2
    assert 'needs the package ray; install it with: pip install "muntin[scale]"' in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "here", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_named(place, tmp_path, monkeypatch, address):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"cannot use Ray at RAY_ADDRESS={address}"):
        predict_batches(place / "run", [place / "data"], tmp_path / "out")
