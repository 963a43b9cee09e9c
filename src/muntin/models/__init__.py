"""Models by name. A new family is one file here and one line in FAMILIES."""

import fnmatch
import importlib
import os
import tomllib
import warnings
from dataclasses import fields, replace
from functools import lru_cache
from importlib import resources
from types import ModuleType
from typing import Any

import torch
from torch import nn

from muntin.errors import UserError, nearest
from muntin.models import efficientvit, rmt, swin, swinv2
from muntin.models.backbone import Backbone
from muntin.models.classifier import Classifier, check_classes

FAMILIES: tuple[ModuleType, ...] = (swin, swinv2, efficientvit, rmt)
"""Each has VARIANTS, TINY, DENSE, CONFIG, BACKBONE and HEAD."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the listed models that match a shell pattern, such as "swin_free*"."""
    names = [name for family in FAMILIES for name in family.VARIANTS]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


@lru_cache
def published(name: str) -> dict[str, Any]:
    """What is stated about a listed variant: `size` in pixels, `drop_path`, `top1` and more; {} for others."""
    path = resources.files("muntin") / "models" / "published.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")).get(name, {})


def create_model(
    name: str,
    num_classes: int = 1000,
    pretrained: bool | str | os.PathLike[str] = False,
    drop_path: float = 0.0,
    **config: Any,
) -> Classifier:
    """A classifier by name: image (B, 3, H, W), any H and W from 1 up -> logits (B, num_classes).

    name: a listed model, or the dotted path of a configuration or of a module with VARIANTS.
    pretrained: published weights by tag (`muntin weights` lists them; True: the first), or the path or address of
    a checkpoint in any dialect that `load_checkpoint` reads. What a tag's weights need, such as their window, is
    set unless config says otherwise.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    config: any field of the family's configuration, such as window=(7, 14, 14, 7).

    Raises UserError for an unknown name or field (with the nearest valid ones) and impossible values.
    """
    check_classes(num_classes)
    checkpoint = _checkpoint(name, pretrained)
    family, row = _configure(name, getattr(checkpoint, "config", {}) | config)
    backbone = family.BACKBONE(row, out_indices=(-1,), drop_path=_rate(drop_path))
    model = Classifier(name, backbone, family.HEAD(row, num_classes), num_classes)
    _load(model, checkpoint)
    return model


def create_backbone(
    name: str,
    out_indices: tuple[int, ...] | None = None,
    out_norm: bool = False,
    drop_path: float = 0.0,
    pretrained: bool | str | os.PathLike[str] = False,
    **config: Any,
) -> Backbone:
    """A backbone by name: image (B, 3, H, W) -> list of NCHW maps, one for each stage in `out_indices`.

    out_norm: a norm on each map that is returned, as detection code expects.
    Windows follow the rules of the authors' detection code (each family's DENSE, such as small_maps="pad") unless
    config says otherwise. The rest as in `create_model`.
    """
    checkpoint = _checkpoint(name, pretrained)
    family, row = _configure(name, getattr(checkpoint, "config", {}) | config, dense=True)
    backbone = family.BACKBONE(row, out_indices, out_norm, _rate(drop_path))
    backbone.name = name
    _load(backbone, checkpoint)
    return backbone


def _rate(drop_path: float) -> float:
    if isinstance(drop_path, bool) or not isinstance(drop_path, (int, float)) or not 0.0 <= drop_path < 1.0:
        raise UserError(f"drop_path={drop_path!r}: give a rate of at least 0 and below 1")
    return drop_path


def _configure(name: str, overrides: dict[str, Any], dense: bool = False) -> tuple[ModuleType, Any]:
    family, row = _find(name)
    if dense:
        usual = getattr(family, "DENSE", {})
        if row is not family.VARIANTS.get(name):  # a configuration from outside has its own values for each stage
            usual = {field: value for field, value in usual.items() if not isinstance(value, tuple)}
        overrides = usual | overrides
    valid = [field.name for field in fields(row)]
    for key in overrides:
        if key not in valid:
            raise UserError(f"{name} has no field {key!r}{nearest(key, valid)}; valid are {', '.join(valid)}")
    return family, replace(row, **overrides)


def _find(name: str) -> tuple[ModuleType, Any]:
    if not isinstance(name, str):
        raise UserError(f"a model's name is text, not {name!r}; `muntin models` lists all of them")
    for family in FAMILIES:
        if name in family.VARIANTS:
            return family, family.VARIANTS[name]
    if "." in name.strip("."):
        return _import(name)
    raise UserError(f"no model {name!r}{nearest(name, list_models())}; `muntin models` lists all of them")


def _import(path: str) -> tuple[ModuleType, Any]:
    """A configuration (`package.module.NAME`), or a variant of a module outside (`package.module.variant`)."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"model {path!r}: cannot import {module_name!r} ({error}); is it on the path?") from error
    row = getattr(module, "VARIANTS", {}).get(attribute, getattr(module, attribute, None))
    for family in (module, *FAMILIES):
        if hasattr(family, "CONFIG") and isinstance(row, family.CONFIG):
            return family, row
    raise UserError(
        f"model {path!r}: {module_name} has neither a variant nor a configuration {attribute!r}; give a name in its"
        f" VARIANTS or an instance of one of {', '.join(f.CONFIG.__name__ for f in FAMILIES)}"
    )


def _checkpoint(name: str, pretrained: bool | str | os.PathLike[str]) -> Any:
    """A published checkpoint, an address or path, or None."""
    if pretrained is False or pretrained is None:
        return None
    if pretrained is not True and not isinstance(pretrained, (str, os.PathLike)):
        raise UserError(f"pretrained={pretrained!r}: give True, a tag, an address or a path, or leave it out")
    from muntin.weights.download import resolve

    _find(name)  # a wrong name of a model is said first
    return resolve(name, pretrained)


def _load(model: nn.Module, checkpoint: Any) -> None:
    if checkpoint is None:
        return
    from muntin.weights import load_checkpoint
    from muntin.weights.download import local_file

    classes, own = getattr(checkpoint, "classes", None), getattr(model, "num_classes", None)
    if classes == 0 and own is not None:
        raise UserError(
            f"{checkpoint.tag} is a backbone and has no classes: load it with create_backbone({model.name!r})"
        )
    if classes not in (None, 1000) and own == 1000:
        warnings.warn(
            f"{checkpoint.tag} has {classes} classes, so the last layer is random: num_classes={classes} keeps its own",
            stacklevel=3,
        )
    path = local_file(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint.fetch()
    with torch.no_grad():
        load_checkpoint(model, path)
