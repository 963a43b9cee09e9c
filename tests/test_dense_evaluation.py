"""Evaluation and prediction of detectors and segmenters on files: figures, what is written, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import muntin
from muntin.data.annotated import open_annotated_part
from muntin.data.images import open_image
from muntin.data.rle import decode_rle, encode_rle
from muntin.errors import UserError
from muntin.tasks.dense_evaluation import evaluate_detection, evaluate_segmentation
from muntin.tasks.dense_prediction import predict_dense, write_samples

SIDE = 64
PREPROCESSING = {"fit": {"shorter": SIDE, "longer": None}, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SMALL = {"channels": 16, "fc": 32, "mask_channels": 16, "proposals": (50, 50), "detections": 20}
CLASSES = ["red", "green", "blue"]


class Bright(nn.Module):
    """Finds one object for each channel: all pixels that are bright in it."""

    task = "instance"
    num_classes = 3
    head_config = SimpleNamespace(nms=0.5, detections=9)

    def forward(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        found = []
        for channel, values in enumerate(image):
            rows, columns = (values > 0.5).any(1).nonzero()[:, 0], (values > 0.5).any(0).nonzero()[:, 0]
            if len(rows):
                box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
                x1, y1, x2, y2 = box.int().tolist()
                mask = F.interpolate((values[None, None, y1:y2, x1:x2] > 0.5).float(), (28, 28), mode="bilinear")
                found.append((box, 0.9 - 0.2 * channel, channel, mask[0, 0]))
        return {
            "boxes": torch.stack([box for box, *_ in found]) if found else torch.zeros(0, 4),
            "scores": torch.tensor([score for _, score, *_ in found]),
            "labels": torch.tensor([label for *_, label, _ in found], dtype=torch.long),
            "masks": torch.stack([mask for *_, mask in found]) if found else torch.zeros(0, 28, 28),
        }


class Brightest(nn.Module):
    """Labels a pixel by its largest channel."""

    task = "segment"
    num_classes = 3

    def forward(self, images):
        return 9 * images


def rectangles(seed):
    """An image of one rectangle in each of two channels, and where they are: (class, x, y, w, h)."""
    random = np.random.default_rng(seed)
    pixels, found = np.zeros((SIDE, 80, 3), np.uint8), []
    for channel in random.choice(3, 2, replace=False):
        x, y, w, h = (int(v) for v in random.integers((0, 0, 10, 10), (40, 30, 40, 34)))
        pixels[y : y + h, x : x + w, channel] = 255
        found.append((int(channel), x, y, w, h))
    return Image.fromarray(pixels), found


@pytest.fixture
def coco(tmp_path):
    """Six images in COCO's folders, of which the last has nothing on it."""
    tmp_path = tmp_path / "coco"
    images, annotations = [], []
    (tmp_path / "test").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    for number in range(6):
        picture, found = rectangles(number) if number < 5 else (Image.new("RGB", (80, SIDE)), [])
        picture.save(tmp_path / "test" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": SIDE})
        for channel, x, y, w, h in found:
            mask = np.zeros((SIDE, 80), bool)
            mask[y : y + h, x : x + w] = True
            fields = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": encode_rle(mask)}
            annotations.append({"id": len(annotations), "image_id": number, "category_id": channel} | fields)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_test.json").write_text(json.dumps(document))
    return tmp_path


@pytest.fixture
def label_maps(tmp_path):
    """Four images with index masks, a band of which is not annotated."""
    tmp_path = tmp_path / "maps"
    for part in ("images", "masks"):
        (tmp_path / part / "test").mkdir(parents=True)
    for number in range(4):
        picture, _ = rectangles(number)
        labels = np.asarray(picture).argmax(-1).astype(np.uint8)
        labels[:5] = 255
        picture.save(tmp_path / "images" / "test" / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / "masks" / "test" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path


def test_a_detector_that_finds_everything_has_an_ap_of_one(coco):
    annotated, split = open_annotated_part(str(coco), "instance", "test")
    found = evaluate_detection(Bright().eval(), annotated, PREPROCESSING, data="shapes", split=split)
    assert found.figures["box_ap"] == found.figures["mask_ap"] == found.score == 1
    assert found.figures["box_ap_large"] is None and found.figures["box_ap50"] == 1
    assert found.images == 6 and found.objects == 10 and found.classes == CLASSES
    assert [row["box_ap"] for row in found.per_class] == [1, 1, 1]
    assert found.curves["mask_curve50"] == [1] * 101
    assert json.loads(json.dumps(found.json()))["per_class"] == found.per_class
    assert set(found.metrics()) >= {"box_ap", "mask_ap", "box_ap_small"}
    text = str(found)
    assert "shapes, test: 6 images, 10 objects" in text and "masks     100.0%" in text
    flipped = evaluate_detection(Bright().eval(), annotated, PREPROCESSING, data="shapes", split=split, flip=True)
    assert flipped.figures == found.figures


def test_what_is_missed_and_mistaken_lowers_the_figures(coco):
    annotated, _ = open_annotated_part(str(coco), "detect", "test")
    model = Bright().eval()
    missing = model.find
    model.find = lambda image: {k: v[:1] for k, v in missing(image).items()}  # the second of two objects
    found = evaluate_detection(model, annotated, PREPROCESSING, data="shapes", split="test")
    shares = [row["box_ap"] for row in found.per_class]
    assert "mask_ap" not in found.figures and not found.masks and shares[0] == 1
    assert found.figures["box_ap"] == found.score == pytest.approx(np.mean(shares)) and found.score < 0.9


def test_classes_are_matched_by_name(coco, label_maps):
    more = ["blue", "yellow", "green", "red"]

    class Reordered(Bright):
        num_classes = 4

        def find(self, image):
            found = super().find(image)
            return found | {"labels": torch.tensor([3, 2, 0])[found["labels"]]}

    annotated, _ = open_annotated_part(str(coco), "instance", None)
    found = evaluate_detection(Reordered().eval(), annotated, PREPROCESSING, data="shapes", split="test", classes=more)
    assert found.score == 1 and found.per_class[1]["box_ap"] is None and found.classes == more

    class Turned(Brightest):
        num_classes = 4

        def forward(self, images):
            red, green, blue = (9 * images).unbind(1)
            return torch.stack([blue, torch.full_like(blue, -1), green + 0.01, red + 0.02], 1)  # ties are the first's

    annotated, _ = open_annotated_part(str(label_maps), "segment", "test")
    compared = evaluate_segmentation(
        Turned().eval(), annotated, PREPROCESSING, data="shapes", split="test", classes=more
    )
    assert compared.miou == 1 and compared.per_class[1]["iou"] is None


def test_a_segmenter_is_compared_at_the_images_size_without_what_is_ignored(label_maps):
    annotated, split = open_annotated_part(str(label_maps), "segment", "test")
    found = evaluate_segmentation(Brightest().eval(), annotated, PREPROCESSING, data="shapes", split=split)
    assert found.miou == found.macc == found.aacc == found.score == 1
    assert found.pixels == 4 * (SIDE - 5) * 80 and found.metrics()["miou"] == 1
    assert "shapes, test: 4 images, mIoU 100.00%" in str(found)
    slid = evaluate_segmentation(
        Brightest().eval(), annotated, PREPROCESSING, data="shapes", split=split, crop=(40, 40), flip=True
    )
    assert slid.miou == 1
    half = PREPROCESSING | {"fit": {"shorter": 16, "longer": None}}
    coarse = evaluate_segmentation(Brightest().eval(), annotated, half, data="shapes", split=split)
    assert 0.6 < coarse.miou < 1


def test_predictions_are_files_that_can_be_trained_on(coco, tmp_path):
    (coco / "test" / "broken.png").write_bytes(b"not an image")
    found = predict_dense(Bright().eval(), CLASSES, PREPROCESSING, [coco / "test"], tmp_path / "out")
    assert str(found) == f"{tmp_path / 'out'}: 6 images, 10 objects, 1 more could not be read"
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    (broken,) = written["errors"]
    assert broken["file_name"].endswith("broken.png") and "broken.png is not a readable image" in broken["error"]
    assert {row["image_id"] for row in written["annotations"]} < {row["id"] for row in written["images"]}
    names = {row["id"]: row["file_name"] for row in written["images"]}
    for row in written["annotations"]:
        _, truth = rectangles(int(names[row["image_id"]].rpartition("/")[2].removesuffix(".png")))
        assert [row["category_id"] - 1, *row["bbox"]] in [list(box) for box in truth]
        assert row["area"] == decode_rle(row["segmentation"]).sum() == row["bbox"][2] * row["bbox"][3]
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == [f"{i}.png" for i in range(6)]
    assert open_image(tmp_path / "out" / "pictures" / "0.png").size == (560, 448)
    annotated, _ = open_annotated_part(str(tmp_path / "out" / "predictions.json"), "instance", None)
    assert evaluate_detection(Bright().eval(), annotated, PREPROCESSING, data="again", split="all").score == 1


def test_thresholds_and_pictures_of_predictions(coco, tmp_path):
    few = predict_dense(
        Bright().eval(), CLASSES, PREPROCESSING, [coco / "test"], tmp_path / "out", threshold=0.6, pictures=False
    )
    assert 0 < few.objects < 10 and not (tmp_path / "out" / "pictures").exists()
    with pytest.raises(UserError, match="from 0 to 1"):
        predict_dense(Bright().eval(), CLASSES, PREPROCESSING, [coco / "test"], tmp_path / "out", threshold=60)


def test_label_maps_are_index_images_with_a_palette(label_maps, tmp_path):
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    (label_maps / "other").mkdir()
    rectangles(9)[0].save(label_maps / "other" / "0.png")  # of the same name
    inputs = [label_maps / "images", label_maps / "other"]
    found = predict_dense(Brightest().eval(), CLASSES, PREPROCESSING, inputs, tmp_path / "out", palette=palette)
    assert found.images == 5 and found.objects is None
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["label_map"] for row in written["images"]] == [f"labels/{n}.png" for n in ("0", "1", "2", "3", "0-2")]
    for row, seed in zip(written["images"], (0, 1, 2, 3, 9), strict=True):
        truth = np.asarray(rectangles(seed)[0]).argmax(-1)
        with Image.open(tmp_path / "out" / row["label_map"]) as label_map:
            assert label_map.mode == "P" and label_map.getpalette()[:9] == [v for colour in palette for v in colour]
            assert (np.asarray(label_map) == truth).all()
        assert row["share"]["red"] == pytest.approx((truth == 0).mean(), abs=1e-4)


def test_samples_show_truth_beside_prediction(coco, label_maps, tmp_path):
    for data, task, model in ((coco, "instance", Bright()), (label_maps, "segment", Brightest())):
        annotated, _ = open_annotated_part(str(data), task, None)
        paths = write_samples(model.eval(), annotated, PREPROCESSING, tmp_path / task, count=3)
        assert len(paths) == 3 and paths == write_samples(
            model.eval(), annotated, PREPROCESSING, tmp_path / task, count=3
        )
        for path in paths:
            sheet = np.asarray(open_image(path))
            assert sheet.shape[1] > 2 * 560 and sheet.shape[0] > 448


def test_a_real_model_is_evaluated_and_predicts(coco, label_maps, tmp_path):
    detector = muntin.create_dense("mask_rcnn", "efficientvit_m0", 3, head_config=SMALL).eval()
    annotated, split = open_annotated_part(str(coco), "instance", None)
    evaluated = evaluate_detection(detector, annotated, PREPROCESSING, data="shapes", split=split, flip=True)
    assert 0 <= evaluated.score < 0.5
    segmenter = muntin.create_dense("semantic_fpn", "efficientvit_m0", 3).eval()
    annotated, split = open_annotated_part(str(label_maps), "segment", None)
    compared = evaluate_segmentation(segmenter, annotated, PREPROCESSING, data="shapes", split=split, crop=(40, 50))
    assert 0 <= compared.miou < 0.9 and compared.pixels == 4 * (SIDE - 5) * 80


def test_refusals(coco, label_maps, tmp_path):
    annotated, _ = open_annotated_part(str(coco), "instance", None)
    with pytest.raises(UserError, match="class 'green' that the model was not trained on .did you mean 'greens'"):
        evaluate_detection(
            Bright().eval(), annotated, PREPROCESSING, data="x", split="test", classes=["red", "greens", "blue"]
        )
    other = Bright().eval()
    other.num_classes = 7
    with pytest.raises(UserError, match="the model has 7 classes and x has 3"):
        evaluate_detection(other, annotated, PREPROCESSING, data="x", split="test")
    with pytest.raises(UserError, match="none of the 6 images has an object|none of the 1 images has an object"):
        evaluate_detection(Bright().eval(), annotated.select([5]), PREPROCESSING, data="x", split="test")
    (coco / "test" / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"3.png is empty"):
        evaluate_detection(Bright().eval(), annotated, PREPROCESSING, data="x", split="test")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 1 images could be read, as .*bad.png"):
        predict_dense(Bright().eval(), CLASSES, PREPROCESSING, [tmp_path / "bad.png"], tmp_path / "out")
