"""Batches of annotated images, for detection and segmentation.

Samples are pure functions of (seed, epoch, position), as in loading.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from muntin.data.annotated import Annotated
from muntin.data.augment import Seed
from muntin.data.check import BadFiles
from muntin.data.loading import TrainingSet
from muntin.errors import UserError

AnnotatedAugment = Callable[[Image.Image, dict[str, Any], Seed], tuple[Tensor, dict[str, Any]]]


class AnnotatedTrainingSet(TrainingSet):
    """Augmented images, (3, H, W) uint8, with their targets."""

    images: Annotated  # type: ignore[assignment]
    augment: AnnotatedAugment  # type: ignore[assignment]

    def __init__(self, images: Annotated, augment: AnnotatedAugment, seed: int, bad_files: BadFiles | None) -> None:
        super().__init__(images, augment, seed, bad_files)  # type: ignore[arg-type]

    def sample(self, position: int, seed: Seed) -> tuple[Tensor, dict[str, Any]]:
        return self.augment(self.images.picture(position), self.images.target(position), seed)


@dataclass(frozen=True)
class Resized:
    """An image of an evaluation: what the model sees, (3, H, W) uint8; its own height and width; which one it is, and
    its label map at its own size, (H, W) uint8, in segmentation.
    """

    pixels: Tensor
    original: tuple[int, int]
    position: int
    labels: Tensor | None


class AnnotatedEvaluationSet(Dataset[Resized | UserError]):
    """Images as the model is to see them, in order.

    share: the rank of this process and their number. Each has every so manieth image.
    """

    def __init__(
        self,
        images: Annotated,
        resize: Callable[[Image.Image], Tensor],
        labelled: bool,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.images = images
        self.resize = resize
        self.labelled = labelled
        self.positions = range(share[0], len(images), share[1])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Resized | UserError:
        position = self.positions[number]
        try:
            picture = self.images.picture(position)
            labels = self.images.target(position)["labels"].as_subclass(Tensor) if self.labelled else None
            return Resized(self.resize(picture), (picture.height, picture.width), position, labels)
        except UserError as error:
            return error


def together(items: list[Resized | UserError]) -> list[Resized] | UserError:
    """A batch is a list: its images may differ in size."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return items  # type: ignore[return-value]


def alike(batch: list[Resized]) -> list[list[Resized]]:
    """The images of a batch that can be stacked, so that what the model sees of one never depends on the others."""
    groups: dict[tuple[int, ...], list[Resized]] = {}
    for item in batch:
        groups.setdefault(tuple(item.pixels.shape), []).append(item)
    return list(groups.values())
