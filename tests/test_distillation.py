"""A teacher: its loss against the formulas written out, what it is shown, and which teachers are refused."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file

import muntin
from muntin.errors import UserError
from muntin.run import Run, save_model
from muntin.tasks import train, training
from muntin.tasks.checkpoints import read_checkpoint
from muntin.tasks.classification import Classification
from muntin.tasks.distillation import Teacher, distillation_loss, open_teacher
from muntin.tasks.settings import Settings

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
PREPROCESSING = {"size": [16, 16], "resize": None, "mean": MEAN, "std": STD}
PREPROCESSING |= {"interpolation": "bicubic", "channels": "RGB"}
TINY = {"dim": 8, "depths": (1, 1), "heads": (1, 2), "window": (4, 4), "patch": 4}
TINY_VIT = {"dims": (16, 24, 32), "depths": (1, 1, 1), "heads": (2, 3, 2), "windows": (3, 2, 2), "key_dim": 4}
RUN = {"size": 16, "batch_size": 600, "epochs": 1, "precision": "32", "workers": 0, "warmup": 0.0}
DIGITS = [str(digit) for digit in range(10)]


def silent(_line):
    pass


def tiny(num_classes=10, seed=0, **config):
    torch.manual_seed(seed)
    return muntin.create_model("swin_t", num_classes, **TINY | config)


@pytest.fixture
def teacher_file(tmp_path):
    """Saves a tiny model as a run's weights and gives the path."""

    def save(classes=DIGITS, preprocessing=PREPROCESSING):
        path = tmp_path / "teacher" / "model.safetensors"
        path.parent.mkdir(exist_ok=True)
        return save_model(path, tiny(len(classes)), classes=classes, preprocessing=preprocessing)

    return save


def log_softmax(row):
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def cross_entropy(rows, wanted):
    """Mean over the batch of the cross-entropy with probabilities."""
    losses = [-sum(p * q for p, q in zip(want, log_softmax(row), strict=True))
              for row, want in zip(rows, wanted, strict=True)]  # fmt: skip
    return sum(losses) / len(losses)


def divergence(rows, taught, tau):
    """Mean over the batch of KL(teacher || student) at temperature tau."""
    total = 0.0
    for row, other in zip(rows, taught, strict=True):
        ours, theirs = log_softmax([v / tau for v in row]), log_softmax([v / tau for v in other])
        total += sum(math.exp(p) * (p - q) for p, q in zip(theirs, ours, strict=True))
    return total / len(rows)


def smoothed(labels, classes, amount):
    return [[(1 - amount) * (k == label) + amount / classes for k in range(classes)] for label in labels]


@pytest.fixture
def logits():
    """Of the student's two heads and of the teacher, 4 images of 5 classes, and their labels."""
    return [3 * torch.randn(4, 5) for _ in range(3)], torch.tensor([1, 0, 4, 2])


@pytest.mark.parametrize("heads", [1, 2])
def test_the_soft_loss_is_the_formula(logits, heads):
    (first, second, taught), labels = logits
    settings = Settings(distillation="soft", distill_alpha=0.3, distill_tau=2.5, label_smoothing=0.1)
    learning = second if heads == 2 else first
    found = distillation_loss((first, second) if heads == 2 else first, taught, labels, settings)
    labelled = cross_entropy(first.tolist(), smoothed(labels.tolist(), 5, 0.1))
    wanted = 0.7 * labelled + 0.3 * 2.5**2 * divergence(learning.tolist(), taught.tolist(), 2.5)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_hard_loss_is_the_formula(logits, heads):
    (first, second, taught), labels = logits
    settings = Settings(distillation="hard", distill_alpha=0.4, label_smoothing=0.1)
    learning = second if heads == 2 else first
    found = distillation_loss((first, second) if heads == 2 else first, taught, labels, settings)
    decided = [max(range(5), key=row.__getitem__) for row in taught.tolist()]
    wanted = 0.6 * cross_entropy(first.tolist(), smoothed(labels.tolist(), 5, 0.1))
    wanted += 0.4 * cross_entropy(learning.tolist(), smoothed(decided, 5, 0.0))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_each_head_learns_from_its_own_source(logits):
    (first, second, taught), labels = logits
    first.requires_grad_()
    second.requires_grad_()
    distillation_loss((first, second), taught, labels, Settings(distill_alpha=1.0)).backward()
    assert not first.grad.any()
    assert second.grad.any()
    first.grad = second.grad = None
    distillation_loss((first, second), taught, labels, Settings(distill_alpha=0.0)).backward()
    assert first.grad.any()
    assert not second.grad.any()


def test_mixed_labels_are_taken(logits):
    (first, _, taught), labels = logits
    mixed = 0.3 * torch.eye(5)[labels] + 0.7 * torch.eye(5)[labels.flip(0)]
    settings = Settings(distill_alpha=0.0, label_smoothing=0.0)
    found = distillation_loss(first, taught, mixed, settings)
    assert float(found) == pytest.approx(cross_entropy(first.tolist(), mixed.tolist()), rel=1e-5)


def test_a_teacher_sees_images_in_its_own_normalisation_and_size():
    pixels = torch.rand(2, 3, 24, 24)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.mean((2, 3))

    student = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    Teacher(Watch(), (24, 24), (mean.tolist(), std.tolist()), (MEAN, STD))(student)
    torch.testing.assert_close(seen[0], (pixels - mean[:, None, None]) / std[:, None, None])
    Teacher(Watch(), (32, 16), (MEAN, STD), (MEAN, STD))(torch.ones(2, 3, 24, 24))
    assert seen[1].shape == (2, 3, 32, 16)
    torch.testing.assert_close(seen[1], torch.ones(2, 3, 32, 16))


