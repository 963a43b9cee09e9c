"""Muntin's models in timm: after `import muntin.timm`, `timm.create_model("rmt_t", ...)` makes one.

Every listed model is registered as `muntin_NAME`, and as NAME too where timm has none of that name: rmt_t is both,
efficientvit_m0 stays timm's and ours is muntin_efficientvit_m0. Fields of the configuration are keyword arguments,
as in `muntin.create_model`. The state dict has Muntin's own names (`backbone.`, `head.`), so that
`muntin.load_checkpoint`, `muntin.optimize` and `muntin.hub` take these models as they are.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import muntin
from muntin.errors import UserError
from muntin.models import published
from muntin.models.backbone import NO_DECAY, Backbone
from muntin.models.classifier import Classifier
from muntin.weights import download
from muntin.weights.download import Checkpoint

__all__ = ["TimmModel"]  # and every model's function: timm adds these names


class TimmModel(nn.Module):
    """A classifier behind timm's interface.

    `forward_features` gives the last map as the backbone leaves it, since the last norm is part of the head, as in
    timm's ConvNeXt. Without classes (`num_classes=0`) the output is what the last layer would take (B,
    head_hidden_size), and with `global_pool=""` the normalised map. In training a head for token labels gives (logits,
    labels), and a distilled one a pair after `set_distilled_training`.
    """

    pretrained_cfg: dict[str, Any]  # timm sets it

    def __init__(self, model: Classifier, num_classes: int, global_pool: str = "avg", drop_rate: float = 0.0) -> None:
        super().__init__()
        self.name = model.name
        self.backbone: Any = model.backbone
        self.head: Any = model.head
        self.in_chans = 3
        self.num_classes = model.num_classes
        self.global_pool = "avg"
        self.drop_rate = drop_rate
        self.distilled_training = False
        with torch.device("meta"):
            backbone: Any = type(self.backbone)
            every = backbone(self.backbone.config)  # the model's own returns its last map only
        self.num_features: int = every.channels[-1]
        self.head_hidden_size: int = self.head.fc.in_features
        stages = enumerate(zip(every.channels, every.strides, strict=True))
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": stride, "module": f"backbone.stages.{number}"}
            for number, (channels, stride) in stages
        ]
        self.feature_info[-1]["num_chs_norm"] = self.head_hidden_size
        self._widths = {name: layer.in_features for name, layer in self._classifiers().items()}
        if num_classes == 0 or global_pool != "avg":
            self.reset_classifier(num_classes, global_pool)
        else:
            self._drop()

    @property
    def config(self) -> Any:
        """The frozen configuration that the backbone was built from."""
        return self.backbone.config

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> the last map (B, num_features, ceil(H / stride), ceil(W / stride))."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> logits, or with `pre_logits` what the last layer takes."""
        if isinstance(self.head, nn.Identity):
            return x
        if not self.global_pool:
            return self.head.features(x)
        if pre_logits or not self.num_classes:
            return self.head.pooled(x)
        logits = self.head(x)
        if isinstance(logits, tuple) and "fc_distilled" in self._widths and not self.distilled_training:
            return (logits[0] + logits[1]) / 2
        return logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages in `indices` (the last n for a number), and what `forward_features` gives.

        norm: normalise the last stage's map as the head does (RMT's head projects it, too).
        stop_early: run no stage after the last one that is asked for, and return its map in the first place.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"output_fmt={output_fmt!r}: valid are 'NCHW' and 'NHWC'")
        count = len(self.backbone.stages)
        take = set(_take(count, indices))
        run = take if stop_early or intermediates_only else take | {count - 1}
        maps = dict(zip(sorted(run), _returning(self.backbone, tuple(sorted(run)))(x), strict=True))
        last = maps[max(run)]
        if norm and len(self.feature_info) - 1 in take and not isinstance(self.head, nn.Identity):
            maps[len(self.feature_info) - 1] = self.head.features(last)
        chosen = [maps[number] for number in sorted(take)]
        if output_fmt == "NHWC":
            chosen = [each.permute(0, 2, 3, 1) for each in chosen]
        return chosen if intermediates_only else (last, chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out what the maps in `indices` do not need. Returns their numbers."""
        take = _take(len(self.backbone.stages), indices)
        last = max(take)
        whole = last == len(self.backbone.stages) - 1
        self.backbone.stages = self.backbone.stages[: last + 1]
        self.backbone.out_indices = tuple(sorted(take))
        self.backbone.channels = tuple(self.feature_info[i]["num_chs"] for i in sorted(take))
        self.backbone.strides = tuple(self.feature_info[i]["reduction"] for i in sorted(take))
        if prune_norm or not whole:
            self.head, self.num_classes, self.global_pool = nn.Identity(), 0, ""
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        elif prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return getattr(self.head, "fc", self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for another number of classes, or none for 0. global_pool: "avg", or "" with 0 classes."""
        if isinstance(self.head, nn.Identity):
            raise UserError("this model was pruned to its maps and has no head: create another one")
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise UserError(f"global_pool={pool!r}: valid are 'avg' and, with num_classes=0, ''")
        if num_classes and not pool:
            raise UserError(f"num_classes={num_classes} with global_pool='': classes need pooling; give 'avg'")
        like = next(self.backbone.parameters())
        for name, width in self._widths.items():
            fc = nn.Linear(width, 1, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
            setattr(self.head, name, fc)
        if num_classes:
            self.head.reset(num_classes)
        self.num_classes, self.global_pool = num_classes, pool
        self._drop()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a model with a distilled head gives the logits of both in training, or their mean."""
        if "fc_distilled" not in self._widths:
            raise UserError(
                f"{self.name} has no head for a teacher: create it with distilled=True where that is a field"
            )
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: the stem, each block with what leads to its stage, the head."""
        blocks = [(r"^backbone\.stages\.(\d+)\.blocks\.(\d+)", None), (r"^backbone\.stages\.(\d+)", (0,))]
        return {"stem": r"^backbone\.stem", "blocks": r"^backbone\.stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(NO_DECAY)}

    def layers(self) -> dict[str, Any]:
        """What timm's configuration says about the layers of a model."""
        stem = [f"backbone.stem.{name}" for name, m in self.backbone.stem.named_modules() if isinstance(m, nn.Conv2d)]
        last = tuple(f"head.{name}" for name in self._widths)
        sides = self.pretrained_cfg["input_size"][1:]
        return {
            "first_conv": stem[0] if stem else None,
            "classifier": last if len(last) > 1 else last[0],
            "pool_size": tuple(-(-side // self.feature_info[-1]["reduction"]) for side in sides),
        }

    def _classifiers(self) -> dict[str, Any]:
        return {name: layer for name, layer in self.head.named_children() if name == "fc" or name.startswith("fc_")}

    def _drop(self) -> None:
        """Dropout in front of every last layer, without a module that would change names."""
        for layer in self._classifiers().values():
            layer.train(self.training)  # a new layer begins in training mode
            if self.drop_rate and self.num_classes:
                layer.register_forward_pre_hook(partial(_dropout, rate=self.drop_rate))


def _take(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Stage numbers as timm gives them: all for None, the last n for a number, negative ones from the end."""
    given: Sequence[int]
    if indices is None or isinstance(indices, int):
        given = range(-(count if indices is None else indices), 0)
    else:
        given = indices
    take = [number + count if number < 0 else number for number in given]
    if not take or any(number not in range(count) for number in take):
        raise UserError(f"indices={indices!r}: give stage numbers out of 0 to {count - 1}, or how many of the last")
    return take


def _dropout(layer: nn.Module, inputs: tuple[Tensor, ...], rate: float) -> Tensor:
    return F.dropout(inputs[0], rate, layer.training)


def _returning(backbone: Backbone, indices: tuple[int, ...]) -> Backbone:
    """The same modules and weights, returning the maps of other stages."""
    if backbone.out_indices == indices:
        return backbone
    other = copy.copy(backbone)
    other.out_indices = indices
    return other


def _build(
    name: str,
    weights: Checkpoint | str | None,
    dense: bool,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | Sequence[int] | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> TimmModel:
    """dense: small maps by `create_backbone`'s rule. img_size is timm's and means nothing here: every size works."""
    if in_chans != 3:
        raise UserError(f"in_chans={in_chans}: {name} takes 3 channels; for gray images: image.expand(-1, 3, -1, -1)")
    if dense:
        with torch.device("meta"):
            row: Any = muntin.create_backbone(name, **config).config
        config = {field.name: getattr(row, field.name) for field in fields(row)}
    known, path = (weights, None) if isinstance(weights, Checkpoint) else (None, weights)
    headless = known is not None and not known.classes  # the backbone of a detector or segmenter
    classes = num_classes or (known.classes if known else 0) or 1000
    source = known.tag if known else path or False
    with nullcontext() if device is None else torch.device(device):
        model = muntin.create_model(name, classes, False if headless else source, drop_path_rate, **config)
        if known and headless:
            muntin.load_checkpoint(model.backbone, known.fetch())
        return TimmModel(model, num_classes, global_pool, drop_rate).to(dtype=dtype)


def _create(
    name: str,
    registered: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """What timm calls. A tag (`swin_t.TAG`) is Muntin's; weights that a pretrained_cfg names are timm's to load."""
    source = _source(name, pretrained, pretrained_cfg, pretrained_cfg_overlay or {})
    by_timm = pretrained and (source is None or _names_weights(pretrained_cfg_overlay or {}))
    if isinstance(source, Checkpoint):
        kwargs = source.config | kwargs
    if isinstance(pretrained_cfg, str):
        pretrained_cfg = source.tag if isinstance(source, Checkpoint) else None
    maps = bool(kwargs.get("features_only"))
    if maps and kwargs.pop("feature_cls", "getter") != "getter":
        raise UserError("features_only takes the maps from forward_intermediates: leave out feature_cls")
    model = build_model_with_cfg(
        partial(_build, name, source if pretrained and not by_timm else None, maps),
        registered,
        pretrained=by_timm,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=_load_any_dialect,
        feature_cfg={"feature_cls": "getter", "out_indices": None},
        **kwargs,
    )
    if isinstance(model, TimmModel):
        model.pretrained_cfg |= model.layers()
    return model


def _source(name: str, pretrained: bool, given: Any, overlay: Mapping[str, Any]) -> Checkpoint | str | None:
    """The published checkpoint, path or address that timm's arguments mean, or None where timm is to load."""
    if isinstance(given, str):
        return download.resolve(name, given)
    entries = dict(given) if isinstance(given, Mapping) else vars(given) if given else {}
    for checkpoint in download.published():  # timm's scripts look a tag up and pass its entry of `default_cfgs`
        if checkpoint.model == name and checkpoint.address == entries.get("url"):
            return checkpoint
    return download.resolve(name, True) if pretrained and not _names_weights({**entries, **overlay}) else None


def _names_weights(entries: Mapping[str, Any]) -> bool:
    return any(entries.get(key) for key in ("url", "file", "hf_hub_id", "state_dict"))


def _load_any_dialect(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's place for translating a checkpoint: loads it, then hands timm the model's own weights."""
    muntin.load_checkpoint(model, weights)
    return model.state_dict()


def _names() -> dict[str, str]:
    """What is registered -> the listed model."""
    names = muntin.list_models()
    return {f"muntin_{name}": name for name in names} | {name: name for name in names if not timm.is_model(name)}


def _register(registered: str, name: str) -> None:
    create: Any = partial(_create, name, registered)
    create.__name__, create.__module__, create.__doc__ = registered, __name__, f"{name} of Muntin."
    globals()[registered] = register_model(create)


def _entries(name: str) -> dict[str, dict[str, Any]]:
    """timm's configuration of a listed model, by tag of its published weights, or for want of any under ""."""
    size = published(name).get("size", 224)
    entries: dict[str, dict[str, Any]] = {
        checkpoint.tag: {
            "url": checkpoint.address,
            "input_size": (3, checkpoint.size or size, checkpoint.size or size),
            "crop_pct": checkpoint.size / checkpoint.resize if checkpoint.resize else 1.0,
            "crop_mode": "center" if checkpoint.resize or not checkpoint.classes else "squash",
            "num_classes": checkpoint.classes,
            "license": checkpoint.licence.lower(),
            "classifier": "head.fc" if checkpoint.classes else None,
        }
        for checkpoint in download.published()
        if checkpoint.model == name
    }
    return entries or {"": {"input_size": (3, size, size), "classifier": "head.fc"}}


default_cfgs = generate_default_cfgs(
    {
        f"{registered}.{tag}" if tag else registered: entry
        for registered, name in _names().items()
        for tag, entry in _entries(name).items()
    }
)
"""Read by timm when a model of this module is registered."""

for _registered, _name in _names().items():
    _register(_registered, _name)
