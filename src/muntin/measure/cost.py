"""What a forward pass costs, counted and not timed: parameters, multiply-accumulates, memory, bytes.

B batch, N tokens, C channels, h heads, w window
"""

import argparse
import copy
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.heads.dense import Dense
from muntin.measure.counter import ATTENTION, KINDS, OperatorCounter
from muntin.measure.results import aligned
from muntin.measure.targets import Size, Target, build_dense, build_peer, pair, parse
from muntin.run import atomic_write

MODELS = Path(__file__).parent.parent / "models"
PRECISIONS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number."""

KEPT_BATCH = 2  # a BatchNorm on pooled features cannot train on one image


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass in evaluation mode.

    `parameters` are learnable; `exported_parameters` counts each bias table as the h x w^2 x w^2 matrix that
    stands as a constant in a graph exported for one size, which is how the Swin-Free paper (table 6) counts;
    `folded_parameters` are what `muntin.runtime.fold` leaves, None for a model that is not ours.
    `macs` are multiply-accumulates of matrix products and convolutions, attention's two products included, in all
    and by kind: a product is `linear` where one factor depends on weights alone, `attention` where neither does.
    `bytes_moved` sums the inputs and outputs of each operator that is not a view: what would cross the memory
    bus if no operator found its input in a cache.
    `peak_bytes` is the most that the image and what was computed from it hold at any one time, views counted once
    and operators' scratch memory not. `kept_bytes` is what a forward in training keeps for the backward pass, for
    each image, without the weights; None where it was not asked for.
    `weight_bytes` are parameters and buffers by precision.
    """

    parameters: int
    exported_parameters: int
    folded_parameters: int | None
    macs: int
    macs_by_kind: dict[str, int]
    bytes_moved: int
    peak_bytes: int
    kept_bytes: int | None
    weight_bytes: dict[str, int]
    batch: int
    height: int
    width: int

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    def __str__(self) -> str:
        images = "" if self.batch == 1 else f", {self.batch} images"
        return (
            f"{self.parameters:,} learnable parameters "
            f"({self.exported_parameters:,} with bias matrices as constants), "
            f"{self.gmacs:.3f} GMACs and {self.bytes_moved / 1e6:.1f} MB moved at {self.height}x{self.width}{images}"
        )


def _exported_parameters(model: nn.Module) -> int:
    total = sum(p.numel() for p in model.parameters())
    module: Any
    for module in model.modules():
        if hasattr(module, "bias_table"):  # (offsets, h) becomes (h, w^2, w^2)
            total += module.window**4 * module.bias_table.shape[1] - module.bias_table.numel()
        elif hasattr(module, "relative_position_index") and hasattr(module, "relative_position_bias_table"):
            table = module.relative_position_bias_table  # timm's and torchvision's Swin: an index for each pair
            total += module.relative_position_index.numel() * table.shape[1] - table.numel()
    return total


def _folded_parameters(model: nn.Module) -> int | None:
    from muntin.runtime import fold

    if not any(hasattr(module, "folded") for module in model.modules()):
        return None
    return sum(p.numel() for p in fold(model).parameters())


def _copy(model: nn.Module) -> nn.Module:
    """Modules of its own, so that modes, statistics and kept biases are; the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _image(model: nn.Module, batch: int, size: tuple[int, int]) -> Tensor:
    first = next(model.parameters(), torch.empty(0))
    dtype = first.dtype if first.dtype.is_floating_point else torch.float32
    return torch.zeros(batch, 3, *size, device=first.device, dtype=dtype)


def _kept_bytes(model: nn.Module, size: tuple[int, int]) -> int:
    """Bytes that a forward in training keeps for the backward pass, for each image."""
    held: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor:
        held[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    training = _copy(model).train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = training(_image(training, KEPT_BATCH, size))  # noqa: F841  # alive until all is counted
    for weight in [*training.parameters(), *training.buffers()]:
        held.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in held.values()) // KEPT_BATCH


def cost(model: nn.Module, size: int | tuple[int, int] = 224, batch: int = 1, training: bool = False) -> Cost:
    """Count parameters, multiply-accumulates, memory and bytes of one forward pass.

    model: anything that takes a (B, 3, H, W) image; counted in evaluation mode and left as it was. Where its
        parameters are on the meta device nothing is computed. A detector's heads are counted for as many proposals and
        detections as its configuration has, whatever it finds.
    size: side or (height, width) of the image in pixels. batch: images.
    training: count `kept_bytes` too; not of detectors and segmenters, which learn from more than images.
    Raises UserError for a size or batch that is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size {height}x{width}: give a height and width of at least 1 pixel")
    if batch < 1:
        raise UserError(f"batch {batch}: give at least one image")
    counted = _copy(model).eval()
    image = _image(counted, batch, (height, width))
    with torch.inference_mode(), OperatorCounter([image]) as counter:
        getattr(counted, "measured", counted)(image)
    numbers = sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        exported_parameters=_exported_parameters(model),
        folded_parameters=_folded_parameters(model),
        macs=counter.macs.total(),
        macs_by_kind={kind: counter.kinds[kind] for kind in KINDS},
        bytes_moved=counter.bytes.total(),
        peak_bytes=counter.held.peak,
        kept_bytes=_kept_bytes(model, (height, width)) if training and not isinstance(model, Dense) else None,
        weight_bytes={name: held * numbers for name, held in PRECISIONS.items()},
        batch=batch,
        height=height,
        width=width,
    )


