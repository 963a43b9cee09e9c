"""Other libraries' models at their best: built by name, with our weights where we have the architecture, tuned for
inference as their documentation recommends.

B batch, H W image
"""

import copy
import re
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from muntin.errors import UserError, nearest

TIMM = re.compile(r"swin_(tiny|small|base|large)_patch4_window7_224|swinv2_(tiny|small|base)_window8_256")
HUB = re.compile(r"(?:microsoft/)?(swin|swinv2)-(tiny|small|base|large)-patch4-window(?:7-224|8-256)")
TORCHVISION = re.compile(r"swin_(v2_)?([tsb])")


class LogitsOnly(nn.Module):
    """A transformers classifier that returns its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


class ChannelsLast(nn.Module):
    """A model in channels-last memory, its image too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Any:
        return self.model(images.contiguous(memory_format=torch.channels_last))


def counterpart(library: str, name: str) -> str | None:
    """Our listed model of the same architecture, or None."""
    from muntin.models import list_models

    if library == "transformers":
        return ours_by_hub_name(name)
    if library == "torchvision":
        match = TORCHVISION.fullmatch(name)
        found = f"{'swinv2' if match[1] else 'swin'}_{match[2]}" if match else ""
    else:
        name = name.partition(".")[0]  # after the point timm names the weights
        match = TIMM.fullmatch(name)
        found = f"{name.partition('_')[0]}_{(match[1] or match[2])[0]}" if match else name
        found = found if match or name.startswith("efficientvit_m") else ""
    return found if found in list_models() else None


def ours_by_hub_name(name: str) -> str:
    """`swin-t`, `swin_t` or `microsoft/swin-tiny-patch4-window7-224` -> `swin_t`."""
    match = HUB.fullmatch(name)
    return f"{match[1]}_{match[2][0]}" if match else name.replace("-", "_")


# ------------------------------------------------------------------------------------------------ building by name


def timm_size(name: str) -> tuple[int, int]:
    """(H, W) that timm states for a model. UserError for a name that it has not."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    default = timm.get_pretrained_cfg(name)
    height, width = default.input_size[1:] if default else (224, 224)
    return height, width


def timm_model(name: str, size: tuple[int, int]) -> nn.Module:
    """A model of timm with fused attention; its Swin has that behind an experimental switch."""
    import timm
    from timm.layers import config as timm_config

    before = timm_config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(True, experimental=True)
    try:
        try:
            return timm.create_model(name, img_size=size)
        except TypeError:  # models of any size take no img_size
            return timm.create_model(name)
    finally:
        timm_config._USE_FUSED_ATTN = before


def torchvision_model(name: str, size: tuple[int, int]) -> nn.Module:
    """A classifier of torchvision; its vision transformers are made for one size."""
    from torchvision import models

    valid = models.list_models(module=models)
    if name not in valid:
        raise UserError(f"torchvision has no classifier {name!r}{nearest(name, valid)}")
    if name.startswith("vit_"):
        return models.get_model(name, weights=None, image_size=size[0])
    return models.get_model(name, weights=None)


def transformers_swin(name: str, size: tuple[int, int], num_classes: int = 1000) -> LogitsOnly:
    """transformers' Swin or SwinV2 in the shape of our variant `name`, with fused attention where it has it.

    Raises UserError for a variant whose windows differ between stages or that is no Swin: its configuration
    holds one window.
    """
    import transformers

    import muntin

    name = ours_by_hub_name(name)
    with torch.device("meta"):
        ours = muntin.create_model(name)
    shape = asdict(ours.config)
    windows = shape.get("window")
    one_window = windows if isinstance(windows, int) else (windows or (0,))[0]
    ratio = shape.get("mlp_ratio", 4.0)
    plain = {"dim", "depths", "heads"} <= shape.keys() and isinstance(ratio, (int, float))
    same = set(_several(windows)) == {one_window} and set(_several(shape.get("shift", True))) == {True}
    if not plain or not same or (shape.get("norm", "layer"), shape.get("act", "gelu")) != ("layer", "gelu"):
        raise UserError(
            f"transformers has no configuration for {name}: its Swin takes one window for all stages and shifts "
            "in each; give a plain Swin, as in transformers:swin_t"
        )
    second = name.startswith("swinv2")
    config: Any = (transformers.Swinv2Config if second else transformers.SwinConfig)(
        image_size=size,
        patch_size=shape.get("patch", 4),
        embed_dim=shape["dim"],
        depths=list(shape["depths"]),
        num_heads=list(shape["heads"]),
        window_size=one_window,
        mlp_ratio=ratio,
    )
    config.num_labels = num_classes
    if not second:
        config._attn_implementation = "sdpa"
    classifier = transformers.Swinv2ForImageClassification if second else transformers.SwinForImageClassification
    return LogitsOnly(classifier(config))


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# ------------------------------------------------------------------------------------------------ the same weights


def give_weights(peer: nn.Module, ours: nn.Module, library: str) -> nn.Module:
    """The peer with the weights of our model of the same architecture, converted to its names."""
    from muntin.weights import convert

    converted = convert(ours.state_dict(), library)
    if isinstance(peer, LogitsOnly):  # transformers renames the weights of its checkpoints while loading
        found, report = _quietly_loaded(type(peer.model), peer.model.config, converted)
        missing, unexpected = list(report["missing_keys"]), list(report["unexpected_keys"])
        peer = LogitsOnly(found)
    else:
        theirs = peer.state_dict()
        for name, tensor in converted.items():
            if name in theirs and theirs[name].shape != tensor.shape:
                shapes = f"{tuple(theirs[name].shape)}, ours {tuple(tensor.shape)}"
                raise ValueError(f"our weights do not fit what it builds for this size: {name} is {shapes}")
        missing, unexpected = peer.load_state_dict(converted, strict=False)
    learned = {name for name, _ in peer.named_parameters()} | {n for n, b in peer.named_buffers() if "running" in n}
    # a bias of the keys that SwinV2 sets to zero in its forward stands in none of our files
    lost = [name for name in missing if name in learned and not name.endswith("attn.qkv.bias")]
    if lost or unexpected:
        raise RuntimeError(f"{library}: weights differ: missing {lost[:3]}, unexpected {unexpected[:3]}")
    return peer


def _quietly_loaded(kind: Any, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def randomise(model: nn.Module, size: tuple[int, int], seed: int | None = None) -> nn.Module:
    """Weights under which a missing or transposed part shows, norms and bias tables among them; running statistics
    near those of an image, since with random ones a deep model amplifies rounding. seed: by default torch's own.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif "table" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
        norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            before = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 0.9
            model.train()(torch.randn(4, 3, *size, generator=generator))
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum
    return model.eval()


