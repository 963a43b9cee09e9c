"""Exported detectors and segmenters in place of the models that they were made from.

B batch, H W image, h w of it what is image, n objects, K classes
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError
from muntin.runtime.engines import Engine, in_batches, load


class DenseEngine(nn.Module):
    """An exported file called as a detector or segmenter of `muntin.create_dense` in evaluation mode.

    `engine` is the file; `task`, `head_name`, `name`, `num_classes`, `head_config`, `classes` and `preprocessing` are
    what it says about itself. `takes_bytes`: it normalises images itself. It has no weights and no training mode.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises UserError for a file that is no detector's or segmenter's."""
        super().__init__()
        said = engine.metadata
        if "task" not in said:
            raise UserError(f"{engine.path} is no detector or segmenter; export one of muntin.create_dense")
        self.engine, self.task, self.head_name = engine, str(said["task"]), str(said["head"])
        self.name, self.num_classes = engine.name, int(said["num_classes"])
        self.head_config = SimpleNamespace(**said["head_config"])
        self.classes, self.preprocessing = engine.classes, engine.preprocessing
        self.takes_bytes = engine.layout == "NHWC"
        self.eval()

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Tensor | list[dict[str, Tensor]]:
        """images: (B, 3, H, W), normalised, zero right of and below what is image; bytes for a file that takes these.
        sizes: (h, w) of what is image, by default all of it.

        Returns logits (B, K, H, W), or for each image boxes (n, 4), scores (n,), labels (n,) and masks (n, 28, 28), as
        the model does; a detector's file looks at one image after the other, without the zeros around it. A file of one
        size takes smaller images too, which it sees with zeros right of and below them.
        Raises UserError for sizes that the file is not for.
        """
        if self.task == "segment":
            height, width = images.shape[2:]
            batch = self.engine.fixed and self.engine.fixed[0]
            return in_batches(self._run, images, batch)[:, :, :height, :width]
        known = [tuple(images.shape[2:])] * len(images) if sizes is None else [tuple(size) for size in sizes]
        return [self._found(image[:, : size[0], : size[1]]) for image, size in zip(images, known, strict=True)]

    def _found(self, image: Tensor) -> dict[str, Tensor]:
        height, width = image.shape[1:]
        found = self._run(image[None])
        found.pop("proposals", None)
        limit = torch.tensor([width, height, width, height], device=image.device)
        boxes = found["boxes"].minimum(limit)
        kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(1))[0]
        return {key: values[kept] for key, values in (found | {"boxes": boxes}).items()}

    def _run(self, images: Tensor) -> Any:
        """What the file returns for images (B, 3, h, w) of at most its size."""
        (height, width), fixed = images.shape[2:], self.engine.fixed
        if fixed and height <= fixed[1] and width <= fixed[2] and (height, width) != fixed[1:]:
            filled = self._blank(images).expand(len(images), 3, fixed[1], fixed[2]).clone()
            filled[:, :, :height, :width] = images
            images = filled
        return self.engine(images.permute(0, 2, 3, 1) if self.takes_bytes else images)

    def _blank(self, like: Tensor) -> Tensor:
        """(3, 1, 1), what is zero once it is normalised."""
        mean = like.new_zeros(3, dtype=torch.float)
        if self.takes_bytes:
            mean = (255 * torch.tensor(self.preprocessing["mean"])).round()
        return mean.to(like)[:, None, None]


def dense_engine(path: str | os.PathLike[str]) -> DenseEngine:
    """An exported detector or segmenter as a model: see `DenseEngine`.

    Raises UserError where the file is missing, damaged or of another kind, or its engine is not installed.
    """
    return DenseEngine(load(path))
