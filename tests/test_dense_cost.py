"""Costs of detectors and segmenters against the published ones, and detections against torchvision's own Mask R-CNN."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import muntin
from muntin.cli import main
from muntin.errors import UserError
from muntin.measure import cost
from muntin.measure.targets import DENSE, Models, parse
from muntin.models import FAMILIES

pytest.importorskip("segmentation_models_pytorch")
detection = pytest.importorskip("torchvision.models.detection")

from muntin.heads import HEADS  # noqa: E402
from muntin.torchvision import Pyramid, anchors  # noqa: E402

PUBLISHED = {  # millions of parameters, 10^9 multiply-accumulates: at 800x1280, segmenters at 512x2048
    "mask_rcnn:swin_t": (48, 267),
    "mask_rcnn:swin_s": (69, 359),
    "cascade_mask_rcnn:swin_t": (86, 745),
    "cascade_mask_rcnn:swin_s": (107, 838),
    "cascade_mask_rcnn:swin_b": (145, 982),
    "upernet:swin_t": (60, 945),
    "upernet:swin_s": (81, 1038),
    "upernet:swin_b": (121, 1188),
}


@pytest.mark.parametrize("target", PUBLISHED)
def test_costs_are_the_published_ones(target: str) -> None:
    head, name = target.split(":")
    classes, size = DENSE[HEADS[head]]
    with torch.device("meta"):
        found = cost(muntin.create_dense(head, name, classes), size)
    parameters, gmacs = PUBLISHED[target]
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert found.gmacs == pytest.approx(gmacs, rel=0.03)


def test_a_detector_costs_the_same_whatever_it_finds() -> None:
    config = {"channels": 16, "fc": 32, "mask_channels": 16, "proposals": (30, 40), "detections": 5}
    tiny = {field.name: getattr(FAMILIES[0].TINY, field.name) for field in dataclasses.fields(FAMILIES[0].TINY)}

    def gmacs(**changes: Any) -> float:
        return cost(muntin.create_dense("mask_rcnn", "swin_t", 3, head_config=config | changes, **tiny), 64).gmacs

    box = 16 * 7 * 7 * 32 + 32 * 32 + 32 * (4 + 12)
    mask = 4 * 14 * 14 * 16 * 16 * 9 + 14 * 14 * 16 * 16 * 4 + 28 * 28 * 16 * 3
    assert gmacs(proposals=(30, 50)) - gmacs() == pytest.approx(10 * box / 1e9)
    assert gmacs(detections=6) - gmacs() == pytest.approx(mask / 1e9)


def test_targets_by_head_and_model(capsys: Any) -> None:
    assert main(["cost", "semantic_fpn:efficientvit_m0", "--size", "64x128"]) == 0
    printed = capsys.readouterr().out
    assert "semantic_fpn:efficientvit_m0" in printed and "1 x 64 x 128" in printed
    target = parse("retinanet:efficientvit_m0")[0]
    assert (target.kind, target.size) == ("dense", (800, 1280))
    assert Models(0).get(target, (64, 64)).num_classes == 80
    with pytest.raises(UserError, match="efficientvit_m0"):
        parse("retinanet:efficientvit_m00")
    with pytest.raises(UserError, match="mask_rcnn"):
        parse("mask_rcn:swin_t")


def theirs_from(model: Any, pyramid: Any) -> Any:
    """torchvision's Mask R-CNN with the weights of ours."""
    made = detection.MaskRCNN(
        pyramid, 5, rpn_anchor_generator=anchors(pyramid), box_score_thresh=0.1, box_detections_per_img=20
    )
    made.rpn.load_state_dict(model.rpn.state_dict())
    made.roi_heads.mask_roi_pool.output_size = (14, 14)
    stage, heads = model.roi.stages[0], made.roi_heads
    heads.box_head.fc6, heads.box_head.fc7 = stage.box.fcs[0], stage.box.fcs[2]
    for i in range(4):
        heads.mask_head[i][0] = stage.mask.convs[i][0]
    heads.mask_predictor.conv5_mask = stage.mask.enlarge

    def widened(layer: Any, kind: Any, values: Tensor, bias: Tensor) -> Any:
        made = kind(values.shape[1], len(values), 1) if kind is torch.nn.Conv2d else kind(values.shape[1], len(values))
        made.load_state_dict({"weight": values, "bias": bias})
        return made

    def first(tensor: Tensor, rows: int) -> Tensor:  # their background is first and has boxes and masks too
        return torch.cat((tensor.new_zeros(rows, *tensor.shape[1:]), tensor))

    box, mask = stage.box, stage.mask.classes
    classes = (box.classes.weight.roll(1, 0), box.classes.bias.roll(1, 0))
    heads.box_predictor.cls_score = widened(box.classes, torch.nn.Linear, *classes)
    boxes = (first(box.boxes.weight, 4), first(box.boxes.bias, 4))
    heads.box_predictor.bbox_pred = widened(box.boxes, torch.nn.Linear, *boxes)
    masks = (first(mask.weight, 1), first(mask.bias, 1))
    heads.mask_predictor.mask_fcn_logits = widened(mask, torch.nn.Conv2d, *masks)
    return made.eval()


def test_detections_equal_torchvisions(randomise: Any) -> None:
    tiny = {field.name: getattr(FAMILIES[0].TINY, field.name) for field in dataclasses.fields(FAMILIES[0].TINY)}
    config = {"channels": 16, "fc": 32, "mask_channels": 16, "score_threshold": 0.1, "detections": 20}
    model: Any = muntin.create_dense(
        "mask_rcnn", "swin_t", 4, head_config=config | {"aligned": False, "samples_per_cell": 2}, **tiny
    )
    randomise(model).eval()
    pyramid = Pyramid(model.backbone, 16)
    pyramid.fpn = model.neck.fpn
    theirs = theirs_from(model, pyramid)
    image = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        found = model(image)[0]
        levels = pyramid.eval()(image)
        images = detection.image_list.ImageList(image, [(96, 128)])
        wanted = theirs.roi_heads(levels, theirs.rpn(images, levels)[0], [(96, 128)])[0][0]
    assert len(found["boxes"]) > 5 and torch.equal(found["labels"], wanted["labels"] - 1)
    for key in ("boxes", "scores"):
        assert torch.allclose(found[key], wanted[key], atol=1e-3)
    assert torch.allclose(found["masks"], wanted["masks"][:, 0], atol=1e-3)
