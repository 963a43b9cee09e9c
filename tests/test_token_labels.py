"""Token labels: files, crops, targets, MixToken and the loss, each against a form written out by hand."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

import muntin
from muntin.data.augment import Photographs
from muntin.data.check import BadFiles
from muntin.data.datasets import Images
from muntin.data.loading import collate
from muntin.data.token_labels import DenseLabels, TokenLabelledSet, TokenTarget
from muntin.errors import UserError
from muntin.models.rmt import forward_mixed
from muntin.tasks import train, training
from muntin.tasks.classification import Classification
from muntin.tasks.settings import Settings
from muntin.tasks.token_labels import TokenLabelling, draw_box, token_targets

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]
TINY = {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "heads": (2, 1, 4, 2), "mlp_ratios": (2, 2, 2, 2)}
TINY |= {"projection": 24, "token_label": "stage"}
SIDE = 64  # pixels: 2 x 2 tokens in the last stage


def silent(_line):
    pass


def tiny(num_classes=6, **config):
    return muntin.create_model("rmt_t", num_classes, **TINY | config)


def dense_label(k=3, height=9, width=9, classes=6, seed=0):
    """(2, k, h, w) half: the largest of random scores in each cell, and their classes."""
    scores = 4 * torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([part.half() for part in scores.topk(k, dim=0)])


@pytest.fixture
def labelled(tmp_path):
    """Images of two classes and a folder of their label files, as FOLDER/CLASS/NAME.pt."""

    def make(suffix=".pt", prefix="train/", mirrored="", count=4):
        keys, labels = [], []
        for i in range(count):
            keys.append(f"{prefix}{CLASSES[i % 2]}/{i}.jpg")
            labels.append(i % 2)
            path = tmp_path / "labels" / f"{mirrored}{CLASSES[i % 2]}" / f"{i}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".pt":
                torch.save(dense_label(seed=i), path)
            else:
                np.save(path, dense_label(seed=i).numpy())

        def read(position):
            pixels = np.random.default_rng(position).integers(256, size=(60 + position, 90, 3), dtype=np.uint8)
            return Image.fromarray(pixels)

        return tmp_path / "labels", Images(keys, labels, CLASSES, read)

    return make


@pytest.mark.parametrize(
    ("suffix", "prefix", "mirrored"),
    [(".pt", "train/", ""), (".pt", "train/", "train/"), (".npy", "", ""), (".npy", "train/", "train/")],
)
def test_label_files_are_found_and_read(labelled, suffix, prefix, mirrored):
    folder, images = labelled(suffix, prefix, mirrored)
    labels = DenseLabels(folder, images)
    for position in range(4):
        scores, classes = labels.read(position)
        wanted = dense_label(seed=position)
        assert torch.equal(scores, wanted[0].float())
        assert torch.equal(classes, wanted[1].int())


def test_a_missing_label_names_image_and_path(labelled):
    folder, images = labelled()
    (folder / "bee" / "3.pt").unlink()
    with pytest.raises(UserError, match=r"1 of 4 training images have no token label: train/bee/3\.jpg wants") as told:
        DenseLabels(folder, images)
    assert str(folder / "bee" / "3.pt") in str(told.value)
    with pytest.raises(UserError, match="is no folder"):
        DenseLabels(folder / "none", images)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(5, 9, 9), r"has shape \(5, 9, 9\): give \(2, k, h, w\)"),
        (torch.zeros(3, 3, 9, 9), r"has shape \(3, 3, 9, 9\): give \(2, k, h, w\)"),
        (torch.zeros(2, 3, 7, 7), r"has shape \(2, 3, 7, 7\) where .*0\.pt has \(2, 3, 9, 9\)"),
        (torch.full((2, 3, 9, 9), 6.0), "class numbers from 6 to 6: give whole numbers from 0 to 5"),
        (torch.full((2, 3, 9, 9), 1.5), "class numbers from 1.5 to 1.5"),
        (torch.full((2, 3, 9, 9), math.nan), "scores that are not finite"),
        ({"label": 3}, "holds dict: give a tensor"),
        (None, "is damaged or no array"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(labelled, content, words):
    folder, images = labelled()
    path = folder / "bee" / "1.pt"  # the first of its class
    if content is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=words) as told:
        DenseLabels(folder, images)
    assert str(path) in str(told.value)
    assert "train/bee/1.jpg" in str(told.value)


def test_code_in_a_label_file_is_not_run(labelled, tmp_path):
    folder, images = labelled()

    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save(Code(), folder / "bee" / "1.pt")
    with pytest.raises(UserError, match="is damaged or no array"):
        DenseLabels(folder, images)
    assert not (tmp_path / "ran").exists()


def test_a_bad_label_met_in_training_is_told_in_one_line(labelled):
    folder, images = labelled()
    data = TokenLabelledSet(images, Photographs((SIDE, SIDE), (0.5,) * 3, ""), 0, None, DenseLabels(folder, images))
    torch.save(torch.zeros(2, 1, 9, 9), folder / "bee" / "3.pt")  # not the first of its class
    found = collate([data[0, 0], data[0, 3]])
    assert isinstance(found, UserError)
    assert "bee/3.pt, the token label of train/bee/3.jpg, has shape (2, 1, 9, 9)" in str(found)


def test_an_image_whose_label_is_bad_can_be_skipped(labelled, tmp_path):
    folder, images = labelled()
    bad = BadFiles(tmp_path / "bad_files.csv")
    data = TokenLabelledSet(images, Photographs((SIDE, SIDE), (0.5,) * 3, ""), 0, bad, DenseLabels(folder, images))
    torch.save(torch.zeros(2, 1, 9, 9), folder / "bee" / "3.pt")
    _, target = data[0, 3]
    others = [dense_label(seed=position)[0].float() for position in range(3)]
    assert any(torch.equal(target.scores, scores) for scores in others)
    assert "3.pt, the token label of train/bee/3.jpg, has shape" in (tmp_path / "bad_files.csv").read_text()


def test_a_label_is_cropped_and_flipped_as_its_image(labelled):
    """Each pixel of the image says where it is, so the augmented image says what was cut, and whether it is flipped."""
    folder, images = labelled()
    width, height = 180, 120
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(width)
    ramp[..., 1] = np.arange(height)[:, None]
    images = Images(images.keys, images.labels, CLASSES, lambda _position: Image.fromarray(ramp))
    augment = Photographs((SIDE, SIDE), (0.5,) * 3, "", color_jitter=0.0)
    data = TokenLabelledSet(images, augment, 5, None, DenseLabels(folder, images))
    seen = set()
    for epoch in range(12):
        image, target = data[epoch, epoch % 4]
        left, top, right, bottom = (target.box * torch.tensor([width, height, width, height])).tolist()
        columns, rows = image[0].float().mean(0), image[1].float().mean(1)
        if target.flipped:
            columns = columns.flip(0)
        centres = (torch.arange(SIDE) + 0.5) / SIDE
        wanted = left + (right - left) * centres - 0.5, top + (bottom - top) * centres - 0.5
        inner = slice(4, -4)  # resampling leans inwards at an edge
        torch.testing.assert_close(columns[inner], wanted[0][inner], atol=1.5, rtol=0)
        torch.testing.assert_close(rows[inner], wanted[1][inner], atol=1.5, rtol=0)
        assert torch.equal(target.scores, dense_label(seed=epoch % 4)[0].float())
        again = data[epoch, epoch % 4][1]
        assert all(torch.equal(a, b) for a, b in zip(target, again, strict=True))
        seen.add(bool(target.flipped))
    assert seen == {True, False}


def test_a_batch_has_the_labels_of_its_images(labelled):
    folder, images = labelled()
    data = TokenLabelledSet(images, Photographs((SIDE, SIDE), (0.5,) * 3, ""), 0, None, DenseLabels(folder, images))
    items = [data[0, position] for position in range(3)]
    pixels, target = collate(items)
    assert isinstance(target, TokenTarget)
    assert (pixels.shape, pixels.dtype) == ((3, 3, SIDE, SIDE), torch.uint8)
    assert [tuple(part.shape) for part in target] == [(3, 3, 9, 9), (3, 3, 9, 9), (3, 4), (3,)]
    for i, (_, one) in enumerate(items):
        assert all(torch.equal(part[i], own) for part, own in zip(target, one, strict=True))


def bilinear(grid, y, x):
    """A value between the centres of a grid's cells, whose outermost cells go on a cell further."""
    height, width = len(grid), len(grid[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * grid[top][left] + dx * grid[top][right]
    lower = (1 - dx) * grid[below][left] + dx * grid[below][right]
    return (1 - dy) * upper + dy * lower


def softmax(row):
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def wanted_targets(scores, classes, box, flipped, cells, num_classes):
    """Of one image, in plain loops: probabilities [token][class]."""
    k, height, width = scores.shape
    planes = [[[0.0] * width for _ in range(height)] for _ in range(num_classes)]
    for i in range(k):
        for y in range(height):
            for x in range(width):
                planes[int(classes[i, y, x])][y][x] = float(scores[i, y, x])
    left, top, right, bottom = (share * side for share, side in zip(box, (width, height) * 2, strict=True))
    tall, wide = (bottom - top) / cells[0], (right - left) / cells[1]
    down, across = math.ceil(tall), math.ceil(wide)  # samples of a cell
    tokens = []
    for row in range(cells[0]):
        for column in range(cells[1]):
            place = cells[1] - 1 - column if flipped else column
            means = []
            for plane in planes:
                samples = [
                    bilinear(plane, top + (row + (i + 0.5) / down) * tall - 0.5,
                             left + (place + (j + 0.5) / across) * wide - 0.5)
                    for i in range(down) for j in range(across)
                ]  # fmt: skip
                means.append(sum(samples) / len(samples))
            tokens.append(softmax(means))
    return tokens


def random_target(batch=3, k=3, height=9, width=7):
    drawn = random.Random(0)
    parts = [dense_label(k, height, width, seed=i) for i in range(batch)]
    boxes = []
    for _ in range(batch):
        left, top = drawn.uniform(0, 0.5), drawn.uniform(0, 0.5)
        boxes.append([left, top, drawn.uniform(left + 0.3, 1), drawn.uniform(top + 0.3, 1)])
    boxes[0] = [0.0, 0.0, 1.0, 1.0]
    dense = torch.stack(parts)
    return TokenTarget(dense[:, 0].float(), dense[:, 1].int(), torch.tensor(boxes), torch.arange(batch) % 2 == 1)


@pytest.mark.parametrize("cells", [(2, 2), (1, 1), (7, 5)])
def test_targets_are_those_of_plain_loops(cells):
    target = random_target()
    found = token_targets(target, cells, len(CLASSES))
    assert found.shape == (3, cells[0] * cells[1], len(CLASSES))
    for i, one in enumerate(found):
        wanted = wanted_targets(target.scores[i], target.classes[i], target.box[i].tolist(),
                                bool(target.flipped[i]), cells, len(CLASSES))  # fmt: skip
        torch.testing.assert_close(one, torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_a_flip_mirrors_the_targets():
    target = random_target()
    plain = token_targets(target._replace(flipped=torch.zeros(3, dtype=torch.bool)), (2, 3), len(CLASSES))
    mirrored = token_targets(target._replace(flipped=torch.ones(3, dtype=torch.bool)), (2, 3), len(CLASSES))
    torch.testing.assert_close(mirrored.unflatten(1, (2, 3)), plain.unflatten(1, (2, 3)).flip(2))


def test_boxes_lie_in_the_map_and_follow_the_share_drawn():
    areas = []
    for _ in range(2000):
        top, left, bottom, right = draw_box(7, 7)
        assert 0 <= top <= bottom <= 7
        assert 0 <= left <= right <= 7
        assert bottom - top <= 6
        areas.append((bottom - top) * (right - left))
    assert min(areas) == 0
    assert max(areas) == 36
    law = []  # CutMix's, drawn by Python's generator
    drawn = random.Random(1)
    for _ in range(2000):
        half = int(7 * math.sqrt(drawn.random())) // 2
        spans = [(max(c - half, 0), min(c + half, 7)) for c in (drawn.randrange(7), drawn.randrange(7))]
        law.append(math.prod(b - a for a, b in spans))
    assert sum(areas) / 2000 == pytest.approx(sum(law) / 2000, rel=0.1)
    torch.manual_seed(3)
    first = draw_box(7, 7)
    torch.manual_seed(3)
    assert draw_box(7, 7) == first


def test_an_empty_box_is_the_plain_forward():
    model = tiny().train()
    image = torch.randn(4, 3, SIDE, SIDE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logits, tokens = model(image)
    model.load_state_dict(state)
    found = forward_mixed(model, image, torch.zeros(2, 2, dtype=torch.bool))
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1], tokens)


@pytest.mark.parametrize("token_label", ["stage", "projection"])
def test_the_box_is_pasted_after_the_stem_and_taken_back_from_the_tokens(token_label):
    model = tiny(token_label=token_label).train()
    image = torch.randn(3, 3, SIDE, 2 * SIDE)
    top, left, bottom, right = 1, 1, 2, 3
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits, tokens = forward_mixed(model, image, mask)
        model.load_state_dict(state)
        stem, height, width = model.backbone.stem(image)
        maps = stem.unflatten(1, (height, width)).clone()
        for i in range(3):
            partner = stem[2 - i].unflatten(0, (height, width))
            maps[i, 8 * top : 8 * bottom, 8 * left : 8 * right] = partner[8 * top : 8 * bottom, 8 * left : 8 * right]
        x = maps.flatten(1, 2)
        for stage in model.backbone.stages:
            x, height, width = stage(x, height, width, lambda block, *args: block(*args))
        wanted, mixed = model.head(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    mixed = mixed.unflatten(1, (2, 4))
    back = mixed.clone()
    for i in range(3):
        back[i, top:bottom, left:right] = mixed[2 - i, top:bottom, left:right]
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(tokens, back.flatten(1, 2))


def test_sides_that_the_last_stage_does_not_divide_are_refused():
    with pytest.raises(UserError, match="64x80 pixels .* multiples of 32"):
        forward_mixed(tiny(), torch.zeros(2, 3, SIDE, 80), torch.zeros(2, 2, dtype=torch.bool))


class Fixed(nn.Module):
    """In place of a model: given logits, and the mask that came."""

    def __init__(self, logits, tokens):
        super().__init__()
        self.outputs = logits, tokens

    def forward(self, images, mask):
        self.mask = mask
        return self.outputs


def test_the_loss_is_the_one_written_out():
    target, classes, side, smoothing, weight = random_target(), len(CLASSES), 3, 0.1, 0.7
    logits, tokens = 2 * torch.randn(3, classes), 2 * torch.randn(3, side * side, classes)
    settings = Settings(label_smoothing=smoothing, token_weight=weight)
    model = Fixed(logits, tokens)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found = TokenLabelling(model, 32, classes, settings)(torch.zeros(3, 3, 32 * side, 32 * side), target)
        share = int(model.mask.sum()) / side**2
        seen.add(share)

        def each(cells):
            return [
                wanted_targets(target.scores[i], target.classes[i], target.box[i].tolist(), bool(target.flipped[i]),
                               cells, classes) for i in range(3)
            ]  # fmt: skip

        whole, cells = [one[0] for one in each((1, 1))], each((side, side))
        image_loss = token_loss = 0.0
        for i in range(3):
            mixed = [(1 - share) * a + share * b for a, b in zip(whole[i], whole[2 - i], strict=True)]
            image_loss += cross_entropy(logits[i].tolist(), mixed, smoothing) / 3
            for n in range(side**2):
                token_loss += cross_entropy(tokens[i, n].tolist(), cells[i][n], smoothing) / (3 * side**2)
        assert float(found) == pytest.approx(image_loss + weight * token_loss, rel=1e-5)
    assert len(seen) > 1  # empty boxes and others


def cross_entropy(row, wanted, smoothing):
    total = math.log(sum(math.exp(value) for value in row))
    smoothed = [(1 - smoothing) * p + smoothing / len(row) for p in wanted]
    return -sum(p * (value - total) for p, value in zip(smoothed, row, strict=True))


def test_without_mixing_no_box_is_drawn():
    model = Fixed(torch.randn(3, len(CLASSES)), torch.randn(3, 4, len(CLASSES)))
    labelling = TokenLabelling(model, 32, len(CLASSES), Settings(mix_token=False))
    for _ in range(10):
        labelling(torch.zeros(3, 3, SIDE, SIDE), random_target())
        assert not model.mask.any()


def test_both_heads_learn_and_a_step_repeats():
    settings = Settings(token_labels="labels", mixup=0.0, cutmix=0.0, erasing=0.5)
    task = Classification(tiny(), settings, 1, len(CLASSES)).train()
    batch = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8), random_target()
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(task.training_loss(batch))
    assert torch.equal(losses[0], losses[1])
    losses[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.model.head.parameters() if p.ndim > 1)
    assert task.model.backbone.stem.convs[0].conv.weight.grad.any()


@pytest.fixture
def data(tmp_path):
    """A folder of small photographs with label files beside it, and the arguments of a training of two steps."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                path = tmp_path / "data" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(drawn.integers(256, size=(48, 48, 3), dtype=np.uint8)).save(path)
                if part == "train":
                    label = tmp_path / "labels" / name / f"{i}.pt"
                    label.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(dense_label(2, 5, 5, classes=2, seed=i), label)
    config = {f"model.{name}": value for name, value in TINY.items()}
    settings = {"model": "rmt_t", "size": SIDE, "batch_size": 4, "epochs": 1, "precision": "32", "workers": 0}
    return config | settings | {"data": str(tmp_path / "data"), "token_labels": str(tmp_path / "labels")}


def test_two_steps_of_training_with_token_labels(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure_latency", lambda run: None)
    run = train(tmp_path / "run", report=silent, **data)
    assert run.metrics["epochs"] == 1
    assert math.isfinite(run.metrics["val_accuracy"])
    assert "mixup: 0.0" in (tmp_path / "run" / "config.yaml").read_text()
    assert "head.fc_tokens.weight" in run.model().state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_labels": ""}, "learns it from dense labels: give their folder"),
        ({"model.token_label": False}, "has no head for tokens"),
        ({"size": 48}, "give a multiple of 32"),
        ({"augment": "none"}, "give augment=photographs"),
        ({"teacher": "swin_t"}, "both set"),
        ({"token_labels": "none"}, "is no folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(data, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", report=silent, **data | change)
    assert not (tmp_path / "run").exists()


class Waits(TorchFunctionMode):
    """Counts calls that wait for a GPU: those that bring numbers from the host to a tensor's device, or back."""

    NAMES = (
        "tensor",
        "as_tensor",
        "new_tensor",
        "item",
        "tolist",
        "cpu",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def test_targets_are_made_without_waiting_for_the_device():
    shapes = [(4, 2, 6, 6), (4, 2, 6, 6), (4, 4), (4,)]
    kinds = [torch.float32, torch.int32, torch.float32, torch.bool]
    target = TokenTarget(*(torch.zeros(s, dtype=k) for s, k in zip(shapes, kinds, strict=True)))
    with Waits() as waits:
        assert token_targets(target, (2, 2), 3).shape == (4, 4, 3)
        assert waits.count == 0
        target.box.new_tensor([1.0, 2.0]).sum().item()
    assert waits.count == 2  # what is counted
