"""Killed, cut short, full, told otherwise: what a training run keeps, and how it goes on.

What is killed here is a process, at any moment: between two steps, within one, while a file is written, between the
write and the rename. Not covered is a power cut, which a test cannot make: against it every file is flushed to the disk
before its rename (fsync), and so is the folder after it.
"""

import csv
import json
import os
import random
import re
import secrets
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file

from forks import forks
from muntin.cli import main
from muntin.errors import UserError
from muntin.tasks import train, training
from muntin.tasks.base import Task
from muntin.tasks.callbacks import Progress
from muntin.tasks.checkpoints import AtomicCheckpoints, Damaged, latest, read_checkpoint, saves, verify
from muntin.tasks.classification import Classification
from muntin.tasks.memory import fitting_parts, too_little
from muntin.tasks.optimizer import rate
from muntin.tasks.recipes import read_config
from muntin.tasks.settings import Settings, settings_from

TINY = {
    "model": "swin_free_t",
    "model.dim": 8,
    "model.depths": (1, 1),
    "model.heads": (1, 2),
    "model.window": (4, 4),
    "model.patch": 4,
    "size": 16,
    "batch_size": 8,
    "epochs": 3,
    "warmup": 1,
    "mixup": 0.8,
    "drop_path": 0.2,
    "ema_decay": 0.9,
    "precision": "32",
    "augment": "none",
    "workers": 0,
    "save_minutes": 1e-9,  # before every step but an epoch's first
}
STEPS = 5  # per epoch: 42 training images


