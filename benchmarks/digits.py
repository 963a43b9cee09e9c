"""Every family on the handwritten digits over several seeds, beside timm's plain ViT and ConvNeXt of equal cost.

    python benchmarks/digits.py --seeds 0 1 2              # models in turns; called again it goes on
    python benchmarks/digits.py --search                   # first: learning rates, by the validation images of seed 0

Every model is trained by `muntin.tasks.train`, the families by their recipes, timm's by the settings that all of
these share. Each seed has a split of its own; the test images are read once, after training, and never in the search.
Results go to benchmarks/results/digits.json as they come, with digits.md, digits_search.md and digits.png beside it.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import muntin
from muntin.data.sources import open_splits
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.measure.cost import cost
from muntin.run import atomic_write, read_json, write_json
from muntin.tasks import train
from muntin.tasks.fitting import fit, threads
from muntin.tasks.precision import choose_precision
from muntin.tasks.ranks import Ranks
from muntin.tasks.recipes import read_recipe
from muntin.tasks.settings import Settings, settings_from
from muntin.tasks.sweep import Row, picture

RESULTS = Path(__file__).parent / "results"
FOLDER = Path("runs/digits-table")
FAMILIES = ("swin", "swinv2", "swin_free", "swin_free_br", "efficientvit", "rmt")
PEERS: dict[str, dict[str, Any]] = {
    "timm ConvNeXt": {"model": "digits_peers.convnext", "lr": 4e-3},
    "timm ViT, patch 4": {"model": "digits_peers.vit", "lr": 4e-3},
    "timm ViT, patch 8": {"model": "digits_peers.vit_p8", "lr": 4e-3},
}
NAMES = ("swin_free_digits", *FAMILIES, *PEERS)
RATES = (1e-3, 2e-3, 4e-3)
SEARCH_EPOCHS = 6
KEPT = ("test_accuracy", "val_accuracy", "seconds", "weights", "best_epoch", "precision", "machine", "versions")


def told(name: str) -> dict[str, Any]:
    """The settings of a row of the table."""
    if name == "swin_free_digits":
        return read_recipe("digits")
    if name in PEERS:
        common = {key: value for key, value in read_recipe("digits/swin").items() if not key.startswith("model")}
        return common | PEERS[name]
    return read_recipe(f"digits/{name}")


def build(settings: Settings) -> Any:
    return muntin.create_model(settings.model or "", 10, drop_path=settings.drop_path or 0.0, **settings.model_config)


def searched(name: str, lr: float, workers: int | None) -> dict[str, float]:
    """What the validation images of seed 0 say after a shorter training; no test image is at hand."""
    chosen = told(name) | {"lr": lr, "epochs": SEARCH_EPOCHS, "precision": choose_precision()[0]}
    settings = settings_from({"size": 32}, chosen, {} if workers is None else {"workers": workers})
    size = settings.size or 32
    splits = replace(open_splits("digits", 0, size), test=None)
    preprocessing: dict[str, Any] = {"size": [size, size], "resize": None, "interpolation": "bicubic"}
    preprocessing |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "channels": "RGB"}
    with tempfile.TemporaryDirectory() as folder, threads(settings.threads):
        best = fit(Path(folder), settings, build(settings), splits, preprocessing, print, Ranks()).best
    return {"lr": lr, "val_loss": best["loss"], "val_accuracy": best["accuracy"]}


def search(names: Sequence[str], workers: int | None) -> None:
    content = stored()
    for name in names:
        rows = content["search"].setdefault(name, [])
        for lr in RATES:
            if lr not in {row["lr"] for row in rows}:
                print(f"== {name}, lr {lr:g}", flush=True)
                rows.append(searched(name, lr, workers))
                write_json(RESULTS / "digits.json", content)
    lines = ["| model | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |", "| --- " + "| ---: " * len(RATES) + "|"]
    for name, rows in content["search"].items():
        found = {row["lr"]: f"{row['val_loss']:.3f} ({row['val_accuracy']:.1%})" for row in rows}
        lines.append(f"| {name} | " + " | ".join(found.get(lr, "-") for lr in RATES) + " |")
    atomic_write(RESULTS / "digits_search.md", ("\n".join(lines) + "\n").encode())


def stored() -> dict[str, Any]:
    path = RESULTS / "digits.json"
    found = read_json(path) if path.exists() else {}
    return {"models": found.get("models", {}), "search": found.get("search", {})}


def trained(name: str, seed: int, workers: int | None) -> dict[str, Any]:
    given = {} if workers is None else {"workers": workers}
    place = FOLDER / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
    metrics = train(place, resume=True, **told(name) | given, data="digits", seed=seed).metrics
    return {"seed": seed} | {key: metrics[key] for key in KEPT}


def model_entry(name: str) -> dict[str, Any]:
    """Cost and settings of a model, without rows yet."""
    settings = settings_from({"size": 32}, told(name))
    counted = cost(build(settings), settings.size or 32)
    return {"settings": told(name), "parameters": counted.parameters, "mmacs": counted.macs / 1e6, "rows": []}


def table(models: dict[str, dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for entry in models.values() for row in entry["rows"]})
    heads = ["model", "pixels", "parameters", "MMACs", "test accuracy", *(f"seed {seed}" for seed in seeds)]
    heads += ["validation", "epochs", "training"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for name, entry in models.items():
        by_seed = {row["seed"]: row for row in entry["rows"]}
        cells = [name, str(entry["settings"].get("size", 32)), f"{entry['parameters']:,}", f"{entry['mmacs']:.2f}"]
        cells.append(f"{statistics.fmean(row['test_accuracy'] for row in entry['rows']):.2%}")
        cells += [f"{by_seed[seed]['test_accuracy']:.2%}" if seed in by_seed else "-" for seed in seeds]
        cells.append(f"{statistics.fmean(row['val_accuracy'] for row in entry['rows']):.2%}")
        cells.append(str(entry["settings"]["epochs"]))
        cells.append(f"{statistics.fmean(row['seconds'] for row in entry['rows']):.0f} s")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *places(models)])


def places(models: dict[str, dict[str, Any]]) -> list[str]:
    """Where the rows were measured, a line for each place."""
    found: dict[str, list[str]] = {}
    for name, entry in models.items():
        for row in entry["rows"]:
            wide = max((flag for flag in row["machine"]["flags"] if flag.startswith("avx")), key=len)
            place = f"{row['machine']['cpu']}, {row['machine']['cores']} cores, {wide}, precision {row['precision']}"
            listed = found.setdefault(f"{place}, torch {row['versions']['torch']}", [])
            if name not in listed:
                listed.append(name)
    return [f"{place}: {', '.join(names)}.  " for place, names in found.items()]


def write(content: dict[str, Any]) -> str:
    """digits.json, digits.md and digits.png; the table."""
    write_json(RESULTS / "digits.json", content)
    models = {name: content["models"][name] for name in NAMES if content["models"].get(name, {}).get("rows")}
    text = table(models)
    atomic_write(RESULTS / "digits.md", (text + "\n").encode())
    points = [
        Row(
            name,
            gmacs=entry["mmacs"] / 1e3,
            accuracies={row["seed"]: row["test_accuracy"] for row in entry["rows"]},
        )
        for name, entry in models.items()
    ]
    picture(points, RESULTS / "digits.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--workers", type=int, help="processes that read images, instead of the recipes' one")
    parser.add_argument("--search", action="store_true", help="learning rates, by validation images")
    args = parser.parse_args()
    if args.search:
        search([name for name in args.models if name != "swin_free_digits"], args.workers)
        return
    content = stored()
    for seed in args.seeds:
        for name in args.models:
            entry = model_entry(name)
            before = content["models"].get(name, entry)
            if before["settings"] == entry["settings"]:
                entry["rows"] = before["rows"]
            content["models"][name] = entry
            if seed not in {row["seed"] for row in entry["rows"]}:
                entry["rows"].append(trained(name, seed, args.workers))
                write(content)
    print(write(content))


if __name__ == "__main__":
    main()
