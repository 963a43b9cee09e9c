"""Muntin's models in timm, segmentation-models-pytorch and torchvision, on the Hugging Face hub and in torch.hub."""

import argparse
import copy
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from conftest import error_of
from muntin import hub
from muntin.cli import main
from muntin.errors import UserError
from muntin.models import FAMILIES, published
from muntin.run import Run
from muntin.weights import download
from muntin.weights.download import Checkpoint

pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")
detection = pytest.importorskip("torchvision.models.detection")
huggingface_hub = pytest.importorskip("huggingface_hub")

import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.loss  # noqa: E402
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402

import muntin.smp  # noqa: E402
import muntin.timm  # noqa: E402
from muntin.torchvision import RETINA, Pyramid, anchors  # noqa: E402

ROOT = Path(__file__).parents[1]


def plain(family: Any, **changes: Any) -> dict[str, Any]:
    """The tiny configuration as keyword arguments."""
    row = dataclasses.replace(family.TINY, **changes)
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def listed(family: Any) -> str:
    """A listed model of the family, whose fields the tests replace."""
    return next(iter(family.VARIANTS))


def create(family: Any, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(f"muntin_{listed(family)}", **options, **plain(family, **changes or {}))


def families() -> Any:
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rpartition(".")[2])


def heads() -> Any:
    """Every family, and every form of its head."""
    forms = {"distilled": (True,), "token_label": ("stage", "projection")}
    cases = [(family, {}) for family in FAMILIES]
    for family in FAMILIES:
        cases += [(family, {f: v}) for f, values in forms.items() if hasattr(family.TINY, f) for v in values]
    names = [f"{family.__name__.rpartition('.')[2]}-{'-'.join(map(str, c.values()))}" for family, c in cases]
    return pytest.mark.parametrize(("family", "changes"), cases, ids=names)


