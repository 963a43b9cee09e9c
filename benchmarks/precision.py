"""What PyTorch itself is off by in float16 and bfloat16: the ground for the bounds of exports (docs/export.md).

    python benchmarks/precision.py

Each model as initialised and with random norms and biases, folded, converted whole, against float32. Results:
benchmarks/results/precision.json.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch

import muntin
from muntin.measure.machine import commit, machine, versions
from muntin.measure.peers import randomise
from muntin.models import published
from muntin.run import atomic_write
from muntin.runtime import fold
from muntin.runtime.verify import random_images

MODELS = "swin_t swin_s swinv2_t swin_free_t_br efficientvit_m0 efficientvit_m5 rmt_t rmt_s".split()
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
RESULT = Path(__file__).parent / "results" / "precision.json"


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        side = published(name)["size"]
        for weights in ("initial", "random"):
            torch.manual_seed(0)
            model: torch.nn.Module = muntin.create_model(name)
            model = fold(randomise(model, (224, 224), seed=0) if weights == "random" else model)
            errors = {precision: 0.0 for precision in DTYPES}
            for size in ((side, side), (97, 200), (28, 15)):
                images = random_images(2, size)
                with torch.inference_mode():
                    wanted = model(images)
                    for precision, dtype in DTYPES.items():
                        found = copy.deepcopy(model).to(dtype)(images.to(dtype)).float()
                        error = ((found - wanted).abs().max() / wanted.std(unbiased=False)).item()
                        errors[precision] = max(errors[precision], error)
            rows.append({"model": name, "weights": weights, **errors})
            print(f"| {name} | {weights} | {errors['float16']:.1e} | {errors['bfloat16']:.1e} |", flush=True)
    here = machine(torch.device("cpu"))
    atomic_write(
        RESULT,
        (
            json.dumps({"rows": rows, "machine": here, "versions": versions(), "commit": commit()}, indent=2) + "\n"
        ).encode(),
    )


if __name__ == "__main__":
    main()
