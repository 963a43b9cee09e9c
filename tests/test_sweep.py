"""Sweeps: every row from every seed, once; divergence is a result."""

import json
from pathlib import Path

import pytest

from muntin.cli import main
from muntin.errors import UserError
from muntin.tasks import training
from muntin.tasks.recipes import read_recipe
from muntin.tasks.settings import settings_from
from muntin.tasks.sweep import read_sweep, sweeps

SWEEP = """
model: swin_t
epochs: 1
size: 16
mixup: 0.0
cutmix: 0.0
ema_decay: 0.0
clip: 0.0
warmup: 0.0
workers: 0
precision: "32"
model.dim: 8
model.depths: [1, 1]
model.heads: [1, 2]
runs:
  small: {model.window: [2, 2]}
  broken: {model.window: [4, 2], lr: 1.0e+30}
"""


def test_a_sweep_trains_each_row_once_and_says_what_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    (tmp_path / "rows.yaml").write_text(SWEEP)
    command = ["sweep", str(tmp_path / "rows.yaml"), "--out", str(tmp_path / "out"), "--seeds", "3,4"]
    assert main(command) == 0
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    small, broken = found["rows"]
    assert set(small["accuracies"]) == {"3", "4"} and not small["diverged"]
    assert small["mean"] == pytest.approx(sum(small["accuracies"].values()) / 2)
    assert small["parameters"] > 0 and small["gmacs"] > 0 and small["latency_ms"] > 0
    assert not broken["accuracies"] and set(broken["diverged"]) == {"3", "4"}
    assert "were skipped; lower the learning rate" in broken["diverged"]["3"]
    run = json.loads((tmp_path / "out" / "small" / "seed-3" / "metrics.json").read_text())
    assert run["test_accuracy"] == small["accuracies"]["3"] and run["seed"] == 3
    assert (tmp_path / "out" / "sweep.md").read_text().strip() in first
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    trained = (tmp_path / "out" / "small" / "seed-3" / "model.safetensors").stat()
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "is finished; nothing to resume" in again and "diverged before" in again
    assert "| broken | - | 0 | 2 | - | - | - |" in again
    assert (tmp_path / "out" / "small" / "seed-3" / "model.safetensors").stat().st_mtime_ns == trained.st_mtime_ns


def test_a_wrong_row_is_refused_before_the_first_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.yaml").write_text(SWEEP.replace("lr: 1.0e+30", "lrr: 0.1"))
    assert main(["sweep", str(tmp_path / "rows.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "rows, row broken: there is no setting 'lrr' (did you mean 'lr'?)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(sweeps()))
def test_the_sweeps_that_come_along_resolve(name: str) -> None:
    plan = read_sweep(name)
    base = read_recipe(plan.recipe) if plan.recipe else {}
    for departures in plan.runs.values():
        chosen = settings_from(base, plan.settings, departures)
        training._build(training._with_defaults(chosen), num_classes=10, meta=True)
    assert len(plan.runs) >= 8


def test_the_ablations_of_swin_free_are_its_tables() -> None:
    shifts = {name: row["model.shift"] for name, row in read_sweep("swin_free_table4").runs.items()}
    assert shifts == {name: [digit == "1" for digit in name] for name in shifts}
    assert set(shifts) == {"1111", "0111", "0011", "0010", "0001", "0100", "1000", "0000"}
    windows = {name: row["model.window"] for name, row in read_sweep("swin_free_table5").runs.items()}
    assert windows == {name: [int(side) for side in name.split("-")] for name in windows}
    assert {"7-7-7-7", "7-14-14-7", "14-14-14-7"} < set(windows)


def test_the_sweep_on_digits_is_table_5_with_maps_and_windows_of_two_sevenths() -> None:
    plan, table5 = read_sweep("digits_windows"), read_sweep("swin_free_table5")
    windows = [row["model.window"] for row in plan.runs.values() if row.get("model.shift") is False]
    assert windows == [[side * 2 // 7 for side in row["model.window"]] for row in table5.runs.values()]
    chosen = training._with_defaults(settings_from(read_recipe("digits"), plan.settings))
    assert chosen.size is not None
    assert chosen.size // chosen.model_config["patch"] == 56 * 2 // 7


def test_wrong_sweeps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep 'swin_free_table6' \(did you mean 'swin_free_table5'"):
        read_sweep("swin_free_table6")
    (tmp_path / "rows.yaml").write_text("lr: 0.1\n")
    with pytest.raises(UserError, match="has no rows; write them as in runs:"):
        read_sweep(tmp_path / "rows.yaml")
    (tmp_path / "rows.yaml").write_text("runs: {../a: {lr: 0.1}}\n")
    with pytest.raises(UserError, match=r"the row '\.\./a' is no name of a folder"):
        read_sweep(tmp_path / "rows.yaml")
    assert main(["sweep", "swin_free_table5", "--seeds", "1,1"]) == 2
