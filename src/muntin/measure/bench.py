"""Latency and throughput of models side by side, with the protocol written down.

Targets take turns: in each round every target runs for a short while, in an order shuffled per round, so that a
machine that slows down slows all of them. B batch, H W image
"""

import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError, nearest
from muntin.measure.machine import commit, machine, versions
from muntin.measure.statistics import median_interval, percentile, rounded

MODELS = Path(__file__).parent.parent / "models"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIXES = ("muntin", "muntin+optimize", "timm", "torchvision", "transformers")

WARMUP_CALLS = 3  # the last so many calls must agree ...
WARMUP_SPREAD = 0.05  # ... within this share of their median
WARMUP_SECONDS = 5.0  # or this much time has passed

Target = str | tuple[str, nn.Module]
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Row:
    """One target at one batch size. Times are milliseconds per call of the whole batch.

    `interval_ms` holds the median with 95% confidence, from the rounds' medians, `round_ms`; `iqr_ms` is the distance
    between the quartiles of all calls. `speed` is the first target's time over this one's (2: twice as fast),
    the median over the rounds, and `speed_interval` holds it with 95% confidence; where that contains 1 the two
    are a tie. `throughput` is images per second at the median.
    """

    target: str
    batch: int
    height: int
    width: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    iqr_ms: float
    interval_ms: tuple[float, float]
    round_ms: list[float]
    throughput: float
    speed: float
    speed_interval: tuple[float, float]
    calls: int
    warmup_calls: int
    stable: bool


@dataclass(frozen=True)
class BenchReport:
    """Rows in the order given, with everything needed to judge and repeat them."""

    rows: list[Row]
    protocol: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    created: str

    def json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """A readable table; no figure has more digits than its interval supports."""
        head = ["target", "batch", "size", "median ms", "p90", "p99", "images/s", f"speed vs {self.rows[0].target}"]
        lines = [head]
        for row in self.rows:
            half = (row.interval_ms[1] - row.interval_ms[0]) / 2
            lines.append(
                [
                    row.target,
                    str(row.batch),
                    f"{row.height}x{row.width}",
                    f"{rounded(row.median_ms, half)} ± {rounded(half, half)}",
                    rounded(row.p90_ms, half),
                    rounded(row.p99_ms, half),
                    rounded(row.throughput, row.throughput * half / row.median_ms),
                    self._speed(row),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *cells]))
        text.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*text, "", *self._notes()])

    def _speed(self, row: Row) -> str:
        if row.target == self.rows[0].target:
            return "base"
        low, high = row.speed_interval
        if low <= 1 <= high:
            return "tie"
        return rounded(row.speed, (high - low) / 2) + "x"

    def _notes(self) -> list[str]:
        m, p = self.machine, self.protocol
        where = m.get("gpu") or f"{m['cpu']}, {m['cores']} cores"
        notes = [
            f"{where}; {p['dtype']}, {p['threads']} threads; {p['rounds']} interleaved rounds, "
            f"{min(row.calls for row in self.rows)} calls or more per row; torch {self.versions['torch']}",
            "± and ties: 95% confidence over the rounds"
            if p["rounds"] >= 6
            else "± and ties: the range of the rounds; six rounds or more give 95% confidence",
        ]
        if any(row.calls < 100 for row in self.rows):
            notes.append("p99 of fewer than 100 calls is close to the slowest call; more --seconds sharpen it")
        unstable = [f"{row.target} at batch {row.batch}" for row in self.rows if not row.stable]
        if unstable:
            notes.append(f"not stable when the warm-up ended: {', '.join(unstable)}; is the machine busy?")
        return notes


# ------------------------------------------------------------------------------------------------ the targets


