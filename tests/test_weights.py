"""Checkpoints in every dialect, whole and broken."""

import argparse
import os
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.models.swin_transformer as timm_swin
import torch
import torch.nn.functional as F
import torchvision
import transformers
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor, nn

from muntin.cli import main
from muntin.errors import UserError
from muntin.layers.reference import swin as reference
from muntin.models import create_backbone, create_model
from muntin.weights import LoadReport, convert, load_checkpoint
from muntin.weights.rules import read_name, write_name
from muntin.weights.swin import from_unfold, to_unfold

CONFIG: dict[str, Any] = {"dim": 8, "depths": (1, 2, 3, 1), "heads": (1, 2, 4, 8), "window": 4}
THEIRS = ["authors", "timm", "torchvision", "transformers"]
State = dict[str, Tensor]


@pytest.fixture
def model(randomise: Any) -> Any:
    return randomise(create_model("swin_t", 10, **CONFIG), seed=1).eval()


@pytest.fixture
def other(randomise: Any) -> Any:
    """Another model of the same shape."""
    return randomise(create_model("swin_t", 10, **CONFIG), seed=2).eval()


def _copy(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Dialects


def _shapes(state: State, skip: str = "relative_position_index") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if skip not in name}


def _installed(dialect: str) -> nn.Module:
    depths, heads = list(CONFIG["depths"]), list(CONFIG["heads"])
    if dialect == "timm":
        return timm_swin.SwinTransformer(
            img_size=128, embed_dim=8, depths=depths, num_heads=heads, window_size=4, num_classes=10
        )
    if dialect == "torchvision":
        return torchvision.models.SwinTransformer([4, 4], 8, depths, heads, [4, 4], num_classes=10)
    config = transformers.SwinConfig(
        image_size=128, embed_dim=8, depths=depths, num_heads=heads, window_size=4, num_labels=10
    )
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize("dialect", ["timm", "torchvision"])
def test_names_and_shapes_are_those_of_the_libraries(dialect: str, model: Any) -> None:
    assert _shapes(convert(model.state_dict(), dialect)) == _shapes(_installed(dialect).state_dict())


def test_names_and_shapes_are_the_authors(golden: Any) -> None:
    file = golden("swin")
    made = create_model("swin_t", 10, **{k: file.config[k] for k in ("dim", "depths", "heads", "window")})
    assert _shapes(convert(made.state_dict(), "authors")) == _shapes(file.weights)


GOLDEN = ["swin", "swin_any_size", "swin_free", "swinv2", "efficientvit", "efficientvit_distilled", "efficientvit_maps"]
GOLDEN += ["rmt_decomposed", "rmt_full", "rmt_maps"]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_authors_files_there_and_back(name: str, golden: Any) -> None:
    """What their code saved: every name, shape and value, each family, with heads and with output norms."""
    file = golden(name)
    config = dict(file.config)
    model_name, classes = config.pop("model"), config.pop("num_classes", None)
    made = create_backbone(model_name, **config) if classes is None else create_model(model_name, classes, **config)
    report = load_checkpoint(made, file.weights)
    assert report.dialect == "authors"
    assert not (report.resized or report.missing or report.unexpected or report.ignored)
    assert all(name.endswith("num_batches_tracked") for name in report.replaced)  # counters are not in these files
    state = {n: t for n, t in made.state_dict().items() if n not in report.replaced}
    assert _equal(convert(state, "authors"), file.weights)


