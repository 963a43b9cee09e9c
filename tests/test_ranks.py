"""Training in several processes: the same as in one, whoever dies."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from safetensors.torch import load_file

from forks import Forks, forks
from muntin.cli import main
from muntin.data.datasets import load_digits, select
from muntin.data.loading import EvaluationSet, shared_batch
from muntin.errors import UserError
from muntin.tasks import launch, train, training
from muntin.tasks.asked import ask, processes
from muntin.tasks.callbacks import Saver, Stopped

SETTINGS: dict[str, Any] = {
    "model.dim": [8],
    "model.depths": [1, 1],
    "model.heads": [1, 2],
    "model.window": [4, 4],
    "size": 16,
    "batch_size": 96,
    "epochs": 2,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "augment": "distort",
    "ema_decay": 0.9,
    "precision": "32",
    "workers": 0,
    "threads": 1,
    "model": "swin_t",
}
SETTINGS["model.dim"] = 8
BEFORE = """
import os, signal
from muntin.tasks import training
from muntin.tasks.base import Task
training.measure_latency = lambda run: None
step_of_task = Task.training_step

def training_step(self, batch, batch_idx):
    if (self.trainer.global_step, os.environ["RANK"]) == ({step}, "1"):
        os.kill(os.getpid(), {number})
    return step_of_task(self, batch, batch_idx)

Task.training_step = training_step
"""
COMMAND = "import sys; from muntin.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("server")) as server:
        yield server


def command(folder: Path, **settings: Any) -> list[str]:
    arguments = ["train", "--out", str(folder)]
    for name, value in (SETTINGS | settings).items():
        arguments += ["--set", f"{name}={value}"]
    return arguments


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        return train(tmp_path_factory.mktemp("alone") / "run", report=lambda _: None, **SETTINGS)


def losses(folder: Path) -> list[tuple[float, float]]:
    lines = (folder / "history.csv").read_text().splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    return [(float(row["train_loss"]), float(row["val_loss"])) for row in rows]


def same(folder: Path, wanted: Any) -> None:
    """To rounding: sums of gradients are added in another order."""
    assert losses(folder) == [pytest.approx(row, rel=1e-4) for row in losses(wanted.path)]
    found, weights = load_file(folder / "model.safetensors"), load_file(wanted.weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] == pytest.approx(wanted.metrics["test_accuracy"], abs=0.01)


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"strategy": "fsdp"}], ids=["ddp", "fsdp"])
def test_two_processes_do_what_one_does(tmp_path: Path, alone: Any, server: Forks, settings: dict[str, Any]) -> None:
    """The same losses and weights with the same images in each step; 179 validation images are shared out unevenly."""
    ended = server.together(command(tmp_path / "run", **settings), 2, BEFORE.format(step=-1, number=0))
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    same(tmp_path / "run", alone)


def test_a_process_that_dies_ends_the_job_with_its_name_and_the_run_goes_on(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"import torch; torch.set_num_threads(1)\n{BEFORE.format(step=16, number=int(signal.SIGKILL))}\n{COMMAND}"
    monkeypatch.setattr(launch, "PROGRAM", program)
    assert launch.launch(command(tmp_path / "run"), 2) == 1  # it does not hang
    assert "rank 1 (process" in (error := capfd.readouterr().err) and "was killed by SIGKILL" in error
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    train(tmp_path / "run", resume=True, report=lambda _: None, devices=1)  # with one process
    same(tmp_path / "run", alone)


@pytest.mark.parametrize("code", [2, 143])
def test_the_launcher_gives_the_code_of_its_processes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    monkeypatch.setattr(launch, "PROGRAM", f"import sys; sys.exit({code})")
    assert launch.launch(["train"], 2) == code
    assert ("failed with code 2; its message is above" in capfd.readouterr().err) == (code == 2)


def test_a_signal_to_one_process_stops_all_after_saving(tmp_path: Path, server: Forks) -> None:
    before = BEFORE.format(step=3, number=int(signal.SIGTERM))
    ended = server.together(command(tmp_path / "run"), 2, before)
    assert [process.returncode for process in ended] == [128 + signal.SIGTERM] * 2
    assert ["continue with: muntin train --out" in process.stderr for process in ended] == [True, False]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 10


@pytest.mark.parametrize(("count", "processes"), [(7, 2), (8, 2), (3, 4)])
def test_every_image_is_validated_once(count: int, processes: int) -> None:
    images = select(load_digits(), range(count))
    shares = [EvaluationSet(images, lambda _: torch.zeros(1), (rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    targets = [share[i][1] for share in shares for i in range(len(share))]  # type: ignore[index]
    assert sorted(t for t in targets if t >= 0) == sorted(images.labels)
    assert len(targets) == -(-count // processes) * processes


def test_a_sweep_in_as_many_processes_as_its_file_says(
    tmp_path: Path, server: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"epochs": 1, "devices": 2}
    (tmp_path / "rows.yaml").write_text(json.dumps(settings | {"runs": {"one": {}}}))
    sweep = ["sweep", str(tmp_path / "rows.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(launch, "launch", lambda _arguments, devices, nodes, _meeting: 100 * nodes + devices)
    assert main(sweep) == 102
    ended = server.together(sweep, 2, BEFORE.format(step=-1, number=0))
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    (row,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert list(row["accuracies"]) == ["0"] and row["latency_ms"] > 0
    assert ended[0].stdout.count("| one |") == ended[0].stdout.count("[1/1]") == 1 and "one" not in ended[1].stdout


def test_where_machines_meet_has_to_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "nodes=8", "--set", "devices=8"]) == 2
    assert "nodes=8: say where they meet, as in --set rendezvous=FIRST-MACHINE:29500" in capsys.readouterr().err


def test_more_or_fewer_processes_than_the_settings_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"devices=4 on nodes=1 are 4 processes, and 1 is running; .* by devices=1"):
        train(tmp_path / "run", devices=4)
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_shared_out_evenly_is_refused(tmp_path: Path) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--set", "batch_size=64", "--set", "accumulate=3"]) == 2
    assert not (tmp_path / "run").exists()
    wanted = r"batch_size=64 cannot be shared out evenly over 8 processes in 3 parts each; give 48 or 72"
    with pytest.raises(UserError, match=wanted):
        shared_batch(100, 64, 3, 8)
    assert shared_batch(42, 64, 4, 1) == 40  # all of a small set, as nearly as may be


def test_processes_are_those_told_or_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("devices: 2\n")
    assert processes(ask(tmp_path, None, recipe, {}), resume=False) == (2, 1, "")
    (tmp_path / "config.yaml").write_text("devices: 8\nnodes: 4\nrendezvous: first:29500\n")
    assert processes(ask(tmp_path, None, None, {}), resume=True) == (8, 4, "first:29500")
    assert processes(ask(tmp_path, None, None, {"devices": 4, "nodes": 1}), resume=True) == (4, 1, "first:29500")
    assert processes(ask(tmp_path, None, None, {}), resume=False) == (1, 1, "")
    for gpus in (0, 1, 8):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert processes(ask(None, "in1k/swin_t", None, {}), resume=False) == (max(gpus, 1), 1, "")


def test_a_scheduler_may_repeat_its_signal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saver = Saver(tmp_path, 0, 1.0, 10)
    saver._on_signal(signal.SIGTERM, None)
    saver._on_signal(signal.SIGTERM, None)
    assert saver.signal == signal.SIGTERM
    with pytest.raises(Stopped):
        saver._on_signal(signal.SIGINT, None)


def test_lightning_has_the_question_that_is_left_out() -> None:
    """`fitting` replaces it on the instance: under another name it would be asked again before every batch."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
