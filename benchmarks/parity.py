"""How far each model is from the others that exist, with the same random weights: the table of docs/models.md.

    python benchmarks/parity.py                  # everything
    python benchmarks/parity.py --only efficientvit

Each reference is built with random weights, norms, running statistics and tables among them; its state dict goes
through `muntin.load_checkpoint` into Muntin's model of the same size, and both see the same images. The authors'
outputs are files (shared/golden beside this repository), of small configurations. The error is the largest
difference in standard deviations of the output. Results go to benchmarks/results/parity.{json,md}.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import BOUND, difference, peer_of_timm
from safetensors import safe_open
from torch import Tensor, nn

import muntin
from muntin.measure.bench import LogitsOnly
from muntin.measure.machine import commit, versions
from muntin.measure.peers import randomise
from muntin.run import atomic_write

RESULTS = Path(__file__).parent / "results"
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A model of ours, who else computes it, at which sizes, and what builds the other for a size."""

    model: str
    reference: str
    sizes: tuple[Size, ...]
    build: Callable[[Size], nn.Module]
    config: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The largest error over images of all sizes, in standard deviations of the output."""

    model: str
    reference: str
    sizes: list[str]
    error: float


def _timm(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    def build(size: Size) -> nn.Module:
        import timm

        return timm.create_model(name, **({"img_size": size} | options))

    return build


def _torchvision(name: str) -> Callable[[Size], nn.Module]:
    def build(size: Size) -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return build


def _transformers(kind: str, window: int, **shape: Any) -> Callable[[Size], nn.Module]:
    def build(size: Size) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(image_size=size, window_size=window, num_labels=1000, **shape)
        return LogitsOnly(getattr(transformers, f"{kind}ForImageClassification")(config))

    return build


def _square(*sides: int) -> tuple[Size, ...]:
    return tuple((side, side) for side in sides)


_T: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
_B: dict[str, Any] = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
_ANY = (*_square(224, 448, 256), (240, 304))
CASES = [
    Case("swin_t", "timm", (*_square(224, 448), (224, 448)), _timm("swin_tiny_patch4_window7_224"), {}),
    Case("swin_t", "torchvision", _ANY, _torchvision("swin_t"), {}),
    Case("swin_t", "transformers", _ANY, _transformers("Swin", 7, **_T), {}),
    Case("swin_b", "timm", _square(224), _timm("swin_base_patch4_window7_224"), {}),
    Case("swin_b", "transformers", _square(224), _transformers("Swin", 7, **_B), {}),
    Case("swin_b, window 12", "timm", _square(384), _timm("swin_base_patch4_window12_384"), {"window": 12}),
    Case("swin_free_t", "timm's blocks", _square(224), lambda size: peer_of_timm("swin_free_t"), {}),
    Case("swinv2_t", "timm", (*_square(256, 512), (512, 256)), _timm("swinv2_tiny_window8_256"), {}),
    Case("swinv2_t", "torchvision", _square(256, 320), _torchvision("swin_v2_t"), {}),
    Case("swinv2_t", "transformers", _square(256, 320), _transformers("Swinv2", 8, **_T), {}),
    Case("swinv2_t, window 16", "timm", _square(256), _timm("swinv2_tiny_window16_256"), {"window": 16}),
    Case("swinv2_b, window 16", "timm", _square(256), _timm("swinv2_base_window16_256"), {"window": 16}),
    Case("efficientvit_m0", "timm", _square(224), _timm("efficientvit_m0"), {}),
    Case("efficientvit_m5", "timm", _square(224), _timm("efficientvit_m5"), {}),
]


def _images(size: Size, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(size[0] * 1009 + size[1]))


def _checked(model: str, error: float) -> float:
    """SystemExit where the bound of the tests is broken, or the error is not a number."""
    if not error <= BOUND:
        sys.exit(f"{model} differs by {error:.1e} standard deviations, more than {BOUND:.0e}; nothing was written")
    return error


def measure(case: Case) -> Row:
    """The row of a case."""
    ours = muntin.create_model(case.model.partition(",")[0], **case.config).eval()
    worst = 0.0
    for size in case.sizes:
        other = randomise(case.build(size), (224, 224), seed=0)
        muntin.load_checkpoint(ours, getattr(other, "model", other).state_dict())
        with torch.inference_mode():
            worst = max(worst, _checked(case.model, difference(ours(_images(size)), other(_images(size)))))
    return Row(case.model, case.reference, [f"{h}x{w}" for h, w in case.sizes], worst)


def authors(path: Path) -> Row:
    """The row of a file of the authors' outputs."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        config = json.loads(file.metadata()["config"])
    config.pop("note", None)
    name, classes, norms = config.pop("model"), config.pop("num_classes", None), config.pop("out_norm", False)
    weights = {key.removeprefix("weight/"): t for key, t in tensors.items() if key.startswith("weight/")}
    ours: Any = (
        muntin.create_backbone(name, out_norm=norms, **config)
        if classes is None
        else muntin.create_model(name, classes, **config)
    )
    muntin.load_checkpoint(ours.eval(), weights)
    worst, sizes = 0.0, []
    for i in range(sum(key.startswith("input/") for key in tensors)):
        image = tensors[f"input/{i}"]
        sizes.append(f"{image.shape[2]}x{image.shape[3]}")
        with torch.inference_mode():
            found = ours(image) if classes is None else [ours(image)]
        for j, one in enumerate(found):
            worst = max(worst, _checked(path.stem, difference(one, tensors[f"output/{i}/{j}"])))
    kind = "maps" if classes is None else "logits"
    return Row(f"{name}, small ({path.stem})", f"the authors' {kind}", sizes, worst)


def markdown(rows: list[Row], made_by: str) -> str:
    lines = ["| model | reference | sizes | largest error |", "| --- | --- | --- | ---: |"]
    lines += [f"| {r.model} | {r.reference} | {', '.join(r.sizes)} | {r.error:.1e} |" for r in rows]
    return "\n".join([*lines, "", made_by]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name begins with this")
    parser.add_argument("--out", default=str(RESULTS / "parity.json"))
    args = parser.parse_args()
    files = sorted(GOLDEN.glob("*.safetensors"))
    if not files:
        sys.exit(f"no authors' outputs in {GOLDEN}: put the golden files there")
    tasks: list[tuple[str, Callable[[], Row]]] = [(path.stem, partial(authors, path)) for path in files]
    tasks += [(case.model, partial(measure, case)) for case in CASES]
    rows = []
    for name, task in sorted(tasks, key=lambda task: task[0].split("_")[0]):
        if name.startswith(args.only):
            rows.append(task())
            print(f"{rows[-1].model:<40} {rows[-1].reference:<20} {rows[-1].error:.1e}", flush=True)
    used = versions()
    libraries = ", ".join(f"{name} {used[name]}" for name in ("torch", "timm", "torchvision", "transformers"))
    made_by = f"float32, eager, in standard deviations of the output. {libraries}; `python benchmarks/parity.py`."
    content = {"rows": [asdict(row) for row in rows], "versions": used, "commit": commit()}
    out = Path(args.out)
    atomic_write(out, (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(out.with_suffix(".md"), markdown(rows, made_by).encode())


if __name__ == "__main__":
    main()
