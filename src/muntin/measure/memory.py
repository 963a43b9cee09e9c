"""Peak memory of a model in an engine, in a fresh process, and what a machine has to give.

Counted is the resident memory above the bare runtime: torch, the engine's package and the model's library are
imported and a small product has run before counting starts. Weights, activations and what the engine keeps for
itself are counted. On a GPU it is what PyTorch's allocator held at most.

    echo '{"given": "swin_t", "engine": "eager", ...}' | python -m muntin.measure.memory
"""

import copy
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.measure.timing import Call, threads_of, timed

PROCESS = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
CALLS = 3
LIMIT = 900.0  # seconds for one process: torch.compile of a large model takes minutes
MB = 2**20
IMPORTS = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "compile": ("torch._dynamo", "torch._inductor.compile_fx"),
}

GENEROUS = 1000  # times an image's bytes: no model here holds more in a forward, so smaller batches are not counted

Need = Callable[[int, tuple[int, int]], int]
"""Bytes for a batch at (height, width)."""


@dataclass(frozen=True)
class Peak:
    """The most above the bare runtime in MB (2^20 bytes): while loading and in the first call, and in later calls; and
    how long that first call of the process took.
    """

    load_mb: float
    run_mb: float
    first_ms: float


@dataclass(frozen=True)
class Request:
    """What the fresh process is to build and call; `path` is a file that was exported for it."""

    given: str
    engine: str
    precision: str
    batch: int
    height: int
    width: int
    threads: int
    device: str
    channels_last: bool = False
    path: str | None = None
    bytes_in: bool = False


def known() -> str | None:
    """Why this machine does not tell a process's peak memory, or None where it does."""
    return None if (PROCESS / "clear_refs").exists() else "memory: only Linux tells the peak of a part of a process"


def measure(request: Request) -> Peak:
    """The peak of a request in a process of its own. Raises RuntimeError where that process fails."""
    run = subprocess.run(
        [sys.executable, "-m", "muntin.measure.memory"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"ended with {run.returncode}: {last}")
    return Peak(**json.loads(run.stdout.strip().splitlines()[-1]))


def peak(build: Callable[[], Call], images: Tensor) -> Peak:
    """The peak of this process while `build` makes a call, and while that call runs."""
    if images.is_cuda:
        return _peak_of_allocator(build, images)
    before = _rest()
    _forget_peak()
    with torch.inference_mode():
        call = build()
        first_ms = 1000 * timed(call, images)[0]
        load = _status("VmHWM") - before
        _rest()
        _forget_peak()
        for _ in range(CALLS):
            call(images)
    return Peak(load / MB, (_status("VmHWM") - before) / MB, first_ms)


def _peak_of_allocator(build: Callable[[], Call], images: Tensor) -> Peak:
    torch.cuda.reset_peak_memory_stats(images.device)
    with torch.inference_mode():
        call = build()
        first_ms = 1000 * timed(call, images)[0]
        load = torch.cuda.max_memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        for _ in range(CALLS):
            call(images)
        torch.cuda.synchronize(images.device)
    return Peak(load / MB, torch.cuda.max_memory_allocated(images.device) / MB, first_ms)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def _rest() -> int:
    """Bytes resident once what is free has gone back to the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _status("VmRSS")


def _forget_peak() -> None:
    (PROCESS / "clear_refs").write_text("5")


def available() -> int | None:
    """Bytes that this process may still take: what the system calls available, or what its control group leaves."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
    except (OSError, StopIteration):
        return None
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            free.append(int(limit) - int(used))
    except OSError:
        pass  # no control group of its own
    return min(free)


def images_twice(batch: int, size: tuple[int, int]) -> int:
    """The least that a model of which nothing is known needs: its images, and as much again."""
    return 2 * 12 * batch * size[0] * size[1]


def need_of(model: nn.Module, width: int) -> Need:
    """Bytes that a forward needs for a batch at (height, width), counted without computing: activations alive at the
    same time, and weights. width: bytes of a number. 0 where the model cannot be run without numbers.
    """
    from muntin.measure.cost import cost

    weights = width * sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    bare = copy.deepcopy(model).to("meta")

    def need(batch: int, size: tuple[int, int]) -> int:
        try:
            return weights + cost(bare, size).peak_bytes * width // 4 * batch
        except (RuntimeError, AssertionError, ValueError, NotImplementedError):
            return 0

    return need


def plenty(batch: int, size: tuple[int, int], free: int) -> bool:
    """Whether the images are so small beside what is free that nothing needs counting."""
    return batch * size[0] * size[1] * 12 * GENEROUS < free


def check(label: str, need: Need, batch: int, size: tuple[int, int], free: int) -> None:
    """UserError where a batch of images needs more than `free` bytes, with a batch or a size that does not.

    need: bytes for a batch at (height, width).
    """
    wanted = need(batch, size)
    if wanted <= free:
        return
    told = f"{label} at batch {batch}, {size[0]}x{size[1]} needs about {wanted / 2**30:.1f} GB"
    told += f" and {free / 2**30:.1f} GB are free"
    fits = next((b for b in _halves(batch) if need(b, size) <= free), None)
    if fits:
        raise UserError(f"not enough memory: {told}; batch {fits} fits")
    sides = (tuple(max(32, side // share // 32 * 32) for side in size) for share in (2, 4, 8, 16, 32))
    side = next(((h, w) for h, w in sides if need(1, (h, w)) <= free), None)
    remedy = f"batch 1 at {side[0]}x{side[1]} fits" if side else "no size fits"
    raise UserError(f"not enough memory: {told}; {remedy}")


def _halves(batch: int) -> list[int]:
    found = []
    while batch > 1:
        batch //= 2
        found.append(batch)
    return found


def _build(request: Request) -> Callable[[], Call]:
    """What makes the call of a request, its packages imported already."""
    import muntin
    from muntin.measure import peers
    from muntin.measure.targets import build_dense, build_peer, parse
    from muntin.runtime import load
    from muntin.runtime.precision import DTYPES

    for module in IMPORTS.get(request.engine, ()):
        importlib.import_module(module)
    if request.path:
        return lambda: load(str(request.path))
    target = parse(request.given)[0]
    if target.peer:
        importlib.import_module(target.kind)
    size = (request.height, request.width)

    def build() -> Call:
        if target.peer:
            model, _ = peers.tuned(build_peer(target, size), target.kind, size)
        else:
            ours = {"run": lambda: target.name.model(), "dense": lambda: build_dense(target)}
            model = ours.get(target.kind, lambda: muntin.create_model(target.name))()
        model = model.eval().requires_grad_(False).to(request.device, DTYPES[request.precision])
        if request.channels_last:
            model = peers.ChannelsLast(model)
        if request.engine == "optimize":
            return muntin.optimize(model)
        if request.engine == "compile":
            return torch.compile(model, dynamic=False) if target.peer else muntin.compile(model)
        return model

    return build


def main() -> None:
    """Read a request, print its peak."""
    from muntin.runtime.precision import DTYPES

    request = Request(**json.load(sys.stdin))
    with threads_of(request.threads):
        build = _build(request)
        dtype = torch.float32 if request.path else DTYPES[request.precision]
        images = torch.randn(request.batch, 3, request.height, request.width).to(request.device, dtype)
        if request.bytes_in:
            images = images.permute(0, 2, 3, 1).to(torch.uint8)
        torch.nn.functional.linear(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
        print(json.dumps(asdict(peak(build, images))), flush=True)
    os._exit(0)  # an engine's threads are not waited for


if __name__ == "__main__":
    main()
