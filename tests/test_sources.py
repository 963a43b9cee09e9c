"""Every kind of data that `--data` names; images that break in training; loaders that report them."""

import csv
import io
import itertools
import json
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from muntin.data.augment import Plain
from muntin.data.check import BadFiles
from muntin.data.datasets import Images
from muntin.data.decode import Encoded
from muntin.data.images import BadImage
from muntin.data.loading import EpochBatches, EvaluationSet, TrainingSet, evaluation_loader, training_loader
from muntin.data.order import ShardsShuffled
from muntin.data.sources import absolute, open_part, open_parts, open_splits, short_name, splits_from_json
from muntin.data.transforms import Evaluate
from muntin.errors import UserError


def encoded(number, side=8):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def class_folder(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(encoded(i))
    return root


# Hugging Face


def table(count, names=("cat", "dog")):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features)


def test_a_saved_dataset_dict_has_its_splits(tmp_path):
    datasets.DatasetDict({"train": table(9), "validation": table(4)}).save_to_disk(tmp_path / "saved")
    splits = open_splits(str(tmp_path / "saved"), 0, 8)
    assert (len(splits.train), len(splits.val), splits.given) == (9, 4, True)
    assert splits.train.classes == ["cat", "dog"] and splits.val.labels == [0, 1, 0, 1]
    assert splits.train.read(5).data == encoded(5)
    assert splits_from_json(str(tmp_path / "saved"), splits.json(), True).train.keys == splits.train.keys


def test_a_saved_dataset_is_split(tmp_path):
    table(40).save_to_disk(tmp_path / "saved", num_shards=3)
    parts = open_parts(str(tmp_path / "saved"))
    assert len(parts["all"]) == 40 and parts["all"].read(33).data == encoded(33)
    assert [len(part) for part in open_splits(str(tmp_path / "saved"), 0, 8).parts().values()] == [28, 4, 8]


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    table(20).to_parquet(tmp_path / "data/train-00000-of-00001.parquet", batch_size=5)
    table(6).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    parts = open_parts(str(tmp_path))
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "test": 6}
    assert parts["test"].classes == ["cat", "dog"] and parts["train"].labels[:3] == [0, 1, 0]
    assert [parts["train"].read(i).data for i in (19, 0, 7)] == [encoded(i) for i in (19, 0, 7)]
    splits = open_splits(str(tmp_path), 0, 8)
    assert [len(part) for part in splits.parts().values()] == [18, 2, 6]
    order = splits.train.order(0, 0)
    assert sorted(order.tolist()) == list(range(18))


def test_columns_that_are_not_there_are_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no column of images .* it has text, label"):
        open_parts(str(tmp_path / "saved"))


# A table


