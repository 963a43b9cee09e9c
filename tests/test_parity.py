"""Numerically the authors' models, and those of timm, torchvision and transformers with the same random weights."""

from typing import Any

import pytest
import timm.models.swin_transformer as timm_swin
import torch
import torchvision
import transformers
from torch import Tensor, nn

from conftest import error_of
from muntin.models import create_backbone, create_model
from muntin.weights import load_checkpoint

SMALL: dict[str, Any] = {"dim": 16, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 7}
FULL: dict[str, Any] = {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7}
SHARED_SIZES = [(224, 224), (448, 448), (224, 448)]
ODD_SIZES = [(256, 256), (240, 304)]
SQUARE_OR_ODD = [(224, 224), (448, 448), *ODD_SIZES]


def _image(size: tuple[int, int], batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def _timm(config: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    return timm_swin.SwinTransformer(
        img_size=size,
        embed_dim=config["dim"],
        depths=config["depths"],
        num_heads=config["heads"],
        window_size=config["window"],
        num_classes=10,
    )


def _torchvision(config: dict[str, Any], size: tuple[int, int], **options: Any) -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=config["dim"],
        depths=list(config["depths"]),
        num_heads=list(config["heads"]),
        window_size=[config["window"]] * 2,
        stochastic_depth_prob=0.0,
        num_classes=10,
        **options,
    )


def _transformers(config: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=size,
            embed_dim=config["dim"],
            depths=list(config["depths"]),
            num_heads=list(config["heads"]),
            window_size=config["window"],
            num_labels=10,
        )
    )


PEERS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}
# timm rolls before it pads and so differs from everybody at sizes that its window does not divide.
CASES = [
    *(("timm", SMALL, size) for size in SHARED_SIZES),
    *(("torchvision", SMALL, size) for size in SHARED_SIZES + ODD_SIZES),
    *(("transformers", SMALL, size) for size in SQUARE_OR_ODD),
    *((peer, FULL, (224, 224)) for peer in PEERS),
]


@pytest.mark.parametrize(("peer", "config", "size"), CASES, ids=[f"{p}-{c['dim']}-{s[0]}x{s[1]}" for p, c, s in CASES])
def test_peers(peer: str, config: dict[str, Any], size: tuple[int, int], randomise: Any) -> None:
    other = randomise(PEERS[peer](config, size)).eval()
    model = create_model("swin_t", 10, **config).eval()
    report = load_checkpoint(model, other.state_dict())
    assert report.dialect == peer
    assert len(report.loaded) == len(model.state_dict())
    image = _image(size)
    with torch.no_grad():
        wanted = other(image)
        found = model(image)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
    assert error_of(found, wanted) < 1e-4


@pytest.mark.parametrize("name", ["swin", "swin_any_size", "swin_free"])
def test_authors(name: str, golden: Any) -> None:
    file = golden(name)
    config = dict(file.config)
    variant, classes, norms = config.pop("model"), config.pop("num_classes", None), config.pop("out_norm", False)
    if classes is not None:
        model = create_model(variant, classes, **config).eval()
    else:
        model = create_backbone(variant, out_norm=norms, **config).eval()
    assert load_checkpoint(model, file.weights).dialect == "authors"
    for image, wanted in file.pairs:
        for grad in (False, True):  # the forward of inference and that of training
            with torch.set_grad_enabled(grad):
                found = model(image) if classes is None else [model(image)]
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert error_of(one.detach(), other) < 1e-5


class ChannelNorm(nn.BatchNorm2d):
    """BatchNorm over (B, H, W) of a map whose channels stand last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _with_relu(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.GELU):
            setattr(module, name, nn.ReLU())
        else:
            _with_relu(child)
    return module


def _warm_up(model: nn.Module, image: Tensor) -> None:
    """Running statistics near those of the image: with random ones most of a deep model is dead."""
    norms = [module for module in model.modules() if isinstance(module, ChannelNorm)]
    for norm in norms:
        norm.momentum = 0.9
    model.train()(image)
    for norm in norms:
        norm.momentum = 0.1


@pytest.mark.parametrize("size", [(224, 224), (240, 304)])
@pytest.mark.parametrize("training", [True, False])
def test_br_is_swin_with_batch_norm_and_relu(training: bool, size: tuple[int, int], randomise: Any) -> None:
    """240x304 pads windows: padded positions in the statistics would show in both modes."""
    other = randomise(_with_relu(_torchvision(SMALL, size, norm_layer=ChannelNorm))).double()
    _warm_up(other, _image(size, batch=2).double())
    model = create_model("swin_b_br", 10, **SMALL).double()
    load_checkpoint(model, other.state_dict())
    other.train(training)
    model.train(training)
    image = _image(size, batch=2).double()
    wanted, found = other(image), model(image)
    assert error_of(found.detach(), wanted.detach()) < 1e-9
    found.square().mean().backward()
    wanted.square().mean().backward()
    mine, theirs = model.backbone.stages[2].blocks[1], other.features[5][1]
    for a, b in (
        (mine.norm1.weight, theirs.norm1.weight),
        (mine.attention.bias_table, theirs.attn.relative_position_bias_table),
        (model.backbone.stages[1].merge.norm.weight, other.features[2].norm.weight),
    ):
        assert error_of(a.grad, b.grad) < 1e-6
    # statistics: a step in training has moved both to the same values, evaluation neither
    after = create_model("swin_b_br", 10, **SMALL).double()
    load_checkpoint(after, other.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, after.state_dict()[name], rtol=1e-9, atol=1e-12), name


def test_br_drops_norms_and_activations_of_the_layer_model() -> None:
    """The published row: every norm is a BatchNorm, every activation ReLU."""
    with torch.device("meta"):
        model = create_model("swin_b_br")
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.LayerNorm, nn.GELU}
    assert sum(isinstance(module, nn.BatchNorm1d) for module in model.modules()) == 2 * 24 + 1 + 3 + 1