def logits_of(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


# timm


def test_timm_has_every_model_and_keeps_its_own() -> None:
    names = set(timm.list_models())
    assert {f"muntin_{name}" for name in muntin.list_models()} <= names
    assert {name for name in muntin.list_models() if not name.startswith("efficientvit")} <= names
    with torch.device("meta"):
        assert not isinstance(timm.create_model("efficientvit_m0"), muntin.timm.TimmModel)
        for family in FAMILIES:
            model = timm.create_model(f"muntin_{listed(family)}", num_classes=11)
            assert model.name == listed(family) and model(torch.empty(2, 3, 224, 224)).shape == (2, 11)


@families()
def test_timm_model_equals_ours(family: Any, randomise: Any) -> None:
    ours = randomise(muntin.create_model(listed(family), 7, **plain(family))).eval()
    theirs = create(family, num_classes=7, img_size=64).eval()
    assert muntin.load_checkpoint(theirs, ours.state_dict()).loaded == tuple(ours.state_dict())
    image = torch.randn(2, 3, 61, 83)
    assert torch.equal(theirs(image), ours(image))
    assert torch.equal(theirs.forward_head(theirs.forward_features(image)), ours(image))
    fast = muntin.optimize(theirs)
    with torch.inference_mode():
        assert error_of(fast(image), theirs(image)) < 1e-4
        bare = create(family, num_classes=0).eval()
        assert error_of(muntin.optimize(bare)(image), bare(image)) < 1e-4


@heads()
def test_timm_backward_reaches_every_parameter(family: Any, changes: dict[str, Any]) -> None:
    model = create(family, changes, num_classes=42, drop_rate=0.1).train()
    outputs = logits_of(model(torch.randn(2, 3, 64, 64)))
    sum(each.square().mean() for each in outputs).backward()  # type: ignore[union-attr]
    assert all(each.shape[-1] == 42 and each.isfinite().all() for each in outputs)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@heads()
def test_timm_configuration_fits_the_model(family: Any, changes: dict[str, Any]) -> None:
    model = create(family, changes).eval()
    config = model.default_cfg
    names = model.state_dict().keys()
    classifiers = config["classifier"] if isinstance(config["classifier"], tuple) else (config["classifier"],)
    assert all(f"{name}.weight" in names for name in (config["first_conv"], *classifiers))
    assert len(classifiers) == len([name for name in names if name.startswith("head.fc") and name.endswith("weight")])
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    data = timm.data.resolve_model_data_config(model)
    assert data["mean"] == (0.485, 0.456, 0.406) and data["interpolation"] == "bicubic"
    assert data["crop_pct"] == pytest.approx(0.875, abs=0.01)
    assert data["input_size"][1] == published(listed(family))["size"]
    assert model.forward_features(torch.randn(1, *data["input_size"])).shape[2:] == config["pool_size"]


@heads()
def test_timm_reset_classifier(family: Any, changes: dict[str, Any]) -> None:
    model = create(family, changes, num_classes=6, drop_rate=0.2).eval()
    image = torch.randn(2, 3, 61, 83)
    features = model.forward_features(image)
    assert features.shape[:2] == (2, model.num_features)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    weight, bias = model.get_classifier().weight, model.get_classifier().bias
    if not changes:  # with a second head the logits are those of both
        assert error_of(before @ weight.t() + bias, model(image)) < 1e-4
    model.reset_classifier(0)
    assert torch.equal(model(image), before) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    whole = model(image)
    assert whole.shape == (2, model.head_hidden_size, *features.shape[2:])
    assert torch.equal(model.forward_head(features, pre_logits=True), whole)
    model.reset_classifier(9, "avg")
    assert torch.equal(model(image), model(image))  # no dropout: the new layer is in evaluation mode, too
    assert model(image).shape == (2, 9) and model.num_classes == 9 and model.get_classifier().out_features == 9
    model.train()
    assert all(each.shape[-1] == 9 for each in logits_of(model(image)))


@families()
def test_timm_without_a_classifier_from_the_start(family: Any) -> None:
    image = torch.randn(2, 3, 64, 64)
    pooled, whole = create(family, num_classes=0).eval(), create(family, num_classes=0, global_pool="").eval()
    assert pooled(image).shape == (2, pooled.head_hidden_size) and whole(image).ndim == 4
    for bad, told in (
        ({"num_classes": 3, "global_pool": ""}, "classes need pooling"),
        ({"global_pool": "max"}, "valid are 'avg'"),
        ({"in_chans": 1}, "takes 3 channels"),
        ({"windoww": 1}, "no field"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls"),
    ):
        with pytest.raises(UserError, match=told):
            create(family, **bad)


@families()
@pytest.mark.parametrize("chosen", [None, (0, 2), (-2, -1), 2], ids=str)
def test_timm_features_only_gives_the_backbones_maps(family: Any, chosen: Any, randomise: Any) -> None:
    count = len(family.BACKBONE(family.TINY).stages)
    stages = range(count) if chosen is None else range(-chosen, 0) if isinstance(chosen, int) else chosen
    stages = tuple(sorted(stage % count for stage in stages))
    model = create(family, features_only=True, **({} if chosen is None else {"out_indices": chosen})).eval()
    assert not any(name.startswith("model.head") for name, _ in model.named_parameters())
    backbone = muntin.create_backbone(listed(family), stages, **plain(family)).eval()
    assert (model.feature_info.channels(), model.feature_info.reduction()) == (
        list(backbone.channels),
        list(backbone.strides),
    )
    weights = randomise(backbone).state_dict()
    kept = model.model.backbone.state_dict()
    model.model.backbone.load_state_dict({name: weights[name] for name in kept})
    image = torch.randn(2, 3, 61, 83)
    found, wanted = model(image), backbone(image)
    assert len(found) == len(stages) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_timm_features_only_takes_the_rules_of_dense_prediction() -> None:
    with torch.device("meta"):
        maps = timm.create_model("muntin_swin_t", features_only=True)
        assert maps.model.config.small_maps == "pad"
        assert timm.create_model("muntin_swin_t").config.small_maps == "shrink"
        assert timm.create_model("muntin_swin_t", features_only=True, small_maps="shrink").model.config == (
            muntin.create_model("swin_t").config
        )


@families()
def test_timm_forward_intermediates(family: Any, randomise: Any) -> None:
    model = randomise(create(family)).eval()
    every = muntin.create_backbone(listed(family), **plain(family)).eval()
    every.load_state_dict(model.backbone.state_dict())
    image = torch.randn(2, 3, 61, 83)
    maps, count = every(image), len(every.stages)
    last, found = model.forward_intermediates(image)
    assert torch.equal(last, model.forward_features(image)) and len(found) == count
    assert all(torch.equal(a, b) for a, b in zip(found, maps, strict=True))
    last, found = model.forward_intermediates(image, indices=1)
    assert len(found) == 1 and torch.equal(found[0], maps[-1])
    last, found = model.forward_intermediates(image, indices=[0], stop_early=True)
    assert torch.equal(last, maps[0]) and torch.equal(found[0], maps[0])
    last, found = model.forward_intermediates(image, indices=[-1, 0], output_fmt="NHWC")
    assert torch.equal(last, maps[-1]) and torch.equal(found[0], maps[0].permute(0, 2, 3, 1)) and len(found) == 2
    found = model.forward_intermediates(image, indices=[count - 1], norm=True, intermediates_only=True)
    assert torch.equal(found[0], model.head.features(maps[-1])) and found[0].shape[1] == model.head_hidden_size
    found = model.forward_intermediates(image, indices=[0], norm=True, intermediates_only=True)
    assert torch.equal(found[0], maps[0])
    for bad in ({"indices": [9]}, {"indices": 9}, {"indices": []}, {"output_fmt": "NLC"}):
        with pytest.raises(UserError, match="indices=|output_fmt="):
            model.forward_intermediates(image, **bad)


@families()
def test_timm_prune_intermediate_layers(family: Any, randomise: Any) -> None:
    model = randomise(create(family)).eval()
    image = torch.randn(2, 3, 61, 83)
    wanted = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    bare = copy.deepcopy(model)
    assert bare.prune_intermediate_layers([-len(model.backbone.stages) + 1, 0]) == [1, 0]
    assert len(bare.backbone.stages) == 2 and bare.num_features == wanted[1].shape[1]
    found = bare.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(bare(image), wanted[1])
    with pytest.raises(UserError, match="pruned"):
        bare.reset_classifier(3)
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(kept(image), model(image))
    kept.prune_intermediate_layers(1)
    assert kept(image).shape[:2] == (2, model.head_hidden_size) and kept(image).ndim == 4


@families()
def test_timm_grad_checkpointing(family: Any, randomise: Any) -> None:
    model = randomise(create(family)).train()
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    image = torch.randn(2, 3, 64, 64)
    for each in (model, saving):
        each(image).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@families()
def test_timm_layer_decay(family: Any) -> None:
    model = create(family, num_classes=5)
    groups = timm.optim.param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(scale) == len(named) == sum(len(group["params"]) for group in groups)
    blocks = [[f"backbone.stages.{s}.blocks.{b}." for b in range(len(stage.blocks))] for s, stage in
              enumerate(model.backbone.stages)]  # fmt: skip
    order = ["backbone.stem.", *(name for stage in blocks for name in stage), "head."]
    found = [{scale[id(p)] for name, p in named.items() if name.startswith(part)} for part in order]
    assert found == [{0.5 ** (len(order) - 1 - i)} for i in range(len(order))]
    for name, parameter in named.items():
        bias = "bias_table" in name or ".position.fc" in name  # Swin's and EfficientViT's tables, SwinV2's network
        assert decay[id(parameter)] == (0.0 if bias or parameter.ndim <= 1 else 0.05), name
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == len(blocks) + 2


@families()
def test_timm_dropout_is_in_front_of_the_last_layer(family: Any) -> None:
    model = create(family, num_classes=4, drop_rate=0.5)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    image = torch.randn(2, 3, 64, 64)
    nn.init.normal_(model.get_classifier().weight)
    assert not torch.equal(model(image), model(image))
    assert torch.equal(model.eval()(image), copy.deepcopy(model)(image))
    assert model.state_dict().keys() == create(family, num_classes=4).state_dict().keys()


@families()
def test_timm_training_utilities_run_a_step(family: Any, tmp_path: Path) -> None:
    """What timm's training script does with a model, in its order."""
    model = create(family, num_classes=8, drop_rate=0.1)
    arguments = argparse.Namespace(opt="adamw", lr=1e-2, weight_decay=0.05, momentum=0.9, layer_decay=0.7)
    optimizer = timm.optim.create_optimizer_v2(model, **timm.optim.optimizer_kwargs(cfg=arguments))
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=1)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=8)
    before = copy.deepcopy(model.state_dict())
    model.train()
    schedule.step(1)
    images, targets = mixup(torch.randn(4, 3, 64, 64), torch.arange(4))
    loss = timm.loss.SoftTargetCrossEntropy()(model(images), targets)
    loss.backward()
    timm.utils.dispatch_clip_grad(timm.models.model_parameters(model, exclude_head=True), value=0.1, mode="agc")
    optimizer.step()
    ema.update(model)
    saver.save_checkpoint(epoch=0, metric=1.0)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved and loss.isfinite()
    again = create(family, num_classes=8)
    assert timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), log_info=False) == 1
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    average = create(family, num_classes=8, checkpoint_path=str(tmp_path / "last.pth.tar"))
    wanted = ema.module.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in average.state_dict().items())
    with torch.no_grad():
        timm.utils.accuracy(model.eval()(images), torch.arange(4), topk=(1, 5))


