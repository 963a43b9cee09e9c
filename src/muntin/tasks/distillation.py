"""Distillation: a trained classifier whose logits the student learns from besides the labels.

B batch, K classes
"""

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

import muntin
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.errors import UserError, nearest
from muntin.models import list_models, published
from muntin.run import Run
from muntin.tasks.settings import Settings
from muntin.weights import load_checkpoint
from muntin.weights.download import find

TIMM = "timm:"
VALID = "give a run's folder or model.safetensors, timm:NAME, timm:NAME=FILE, a Muntin model's name, or NAME=FILE"


class Teacher:
    """Logits of a trained classifier for the student's batches, in evaluation mode and without gradients.

    No module: what a student holds would be saved with it. It follows its images to their device.

    size: height and width that images are resized to where they have others; normalisation: the mean and std that the
    model wants, per channel; student: those that the images have; order: for each of the student's classes the
    teacher's.
    """

    def __init__(
        self,
        model: nn.Module,
        size: Sequence[int],
        normalisation: tuple[Sequence[float], Sequence[float]],
        student: tuple[Sequence[float], Sequence[float]],
        order: Sequence[int] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.size = tuple(size)
        mean, std, own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (*normalisation, *student))
        self.scale, self.shift = own_std / std, (own_mean - mean) / std
        self.order = None if order is None else torch.tensor(order)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised for the student -> (B, K) float, in the order of the student's classes."""
        if self.scale.device != images.device:
            self.model.to(images.device)
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
            self.order = None if self.order is None else self.order.to(images.device)
        images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits = self.model(images).float()
        return logits if self.order is None else logits[:, self.order]


def distillation_loss(
    outputs: Tensor | tuple[Tensor, Tensor], taught: Tensor, targets: Tensor, settings: Settings
) -> Tensor:
    """DeiT's loss (Touvron et al., arXiv 2012.12877, equations 2 and 3), alpha and tau of the settings.

    soft: (1 - alpha) CE(Z, y) + alpha tau^2 KL(softmax(T / tau) || softmax(Z' / tau)), the mean over the batch (the
    released code divides by K as well)
    hard: (1 - alpha) CE(Z, y) + alpha CE(Z', argmax T)

    outputs: logits Z (B, K), of which Z' are the same, or of two heads, Z and Z'; taught: the teacher's T (B, K);
    targets: y, (B,) classes or (B, K) probabilities, smoothed in the first term alone.
    """
    logits, learning = two_heads(outputs)
    labelled = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
    if settings.distillation == "hard":
        taught_loss = F.cross_entropy(learning.float(), taught.argmax(1))
    else:
        tau = settings.distill_tau
        ours, theirs = (F.log_softmax(z.float() / tau, dim=1) for z in (learning, taught))
        taught_loss = tau**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return (1 - settings.distill_alpha) * labelled + settings.distill_alpha * taught_loss


