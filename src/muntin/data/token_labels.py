"""Dense label files: for each training image the largest class scores of a teacher, cell by cell.

K classes, k scores in a cell, h w cells
"""

import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from muntin.data.augment import Photographs, Seed
from muntin.data.check import BadFiles
from muntin.data.datasets import Images, Label
from muntin.data.images import BadImage
from muntin.data.loading import TrainingSet
from muntin.errors import UserError

SUFFIXES = (".pt", ".npy")
LAYOUT = "token_labels holds CLASS/NAME.pt, or train/CLASS/NAME.pt, or .npy, for each training image CLASS/NAME.*"


class TokenTarget(NamedTuple):
    """An image's dense label, and which part of it the augmented image shows; in a batch with a first axis B.

    scores, classes: (k, h, w), logits and class numbers; box: (4,) left, top, right and bottom in shares of the
    image's sides; flipped: left and right exchanged after cropping.
    """

    scores: Tensor
    classes: Tensor
    box: Tensor
    flipped: Tensor


class DenseLabels:
    """The label files of a training set, in a folder that mirrors it: arrays (2, k, h, w) of scores and class numbers.

    As the authors of token labelling publish them: torch.save of half tensors (2, 5, 18, 18), of which the first are
    logits. NumPy's .npy serves too. All have one shape.

    Raises UserError where a file is missing, and where the first file of a class does not fit; the others are looked
    into as they are read, and an image whose label cannot be used counts as a broken image.
    """

    def __init__(self, folder: str | os.PathLike[str], images: Images) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"token_labels={folder} is no folder; {LAYOUT}")
        self.keys = images.keys
        self.num_classes = len(images.classes)
        self.mirrors_train = (self.folder / "train").is_dir()
        self.suffix = next((s for s in SUFFIXES if (self.folder / (self._name(0) + s)).exists()), SUFFIXES[0])
        self._refuse_missing()
        self.shape = tuple(self._load(0).shape)
        for position in _first_of_each(images.labels):
            self.read(position)

    def path(self, position: int) -> Path:
        """Where the label of an image is."""
        return self.folder / (self._name(position) + self.suffix)

    def read(self, position: int) -> tuple[Tensor, Tensor]:
        """Scores, (k, h, w) float32, and class numbers, int32. Raises BadImage naming the image and the file."""
        found = self._load(position)
        what = f"{self.path(position)}, the token label of {self.keys[position]},"
        if found.ndim != 4 or found.shape[0] != 2 or not found.numel():
            raise BadImage(f"{what} has shape {tuple(found.shape)}: give (2, k, h, w), scores and class numbers")
        if tuple(found.shape) != self.shape:
            raise BadImage(
                f"{what} has shape {tuple(found.shape)} where {self.path(0)} has {self.shape}: make all alike"
            )
        scores, classes = found[0].float(), found[1].double()
        if not torch.isfinite(scores).all():
            raise BadImage(f"{what} holds scores that are not finite: make it again")
        if (classes != classes.round()).any() or not 0 <= classes.min() <= classes.max() < self.num_classes:
            raise BadImage(
                f"{what} holds class numbers from {classes.min():g} to {classes.max():g}: give whole numbers from 0 to "
                f"{self.num_classes - 1}, for the classes of the training images in alphabetical order"
            )
        return scores, classes.int()

    def _name(self, position: int) -> str:
        name = PurePosixPath(str(self.keys[position])).with_suffix("").as_posix()
        return name if self.mirrors_train else name.removeprefix("train/")

    def _refuse_missing(self) -> None:
        listed: dict[str, set[str]] = {}
        missing = []
        for position in range(len(self.keys)):
            below, name = os.path.split(self._name(position))
            if below not in listed:
                folder = self.folder / below
                listed[below] = set(os.listdir(folder)) if folder.is_dir() else set()
            if name + self.suffix not in listed[below]:
                missing.append(position)
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.keys)} training images have no token label: {self.keys[missing[0]]} "
                f"wants {self.path(missing[0])}; {LAYOUT}"
            )

    def _load(self, position: int) -> Tensor:
        path = self.path(position)
        try:
            if self.suffix == ".npy":
                found = torch.from_numpy(np.load(path, allow_pickle=False))
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (
            OSError,
            EOFError,
            RuntimeError,
            TypeError,
            ValueError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise BadImage(
                f"{path}, the token label of {self.keys[position]}, is damaged or no array ({reason}); make it again"
            ) from e
        if not isinstance(found, Tensor):
            raise BadImage(
                f"{path}, the token label of {self.keys[position]}, holds {type(found).__name__}: give a tensor "
                "(2, k, h, w), scores and class numbers"
            )
        return found


def _first_of_each(labels: Sequence[Label]) -> list[int]:
    """The position of the first image of each class."""
    first: dict[str, int] = {}
    for position, label in enumerate(labels):
        first.setdefault(str(label), position)
    return list(first.values())


class TokenLabelledSet(TrainingSet):
    """Augmented images with their dense labels, each with the crop and the flip that its image got."""

    def __init__(
        self, images: Images, augment: Photographs, seed: int, bad_files: BadFiles | None, labels: DenseLabels
    ) -> None:
        super().__init__(images, augment, seed, bad_files)
        self.crop = augment.crop
        self.labels = labels

    def target(self, position: int, size: tuple[int, int], seed: Seed) -> TokenTarget:
        (left, top, right, bottom), flipped = self.crop(size, seed)
        width, height = size
        box = torch.tensor([left / width, top / height, right / width, bottom / height])
        return TokenTarget(*self.labels.read(position), box, torch.tensor(flipped))