@families()
def test_timm_tasks_train_and_distil(family: Any) -> None:
    tasks = pytest.importorskip("timm.task")
    model, teacher = create(family, num_classes=5, device="cpu", dtype=torch.float32), create(family, num_classes=5)
    images, targets = torch.randn(4, 3, 64, 64), torch.arange(4)
    made = [tasks.ClassificationTask(model, verbose=False)]
    made += [
        task(model, teacher, verbose=False) for task in (tasks.LogitDistillationTask, tasks.FeatureDistillationTask)
    ]
    if hasattr(family.TINY, "distilled"):
        pair = create(family, {"distilled": True}, num_classes=5)
        assert pair.train()(images).shape == (4, 5)  # the mean, until distillation asks for both
        made.append(tasks.TokenDistillationTask(pair, teacher, verbose=False))
        assert [logits.shape for logits in pair(images)] == [(4, 5)] * 2
    for task in made:
        loss = task.train()(images, targets)["loss"]
        loss.backward()
        assert loss.isfinite()
    with pytest.raises(UserError, match="no head for a teacher"):
        model.set_distilled_training()
    assert create(family, dtype=torch.float64).state_dict()["head.fc.weight"].dtype == torch.float64


@families()
def test_timm_loads_checkpoints_of_any_dialect(family: Any, tmp_path: Path, randomise: Any) -> None:
    ours = randomise(muntin.create_model(listed(family), 7, **plain(family))).eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "ours.pth")
    image = torch.randn(2, 3, 64, 64)
    named = create(family, num_classes=7, pretrained=True, pretrained_cfg=str(tmp_path / "ours.pth")).eval()
    assert torch.equal(named(image), ours(image))
    overlay = {"file": str(tmp_path / "ours.pth"), "num_classes": 7}
    given = create(family, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(given(image), ours(image))
    other = create(family, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(other.forward_features(image), ours.backbone(image)[-1]) and other(image).shape == (2, 3)
    maps = create(family, features_only=True, pretrained=True, pretrained_cfg=str(tmp_path / "ours.pth")).eval()
    assert torch.equal(maps(image)[-1], ours.backbone(image)[-1])


def test_timm_knows_published_weights_by_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in download.published():
        entry = timm.get_pretrained_cfg(f"muntin_{checkpoint.model}.{checkpoint.tag}")
        assert entry.url == checkpoint.address and entry.num_classes == checkpoint.classes
        size = checkpoint.size or published(checkpoint.model)["size"]  # a detector's backbone has none of its own
        assert entry.input_size == (3, size, size)
        assert timm.get_pretrained_cfg(f"muntin_{checkpoint.model}").num_classes == 1000
    with torch.device("meta"):
        model = timm.create_model("swin_b.in22k_384")  # its window and classes, with or without its weights
        assert (model.config.window, model.num_classes) == (12, 21841)
        assert timm.create_model("swin_b").num_classes == 1000
        maps = timm.create_model("swin_b.in22k_384", features_only=True)
        assert (maps.model.config.window, maps.model.config.small_maps) == (12, "pad")
        for name in ("rmt_t", "swin_t.nothing"):
            with pytest.raises(UserError, match="no weights of rmt_t|no weights 'nothing'"):
                timm.create_model(name, pretrained=True)
    small = {"dim": 8, "depths": (1, 1), "heads": (1, 2)}
    source = muntin.create_model("swin_b", 21841, **small, window=12)
    torch.save({"model": source.state_dict()}, tmp_path / "file.pth")
    asked = []
    monkeypatch.setattr(Checkpoint, "fetch", lambda self: asked.append(self.tag) or tmp_path / "file.pth")
    wanted = source.state_dict()
    whole = timm.create_model("swin_b.in22k_384", pretrained=True, **small)
    found = timm.models.resolve_model_input_args("swin_b.in22k_384") if hasattr(
        timm.models, "resolve_model_input_args") else {"model_name": "swin_b.in22k_384"}  # fmt: skip
    scripted = timm.create_model(**found, pretrained=True, **small)
    for model in (whole, scripted):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    headless = timm.create_model("swin_b.in22k_384", pretrained=True, num_classes=0, **small)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in headless.state_dict().items())
    assert asked == ["in22k_384"] * 3
    segmenter = muntin.create_backbone("swin_b", out_norm=True, **small)
    torch.save(segmenter.state_dict(), tmp_path / "file.pth")
    maps = timm.create_model("swin_b.ade20k_upernet", pretrained=True, features_only=True, **small)
    tuned = timm.create_model("swin_b.ade20k_upernet", pretrained=True, num_classes=3, small_maps="pad", **small)
    assert tuned.num_classes == 3 and asked[3:] == ["ade20k_upernet"] * 2
    for backbone in (maps.model.backbone, tuned.backbone):
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, segmenter.state_dict()[name]), name
    unet = smp.Unet(
        "muntin-swin_b", 3, encoder_weights="ade20k_upernet", decoder_channels=(32, 16, 8), out_norm=True, **small
    )
    for name, tensor in unet.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, segmenter.state_dict()[name]), name  # its output norms too


