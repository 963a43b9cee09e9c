"""Checkpoints of whole detectors and segmenters, and of backbones, into detectors and segmenters."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import muntin
from muntin.errors import UserError
from muntin.weights.load import convert

pytest.importorskip("torchvision")
pytest.importorskip("segmentation_models_pytorch")

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "window": 4}
SMALL: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"channels": 16, "fc": 32, "mask_channels": 16},
    "cascade_mask_rcnn": {"channels": 16, "fc": 32, "mask_channels": 16, "box_channels": 16},
    "retinanet": {"channels": 16},
    "upernet": {"channels": 16, "auxiliary": 16},
    "semantic_fpn": {"channels": 16, "width": 16},
}


def create(head: str, classes: int = 5) -> Any:
    return muntin.create_dense(head, "swin_t", classes, head_config=SMALL[head], **TINY)


def two(name: str) -> list[str]:
    """Weight and bias of a layer, by mmdetection's names."""
    return [f"{name}.{end}" for end in ("weight", "bias")]


def normed(name: str) -> list[str]:
    """A convolution without bias and its BatchNorm."""
    ends = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{name}.conv.weight", *[f"{name}.bn.{end}" for end in ends]]


def pyramid(maps: int, extra: int = 0) -> list[str]:
    lateral = [n for i in range(maps) for n in two(f"neck.lateral_convs.{i}.conv")]
    return lateral + [n for i in range(maps + extra) for n in two(f"neck.fpn_convs.{i}.conv")]


def their_head(head: str) -> list[str]:
    """The names of a head's weights in mmdetection 2.x or mmsegmentation 0.x, in the order of ours."""
    proposals = [n for part in ("rpn_conv", "rpn_cls", "rpn_reg") for n in two(f"rpn_head.{part}")]
    last = [n for part in ("fc_cls", "fc_reg") for n in two(f"roi_head.bbox_head.{part}")]
    masks = [n for i in range(4) for n in two(f"roi_head.mask_head.convs.{i}.conv")]
    masks += two("roi_head.mask_head.upsample") + two("roi_head.mask_head.conv_logits")
    if head == "mask_rcnn":
        fcs = [n for i in range(2) for n in two(f"roi_head.bbox_head.shared_fcs.{i}")]
        return pyramid(4) + proposals + fcs + last + masks
    if head == "cascade_mask_rcnn":
        convs = [n for i in range(4) for n in normed(f"roi_head.bbox_head.shared_convs.{i}")]
        stage = convs + two("roi_head.bbox_head.shared_fcs.0") + last + masks
        stages = [re.sub(r"(bbox|mask)_head", rf"\1_head.{s}", name) for s in range(3) for name in stage]
        return pyramid(4) + proposals + stages
    if head == "retinanet":
        towers = [n for kind in ("cls", "reg") for i in range(4) for n in two(f"bbox_head.{kind}_convs.{i}.conv")]
        ends = {"cls": two("bbox_head.retina_cls"), "reg": two("bbox_head.retina_reg")}
        return pyramid(3, 2) + towers[:8] + ends["cls"] + towers[8:] + ends["reg"]
    if head == "semantic_fpn":
        climbs = [n for i, octaves in enumerate((1, 1, 2, 3)) for k in range(octaves)
                  for n in normed(f"decode_head.scale_heads.{i}.{2 * k}")]  # fmt: skip
        return pyramid(4) + climbs + two("decode_head.conv_seg")
    pooled = [n for i in range(4) for n in normed(f"decode_head.psp_modules.{i}.1")]
    levels = [
        n for part in ("lateral_convs", "fpn_convs") for i in (2, 1, 0) for n in normed(f"decode_head.{part}.{i}")
    ]
    decoder = pooled + normed("decode_head.bottleneck") + levels + normed("decode_head.fpn_bottleneck")
    second = normed("auxiliary_head.convs.0") + two("auxiliary_head.conv_seg")
    return decoder + two("decode_head.conv_seg") + second


def their_file(model: Any) -> dict[str, Tensor]:
    """A model's weights as mmdetection or mmsegmentation writes them."""
    state = model.state_dict()
    backbone = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    found = {f"backbone.{name}": tensor for name, tensor in convert(backbone, "mm").items()}
    rest = [tensor for name, tensor in state.items() if not name.startswith("backbone.")]
    return found | dict(zip(their_head(model.head_name), rest, strict=True))


@pytest.mark.parametrize("head", SMALL)
def test_whole_files_of_mmdetection_and_mmsegmentation(head: str, randomise: Any) -> None:
    model, other = randomise(create(head), 1), randomise(create(head), 2)
    report = muntin.load_checkpoint(other, {"state_dict": their_file(model), "meta": {"epoch": 12}})
    assert report.dialect == "mm"
    assert not (report.replaced or report.missing or report.unexpected or report.ignored or report.resized)
    assert set(report.loaded) == set(model.state_dict())
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


def test_classes_of_another_number_keep_the_models_own(randomise: Any) -> None:
    file = their_file(randomise(create("mask_rcnn", 7), 1))
    model = create("mask_rcnn", 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = muntin.load_checkpoint(model, file)
    ends = ("box.classes", "box.boxes", "mask.classes")
    assert {name.rpartition(".")[0] for name in report.replaced} == {f"roi.stages.0.{end}" for end in ends}
    assert "(8, 32) in the file, (6, 32) in the model" in str(report)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.replaced)
    assert torch.equal(model.rpn.head.cls_logits.weight, file["rpn_head.rpn_cls.weight"])


@pytest.mark.parametrize("dialect", ["muntin", "authors", "timm"])
def test_a_backbone_alone_leaves_the_heads(dialect: str, randomise: Any) -> None:
    classifier = randomise(muntin.create_model("swin_t", **TINY), 1)
    model = create("semantic_fpn")
    heads = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    report = muntin.load_checkpoint(model, convert(classifier.state_dict(), dialect))
    assert set(heads) <= set(report.replaced)
    assert all(name.startswith("backbone.norms.") or name in heads for name in report.replaced)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in heads.items())
    loaded = model.backbone.stages[2].blocks[1].mlp.fc1.weight
    assert torch.equal(loaded, classifier.backbone.stages[2].blocks[1].mlp.fc1.weight)


def test_files_of_our_own(randomise: Any, tmp_path: Path) -> None:
    model, other = randomise(create("mask_rcnn"), 1), randomise(create("mask_rcnn"), 2)
    torch.save({"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "last.pth")
    report = muntin.load_checkpoint(other, tmp_path / "last.pth")
    assert set(report.loaded) == set(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
    wider = create("mask_rcnn", 9)
    assert {n.split(".")[4] for n in muntin.load_checkpoint(wider, model.state_dict()).replaced} == {"classes", "boxes"}
    state = model.state_dict()
    del state["rpn.head.cls_logits.bias"]
    before = other.rpn.head.bbox_pred.weight.clone()
    with pytest.raises(UserError, match="1 missing: rpn.head.cls_logits.bias"):
        muntin.load_checkpoint(other, {name: tensor + 1 for name, tensor in state.items()})
    assert torch.equal(other.rpn.head.bbox_pred.weight, before)


def test_another_backbones_file_is_refused(randomise: Any) -> None:
    file = their_file(create("mask_rcnn"))
    with pytest.raises(UserError, match="weights of another model|holds weights of"):
        muntin.load_checkpoint(
            muntin.create_dense("mask_rcnn", "swin_t", 5, head_config=SMALL["mask_rcnn"], **(TINY | {"dim": 32})), file
        )
