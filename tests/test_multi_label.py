"""Several labels for an image: the loss, mean average precision, and a run from training to predictions."""

import csv
import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import average_precision_score, f1_score
from torchvision.transforms import v2

import muntin
import muntin.hub
from muntin.cli import main
from muntin.data.sources import open_part, open_splits, splits_from_json
from muntin.errors import UserError
from muntin.measure.report import report, summary
from muntin.run import Run, save_model
from muntin.tasks import evaluate, predict, train, training
from muntin.tasks.distillation import open_teacher
from muntin.tasks.inference import held_out, predictions_csv
from muntin.tasks.multi_label import MeanAveragePrecision, MultiLabelClassification, multi_label_loss
from muntin.tasks.multi_label_evaluation import average_precisions, summarise
from muntin.tasks.settings import Settings
from test_report import _read

TINY = {
    "model": "swin_t",
    "model.dim": 8,
    "model.depths": (1, 1),
    "model.heads": (1, 2),
    "model.window": (4, 4),
    "size": 16,
    "batch_size": 16,
    "epochs": 6,
    "lr": 5e-3,
    "warmup": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "augment": "none",
    "ema_decay": 0.0,
    "precision": "32",
    "workers": 0,
}
KINDS = ("", "blue", "red", "blue;red")


def colours(folder, count, name="labels.csv", labels=KINDS, shown=KINDS):
    """Noise with more or less of red and of blue: a label for each of which there is more, and a table of them."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = ["image,label"]
    for i in range(count):
        pixels = random.integers(0, 180, (16, 16, 3))
        for channel, colour in ((0, "red"), (2, "blue")):
            pixels[..., channel] += 60 * (colour in shown[i % len(shown)])
        file = f"images/{name}-{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
        lines.append(f"{file},{labels[i % len(labels)]}")
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("multi")


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        said = []
        found = train(place / "run", data=colours(place, 160), report=said.append, **TINY)
        assert said[-1].startswith(f"{place / 'run'}: test mAP ") and ", val mAP " in said[-1]
        yield found


# The loss


def by_hand(logits, targets):
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        for z, y in zip(row, wanted, strict=True):
            p = 1 / (1 + np.exp(-z))
            total -= y * np.log(p) + (1 - y) * np.log(1 - p)
    return total / logits.numel()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_binary_cross_entropy_of_each_class(smoothing):
    logits, targets = torch.randn(5, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0.3, 0.7, 0]])
    smoothed = targets * (1 - smoothing) + 0.5 * smoothing
    found = multi_label_loss(logits, targets, Settings(label_smoothing=smoothing))
    assert float(found) == pytest.approx(by_hand(logits, smoothed), abs=1e-6)


def test_a_teacher_is_followed_class_by_class():
    logits, second, taught = torch.randn(3, 4, 3)
    targets = (torch.rand(4, 3) > 0.5).float()
    settings = Settings(label_smoothing=0.0, distill_alpha=0.3, distill_tau=2.0)
    p, q = torch.sigmoid(taught / 2), torch.sigmoid(second / 2)
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = multi_label_loss((logits, second), targets, settings, taught)
    assert float(found) == pytest.approx(0.7 * by_hand(logits, targets) + 0.3 * 4 * float(divergence), abs=1e-6)
    same = multi_label_loss(taught, targets, Settings(label_smoothing=0.0, distill_alpha=1.0), taught)
    assert float(same) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("mixed", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_mixed_images_have_the_mixture_of_their_labels(mixed, monkeypatch):
    settings = Settings(augment="none", label_smoothing=0.0, ema_decay=0.0, **mixed)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    task = MultiLabelClassification(model, settings, 1, 3)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0] = 255
    targets = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    seen = {}
    monkeypatch.setattr(task, "loss", lambda outputs, mixture, taught: seen.update(outputs=outputs, mixture=mixture))
    task.training_loss((images, targets))
    dark, bright = (task.prepare(images[i : i + 1]).mean() for i in (1, 0))
    share = (seen["outputs"].mean(1) - dark.mean()) / (bright.mean() - dark.mean())  # of the bright image in each
    assert 0.01 < float(share[0]) < 0.99
    torch.testing.assert_close(seen["mixture"], share[:, None] * torch.tensor([1.0, 1, 0]), atol=1e-4, rtol=0)
    assert isinstance(task.mixes[0], (v2.MixUp, v2.CutMix))


# Metrics


def test_figures_are_scikit_learns():
    random = np.random.default_rng(0)
    labels = (random.random((60, 5)) < [0.5, 0.2, 0.1, 0.03, 0]).astype(int)
    logits = np.round(random.normal(size=(60, 5)) + labels, 1)  # with ties
    found = summarise(torch.tensor(logits), torch.tensor(labels), list("abcde"), "data", "test")
    said = logits >= 0
    per_class = [average_precision_score(labels[:, i], logits[:, i]) for i in range(4)]
    assert [row["average_precision"] for row in found.per_class] == pytest.approx([*per_class, None])
    assert found.map == pytest.approx(np.mean(per_class)) and found.score == found.map
    assert found.micro_f1 == pytest.approx(f1_score(labels, said, average="micro"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without decisions
        each = f1_score(labels, said, average=None)
    assert found.macro_f1 == pytest.approx(each[:4].mean())
    assert [row["f1"] or 0 for row in found.per_class] == pytest.approx(each)
    assert found.loss == pytest.approx(by_hand(torch.tensor(logits), torch.tensor(labels)))
    assert found.per_class[1]["images"] == labels[:, 1].sum()
    assert found.per_class[1]["recall"] == pytest.approx((labels[:, 1] * said[:, 1]).sum() / labels[:, 1].sum())
    assert found.per_class[4]["recall"] is None and "mAP" in str(found) and "confusion" not in str(found)


def test_the_mean_in_validation_leaves_out_classes_without_images():
    probabilities, labels = torch.rand(40, 3), torch.randint(2, (40, 3))
    labels[:, 1] = 0
    metric = MeanAveragePrecision(3, validate_args=False)
    for part in (slice(0, 7), slice(7, 40)):
        metric.update(probabilities[part], labels[part])
    each = [average_precision_score(labels[:, i], probabilities[:, i]) for i in (0, 2)]
    assert float(metric.compute()) == pytest.approx(np.mean(each), abs=1e-6)
    assert average_precisions(probabilities, labels)[1].isnan()


def test_images_that_fill_up_a_share_do_not_count():
    task = MultiLabelClassification(torch.nn.Flatten(), Settings(ema_decay=0.0), 1, 3)
    task.prepare = torch.nn.Identity()
    images, labels = torch.randn(6, 3, 1, 1), torch.randint(2, (6, 3)).float()
    task.validation_step((images, labels), 0)
    task.on_validation_epoch_end()
    wanted = task.results
    task.validation_step((images[:4], labels[:4]), 0)
    last = torch.cat([labels[4:], torch.full((1, 3), -1.0)])
    task.validation_step((torch.cat([images[4:], images[5:]]), last), 1)
    task.on_validation_epoch_end()
    assert task.results["raw"] == pytest.approx(wanted["raw"]) and set(wanted["raw"]) == {"map", "loss"}


# A run


def test_a_run_learns_and_says_that_it_is_multi_label(run):
    with open(run.path / "history.csv", newline="") as file:
        curve = [float(row["val_map"]) for row in csv.DictReader(file)]
    assert curve[-1] == pytest.approx(1.0) and curve[-1] > curve[0]
    assert run.metrics["test_map"] == pytest.approx(1.0) and run.metrics["val_map"] == pytest.approx(1.0)
    assert "test_accuracy" not in run.metrics and run.multi_label and run.metric == "map"
    with safe_open(run.weights, "pt") as file:
        assert json.loads(file.metadata()["muntin"])["multi_label"] is True
    assert json.loads((run.path / "split.json").read_text())["multi_label"] is True


def test_eval_has_no_confusion_but_every_class(run, capsys):
    assert main(["eval", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert "mAP 100.00%" in printed and "blue" in printed
    stored = json.loads((run.path / "evaluation.json").read_text())
    images, _, _ = held_out(run)
    rows = predict(run, [run.path.parent / str(key) for key in images.keys], threshold=0.0)
    scores = np.array([[row.probabilities[row.classes.index(name)] for name in run.classes] for row in rows])
    labels = np.array([[int(k in label) for k in range(2)] for label in images.labels])
    for k, row in enumerate(stored["per_class"]):
        found = average_precision_score(labels[:, k], scores[:, k])
        assert row["average_precision"] == pytest.approx(found)
    assert "confusion" not in stored and stored["map"] == pytest.approx(evaluate(run).map)


def test_predict_gives_every_label_from_the_threshold_on(run, place, capsys):
    files = [place / f"images/labels.csv-{i}.png" for i in range(4)]
    rows = predict(run, files)
    assert [sorted(row.classes) for row in rows] == [[], ["blue"], ["red"], ["blue", "red"]]
    assert all(p >= 0.5 for row in rows for p in row.probabilities)
    assert sum(rows[3].probabilities) > 1.5  # sigmoids of each class, no shares of one
    every = predict(run, files, threshold=0.0)
    assert all(len(row.classes) == 2 and row.probabilities[0] >= row.probabilities[1] for row in every)
    logits = run.model()(torch.stack([run.transform()(Image.open(file)) for file in files]))
    first = [row.probabilities[row.classes.index("blue")] for row in every]
    assert first == pytest.approx(logits.sigmoid()[:, 0].tolist(), abs=1e-5)
    assert [len(row.classes) for row in predict(run, files, top=1)] == [0, 1, 1, 1]
    table = list(csv.DictReader(io.StringIO(predictions_csv(rows).decode())))
    assert [row["class2"] for row in table][:3] == ["", "", ""] and table[3]["class2"] and not table[3]["error"]
    assert main(["predict", str(run.path), str(files[3]), "--threshold", "0.999999"]) == 0
    assert capsys.readouterr().out.strip() == str(files[3])


def test_an_exported_file_knows(run, place):
    exported = place / "model.onnx"
    assert main(["export", str(run.path), "--out", str(exported), "--fixed", "2x16x16"]) == 0
    files = [place / f"images/labels.csv-{i}.png" for i in range(4)]
    ours, theirs = predict(run, files, threshold=0.2), predict(exported, files, threshold=0.2)
    assert [row.classes for row in theirs] == [row.classes for row in ours]
    for a, b in zip(theirs, ours, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
    assert evaluate(exported, colours(place, 24, "other.csv")).map == pytest.approx(1.0)


def test_resuming_trains_on_with_the_same_metric(run, place):
    more = train(run.path, resume=True, force=True, epochs=7, report=lambda line: None)
    assert len((more.path / "history.csv").read_text().splitlines()) == 8 and more.metrics["test_map"] == 1.0


def test_a_multi_label_run_teaches_another(run, place, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        settings = TINY | {"epochs": 1, "teacher": str(run.path), "distillation": "soft"}
        taught = train(tmp_path / "run", data=str(place / "labels.csv"), report=lambda line: None, **settings)
    assert taught.metrics["test_map"] > 0.3


# What makes no sense


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"teacher": "RUN", "distillation": "hard"}, "distillation=hard takes the teacher's one class"),
        ({"teacher": "timm:resnet18"}, "an image has several labels; give the folder of a run"),
        ({"token_labels": "labels", "model": "rmt_t", "model.token_label": True, "size": 32, "augment": "photographs"},
         "token_labels are for one class an image"),
    ],
)  # fmt: skip
def test_training_refuses_what_takes_one_class_an_image(run, place, tmp_path, settings, words):
    base = {} if "token_labels" in settings else TINY
    settings = base | {name: str(run.path) if value == "RUN" else value for name, value in settings.items()}
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", data=str(place / "labels.csv"), report=lambda line: None, **settings)
    assert not (tmp_path / "run").exists()


def test_validation_images_without_any_label_are_refused(tmp_path):
    table = tmp_path / "labels.csv"
    colours(tmp_path, 40)
    rows = table.read_text().splitlines()
    lines = ["image,label,split", *(f"{row},train" for row in rows[1:31]), *(
        f"{row.partition(',')[0]},,val" for row in rows[31:])]  # fmt: skip
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match="none of the 10 val images has a label"):
        train(tmp_path / "run", data=str(table), report=lambda line: None, **TINY)


def test_data_of_the_other_kind_are_refused(run, place, tmp_path):
    single = colours(tmp_path, 12, "single.csv", ("blue", "red"), ("blue", "red"))
    with pytest.raises(UserError, match="single.csv gives each image one class, and .* by itself"):
        evaluate(run, single)
    with open(single) as file:
        text = file.read().replace("blue\n", "blue;\n")
    (tmp_path / "single.csv").write_text(text)
    assert evaluate(run, single).map == pytest.approx(1.0)  # a semicolon says that there could be more
    torch.manual_seed(0)
    one = tmp_path / "one"
    network = muntin.create_model("swin_t", 2, False, 0.0, **{k[6:]: v for k, v in TINY.items() if k[:6] == "model."})
    save_model(one / "model.safetensors", network, classes=run.classes, preprocessing=run.preprocessing)
    with pytest.raises(UserError, match="labels.csv gives an image several labels or none, and .* one class an image"):
        evaluate(Run.open(one), str(place / "labels.csv"))
    with pytest.raises(UserError, match="gives each image one class, so it has no threshold"):
        predict(Run.open(one), [place / "images"], threshold=0.5)
    with pytest.raises(UserError, match="threshold=1.5: give a probability"):
        predict(run, [place / "images"], threshold=1.5)
    with pytest.raises(UserError, match="learned one class an image and the data give several"):
        open_teacher(str(one), run.classes, run.preprocessing, multi_label=True)
    with pytest.raises(UserError, match="learned several and the data give one class an image"):
        open_teacher(str(run.path), run.classes, run.preprocessing)


def test_labels_of_another_kind_than_when_the_run_began_are_refused(run, place, tmp_path):
    data = colours(tmp_path, 40)
    splits = open_splits(data, 0, 16)
    assert splits_from_json(data, splits.json(), True).multi_label
    text = (tmp_path / "labels.csv").read_text().replace("blue;red", "blue").replace(",\n", ",red\n")
    (tmp_path / "labels.csv").write_text(text)
    assert not open_part(data)[0].multi_label
    with pytest.raises(UserError, match="gives an image one class, several labels when the run began"):
        splits_from_json(data, splits.json(), True)


def test_the_report_shows_labels(run, place):
    page, checker = _read(report(run))  # well-formed
    assert {"training", "confusion", "samples", "mistakes", "calibration"} <= checker.ids
    assert "mean average precision" in page and "Validation mAP" in page and "blue" in page
    assert "test mAP" in summary(run)


def test_a_folder_for_the_hub_knows(run, tmp_path):
    folder = muntin.hub.save_pretrained(run, tmp_path / "shared")
    assert muntin.hub.fetch(folder).multi_label
    assert "mean average precision on the test split | 1 |" in (folder / "README.md").read_text()