def test_timm_loads_timms_own_names() -> None:
    family = next(f for f in FAMILIES if "swin_t" in f.VARIANTS)
    ours = muntin.create_model("swin_t", 7, **plain(family)).eval()
    theirs = muntin.weights.load.convert(ours.state_dict(), "timm")
    model = create(family, num_classes=7, pretrained=True, pretrained_cfg={"state_dict": theirs, "num_classes": 7})
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(image), ours(image))


# segmentation-models-pytorch


@families()
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet", "MAnet", "Segformer"])
def test_smp_trains_a_step(family: Any, architecture: str) -> None:
    torch.manual_seed(0)
    model = getattr(smp, architecture)(
        f"muntin-{listed(family)}", encoder_weights=None, classes=3, **plain(family)
    ).train()
    image, mask = torch.randn(2, 3, 96, 160), torch.randint(3, (2, 96, 160))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    masks = model(image)
    assert masks.shape == (2, 3, 96, 160)
    loss = nn.functional.cross_entropy(masks, mask)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    assert model.eval()(image).isfinite().all()


@families()
@pytest.mark.parametrize("size", [(61, 83), (96, 160), (64, 64)])
def test_smp_unet_masks_are_the_images_at_any_size(family: Any, size: tuple[int, int]) -> None:
    strides = family.BACKBONE(family.TINY).strides
    for depth in range(strides[0].bit_length() - 1, strides[-1].bit_length()):
        channels = (64, 32, 16, 16, 8, 8)[:depth]
        model = smp.Unet(
            f"muntin-{listed(family)}", depth, encoder_weights=None, decoder_channels=channels, **plain(family)
        ).eval()
        assert model(torch.randn(1, 3, *size)).shape == (1, 1, *size)


