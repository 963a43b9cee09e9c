"""Latency, throughput, memory and energy of models side by side, with the protocol written down.

Every model runs in every engine, precision, size and batch. Its outputs are compared with eager float32 before it is
timed; then all take turns, in an order shuffled per round (`timing`). B batch, H W image
"""

import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.measure import memory as memory_of
from muntin.measure import timing
from muntin.measure.energy import meter
from muntin.measure.machine import commit, device_of, machine, versions
from muntin.measure.outputs import GPU_BOUNDS, Comparison
from muntin.measure.peers import LogitsOnly, transformers_swin
from muntin.measure.plan import Combination, Skips, check_base, plan
from muntin.measure.results import BenchReport, Row
from muntin.measure.runners import Runner, Skipped, Workshop, check_engines
from muntin.measure.scaling import growth
from muntin.measure.targets import Given, Models, Size, Target, pair, parse
from muntin.progress import Bar
from muntin.runtime.precision import precision as full_precision
from muntin.runtime.verify import BOUNDS

__all__ = ["MODELS", "BenchReport", "LogitsOnly", "Row", "bench", "transformers_swin"]

MODELS = Path(__file__).parent.parent / "models"
BATCHES = {"cpu": (1, 8), "cuda": (1, 64)}


@dataclass(frozen=True)
class _Contestant:
    """What takes turns: a runner at one batch and size, and the fields of its row that are known before."""

    name: str
    runner: Runner
    images: Tensor
    known: dict[str, Any]