# ------------------------------------------------------------------------------------------- tuned for inference


def tuned(model: nn.Module, library: str, size: tuple[int, int]) -> tuple[nn.Module, list[str]]:
    """A copy of a peer with its BatchNorms folded, by timm's own function and then wherever a convolution stands
    before one; and the settings that it runs with.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    settings = ["SDPA"] if _fused_attention(model) else []
    norms = _batch_norms(model)
    if library == "timm" and norms:
        from timm.utils import reparameterize_model

        model = reparameterize_model(model, inplace=True)
    model = fold_batch_norms(model, torch.randn(1, 3, *size))
    if norms:
        settings.append(f"BN folded but for {_batch_norms(model)}" if _batch_norms(model) else "BN folded")
    return model, settings


def _batch_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _fused_attention(model: nn.Module) -> bool:
    config = getattr(getattr(model, "model", None), "config", None)
    return getattr(config, "_attn_implementation", "") == "sdpa" or any(
        getattr(module, "fused_attn", False) or isinstance(module, nn.MultiheadAttention) for module in model.modules()
    )


def fold_batch_norms(model: nn.Module, image: Tensor) -> nn.Module:
    """The model with each BatchNorm2d folded into the convolution whose output it is given; timm's norm that is
    joined with an activation leaves that activation. Which feeds which is seen while the model runs on `image`.
    Where somebody else reads a convolution's output too, the result is another: then the model itself is returned.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    made: dict[int, tuple[str, Tensor]] = {}  # by the tensor's id: the convolution, and the tensor to keep it alive
    pairs: list[tuple[str, str]] = []
    hooks = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(lambda m, a, out, n=name: made.update({id(out): (n, out)})))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, given, n=name: pairs.append((made[id(given[0])][0], n)) if id(given[0]) in made else None
                )
            )
    if len(hooks) == 0 or not _batch_norms(model):
        return model
    with torch.inference_mode():
        wanted = model(image)
    for hook in hooks:
        hook.remove()
    made.clear()
    folded = copy.deepcopy(model)
    convs, norms = ([pair[i] for pair in pairs] for i in (0, 1))
    for conv, norm in pairs:
        if convs.count(conv) == norms.count(norm) == 1:
            joined = folded.get_submodule(norm)
            rest = [part for part in (getattr(joined, "drop", None), getattr(joined, "act", None)) if part is not None]
            _put(folded, conv, fuse_conv_bn_eval(cast(Any, folded.get_submodule(conv)), cast(Any, joined)))
            _put(folded, norm, nn.Sequential(*rest))
    with torch.inference_mode():
        same = isinstance(wanted, Tensor) and bool((folded(image) - wanted).abs().max() <= 1e-3 * wanted.std())
    return folded if same else model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def convolutional(model: nn.Module) -> bool:
    """Whether channels-last memory may help: convolutions beyond a patch embedding."""
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules()) >= 3
