"""torch.export's own format: a graph that PyTorch runs without the code that made it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError
from muntin.runtime.targets import Job, Opened, Written, axes
from muntin.runtime.tracing import quiet, trace

NAME = "muntin.json"  # of our metadata among the archive's extra files


def unavailable() -> str | None:
    return None


def write(job: Job, path: Path) -> Written:
    program = trace(job)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    least = 1 if job.fixed else least_side(program, job.image)
    metadata = job.metadata | {"least_side": str(least)}
    if job.fixed:
        metadata["fixed"] = json.dumps(job.fixed)
    program.example_inputs = None  # would be saved: megabytes of random numbers
    with quiet():
        torch.export.save(program, path, extra_files={NAME: json.dumps(metadata)})
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    shapes = [value.shape for node in program.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
    note = () if least == 1 else (f"takes images from {least} pixels a side; ONNX and OpenVINO files take any",)
    return Written(None, Counter(str(node.target) for node in calls), max(map(len, shapes)), note)


def least_side(program: torch.export.ExportedProgram, image: Tensor) -> int:
    """The smallest height and width that the program takes, found by running it.

    Its guards come from convolutions, which see sizes up to their kernel's as special cases.
    """
    module = program.module()
    batch, height, width = axes(image.dtype)

    def takes(side: int) -> bool:
        for sides in ((side, side), (side, side + 1), (side + 1, side), (side, 3 * side + 2), (3 * side + 2, side)):
            shape = list(image.shape)
            shape[batch], shape[height], shape[width] = 1, *sides
            try:
                with torch.inference_mode():
                    module(torch.zeros(shape, dtype=image.dtype))
            except (RuntimeError, AssertionError):  # a guard's or an operator's refusal
                return False
        return True

    low, high = 0, 1
    while not takes(high):
        low, high = high, 2 * high
        if high > max(image.shape):
            raise UserError("the model takes images of one size alone: give fixed=(batch, height, width)")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(middle) else (middle, high)
    return high


def open(path: Path) -> Opened:
    extra = {NAME: ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # of the archive, of JSON, of the graph: no base below Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a file that torch.export can load ({reason}); export it again") from error
    module: Any = program.module()
    metadata: dict[str, str] = json.loads(extra[NAME] or "{}")

    def run(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            outputs = module(images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    given = next(node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    shape: Any = tuple(json.loads(metadata["fixed"])) if "fixed" in metadata else (None, None, None)
    return Opened(run, metadata, given.dtype, shape, int(metadata.get("least_side", 1)))