def test_a_table_of_labels(tmp_path):
    class_folder(tmp_path, {"x": 6})
    lines = ["image,label,split", *(f"x/{i}.png,{['cat', 'dog'][i % 2]},{['train', 'val'][i // 4]}" for i in range(6))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    splits = open_splits(str(tmp_path / "labels.csv"), 0, 8)
    assert splits.train.keys == [f"x/{i}.png" for i in range(4)] and splits.val.labels == [0, 1]
    assert not splits.multi_label and splits.given


def test_semicolons_make_a_table_multi_label(tmp_path):
    class_folder(tmp_path, {"x": 40})
    kinds = ["cat;dog", "dog", "", "sky; cat"]
    lines = ["image,label", *(f"x/{i}.png,{kinds[i % 4]}" for i in range(40))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    splits = open_splits(str(tmp_path / "labels.csv"), 0, 8)
    assert splits.multi_label and splits.train.classes == ["cat", "dog", "sky"]
    label = dict(zip(splits.train.keys, splits.train.labels, strict=True))
    assert all(label.get(f"x/{i}.png") in (None, [[0, 1], [1], [], [2, 0]][i % 4]) for i in range(40))
    data = TrainingSet(splits.train, Plain(Evaluate((8, 8), None).bytes), 0)
    images, targets = next(iter(training_loader(data, EpochBatches(len(data.images), 8, 0), 0)))
    assert images.shape == (8, 3, 8, 8) and targets.shape == (8, 3) and targets.dtype == torch.float32
    (_, first), *_ = next(iter(EpochBatches(len(data.images), 8, 0)))
    assert targets[0].nonzero().flatten().tolist() == sorted(splits.train.labels[first])


@pytest.mark.parametrize(
    "text, words",
    [
        ("picture,label\na.png,x", "has no column 'image'"),
        ("image,label", "has no images"),
        ("image,label\na.png,x\na.png,y", "line 3: a.png is there twice"),
        ("image,label\n,x\nb.png,y", "line 2 has no image"),
        ("image,label,split\na.png,x,dev", "the split 'dev' is unknown; valid are train, val, test"),
        ("image,label\na.png,x\nb.png,x", "has 1 different labels"),
    ],
)
def test_wrong_tables_are_named_with_their_line(tmp_path, text, words):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        open_parts(str(tmp_path / "labels.csv"))


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no table at .*labels.csv; check the path"):
        open_parts(str(tmp_path / "labels.csv"))


def test_a_class_that_train_lacks_is_named(tmp_path):
    class_folder(tmp_path, {"x": 6})
    kinds = ["cat,train", "dog,train", "cow,val", "cat,val", "cow,test", "dog,test"]
    lines = ["image,label,split", *(f"x/{i}.png,{kind}" for i, kind in enumerate(kinds))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    told = "labels.csv: the class 'cow' has images in val and test and none in train; add some there, or remove those"
    with pytest.raises(UserError, match=told):
        open_splits(str(tmp_path / "labels.csv"), 0, 8)


# torchvision


class Cifar:
    """What torchvision's CIFAR10 offers, small."""

    def __init__(self, root, train, download):
        if not download:
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.full((20 if train else 5, 32, 32, 3), 7, dtype=np.uint8)
        self.targets = [i % 2 for i in range(len(self.data))]
        self.classes = ["cat", "dog"]


def test_torchvisions_sets_download_only_when_asked(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    with pytest.raises(UserError, match=r"CIFAR10 is not complete in .*/x .* --data torchvision:CIFAR10:x:download"):
        open_parts("torchvision:CIFAR10:x")
    splits = open_splits("torchvision:CIFAR10:x:download", 0, 32)
    assert [len(part) for part in splits.parts().values()] == [18, 2, 5]
    assert splits.plain_resize and splits.test.open(0).getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Flowers102", "StanfordCars", "OxfordIIITPet"])
def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not complete in {tmp_path}.*{name}:{tmp_path}:download"):
        open_parts(f"torchvision:{name}:{tmp_path}")


def test_names_of_data():
    with pytest.raises(UserError, match=r"'CIFAR' is none of CIFAR10, .* \(did you mean 'CIFAR10'"):
        open_parts("torchvision:CIFAR:x")
    with pytest.raises(UserError, match="there is no data at nowhere"):
        open_parts("nowhere")
    assert absolute("digits") == "digits" and absolute("https://host/a.tar") == "https://host/a.tar"
    assert absolute("torchvision:CIFAR10:/x/../y:download") == "torchvision:CIFAR10:/y:download"
    assert absolute("a").endswith("/a")
    names = {"digits": "digits", "/x/photos": "photos", "https://h/x/in1k/train-{0..9}.tar": "in1k"}
    names |= {"/x/shards/*.tar": "shards", "torchvision:CIFAR10:/x": "cifar10", "/x/pets/labels.csv": "pets"}
    assert {name: short_name(name) for name in names} == names


def test_evaluation_takes_test_then_val_then_everything(tmp_path):
    assert open_part("digits")[1] == "test" and len(open_part("digits", "train")[0]) == 1259
    folder = class_folder(tmp_path / "plain", {"a": 2, "b": 2})
    assert open_part(str(folder))[1] == "all"
    for part in ("train", "val"):
        class_folder(tmp_path / "parts" / part, {"a": 2, "b": 1})
    assert open_part(str(tmp_path / "parts"))[1] == "val"
    with pytest.raises(UserError, match="has no folder test"):
        open_part(str(tmp_path / "parts"), "test")


# Given parts


def test_a_class_of_val_that_train_does_not_have_is_named(tmp_path):
    class_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    class_folder(tmp_path / "val", {"cat": 2, "dogs": 2})
    with pytest.raises(UserError, match=r"val/dogs is a class that .*train does not have \(did you mean 'dog'\?\)"):
        open_splits(str(tmp_path), 0, 8)


def test_what_was_left_out_stays_left_out(tmp_path):
    for part in ("train", "val"):
        class_folder(tmp_path / part, {"a": 4, "b": 4})
    (tmp_path / "train/a/2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 16 images cannot be used: .*train/a/2.png is not a readable image"):
        open_splits(str(tmp_path), 0, 8)
    bad = BadFiles(tmp_path / "run/bad_files.csv")
    splits = open_splits(str(tmp_path), 0, 8, "skip", bad)
    assert len(splits.train) == 7 and bad.names() == {"train/a/2.png"}
    stored = json.loads(json.dumps(splits.json()))
    assert stored["left_out"] == ["train/a/2.png"]
    assert splits_from_json(str(tmp_path), stored, True).train.keys == splits.train.keys


# Images that break in training


def breaking(count, bad):
    """Images that are their position's grey, except those that are damaged."""

    def read(position):
        return Encoded(b"damaged" if position in bad else encoded(position), f"{position}.png")

    return Images([f"{i}.png" for i in range(count)], [i % 2 for i in range(count)], ["a", "b"], read)


def plain():
    return Plain(Evaluate((8, 8), None).bytes)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_naming_the_image(workers):
    loader = training_loader(TrainingSet(breaking(16, {5}), plain(), 0), EpochBatches(16, 4, 0), workers)
    with pytest.raises(BadImage, match=r"^5.png is not a readable image; remove it or convert it to PNG or JPEG$"):
        list(loader)
    loader = evaluation_loader(EvaluationSet(breaking(16, {5}), plain().transform), 4, workers)
    with pytest.raises(BadImage, match=r"^5.png is not a readable image"):
        list(loader)


def test_another_image_takes_the_place_of_a_bad_one_whatever_the_workers(tmp_path):
    found = []
    for workers in (0, 2):
        bad = BadFiles(tmp_path / f"{workers}.csv")
        data = TrainingSet(breaking(16, {5, 6}), plain(), 0, bad)
        found.append([batch for epoch in range(2) for batch in _epoch(data, epoch, workers)])
        assert bad.names() == {"5.png", "6.png"}
        lines = bad.path.read_text().splitlines()
        assert lines[0] == "file,problem" and "5.png is not a readable image" in "".join(lines)
    for (images, targets), (others, same) in zip(*found, strict=True):
        assert torch.equal(images, others) and torch.equal(targets, same)
        assert torch.equal(images[:, 0, 0, 0] % 2, targets)  # a replacement has its own label
        assert not {5, 6} & set(images[:, 0, 0, 0].tolist())


def _epoch(data, epoch, workers):
    batches = EpochBatches(16, 4, 0)
    batches.set_epoch(epoch)
    return list(training_loader(data, batches, workers))


def test_data_without_one_good_image_say_so(tmp_path):
    data = TrainingSet(breaking(4, {0, 1, 2, 3}), plain(), 0, BadFiles(tmp_path / "bad.csv"))
    with pytest.raises(BadImage, match="100 images in a row cannot be used; see .*bad.csv"):
        list(training_loader(data, EpochBatches(4, 4, 0), 0))


def test_many_images_are_sampled_before_training(monkeypatch):
    monkeypatch.setattr("muntin.data.check.ALL", 50)
    monkeypatch.setattr("muntin.data.check.SAMPLE", 20)
    from muntin.data.check import check_parts

    read = []
    images = breaking(100, set())
    counted = Images(images.keys, images.labels, images.classes, lambda i: read.append(i) or images.read(i))
    check_parts({"train": counted, "val": breaking(50, {3})}, 0)
    assert len(read) == 20 and set(check_parts({"val": breaking(50, {3})}, 0).bad) == {"3.png"}


# Order


def test_an_epoch_of_shards_mixes_a_few_at_a_time():
    shards = np.repeat(np.arange(10), 7)
    asked = []
    order = ShardsShuffled(shards, 3, asked.append)
    positions = order(0, 1)
    assert sorted(positions.tolist()) == list(range(70))
    groups = [set(shards[positions[i : i + 21]].tolist()) for i in range(0, 70, 21)]
    assert [len(group) for group in groups] == [3, 3, 3, 1] and set.union(*groups) == set(range(10))
    assert shards[positions[:21]].tolist() != sorted(shards[positions[:21]].tolist())
    assert positions.tolist() == order(0, 1).tolist() != order(0, 2).tolist()
    batches = EpochBatches(70, 7, 0, order=order)
    batches.set_epoch(1)
    first, _ = itertools.islice(batches, 2)
    assert [position for _, position in first] == positions[:7].tolist()
    assert set(asked[0]) == groups[0] and set(asked[1]) & groups[1]  # the next group is fetched while one is read
    part = order.select(range(14, 35))
    assert sorted(part(0, 0).tolist()) == list(range(21)) and set(part.shards.tolist()) == {2, 3, 4}


def test_a_bad_image_is_listed_once_whoever_finds_it(tmp_path):
    path = tmp_path / "bad_files.csv"
    path.touch()  # another process has made it, and not yet written
    workers = [BadFiles(path), BadFiles(path)]
    for worker in workers:
        worker.add("a.png", "damaged")
    workers[1].add('b, "c".png', "cut\nshort")
    workers[0].add('b, "c".png', "cut\nshort")
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["file", "problem"], ["a.png", "damaged"], ['b, "c".png', "cut\nshort"]]
    assert BadFiles(path).names() == {"a.png", 'b, "c".png'}


def test_processes_list_bad_images_together(tmp_path):
    path = tmp_path / "run" / "bad_files.csv"

    def add():
        bad = BadFiles(path)
        for number in range(30):
            bad.add(f"{number}.png", "damaged")

    processes = [multiprocessing.get_context("fork").Process(target=add) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = path.read_text().splitlines()
    assert rows[0] == "file,problem" and sorted(rows[1:]) == sorted(f"{number}.png,damaged" for number in range(30))