class _Session:
    """One measurement: what it is made with, and what it has found so far."""

    def __init__(self, plan: list[Combination], workshop: Workshop, skips: Skips, memory: bool) -> None:
        self.plan, self.workshop, self.skips = plan, workshop, skips
        self.device = workshop.device
        self.no_memory = memory_of.known() if memory else ""
        self.meter, self.about_energy = meter(self.device)
        self.rows: list[Row] = []

    def group(self, batch: int, size: Size | None, seed: int, bar: Bar) -> list[_Contestant]:
        """Everything that can be timed at a batch and a size (None: each target's own), outputs compared."""
        found: dict[Combination, _Contestant] = {}
        comparisons: dict[Size, Comparison] = {}
        for it in sorted(self.plan, key=lambda it: not it.reference):  # so that its first call is its first
            side = size or it.target.size
            bar.say(f"{it.name}: preparing batch {batch}, {side[0]}x{side[1]}")
            comparison = comparisons.setdefault(side, Comparison(self.workshop.models, self.device))
            try:
                with _refusals_of(it.target):
                    self._enough_memory(it, batch, side)
                    images = torch.randn(batch, 3, *side, generator=torch.Generator().manual_seed(seed))
                    found[it] = self._contestant(it, images, side, comparison)
            except (Skipped, UserError) as error:
                if str(error).startswith("not enough memory"):
                    raise
                self.skips.add(it.name, str(error), f"batch {batch}, {side[0]}x{side[1]}")
            bar.step()
        return [found[it] for it in self.plan if it in found]

    def _contestant(self, it: Combination, images: Tensor, size: Size, comparison: Comparison) -> _Contestant:
        target, batch = it.target, len(images)
        shared = comparison.shared(target, images, size)
        runner = self.workshop.runner(target, it.engine, it.precision, batch, size)
        first, far = comparison.first_call(runner, images, size)
        known: dict[str, Any] = {
            "target": it.name, "batch": batch, "height": size[0], "width": size[1], "model": target.label,
            "engine": it.engine, "precision": it.precision, "settings": runner.settings, "difference": far,
            "shared": target.counterpart, "shared_difference": shared,
            "another_model": target.peer and target.counterpart is None,
            "load_s": runner.load_s, "export_s": runner.export_s, "first_call_ms": 1000 * first,
        }  # fmt: skip
        return _Contestant(it.name, runner, runner.given(images, self.device), known | self._memory(runner, images))

    def _memory(self, runner: Runner, images: Tensor) -> dict[str, float]:
        if self.no_memory is not None or runner.target.kind == "module" and runner.path is None:
            return {}
        _, _, height, width = images.shape
        request = memory_of.Request(
            runner.target.label, runner.engine, runner.precision, len(images), height, width,
            threads=torch.get_num_threads(), device=str(self.device),
            channels_last="channels-last" in runner.settings, path=str(runner.path) if runner.path else None,
            bytes_in=runner.dtype == torch.uint8,
        )  # fmt: skip
        try:
            found = memory_of.measure(request)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            name, shape = runner.target.label, f"{runner.engine} {runner.precision}, batch {len(images)}"
            self.skips.add(name, f"its memory could not be measured: the process {error}", shape)
            return {}
        memory = {"memory_mb": round(found.run_mb, 1), "load_memory_mb": round(found.load_mb, 1)}
        return memory | {"first_call_ms": found.first_ms}

    def _enough_memory(self, it: Combination, batch: int, size: Size) -> None:
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else memory_of.available()
        if free is None or memory_of.plenty(batch, size, free):
            return
        need: memory_of.Need = memory_of.images_twice
        if it.target.kind != "file":
            need = memory_of.need_of(self.workshop.models.get(it.target, size), 4 if it.precision == "float32" else 2)
        memory_of.check(it.name, need, batch, size, free)

    def time(
        self, group: list[_Contestant], base: str | None, rounds: int, seconds: float, seed: int, bar: Bar
    ) -> None:
        """Let a group take turns, and keep its rows."""
        if not group:
            return
        named = [c.name for c in group], [c.runner.target.label for c in group]
        against = next((names.index(base) for names in named if base in names), 0)
        calls = [(c.runner.call, c.images) for c in group]

        def tick(turn: int) -> None:
            bar.say(group[turn].name)
            bar.step()

        try:
            series = timing.interleaved(calls, rounds, seconds, random.Random(seed), self.meter, tick)
        except torch.OutOfMemoryError as error:
            batch = len(group[0].images)
            raise UserError(f"not enough memory for batch {batch}; give a smaller --batch or --size") from error
        for contestant, its in zip(group, series, strict=True):
            fields = contestant.known | timing.figures(its, series[against])
            self.rows.append(Row(**fields, base=group[against].name))

    def report(self, settings: dict[str, Any], described: dict[str, Any]) -> BenchReport:
        """What was found, with the protocol."""
        gpu = self.device.type == "cuda"
        protocol = {
            "mode": "torch.inference_mode",
            "timer": "CUDA events around one call, synchronised" if gpu else "wall clock of one call",
            "dtype": ", ".join(dict.fromkeys(row.precision for row in self.rows)),
            "engines": list(dict.fromkeys(row.engine for row in self.rows)),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            **settings,
            "order": "round robin, shuffled per round, one untimed call per turn",
            "warmup": f"until {timing.WARMUP_CALLS} calls agree within {timing.WARMUP_SPREAD:.0%}, "
            f"at most {timing.WARMUP_SECONDS:g} s",
            "bounds": GPU_BOUNDS if gpu else BOUNDS,
            "energy": self.about_energy,
            "memory": self.no_memory,
        }
        return BenchReport(
            rows=self.rows,
            protocol=protocol,
            machine=described,
            versions=versions(),
            commit=commit(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            skipped=self.skips.lines(),
            scaling=growth(self.rows),
        )


@contextmanager
def _refusals_of(target: Target) -> Iterator[None]:
    """What another library's model does not take is said and skipped; an error in a user's own module is raised."""
    try:
        yield
    except (Skipped, UserError):
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"not enough memory for {target.label}; give a smaller --batch or --size") from error
        if not target.peer:
            raise
        raise Skipped(f"{target.kind}: {error or type(error).__name__}") from error


def _checked(
    targets: Sequence[Given], batches: Sequence[int], sizes: Sequence[Size | None], rounds: int, threads: int | None
) -> None:
    if not targets:
        raise UserError("no target given; name at least one, as in: muntin bench swin_t timm:resnet50")
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {list(batches)} cannot be measured; give at least one, each at least 1")
    for size in sizes:
        if size is not None and min(size) < 1:
            raise UserError(f"size {size[0]}x{size[1]} cannot be measured; give a side of at least 1 pixel")
    if rounds < 2:
        raise UserError(f"{rounds} rounds given; an interval needs at least 2")
    if threads is not None and threads < 1:
        raise UserError(f"{threads} threads given; give at least 1")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _given(targets: Any) -> list[Given]:
    single = isinstance(targets, str) or isinstance(targets, tuple) and isinstance(targets[-1], torch.nn.Module)
    return [targets] if single else list(targets)