def test_names_of_published_transformers_files(model: Any) -> None:
    """As in the files that transformers 4 wrote, from a file's list of names."""
    state = convert(model.state_dict(), "transformers")
    block = "swin.encoder.layers.2.blocks.1."
    names = [name.removeprefix(block) for name in state if name.startswith(block)]
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    parts += ["intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"]
    wanted = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(names) == wanted | {"attention.self.relative_position_bias_table"}
    assert {name for name in state if ".blocks." not in name} == {
        "swin.embeddings.patch_embeddings.projection.weight",
        "swin.embeddings.patch_embeddings.projection.bias",
        "swin.embeddings.norm.weight",
        "swin.embeddings.norm.bias",
        *(f"swin.encoder.layers.{s}.downsample.norm.{kind}" for s in range(3) for kind in ("weight", "bias")),
        *(f"swin.encoder.layers.{s}.downsample.reduction.weight" for s in range(3)),
        "swin.layernorm.weight",
        "swin.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert state[block + "attention.self.query.weight"].shape == (32, 32)


def test_names_of_mmdetection() -> None:
    state = convert(create_backbone("swin_t", out_norm=True, **CONFIG).state_dict(), "mm")
    block = "stages.2.blocks.1."
    parts = ["attn.w_msa.qkv", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1", "norm1", "norm2"]
    assert {name.removeprefix(block) for name in state if name.startswith(block)} == {
        "attn.w_msa.relative_position_bias_table",
        *(f"{part}.{kind}" for part in parts for kind in ("weight", "bias")),
    }
    assert {name for name in state if ".blocks." not in name} == {
        *(f"patch_embed.{part}.{kind}" for part in ("projection", "norm") for kind in ("weight", "bias")),
        *(f"stages.{s}.downsample.norm.{kind}" for s in range(3) for kind in ("weight", "bias")),
        *(f"stages.{s}.downsample.reduction.weight" for s in range(3)),
        *(f"norm{s}.{kind}" for s in range(4) for kind in ("weight", "bias")),
    }


def _published(path: Path) -> State:
    """Weights of these names and shapes; every one has a value of its own, and none takes memory."""
    state: State = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, shape, *dtype = line.split()
            sides = () if shape == "scalar" else tuple(map(int, shape.split("x")))
            value = torch.tensor(len(state), dtype=getattr(torch, dtype[0]) if dtype else torch.float32)
            state[name] = value.expand(sides)
    return state


LISTS = sorted((Path(__file__).parent / "published").glob("*.txt"))
SPOKEN = {"timm-0.6.13": "authors", "mmdet": "mm", "mmseg": "mm", "mmcls": "mmpretrain"}


@pytest.mark.parametrize("path", LISTS, ids=[path.stem for path in LISTS])
def test_names_and_shapes_of_published_files(path: Path) -> None:
    """Each weight of the file has its place, each place its weight, and the names that we write are the file's."""
    source, version, name = path.stem.split("-")
    dialect = SPOKEN.get(f"{source}-{version}", SPOKEN.get(source, source))
    state = _published(path)
    dense = source in ("mmdet", "mmseg")
    with torch.device("meta"):
        model = create_backbone(name, out_norm=True) if dense else create_model(name)
    model.to_empty(device="cpu")
    report = load_checkpoint(model, state)
    assert report.dialect == dialect
    assert not (report.resized or report.replaced or report.missing or report.unexpected or report.nonfinite)
    assert len(report.loaded) == len(model.state_dict())
    written = convert(model.state_dict(), dialect)
    if f"{source}-{version}" != "transformers-5.23.0":  # what is written are the names of the published files
        weights = {n.removeprefix("backbone."): t for n, t in state.items() if n not in report.ignored}
        assert _shapes(written) == _shapes(weights)
        if path.stem != "torchvision-0.15.2-swinv2_t":  # a key's bias, which its forward sets to zero, is left out
            assert _equal(written, weights)
    ours = {f"backbone.{n}" if dense else n: t for n, t in model.state_dict().items()}
    assert _equal(convert(written), ours)


@pytest.mark.parametrize("dialect", THEIRS)
def test_there_and_back_is_exact(dialect: str, model: Any, other: Any) -> None:
    theirs = convert(model.state_dict(), dialect)
    assert _equal(convert(theirs), dict(model.state_dict()))
    report = load_checkpoint(other, theirs)
    assert report.dialect == dialect
    assert set(report.loaded) == set(model.state_dict())
    assert _equal(_copy(other), _copy(model))


@pytest.mark.parametrize("dialect", ["authors", "mm", "transformers"])
def test_there_and_back_is_exact_for_backbones(dialect: str, randomise: Any) -> None:
    model, other = (randomise(create_backbone("swin_t", out_norm=True, **CONFIG), seed) for seed in (1, 2))
    theirs = convert(model.state_dict(), dialect)
    report = load_checkpoint(other, theirs)
    assert report.dialect == dialect
    assert set(report.loaded) == set(model.state_dict())
    assert _equal(_copy(other), _copy(model))


def test_transformers_modules_are_read_too(model: Any) -> None:
    theirs = _installed("transformers").state_dict()
    report = load_checkpoint(model, theirs)
    assert report.dialect == "transformers"
    q, k, v = (theirs[f"swin.encoder.layers.1.blocks.1.attention.{n}_proj.weight"] for n in "qkv")
    assert torch.equal(model.backbone.stages[1].blocks[1].attention.qkv.weight, torch.cat([q, k, v]))


def test_transformers_without_its_prefix(model: Any, other: Any) -> None:
    """SwinModel's own files have neither `swin.` nor a classifier."""
    theirs = convert(model.state_dict(), "transformers")
    bare = {name.removeprefix("swin."): tensor for name, tensor in theirs.items() if "classifier" not in name}
    report = load_checkpoint(other, bare)
    assert set(report.replaced) == {"head.fc.weight", "head.fc.bias"}
    assert torch.equal(other.head.norm.weight, model.head.norm.weight)


def test_timm_before_0_9_is_the_authors_dialect(model: Any, other: Any) -> None:
    """Then downsampling stood at the end of a stage and the head had no `fc`."""
    new = convert(model.state_dict(), "timm")
    old = {}
    for name, tensor in new.items():
        stage = name.split(".")[1]
        name = name.replace("head.fc.", "head.").replace(f"layers.{stage}.downsample", f"layers.{{{stage}}}.downsample")
        old[name.replace("{1}", "0").replace("{2}", "1").replace("{3}", "2")] = tensor
    assert load_checkpoint(other, old).dialect == "authors"
    assert _equal(_copy(other), _copy(model))


def test_unfold_order_is_that_of_unfold() -> None:
    """Patch merging as mmdetection writes it, with nn.Unfold itself, equals ours with the weights permuted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, 10, generator=generator, dtype=torch.float64)
    norm = nn.LayerNorm(24).double()
    norm.weight.data, norm.bias.data = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    reduction = nn.Linear(24, 12, bias=False).double()
    y = nn.Unfold(kernel_size=2, stride=2)(x)  # (B, 4C, N)
    wanted = reduction(norm(y.transpose(1, 2))).view(2, 4, 5, 12)
    ours = {
        "merge.norm.weight": from_unfold(norm.weight),
        "merge.norm.bias": from_unfold(norm.bias),
        "merge.reduction.weight": from_unfold(reduction.weight),
    }
    found = reference.merge_patches(x.permute(0, 2, 3, 1), ours, "merge", {"norm": "layer"})
    assert (found - wanted).abs().max() < 1e-12
    assert torch.equal(to_unfold(ours["merge.reduction.weight"]), reduction.weight)


def test_names_with_arithmetic() -> None:
    assert read_name("features.{2s+1}.{b}.norm1.*", "features.5.1.norm1.weight") == (
        ("*", "weight"),
        ("b", "1"),
        ("s", "2"),
    )
    assert read_name("features.{2s+1}.{b}.norm1.*", "features.4.1.norm1.weight") is None
    assert read_name("layers.{m}.downsample.*", "layers.0.downsample.x") is None
    assert read_name("layers.{m-1}.downsample.*", "layers.0.downsample.x") == (("*", "x"), ("m", "1"))
    assert read_name("(swin.)layernorm.*", "layernorm.bias") == (("*", "bias"),)
    assert write_name("(swin.)a.{2s+1}.*", (("*", "bias"), ("s", "2"))) == "swin.a.5.bias"


def test_unknown_target_of_a_conversion(model: Any) -> None:
    with pytest.raises(UserError, match="torchvison.*did you mean 'torchvision'"):
        convert(model.state_dict(), "torchvison")
    norms = create_backbone("swin_t", out_norm=True, **CONFIG)
    with pytest.raises(UserError, match="timm has no name for norms.0"):
        convert(norms.state_dict(), "timm")


# Files converted


def _converted(model: nn.Module, tmp_path: Path, out: str, to: str) -> Path:
    torch.save({"model": convert(model.state_dict(), "timm")}, tmp_path / "in.pth")
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / out), "--to", to]) == 0
    return tmp_path / out


def test_convert_writes_safetensors(model: Any, other: Any, tmp_path: Path, capsys: Any) -> None:
    path = _converted(model, tmp_path, "out.safetensors", "muntin")
    shown = capsys.readouterr().out
    assert f"{path}: swin, like no listed model (dim 8, depths 1-2-3-1" in shown
    assert "dialect     timm" in shown
    assert _equal(safetensors.torch.load_file(path), _copy(model))
    load_checkpoint(other, path)
    assert _equal(_copy(other), _copy(model))


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
@pytest.mark.parametrize("to", ["authors", "transformers", "torchvision", "mmpretrain"])
def test_convert_to_each_dialect(to: str, out: str, model: Any, other: Any, tmp_path: Path) -> None:
    path = _converted(model, tmp_path, out, to)
    if out.endswith(".pt"):
        content = torch.load(path, weights_only=True)
        assert ("model" in content) == (to == "authors")  # as their code reads it
    report = load_checkpoint(other, path)
    assert report.dialect == to
    assert _equal(_copy(other), _copy(model))


def test_convert_writes_turned_tables(tmp_path: Path, randomise: Any) -> None:
    """EfficientViT's tables are a transposed view of the authors', which safetensors does not take."""
    tiny = {"dims": (16, 24, 32), "heads": (2, 2, 2), "key_dim": 4}
    one = randomise(create_model("efficientvit_m0", 10, **tiny), 1)
    safetensors.torch.save_file(dict(one.state_dict()), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "in.safetensors"), str(out), "--to", "authors"]) == 0
    assert _equal(safetensors.torch.load_file(out), convert(one.state_dict(), "authors"))


def test_convert_says_what_is_wrong(model: Any, tmp_path: Path, capsys: Any) -> None:
    path = _converted(model, tmp_path, "out.safetensors", "muntin")
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for out, to, words in (
        ("out.safetensors", "timm", "is the file to convert"),
        ("link.safetensors", "timm", "is the file to convert"),
        ("out.bin", "timm", "ends in .safetensors, .pth or .pt"),
        ("other.pth", "tim", "did you mean 'timm'"),
    ):
        assert main(["convert", str(path), str(tmp_path / out), "--to", to]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pth"), str(path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    torch.save(convert(model.state_dict(), "timm") | {"extra": torch.ones(2)}, tmp_path / "more.pth")
    assert main(["convert", str(tmp_path / "more.pth"), str(path)]) == 2
    assert "no name in muntin for extra" in capsys.readouterr().err
    assert path.read_bytes() == before


# What is wrapped around weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.module."])
@pytest.mark.parametrize("dialect", ["muntin", "timm"])
def test_prefixes(prefix: str, dialect: str, model: Any, other: Any) -> None:
    load_checkpoint(other, {prefix + name: t for name, t in convert(model.state_dict(), dialect).items()})
    assert _equal(_copy(other), _copy(model))


def test_into_a_wrapped_model(model: Any, other: Any) -> None:
    """A compiled model or a training module has prefixes of its own."""
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"_orig_mod": other})})
    report = load_checkpoint(wrapped, convert(model.state_dict(), "timm"))
    assert "model._orig_mod.backbone.stem.proj.weight" in report.loaded
    assert _equal(_copy(other), _copy(model))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "max_accuracy": torch.tensor(81.2)},
        lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}, "hyper_parameters": {"lr": 1e-3}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {n: t + 1 for n, t in state.items()}, "state_dict_ema": state},
        lambda state: {"model": {n: t + 1 for n, t in state.items()}, "model_ema": state},
    ],
)
def test_entries(wrap: Callable[[State], Any], model: Any, other: Any, tmp_path: Path) -> None:
    torch.save(wrap(convert(model.state_dict(), "authors")), tmp_path / "file.pth")
    load_checkpoint(other, tmp_path / "file.pth")
    assert _equal(_copy(other), _copy(model))


def test_the_state_of_our_own_training(model: Any, other: Any, tmp_path: Path) -> None:
    """The average comes before the weights, as elsewhere; the sums of the loss are no weights."""
    weights = model.state_dict()
    state = {f"model.{n}": t + 1 for n, t in weights.items()} | {f"average.{n}": t for n, t in weights.items()}
    sums = {"loss_sum": torch.ones(()), "loss_count": torch.ones(())}
    torch.save({"state_dict": state | sums, "epoch": 3}, tmp_path / "best.ckpt")
    report = load_checkpoint(other, tmp_path / "best.ckpt")
    assert _equal(_copy(other), _copy(model))
    report = load_checkpoint(other, {n: t for n, t in state.items() if n.startswith("model.")} | sums)
    assert set(report.ignored) == set(sums)
    assert torch.equal(other.head.fc.bias, model.head.fc.bias + 1)


def test_an_average_of_torch(model: Any, other: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    assert load_checkpoint(other, average.state_dict()).ignored == ("n_averaged",)
    assert _equal(_copy(other), _copy(model))


def test_a_detector_gives_its_backbone(randomise: Any) -> None:
    backbone, target = (randomise(create_backbone("swin_t", out_norm=True, **CONFIG), seed) for seed in (1, 2))
    state = {f"backbone.{name}": tensor for name, tensor in convert(backbone.state_dict(), "mm").items()}
    state |= {f"roi_head.{i}.weight": torch.ones(2) for i in range(300)} | {"neck.conv.weight": torch.ones(3)}
    report = load_checkpoint(target, {"state_dict": state, "meta": {"epoch": 12}})
    assert report.dialect == "mm"
    assert len(report.ignored) == 301
    assert _equal(_copy(target), _copy(backbone))


@pytest.mark.parametrize("prefix", ["encoder.", "model.pixel_level_module.encoder.", "student.net."])
@pytest.mark.parametrize("dialect", ["muntin", "timm", "transformers"])
def test_a_part_of_something_else(prefix: str, dialect: str, model: Any, other: Any) -> None:
    """Where all of a backbone's names begin alike, whatever is beside them belongs to something else."""
    bare = {n.removeprefix("backbone."): t for n, t in convert(model.state_dict(), dialect).items()}
    state = {prefix + name: tensor for name, tensor in bare.items()}
    beside = {"decoder.0.weight": torch.ones(2), "loss.center": torch.ones(3)}
    report = load_checkpoint(other, state | beside)
    assert (report.dialect, set(report.ignored)) == (dialect, set(beside))
    assert _equal(_copy(other), _copy(model))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "efficientvit_m0"])