def _ours(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    import muntin
    from muntin.models import published

    return muntin.create_model(name), size or (published(name).get("size", 224),) * 2


def _timm(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    import timm
    from timm.layers import config as timm_config

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    default = timm.get_pretrained_cfg(name)
    height, width = size or (default.input_size[1:] if default else (224, 224))
    before = timm_config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(True, experimental=True)  # its Swin has fused attention behind this switch
    try:
        try:
            model = timm.create_model(name, img_size=(height, width))
        except TypeError:  # models of any size take no img_size
            model = timm.create_model(name)
    finally:
        timm_config._USE_FUSED_ATTN = before
    return model, (height, width)


def _torchvision(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    from torchvision import models

    valid = models.list_models(module=models)
    if name not in valid:
        raise UserError(f"torchvision has no classifier {name!r}{nearest(name, valid)}")
    return models.get_model(name, weights=None), size or (224, 224)


class LogitsOnly(nn.Module):
    """A transformers classifier that returns its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def transformers_swin(name: str, size: tuple[int, int], num_classes: int = 1000) -> LogitsOnly:
    """transformers' Swin in the shape of our variant `name`, with fused attention.

    Raises UserError for a variant whose windows differ between stages or that is no Swin: its configuration
    holds one window.
    """
    from transformers import SwinConfig, SwinForImageClassification

    import muntin

    with torch.device("meta"):
        ours = muntin.create_model(name)
    shape = asdict(ours.config)
    windows = shape.get("window")
    one_window = windows if isinstance(windows, int) else (windows or (0,))[0]
    plain = {"dim", "depths", "heads"} <= shape.keys() and isinstance(shape.get("mlp_ratio"), (int, float))
    shifts = shape.get("shift")
    if not plain or set(_several(windows)) != {one_window} or set(_several(shifts)) != {True}:
        raise UserError(
            f"transformers has no configuration for {name}: its Swin takes one window for all stages and shifts "
            "in each; give a plain Swin, as in transformers:swin_t"
        )
    config = SwinConfig(
        image_size=size,
        patch_size=shape["patch"],
        embed_dim=shape["dim"],
        depths=list(shape["depths"]),
        num_heads=list(shape["heads"]),
        window_size=one_window,
        mlp_ratio=shape["mlp_ratio"],
    )
    config.num_labels = num_classes
    config._attn_implementation = "sdpa"
    return LogitsOnly(SwinForImageClassification(config))


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _transformers(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int]]:
    from muntin.models import published

    size = size or (published(name).get("size", 224),) * 2
    return transformers_swin(name, size), size


@dataclass(frozen=True)
class _Ready:
    """A target that is built: `call` takes (B, 3, H, W) images of `dtype` on the device."""

    label: str
    call: Call
    size: tuple[int, int]


class _Builder:
    """Turns what the user named into something to call."""

    def __init__(self, size: tuple[int, int] | None, dtype: torch.dtype, device: torch.device, optimize: bool) -> None:
        self.size, self.dtype, self.device, self.optimize = size, dtype, device, optimize

    def build(self, target: Target) -> list[_Ready]:
        if isinstance(target, tuple):
            label, model = target
            return self._with_optimized(label, self._given(model), self.size or (224, 224))
        prefix, colon, name = target.partition(":")
        if colon and prefix in PREFIXES:
            return self._prefixed(prefix, name)
        path = Path(target)
        if path.suffix == ".onnx":
            return [self._file(path)]
        if path.is_dir() or path.suffix == ".safetensors":
            return self._run(path)
        if colon:
            valid = ", ".join(f"{p}:NAME" for p in PREFIXES)
            raise UserError(f"unknown kind of target {target!r}; valid are NAME and {valid}")
        model, size = _ours(target, self.size)
        return self._with_optimized(target, model, size)

    def _prefixed(self, prefix: str, name: str) -> list[_Ready]:
        if prefix == "muntin+optimize":
            model, size = self._opened(Path(name)) if Path(name).is_dir() else _ours(name, self.size)
            return [self._optimized(name, model, size)]
        builders = {"muntin": _ours, "timm": _timm, "torchvision": _torchvision, "transformers": _transformers}
        try:
            model, size = builders[prefix](name, self.size)
        except ImportError as error:
            raise UserError(
                f"{prefix}:{name} needs the package {prefix}; install it with: pip install {prefix}"
            ) from error
        if prefix == "muntin":
            return self._with_optimized(name, model, size)
        return [self._eager(f"{prefix}:{name}", model, size)]

    def _given(self, model: nn.Module) -> nn.Module:
        """The caller's module as it is where it is ready to run, otherwise a copy to change."""
        tensors = [*model.parameters(), *model.buffers()]
        floating = [t for t in tensors if t.is_floating_point()]
        placed = all(t.device.type == self.device.type for t in tensors) and all(
            t.dtype == self.dtype for t in floating
        )
        return model if placed and not model.training else copy.deepcopy(model)

    def _eager(self, label: str, model: nn.Module, size: tuple[int, int]) -> _Ready:
        return _Ready(label, model.eval().to(self.device, self.dtype), size)

    def _optimized(self, label: str, model: nn.Module, size: tuple[int, int]) -> _Ready:
        import muntin

        return _Ready(f"{label} (optimized)", muntin.optimize(model.eval().to(self.device, self.dtype)), size)

    def _with_optimized(self, label: str, model: nn.Module, size: tuple[int, int]) -> list[_Ready]:
        ready = [self._eager(label, model, size)]
        return [*ready, self._optimized(label, model, size)] if self.optimize else ready

    def _opened(self, path: Path) -> tuple[nn.Module, tuple[int, int]]:
        from muntin.run import Run

        run = Run.open(path)
        height, width = run.preprocessing["size"]
        return run.model(), self.size or (height, width)

    def _run(self, path: Path) -> list[_Ready]:
        model, size = self._opened(path)
        ready = self._with_optimized(str(path), model, size)
        exported = path / "model.onnx"
        if exported.exists() and self.dtype == torch.float32 and self.device.type == "cpu":
            ready.append(self._file(exported, size))
        return ready

    def _file(self, path: Path, size: tuple[int, int] | None = None) -> _Ready:
        from muntin.runtime.engines import load

        if self.dtype != torch.float32 or self.device.type != "cpu":
            raise UserError(f"{path} runs in float32 on the CPU; leave out --dtype and --device")
        engine = load(path)
        height, width = size or self.size or _pair(engine.preprocessing.get("size", 224))
        return _Ready(f"{path} (ONNX Runtime)", engine, (height, width))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ------------------------------------------------------------------------------------------------- the timing


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(call: Call, images: Tensor) -> float:
    """Seconds of one call, the work on a GPU included."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        call(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _warm_up(call: Call, images: Tensor) -> tuple[list[float], bool]:
    """Call until times agree or the time is up; the times, and whether they agreed."""
    times: list[float] = []
    start = time.perf_counter()
    while True:
        times.append(_timed(call, images))
        last = times[-WARMUP_CALLS:]
        agree = max(last) - min(last) <= WARMUP_SPREAD * statistics.median(last)
        if len(times) > WARMUP_CALLS and agree:
            return times, True
        if len(times) > WARMUP_CALLS and time.perf_counter() - start > WARMUP_SECONDS:
            return times, False


def _interleaved(
    ready: Sequence[_Ready],
    images: dict[tuple[int, int], Tensor],
    calls: Sequence[int],
    order: random.Random,
    rounds: int,
    tick: Callable[[str], None],
) -> list[list[list[float]]]:
    """Seconds by target, round and call."""
    times: list[list[list[float]]] = [[] for _ in ready]
    for _ in range(rounds):
        turns = list(range(len(ready)))
        order.shuffle(turns)
        for turn in turns:
            target = ready[turn]
            _timed(target.call, images[target.size])  # brings its weights back into the caches, untimed
            times[turn].append([_timed(target.call, images[target.size]) for _ in range(calls[turn])])
            tick(target.label)
    return times


def _row(
    target: _Ready, batch: int, warm: tuple[list[float], bool], times: list[list[float]], base: list[float]
) -> Row:
    every = [1000 * t for visit in times for t in visit]
    medians = [1000 * statistics.median(visit) for visit in times]
    speeds = [b / m for b, m in zip(base, medians, strict=True)]
    median = statistics.median(every)
    return Row(
        target=target.label,
        batch=batch,
        height=target.size[0],
        width=target.size[1],
        median_ms=median,
        p90_ms=percentile(every, 0.90),
        p99_ms=percentile(every, 0.99),
        iqr_ms=percentile(every, 0.75) - percentile(every, 0.25),
        interval_ms=median_interval(medians),
        round_ms=medians,
        throughput=1000 * batch / median,
        speed=statistics.median(speeds),
        speed_interval=median_interval(speeds),
        calls=len(every),
        warmup_calls=len(warm[0]),
        stable=warm[1],
    )


class _Progress:
    """A bar over all warm-ups and rounds, where tqdm is installed and the output is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, desc="bench", disable=None, leave=False, file=sys.stderr)

    def tick(self, label: str) -> None:
        if self.bar is not None:
            self.bar.set_description(f"bench: {label}")
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _checked(targets: Sequence[Target], batch_sizes: Sequence[int], size: Any, dtype: str, rounds: int) -> None:
    if not targets:
        raise UserError("no target given; name at least one, as in: muntin bench swin_t timm:resnet50")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch sizes {list(batch_sizes)} cannot be measured; give at least one, each at least 1")
    if size is not None and min(_pair(size)) < 1:
        raise UserError(f"size {size} cannot be measured; give a side of at least 1 pixel")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown{nearest(dtype, DTYPES)}; valid are {', '.join(DTYPES)}")
    if rounds < 2:
        raise UserError(f"{rounds} rounds given; an interval needs at least 2")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown; valid are cpu and cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not there; this machine offers cpu")
    return torch.device(name)


def _measure(
    ready: list[_Ready], batch: int, make: Callable[[tuple[int, int]], Tensor], rounds: int, seconds: float,
    order: random.Random, tick: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    images = {target.size: make(target.size) for target in ready}
    warm = []
    try:
        for target in ready:
            warm.append(_warm_up(target.call, images[target.size]))
            tick(target.label)
        share = seconds / rounds
        calls = [max(1, round(share / statistics.median(times[-WARMUP_CALLS:]))) for times, _ in warm]
        times = _interleaved(ready, images, calls, order, rounds, tick)
    except torch.OutOfMemoryError as error:
        raise UserError(f"not enough memory for batch {batch}; give a smaller --batch or --size") from error
    base = [1000 * statistics.median(visit) for visit in times[0]]
    return [_row(target, batch, w, t, base) for target, w, t in zip(ready, warm, times, strict=True)]


def bench(
    targets: Sequence[Target],
    batch_sizes: Sequence[int] = (1, 8),
    size: int | tuple[int, int] | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    rounds: int = 10,
    seconds: float = 3.0,
    optimize: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> BenchReport:
    """Measure targets against each other: latency, its spread, throughput, and speed against the first.

    targets: variant names, run folders (with their model.onnx where it exists), .onnx files,
        `timm:NAME`, `torchvision:NAME`, `transformers:NAME` (our variant's shape), `muntin+optimize:NAME`, or a
        (label, module) pair.
    size: side or (height, width) in pixels; by default each target's own.
    dtype: of weights and images. device: "cpu" or "cuda", by default the GPU where there is one.
    threads: of the CPU, by default what torch uses.
    rounds, seconds: turns per target, and roughly how long each target is timed at each batch size.
    optimize: beside each of our own models also its `muntin.optimize` copy.
    A run's folder gets `bench.json`, and `latency_ms` (median at batch 1) in its metrics.json.
    Raises UserError for a target that cannot be found or a setting that cannot be measured.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    _checked(targets, batch_sizes, size, dtype, rounds)
    where = _device(device)
    described = machine(where)
    order = random.Random(seed)
    with _threads(threads or torch.get_num_threads()), torch.random.fork_rng():
        torch.manual_seed(seed)
        builder = _Builder(None if size is None else _pair(size), DTYPES[dtype], where, optimize)
        ready = [built for target in targets for built in builder.build(target)]
        bar = _Progress(len(batch_sizes) * len(ready) * (rounds + 1), progress)
        rows: list[Row] = []
        try:
            for batch in batch_sizes:

                def make(side: tuple[int, int], batch: int = batch) -> Tensor:
                    return torch.randn(batch, 3, *side).to(where, DTYPES[dtype])

                rows += _measure(ready, batch, make, rounds, seconds, order, bar.tick)
        finally:
            bar.close()
        used = torch.get_num_threads()
    report = BenchReport(
        rows=rows,
        protocol={
            "mode": "eager, torch.inference_mode",
            "timer": "wall clock of one call, GPU synchronised before and after",
            "dtype": dtype,
            "device": str(where),
            "threads": used,
            "rounds": rounds,
            "seconds_per_target": seconds,
            "order": "round robin, shuffled per round, one untimed call per turn",
            "warmup": f"until {WARMUP_CALLS} calls agree within {WARMUP_SPREAD:.0%}, at most {WARMUP_SECONDS:g} s",
            "seed": seed,
        },
        machine=described,
        versions=versions(),
        commit=commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    for target in targets:
        if isinstance(target, str) and Path(target).is_dir():
            _keep(Path(target), report)
    return report


def _keep(folder: Path, report: BenchReport) -> None:
    from muntin.run import Run, atomic_write

    atomic_write(folder / "bench.json", report.json().encode())
    single = [row.median_ms for row in report.rows if row.target == str(folder) and row.batch == 1]
    if single:
        Run.open(folder).update_metrics(latency_ms=round(single[0], 3))