def silent(_line):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of 20 images, of another brightness each."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for label in range(3):
        (folder / f"class{label}").mkdir()
        for i in range(20):
            pixels = noise.integers(60 * label, 60 * label + 128, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with forks(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def without_bench(monkeypatch):
    """The latency measurement at the end of a training says nothing here."""
    monkeypatch.setattr(training, "measure_latency", lambda run: None)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        return train(tmp_path_factory.mktemp("reference") / "run", data=data, report=silent, **TINY)


class Crash(Exception):
    pass


def crash():
    raise Crash


def crash_at(monkeypatch, number):
    """An exception in the step of this number, until `undo`."""
    step = Task.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == number:
            raise Crash
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)


@pytest.fixture(scope="module")
def crashed_once(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(Crash):
            train(folder, data=data, report=silent, keep=3, **TINY)
    return folder


@pytest.fixture
def crashed(crashed_once, tmp_path):
    """The reference's run, which ended in step 7: the third of the second epoch. Three saves are kept."""
    return shutil.copytree(crashed_once, tmp_path / "run")


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same_result(folder, whole):
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert history(folder) == history(whole)
    found, wanted = (json.loads((path / "metrics.json").read_text()) for path in (folder, whole))
    for name in ("test_accuracy", "val_accuracy", "best_epoch", "weights", "skipped_steps"):
        assert found[name] == wanted[name], name
    assert not list(folder.rglob(".*"))


def sets(settings):
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return [f"--set={name}={value}" for name, value in values.items()]


# Killed

WATCHED = """
import os, signal
from pathlib import Path
from muntin.tasks import training
from muntin.tasks.base import Task
from muntin.tasks.callbacks import Progress

Progress.EVERY = 2  # steps between two points of TensorBoard's curves
training.measure_latency = lambda run: None
step_of_task, replace, done = Task.training_step, os.replace, [""]

def training_step(self, batch, batch_idx):
    done[0] = f" after step {self.trainer.global_step + 1}"
    event(f"step {self.trainer.global_step + 1}")
    return step_of_task(self, batch, batch_idx)

def told(partial, path):
    when = done[0] if Path(path).suffix in (".ckpt", ".csv") else ""
    event(f"writing {Path(path).name}{when}")
    if f"{Path(path).name}{when}" == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)

Task.training_step, os.replace = training_step, told
"""


def command(data, folder):
    return ["train", "--data", str(data), "--out", str(folder), "--resume", "--deterministic", *sets(TINY)]


@pytest.fixture(scope="module")
def whole(server, data, tmp_path_factory):
    """A run that nothing happened to, in a process of its own: its folder and its events."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = server.run(command(data, folder), "KILL = None\n" + WATCHED)
    assert done.returncode == 0, done.stderr
    assert len(done.events) == len(set(done.events)) > 3 * STEPS
    return folder, done.events


def test_killed_at_ten_random_moments_ends_to_the_bit(server, data, whole, tmp_path):
    """Moments over the whole life of the run, in the order of their events, each up to 30 ms after its event."""
    reference, events = whole
    seed = int(os.environ.get("MUNTIN_TEST_SEED") or secrets.randbits(32))
    print(f"MUNTIN_TEST_SEED={seed}")
    draw = random.Random(seed)
    kills = 0
    for first in sorted(draw.randrange(len(events)) for _ in range(10)):
        moment = events[first:], draw.uniform(0, 0.03)
        done = server.run(command(data, tmp_path / "run"), "KILL = None\n" + WATCHED, moment)
        print(f"{done.returncode} {moment[1]:.3f} s after {done.events[-1] if done.events else 'nothing'}")
        if done.returncode == 0:  # it was through before the signal came
            same_result(tmp_path / "run", reference)
            shutil.rmtree(tmp_path / "run")
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills += 1
    assert kills
    done = server.run(command(data, tmp_path / "run"), "KILL = None\n" + WATCHED)
    assert done.returncode == 0, done.stderr
    same_result(tmp_path / "run", reference)
    assert curves(tmp_path / "run") == curves(reference)


def test_killed_between_the_write_and_the_rename_of_a_save(server, data, whole, tmp_path):
    folder = tmp_path / "run"
    for name, goes_on in (
        ("config.yaml", None),
        ("best.ckpt after step 5", 4),
        ("last.ckpt after step 7", 6),
        ("model.safetensors", 15),
    ):
        assert f"writing {name}" in whole[1]
        done = server.run(command(data, folder), f"KILL = {name!r}\n" + WATCHED)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list(folder.rglob(".*.tmp*"))) == 1  # what was written and had no name yet
        found = latest(folder, pytest.fail)
        assert (found[1]["global_step"] if found else None) == goes_on
    done = server.run(command(data, folder), "KILL = None\n" + WATCHED)
    assert done.returncode == 0, done.stderr
    same_result(folder, whole[0])


def curves(folder):
    """What TensorBoard shows: tag -> (step, value) of every point, without times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "epoch/seconds"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


SIGNALLED = """
import os, signal
from muntin.tasks.base import Task
step_of_task = Task.training_step
def training_step(self, batch, batch_idx):
    if self.trainer.global_step == 7:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step_of_task(self, batch, batch_idx)
Task.training_step = training_step
os.environ.update(SLURM_NTASKS="1", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
"""


def test_pre_emption_by_slurm_saves_and_exits_138(server, data, tmp_path):
    """Nothing is requeued or saved elsewhere, as Lightning would."""
    done = server.run(command(data, tmp_path / "run"), SIGNALLED + f"os.chdir({str(tmp_path)!r})")
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert f"stopped by SIGUSR1; continue with: muntin train --out {tmp_path / 'run'} --resume" in done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert not list(tmp_path.rglob("hpc_ckpt*"))


FULL = """
import resource
from muntin.tasks.callbacks import Saver
save = Saver.on_train_epoch_end
def on_train_epoch_end(self, trainer, module):
    save(self, trainer, module)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))  # from the second epoch on
Saver.on_train_epoch_end = on_train_epoch_end
"""


@pytest.mark.parametrize("limit, what", [(20_000, r"run/checkpoints/\w+\.ckpt"), (300, "run")])
def test_nothing_half_written_stays_when_the_disk_is_full(server, data, tmp_path, limit, what):
    """A real failure: the process may not write files as large as a checkpoint, or as the curves."""
    folder = tmp_path / "run"
    done = server.run(command(data, folder), f"LIMIT = {limit}\n" + FULL)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^muntin: cannot write .*/{what}: File too large; free some space", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == STEPS
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["epoch"] == 0
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.rglob(".*"))


# Damaged


def test_the_last_saves_are_kept(crashed):
    assert [path.name for path in saves(crashed)] == ["last.ckpt", "step-00000006.ckpt", "step-00000005.ckpt"]
    assert [read_checkpoint(path)["global_step"] for path in saves(crashed)] == [7, 6, 5]


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path):
    """One bit of a weight."""
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename]
        weights = archive.read(max(records, key=lambda record: record.file_size))
    contents = bytearray(path.read_bytes())
    contents[contents.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(crashed, reference, damage):
    damage(crashed / "checkpoints" / "last.ckpt")
    lines = []
    train(crashed, resume=True, report=lines.append)
    assert re.search(r"checkpoints/last\.ckpt is damaged \(.+\)$", lines[0])
    assert lines[1] == "going on from the one before, step-00000006.ckpt, after step 6"
    assert any("resuming after step 6 (epoch 2, batch 1)" in line for line in lines)
    same_result(crashed, reference.path)
    assert (crashed / "checkpoints" / "damaged-last.ckpt").exists()


def test_only_where_no_checkpoint_can_be_read_resuming_fails(crashed):
    for path in saves(crashed):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints .*last\.ckpt, step-00000006.*put back copies"):
        train(crashed, resume=True, report=silent)
    assert len(saves(crashed)) == 3  # where they were


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.999])
def test_checkpoints_cut_short_anywhere_are_damaged(crashed, size):
    path = crashed / "checkpoints" / "last.ckpt"
    whole = path.stat().st_size
    os.truncate(path, int(size * whole) if isinstance(size, float) else size)
    with pytest.raises(Damaged, match=r"last\.ckpt is damaged"):
        verify(path, "")


