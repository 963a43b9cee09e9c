"""The main job over several seeds: test accuracy and training time on the handwritten digits.

    python benchmarks/digits.py --seeds 0 1 2

Each seed has a split of its own; the test images are read once, after training. Results go to
benchmarks/results/digits.json and, as a Markdown table, to digits.md beside it.
"""

import argparse
import json
import tempfile
from pathlib import Path

from muntin.run import atomic_write
from muntin.tasks import train

RESULTS = Path(__file__).parent / "results"
KEEP = ("seed", "test_accuracy", "val_accuracy", "seconds", "parameters", "precision", "weights", "best_epoch")


def markdown(rows: list[dict[str, object]], machine: dict[str, object]) -> str:
    lines = ["| seed | test accuracy | validation accuracy | training |", "| ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {row['test_accuracy']:.2%} | {row['val_accuracy']:.2%} | {row['seconds']:.0f} s |"
        )
    where = f"{machine['cpu']}, {machine['cores']} cores"
    lines += ["", f"swin_free_digits, {rows[0]['parameters']:,} parameters, {rows[0]['precision']}; {where}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    rows, metrics = [], {}
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(Path(folder) / "run", data="digits", seed=seed).metrics
        rows.append({key: metrics[key] for key in KEEP})
    content = {"rows": rows, "machine": metrics["machine"], "versions": metrics["versions"]}
    atomic_write(RESULTS / "digits.json", (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(RESULTS / "digits.md", markdown(rows, metrics["machine"]).encode())
    print(markdown(rows, metrics["machine"]))


if __name__ == "__main__":
    main()
