"""What `import muntin`, `muntin --help` and `muntin models` cost over importing torch: bounds 1.15, 1.3 and 1.3.

    python benchmarks/startup.py

Fresh processes in turns; medians of the ratios within a round. Results go to benchmarks/results/startup.json.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from muntin.measure.machine import versions
from muntin.run import atomic_write

ROUNDS = 9
CASES = {
    "import torch": "import torch",
    "import muntin": "import muntin",
    "muntin --help": "from muntin.cli import main; main(['--help'])",
    "muntin models": "from muntin.cli import main; main(['models'])",
}
BOUNDS = {"import muntin": 1.15, "muntin --help": 1.3, "muntin models": 1.3}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    rounds = [{name: seconds(code) for name, code in CASES.items()} for _ in range(ROUNDS)]
    ratios = {name: statistics.median(r[name] / r["import torch"] for r in rounds) for name in BOUNDS}
    for name, ratio in ratios.items():
        print(f"{name:<14} {ratio:.2f}x importing torch (bound {BOUNDS[name]})")
    content = {"ratios": ratios, "bounds": BOUNDS, "rounds": rounds, "versions": versions()}
    atomic_write(Path(__file__).parent / "results/startup.json", (json.dumps(content, indent=1) + "\n").encode())
    return int(any(ratios[name] > bound for name, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