def _sizes(size: Any) -> list[Size | None]:
    return [pair(one) for one in size] if isinstance(size, list) else [None if size is None else pair(size)]


def bench(
    targets: Sequence[Given] | Given,
    batch_sizes: Sequence[int] | None = None,
    size: int | Size | Sequence[int | Size] | None = None,
    *,
    engine: str | Sequence[str] | None = None,
    precision: str | Sequence[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
    rounds: int = 10,
    seconds: float = 3.0,
    base: str | None = None,
    memory: bool = False,
    cuda_graphs: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> BenchReport:
    """Measure targets against each other: latency, its spread, throughput, memory, energy, and speed against a base.

    targets: variant names, run folders (with their exported files where no engine is named), .onnx, .xml and .pt2
        files, `timm:NAME`, `torchvision:NAME`, `hf:NAME` (transformers, our variant's shape), `muntin+optimize:NAME`,
        or a (label, module) pair.
    batch_sizes: by default 1 and 8, on a GPU 1 and 64.
    size: side or (height, width) in pixels, or a list of these; by default each target's own.
    engine: "eager" (default), "optimize", "compile", "onnx", "openvino", "pt2", or several.
    precision: "float32" (default), "bfloat16", "float16", or several; of weights and images, or inside a file.
    device: "cpu" or "cuda", by default the GPU where there is one. threads: of the CPU, by default what torch uses.
    rounds, seconds: turns per row, and roughly how long each row is timed.
    base: the row or the model that speeds are against; by default the first.
    memory: measure the peak of each row in a process of its own. cuda_graphs: replay calls as CUDA graphs.
    A run's folder gets `bench.json`, and `latency_ms` (median at batch 1) in its metrics.json.
    Raises UserError for a target that cannot be found or a setting that cannot be measured.
    """
    given, sizes = _given(targets), _sizes(size)
    where = device_of(device)
    batches = list(BATCHES[where.type] if batch_sizes is None else batch_sizes)
    engines = None if engine is None else list(dict.fromkeys(_listed(engine)))
    precisions = None if precision is None else list(dict.fromkeys(map(full_precision, _listed(precision))))
    _checked(given, batches, sizes, rounds, threads)
    check_engines(engines or [])
    if cuda_graphs and where.type != "cuda":
        raise UserError("CUDA graphs need a GPU; leave out --cuda-graphs")
    described = machine(where)
    with (
        timing.threads_of(threads or torch.get_num_threads()),
        torch.random.fork_rng(),
        tempfile.TemporaryDirectory(prefix="muntin-bench-") as folder,
    ):
        torch.manual_seed(seed)
        parsed = [target for one in given for target in parse(one)[: None if engines is None else 1]]
        skips = Skips()
        planned = plan(parsed, engines, precisions, where, skips)
        check_base(base, planned)
        workshop = Workshop(Models(seed), where, Path(folder), cuda_graphs)
        session = _Session(planned, workshop, skips, memory)
        with Bar("bench", len(sizes) * len(batches) * len(planned) * (rounds + 2), progress) as bar:
            for one in sizes:
                for batch in batches:
                    session.time(session.group(batch, one, seed, bar), base, rounds, seconds, seed, bar)
                    workshop.forget_files()
                workshop.forget_sizes()
        if not session.rows:
            raise UserError("nothing was measured: " + "; ".join(skips.lines()))
        settings = {"rounds": rounds, "seconds_per_target": seconds, "seed": seed, "cuda_graphs": cuda_graphs}
        report = session.report(settings, described)
    for target in parsed:
        if target.kind == "run" and Path(target.label).is_dir():
            _keep(target, report)
    return report


def _keep(target: Target, report: BenchReport) -> None:
    from muntin.run import Run, atomic_write

    folder = Path(target.label)
    atomic_write(folder / "bench.json", report.json().encode())
    own = [
        row.median_ms
        for row in report.rows
        if row.model == target.label and (row.engine, row.precision, row.batch) == ("eager", "float32", 1)
        and (row.height, row.width) == target.size
    ]  # fmt: skip
    if own:
        Run.open(folder).update_metrics(latency_ms=round(own[0], 3))