def test_a_save_that_reads_back_differently_takes_no_name(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"state_dict": {"a": torch.zeros(1000)}}, path)
    before = path.read_bytes()
    flush = os.fsync

    def damaging(file):
        flush(file)
        with open(f"/proc/self/fd/{file}", "r+b") as other:
            other.seek(2000)
            other.write(b"\xff")

    monkeypatch.setattr(os, "fsync", damaging)
    with pytest.raises(Damaged, match="reads back differently; check the disk"):
        AtomicCheckpoints().save_checkpoint({"state_dict": {"a": torch.ones(1000)}}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_best_weights_that_are_damaged_are_chosen_again(crashed):
    cut(crashed / "checkpoints" / "best.ckpt")
    lines = []
    run = train(crashed, resume=True, report=lines.append)
    assert any(re.search(r"best\.ckpt is damaged .*: the best is chosen among the epochs from 2 on", x) for x in lines)
    assert run.metrics["best_epoch"] in (2, 3)


def test_best_weights_that_are_damaged_come_from_the_checkpoint_of_their_epoch(crashed, reference):
    assert reference.metrics["best_epoch"] == 3
    train(crashed, resume=True, report=silent)
    wanted = (crashed / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "metrics.json"):
        (crashed / name).unlink()
    cut(crashed / "checkpoints" / "best.ckpt")
    lines = []
    train(crashed, resume=True, report=lines.append)
    assert any("restored from the checkpoint, which is of the same epoch" in line for line in lines)
    assert (crashed / "model.safetensors").read_bytes() == wanted


# Told otherwise


def test_the_whole_difference_is_shown_and_refused(crashed):
    told = TINY | {"lr": 0.01, "epochs": 4, "workers": 1, "keep": 1}
    with pytest.raises(UserError) as error:
        train(crashed, resume=True, report=silent, **told)
    message = str(error.value)
    assert "lr: 0.001 then, 0.01 now" in message and "epochs: 3 then, 4 now" in message
    assert "leave them out to resume, or go on with the new ones from here with --force" in message
    assert "workers" not in message and "keep" not in message


def test_the_command_takes_force(crashed, capsys):
    assert main(["train", "--out", str(crashed), "--resume", "--force", "--set", "batch_size=4"]) == 2
    said = capsys.readouterr().err
    assert "not even --force can change batch_size (checkpoints count steps" in said


@pytest.mark.parametrize(
    "told, why",
    [
        ({"size": 32}, "size (the recorded preprocessing is for that size)"),
        ({"model.window": (2, 2)}, "model.window (the saved weights are those of that model)"),
        ({"data": "digits"}, "data (the recorded split is of other images)"),
        ({"ema_decay": 0}, "ema_decay (checkpoints hold an average of the weights or none)"),
    ],
)
def test_what_cannot_be_changed_is_refused_with_force_too(crashed, told, why):
    config = (crashed / "config.yaml").read_text()
    with pytest.raises(UserError) as error:
        train(crashed, resume=True, force=True, report=silent, **told)
    assert why in str(error.value)
    assert f"--set weights={crashed / 'checkpoints' / 'best.ckpt'}" in str(error.value)
    assert (crashed / "config.yaml").read_text() == config


def test_groups_of_parameters_that_do_not_fit_are_refused(crashed):
    config = (crashed / "config.yaml").read_text()
    for told in ({"freeze": 1}, {"layer_decay": 0.5}, {"weight_decay": 0.0}):
        with pytest.raises(UserError, match=r"sort the parameters into \d+ groups, not the 2 .* not even --force"):
            train(crashed, resume=True, force=True, report=silent, **told)
    assert (crashed / "config.yaml").read_text() == config


def test_forced_settings_hold_from_the_checkpoint_on(crashed, monkeypatch):
    seen = {}
    start = Task.on_train_batch_start

    def on_train_batch_start(self, batch, batch_idx):
        groups = self.trainer.optimizers[0].param_groups
        seen[self.trainer.global_step] = [(group["lr"], group["weight_decay"]) for group in groups]
        moments = self.trainer.optimizers[0].state[self.model.head.fc.weight]
        assert moments["step"] == self.trainer.global_step
        start(self, batch, batch_idx)

    monkeypatch.setattr(Task, "on_train_batch_start", on_train_batch_start)
    lines = []
    train(crashed, resume=True, force=True, report=lines.append, lr=0.01, weight_decay=0.2, epochs=4, accumulate=2)
    assert "lr: 0.001 until step 7, 0.01 from there on" in lines
    settings = settings_from(read_config(str(crashed / "config.yaml")))
    assert (settings.lr, settings.epochs, settings.accumulate) == (0.01, 4, 2)
    assert sorted(seen) == list(range(7, 4 * STEPS))
    for step, groups in seen.items():
        assert groups == [(pytest.approx(0.01 * rate(step, settings, STEPS)), decay) for decay in (0.2, 0.0)]
    assert len(history(crashed)) == 4


def test_forced_settings_are_remembered_before_the_first_save(crashed, reference, monkeypatch):
    """config.yaml has the new ones at once, the checkpoint those that it was made with."""
    monkeypatch.setattr(Task, "on_train_start", lambda self: crash())
    with pytest.raises(Crash):
        train(crashed, resume=True, force=True, report=silent, lr=0.01)
    monkeypatch.undo()
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    lines = []
    train(crashed, resume=True, report=lines.append)
    assert "lr: 0.001 until step 7, 0.01 from there on" in lines
    assert history(crashed)[:1] == history(reference.path)[:1] and history(crashed) != history(reference.path)


def test_results_are_said_of_the_weights_that_are_there(reference, tmp_path):
    """Where epochs do not come again to the bit, best.ckpt may be of another one than the last checkpoint says."""
    folder = shutil.copytree(reference.path, tmp_path / "run")
    best = folder / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(best)
    checkpoint["kept"] |= {"epoch": 2, "accuracy": 0.25}
    checkpoint["epoch"] = 1
    AtomicCheckpoints().save_checkpoint(checkpoint, best)
    (folder / "metrics.json").unlink()
    run = train(folder, resume=True, report=silent)
    assert (run.metrics["best_epoch"], run.metrics["val_accuracy"]) == (2, 0.25)


def test_a_wrong_setting_leaves_the_run_as_it_was(crashed, reference):
    config = (crashed / "config.yaml").read_text()
    for told in ({"augment": "photographs", "randaugment": "zzz"}, {"freeze": 9}):
        with pytest.raises(
            UserError, match=r"randaugment='zzz' is no policy that timm knows|freeze=9: the model has 2"
        ):
            train(crashed, resume=True, force=True, report=silent, **told)
    assert (crashed / "config.yaml").read_text() == config


def test_a_checkpoint_of_an_earlier_version_is_refused(crashed):
    for path in saves(crashed):
        checkpoint = read_checkpoint(path)
        del checkpoint["settings"]
        AtomicCheckpoints().save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match=r"last.ckpt is of an earlier version of Muntin; .* --set weights="):
        train(crashed, resume=True, report=silent)