@families()
def test_smp_encoder_gives_a_map_for_every_stride(family: Any, randomise: Any) -> None:
    backbone = randomise(muntin.create_backbone(listed(family), out_norm=True, **plain(family))).eval()
    image = torch.randn(1, 3, 61, 83)
    maps = dict(zip(backbone.strides, backbone(image), strict=True))
    for depth in {min(5, max(maps).bit_length() - 1), max(maps).bit_length() - 1}:
        encoder = muntin.smp.Encoder(listed(family), depth, **plain(family)).eval()
        encoder.backbone.load_state_dict(backbone.state_dict())
        features = encoder(image)
        assert features[0] is image and len(features) == depth + 1 == len(encoder.out_channels)
        for i, feature in enumerate(features):
            stride = 2**i
            assert feature.shape == (1, encoder.out_channels[i], -(-61 // stride), -(-83 // stride))
            if stride in maps:
                own = maps[stride].shape[1]
                assert torch.equal(feature[:, :own], maps[stride])
            elif stride > 2:
                assert stride < min(maps) and feature.shape[1] == maps[min(maps)].shape[1]  # the finest, enlarged
                assert feature.mean((2, 3)).sub(maps[min(maps)].mean((2, 3))).abs().max() < maps[min(maps)].std()
        whole = sum(each.shape[1] for stride, each in maps.items() if stride >= 2**depth)
        assert features[-1].shape[1] == whole  # no stage is left out


def test_smp_says_what_it_cannot_do() -> None:
    for options, told in (
        ({"encoder_depth": 6}, "depth 6.*strides .4, 8, 16, 32.; give 2 to 5"),
        ({"in_channels": 1}, "take 3"),
        ({"windows": 3}, "no field 'windows'.*'window'"),
    ):
        with pytest.raises(UserError, match=told):
            smp.Unet("muntin-swin_t", encoder_weights=None, **options)
    with pytest.raises(UserError, match="output_stride=16"):
        smp.DeepLabV3Plus("muntin-swin_t", encoder_weights=None)
    with pytest.raises(UserError, match="no model 'swin_x'"):
        smp.Unet("muntin-swin_x", encoder_weights=None)
    assert isinstance(smp.Unet("resnet18", encoder_weights=None), nn.Module)  # smp's own stay
    assert {f"muntin-{name}" for name in muntin.list_models()} <= set(smp.encoders.get_encoder_names())


def test_smp_loads_weights_into_the_encoder(tmp_path: Path, randomise: Any) -> None:
    for family in FAMILIES:
        ours = randomise(muntin.create_model(listed(family), 7, **plain(family)))
        torch.save(ours.state_dict(), tmp_path / "weights.pth")
        model = smp.Unet(f"muntin-{listed(family)}", encoder_weights=str(tmp_path / "weights.pth"), **plain(family))
        for name, tensor in ours.backbone.state_dict().items():
            assert torch.equal(tensor, model.encoder.backbone.state_dict()[name]), name


def test_smp_saves_and_opens_models(tmp_path: Path) -> None:
    family = FAMILIES[0]
    model = smp.Unet(f"muntin-{listed(family)}", encoder_weights=None, **plain(family)).eval()
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(smp.from_pretrained(tmp_path).eval()(image), model(image))


def test_smp_takes_timms_way_too() -> None:
    family = next(f for f in FAMILIES if "rmt_t" in f.VARIANTS)
    model = smp.Unet("tu-rmt_t", encoder_weights=None, **plain(family)).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1, 64, 96)


# torchvision


def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 90, 130), torch.rand(3, 120, 80)]
    masks = [torch.zeros(1, *image.shape[1:], dtype=torch.uint8) for image in images]
    for mask in masks:
        mask[:, 5:50, 5:60] = 1
    box, label = torch.tensor([[5.0, 5.0, 60.0, 50.0]]), torch.tensor([1])
    return images, [{"boxes": box, "labels": label, "masks": mask} for mask in masks]