def test_timm_features(name: str) -> None:
    """timm's features_only writes layers_0 for layers.0."""
    theirs = timm.create_model(name, features_only=True).state_dict()
    ours = create_backbone({"swin_tiny_patch4_window7_224": "swin_t"}.get(name, name))
    report = load_checkpoint(ours, theirs)
    assert len(report.loaded) + len(report.resized) == len(ours.state_dict()) == len(theirs)


def test_transformers_segmenters(randomise: Any) -> None:
    """Output norms and all, out of a model that has the backbone deep inside."""
    config = {"embed_dim": 8, "depths": [1, 2, 3, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
    face = transformers.SwinConfig(**config, out_features=[f"stage{s}" for s in (1, 2, 3, 4)])
    for theirs in (
        transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=face)),
        transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(backbone_config=face)),
    ):
        ours = create_backbone("swin_t", out_norm=True, **CONFIG)
        report = load_checkpoint(ours, theirs.state_dict())
        assert len(report.loaded) == len(ours.state_dict())


def test_derived_buffers_are_ignored(model: Any, other: Any) -> None:
    state = convert(model.state_dict(), "authors")
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    report = load_checkpoint(other, state)
    assert set(report.ignored) == {"layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask"}
    assert _equal(_copy(other), _copy(model))


