"""COCO's average precision of boxes and masks, computed by faster-coco-eval, equal to pycocotools.

T IoU thresholds (.5 to .95 by .05), R = 101 recalls, K classes, A areas (all, small, medium, large), M limits of
detections an image (the last one 100)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from muntin.errors import UserError

KINDS = {"bbox": "box", "segm": "mask"}  # COCO's words and those of our figures
AREAS = ("small", "medium", "large")  # below 32 x 32 pixels, below 96 x 96, and above
IOU50, IOU75, ALL = 0, 5, 0


def coco_metrics(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kinds: Sequence[str] = ("bbox", "segm")
) -> dict[str, Any]:
    """Average precision and recall over all classes, and of each.

    ground_truth: COCO's images, annotations (with area, and iscrowd where it is one) and categories. results: COCO's
    format, image_id, category_id, score and bbox (x, y, width, height) or segmentation (run lengths); masks are sorted
    into sizes by their own area. kinds: of "bbox" and "segm".

    Returns shares of 0..1: for boxes `box_ap` (IoU .5:.95), `box_ap50`, `box_ap75`, `box_ap_small`, `_medium`,
    `_large` and `box_ar100`, and `box_curve50`, the classes' mean precision at IoU .5 for recalls 0, .01, ... 1; for
    masks the same from `mask_ap` on; `images`, `objects` (crowds are none); `per_class`, rows of the same figures with
    `class` and `objects`. A figure for which there is no object is None.

    Raises `UserError` where nothing can be measured: no object, results of unknown images or classes, or no masks.
    """
    objects = Counter(a["category_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0))
    _check(ground_truth, results, objects, kinds)
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    found: dict[str, Any] = {"images": len(ground_truth["images"]), "objects": sum(objects.values())}
    rows: list[dict[str, Any]] = [{"class": c["name"], "objects": objects[c["id"]]} for c in categories]
    for kind in kinds:
        precision, recall = _accumulated(ground_truth, results, kind)
        found |= _figures(KINDS[kind], precision, recall)
        curves = precision[IOU50, :, :, ALL, -1]  # R K
        known = curves[:, (curves > -1).all(0)]
        found[f"{KINDS[kind]}_curve50"] = [round(float(p), 6) for p in known.mean(1)]
        for k, row in enumerate(rows):
            row |= _figures(KINDS[kind], precision[:, :, k : k + 1], recall[:, k : k + 1])
    return found | {"per_class": rows}


def _check(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], objects: Counter, kinds: Sequence[str]
) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"there is no kind of result {', '.join(unknown) or 'given'}; valid are {', '.join(KINDS)}")
    if not objects:
        raise UserError(
            f"none of the {len(ground_truth['images'])} images has an object (crowds do not count), so there is no "
            "average precision; evaluate on images with annotations"
        )
    images = {image["id"] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    for result in results:
        if result["image_id"] not in images:
            raise UserError(
                f"a result is of image {result['image_id']}, which is not among the {len(images)} images of the ground "
                "truth; predict the images that are evaluated"
            )
        if result["category_id"] not in categories:
            raise UserError(
                f"a result is of category {result['category_id']}; the ground truth has {sorted(categories)[:20]}"
            )
        if "segm" in kinds and "segmentation" not in result:
            raise UserError('a result has no "segmentation", so masks cannot be measured; measure kinds=("bbox",)')


def _accumulated(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Precision, (T, R, K, A, M), and recall, (T, K, A, M), of one kind; -1 where there is no object."""
    from faster_coco_eval import COCO, COCOeval_faster

    # The library writes into what it is given. Ids are counted anew, because an id of 0 would never be matched.
    annotations = [dict(a, id=i) for i, a in enumerate(ground_truth["annotations"], start=1)]
    if kind == "bbox":
        results = [{key: r[key] for key in ("image_id", "category_id", "bbox", "score")} for r in results]
    else:
        results = [{key: r[key] for key in ("image_id", "category_id", "segmentation", "score")} for r in results]
    images = [dict(image) for image in ground_truth["images"]]
    truth = COCO({"images": images, "annotations": annotations, "categories": list(ground_truth["categories"])})
    evaluation = COCOeval_faster(truth, truth.loadRes(results), kind, rle_iou_max_workers=1)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _figures(what: str, precision: np.ndarray, recall: np.ndarray) -> dict[str, float | None]:
    figures = {
        f"{what}_ap": _mean(precision[..., ALL, -1]),
        f"{what}_ap50": _mean(precision[IOU50, ..., ALL, -1]),
        f"{what}_ap75": _mean(precision[IOU75, ..., ALL, -1]),
    }
    figures |= {f"{what}_ap_{area}": _mean(precision[..., i, -1]) for i, area in enumerate(AREAS, start=1)}
    return figures | {f"{what}_ar100": _mean(recall[..., ALL, -1])}


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