def detector(family: Any, kind: str, **options: Any) -> Any:
    if kind == "RetinaNet":
        strides = family.BACKBONE(family.TINY).strides
        chosen = tuple(i for i, stride in enumerate(strides) if stride >= 8)
        backbone = muntin.create_backbone(listed(family), chosen, True, **plain(family))
        pyramid = Pyramid(backbone, 16, (8, 16, 32, 64, 128))
        options["anchor_generator"] = anchors(pyramid, RETINA)
    else:
        pyramid = Pyramid(muntin.create_backbone(listed(family), out_norm=True, **plain(family)), 16)
        options["rpn_anchor_generator"] = anchors(pyramid)
    return getattr(detection, kind)(pyramid, num_classes=3, min_size=100, max_size=160, **options)


@families()
@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet", "MaskRCNN"])
def test_torchvision_detectors_train_a_step(family: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = detector(family, kind)
    images, targets = scene()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    torch.optim.SGD(model.parameters(), 0.001).step()
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2 and all(each["boxes"].shape[1:] == (4,) for each in found)


@families()
@pytest.mark.parametrize("size", [(64, 64), (97, 133), (5, 3)])
def test_torchvision_pyramid_has_the_stated_levels(family: Any, size: tuple[int, int]) -> None:
    backbone = muntin.create_backbone(listed(family), **plain(family))
    for strides in ((4, 8, 16, 32, 64), (2, 4, 8, 16, 32, 64, 128)):
        pyramid = Pyramid(backbone, 8, strides).eval()
        levels = pyramid(torch.randn(1, 3, *size))
        assert list(levels) == [str(i) for i in range(len(strides))]
        for level, stride in zip(levels.values(), strides, strict=True):
            assert level.shape == (1, 8, -(-size[0] // stride), -(-size[1] // stride))
    for bad in ((), (4, 8), (4, 8, 32, 64), (64, 128)):
        with pytest.raises(UserError, match="strides=.*out_indices"):
            Pyramid(backbone, 8, bad)


def test_torchvision_anchors_stand_at_the_strides() -> None:
    """torchvision's own would stand 53 pixels apart where an image of 160 has a map of 3 at stride 64."""
    family = next(f for f in FAMILIES if f.BACKBONE(f.TINY).strides[-1] == 64)
    pyramid = Pyramid(muntin.create_backbone(listed(family), **plain(family)), 8)
    image = torch.rand(1, 3, 160, 160)
    levels = list(pyramid(image).values())
    images = detection.image_list.ImageList(image, [(160, 160)])
    boxes = anchors(pyramid, ratios=(1.0,))(images, levels)[0]
    assert len(boxes) == sum(level.shape[2] * level.shape[3] for level in levels)
    last = boxes[-9:].view(3, 3, 4)
    centres = (last[..., :2] + last[..., 2:]) / 2
    assert centres[0, :, 0].tolist() == centres[:, 0, 1].tolist() == [0, 64, 128]
    assert (last[..., 2] - last[..., 0]).unique().tolist() == [512]


# Hugging Face hub


@families()
def test_hub_folder_round_trip(family: Any, tmp_path: Path, randomise: Any) -> None:
    model = randomise(muntin.create_model(listed(family), 3, **plain(family))).eval()
    folder = hub.save_pretrained(model, tmp_path / "model", classes=["ant", "bee", "c|d"], license="apache-2.0")
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.FILES)
    image = torch.randn(2, 3, 61, 83)
    again = hub.from_pretrained(folder)
    assert not again.training and torch.equal(again(image), model(image)) and again.config == model.config
    through_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(through_timm(image), model(image))
    size = timm.data.resolve_model_data_config(through_timm)["input_size"]
    assert list(size) == [3, *hub.fetch(folder).preprocessing["size"]]
    fewer = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2).eval()
    assert fewer(image).shape == (2, 2) and torch.equal(fewer.forward_features(image), model.backbone(image)[-1])
    card = (folder / "README.md").read_text(encoding="utf-8")
    parameters = sum(p.numel() for p in model.parameters())
    for part in (f"{parameters:,}", "GMACs", 'license: "apache-2.0"', "c\\|d", "library_name", listed(family)):
        assert part in card
    assert hub.fetch(folder).classes == ["ant", "bee", "c|d"]
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 3
    # a model that timm made is saved as what it is
    hub.save_pretrained(through_timm, tmp_path / "timm")
    assert torch.equal(hub.from_pretrained(tmp_path / "timm")(image), model(image))


def test_hub_card_states_no_licence_that_was_not_given(tmp_path: Path) -> None:
    model = muntin.create_model("swin_t", 2, dim=8, depths=(1, 1), heads=(1, 2))
    text = (hub.save_pretrained(model, tmp_path) / "README.md").read_text()
    assert "license:" not in text and "| licence of the weights | not stated |" in text


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run as training leaves it, as far as the hub reads it."""
    model = muntin.create_model("swin_t", 2, dim=8, depths=(1, 1), heads=(1, 2), window=4)
    steps = hub._papers("swin_t") | {"size": [32, 48], "resize": None}
    folder = tmp_path / "run"
    muntin.run.save_model(folder / "model.safetensors", model, classes=["no", "yes"], preprocessing=steps)
    muntin.run.write_json(folder / "metrics.json", {"test_accuracy": 0.98765, "epochs": 3, "seconds": 9.0})
    return Run.open(folder)


def test_hub_card_of_a_run_has_its_metrics(run: Run, tmp_path: Path) -> None:
    folder = hub.save_pretrained(run, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "| accuracy on the test split | 0.9876 |" in card or "| accuracy on the test split | 0.9877 |" in card
    assert "| epochs | 3 |" in card and "at 32x48" in card and "2: no, yes" in card and "seconds" not in card
    again = hub.fetch(folder)
    assert again.classes == ["no", "yes"] and again.preprocessing == run.preprocessing
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_mode"] == "squash" and config["input_size"] == [3, 32, 48]


def test_hub_folder_is_a_run_to_every_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hub.save_pretrained(run, tmp_path / "out")
    image = pytest.importorskip("PIL.Image").new("RGB", (60, 40), "red")
    image.save(tmp_path / "red.png")
    rows = tmp_path / "rows.csv"
    assert main(["predict", str(folder), str(tmp_path / "red.png"), "--out", str(rows)]) in (0, None)
    assert ",no," in rows.read_text() and ",yes," in rows.read_text()


def test_hub_repositories_are_downloaded_once_by_its_library(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.save_pretrained(run, tmp_path / "cache")
    asked = []

    def download(repo_id: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(hub.from_pretrained("org/flowers", revision="v1")(image), run.model()(image))
    assert asked == [("org/flowers", "v1", list(hub.FILES))]
    monkeypatch.chdir(tmp_path)
    assert torch.equal(hub.from_pretrained("./cache")(image), run.model()(image)) and len(asked) == 1

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"cannot fetch org/flowers from the hub \(no connection\)"):
        hub.from_pretrained("org/flowers")
    with pytest.raises(UserError, match="no run at missing"):
        hub.from_pretrained("missing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install .muntin\[hub\]"):
        hub.from_pretrained("org/flowers")


def test_hub_repositories_open_in_timm(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.save_pretrained(run, tmp_path / "repository")
    fetched = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        fetched.append((repo_id, filename))
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model = timm.create_model("hf-hub:org/flowers", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(model(image), run.model()(image)) and model.name == run.name
    assert model.pretrained_cfg["label_names"] == ["no", "yes"] and model.pretrained_cfg["input_size"] == [3, 32, 48]
    assert fetched == [("org/flowers", "config.json"), ("org/flowers", "model.safetensors")]


def test_hub_push(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            calls.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return f"address of {repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push_to_hub(run, "org/flowers", private=True, license="mit") == "address of org/flowers"
    assert calls[0] == ("org/flowers", True, True) and sorted(calls[1]) == sorted(hub.FILES)
    card = calls[1]["README.md"].decode()
    assert 'fetch("org/flowers")' in card and '"hf-hub:org/flowers"' in card and "# flowers" in card


def test_hub_refuses_what_it_cannot_rebuild(tmp_path: Path) -> None:
    model = muntin.create_model("efficientvit_m0", 4)
    for bad, told in (
        (nn.Linear(2, 2), "without a name"),
        (muntin.optimize(model), "not an optimised"),
        (timm.create_model("muntin_swin_free_digits", num_classes=0), "without a name or classes"),
    ):
        with pytest.raises(UserError, match=told):
            hub.save_pretrained(bad, tmp_path)
    with pytest.raises(UserError, match="2 names of classes for a model of 4"):
        hub.save_pretrained(model, tmp_path, classes=["a", "b"])
    with pytest.raises(UserError, match="preprocessing has size"):
        hub.save_pretrained(model, tmp_path, preprocessing={"size": [1, 1]})
    assert list(tmp_path.iterdir()) == []


# torch.hub


def test_torch_hub_has_an_entry_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    conf = importlib.import_module("hubconf")
    entries = [name for name, value in vars(conf).items() if callable(value) and not name.startswith("_")]
    assert sorted(entries) == sorted([*muntin.list_models(), "model", "backbone"])  # as torch.hub.list finds them
    assert all(getattr(conf, name).__doc__ for name in entries)


def test_torch_hub_loads_from_a_checkout_alone(tmp_path: Path) -> None:
    """In a process that finds Muntin nowhere else."""
    code = f"""
import sys
sys.path = [p for p in sys.path if "muntin" not in p and p != {str(ROOT / "src")!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
import torch
load = lambda *a, **k: torch.hub.load({str(ROOT)!r}, *a, source="local", **k)
model = load("swin_t", num_classes=3, dim=8, heads=(1, 1, 1, 1))
other = load("model", "swin_t", num_classes=3, dim=8, heads=(1, 1, 1, 1))
maps = load("backbone", "swin_t", dim=8, heads=(1, 1, 1, 1))
image = torch.randn(1, 3, 32, 32)
print(tuple(model(image).shape), tuple(other(image).shape), len(maps(image)), sys.modules["muntin"].__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 3) (1, 3) 4 ") and str(ROOT / "src") in done.stdout


# all of them


def test_importing_muntin_imports_none_of_them() -> None:
    code = "import muntin, sys; print([m for m in ('timm', 'torchvision', 'huggingface_hub', 'segmentation_models_pytorch') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_pages_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 5
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(example, {})