def test_our_own_file(model: Any, other: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert load_checkpoint(other, tmp_path).dialect == "muntin"  # a folder that holds a model.safetensors
    assert _equal(_copy(other), _copy(model))


def test_statistics_of_batch_norm(randomise: Any) -> None:
    model, other = (randomise(create_model("swin_b_br", 10, **CONFIG), seed) for seed in (1, 2))
    model.head.norm.num_batches_tracked += 7
    report = load_checkpoint(other, model.state_dict())
    assert "backbone.stem.norm.running_mean" in report.loaded
    assert _equal(_copy(other), _copy(model))


def test_other_dtypes_are_cast(model: Any, other: Any) -> None:
    load_checkpoint(other, {name: tensor.half() for name, tensor in model.state_dict().items()})
    assert other.head.fc.weight.dtype == torch.float32
    assert torch.equal(other.head.fc.weight, model.head.fc.weight.half().float())


def test_a_model_of_ones_own() -> None:
    """A backbone from outside, for which there are no rules, takes weights under its own names."""
    one, two = (nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)) for _ in range(2))
    report = load_checkpoint(two, {"state_dict": {f"module.{n}": t for n, t in one.state_dict().items()}})
    assert set(report.loaded) == set(one.state_dict())
    assert _equal(_copy(two), _copy(one))
    _rejected(two, {"0.weight": one[0].weight}, "missing: 0.bias")
    twins = nn.ModuleDict({"backbone": nn.Linear(2, 2), "net": nn.Linear(2, 2)})  # `weight` twice without prefixes
    other = {name: tensor + 1 for name, tensor in twins.state_dict().items()}
    load_checkpoint(twins, other)
    assert _equal(_copy(twins), other)


