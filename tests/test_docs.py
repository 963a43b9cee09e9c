"""The generated parts of the documentation are current, and its links lead somewhere."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_parts_are_current(monkeypatch, capsys):
    """As `docs/generate.py --check` finds them, with the table as it is: test_cost.py holds that against the models."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    generate = importlib.import_module("generate")
    monkeypatch.setattr(generate, "table_text", lambda: generate.TABLE.read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0, f"{capsys.readouterr().out}: run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_python_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    # the same calls on a smaller model: a Swin-T traces for a minute
    small = '"swin_free_t", dim=16, heads=(1, 2), depths=(1, 1), window=(7, 14), num_classes=10'
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace('"swin_free_t", num_classes=10', small).replace("800, 1333", "80, 133"), scope)
    assert scope["logits"].shape == (2, 10) and len(scope["maps"]) == 4 and (tmp_path / "model.onnx").exists()
