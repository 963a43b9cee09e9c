"""Where the time of a forward pass goes: by kind of operation and by stage, against what the machine could do.

Kinds, stages and bounds each add up to the wall time of one pass. How each engine's time is attributed stands in
docs/profile.md and in the profile itself (`how`).
"""

import importlib.util
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError, nearest
from muntin.measure.capture import Capture, Piece
from muntin.measure.kinds import GROUPS, KINDS, PRODUCTS, UNATTRIBUTED, kind_of
from muntin.measure.roofline import Bounds, Peaks, bounds, peaks

__all__ = ["ENGINES", "KINDS", "UNATTRIBUTED", "Operator", "Profile", "kind_of", "profile"]

ENGINES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "optimize": (),
    "compile": (),
    "onnx": ("onnxruntime", "onnxscript"),
}
"""The engines that can be profiled, and the packages that each needs beyond torch."""


@dataclass(frozen=True)
class Operator:
    """All calls of one operator in one stage: milliseconds and calls in a pass.

    ms: without what it calls itself where that is listed apart. flops: of products; bytes: read and written.
    intensity: FLOPs per byte. bound: what limits it, "compute" or "memory" ("" without the machine's peaks);
    bound_ms: the least it could take.
    """

    name: str
    kind: str
    ms: float
    calls: int
    group: str = ""
    stage: str = ""
    flops: int = 0
    bytes: int = 0
    bound: str = ""
    bound_ms: float = 0.0

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one forward pass: `kinds`, `groups` and the values of `stages` each add up to `wall_ms`.

    kinds: by KINDS; groups: by EfficientViT's figure 2 (GROUPS). stages: by stage, then kind. fused: for a kind, the
    time of kernels of other kinds that have some of it inside. `wall_ms` was measured around profiled passes,
    `plain_ms` without the profiler, whose own cost is the difference (medians); what no operator accounts for
    (Python, launching, an idle GPU) is "unattributed". peaks and bounds: the machine's best, measured in the same run,
    and the pass against it. how: in what way this engine's time was attributed.
    """

    kinds: dict[str, float]
    operators: list[Operator]
    wall_ms: float
    plain_ms: float
    device: str
    threads: int
    shape: tuple[int, ...]
    name: str = ""
    engine: str = "eager"
    precision: str = "float32"
    groups: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)
    peaks: Peaks | None = None
    bounds: Bounds | None = None
    how: str = ""
    notes: list[str] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list, repr=False)

    def share(self, kind: str) -> float:
        """Part of the wall time, 0..1."""
        return self.kinds[kind] / self.wall_ms

    @property
    def memory_bound(self) -> float:
        """Milliseconds in operations other than multiplication and convolution, the paper's "memory-bound"."""
        return sum(ms for kind, ms in self.kinds.items() if kind not in (*PRODUCTS, UNATTRIBUTED))

    @property
    def distance(self) -> float:
        """How many times the floor of its products the pass takes without the profiler; infinite without a floor."""
        return self.plain_ms / self.bounds.floor_ms if self.bounds and self.bounds.floor_ms else math.inf

    @property
    def label(self) -> str:
        """What was profiled: model, engine, batch."""
        parts = [self.name, self.engine, f"batch {self.shape[0]}" if self.shape else ""]
        return ", ".join(part for part in parts if part)

    def table(self) -> str:
        """Kinds, the paper's groups, stages and bounds, to read."""
        from muntin.measure.profile_text import text

        return text(self)

    def json(self) -> str:
        """All of it as JSON text, but for the single pieces, which are in the trace."""
        return json.dumps(self.plain(), indent=2) + "\n"

    def plain(self) -> dict[str, Any]:
        """The same as plain data."""
        content = asdict(self)
        del content["pieces"]
        content["memory_bound_ms"] = self.memory_bound
        if self.peaks is not None and self.bounds is not None:
            content["peaks"]["ridge"] = self.peaks.ridge
            content["distance"] = self.distance if self.bounds.floor_ms else None
        return content


def profile(
    model: nn.Module,
    x: Tensor,
    *,
    engine: str = "eager",
    name: str = "",
    calls: int = 5,
    warmup: int = 3,
    roofline: bool = True,
) -> Profile:
    """Measure one forward pass by kind of operation, by stage and against the machine's peaks, in inference mode.

    model: any module; it runs in evaluation mode and is left as it was.
    x: (B, 3, H, W) images on the model's device and in its precision.
    engine: "eager", the model as it is; "optimize", `muntin.optimize`'s copy (of another library's model a copy with
        its BatchNorms folded); "compile"; "onnx", ONNX Runtime on the CPU.
    calls: profiled passes; of the wall time, and of each operator's, the median is taken. As many run before without
        the profiler.
    roofline: also measure the machine's peaks, once in a process.
    Raises UserError where there is nothing to run, for an unknown engine, or one whose package is missing.
    """
    check_engine(engine)
    if calls < 1 or x.numel() == 0:
        raise UserError(f"{calls} calls on images of shape {tuple(x.shape)} measure nothing; give at least one of each")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        captured = _capture(model, x, engine, calls, warmup)
    finally:
        for module, training in modes.items():
            module.training = training
    best = peaks(x.dtype, x.device) if roofline else None
    return _summed(captured, best, x, engine, name)