# What need not be the same


def test_tables_of_another_window(model: Any) -> None:
    wider = create_model("swin_t", 10, **CONFIG | {"window": 7}).eval()
    report = load_checkpoint(wider, convert(model.state_dict(), "authors"))
    assert len(report.resized) == sum(CONFIG["depths"])
    name = "backbone.stages.2.blocks.1.attention.bias_table"
    assert report.details[name] == "7x7 to 13x13"
    table = model.backbone.stages[2].blocks[1].attention.bias_table.detach()
    for head in range(4):
        grid = table[:, head].view(1, 1, 7, 7)
        wanted = F.interpolate(grid, size=(13, 13), mode="bicubic", align_corners=False)
        found = wider.backbone.stages[2].blocks[1].attention.bias_table[:, head]
        assert torch.allclose(found.view(13, 13), wanted[0, 0], atol=1e-6)
    flat = {n: torch.full_like(t, 0.25) if n.endswith("bias_table") else t for n, t in model.state_dict().items()}
    load_checkpoint(wider, flat)
    assert torch.allclose(wider.backbone.stages[0].blocks[0].attention.bias_table, torch.tensor(0.25))


@pytest.mark.parametrize(("size", "given"), [((64, 128), (2, 4)), ((128, 64), (4, 2)), ((64, 128), (4, 8))])
def test_tables_of_windows_that_are_not_square(size: tuple[int, int], given: tuple[int, int], model: Any) -> None:
    """timm cuts the windows of its last stages to maps that are not square."""
    theirs = timm_swin.SwinTransformer(
        img_size=size,
        embed_dim=8,
        depths=list(CONFIG["depths"]),
        num_heads=list(CONFIG["heads"]),
        window_size=4,
        num_classes=10,
    )
    state = theirs.state_dict()
    table = state["layers.3.blocks.0.attn.relative_position_bias_table"]
    assert len(table) == 21  # of 3 x 7 offsets, or of 7 x 3
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    _rejected(model, state, "21x8 in the file, 49x8 in the model", "file_window=(2, 4) or (4, 2)")
    report = load_checkpoint(model, state, file_window=given)
    name = "backbone.stages.3.blocks.0.attention.bias_table"
    sides = (3, 7) if size[0] < size[1] else (7, 3)
    assert report.details[name] == f"{sides[0]}x{sides[1]} to 7x7"
    wanted = F.interpolate(table.t().view(1, 8, *sides), size=(7, 7), mode="bicubic", align_corners=False)
    assert torch.allclose(model.state_dict()[name], wanted.flatten(2)[0].t(), atol=1e-6)
    # files of before 0.9 hold the index of positions, which shows the window
    index = theirs.layers[3].blocks[0].attn.relative_position_index
    other = create_model("swin_t", 10, **CONFIG)
    report = load_checkpoint(other, state | {"layers.3.blocks.0.attn.relative_position_index": index})
    assert report.details[name] == f"{sides[0]}x{sides[1]} to 7x7"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_classes_out_of_a_larger_head(model: Any) -> None:
    few = create_model("swin_t", 3, **CONFIG)
    report = load_checkpoint(few, convert(model.state_dict(), "timm"), classes=[7, 0, 9])
    assert torch.equal(few.head.fc.weight, model.head.fc.weight[[7, 0, 9]])
    assert torch.equal(few.head.fc.bias, model.head.fc.bias[[7, 0, 9]])
    assert not report.replaced
    assert "head.fc.weight (3 of 10 classes)" in str(report)
    with pytest.raises(UserError, match="classes=.10.: give numbers from 0 to 9"):
        load_checkpoint(few, model.state_dict(), classes=[10])
    with pytest.raises(UserError, match="with 21841 classes, this one has 10"):
        load_checkpoint(few, model.state_dict(), classes="imagenet-1k")
    with pytest.raises(UserError, match="'imagenet-1k' or numbers"):
        load_checkpoint(few, model.state_dict(), classes="imagenet")
    with pytest.raises(UserError, match="no last layer"):
        load_checkpoint(few, model.backbone.state_dict(), classes=[1])


def test_imagenet_1k_out_of_22k() -> None:
    """The authors' published list, against the synsets that timm ships: some of theirs are missing in timm's."""
    many, one = create_model("swin_t", 21841, **CONFIG), create_model("swin_t", 1000, **CONFIG)
    many.head.fc.bias.data = torch.arange(21841.0)
    load_checkpoint(one, convert(many.state_dict(), "authors"), classes="imagenet-1k")
    found = one.head.fc.bias.tolist()
    folder = Path(timm_swin.__file__).parents[1] / "data" / "_info"
    synsets = {s: i for i, s in enumerate((folder / "imagenet22k_synsets.txt").read_text().split())}
    wanted = [synsets.get(s) for s in (folder / "imagenet_synsets.txt").read_text().split()]
    assert len(set(found)) == 1000
    shifts = [f - w for f, w in zip(found, wanted, strict=True) if w is not None]
    assert shifts == [0] * 718 + [1] * 263 + [2] * 18