def test_another_model_is_refused_by_its_name(crashed):
    with pytest.raises(UserError) as error:
        train(crashed, resume=True, force=True, report=silent, model="efficientvit_m0")
    message = str(error.value)
    assert "model: swin_free_t then, efficientvit_m0 now" in message and "model.dim" not in message


def test_a_run_that_patience_stopped_goes_on_with_more(reference, tmp_path):
    """Three epochs are done, whatever number the settings have."""
    folder = shutil.copytree(reference.path, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 3\n", "epochs: 12\n"))
    lines = []
    train(folder, resume=True, force=True, report=lines.append, lr=0.01, epochs=3)
    assert "nothing to resume (epochs, lr: only more epochs go on with a finished run)" in lines[-1]
    run = train(folder, resume=True, force=True, report=silent, epochs=4)
    assert len(history(folder)) == 4 and run.metrics["epochs"] == 4


def test_a_finished_run_is_lengthened_with_force(reference, tmp_path):
    folder = shutil.copytree(reference.path, tmp_path / "run")
    with pytest.raises(UserError, match="epochs: 3 then, 4 now"):
        train(folder, resume=True, report=silent, epochs=4)
    run = train(folder, resume=True, force=True, report=silent, epochs=4)
    assert len(history(folder)) == 4 and run.metrics["epochs"] == 4
    assert history(folder)[:3] == history(reference.path)


def test_another_size_starts_from_the_weights_with_resized_tables(data, reference, tmp_path):
    lines = []
    start = {"weights": reference.weights, "size": 32, "model.window": (8, 8), "epochs": 1, "lr": 1e-12, "ema_decay": 0}
    run = train(tmp_path / "run", data=data, report=lines.append, **TINY | start)
    assert any("2 bias tables resized from other windows" in line for line in lines)
    found, given = load_file(run.weights), load_file(reference.weights)
    tables = [name for name in found if name.endswith("bias_table")]
    assert [len(found[name]) for name in tables] == [15 * 15] * 2 and [len(given[name]) for name in tables] == [49] * 2
    for name in given.keys() - set(tables):
        torch.testing.assert_close(found[name], given[name])


# Steps that are skipped


def losses(monkeypatch, change):
    """`change(step, loss)` is the loss of a step."""
    loss_of = Classification.training_loss
    monkeypatch.setattr(
        Classification, "training_loss", lambda self, batch: change(self.trainer.global_step, loss_of(self, batch))
    )


def without_update_of(monkeypatch, number):
    """The step is taken, and all that it changed put back: weights, moments and statistics."""
    step = Task.optimizer_step

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.trainer.global_step != number:
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)
        held = [*self.model.state_dict().values()]
        held += [value for state in optimizer.state.values() for value in state.values()]
        before = [value.clone() for value in held]
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for value, old in zip(held, before, strict=True):
                value.copy_(old)
        self.update_average(number)

    monkeypatch.setattr(Task, "optimizer_step", optimizer_step)