def check_engine(engine: str) -> None:
    """Raises UserError for an engine that is unknown or not installed."""
    if engine not in ENGINES:
        valid = ", ".join(ENGINES)
        raise UserError(f"engine {engine!r} cannot be profiled{nearest(engine, ENGINES)}; valid are {valid}")
    for package in ENGINES[engine]:
        if importlib.util.find_spec(package) is None:
            line = 'install it with: pip install "muntin[export]"'
            raise UserError(f"engine {engine!r} needs the package {package}; {line}")
    if engine == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UserError("engine 'compile' needs a C++ compiler; install one, such as g++, or leave it out")


def _capture(model: nn.Module, x: Tensor, engine: str, calls: int, warmup: int) -> Capture:
    from muntin.measure.capture import compiled, eager, onnx

    if engine == "onnx":  # exporting takes gradients' machinery, which inference mode switches off
        return onnx.capture(model, x, calls, warmup)
    with torch.inference_mode():
        if engine == "compile":
            return compiled.capture(model, x, calls, warmup)
        return eager.capture(_optimized(model, x) if engine == "optimize" else model, x, calls, warmup)


def _optimized(model: nn.Module, x: Tensor) -> nn.Module:
    import muntin
    from muntin.measure.capture.compiled import is_ours
    from muntin.measure.peers import tuned

    if is_ours(model):
        return muntin.optimize(model)
    library = "timm" if type(model).__module__.startswith("timm.") else ""
    return tuned(model, library, (x.shape[2], x.shape[3]))[0]


def _summed(captured: Capture, best: Peaks | None, x: Tensor, engine: str, name: str) -> Profile:
    pieces = captured.pieces
    wall = max(captured.wall_ms, sum(p.ms for p in pieces if p.kind != UNATTRIBUTED))  # two clocks differ by a little
    kinds, groups, fused = (
        defaultdict[str, float](float),
        defaultdict[str, float](float),
        defaultdict[str, float](float),
    )
    stages: dict[str, defaultdict[str, float]] = {stage: defaultdict(float) for stage in captured.stages}
    for piece in pieces:
        if piece.kind == UNATTRIBUTED:
            continue
        kinds[piece.kind] += piece.ms
        groups[piece.group] += piece.ms
        stages.setdefault(piece.stage, defaultdict(float))[piece.kind] += piece.ms
        for kind in piece.holds:
            fused[kind] += piece.ms
    rest = max(wall - sum(kinds.values()), 0.0)
    return Profile(
        kinds={kind: kinds[kind] for kind in KINDS if kind != UNATTRIBUTED} | {UNATTRIBUTED: rest},
        groups={group: groups[group] for group in GROUPS} | {UNATTRIBUTED: rest},
        stages={stage: dict(found) for stage, found in stages.items()} | {UNATTRIBUTED: {UNATTRIBUTED: rest}},
        fused=dict(fused),
        operators=_operators(pieces, best),
        wall_ms=wall,
        plain_ms=captured.plain_ms,
        device=str(x.device),
        threads=torch.get_num_threads(),
        shape=tuple(x.shape),
        name=name,
        engine=engine,
        precision=str(x.dtype).removeprefix("torch."),
        peaks=best,
        bounds=bounds(pieces, wall, best) if best else None,
        how=captured.how,
        notes=captured.notes,
        pieces=pieces,
    )


def _operators(pieces: Sequence[Piece], best: Peaks | None) -> list[Operator]:
    """Pieces of one name, kind and stage together, the longest first."""
    together: defaultdict[tuple[str, str, str, str], list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.kind != UNATTRIBUTED:
            together[piece.name, piece.kind, piece.group, piece.stage].append(piece)
    found = []
    for (name, kind, group, stage), same in together.items():
        by_flops = sum(best.compute_ms(p.flops) for p in same) if best else 0.0
        by_bytes = sum(best.memory_ms(p.bytes) for p in same) if best else 0.0
        found.append(
            Operator(
                name=name,
                kind=kind,
                ms=sum(p.ms for p in same),
                calls=len(same),
                group=group,
                stage=stage,
                flops=sum(p.flops for p in same),
                bytes=sum(p.bytes for p in same),
                bound="" if best is None else "compute" if by_flops > by_bytes else "memory",
                bound_ms=sum(best.floor_ms(p.flops, p.bytes) for p in same) if best else 0.0,
            )
        )
    return sorted(found, key=lambda operator: -operator.ms)
