"""What all detectors and segmenters share: a backbone, a head's configuration, and what is checked of their input.

B batch, H W image, n objects
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.models import create_backbone
from muntin.models.backbone import Backbone

IGNORED = 255
"""The label of pixels that do not count."""

Sizes = list[tuple[int, int]]
Target = dict[str, Tensor]


class Dense(nn.Module):
    """Base of detectors and segmenters.

    task: "detect", "instance" or "segment". head_name, name: of the head and of the backbone. head_config: the frozen
    configuration that the head was built from. num_classes: without background.
    """

    task: str
    backbone: Backbone

    def __init__(self, head: str, head_config: Any, name: str, num_classes: int) -> None:
        super().__init__()
        self.head_name, self.head_config = head, head_config
        self.name, self.num_classes = name, num_classes

    @property
    def config(self) -> Any:
        """The frozen configuration that the backbone was built from."""
        return self.backbone.config

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def measured(self, image: Tensor) -> Any:
        """A forward pass for counting its products: as many of them whatever the image shows, also without weights."""
        return self(image)


class Detector(Dense):
    """images (B, 3, H, W) -> losses in training mode, otherwise what was found, by `learn` and `find` of each head."""

    def learn(self, levels: list[Tensor], images: Tensor, sizes: Sizes, targets: list[Target]) -> dict[str, Tensor]:
        raise NotImplementedError

    def find(self, levels: list[Tensor], images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    neck: Any

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """images: (B, 3, H, W), normalised, zero right of and below what is image.
        sizes: (h, w) of what is image; by default all of it.
        targets: in training mode, for each image boxes (n, 4) float x1 y1 x2 y2 in pixels, labels (n,) int64 and, for
        task "instance", masks (n, h, w) uint8; n may be 0.

        Returns, in training mode, losses to be added up. Otherwise, for each image as if it were alone, best first:
        boxes (n, 4) in pixels, scores (n,) in 0 to 1, labels (n,) and, for task "instance", masks (n, 28, 28), the
        probability of the object within its box (see `muntin.heads.paste_masks`).
        Raises UserError for what has another form.
        """
        known = _sizes(images, sizes)
        if self.training:
            given = self._targets(images, targets)
            return self.learn(self.neck(self.backbone(images), images.shape[2:]), images, known, given)
        return self._found(images) if sizes is None else self._find_by_size(images, known)

    def _found(self, images: Tensor) -> list[dict[str, Tensor]]:
        """In images that fill all of the batch."""
        height, width = images.shape[2:]
        levels = self.neck(self.backbone(images), (height, width))
        return self.find(levels, images, [(height, width)] * len(images))

    def _find_by_size(self, images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        """Images of one size together, without what pads them: what is found does not depend on the rest of a batch."""
        found: list[dict[str, Tensor]] = [{}] * len(images)
        for height, width in dict.fromkeys(sizes):
            numbers = [i for i, size in enumerate(sizes) if size == (height, width)]
            alike = images if len(numbers) == len(images) else images[numbers]
            for i, each in zip(numbers, self._found(alike[:, :, :height, :width]), strict=True):
                found[i] = each
        return found

    def _targets(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]] | None) -> list[Target]:
        if targets is None or len(targets) != len(images):
            told = "none" if targets is None else len(targets)
            raise UserError(f"{len(images)} images in training mode and {told} targets: give one for each, or eval()")
        keys = ("boxes", "labels", "masks") if self.task == "instance" else ("boxes", "labels")
        found = []
        for i, target in enumerate(targets):
            if missing := [key for key in keys if key not in target]:
                raise UserError(f"target {i} has no {missing[0]!r}; {self.head_name} learns from {', '.join(keys)}")
            plain = {key: target[key].as_subclass(Tensor).to(images.device) for key in keys}
            _check_objects(i, plain, self.num_classes)
            found.append(plain)
        return found


def _sizes(images: Tensor, sizes: Sequence[tuple[int, int]] | None) -> Sizes:
    _check_images(images)
    height, width = images.shape[2:]
    if sizes is None:
        return [(height, width)] * len(images)
    known = [(int(h), int(w)) for h, w in sizes]
    if len(known) != len(images) or any(not (0 < h <= height and 0 < w <= width) for h, w in known):
        raise UserError(f"sizes {known} for images {tuple(images.shape)}: give (h, w) within {height}x{width} for each")
    return known


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images of shape {tuple(images.shape)}: give (B, 3, H, W)")


def _check_objects(number: int, target: Target, num_classes: int) -> None:
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
        raise UserError(
            f"target {number} has boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}: give (n, 4) and (n,)"
        )
    if not len(boxes):
        return
    if bool(((boxes[:, 2:] <= boxes[:, :2]).any(1) | ~boxes.isfinite().all(1)).any()):
        raise UserError(f"target {number} has a box without area; boxes are x1 y1 x2 y2 with x1 < x2, y1 < y2")
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise UserError(f"target {number} has a label outside 0 to {num_classes - 1}; labels leave out background")


class Segmenter(Dense):
    """images (B, 3, H, W) -> losses in training mode, otherwise logits (B, K, H, W), by `learn` and `logits`.

    class_weights: (K,) factors of the classes' pixels in the losses, or None; not saved with the weights.
    """

    task = "segment"
    class_weights: Tensor | None = None

    def learn(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def logits(self, maps: list[Tensor]) -> Tensor:
        """(B, K, h, w) at the resolution of the head, from the backbone's maps."""
        raise NotImplementedError

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """images: (B, 3, H, W), normalised. targets: in training mode labels (B, H, W) int64, 255 where none counts.

        Returns, in training mode, losses to be added up; otherwise logits (B, K, H, W).
        Raises UserError for what has another form.
        """
        _check_images(images)
        if not self.training:
            return enlarged(self.logits(self.backbone(images)), images.shape[2:])
        if targets is None or targets.shape != (len(images), *images.shape[2:]):
            told = "none" if targets is None else f"of shape {tuple(targets.shape)}"
            raise UserError(f"labels in training mode are (B, H, W) as the images, not {told}; or call eval()")
        return self.learn(self.backbone(images), targets.as_subclass(Tensor).long())


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinearly: (B, K, h, w) -> (B, K, H, W)."""
    return nn.functional.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy over all pixels that count: logits (B, K, h, w), labels (B, H, W). Zero where none does.

    weights: (K,) factors of the classes' pixels, in the mean too.
    """
    counted = (labels != IGNORED).float()
    if weights is not None:
        weights = weights.to(logits.device)
        counted = counted * weights[labels.clamp(max=len(weights) - 1)]
    losses = nn.functional.cross_entropy(
        enlarged(logits, labels.shape[1:]).float(), labels, weights, ignore_index=IGNORED, reduction="sum"
    )
    return losses / counted.sum().clamp(min=1e-6)


def fitting_backbone(name: str, strides: Sequence[int] | None, options: Mapping[str, Any]) -> Backbone:
    """A backbone with normed maps, those at these strides alone. UserError where it has none there."""
    with torch.device("meta"):
        plain = {key: value for key, value in options.items() if key != "pretrained"}
        own = create_backbone(name, **plain).strides
    kept = tuple(i for i, stride in enumerate(own) if strides is None or stride in strides)
    if not kept:
        raise UserError(f"strides {tuple(strides or ())}: {name} has maps at strides {own}; give some of these too")
    return create_backbone(name, kept, True, **options)
