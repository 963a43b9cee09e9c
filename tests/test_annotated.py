"""Annotated images: readers, splits, the built-in scenes, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from muntin.cli import main
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


def write_voc(root: Path, stems: list[str]) -> None:
    """Images of 20x10 with a dog, a difficult cat, and masks of both."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    things = [("dog", 3, 2, 6, 5, 0), ("cat", 11, 1, 13, 10, 1)]
    objects = "".join(
        f"<object><name>{name}</name><part><bndbox><xmin>1</xmin></bndbox></part><difficult>{hard}</difficult><bndbox>"
        f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, hard in things
    )
    size = "<size><width>20</width><height>10</height><depth>3</depth></size>"
    kinds = {"SegmentationClass": (12, 8), "SegmentationObject": (1, 2)}
    for stem in stems:
        Image.new("RGB", (20, 10)).save(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        for folder, values in kinds.items():
            labels = np.zeros((10, 20), np.uint8)
            labels[1:5, 2:6], labels[0:10, 10:13], labels[0, 0] = *values, 255
            mask = Image.fromarray(labels)
            mask.putpalette([value for i in range(256) for value in (i, i // 2, 7)])
            mask.save(root / folder / f"{stem}.png")


@pytest.fixture
def voc(tmp_path):
    write_voc(tmp_path, ["a", "b", "c"])
    for kind in ("Main", "Segmentation"):
        lists = tmp_path / "ImageSets" / kind
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("c\na\n")
        (lists / "val.txt").write_text("b\n")
        (lists / "trainval.txt").write_text("a\nb\nc\n")
    return tmp_path


def test_voc_boxes(voc):
    splits = open_annotated(str(voc), "detect")
    assert (len(splits.train), len(splits.val), splits.test) == (2, 1, None)
    assert len(splits.train.classes) == 20 and splits.train.name(0) == "c.jpg" and not splits.train.masks
    target = splits.val.target(0)
    assert target["boxes"].tolist() == [[2, 1, 6, 5], [10, 0, 13, 10]] and target["crowd"].tolist() == [False, True]
    assert [splits.train.classes[label] for label in target["labels"]] == ["dog", "cat"]


def test_voc_masks(voc):
    part, name = open_annotated_part(str(voc), "instance", "val")
    target = part.target(0)
    assert target["boxes"].tolist() == [[2, 1, 6, 5], [10, 0, 13, 10]] and target["area"].tolist() == [16, 30]
    assert [part.classes[label] for label in target["labels"]] == ["dog", "cat"]
    assert target["masks"][0, 1:5, 2:6].all() and target["masks"].sum((1, 2)).tolist() == [16, 30]


def test_voc_labels(voc):
    part, _ = open_annotated_part(str(voc), "segment", "train")
    labels = part.target(0)["labels"]
    assert part.classes[:2] == ["background", "aeroplane"] and len(part.classes) == 21 == len(part.palette)
    assert part.palette[12] == (12, 6, 7) and labels.dtype == torch.uint8
    assert labels[1:5, 2:6].eq(12).all() and labels[0, 0] == 255 and labels[9, 19] == 0


def test_faults_of_voc_files_are_named(voc):
    path = voc / "Annotations" / "a.xml"
    for wrong, message in (
        (("<xmax>6</xmax>", "<xmax>2</xmax>"), r"a\.xml: object 1 \(dog\): its box .* is of zero size"),
        (("</annotation>", ""), r"a\.xml: cannot be read"),
        (("<ymin>2</ymin>", "<ymin>x</ymin>"), r"object 1 \(dog\): its box .* is not four numbers"),
    ):
        kept = path.read_text()
        path.write_text(kept.replace(*wrong))
        with pytest.raises(UserError, match=message):
            open_annotated(str(voc), "detect")
        path.write_text(kept)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jpg: has no .*a\.xml"):
        open_annotated(str(voc), "detect")


def write_maps(root: Path, names: list[str], values: tuple[int, ...], masks: str = "masks", mode: str = "L") -> None:
    """images/NAME.jpg and MASKS/NAME.png, of 8x6 pixels with these values."""
    for name in names:
        image, mask = root / "images" / f"{name}.jpg", root / masks / f"{name}.png"
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(image)
        Image.fromarray(np.resize(np.asarray(values, np.uint8), (6, 8))).convert(mode).save(mask)


def test_ade20k(tmp_path):
    write_maps(tmp_path, ["training/b", "training/a", "validation/c"], (0, 1, 150), "annotations")
    rows = "".join(f"{i}\t0.1\t1\t1\t0\tname {i}, other\n" for i in range(1, 151))
    splits = open_annotated(str(tmp_path), "segment")
    assert splits.train.classes[149] == "150"
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    splits = open_annotated(str(tmp_path), "segment")
    assert splits.train.classes[:2] == ["name 1", "name 2"] and len(splits.train.classes) == 150
    assert splits.train.target(0)["labels"][0, :3].tolist() == [255, 0, 149]
    assert [splits.train.name(i) for i in range(2)] == ["a.jpg", "b.jpg"] and splits.test is None


@pytest.mark.parametrize("folder", ["masks", "labels", "annotations"])
def test_folders_of_index_masks(folder, tmp_path):
    write_maps(tmp_path, ["train/x", "train/y", "val/x", "test/x"], (0, 2, 255), folder)
    splits = open_annotated(str(tmp_path), "segment")
    assert [len(part) for part in splits.parts().values()] == [2, 1, 1] and splits.train.classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text('["road", "car", "sky", "tree"]')
    assert open_annotated(str(tmp_path), "segment").val.classes == ["road", "car", "sky", "tree"]
    assert splits.test.target(0)["labels"][0, :3].tolist() == [0, 2, 255]


def test_folders_of_index_masks_without_parts_are_split(tmp_path):
    write_maps(tmp_path, [f"a/{i}" for i in range(10)], (0, 1))
    splits = open_annotated(str(tmp_path), "segment", seed=3)
    assert [len(part) for part in splits.parts().values()] == [7, 1, 2] and splits.drawn


def test_palettes_are_kept_and_grey_may_be_stored_as_colours(tmp_path):
    write_maps(tmp_path, ["train/a", "val/a"], (0, 1, 2), mode="RGB")
    part, _ = open_annotated_part(str(tmp_path), "segment", "train")
    assert part.palette is None and part.classes == ["0", "1", "2"]
    path = tmp_path / "masks/train/a.png"
    with Image.open(path) as stored:
        mask = stored.convert("L")
    mask.putpalette([9, 8, 7, 1, 2, 3, 4, 5, 6])
    mask.save(path)
    again, _ = open_annotated_part(str(tmp_path), "segment", "train")
    assert again.palette == [(9, 8, 7), (1, 2, 3), (4, 5, 6)]
    assert torch.equal(again.target(0)["labels"], part.target(0)["labels"])


def test_faults_of_index_masks_are_named(tmp_path):
    write_maps(tmp_path, ["train/a", "train/b", "val/a"], (0, 1, 2))
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    part, _ = open_annotated_part(str(tmp_path), "segment", "train")
    with pytest.raises(UserError, match=r"train.a\.png has the labels 2, but there are 2 classes"):
        part.target(0)
    path = tmp_path / "masks/train/a.png"
    Image.new("L", (6, 8)).save(path)
    with pytest.raises(UserError, match=r"train.a\.png is 6x8, and its image .*a\.jpg 8x6 when upright"):
        part.target(0)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    with pytest.raises(UserError, match=r"train.a\.png holds colours"):
        part.target(0)
    path.unlink()
    with pytest.raises(UserError, match=r"train.a\.jpg: has no mask .*a\.png.*muntin data check"):
        open_annotated(str(tmp_path), "segment")
    assert len(open_annotated_part(str(tmp_path), "segment", "train", on_bad="skip")[0]) == 1
    (tmp_path / "images/train/a.jpg").unlink()
    Image.new("L", (8, 6)).save(path)
    with pytest.raises(UserError, match=r"train.a\.png: has no image of this name"):
        open_annotated(str(tmp_path), "segment")


@pytest.mark.parametrize(("task", "message"), [
    ("detect", "has index masks, but detect needs objects"), ("box", "task 'box' is unknown"),
])  # fmt: skip
def test_data_of_another_task_are_refused(task, message, tmp_path):
    write_maps(tmp_path, ["train/a", "val/a"], (0, 1))
    with pytest.raises(UserError, match=message):
        open_annotated(str(tmp_path), task)


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no data at"):
        open_annotated(str(tmp_path / "none"), "detect")
    with pytest.raises(UserError, match="has no annotations that Muntin knows"):
        open_annotated(str(tmp_path), "detect")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="has no list 'images'"):
        open_annotated(str(tmp_path / "a.json"), "detect")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        open_annotated(str(tmp_path), "detect")
    write_coco(tmp_path / "a.json", coco_document(2), tmp_path)
    with pytest.raises(UserError, match="has 2 images, too few to split"):
        open_annotated(str(tmp_path), "detect")
    with pytest.raises(UserError, match="has objects .COCO., but segment needs index masks"):
        open_annotated(str(tmp_path), "segment")
    with pytest.raises(UserError, match="has no part val, but all"):
        open_annotated_part(str(tmp_path), "detect", "val")


def test_a_run_goes_on_with_the_same_data_only(tmp_path):
    write_coco(tmp_path / "all.json", coco_document(20), tmp_path / "images")
    stored = json.loads(json.dumps(open_annotated(str(tmp_path), "detect").json()))
    open_annotated(str(tmp_path), "detect").refuse_changed("all.json", stored)
    document = coco_document(20)
    document["annotations"][3]["bbox"][0] += 1
    (tmp_path / "all.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="part is not what the run's split.json says"):
        open_annotated(str(tmp_path), "detect").refuse_changed("all.json", stored)
    document = coco_document(20)
    document["categories"][0]["name"] = "wolf"
    (tmp_path / "all.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="split.json"):
        open_annotated(str(tmp_path), "detect").refuse_changed("all.json", stored)


@pytest.mark.parametrize("task", ["instance", "segment"])
def test_a_selection_has_what_its_images_had(task, scenes):
    part, _ = open_annotated_part(str(scenes), task, "train")
    some = part.select([5, 2, 2])
    assert [some.name(i) for i in range(3)] == [part.name(i) for i in (5, 2, 2)]
    for i, position in enumerate((5, 2, 2)):
        mine, theirs = some.target(i), part.target(position)
        assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert some.picture(i) == part.picture(position)
    assert some.digest() != part.digest() == part.select(range(len(part))).digest()
    assert len(part.select([])) == 0


def faulty_coco(root: Path) -> list[str]:
    """A file with everything wrong at once, and what has to be found."""
    document = coco_document(24)
    document["annotations"] = document["annotations"][:23]  # the last image is a negative
    expected = []
    for number, (what, values) in enumerate(ANNOTATION.items()):
        document["annotations"][number] |= values
        expected.append(f"annotation {number}: {what}")
    document["annotations"][20]["id"] = 21
    document["annotations"][19]["segmentation"] = [[30, 30, 40, 30, 40, 40]]
    document["images"][22] |= {"file_name": "none.png"}
    document["images"].append(document["images"][0])
    document["categories"].append(document["categories"][0])
    write_coco(root / "train.json", document, root / "images")
    (root / "images" / "none.png").unlink()
    Image.new("RGB", (10, 20)).save(root / "images" / "17.png")
    (root / "images" / "16.png").write_bytes((root / "images" / "15.png").read_bytes()[:45])
    return [
        *expected,
        "annotation 21: is there twice",
        "19.png: annotation 19: its mask has no pixels in the image",
        "none.png does not exist",
        "image 7: is there twice",
        "category 90: is there twice",
        "17.png is 10x20 when upright, and its annotations say 20x10",
        "16.png is damaged",
    ]


def test_all_that_is_wrong_is_listed(tmp_path, capsys):
    expected = faulty_coco(tmp_path)
    code = main(["data", "check", str(tmp_path), "--task", "instance", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert code == 2 and f"{len(expected)} problems" in text
    assert [message for message in expected if message not in text] == []
    assert "the 2 category ids have gaps (3 to 90)" in text and "images have no objects; they are kept" in text
    with open(tmp_path / "out" / "problems-instance.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected) and {"annotation 1", "image 7"} <= {row["item"] for row in rows}
    with Image.open(tmp_path / "out" / "samples-instance-train.png") as sheet:
        assert sheet.width > 4 * 100
    part, _ = open_annotated_part(str(tmp_path), "instance", "train", on_bad="skip")
    assert len(part) == 23 and sum(len(part.target(i)["labels"]) for i in range(23)) == 11


def test_label_maps_are_checked(tmp_path, capsys):
    write_maps(tmp_path, [f"train/{i}" for i in range(5)] + ["val/a"], (0, 1, 255))
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    assert main(["data", "check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "segment, 3 classes" in text and "nothing is wrong" in text and "train has nothing of sky" in text
    masks = tmp_path / "masks" / "train"
    Image.new("L", (8, 6), 9).save(masks / "0.png")
    Image.new("L", (9, 6)).save(masks / "1.png")
    (masks / "2.png").write_bytes(b"no PNG")
    (masks / "3.png").unlink()
    Image.new("L", (8, 6)).save(masks / "7.png")
    assert main(["data", "check", str(tmp_path)]) == 2
    text = capsys.readouterr().out
    for message in (
        "0.png has the labels 9", "1.png is 9x6", "2.png is not a readable image", "3.jpg: has no mask",
        "7.png: has no image", "5 problems",
    ):  # fmt: skip
        assert message in text


def test_voc_folders_are_checked_for_each_task_they_are_for(voc, capsys):
    assert main(["data", "check", str(voc)]) == 0
    text = capsys.readouterr().out
    assert all(f"{voc}: {task}, " in text for task in ("detect", "instance", "segment"))
    path = voc / "SegmentationObject" / "a.png"
    Image.new("L", (20, 10), 1).save(path)  # one object, mostly background
    assert main(["data", "check", str(voc), "--task", "instance"]) == 2
    assert f"{path}: object 1: most of its pixels have the class 0; valid are 1 to 20" in capsys.readouterr().out


def test_boxes_that_do_not_fit_their_masks_are_noted(tmp_path, capsys):
    write_coco(tmp_path / "train.json", coco_document(4), tmp_path / "images")
    document = spoiled(set_("annotations", 2, bbox=[12, 1, 4, 4]))
    document["images"], document["annotations"] = document["images"][:4], document["annotations"][:4]
    (tmp_path / "train.json").write_text(json.dumps(document))
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "1 boxes do not fit their masks, the first: 2.png: annotation 2" in capsys.readouterr().out


def test_the_check_refuses_what_it_does_not_know(tmp_path, capsys):
    for arguments, message in (
        (["check", str(tmp_path / "none")], "there is no data at"),
        (["check", str(tmp_path)], "has no annotations that Muntin knows"),
        (["check", "scenes", "--task", "box"], "task 'box' is unknown"),
        (["mend", "scenes"], "there is no such action; valid is check"),
    ):
        assert main(["data", *arguments]) == 2
        assert message in capsys.readouterr().err
