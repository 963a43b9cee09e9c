"""Write the generated parts of the documentation: `make docs`.

src/muntin/models/table.json from the models, docs/pareto.svg from that, the families' pictures, and the parts of
README.md and docs/*.md between `<!-- begin NAME -->` and `<!-- end NAME -->`. With --check nothing is written; what
is out of date is named and the exit code is 1.
"""

import argparse
import json
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pictures import pictures

from muntin.measure.cost import table_text
from muntin.measure.report import pareto
from muntin.run import atomic_write
from muntin.weights.download import index_table

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src/muntin/models/table.json"
RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _aligned(heads: list[str], rows: list[list[str]], words: Collection[str]) -> str:
    """A Markdown table; columns whose head is among `words` stand left, numbers right."""
    lines = [heads, ["---" if head in words else "---:" for head in heads], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """The README's table: no BR and DR twins."""
    heads = ["model", "parameters", "GMACs", "pixels", "published top-1"]
    shown = [
        [f"`{row['name']}`", f"{row['parameters']:,}", f"{row['gmacs']:.3f}", str(row["size"]), row["top1"] or "-"]
        for row in rows
        if not {"br", "digits"} & set(row["name"].split("_")) and "_dr" not in row["name"]
    ]
    return _aligned(heads, shown, ("model", "published top-1"))


def family(rows: list[dict[str, Any]]) -> str:
    """A family's variants: costs as counted here beside the stated ones, and published accuracy."""
    heads = ["model", "parameters", "stated", "GMACs", "stated", "pixels", "the paper's own count"]
    exported = any("exported" in row["stated"] for row in rows)
    folded = any("folded" in row["stated"] for row in rows)
    heads += ["in an exported graph"] * exported + ["BatchNorms folded", "stated"] * folded
    heads += ["published top-1", "source"]
    lines = []
    for row in rows:
        stated = row["stated"]
        gmacs = stated.get("gmacs", "-")
        digits = len(gmacs.partition(".")[2]) or 3
        cells = [f"`{row['name']}`", f"{row['parameters']:,}", _count(stated.get("parameters"))]
        cells += [f"{row['gmacs']:.{digits}f}", gmacs, str(row["size"]), stated.get("paper", "-")]
        cells += [f"{row['exported_parameters'] / 1e6:.2f}M"] * exported
        cells += [f"{row['folded_parameters']:,}", _count(stated.get("folded"))] * folded
        lines.append([*cells, row["top1"] or "-", row["source"] or "-"])
    return _aligned(heads, lines, ("model", "the paper's own count", "published top-1", "source"))


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def wanted() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    table = table_text()
    rows = json.loads(table)
    files = {TABLE: table, ROOT / "docs/pareto.svg": pareto(TABLE)}
    files |= {ROOT / f"docs/{name}.svg": picture for name, picture in pictures().items()}
    parts = {"models": summary(rows), "weights": index_table()}
    for name in {row["family"] for row in rows}:
        parts[f"models:{name}"] = family([row for row in rows if row["family"] == name])
    for path in RESULTS.rglob("*.md"):
        parts[path.relative_to(RESULTS).with_suffix("").as_posix()] = path.read_text(encoding="utf-8").strip()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall("<!-- begin (.+) -->", text):
            if name not in parts:
                sys.exit(f"{page.name} shows {name}, which benchmarks/results does not have: make bench makes it")
        for name, part in parts.items():
            begin, end = f"<!-- begin {name} -->\n", f"\n\n<!-- end {name} -->"
            if begin in text:
                before, _, rest = text.partition(begin)
                text = before + begin + "\n" + part + end + rest.partition(end.strip())[2]
        files[page] = text
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
