"""Batch prediction with Ray: images a second of two workers against the sum of what each does by itself.

    python benchmarks/batch.py                    # about five minutes on two idle cores

A small model and 4000 images of 96x96 pixels in 40 shards; every worker has one thread. In each round, in turns: one
worker of Ray; two; and, for what the machine itself gives, two processes without Ray that predict at the same time,
each bound to a core. Of Ray's, the time from a quarter of the parts on counts, without the last of each worker, so that
neither the start of processes nor idle ends do. Results: batch.json in benchmarks/results/MACHINE.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes started from here

import numpy as np
import ray
import torch
from peers import here
from PIL import Image

import muntin
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.measure.machine import commit, machine, versions
from muntin.run import save_model, write_json
from muntin.tasks import predict
from muntin.tasks.batch import predict_batches

SHARDS, IN_SHARD, SIDE = 40, 100, 96
MODEL: dict[str, Any] = {"name": "swin_t", "dim": 32, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}


def write_model(path: Path) -> None:
    torch.manual_seed(0)
    model = muntin.create_model(**MODEL, num_classes=10)
    preprocessing = {"size": (SIDE, SIDE), "resize": None, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
                     "interpolation": "bicubic", "channels": "RGB"}  # fmt: skip
    save_model(path, model, classes=[str(i) for i in range(10)], preprocessing=preprocessing)


def write_images(folder: Path) -> None:
    """The same JPEG files in shards, and as files for the processes without Ray."""
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        (folder / f"files/{shard % 2}").mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(IN_SHARD):
                coarse = Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{shard:03d}_{number:03d}.jpg")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
                (folder / f"files/{shard % 2}/{info.name}").write_bytes(file.getvalue())


def with_ray(folder: Path, workers: int, round_: int) -> float:
    """Images a second while all workers are at work."""
    out = folder / f"out-{workers}-{round_}"
    report = predict_batches(folder / "model.safetensors", [folder / "{000..039}.tar"], out, workers=workers, threads=1)
    if report.images != SHARDS * IN_SHARD or report.failed:
        raise RuntimeError(f"{report}: not what was asked for")
    times = sorted(path.stat().st_mtime_ns for path in out.glob("*.parquet"))[SHARDS // 4 : -workers]
    return (len(times) - 1) * IN_SHARD / (times[-1] - times[0]) * 1e9


def without_ray(folder: Path) -> float:
    """The sum of two processes at the same time, after both have imported what they need."""
    command = [sys.executable, __file__, "--half", str(folder)]
    halves = [subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for i in range(2)]
    for half in halves:
        half.stdout.readline()  # type: ignore[union-attr]
    for half in halves:
        half.stdin.write(b"\n")  # type: ignore[union-attr]
        half.stdin.flush()  # type: ignore[union-attr]
    return sum(float(half.communicate()[0]) for half in halves)


def half(folder: Path, number: int) -> None:
    """One of the two processes: says that it is ready, waits, and prints its images a second."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    files = folder / f"files/{number}"
    predict(folder / "model.safetensors", sorted(files.iterdir())[:64])
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    rows = predict(folder / "model.safetensors", [files])
    print(len(rows) / (time.perf_counter() - start))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--half", nargs=2, metavar=("FOLDER", "NUMBER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.half:
        half(Path(args.half[0]), int(args.half[1]))
        return 0
    described = machine(torch.device("cpu"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # as the processes without Ray; by default its workers give way to others
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model.safetensors")
        write_images(folder)
        for number in range(args.rounds):
            speeds = {"one": with_ray(folder, 1, number), "two": with_ray(folder, 2, number)}
            rounds.append(speeds | {"two without Ray": without_ray(folder), "load": os.getloadavg()[0]})
            print({key: round(value, 2) for key, value in rounds[-1].items()}, flush=True)
    ratios = {
        "of twice one worker": median(speeds["two"] / (2 * speeds["one"]) for speeds in rounds),
        "of two processes without Ray": median(speeds["two"] / speeds["two without Ray"] for speeds in rounds),
    }
    for what, ratio in ratios.items():
        print(f"two workers do {ratio:.2f} {what}")
    about: dict[str, Any] = {"model": MODEL, "side": SIDE, "shards": SHARDS, "images": SHARDS * IN_SHARD, "threads": 1}
    about["niceness"] = os.nice(0)
    content = {"images_per_second": rounds, "ratios": ratios, "protocol": about, "machine": described}
    write_json(here() / "batch.json", content | {"versions": versions(), "commit": commit()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