def test_head_of_another_class_count(model: Any) -> None:
    wide = create_model("swin_t", 37, **CONFIG).eval()
    before = wide.head.fc.weight.clone(), wide.head.fc.bias.clone()
    report = load_checkpoint(wide, convert(model.state_dict(), "timm"))
    assert set(report.replaced) == {"head.fc.weight", "head.fc.bias"}
    assert report.details["head.fc.bias"] == "10 classes in the file, 37 in the model"
    assert torch.equal(wide.head.fc.weight, before[0]) and torch.equal(wide.head.fc.bias, before[1])
    assert torch.equal(wide.head.norm.weight, model.head.norm.weight)


def test_a_classifier_into_a_backbone(model: Any, randomise: Any) -> None:
    backbone = randomise(create_backbone("swin_t", out_norm=True, **CONFIG), seed=3)
    norms = {name: t.clone() for name, t in backbone.state_dict().items() if name.startswith("norms.")}
    report = load_checkpoint(backbone, convert(model.state_dict(), "timm"))
    assert set(report.ignored) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert set(report.replaced) == set(norms)
    assert all(torch.equal(backbone.state_dict()[name], t) for name, t in norms.items())
    assert torch.equal(backbone.stages[1].merge.reduction.weight, model.backbone.stages[1].merge.reduction.weight)


def test_detection_weights_into_a_classifier(model: Any, randomise: Any) -> None:
    backbone = randomise(create_backbone("swin_t", out_norm=True, **CONFIG), seed=3)
    before = _copy(model)
    report = load_checkpoint(model, convert(backbone.state_dict(), "authors"))
    assert set(report.ignored) == {f"norm{s}.{kind}" for s in range(4) for kind in ("weight", "bias")}
    assert set(report.replaced) == {n for n in before if n.startswith("head.")}
    assert torch.equal(model.head.norm.weight, before["head.norm.weight"])
    assert torch.equal(model.backbone.stem.proj.weight, backbone.stem.proj.weight)


def test_a_backbone_that_returns_some_stages(model: Any, randomise: Any) -> None:
    whole = randomise(create_backbone("swin_t", out_norm=True, **CONFIG), seed=3)
    part = create_backbone("swin_t", out_indices=(1, 2), out_norm=True, **CONFIG)
    report = load_checkpoint(part, convert(whole.state_dict(), "authors"))
    assert set(report.ignored) == {f"norm{s}.{kind}" for s in (0, 3) for kind in ("weight", "bias")}
    assert torch.equal(part.norms["2"].weight, whole.norms["2"].weight)