def test_a_teacher_of_the_same_classes_in_another_order_is_permuted(teacher_file):
    path = teacher_file(classes=["c", "a", "b"])
    images = torch.randn(2, 3, 16, 16)
    wanted = Run.open(path).model()(images)[:, [1, 2, 0]]
    found = open_teacher(str(path), ["a", "b", "c"], PREPROCESSING)(images)
    torch.testing.assert_close(found, wanted)
    assert not found.requires_grad


def test_a_teacher_is_neither_saved_nor_trained(teacher_file):
    teacher = open_teacher(str(teacher_file()), DIGITS, PREPROCESSING)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    settings = Settings(mixup=0.0, cutmix=0.0, ema_decay=0.0)
    student = tiny(seed=1)
    task = Classification(student, settings, 1, 10, teacher=teacher)
    task.train()
    task.training_loss((torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 3]))).backward()
    alone = Classification(student, settings, 1, 10)
    assert task.state_dict().keys() == alone.state_dict().keys()
    assert [name for name, _ in task.named_parameters()] == [name for name, _ in alone.named_parameters()]
    assert not teacher.model.training
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(p.grad is not None for p in student.parameters())


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run on the digits, of one epoch of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", lambda run: None)
        config = {f"model.{name}": value for name, value in TINY.items()}
        return train(tmp_path_factory.mktemp("teacher") / "run", report=silent, **RUN, **config)


@pytest.mark.parametrize(("kind", "distilled"), [("soft", False), ("hard", True)])
def test_two_steps_of_training_with_the_run_of_a_teacher(tmp_path, monkeypatch, teacher_run, kind, distilled):
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    losses = []

    def watched(*arguments):
        losses.append(distillation_loss(*arguments))
        return losses[-1]

    monkeypatch.setattr("muntin.tasks.classification.distillation_loss", watched)
    config = {f"model.{name}": value for name, value in TINY_VIT.items()} | {"model.distilled": distilled}
    model = {"model": "efficientvit_m0", "teacher": str(teacher_run.path), "distillation": kind, "drop_path": 0.0}
    run = train(tmp_path / "run", report=silent, **RUN | {"size": 32}, **model, **config)
    assert len(losses) == 2
    assert all(torch.isfinite(loss) for loss in losses)
    state = read_checkpoint(run.path / "checkpoints" / "last.ckpt")["state_dict"]
    names = set(muntin.create_model("efficientvit_m0", 10, **TINY_VIT, distilled=distilled).state_dict())
    assert {name.removeprefix("model.") for name in state if name.startswith("model.")} == names
    assert not any("teacher" in name for name in state)


def test_a_run_with_other_classes_is_refused_with_the_difference(teacher_file):
    path = teacher_file(classes=["cat", "dog", "emu"])
    with pytest.raises(UserError, match=r"lacks 'ant' and has 'emu' besides"):
        open_teacher(str(path), ["ant", "cat", "dog"], PREPROCESSING)
    with pytest.raises(UserError, match=r"\(3, the data have 5\): it lacks 'a', 'b', 'c' and 2 more"):
        open_teacher(str(path), ["a", "b", "c", "d", "e"], PREPROCESSING)


def test_training_refuses_a_teacher_before_it_writes(tmp_path, teacher_file):
    path = teacher_file(classes=["cat", "dog"])
    with pytest.raises(UserError, match="trained for other classes"):
        train(tmp_path / "run", report=silent, teacher=str(path), **RUN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs/none", "no such run or model"),
        ("swin_tt", "did you mean 'swin_t'"),
        ("timm:resnet188", "did you mean 'resnet18"),
        ("timm:resnet18=none.pth", "there is no file none.pth"),
        ("timm:resnet18", "has 1000 classes, the data have 10"),
        ("swin_t", "has 1000 classes, the data have 10"),
    ],
)
def test_unknown_teachers_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        open_teacher(text, DIGITS, PREPROCESSING)


def test_a_timm_teacher_from_a_file(tmp_path):
    other = timm.create_model("test_resnet", num_classes=10).eval()
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    text = f"timm:test_resnet={tmp_path / 'weights.safetensors'}"
    teacher = open_teacher(text, DIGITS, PREPROCESSING)
    assert teacher.size == (160, 160)
    same = own_normalisation(teacher)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(same(images), other(images))
    with pytest.raises(UserError, match="has 10 classes, the data have 3"):
        open_teacher(text, ["a", "b", "c"], PREPROCESSING)
    (tmp_path / "code.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"code\.pth is damaged"):
        open_teacher(f"timm:test_resnet={tmp_path / 'code.pth'}", DIGITS, PREPROCESSING)
    save_file({"fc.weight": torch.zeros(10, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors does not fit test_resnet"):
        open_teacher(f"timm:test_resnet={tmp_path / 'other.safetensors'}", DIGITS, PREPROCESSING)


def own_normalisation(teacher):
    """The teacher for images as it wants them itself."""
    return Teacher(teacher.model, teacher.size, (MEAN, STD), (MEAN, STD))


def test_a_muntin_teacher_from_a_file(tmp_path):
    model = muntin.create_model("efficientvit_m0", 10).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    text = f"efficientvit_m0={tmp_path / 'weights.safetensors'}"
    teacher = own_normalisation(open_teacher(text, DIGITS, PREPROCESSING))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model(images))
    with pytest.raises(UserError, match="has another number of classes than the data's 3"):
        open_teacher(text, ["a", "b", "c"], PREPROCESSING)


def test_a_distilled_head_without_a_teacher_is_refused(tmp_path):
    distilled = {"model": "efficientvit_m0", "model.distilled": True, "size": 64}
    with pytest.raises(UserError, match="learns it from a teacher: give one"):
        train(tmp_path / "run", report=silent, **distilled)
