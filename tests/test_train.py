"""Training: resumed to the bit, selected without the test split, saved whole or not at all."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import muntin
from forks import forks
from muntin.data.datasets import Images
from muntin.errors import UserError
from muntin.tasks import evaluate, train, training
from muntin.tasks.base import Task
from muntin.tasks.callbacks import Saver, least, preferred
from muntin.tasks.checkpoints import AtomicCheckpoints, read_checkpoint
from muntin.tasks.classification import Classification
from muntin.tasks.fitting import Interrupted
from muntin.tasks.inference import calibration_error
from muntin.tasks.precision import choose_precision
from muntin.tasks.recipes import read_config, recipes
from muntin.tasks.settings import Settings, settings_from
from muntin.weights.download import Checkpoint

TINY = {
    "model.dim": 8,
    "model.depths": (1, 1),
    "model.heads": (1, 2),
    "model.window": (4, 4),
    "model.patch": 4,
    "size": 16,
    "batch_size": 64,
    "epochs": 3,
    "mixup": 0.8,
    "drop_path": 0.2,
    "ema_decay": 0.9,
    "precision": "32",
}
STEPS = 19  # per epoch: 1259 training images


def silent(_line):
    pass


@pytest.fixture(scope="module", autouse=True)
def without_bench():
    """The latency measurement at the end of a training says nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "run", report=silent, **TINY)


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same_result(folder, whole):
    found, wanted = load_file(folder / "model.safetensors"), load_file(whole.weights)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert history(folder) == history(whole.path)
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("test_accuracy", "val_accuracy", "best_epoch", "weights"):
        assert metrics[name] == whole.metrics[name]