def test_what_was_kept_for_old_weights_is_made_anew(model: Any, other: Any) -> None:
    """Biases are kept between calls in inference; loading must not leave the old ones behind."""
    image = torch.randn(1, 3, 61, 83, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(image)
        other(image)
        load_checkpoint(other, convert(model.state_dict(), "torchvision"))
        assert torch.equal(other(image), wanted)


# What does not fit


def _rejected(model: nn.Module, given: Any, *words: str) -> None:
    """Refused with these words on one line, and the model is what it was."""
    before = _copy(model)
    with pytest.raises(UserError) as caught:
        load_checkpoint(model, given)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    assert _equal(_copy(model), before)


def test_missing_unexpected_and_misshapen(model: Any, other: Any) -> None:
    state = convert(other.state_dict(), "timm")
    short = {n: t for n, t in state.items() if n != "layers.2.blocks.1.mlp.fc1.bias"}
    _rejected(model, short, "1 missing: stages.2.blocks.1.mlp.fc1.bias", "swin_t", "strict=False")
    _rejected(model, state | {"layers.2.blocks.1.attn.logit_scale": torch.ones(4)}, "1 unexpected: layers.2.blocks.1")
    bent = state | {"layers.1.blocks.0.norm2.weight": torch.ones(17)}
    _rejected(model, bent, "1 of another shape: stages.1.blocks.0.norm2.weight (17 in the file, 16 in the model)")
    _rejected(model, {n: t for n, t in state.items() if n != "head.fc.bias"}, "missing: head.fc.bias")
    _rejected(model, {n: t for n, t in state.items() if not n.startswith("norm.")}, "missing: head.norm")


def test_not_strict_loads_the_rest(model: Any, other: Any) -> None:
    before = _copy(model)
    state = convert(other.state_dict(), "timm")
    del state["layers.2.blocks.1.mlp.fc1.bias"]
    state["layers.1.blocks.0.norm2.weight"] = torch.ones(17)
    state["extra"] = torch.ones(1)
    report = load_checkpoint(model, state, strict=False)
    bias, norm = "backbone.stages.2.blocks.1.mlp.fc1.bias", "backbone.stages.1.blocks.0.norm2.weight"
    assert report.missing == (bias,)
    assert report.unexpected == ("extra",)
    assert report.replaced == (norm,)
    assert report.details[norm] == "17 in the file, 16 in the model"
    after = _copy(model)
    assert torch.equal(after[bias], before[bias]) and torch.equal(after[norm], before[norm])
    assert torch.equal(after["head.fc.weight"], other.head.fc.weight)
    assert len(report.loaded) == len(before) - 2


def test_weights_of_another_model(model: Any) -> None:
    with torch.device("meta"):
        states = {name: convert(create_model(name).state_dict(), "authors") for name in ("swin_b", "swin_s")}
    small = create_model("swin_t", 1000)
    _rejected(small, states["swin_b"], "like swin_b", "dim 128", "the model is swin_t (dim 96, depths 2-2-6-2")
    _rejected(small, states["swin_s"], "like swin_s", "depths 2-2-18-2", "swin_t")
    _rejected(model, convert(small.state_dict(), "timm"), "like swin_t (dim 96", "(dim 8, depths 1-2-3-1")
    batch = create_model("swin_b_br", **CONFIG)
    _rejected(batch, model.state_dict(), "like no listed model", "norm layer", "swin_b_br", "norm batch")


def test_weights_of_another_family(model: Any) -> None:
    vit = {
        "patch_embed.proj.weight": torch.ones(8, 3, 16, 16),
        "norm.weight": torch.ones(8),
        "cls_token": torch.ones(8),
    }
    vit |= {f"blocks.{i}.attn.qkv.weight": torch.ones(24, 8) for i in range(12)}
    _rejected(model, vit, "the state dict", "2 of 15 names fit swin", "cls_token", "timm")
    _rejected(model, {"layer1.0.conv1.weight": torch.ones(8)}, "0 of 1 names")


def test_weights_of_another_family_here(model: Any) -> None:
    with torch.device("meta"):
        states = {name: create_model(name).state_dict() for name in ("efficientvit_m0", "rmt_s", "swinv2_s", "swin_t")}
    for name, dialect in (("efficientvit_m0", "timm"), ("rmt_s", "authors"), ("swinv2_s", "torchvision")):
        family = name.partition("_")[0]
        _rejected(
            model, convert(states[name], dialect), f"weights of {family} (like {name}), the model is swin_t (swin)"
        )
    small = create_model("efficientvit_m0")
    _rejected(small, states["swin_t"], "weights of swin (like swin_t)", "the model is efficientvit_m0 (efficientvit)")
    with pytest.raises(UserError, match="weights of swin"):
        load_checkpoint(small, states["swin_t"], strict=False)


def test_every_last_layer_is_replaced() -> None:
    tiny = {"dims": (16, 24, 32), "heads": (2, 2, 2), "key_dim": 4, "distilled": True}
    one, two = create_model("efficientvit_m0", 10, **tiny), create_model("efficientvit_m0", 7, **tiny)
    report = load_checkpoint(two, convert(one.state_dict(), "authors"))
    wanted = {f"head.{name}.{kind}" for name in ("fc", "fc_distilled") for kind in ("weight", "bias")}
    assert set(report.replaced) == wanted
    assert all(report.details[name] == "10 classes in the file, 7 in the model" for name in wanted)


def test_two_dialects_mixed(model: Any) -> None:
    mixed = convert(model.state_dict(), "timm") | convert(model.state_dict(), "torchvision")
    names = "patch_embed.proj.weight (swin by timm)", "features.0.0.weight (swin by torchvision)"
    _rejected(model, mixed, "two dialects", *names)
    with pytest.raises(UserError, match="two dialects"):
        load_checkpoint(model, mixed, strict=False)
    twice = convert(model.state_dict(), "timm")
    twice |= {f"module.{name}": tensor for name, tensor in twice.items()}
    _rejected(model, twice, "stem.proj.weight is there twice", "module.patch_embed.proj.weight")


def test_parts_that_cannot_be_joined(model: Any) -> None:
    state = convert(model.state_dict(), "transformers")
    name = "swin.encoder.layers.0.blocks.0.attention.self.key.weight"
    _rejected(model, state | {name: torch.ones(3, 3, 3)}, name, "(3, 3, 3)", "stages.0.blocks.0.attention.qkv.weight")
    state = convert(create_backbone("swin_t", **CONFIG).state_dict(), "mm")
    state["stages.0.downsample.norm.weight"] = torch.ones(31)
    _rejected(model, state, "stages.0.downsample.norm.weight of shape (31,)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to_sparse(), "mlp.fc1.weight is sparse"),
        (
            lambda t: torch.nested.as_nested_tensor([t, t[:2]], layout=torch.jagged),
            "mlp.fc1.weight is sparse or nested",
        ),
        (lambda t: t.to("meta"), "mlp.fc1.weight is on the meta device"),
        (lambda t: t.to(torch.int8), "mlp.fc1.weight (torch.int8 in the file, torch.float32 in the model)"),
        (lambda t: t.to(torch.complex64), "torch.complex64 in the file"),
    ],
)
def test_tensors_that_are_no_weights(change: Callable[[Tensor], Tensor], words: str, model: Any) -> None:
    state = convert(model.state_dict(), "timm")
    name = "layers.1.blocks.0.mlp.fc1.weight"
    _rejected(model, state | {name: change(state[name])}, words)


def test_what_weights_come_from(model: Any) -> None:
    for given in (None, 5, ["file.pth"]):
        _rejected(model, given, "a path, an address or a state dict")
    _rejected(model, model, "not from a Classifier: its state_dict()?")
    _rejected(model, {1: torch.ones(2)}, "no weights")
    endless: dict[str, Any] = {}
    endless["model"] = endless
    _rejected(model, endless, "no weights")
    for window in (5, (0, 4), (4,), "4x7"):
        with pytest.raises(UserError, match="height and width"):
            load_checkpoint(model, {}, file_window=window)  # type: ignore[arg-type]


def test_a_query_without_its_key(model: Any) -> None:
    state = convert(model.state_dict(), "transformers")
    del state["swin.encoder.layers.0.blocks.0.attention.self.key.weight"]
    _rejected(model, state, "missing: stages.0.blocks.0.attention.qkv.weight", "self.query.weight")