@pytest.mark.parametrize("factor, norm", [(float("nan"), "batch"), (1e4, "layer")])
def test_a_step_whose_loss_is_bad_changes_nothing_to_the_bit(data, tmp_path, monkeypatch, capsys, factor, norm):
    told = TINY | {"model.norm": norm, "epochs": 2, "spike": 10.0}
    losses(monkeypatch, lambda step, loss: loss * factor if step == 6 else loss)
    run = train(tmp_path / "bad", data=data, report=silent, **told)
    assert run.metrics["skipped_steps"] == 1
    assert "1 steps skipped" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    without_update_of(monkeypatch, 6)
    train(tmp_path / "good", data=data, report=silent, **told)
    found, wanted = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("bad", "good"))
    counts = {"loss_sum", "loss_count", "typical", "skipped", "in_a_row"}
    assert found["state_dict"].keys() == wanted["state_dict"].keys() > counts
    for name in found["state_dict"].keys() - counts:
        assert torch.equal(found["state_dict"][name], wanted["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, wanted)]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def test_a_batch_with_nan_leaves_no_nan_in_statistics(data, tmp_path, monkeypatch):
    loss_of = Classification.training_loss

    def training_loss(self, batch):
        images, targets = batch
        return loss_of(self, (images * torch.nan if self.trainer.global_step == 3 else images, targets))

    monkeypatch.setattr(Classification, "training_loss", training_loss)
    run = train(tmp_path / "run", data=data, report=silent, **TINY | {"model.norm": "batch", "epochs": 1})
    assert run.metrics["skipped_steps"] == 1
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_many_skipped_steps_in_a_row_end_the_training(data, tmp_path, monkeypatch):
    losses(monkeypatch, lambda step, loss: loss * torch.nan if step > 6 else loss)
    with pytest.raises(UserError, match=r"2 training steps in a row had a loss or a gradient that is not finite"):
        train(tmp_path / "run", data=data, report=silent, **TINY | {"max_skips": 2})
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 8
    losses(monkeypatch, lambda step, loss: loss * torch.nan if step in (1, 3, 4) else loss)
    with pytest.raises(UserError, match=r"3 of the 5 training steps of an epoch had a loss"):
        train(tmp_path / "other", data=data, report=silent, **TINY)


def test_float16_survives_an_overflow_and_resumes_with_its_scale(data, tmp_path, monkeypatch):
    told = TINY | {"precision": "16"}
    scales = {}
    start = Task.on_train_batch_start

    def on_train_batch_start(self, batch, batch_idx):
        scales[self.trainer.global_step] = self.trainer.precision_plugin.scaler.get_scale()
        start(self, batch, batch_idx)

    def overflow(step, loss):
        """Of the gradient alone; in most steps of the first epoch, as while a scale is looked for: no divergence."""
        steep = loss * 1e35
        return loss + steep - steep.detach() if step in (0, 1, 2, 6) else loss

    monkeypatch.setattr(Task, "on_train_batch_start", on_train_batch_start)
    losses(monkeypatch, overflow)
    run = train(tmp_path / "whole", data=data, report=silent, **told, spike=0)
    assert scales[7] == scales[6] / 2 and scales[14] > 0
    assert run.metrics["skipped_steps"] == 4
    whole = dict(scales)
    crash_at(monkeypatch, 9)
    with pytest.raises(Crash):
        train(tmp_path / "run", data=data, report=silent, **told, spike=0)
    monkeypatch.undo()
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    scales.clear()
    monkeypatch.setattr(Task, "on_train_batch_start", on_train_batch_start)
    train(tmp_path / "run", resume=True, report=silent)
    assert scales == {step: scale for step, scale in whole.items() if step >= 9}
    same_result(tmp_path / "run", tmp_path / "whole")


# Memory


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_what_would_fit(data, tmp_path, monkeypatch, raised):
    def training_step(self, batch, batch_idx):
        raise raised

    monkeypatch.setattr(Task, "training_step", training_step)
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", data=data, report=silent, **TINY)
    message = str(error.value)
    assert "too little memory for batch_size=8 at size=16 in 1 part" in message
    assert "parts, of 4 images each: --set accumulate=2" in message and "--set grad_checkpointing=true" in message
    assert "--set batch_size=4" in message


def test_parts_of_a_step_by_hand():
    settings = Settings(batch_size=64)
    # 2 of 10 stand; 64 images took 16 more: 16 of them, 4, fit into 0.9 * 10 - 2 = 7, and 32, 8, do not
    assert fitting_parts(settings, fixed=2, need=18, total=10) == 4
    assert fitting_parts(settings, fixed=2, need=11, total=10) == 2
    assert fitting_parts(settings, fixed=20, need=40, total=10) == 128  # more than images
    assert fitting_parts(settings, fixed=2, need=0, total=0) == 2


def test_parts_of_a_step_over_processes():
    settings = Settings(batch_size=64)
    # each of 4 processes had 16 images: 4 of them fit, as above
    assert fitting_parts(settings, fixed=2, need=18, total=10, processes=4) == 4
    message = too_little(torch.nn.Linear(1, 1), settings, "", False, processes=4)
    assert "batch_size=64 at size=None in 1 part over 4 processes; " in message
    assert "parts, of 8 images each: --set accumulate=2" in message and message.endswith("--set batch_size=32")
    odd = too_little(torch.nn.Linear(1, 1), Settings(batch_size=36), "", True, processes=4)
    assert "of 4 images each: in another run --set accumulate=2 --set batch_size=32" in odd
    assert "not even single images" in too_little(torch.nn.Linear(1, 1), Settings(batch_size=4), "", False, processes=4)
    parted = too_little(torch.nn.Linear(1, 1), Settings(batch_size=64, accumulate=2), "", False, processes=4)
    assert "of 4 images each: --set accumulate=4" in parted and parted.endswith("--set batch_size=32")


def test_the_curve_of_the_loss_is_of_whole_steps(data, tmp_path, monkeypatch):
    losses, points = [], []
    taken = Task.training_step

    def training_step(self, batch, batch_idx):
        loss = taken(self, batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    def log_metrics(self, metrics, step):
        points.extend([(step, metrics["step/loss"])] if "step/loss" in metrics else [])

    monkeypatch.setattr(Task, "training_step", training_step)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
    monkeypatch.setattr(Progress, "EVERY", 1)
    train(tmp_path / "run", data=data, report=silent, **TINY | {"accumulate": 2, "epochs": 1})
    numbers, values = zip(*points, strict=True)
    halves = [sum(losses[i : i + 2]) / 2 for i in range(0, len(losses), 2)]
    assert list(numbers) == list(range(1, len(losses) // 2 + 1)) and len(numbers) > 1
    assert list(values) == pytest.approx(halves)
