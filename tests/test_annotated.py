"""Annotated images: readers, splits, the built-in scenes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from muntin.data.annotated import open_annotated, open_annotated_part
from muntin.data.polygons import polygon_mask
from muntin.data.scenes import write_scenes
from muntin.errors import UserError

# pycocotools' own, on converting what it decodes
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COUNTS = {"train": 12, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built-in") / "scenes"
    write_scenes(folder, COUNTS, seed=0)
    return folder


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """x1 y1 x2 y2 by plain loops."""
    found = []
    for mask in masks.tolist():
        rows = [y for y, row in enumerate(mask) if any(row)]
        columns = [x for x in range(len(mask[0])) if any(row[x] for row in mask)]
        found.append([min(columns), min(rows), max(columns) + 1, max(rows) + 1])
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


def test_scenes_are_read_by_the_readers_of_everybodys_files(scenes):
    splits = open_annotated(str(scenes), "instance")
    assert {name: len(part) for name, part in splits.parts().items()} == COUNTS
    assert splits.train.classes == [str(digit) for digit in range(10)] and splits.train.masks
    maps = open_annotated(str(scenes), "segment")
    assert maps.train.classes == ["background", *splits.train.classes] and len(maps.train.palette) == 11
    for position in range(len(splits.train)):
        target = splits.train.target(position)
        assert target["masks"].shape[1:] == splits.train.picture(position).size[::-1] == (128, 128)
        assert torch.equal(boxes_around(target["masks"]), target["boxes"].as_subclass(torch.Tensor))
        assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())
        labels = torch.zeros(128, 128, dtype=torch.uint8)
        for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
            labels[mask.bool()] = label + 1
        assert torch.equal(labels, maps.train.target(position)["labels"].as_subclass(torch.Tensor))


def test_scenes_of_a_seed_are_the_same_bytes_and_of_another_seed_others(scenes, tmp_path):
    for seed in (0, 1):
        write_scenes(tmp_path / str(seed), COUNTS, seed)

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(tmp_path / "0") == content(scenes) != content(tmp_path / "1")


def test_scenes_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    from muntin.data import scenes

    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    left = tmp_path / "data" / f".scenes-{scenes.VERSION}.0123.tmp"
    left.mkdir(parents=True)  # by a process that was killed
    monkeypatch.setattr(scenes, "atomic_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scenes.scenes_folder()
    assert [p.name for p in (tmp_path / "data").iterdir()] == [f".scenes-{scenes.VERSION}.lock"]
    monkeypatch.undo()
    monkeypatch.setenv("MUNTIN_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    part, name = open_annotated_part("scenes", "detect", None)
    assert name == "test" and len(part) == COUNTS["test"] and not part.masks


def test_no_handwriting_is_in_two_parts(monkeypatch, tmp_path):
    from muntin.data import scenes

    used = []
    monkeypatch.setattr(scenes, "_write_part", lambda folder, part, glyphs, *_: used.append(set(glyphs.keys)))
    write_scenes(tmp_path / "scenes", COUNTS, seed=0)
    assert len(used) == 3 and sum(map(len, used)) == len(set.union(*used)) == 1797


@OLD_NUMPY
def test_masks_of_polygons_are_cocos_but_for_the_outline():
    from pycocotools import mask as coco

    random = np.random.default_rng(0)
    for _ in range(200):
        height, width, points = *random.integers(5, 60, 2), random.integers(3, 9)
        polygons = [random.uniform(-5, 65, 2 * points).round(2).tolist() for _ in range(random.integers(1, 4))]
        mine = polygon_mask(polygons, height, width)
        theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
        y, x = np.nonzero(mine != theirs)
        distances = np.full(len(x), np.inf)
        for polygon in polygons:
            corners = np.reshape(polygon, (-1, 2))
            for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
                centres = np.stack([x + 0.5, y + 0.5], 1) - start
                along = np.clip(centres @ (end - start) / ((end - start) ** 2).sum(), 0, 1)
                distances = np.minimum(distances, np.hypot(*(centres - along[:, None] * (end - start)).T))
        assert (distances < 1).all()


def test_pixels_whose_centres_are_inside_are_the_mask():
    square = polygon_mask([[1, 1, 4, 1, 4, 3, 1, 3]], 5, 6)
    assert square.sum() == 6 and square[1:3, 1:4].all()
    assert polygon_mask([[0.6, 0.6, 3.4, 0.6, 3.4, 2.4, 0.6, 2.4]], 5, 6).sum() == 2  # centres at 1.5 and 2.5
    outer, inner = [0, 0, 6, 0, 6, 5, 0, 5], [2, 2, 4, 2, 4, 3, 2, 3]
    assert polygon_mask([outer, inner], 5, 6).sum() == 30  # several are joined


def coco_document(count: int = 10) -> dict:
    """Images of 20x10, each with one object, the first also with a crowd."""
    images = [{"id": 10 * i + 7, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(count)]
    square = [2, 1, 6, 1, 6, 5, 2, 5]
    annotations = [
        {"id": i, "image_id": image["id"], "category_id": (3, 90)[i % 2], "bbox": [2, 1, 4, 4], "area": 16,
         "segmentation": [square], "iscrowd": 0}
        for i, image in enumerate(images)
    ]  # fmt: skip
    crowd = {"size": [10, 20], "counts": [100, 30, 70]}
    annotations.append(
        {"id": 999, "image_id": 7, "category_id": 90, "bbox": [10, 0, 3, 10], "area": 30, "iscrowd": 1,
         "segmentation": crowd}
    )  # fmt: skip
    categories = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(path: Path, document: dict, images: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    for record in document["images"]:
        Image.new("RGB", (20, 10)).save(images / record["file_name"])


LAYOUTS = {
    "coco": ("annotations/instances_{}2017.json", "{}2017"),
    "coco with images": ("annotations/instances_{}.json", "images/{}"),
    "roboflow": ("{}/_annotations.coco.json", "{}"),
    "plain": ("{}.json", "images"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coco_folders(layout, tmp_path):
    for part, count in (("train", 6), ("valid" if layout == "roboflow" else "val", 3)):
        path, images = (text.format(part) for text in LAYOUTS[layout])
        write_coco(tmp_path / path, coco_document(count), tmp_path / images)
    splits = open_annotated(str(tmp_path), "instance")
    assert (len(splits.train), len(splits.val), splits.test) == (6, 3, None)
    assert splits.train.classes == ["cat", "dog"]  # by id, which has gaps
    target = splits.train.target(0)
    assert target["boxes"].tolist() == [[2, 1, 6, 5], [10, 0, 13, 10]] and target["labels"].tolist() == [0, 1]
    assert target["crowd"].tolist() == [False, True] and target["masks"].sum((1, 2)).tolist() == [16, 30]
    assert target["masks"][0, 1:5, 2:6].all() and target["masks"][1, :, 10:13].all()
    assert splits.train.picture(0).size == (20, 10) and splits.train.name(5) == "5.png"
    assert "masks" not in open_annotated(str(tmp_path), "detect").train.target(0)


def test_one_coco_file_is_split_by_the_seed(tmp_path):
    write_coco(tmp_path / "all.json", coco_document(20), tmp_path / "images")
    splits = open_annotated(str(tmp_path / "all.json"), "detect", seed=1)
    assert [len(part) for part in splits.parts().values()] == [14, 2, 4]
    names = [part.name(i) for part in splits.parts().values() for i in range(len(part))]
    assert len(set(names)) == 20 and splits.json()["val"]["names"] == [splits.val.name(0), splits.val.name(1)]
    assert splits.json() == open_annotated(str(tmp_path), "detect", seed=1).json()
    assert splits.json() != open_annotated(str(tmp_path), "detect", seed=2).json()
    for part in splits.parts().values():
        for i in range(len(part)):
            assert part.target(i)["labels"][0] == int(part.name(i)[:-4]) % 2


@OLD_NUMPY
def test_coco_ground_truth_is_pycocotools_reading_of_the_file(tmp_path, capsys):
    from pycocotools.coco import COCO

    document = coco_document(4)
    write_coco(tmp_path / "train.json", document, tmp_path / "images")
    part, _ = open_annotated_part(str(tmp_path), "instance", "train")
    theirs, mine = COCO(str(tmp_path / "train.json")), COCO()
    mine.dataset = part.coco()
    mine.createIndex()
    assert mine.getImgIds() == [1, 2, 3, 4] and [c["name"] for c in mine.loadCats([1, 2])] == ["cat", "dog"]
    for position, record in enumerate(document["images"]):
        a, b = mine.loadAnns(mine.getAnnIds(position + 1)), theirs.loadAnns(theirs.getAnnIds(record["id"]))
        for one, other in zip(a, b, strict=True):
            assert one["bbox"] == other["bbox"] and one["iscrowd"] == other["iscrowd"] and one["area"] == other["area"]
            assert (mine.annToMask(one) == theirs.annToMask(other)).all()


def spoiled(change) -> dict:
    document = coco_document(6)
    change(document)
    return document


def set_(kind: str, index: int, **values) -> Callable[[dict], None]:
    return lambda document: document[kind][index].update(values)


ANNOTATION = {  # what is wrong with annotation 2: what it has instead
    "is on image 5, which is not among the images": {"image_id": 5},
    "is of category 4, which is not among the categories": {"category_id": 4},
    "its box [2, 1, 0, 4] is of zero size (0x4)": {"bbox": [2, 1, 0, 4]},
    "its box [25, 1, 4, 4] lies outside of the image, which is 20x10": {"bbox": [25, 1, 4, 4]},
    "its box [2, 1, 4] is not four numbers": {"bbox": [2, 1, 4]},
    "its polygon 1 has 2 points; three are the least": {"segmentation": [[1, 1, 2, 2]]},
    "its polygon 2 is not a list of numbers": {"segmentation": [[1, 1, 2, 2, 3, 1], [1, 1, 2, 2, 3, None]]},
    "its mask is of height and width [4, 4]": {"segmentation": {"size": [4, 4], "counts": [16]}},
    "its mask cannot be read": {"segmentation": {"size": [10, 20], "counts": [16]}},
    "has no segmentation; give --task detect": {"segmentation": []},
}
FAULTS = {f"annotation 2: {what}": set_("annotations", 2, **values) for what, values in ANNOTATION.items()} | {
    "annotation 1: is there twice": set_("annotations", 2, id=1),
    "image 17: is there twice": set_("images", 2, id=17),
    "category 3: is there twice": set_("categories", 0, id=3),
    "images/none.png does not exist": set_("images", 2, file_name="none.png"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_of_coco_files_are_named(message, tmp_path, capsys):
    write_coco(tmp_path / "train.json", coco_document(6), tmp_path / "images")
    (tmp_path / "train.json").write_text(json.dumps(spoiled(FAULTS[message])))
    with pytest.raises(UserError) as raised:
        open_annotated(str(tmp_path), "instance")
    assert message in str(raised.value) and f"muntin data check {tmp_path}" in str(raised.value)
    assert str(tmp_path / "train.json") in str(raised.value)
    splits = open_annotated(str(tmp_path), "instance", on_bad="skip")  # the rest is there
    assert len(splits.train) + len(splits.val) >= 5 and message in capsys.readouterr().err


def test_boxes_that_stick_out_are_cut_off(tmp_path):
    write_coco(tmp_path / "train.json", coco_document(6), tmp_path / "images")
    document = spoiled(set_("annotations", 0, bbox=[-1, 1, 4, 10]))
    (tmp_path / "train.json").write_text(json.dumps(document))
    assert open_annotated_part(str(tmp_path), "detect", None)[0].target(0)["boxes"][0].tolist() == [0, 1, 3, 10]


def test_an_image_of_another_size_than_declared_is_named(tmp_path):
    write_coco(tmp_path / "train.json", coco_document(6), tmp_path / "images")
    Image.new("RGB", (10, 20)).save(tmp_path / "images" / "0.png")
    part, _ = open_annotated_part(str(tmp_path), "detect", None)
    with pytest.raises(UserError, match=r"0\.png is 10x20 when upright, and its annotations say 20x10"):
        part.picture(0)
