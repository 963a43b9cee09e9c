"""Training of detectors and segmenters on files: whole runs, resumed to the bit, in two processes, refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import muntin
from forks import Forks, forks
from muntin.cli import main
from muntin.data.annotated import open_annotated
from muntin.data.scenes import write_scenes
from muntin.errors import UserError
from muntin.heads.dense import pixel_loss
from muntin.run import Run
from muntin.tasks import dense_training, evaluate, train
from muntin.tasks.dense import Dense
from muntin.tasks.fitting import Interrupted
from muntin.tasks.segmentation import class_weights

SETTINGS = {
    "model": "swin_free_t",
    "model.dim": 8,
    "model.depths": [1, 1, 1, 1],
    "model.heads": [1, 2, 2, 2],
    "model.window": [4, 4, 4, 4],
    "size": 64,
    "longer": 64,
    "batch_size": 4,
    "epochs": 2,
    "steps": 0,
    "schedule": "cosine",
    "drops": [],
    "workers": 0,
    "threads": 1,
    "precision": "32",
    "weights": "",
}
SMALL = {"head.channels": 16, "head.fc": 16, "head.mask_channels": 8, "head.mask_convs": 1, "head.samples": 16}
HEAD = {
    "detect": {"head": "retinanet", "head.channels": 16},
    "instance": {"head": "mask_rcnn", **SMALL},
    "segment": {"head": "semantic_fpn", "head.channels": 16, "head.width": 16},
}
RESULTS = {"detect": {"box_ap"}, "instance": {"box_ap", "mask_ap"}, "segment": {"miou", "macc", "aacc"}}


def silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def without_bench() -> Iterator[None]:
    """The latency measurement at the end of a training says nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_training, "measure_latency", lambda run: None)
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 12, "val": 5, "test": 3}, seed=1)
    return folder


def told(scenes: Path, task: str, **more: Any) -> dict[str, Any]:
    return {"task": task, "data": str(scenes), **SETTINGS, **HEAD[task], **more}


@pytest.fixture(scope="module", params=["detect", "instance", "segment"])
def run(request: pytest.FixtureRequest, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp(request.param) / "run", report=silent, **told(scenes, request.param))


def test_a_run_holds_what_it_was_trained_for(run: Run, scenes: Path) -> None:
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics.keys() >= RESULTS[run.task] and all(0 <= metrics[name] <= 1 for name in RESULTS[run.task])
    assert (metrics["split"], metrics["head"], metrics["task"]) == ("test", run.head, run.task)
    classes = [str(digit) for digit in range(10)]
    assert run.classes == (["background", *classes] if run.task == "segment" else classes)
    assert run.preprocessing["fit"] == {"shorter": 64, "longer": 64}
    opened = Run.open(run.weights)
    model = opened.model()
    assert opened.task == model.task and model.head_name == run.head and not model.training
    names = [line.split(",") for line in (run.path / "history.csv").read_text().splitlines()]
    assert len(list((run.path / "pictures").glob("*.png"))) == len(list((run.path / "held_out").glob("*.png"))) == 3
    assert len(names) == 3 and ("val_loss" in names[0]) == (run.task == "segment")
    assert f"val_{run.metric}" in names[0]


def test_evaluation_of_a_run_gives_the_recorded_result(run: Run) -> None:
    found = evaluate(run)
    assert found.score == pytest.approx(run.metrics[run.metric], abs=1e-6)


