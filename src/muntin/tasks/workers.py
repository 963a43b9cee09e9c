"""Ray's side of batch prediction: the connection, the workers, and what they do with a unit."""

import contextlib
import itertools
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from muntin.data.images import BadImage
from muntin.errors import UserError
from muntin.tasks.inference import Choice, Prediction
from muntin.tasks.parts import table_of
from muntin.tasks.trained import open_trained
from muntin.tasks.units import BadShard, Sample, Unit

TRIES = 3  # of a unit whose worker dies under it
SECONDS_TO_ANSWER = 10.0
OBJECT_STORE = 256 << 20  # bytes, of a Ray of this machine's own: what passes through it is small


@dataclass(frozen=True)
class Pool:
    """So many workers, each with so many threads on cores of their own, and so much of a GPU."""

    workers: int
    threads: int
    gpus: float


@contextlib.contextmanager
def connected(workers: int | None, threads: int | None) -> Iterator[Pool]:
    """A connection to Ray: the one that there is, or one that ends here, with a Ray of its own or to RAY_ADDRESS."""
    mine = not ray.is_initialized()
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    # What Ray says of workers that died goes to stdout otherwise.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            if mine:
                _connect(workers or 0, threads or 1)
            yield _pool(workers, threads)
        finally:
            if mine:
                ray.shutdown()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _connect(workers: int, threads: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        if address == "local":
            ray.init(
                "local",
                num_cpus=max(os.cpu_count() or 1, workers * threads),
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        else:
            _knock(address)
            ray.init(address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # of no type in particular where Ray's processes take too long to start
        where = "on this machine" if address == "local" else f"at RAY_ADDRESS={address}"
        raise UserError(
            f"cannot use Ray {where} ({error}); give the HOST:PORT that `ray start --head` prints, or none"
        ) from error


def _knock(address: str) -> None:
    """Ray itself tries for many minutes to reach a cluster that is not there."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def _pool(workers: int | None, threads: int | None) -> Pool:
    """Workers share cores and GPUs evenly, as if every node (with a GPU, where there are some) were the smallest."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    nodes = [node for node in nodes if node.get("GPU")] or nodes
    if not nodes:
        raise UserError("Ray has no node with a core; start it with: ray start --head")
    cores = [int(node["CPU"]) for node in nodes]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    workers = workers or gpus or max(sum(cores) // (threads or 1), 1)
    on_each = -(-workers // len(nodes))
    threads = threads or max(min(cores) // on_each, 1)
    if workers * threads > sum(cores):
        raise UserError(
            f"{workers} workers of {threads} threads are more than the {sum(cores)} cores that Ray has; give fewer "
            "--workers"
        )
    return Pool(workers, threads, 1 / -(-workers // gpus) if gpus else 0.0)


class Attempts:
    """How often each unit was begun: what outlives the workers that die under one."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def begin(self, unit: int) -> int:
        self.counts[unit] = self.counts.get(unit, 0) + 1
        return self.counts[unit]


class Worker:
    """A model in a process of its own: from one unit's row to one row with its predictions, as an Arrow stream, or
    why there are none.
    """

    def __init__(self, source: str, choice: Choice, batch_size: int, threads: int, attempts: Any) -> None:
        torch.set_num_threads(threads)
        self.choice, self.batch_size, self.threads = choice, batch_size, threads
        self.attempts = attempts
        self.refusal = ""
        try:
            self.trained = open_trained(source)
        except UserError as error:
            self.refusal = str(error)  # to be raised by the driver: a worker that fails would be started again

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(row["name"], tuple(row["paths"]), bool(row["shard"]))
        done = {"unit": row["unit"], "table": b"", "failure": "", "refusal": self.refusal}
        if self.refusal:
            return done
        attempt = ray.get(self.attempts.begin.remote(int(row["unit"])))
        if attempt > TRIES:
            among = unit.paths[0] if unit.shard else f"{unit.paths[0]} to {unit.paths[-1]}"
            return done | {"failure": f"{among}: the worker died {TRIES} times under it"}
        try:
            rows = list(self._predictions(unit.samples()))
        except BadShard as error:
            return done | {"failure": str(error)}
        except UserError as error:
            return done | {"refusal": str(error)}
        return done | {"table": _to_bytes(table_of(rows, self.choice.top, self.trained.multi_label))}

    def _predictions(self, samples: Iterator[Sample]) -> Iterator[Prediction]:
        for batch in self._decoded(samples):
            images = [image for _, image in batch if isinstance(image, Tensor)]
            scores = iter(self.trained.probabilities(torch.stack(images)) if images else ())
            for sample, image in batch:
                label = class_of(sample.label, self.trained.classes)
                if isinstance(image, BadImage):
                    yield Prediction(sample.key, label, [], [], str(image))
                else:
                    yield Prediction(sample.key, label, *self.choice(next(scores), self.trained.classes))

    def _decoded(self, samples: Iterator[Sample]) -> Iterator[list[tuple[Sample, Tensor | BadImage]]]:
        """Batches of images; with several threads, the next is decoded while the model works on one."""
        if self.threads == 1:
            yield from ([(sample, self._decode(sample)) for sample in batch] for batch in self._batches(samples))
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[list[Any]] = deque()
            for batch in itertools.chain(self._batches(samples), [None]):
                if batch is not None:
                    waiting.append([(sample, pool.submit(self._decode, sample)) for sample in batch])
                if waiting and (batch is None or len(waiting) > 1):
                    yield [(sample, image.result()) for sample, image in waiting.popleft()]

    def _batches(self, samples: Iterator[Sample]) -> Iterator[list[Sample]]:
        while batch := list(itertools.islice(samples, self.batch_size)):
            yield batch

    def _decode(self, sample: Sample) -> Tensor | BadImage:
        try:
            return self.trained.transform(sample.open())
        except BadImage as error:
            return error


def class_of(label: str | int, classes: list[str]) -> str:
    """The class that a sample is said to be of, or "" where the model knows no such class."""
    if isinstance(label, int):
        return classes[label] if label < len(classes) else ""
    return label if label in classes else ""


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def results(units: list[Unit], pool: Pool, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each unit, in the order in which they are done."""
    rows = [
        {"unit": i, "name": unit.name, "paths": list(unit.paths), "shard": unit.shard} for i, unit in enumerate(units)
    ]
    attempts = ray.remote(num_cpus=0, max_restarts=-1)(Attempts).remote()
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker,  # type: ignore[arg-type]  # a class: an object of it in each process
        fn_constructor_kwargs=settings | {"threads": pool.threads, "attempts": attempts},
        # A second unit waits at each worker, or it would be idle between two while the driver hears and answers.
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, len(rows)), max_tasks_in_flight_per_actor=2),
        num_cpus=pool.threads,
        num_gpus=pool.gpus,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.max_consecutive_actor_init_deaths = TRIES
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"the workers ended while they opened {settings['source']}, possibly for want of memory; give fewer "
            "--workers, or see Ray's logs"
        ) from error
