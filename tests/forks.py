"""Training processes without the price of their imports: a server that imports once and forks a child for each run.

A child is a process of its own, killed by a real SIGKILL; it has one thread and no GPU when it is forked. What the
child is to do to itself is a piece of Python, run before the command: it may patch the package, and call `event(name)`
to tell the test where it is.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a child ended: returncode (negative: the signal), what it printed, and the events it told of, in order."""

    returncode: int
    stdout: str
    stderr: str
    events: list[str]


class Forks:
    """The server, seen from the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, arguments: list[str], before: str = "", kill: tuple[list[str], float] | None = None) -> Ended:
        """`muntin ARGUMENTS` in a child, which runs the Python `before` first.

        kill: events, and seconds to wait after the first of them before SIGKILL is sent.
        """
        return self._ask(arguments, before, kill, [{}])[0]

    def together(self, arguments: list[str], count: int, before: str = "") -> list[Ended]:
        """The same in `count` processes of one job, as torchrun would start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        job |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        return self._ask(arguments, before, None, [job | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)])

    def _ask(
        self,
        arguments: list[str],
        before: str,
        kill: tuple[list[str], float] | None,
        environments: list[dict[str, str]],
    ) -> list[Ended]:
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"arguments": arguments, "before": before, "kill": kill, "environments": environments}
        self.process.stdin.write(json.dumps(asked | {"folder": str(self.folder)}) + "\n")
        self.process.stdin.flush()
        ended = []
        for rank, answer in enumerate(json.loads(self.process.stdout.readline())):
            printed = [(self.folder / f"{name}{rank}").read_text() for name in ("stdout", "stderr")]
            ended.append(Ended(answer["returncode"], printed[0], printed[1], answer["events"]))
        return ended

    def close(self) -> None:
        # Told, since processes that the test has forked meanwhile may hold its standard input open.
        self.process.communicate("\n", timeout=60)


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    server = Forks(folder)
    try:
        yield server
    finally:
        server.close()


def _serve() -> None:
    import sklearn.datasets  # noqa: F401 - what a training imports on its way
    import torch
    import torch.utils.tensorboard  # noqa: F401
    from lightning.pytorch import loggers  # noqa: F401

    import muntin.cli
    import muntin.measure.machine
    import muntin.tasks.training

    torch.set_num_threads(1)
    while line := sys.stdin.readline().strip():
        asked = json.loads(line)
        kill = asked.pop("kill")
        started = [
            _start(muntin.cli.main, rank, environment, **asked)
            for rank, environment in enumerate(asked.pop("environments"))
        ]
        print(json.dumps([_wait(child, reading, kill) for child, reading in started]), flush=True)


def _start(
    main: Callable[[list[str]], int],
    rank: int,
    environment: dict[str, str],
    arguments: list[str],
    before: str,
    folder: str,
) -> tuple[int, int]:
    """The child, and where it tells of its events."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.environ.update(environment)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

        def event(name: str) -> None:
            os.write(writing, f"{name}\n".encode())

        exec(before, {"event": event})
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    return child, reading


def _wait(child: int, reading: int, kill: tuple[list[str], float] | None) -> dict[str, Any]:
    events = []
    with open(reading) as told:
        for line in told:
            events.append(line.rstrip("\n"))
            if kill is not None and events[-1] in kill[0]:
                time.sleep(kill[1])
                os.kill(child, signal.SIGKILL)
                kill = None
    _, status = os.waitpid(child, 0)
    return {"returncode": os.waitstatus_to_exitcode(status), "events": events}


if __name__ == "__main__":
    _serve()