def test_nan_is_reported(model: Any, other: Any) -> None:
    other.head.fc.weight.data[0, 0] = float("nan")
    other.backbone.stem.proj.bias.data[1] = float("inf")
    with pytest.warns(UserWarning, match="NaN or infinity in backbone.stem.proj.bias, head.fc.weight"):
        report = load_checkpoint(model, other.state_dict())
    assert set(report.nonfinite) == {"backbone.stem.proj.bias", "head.fc.weight"}
    assert "nonfinite" in str(report)


def test_no_storage_to_load_into(other: Any) -> None:
    with torch.device("meta"):
        empty = create_model("swin_t", 10, **CONFIG)
    with pytest.raises(UserError, match="meta device"):
        load_checkpoint(empty, other.state_dict())


# Files


class Code:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(form: str, model: Any, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "file.pth"
    content = {"model": convert(model.state_dict(), "authors"), "code": Code(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    _rejected(model, path, "file.pth", "could run code", "not opened", "safetensors")
    assert not mark.exists()


class Settings(dict[str, Any]):
    """Stands for a training script's own class."""


@pytest.mark.parametrize("legacy", [False, True])
def test_records_of_training_code_are_passed_over(legacy: bool, model: Any, other: Any, tmp_path: Path) -> None:
    """Settings and logs of known kinds, beside the weights: read without importing what made them."""
    extra = {"args": argparse.Namespace(lr=1.0, out=[Path("x")]), "best": np.float64(3), "log": np.ones(3)}
    extra |= {"hyper_parameters": AttributeDict(lr=1.0), "mean": Settings.fromkeys}
    state = {"model": convert(model.state_dict(), "authors")}
    for value in extra.values():
        torch.save(state | {"extra": value}, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
        if callable(value):
            _rejected(other, tmp_path / "file.pth", "test_weights.Settings", "save the tensors alone")
        else:
            load_checkpoint(other, tmp_path / "file.pth")
            assert _equal(_copy(other), _copy(model))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files(suffix: str, model: Any, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    _rejected(model, path, f"no checkpoint at {path}", ".safetensors")
    path.touch()
    _rejected(model, path, str(path), "empty (0 bytes)")
    path.write_text("<html>404 not found</html>")
    _rejected(model, path, str(path), "again")
    path.write_bytes(bytes(range(256)) * 8)
    _rejected(model, path, str(path), "again")
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(dict(model.state_dict()), path)
    path.write_bytes(path.read_bytes()[:-1000])
    _rejected(model, path, str(path), "again")


def test_files_of_something_else(model: Any, tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    _rejected(model, tmp_path / "list.pth", "holds a list", "state dict")
    torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, tmp_path / "optimizer.pth")
    _rejected(model, tmp_path / "optimizer.pth", "no weights", "optimizer, epoch", "state_dict")
    torch.save({}, tmp_path / "nothing.pth")
    _rejected(model, tmp_path / "nothing.pth", "no weights", "nothing")
    _rejected(model, tmp_path, f"no checkpoint at {tmp_path}")


# The report


def test_report_prints_as_a_table(model: Any) -> None:
    wide = create_model("swin_t", 37, **CONFIG | {"window": 7})
    report = load_checkpoint(wide, convert(model.state_dict(), "torchvision"))
    rows = {line.split()[0]: line for line in str(report).splitlines()}
    assert rows["dialect"].endswith("torchvision")
    assert rows["loaded"].split()[1] == str(len(report.loaded))
    assert "7x7 to 13x13" in rows["resized"] and "and 4 more" in rows["resized"]
    assert "head.fc.weight (10 classes in the file, 37 in the model)" in rows["replaced"]
    assert rows["missing"].split()[1] == "0"


def test_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LoadReport("timm").dialect = "mm"  # type: ignore[misc]


def test_model_by_path(model: Any, tmp_path: Path) -> None:
    torch.save(convert(model.state_dict(), "authors"), tmp_path / "file.pth")
    made = create_model("swin_t", 10, pretrained=str(tmp_path / "file.pth"), **CONFIG)
    assert _equal(_copy(made), _copy(model))


@pytest.mark.parametrize("beside", [{"ema": {"decay": 0.99}}, {"model_ema": {}}, {"state_dict": {"lr": 1}}], ids=str)
def test_entries_without_weights_are_passed_over(beside: dict[str, Any], model: Any, other: Any) -> None:
    load_checkpoint(model, {**beside, "model": other.state_dict()})
    assert _equal(model.state_dict(), other.state_dict())


def test_a_file_under_the_other_kinds_name(tmp_path: Path, model: Any, other: Any) -> None:
    safetensors.torch.save_file(other.state_dict(), tmp_path / "weights.pth")
    load_checkpoint(model, tmp_path / "weights.pth")
    assert _equal(model.state_dict(), other.state_dict())
    torch.save(other.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="one of torch.save: call it .pth"):
        load_checkpoint(model, tmp_path / "weights.safetensors")


def test_values_that_do_not_fit_the_models_precision_are_reported(model: Any) -> None:
    state = _copy(model) | {"head.fc.bias": torch.full((10,), 1e6)}
    with pytest.warns(UserWarning, match="NaN or infinity"):
        assert load_checkpoint(model.half(), state).nonfinite == ("head.fc.bias",)