def two_heads(outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits that learn from the labels, and those that learn from the teacher: the same ones of a single head."""
    return outputs if isinstance(outputs, tuple) else (outputs, outputs)


def open_teacher(text: str, classes: list[str], preprocessing: Mapping[str, Any], multi_label: bool = False) -> Teacher:
    """The teacher that the setting names, for a student with these classes and this preprocessing.

    multi_label: an image may have several of the classes; the teacher has to be a run that learned them so.
    Raises UserError where there is none, it cannot be read, or has other classes: in number, or, where they are known,
    in name.
    """
    student = preprocessing["mean"], preprocessing["std"]
    order = None
    if multi_label and not os.path.exists(text):
        raise UserError(f"teacher={text}: an image has several labels; give the folder of a run that learned such data")
    if text.startswith(TIMM):
        model, found = _from_timm(text, len(classes))
    elif os.path.exists(text):
        run = Run.open(text)
        if run.multi_label != multi_label:
            one, several = "one class an image", "several"
            learned, given = (several, one) if run.multi_label else (one, several)
            raise UserError(f"teacher={text} learned {learned} and the data give {given}; give a run on such data")
        order = _order(text, run.classes, classes)
        model, found = run.model(), run.preprocessing
    else:
        model, found = _from_muntin(text, len(classes))
    return Teacher(model, found["size"], (found["mean"], found["std"]), student, order)


def _order(text: str, taught: list[str], classes: list[str]) -> list[int] | None:
    """For each class its number at the teacher; None where they are the same."""
    if taught == classes:
        return None
    if sorted(taught) == sorted(classes):
        return [taught.index(name) for name in classes]
    lacks, knows = (_shown(set(a) - set(b)) for a, b in ((classes, taught), (taught, classes)))
    raise UserError(
        f"teacher={text} was trained for other classes ({len(taught)}, the data have {len(classes)}): it lacks {lacks} "
        f"and has {knows} besides; give a teacher of the same classes"
    )


def _shown(names: set[str]) -> str:
    first = sorted(names)
    return ", ".join(map(repr, first[:3])) + (f" and {len(first) - 3} more" if len(first) > 3 else "") or "none"


def _refuse_number(text: str, taught: int, classes: int) -> None:
    if taught != classes:
        raise UserError(
            f"teacher={text} has {taught} classes, the data have {classes}: give a teacher that was trained for these, "
            "such as the folder of a run on the same data"
        )


def _from_muntin(text: str, classes: int) -> tuple[nn.Module, Mapping[str, Any]]:
    """NAME with its published weights, or NAME=FILE."""
    name, _, file = text.partition("=")
    if name not in list_models() and ("." not in name or os.sep in name):
        raise UserError(f"teacher={text}: no such run or model{nearest(name, list_models())}; {VALID}")
    checkpoint: Any = None
    if not file:
        checkpoint = find(name)
        _refuse_number(text, checkpoint.classes, classes)
    config = {} if checkpoint is None else checkpoint.config
    model = muntin.create_model(name, classes, **config)
    report = load_checkpoint(model, file or checkpoint.fetch())
    if report.replaced:
        raise UserError(
            f"teacher={text} has another number of classes than the data's {classes}, or no head "
            f"({', '.join(report.replaced)}); give a teacher that was trained for these"
        )
    if checkpoint is not None:
        return model, checkpoint.preprocessing
    size = published(name).get("size", 224)
    return model, {"size": (size, size), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _from_timm(text: str, classes: int) -> tuple[nn.Module, Mapping[str, Any]]:
    """timm:NAME with its pretrained weights, or timm:NAME=FILE."""
    import timm

    name, _, file = text.removeprefix(TIMM).partition("=")
    if not timm.is_model(name):
        raise UserError(f"teacher={text}: timm has no model {name!r}{nearest(name, timm.list_models())}; {VALID}")
    stated = timm.get_pretrained_cfg(name)
    if stated is None or not (file or stated.has_weights):
        raise UserError(f"teacher={text}: timm has no weights of {name}; give a file of them, as {TIMM}{name}=FILE")
    own: dict[str, Any] = {}
    if file:
        own = {"file": file, "num_classes": _classes_in(text, file, stated.classifier, classes)}
    _refuse_number(text, own.get("num_classes", stated.num_classes), classes)
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=own, num_classes=classes)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"teacher={text}: {file or 'what timm loads'} does not fit {name} ({_first_line(error)}); {VALID}"
        ) from error
    except OSError as error:
        raise UserError(
            f"teacher={text}: its weights cannot be downloaded ({_first_line(error)}); check the connection, or give "
            f"a file of them, as {TIMM}{name}=FILE"
        ) from error
    data = timm.data.resolve_model_data_config(model)
    return model, {"size": data["input_size"][1:], "mean": data["mean"], "std": data["std"]}


def _classes_in(text: str, file: str, classifier: str | Sequence[str] | None, usual: int) -> int:
    """How many classes the last layer in a file has; `usual` where it is under no name of timm's."""
    import timm

    try:
        state = timm.models.load_state_dict(file)
    except FileNotFoundError as error:
        raise UserError(f"teacher={text}: there is no file {file}; check the path") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"teacher={text}: {file} is damaged, no checkpoint, or holds code, which is not run "
            f"({_first_line(error)}); give a file of weights alone"
        ) from error
    name = classifier if isinstance(classifier, str) else next(iter(classifier or ()), "")
    weight = state.get(f"{name}.weight") if isinstance(state, Mapping) else None
    return len(weight) if isinstance(weight, Tensor) else usual


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
