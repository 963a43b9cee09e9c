"""Write the generated parts of the documentation: `make docs`.

src/muntin/models/table.json from the models, docs/pareto.svg from that, and the parts of README.md and docs/*.md
between `<!-- begin NAME -->` and `<!-- end NAME -->`. With --check nothing is written; what is out of date is named
and the exit code is 1.
"""

import argparse
import json
import sys
from pathlib import Path

from muntin.measure.cost import table_text
from muntin.measure.report import pareto
from muntin.run import atomic_write

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src/muntin/models/table.json"
RESULTS = {name: ROOT / f"benchmarks/results/{name}.md" for name in ("peers", "digits")}
PAGES = ("README.md", "docs/speed.md", "docs/models.md")


def models(table: str) -> str:
    """The table of models: parameters, and those plus the bias matrices that an exported graph holds."""
    lines = [
        "| model | parameters | in an exported graph | GMACs | pixels | published top-1 | source |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in json.loads(table):
        exported = f"{row['exported_parameters'] / 1e6:.2f}M"
        cells = [f"`{row['name']}`", f"{row['parameters']:,}", exported, f"{row['gmacs']:.3f}", str(row["size"])]
        lines.append("| " + " | ".join([*cells, row["top1"] or "-", row["source"] or "-"]) + " |")
    return "\n".join(lines)


def wanted() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    for path in RESULTS.values():
        if not path.exists():
            sys.exit(f"{path.relative_to(ROOT)} is missing: make it first with: make bench")
    table = table_text()
    files = {TABLE: table, ROOT / "docs/pareto.svg": pareto(TABLE)}
    parts = {"models": models(table)}
    parts |= {name: path.read_text(encoding="utf-8").strip() for name, path in RESULTS.items()}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, part in parts.items():
            begin, end = f"<!-- begin {name} -->\n", f"\n\n<!-- end {name} -->"
            if begin in text:
                before, _, rest = text.partition(begin)
                text = before + begin + "\n" + part + end + rest.partition(end.strip())[2]
        files[ROOT / page] = text
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [
        (path, text) for path, text in wanted().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            atomic_write(path, text.encode())
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
