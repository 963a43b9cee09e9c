"""Batches as pure functions: of (seed, epoch, index) for what is in an image, of (seed, epoch) for the order.

Nothing is drawn from a generator that lives on, so a run that was stopped anywhere continues to the bit,
whatever the number of workers.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from muntin.data.augment import Augment, Seed
from muntin.data.check import BadFiles
from muntin.data.datasets import Images
from muntin.data.decode import Picture
from muntin.data.images import BadImage
from muntin.data.order import Order, Shuffled
from muntin.errors import UserError

Item = tuple[int, int]  # epoch, position


Target = int | Tensor  # a class, or (K,) float with a 1 for each class that an image has
Sample = tuple[Tensor, Target] | UserError
TRIES = 100  # other images, before it is said that none can be read


def target(images: Images, position: int) -> Target:
    """What the model is to say of an image."""
    label = images.labels[position]
    if isinstance(label, int):
        return label
    hot = torch.zeros(len(images.classes))
    hot[label] = 1
    return hot


class TrainingSet(Dataset[Sample]):
    """Augmented images, (3, H, W) uint8, asked for by (epoch, position).

    With `bad_files` an image that cannot be used is listed there, and another one, drawn from (seed, epoch, position),
    takes its place; without it is given as the `BadImage` that the loader raises.
    """

    def __init__(self, images: Images, augment: Augment, seed: int, bad_files: BadFiles | None = None) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed
        self.bad_files = bad_files

    def __getitem__(self, item: Item) -> Sample:
        epoch, position = item
        seed = (self.seed, epoch, position)
        others: np.ndarray | None = None
        for attempt in range(TRIES):
            try:
                return self.sample(position, seed)
            except BadImage as error:
                if self.bad_files is None:
                    return error
                self.bad_files.add(self.images.name(position), str(error))
            except UserError as error:
                return error
            if others is None:
                others = np.random.default_rng((*seed, 1)).integers(len(self.images), size=TRIES)
            position = int(others[attempt])
        return BadImage(f"{TRIES} images in a row cannot be used; see {self.bad_files.path if self.bad_files else ''}")

    def sample(self, position: int, seed: Seed) -> Any:
        """An image augmented with `seed`, and its target."""
        picture = self.images.read(position)
        return self.augment(picture, seed), self.target(position, picture.size, seed)

    def target(self, position: int, size: tuple[int, int], seed: Seed) -> Any:
        """What the model is to say of an image, of this width and height before it was augmented with `seed`."""
        return target(self.images, position)


class EvaluationSet(Dataset[Sample]):
    """Images as the model is to see them, asked for by position.

    share: the rank of this process and their number. Each has every so manieth image, and all have as many: where the
    images run out, the last one comes again with a target of -1, which does not count.
    """

    def __init__(self, images: Images, transform: Callable[[Picture], Tensor], share: tuple[int, int] = (0, 1)) -> None:
        self.images = images
        self.transform = transform
        self.rank, self.processes = share

    def __len__(self) -> int:
        return -(-len(self.images) // self.processes)

    def __getitem__(self, number: int) -> Sample:
        position = number * self.processes + self.rank
        beyond = position >= len(self.images)
        position = min(position, len(self.images) - 1)
        try:
            image, wanted = self.transform(self.images.read(position)), target(self.images, position)
        except UserError as error:
            return error
        return image, 0 * wanted - 1 if beyond else wanted


def shared_batch(count: int, batch_size: int, parts: int, processes: int) -> int:
    """Images of a step that takes `batch_size` of `count`: as many, or nearly all where there are no more.

    Raises `UserError` where they cannot be shared out evenly.
    """
    pieces = parts * processes
    shared = min(batch_size, count) // pieces * pieces
    what = f"{processes} process{'es' if processes > 1 else ''} in {parts} part{'s' if parts > 1 else ''} each"
    if not shared:
        raise UserError(
            f"{min(batch_size, count)} images cannot be shared out over {what}; give a larger batch_size, fewer "
            "devices or a smaller accumulate"
        )
    if batch_size < count and shared != batch_size:
        raise UserError(
            f"batch_size={batch_size} cannot be shared out evenly over {what}; give {shared} or {shared + pieces}"
        )
    return shared


class EpochBatches:
    """Batches of (epoch, position) in the order of (seed, epoch), from batch `start` of the first epoch on.

    A step of the optimiser takes `batch_size` images in `parts`, each shared out over the processes: `share` is the
    rank of this one and their number. So a step has the same images however it is divided. Steps are full: the last few
    images of an epoch wait for another order. A set smaller than one step is one step (`shared_batch`). With `repeats`
    each image comes so many times in a row, under an epoch number of its own each time, so that its augmentations
    differ, and an epoch takes as many steps as without (repeated augmentation, Hoffer et al., 2020). `order` says which
    images may follow which (by default any).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        repeats: int = 1,
        parts: int = 1,
        share: tuple[int, int] = (0, 1),
        order: Order | None = None,
    ) -> None:
        self.count = count
        self.order = order or Shuffled(count)
        self.parts = parts
        self.rank, self.processes = share
        self.pieces = parts * self.processes  # of a step
        self.batch_size = shared_batch(count, batch_size, parts, self.processes)
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.start = 0
        self.sampler = self  # Lightning calls set_epoch on `batch_sampler.sampler`

    def begin(self, step: int) -> None:
        """Start after so many steps of the optimiser."""
        self.epoch, done = divmod(step, len(self) // self.parts)
        self.start = done * self.parts

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the first one starts: Lightning counts those done before."""
        return self.count // self.batch_size * self.parts

    def __iter__(self) -> Iterator[list[Item]]:
        order = self.order(self.seed, self.epoch)
        order = order[: -(-self.count // self.repeats)].repeat(self.repeats)
        piece = self.batch_size // self.pieces
        for number in range(self.start, len(self)):
            first = (number * self.processes + self.rank) * piece
            self.order.ahead(order[first :: self.repeats])
            yield [
                (self.epoch * self.repeats + place % self.repeats, int(order[place]))
                for place in range(first, first + piece)
            ]


class Loader(DataLoader[Sample]):
    """A DataLoader that raises a worker's `UserError` as it is: torch would bury it in the worker's traceback."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def training_loader(
    data: Dataset[Any], batches: EpochBatches, workers: int, collate_fn: Callable[[list[Any]], Any] | None = None
) -> Loader:
    """Batches of (B, 3, H, W) uint8 and targets, (B,) or (B, K), or of what `collate_fn` makes of samples."""
    return Loader(
        data,
        batch_sampler=batches,  # of items, not integers
        num_workers=workers,
        collate_fn=collate_fn or collate,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(
    data: Dataset[Any], batch_size: int, workers: int, collate_fn: Callable[[list[Any]], Any] | None = None
) -> Loader:
    """All images in order, in batches of what `data`, and `collate_fn` where it is given, make of them."""
    return Loader(
        data,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate_fn or collate,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def collate(items: list[Sample]) -> tuple[Tensor, Tensor] | UserError:
    """(B, 3, H, W) images, in memory as their channels lie in the items, and (B,) or (B, K) targets.

    Decoded images lie pixel by pixel: stacked like that they are copied whole, several times faster than by channel.
    """
    images, targets = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        targets.append(item[1])
    if images[0].stride(0) == 1:
        pixels = default_collate([image.permute(1, 2, 0) for image in images])
        return pixels.permute(0, 3, 1, 2), default_collate(targets)
    return default_collate(images), default_collate(targets)


def _quiet(_worker: int) -> None:
    """One thread for each worker, and no repeated warnings from decoders."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
