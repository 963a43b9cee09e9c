"""The page about a run of detection or segmentation: self-contained, escaped, and honest about what is missing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import muntin
from muntin.measure import report, summary
from muntin.run import Run, atomic_write, save_model, write_json
from muntin.tasks.dense_evaluation import DetectionEvaluation, SegmentationEvaluation

CLASSES = ["<b>cat", "d&g", "bird"]
PREPROCESSING = {
    "size": [64, 64],
    "resize": None,
    "fit": {"shorter": 64, "longer": 128},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
    "channels": "RGB",
}
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
TINY = {"dims": (32, 32, 32), "depths": (1, 1, 1), "heads": (2, 2, 2)}


class Page(HTMLParser):
    """What a reader sees, and whatever would be fetched."""

    def __init__(self, path):
        super().__init__()
        self.text, self.ids, self.fetched, self.links = "", set(), [], set()
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert tag not in ("script", "link", "iframe", "b<", "cat")
        self.ids |= {found["id"]} if "id" in found else set()
        self.fetched += [found["src"]] if "src" in found else []
        self.links |= {found["href"]} if tag == "a" else set()

    def handle_data(self, data):
        self.text += data


def saved(folder, head, metric):
    small = {"channels": 16} | ({"width": 16} if head == "semantic_fpn" else {"fc": 16, "mask_channels": 16})
    model = muntin.create_dense(head, "efficientvit_m0", 3, head_config=small, **TINY)
    save_model(folder / "model.safetensors", model, classes=CLASSES, preprocessing=PREPROCESSING)
    Run.open(folder).update_metrics(
        data="pets <1>", epochs=2, seconds=100.0, best_epoch=2, latency_ms=12.3, parameters=9
    )
    loss = "train_loss,val_loss" if metric == "miou" else "train_loss"
    rows = "".join(f"{epoch}{',0.5' * loss.count('loss')},0.{epoch},0.001,50\n" for epoch in (1, 2))
    atomic_write(folder / "history.csv", f"epoch,{loss},val_{metric},lr,seconds\n{rows}".encode())
    return folder


@pytest.fixture
def detection(tmp_path):
    folder = saved(tmp_path / "a run", "mask_rcnn", "mask_ap")
    figures = {f"{kind}_{name}": 0.1 * i for kind in ("box", "mask") for i, name in enumerate(FIGURES)}
    curve = np.linspace(1, 0, 101).tolist()
    found = DetectionEvaluation(
        data="pets <1>",
        split="test",
        images=12,
        objects=345,
        classes=CLASSES,
        figures=figures | {"box_ap": 0.4321, "mask_ap": 0.1234, "box_ap_large": None},
        curves={"box_curve50": curve, "mask_curve50": curve},
        per_class=[{"class": name, "objects": 115, **figures} for name in CLASSES],
    )
    write_json(folder / "evaluation.json", found.json())
    return folder


def test_a_page_about_a_detector(detection):
    (detection / "pictures").mkdir()
    Image.new("RGB", (1500, 700), (9, 99, 199)).save(detection / "pictures" / "12<i>.png")
    path = report(str(detection))
    page = Page(path)
    assert path == detection / "report.html" and len(page.html) < 200_000
    assert {"training", "accuracy", "pictures", "latency", "configuration", "reproduce"} <= page.ids
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert page.fetched and all(source.startswith("data:image/") for source in page.fetched)
    assert not re.search(r"https?://|@import|url\(", page.html) and "<b>cat" not in page.html
    for said in ("43.2%", "12.3%", "test box AP", "345 objects on 12 images", *CLASSES, "pets <1>", "12<i>", "12.3 ms"):
        assert said in page.text, said
    Run.open(detection).update_metrics(split="test", box_ap=0.4321, mask_ap=0.1234, val_mask_ap=0.2)
    told = summary(Run.open(detection))
    assert "mask_rcnn on efficientvit_m0, 9 parameters" in told and re.search(r"test box AP +43.21%", told)
    assert "mask_rcnn on efficientvit_m0" in page.text and "head fc" in page.text
    assert "after epoch 2 of 2" in page.text and "shorter 64, longer 128" in page.text
    assert page.html.count('class="line s0"') == 4 and page.html.count('class="line s1"') == 1  # no validation loss
    assert "precision 95.0% at a recall of 5%" in page.html


def test_a_page_about_a_segmenter_and_what_is_missing(tmp_path):
    folder = saved(tmp_path / "a run", "semantic_fpn", "miou")
    page = Page(report(folder))
    assert f"muntin eval '{folder}'" in page.text and f"muntin predict '{folder}' IMAGES" in page.text
    assert f"muntin bench '{folder}'" in page.text
    many = [f"class {i}" for i in range(60)]
    found = SegmentationEvaluation(
        data="x",
        split="val",
        images=1,
        pixels=12345,
        miou=0.56789,
        macc=0.6,
        aacc=0.7,
        classes=many,
        per_class=[
            {"class": name, "iou": None if i == 9 else 1 - i / 60, "acc": 0.5, "pixels": 7}
            for i, name in enumerate(many)
        ],
    )
    write_json(folder / "evaluation.json", json.loads(json.dumps(found.json())))
    page = Page(report(folder))
    assert "56.8%" in page.text and "12,345 annotated pixels of 1 image," in page.text
    assert "The 40 classes with the lowest figures of 60." in page.text
    assert "class 59" in page.text and "class 20" in page.text and "class 19" not in page.text
    assert page.html.count('class="line s0"') == 3 and page.html.count('class="line s1"') == 1
