"""Average precision against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from muntin.data.rle import encode_rle
from muntin.errors import UserError
from muntin.measure.coco import coco_metrics

HEIGHT, WIDTH = 200, 260
CATEGORIES = (3, 7, 8, 90)  # ids with gaps; of the last there is no object
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def ellipse(box):
    x, y, w, h = box
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 < 1


def random_box(random):
    w, h = random.uniform(5, 150, 2) * random.choice([0.3, 1.0])
    return [random.uniform(0, WIDTH - w), random.uniform(0, HEIGHT - h), w, h]


def random_case(seed, images=12):
    """Ground truth with crowds and images without objects, and results with ties, doubles and images without any."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 5 + 3 * i, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORIES],
        "annotations": [],
    }
    results = []
    for image in truth["images"]:
        for _ in range(random.integers(0, 7)):
            box, category = random_box(random), int(random.choice(CATEGORIES[:3]))
            crowd = bool(random.random() < 0.15)
            mask = ellipse(box)
            truth["annotations"].append(
                {
                    "id": 4 * len(truth["annotations"]),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": encode_rle(mask),
                }
            )
            for _ in range(random.integers(0, 3)):  # near the object, sometimes of another class
                near = [max(0.0, v + float(random.normal(0, 3))) for v in box]
                results.append(result(image["id"], near, category if random.random() < 0.8 else 8, random))
        for _ in range(random.integers(0, 4)):
            results.append(result(image["id"], random_box(random), int(random.choice(CATEGORIES)), random))
    many = truth["images"][0]["id"]
    results += [result(many, random_box(random), 3, random) for _ in range(120)]  # more than 100 of one class
    return truth, results


def result(image, box, category, random):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [float(v) for v in box],
        "score": round(float(random.random()), 1),
        "segmentation": encode_rle(ellipse([*box[:2], max(box[2], 1), max(box[3], 1)])),
    }


def pycocotools(truth, results, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "annotations": [dict(a, id=i + 1) for i, a in enumerate(truth["annotations"])]}
        coco.createIndex()
        left_out = "bbox" if kind == "segm" else "segmentation"
        loaded = coco.loadRes([{k: v for k, v in r.items() if k != left_out} for r in results])
        evaluation = COCOeval(coco, loaded, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def figures(found, name):
    """As pycocotools writes them: -1 where there is no object."""
    return [-1 if found[f"{name}_{stat}"] is None else found[f"{name}_{stat}"] for stat in STATS]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "name"), [("bbox", "box"), ("segm", "mask")])
def test_equal_to_pycocotools(seed, kind, name):
    truth, results = random_case(seed)
    theirs = pycocotools(truth, results, kind)
    ours = coco_metrics(truth, results, (kind,))
    assert figures(ours, name) == pytest.approx(theirs.stats[:6].tolist(), abs=1e-9)
    assert ours[f"{name}_ar100"] == pytest.approx(theirs.stats[8], abs=1e-9)
    assert 0.05 < ours[f"{name}_ap"] < 0.95  # neither nothing nor everything is found
    for k, row in enumerate(ours["per_class"][:3]):
        precision = theirs.eval["precision"][:, :, k, 0, -1]
        assert row[f"{name}_ap"] == pytest.approx(precision.mean(), abs=1e-9)
        assert row[f"{name}_ap50"] == pytest.approx(precision[0].mean(), abs=1e-9)
    curve = theirs.eval["precision"][0, :, :3, 0, -1].mean(1)
    assert ours[f"{name}_curve50"] == pytest.approx(curve, abs=1e-6)


def test_polygons_are_measured_as_pycocotools_does():
    random = np.random.default_rng(9)
    truth, results = random_case(9)
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        if not annotation["iscrowd"]:
            corners = random.uniform(0, 1, (7, 2)) * (w, h) + (x, y)
            annotation["segmentation"] = [corners.reshape(-1).tolist()]
    theirs = pycocotools(truth, results, "segm")
    ours = coco_metrics(truth, results, ("segm",))
    assert figures(ours, "mask") == pytest.approx(theirs.stats[:6].tolist(), abs=1e-9)


def test_what_is_given_stays_as_it_was():
    truth, results = random_case(1, images=3)
    before = repr((truth, results))
    coco_metrics(truth, results)
    assert repr((truth, results)) == before


def test_figures_without_objects_are_none_and_counts_leave_crowds_out():
    truth, results = random_case(2)
    found = coco_metrics(truth, results)
    assert found["per_class"][3]["objects"] == 0
    assert {v for k, v in found["per_class"][3].items() if k.startswith(("box", "mask"))} == {None}
    assert found["objects"] == sum(not a["iscrowd"] for a in truth["annotations"])
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] >= 32**2]
    assert coco_metrics(truth, results)["box_ap_small"] is None


def test_no_results_are_a_precision_of_zero():
    truth, _ = random_case(0)
    found = coco_metrics(truth, [])
    assert found["box_ap"] == found["mask_ap50"] == found["box_ar100"] == 0


def test_refusals():
    truth, results = random_case(0)
    crowds = {**truth, "annotations": [a for a in truth["annotations"] if a["iscrowd"]]}
    with pytest.raises(UserError, match="none of the 12 images has an object"):
        coco_metrics(crowds, results)
    with pytest.raises(UserError, match="a result is of image 4,"):
        coco_metrics(truth, [{**results[0], "image_id": 4}])
    with pytest.raises(UserError, match="a result is of category 4;"):
        coco_metrics(truth, [{**results[0], "category_id": 4}])
    with pytest.raises(UserError, match='has no "segmentation"'):
        coco_metrics(truth, [{k: v for k, v in results[0].items() if k != "segmentation"}])
    with pytest.raises(UserError, match="no kind of result keypoints; valid are bbox, segm"):
        coco_metrics(truth, results, ("keypoints",))
