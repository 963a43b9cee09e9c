"""Training processes without the price of their imports: a server that imports once and forks a child for each run.

A child is a process of its own, killed by a real SIGKILL; it has one thread and no GPU when it is forked. What the
child is to do to itself is a piece of Python, run before the command: it may patch the package, and call `event(name)`
to tell the test where it is.
"""

import contextlib
import json
import os
import signal
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
        assert self.process.stdin is not None and self.process.stdout is not None
        files = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        self.process.stdin.write(json.dumps({"arguments": arguments, "before": before, "kill": kill} | files) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        printed = {name: Path(file).read_text() for name, file in files.items()}
        return Ended(answer["returncode"], printed["stdout"], printed["stderr"], answer["events"])

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
        print(json.dumps(_child(muntin.cli.main, **json.loads(line))), flush=True)


def _child(
    main: Callable[[list[str]], int],
    arguments: list[str],
    before: str,
    kill: tuple[list[str], float] | None,
    stdout: str,
    stderr: str,
) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        for path, number in ((stdout, 1), (stderr, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

        def event(name: str) -> None:
            os.write(writing, f"{name}\n".encode())

        exec(before, {"event": event})
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
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