KILLED = """
import os, signal
from muntin.tasks import training
from muntin.tasks.base import Task

training.measure_latency = lambda run: None
step_of_task = Task.training_step

def training_step(self, batch, batch_idx):
    if self.trainer.global_step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return step_of_task(self, batch, batch_idx)

Task.training_step = training_step
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with forks(tmp_path_factory.mktemp("server")) as server:
        yield server


def killed(server, folder, step, number, **settings):
    """A training process that gets a signal in the middle of a step."""
    arguments = ["train", "--out", str(folder)]
    for name, value in (TINY | settings).items():
        arguments += ["--set", f"{name}={list(value) if isinstance(value, tuple) else value}"]
    return server.run(arguments, KILLED.format(step=step, signal=signal.Signals(number).name))


def test_killed_in_an_epoch_resumes_to_the_bit(server, tmp_path, uninterrupted):
    done = killed(server, tmp_path / "run", STEPS + 7, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model.safetensors").exists()
    (tmp_path / "run" / "checkpoints" / ".last.0a.tmp.ckpt").write_bytes(b"half")
    lines = []
    train(tmp_path / "run", resume=True, report=lines.append)
    assert any(f"resuming after step {STEPS} (epoch 2, batch 0)" in line for line in lines)
    same_result(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run").rglob(".*"))


def test_killed_after_a_save_within_an_epoch_resumes_there_with_other_workers(server, tmp_path, uninterrupted):
    done = killed(server, tmp_path / "run", STEPS + 7, signal.SIGKILL, save_minutes=1e-9)
    assert done.returncode == -signal.SIGKILL
    lines = []
    train(tmp_path / "run", resume=True, report=lines.append, workers=2, save_minutes=10)
    assert any(f"resuming after step {STEPS + 7} (epoch 2, batch 7)" in line for line in lines)
    same_result(tmp_path / "run", uninterrupted)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(server, tmp_path, uninterrupted):
    done = killed(server, tmp_path / "run", 7, signal.SIGINT)
    assert done.returncode == 130
    assert f"continue with: muntin train --out {tmp_path / 'run'} --resume" in done.stderr
    assert "Traceback" not in done.stderr
    lines = []
    train(tmp_path / "run", resume=True, report=lines.append)
    assert any("resuming after step 8 (epoch 1, batch 8)" in line for line in lines)
    same_result(tmp_path / "run", uninterrupted)


def test_sigterm_on_the_last_step_of_an_epoch(tmp_path, uninterrupted, monkeypatch):
    step = Task.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Task, "training_step", training_step)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
        train(tmp_path / "run", report=silent, **TINY)
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    train(tmp_path / "run", resume=True, report=silent)
    same_result(tmp_path / "run", uninterrupted)


def test_a_finished_run_has_nothing_to_resume(uninterrupted):
    before = uninterrupted.weights.stat().st_mtime_ns
    lines = []
    train(uninterrupted.path, resume=True, report=lines.append)
    assert "is finished" in lines[-1]
    assert uninterrupted.weights.stat().st_mtime_ns == before


def test_resuming_what_is_not_there_starts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    run = train("runs/new", resume=True, report=lines.append, **TINY | {"epochs": 1})
    assert "no run at runs/new yet" in lines[0] and run.metrics["epochs"] == 1


def test_resuming_with_another_setting_is_refused(uninterrupted):
    with pytest.raises(UserError, match=r"differ from those in .*config\.yaml \(epochs: 3 then, 9 now\)"):
        train(uninterrupted.path, resume=True, report=silent, epochs=9)


def test_a_run_is_not_overwritten(uninterrupted):
    with pytest.raises(UserError, match=r"holds a run already; continue it with --resume, or .* --out"):
        train(uninterrupted.path, report=silent, **TINY)


def test_the_configuration_of_a_run_repeats_it(tmp_path, uninterrupted):
    run = train(tmp_path / "run", config=uninterrupted.path / "config.yaml", report=silent)
    assert run.weights.read_bytes() == uninterrupted.weights.read_bytes()


def test_another_seed_gives_another_run(tmp_path, uninterrupted):
    other = train(tmp_path / "run", report=silent, **TINY | {"seed": 1, "epochs": 1})
    split = json.loads((other.path / "split.json").read_text())
    assert split["test"] != json.loads((uninterrupted.path / "split.json").read_text())["test"]


def test_the_test_split_touches_neither_training_nor_selection(tmp_path, uninterrupted, monkeypatch):
    """With black images and wrong labels in the test split, and none of them to be opened before the end."""
    clean = training.open_splits

    def poisoned(*arguments):
        splits = clean(*arguments)

        def open_poisoned(position):
            assert (tmp_path / "run" / "model.safetensors").exists(), "a test image was read in training"
            return Image.new("RGB", (8, 8))

        labels = [(label + 1) % 10 for label in splits.test.labels]
        return replace(splits, test=Images(splits.test.keys, labels, splits.test.classes, open_poisoned))

    monkeypatch.setattr(training, "open_splits", poisoned)
    run = train(tmp_path / "run", report=silent, **TINY)
    assert run.metrics["test_accuracy"] != uninterrupted.metrics["test_accuracy"]
    assert run.weights.read_bytes() == uninterrupted.weights.read_bytes()
    assert history(run.path) == history(uninterrupted.path)


def test_the_stored_splits_are_disjoint_and_are_what_was_evaluated(uninterrupted):
    split = json.loads((uninterrupted.path / "split.json").read_text())
    parts = [set(split[name]) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    found = evaluate(uninterrupted.path)
    assert (found.split, found.images) == ("test", len(split["test"]))
    assert found.top1 == uninterrupted.metrics["test_accuracy"]
    assert found.json() == json.loads((uninterrupted.path / "evaluation.json").read_text())


def test_what_is_saved_is_what_was_best_in_validation(uninterrupted):
    metrics = uninterrupted.metrics
    assert evaluate(uninterrupted.path, split="val").top1 == pytest.approx(metrics["val_accuracy"], abs=1e-6)
    best = history(uninterrupted.path)[metrics["best_epoch"] - 1]
    assert float(best["val_accuracy"]) == pytest.approx(metrics["val_accuracy"], abs=1e-5)
    state = read_checkpoint(uninterrupted.path / "checkpoints" / "best.ckpt")["state_dict"]
    prefix = {"raw": "model.", "ema": "average."}[metrics["weights"]]
    for name, value in load_file(uninterrupted.weights).items():
        assert torch.equal(value, state[prefix + name])


def test_training_learns(uninterrupted):
    rows = history(uninterrupted.path)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert uninterrupted.metrics["val_accuracy"] > 0.15


def test_a_run_says_what_it_was(uninterrupted):
    metrics = uninterrupted.metrics
    assert metrics["model"] == "swin_free_digits"
    assert metrics["parameters"] == sum(p.numel() for p in uninterrupted.model().parameters())
    assert metrics["epochs"] == 3 and metrics["seed"] == 0 and metrics["precision"] == "32"
    assert metrics["versions"]["torch"] and metrics["machine"]["cores"]
    config = read_config(uninterrupted.path / "config.yaml")
    assert settings_from(config).flat() == config
    assert config["model.dim"] == 8 and config["size"] == 16
    assert list((uninterrupted.path / "tensorboard").glob("events.out.tfevents*"))
    names = {path.parent.name: path for path in (uninterrupted.path / "held_out").glob("*/*.png")}
    assert sorted(names) == [str(digit) for digit in range(10)]


class Exploding:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_checkpoints_that_hold_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Exploding()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is refused: .* code, which is not run"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"last\.ckpt is (damaged|refused)"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_losses_that_are_not_finite_stop_before_anything_is_saved(tmp_path):
    with pytest.raises(UserError, match=r"18 of the 19 training steps .* were skipped; lower the learning rate .*lr="):
        train(tmp_path / "run", report=silent, **TINY | {"lr": 1e30, "clip": 0, "epochs": 3, "warmup": 0})
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_patience_ends_a_training_that_stopped_improving(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "rate", lambda self, step: 0.0)  # nothing is learnt
    run = train(tmp_path / "run", report=silent, **TINY | {"epochs": 9, "patience": 2, "ema_decay": 0})
    assert len(history(run.path)) == 3  # the first, and two that were no better
    assert run.metrics["best_epoch"] == 3  # of equals the latest
    assert run.metrics["weights"] == "raw"


# Pieces


def small_task(norm="layer", **settings):
    model = muntin.create_model("swin_t", num_classes=3, dim=8, depths=(1,), heads=(1,), window=4, norm=norm)
    return Classification(model, Settings(**{"mixup": 0.0, "cutmix": 0.0} | settings), 10, 3)


def test_no_decay_on_one_dimensional_parameters_and_bias_tables():
    task = small_task(weight_decay=0.1)
    optimizer = task.configure_optimizers()["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.model.named_parameters():
        expected = 0.0 if parameter.ndim == 1 or "bias_table" in name else 0.1
        assert decay.pop(id(parameter)) == expected, name
    assert not decay


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    task = small_task(epochs=10, warmup=2.0)
    rates = [task.rate(step) for step in range(101)]
    assert rates[:20] == sorted(rates[:20]) and rates[0] < 0.1
    assert max(rates) == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[100] == pytest.approx(0.01)
    assert rates[60] == pytest.approx(0.505)  # half of the way down


def test_an_average_follows_the_weights():
    task = small_task(ema_decay=0.5)
    for step, value in ((100, 1.0), (101, 3.0)):
        with torch.no_grad():
            task.model.head.fc.bias.fill_(value)
        task.update_average(step)
    torch.testing.assert_close(task.average.head.fc.bias, torch.full((3,), 0.5 * 0.5 + 0.5 * 3.0))


def test_the_average_of_a_short_training_forgets_its_beginning():
    settings = Settings(ema_decay=0.999)
    decays = [settings.average_decay(step) for step in (0, 40, 8990, 10**6)]
    assert decays == pytest.approx([0.1, 0.82, 0.999, 0.999])
    assert (
        torch.tensor([settings.average_decay(step) for step in range(48)]).prod() < 1e-6
    )  # what is left of the random start
    assert Settings(ema_decay=0.999, ema_warmup=False).average_decay(0) == 0.999


def test_an_average_follows_the_statistics_of_batch_norm():
    task = small_task(norm="batch", ema_decay=0.5)
    task.model(torch.randn(2, 3, 16, 16) + 5)
    task.update_average(100)
    ours, theirs = task.average.state_dict(), task.model.state_dict()
    means = [name for name in ours if name.endswith("running_mean")]
    for name in means:
        torch.testing.assert_close(ours[name], theirs[name] / 2)  # from 0
    assert means and ours["head.norm.num_batches_tracked"] == 1


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_draws_from_the_seed_of_the_step(settings):
    torch.manual_seed(0)
    task = small_task(**settings).eval()
    batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.training_loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_calibration_error_by_hand():
    # two images at confidence 0.9, one right: gap 0.4; two at 0.6, both right: gap 0.4
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert calibration_error(probabilities, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.4)
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_patience_counts_from_the_first_epoch_of_the_best_accuracy(tmp_path):
    saver = Saver(tmp_path, patience=2, save_minutes=1, val_images=10)
    saver.top = {"epoch": 1, "accuracy": 0.9}
    saver.history = [{"epoch": 2}]
    assert not saver.exhausted()
    saver.history = [{"epoch": 3}]
    assert saver.exhausted()


def test_the_latest_epoch_that_is_not_significantly_worse_is_kept(tmp_path, monkeypatch):
    """Of 100 validation images: 90, 97, 96, 90 and 80 right."""
    task = small_task(ema_decay=0)
    task.loss_count += 1
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    trainer = SimpleNamespace(
        current_epoch=0,
        global_step=0,
        world_size=1,
        is_global_zero=True,
        optimizers=[optimizer],
        logger=None,
        saved=[],
    )
    trainer.save_checkpoint = lambda path, weights_only=False: trainer.saved.append((path.name, trainer.current_epoch))
    saver = Saver(tmp_path, patience=0, save_minutes=1, val_images=100)
    saver._epoch_started = 0.0
    for epoch, accuracy in enumerate([0.90, 0.97, 0.96, 0.90, 0.80]):
        trainer.current_epoch = epoch
        task.results = {"raw": {"accuracy": accuracy, "loss": 1.0}}
        saver.on_train_epoch_end(trainer, task)
    assert [epoch for name, epoch in trainer.saved if name == "best.ckpt"] == [0, 1, 2]
    assert saver.best["epoch"] == 3 and saver.best["accuracy"] == 0.96
    assert saver.top == {"epoch": 2, "accuracy": 0.97}


@pytest.mark.parametrize("raw, ema, name", [(0.97, 0.97, "ema"), (0.97, 0.96, "ema"), (0.97, 0.9, "raw")])
def test_averaged_weights_are_preferred_unless_significantly_worse(raw, ema, name):
    assert preferred({"raw": {"accuracy": raw}, "ema": {"accuracy": ema}}, images=100) == name
    assert preferred({"raw": {"accuracy": raw}}, images=100) == "raw"


def test_two_standard_errors_by_hand():
    # 8 wrong of 98, counted as 9 of 100: sqrt(0.09 * 0.91 / 98)
    assert least(90 / 98, 98) == pytest.approx(90 / 98 - 2 * 0.028909, abs=1e-6)
    assert least(1.0, 98) < 1.0


def test_precision_is_decided_from_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert choose_precision()[0] == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert choose_precision()[0] == "32"


def test_bf16_trains(tmp_path):
    run = train(tmp_path / "run", report=silent, **TINY | {"precision": "bf16", "epochs": 1})
    assert run.metrics["precision"] == "bf16"
    assert all(value.dtype == torch.float32 for value in load_file(run.weights).values())


def test_training_starts_from_given_weights(tmp_path, uninterrupted):
    settings = TINY | {"weights": str(uninterrupted.weights), "epochs": 1, "lr": 1e-12, "ema_decay": 0}
    run = train(tmp_path / "run", report=silent, **settings)
    wanted = load_file(uninterrupted.weights)
    for name, value in load_file(run.weights).items():
        torch.testing.assert_close(value, wanted[name])


def test_training_starts_from_a_published_tag_with_its_configuration(tmp_path, uninterrupted, monkeypatch):
    """The fields come with the tag: they are there before the weights are fetched, and stand in the run's settings."""
    config = {"dim": 8, "depths": (1, 1), "heads": (1, 2), "window": (4, 4), "patch": 4}
    address = uninterrupted.weights.as_uri()
    tag = Checkpoint("swin_free_digits", "a-tag", address, "us", "Apache-2.0", 10, 16, config=config)
    monkeypatch.setattr("muntin.weights.download.published", lambda: (tag,))
    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path / "cache"))
    given = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    start = {"weights": "a-tag", "epochs": 1, "lr": 1e-12, "ema_decay": 0}
    run = train(tmp_path / "run", report=silent, **given | start)
    wanted = load_file(uninterrupted.weights)
    for name, value in load_file(run.weights).items():
        torch.testing.assert_close(value, wanted[name])
    assert tuple(read_config(str(run.path / "config.yaml"))["model.window"]) == (4, 4)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_hold_only_departures_from_the_defaults(name):
    values = read_config(recipes()[name])
    settings = settings_from(values).flat()
    defaults = Settings().flat()
    assert all(settings[key] != defaults.get(key) for key in values)
    header = Path(recipes()[name]).read_text().splitlines()
    assert any(line.startswith("#   muntin train") for line in header)