# --------------------------------------------------------------------------------------- models by name, side by side


def _built(target: Target, size: Size) -> nn.Module:
    """A model without weights, on the meta device; that of a run as it is."""
    import muntin

    if target.kind == "run":
        return target.name.model()
    if target.kind == "file":
        raise UserError(f"{target.label} is an exported file, which is not counted; give the model that it is from")
    with torch.device("meta"):
        if target.kind == "dense":
            return build_dense(target)
        return muntin.create_model(target.name) if target.kind == "muntin" else build_peer(target, size)


def parse_size(text: str) -> tuple[int, int]:
    """`224` or `320x480`, height first. Raises UserError for anything else."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"size {text!r}: give a side in pixels as in 224, or HEIGHTxWIDTH as in 320x480")
    return int(sides[0]), int(sides[-1])


def costs(
    targets: Sequence[str], size: int | Size | None = None, batch: int = 1, training: bool = True
) -> dict[str, Cost]:
    """The cost of each target: a listed model, a run's folder, `HEAD:MODEL` for a detector or segmenter, `timm:NAME`,
    `torchvision:NAME` or `hf:NAME`.

    size: side or (height, width) in pixels, by default each target's own. The rest as in `cost`.
    Raises UserError for a target that cannot be found, or that does not take this size.
    """
    found = {}
    for name in targets:
        target = parse(name)[0]
        own = target.size if size is None else pair(size)
        try:
            found[name] = cost(_built(target, own), own, batch, training)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, UserError) or not target.peer:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot run at {own[0]}x{own[1]} ({reason}); give another --size") from error
    return found


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def costs_text(found: Mapping[str, Cost]) -> str:
    """A table with a column for each model."""
    lines = [["", *found]]

    def row(name: str, values: Sequence[str]) -> None:
        lines.append([name, *values])

    every = list(found.values())
    row("images x height x width", [f"{c.batch} x {c.height} x {c.width}" for c in every])
    row("learnable parameters", [f"{c.parameters:,}" for c in every])
    row("constants in an exported graph", [f"{c.exported_parameters:,}" for c in every])
    row("parameters after folding", [f"{c.folded_parameters:,}" if c.folded_parameters else "-" for c in every])
    row("GMACs", [f"{c.gmacs:.4f}" for c in every])
    for kind in KINDS:
        name = "attention products" if kind == ATTENTION else kind
        row(f"  {name}", [f"{c.macs_by_kind[kind] / 1e9:.4f}" for c in every])
    row("activations held at most, MB", [_megabytes(c.peak_bytes) for c in every])
    row("kept for backward, MB an image", [_megabytes(c.kept_bytes) for c in every])
    row("moved by all operators, MB", [_megabytes(c.bytes_moved) for c in every])
    row("weights in float32, MB", [_megabytes(c.weight_bytes["float32"]) for c in every])
    row("weights in 16 bits, MB", [_megabytes(c.weight_bytes["bfloat16"]) for c in every])
    return "\n".join(aligned(list(zip(*lines, strict=True))))


def costs_json(found: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [{"name": name, "gmacs": c.gmacs, **asdict(c)} for name, c in found.items()]


# ------------------------------------------------------------------------------------------ the table of listed models


STATED = ("parameters", "gmacs", "exported", "folded", "paper")


def table(published: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each listed variant: its cost at its input size, and what is published about it.

    published: by name, `size` in pixels, and what is stated elsewhere, which stays as it is (a figure that is known
    in part is text): `parameters`, `gmacs`, `exported`, `folded`, `paper`, `top1` and `source`.
    """
    import muntin

    rows = []
    for name in muntin.list_models():
        known = published.get(name, {})
        with torch.device("meta"):
            model = muntin.create_model(name)
        size = known.get("size", 224)
        found = cost(model, size)
        rows.append(
            {
                "name": name,
                "family": type(model.config).__module__.rpartition(".")[2],
                "parameters": found.parameters,
                "exported_parameters": found.exported_parameters,
                "folded_parameters": found.folded_parameters,
                "gmacs": round(found.gmacs, 4),
                "size": size,
                "stated": {key: known[key] for key in STATED if key in known},
                "top1": known.get("top1"),
                "source": known.get("source"),
            }
        )
    return rows


def table_text() -> str:
    """The contents of models/table.json, from the code and models/published.toml."""
    published = tomllib.loads((MODELS / "published.toml").read_text(encoding="utf-8"))
    return json.dumps(table(published), indent=1) + "\n"


def main() -> None:
    """`python -m muntin.measure.cost --write-table`."""
    parser = argparse.ArgumentParser(description="count what the listed models cost")
    parser.add_argument("--write-table", action="store_true", help="write models/table.json (otherwise print it)")
    arguments = parser.parse_args()
    text = table_text()
    if arguments.write_table:
        atomic_write(MODELS / "table.json", text.encode())
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
