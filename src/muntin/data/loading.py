"""Batches as pure functions: of (seed, epoch, index) for what is in an image, of (seed, epoch) for the order.

Nothing is drawn from a generator that lives on, so a run that was stopped anywhere continues to the bit,
whatever the number of workers.
"""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from muntin.data.augment import Augment
from muntin.data.datasets import Images
from muntin.data.decode import Picture

Item = tuple[int, int]  # epoch, position


class TrainingSet(Dataset[tuple[Tensor, int]]):
    """Augmented images, (3, H, W) uint8, asked for by (epoch, position)."""

    def __init__(self, images: Images, augment: Augment, seed: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        epoch, position = item
        image = self.augment(self.images.read(position), (self.seed, epoch, position))
        return image, self.images.labels[position]


class EvaluationSet(Dataset[tuple[Tensor, int]]):
    """Images as the model is to see them, asked for by position."""

    def __init__(self, images: Images, transform: Callable[[Picture], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(self.images.read(position)), self.images.labels[position]


class EpochBatches:
    """Batches of (epoch, position) in the order of (seed, epoch), from batch `start` of the first epoch on.

    Batches are full: the last few images of an epoch wait for another order. A set smaller than one batch is
    one batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, epoch: int = 0, start: int = 0) -> None:
        self.count = count
        self.batch_size = min(batch_size, count)
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.sampler = self  # Lightning calls set_epoch on `batch_sampler.sampler`

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the first one starts: Lightning counts those done before."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Item]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
        for number in range(self.start, len(self)):
            positions = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, position) for position in positions]


def training_loader(data: TrainingSet, batches: EpochBatches, workers: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        data,
        batch_sampler=batches,  # of items, not integers
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(data: EvaluationSet, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        data,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) images, in memory as their channels lie in the items, and (B,) targets.

    Decoded images lie pixel by pixel: stacked like that they are copied whole, several times faster than by channel.
    """
    images, targets = zip(*items, strict=True)
    first = images[0]
    if first.stride(0) == 1:
        pixels = default_collate([image.permute(1, 2, 0) for image in images])
        return pixels.permute(0, 3, 1, 2), default_collate(list(targets))
    return default_collate(list(images)), default_collate(list(targets))


def _quiet(_worker: int) -> None:
    """One thread for each worker, and no repeated warnings from decoders."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