def test_training_learns(scenes: Path, tmp_path: Path) -> None:
    for task in ("instance", "segment"):
        folder = tmp_path / task
        train(folder, report=silent, **told(scenes, task, epochs=6, lr=1e-2, warmup_steps=2, ema_decay=0.0))
        rows = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
        losses = [float(row[rows[0].index("train_loss")]) for row in rows[1:]]
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("task", ["instance", "segment"])
def test_a_stopped_run_goes_on_to_the_bit(
    scenes: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = told(scenes, task, drop_path=0.2, flip=0.5, smallest=48 if task != "segment" else None)
    whole = train(tmp_path / "whole", report=silent, **settings)
    step_of_task = Dense.training_step

    def stopping(self: Dense, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 4:
            self.trainer.callbacks[0].signal = 15  # type: ignore[attr-defined]
        return step_of_task(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Dense, "training_step", stopping)
        with pytest.raises(Interrupted):
            train(tmp_path / "stopped", report=silent, **settings)
    resumed = train(tmp_path / "stopped", resume=True, report=silent)
    found, wanted = load_file(resumed.weights), load_file(whole.weights)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert resumed.metrics[resumed.metric] == whole.metrics[whole.metric]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("server")) as server:
        yield server


BEFORE = "from muntin.tasks import dense_training\ndense_training.measure_latency = lambda run: None\n"


def command(folder: Path, settings: dict[str, Any]) -> list[str]:
    arguments = ["train", "--out", str(folder)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    return arguments


def test_two_processes_do_what_one_does(scenes: Path, tmp_path: Path, server: Forks) -> None:
    """RetinaNet's losses are means over images and draw nothing, and it has no BatchNorm."""
    settings = told(scenes, "detect", drop_path=0.0)
    alone = train(tmp_path / "alone", report=silent, **settings)
    ended = server.together(command(tmp_path / "run", settings), 2, BEFORE)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    found, wanted = load_file(tmp_path / "run" / "model.safetensors"), load_file(alone.weights)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_detectors_train_in_two_processes(scenes: Path, tmp_path: Path, server: Forks) -> None:
    """Each draws anchors and proposals of its own, so that the losses are not those of one process."""
    ended = server.together(command(tmp_path / "run", told(scenes, "instance", epochs=1)), 2, BEFORE)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert 0 <= Run.open(tmp_path / "run").metrics["box_ap"] <= 1


def test_bad_input_is_refused_before_anything_is_written(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(expected: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=expected):
            train(tmp_path / "run", report=silent, **settings)
        assert not (tmp_path / "run").exists()

    refused("head=upernet is for task=segment, not detect", **told(scenes, "detect", head="upernet"))
    refused("no head 'mask_rcn'.*mask_rcnn", **told(scenes, "instance", head="mask_rcn"))
    refused("has no field 'widht'", **told(scenes, "segment", **{"head.widht": 3}))
    refused("freeze=9", **told(scenes, "segment", freeze=9))
    refused("compile=True", **told(scenes, "segment", compile=True))
    with pytest.raises(UserError, match="give --task|detection and segmentation"):
        train(tmp_path / "run", data="scenes", report=silent)
    assert main(["train", "--task", "detekt"]) == 2
    assert "task='detekt' is unknown (did you mean 'detect'" in capsys.readouterr().err


def test_changed_annotations_are_refused_on_resume(run: Run, scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    write_scenes(data, {"train": 12, "val": 5, "test": 3}, seed=2)
    settings = told(data, run.task, epochs=3)
    with pytest.raises(UserError, match="is not what the run's split.json says"):
        train(run.path, resume=True, force=True, report=silent, **settings)


def test_training_by_steps_counts_epochs_itself(scenes: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", report=silent, **told(scenes, "segment", steps=4, epochs=99))
    assert run.metrics["epochs"] == 2  # of three steps each


def test_backbone_weights_of_a_classifier_are_taken(scenes: Path, tmp_path: Path) -> None:
    config = {key.removeprefix("model."): value for key, value in SETTINGS.items() if key.startswith("model.")}
    classifier = muntin.create_model("swin_free_t", 10, **config)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    said: list[str] = []
    settings = told(scenes, "segment", epochs=1, lr=1e-12, weight_decay=0.0, ema_decay=0.0)
    run = train(tmp_path / "run", report=said.append, **(settings | {"weights": str(tmp_path / "classifier.pth")}))
    found, wanted = run.model().backbone.state_dict(), classifier.backbone.state_dict()
    for name in wanted:
        if name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5, msg=name)
    assert any("weights from" in line for line in said)


def test_frozen_norms_stay(scenes: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in told(scenes, "segment", epochs=1).items() if "model." not in name}
    settings |= {
        "model": "rmt_t",
        "model.dims": [8, 8, 8, 8],
        "model.depths": [1, 1, 1, 1],
        "model.heads": [1, 1, 1, 1],
    }
    run = train(tmp_path / "run", report=silent, freeze_norms=True, ema_decay=0.0, **settings)
    norms = [m for m in run.model().backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((norm.running_mean == 0).all() and (norm.weight == 1).all() for norm in norms)


def test_rare_classes_count_more(scenes: Path) -> None:
    part = open_annotated(str(scenes), "segment").train
    labels = torch.stack([part.target(i)["labels"].as_subclass(torch.Tensor).long() for i in range(len(part))])
    shares = torch.bincount(labels.flatten(), minlength=11).double() / labels.numel()
    found = class_weights(part, 0.5).double()
    present = shares > 0
    assert float((found * shares).sum()) == pytest.approx(1)
    ratio = (found[present] / found[0]).pow(2) * shares[present] / shares[0]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0)
    logits = torch.randn(2, 11, 4, 4)
    labels = torch.randint(0, 11, (2, 4, 4))
    labels[0, 0] = 255
    wanted = torch.nn.functional.cross_entropy(logits, labels, found.float(), ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels, found.float()), wanted)
    assert float(pixel_loss(logits, torch.full_like(labels, 255), found.float())) == 0
