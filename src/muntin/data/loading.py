"""Batches as pure functions: of (seed, epoch, index) for what is in an image, of (seed, epoch) for the order.

Nothing is drawn from a generator that lives on, so a run that was stopped anywhere continues to the bit,
whatever the number of workers.
"""

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from muntin.data.datasets import Images
from muntin.data.transforms import to_tensor
from muntin.errors import UserError

Item = tuple[int, int]  # epoch, position


class Augment(Protocol):
    """A training transform: RGB image and the three numbers that it may draw from -> (3, H, W) float."""

    def __call__(self, image: Image.Image, seed: tuple[int, int, int]) -> Tensor: ...


class TrainingSet(Dataset[tuple[Tensor, int]]):
    """Augmented images, asked for by (epoch, position)."""

    def __init__(self, images: Images, augment: Augment, seed: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        epoch, position = item
        image = self.augment(self.images.open(position), (self.seed, epoch, position))
        return image, self.images.labels[position]


class EvaluationSet(Dataset[tuple[Tensor, int]]):
    """Images as the model is to see them, asked for by position."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(self.images.open(position)), self.images.labels[position]


class EpochBatches:
    """Batches of (epoch, position) in the order of (seed, epoch), from batch `start` of the first epoch on.

    A step of the optimiser takes `batch_size` images in `parts`, each shared out over the processes: `share` is the
    rank of this one and their number. So a step has the same images however it is divided. Steps are full: the last few
    images of an epoch wait for another order. A set smaller than one step is one step. With `repeats` each image comes
    so many times in a row, under an epoch number of its own each time, so that its augmentations differ, and an epoch
    takes as many steps as without (repeated augmentation, Hoffer et al., 2020).
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
    ) -> None:
        self.count = count
        self.parts = parts
        self.rank, self.processes = share
        pieces = parts * self.processes
        self.batch_size = min(batch_size, count) // pieces * pieces
        if not self.batch_size:
            raise UserError(
                f"{min(batch_size, count)} images cannot be shared out over {self.processes} processes in {parts} "
                "parts each; give a larger batch_size, fewer devices or a smaller accumulate"
            )
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
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        order = order[: -(-self.count // self.repeats)].repeat(self.repeats)
        piece = self.batch_size // (self.parts * self.processes)
        for number in range(self.start, len(self)):
            first = (number * self.processes + self.rank) * piece
            yield [
                (self.epoch * self.repeats + place % self.repeats, int(order[place]))
                for place in range(first, first + piece)
            ]


def training_loader(data: TrainingSet, batches: EpochBatches, workers: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        data,
        batch_sampler=batches,  # of items, not integers
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(data: EvaluationSet, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        data,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _quiet(_worker: int) -> None:
    """One thread for each worker, and no repeated warnings from decoders."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


class Distort:
    """Small rotation, scale, shear, shift and bending of the resized image, for characters: no flip, no crop.

    At strength 1 up to 15 degrees, a factor of 1.16 each way, 0.15, and a tenth of the side; bending moves
    the knots of a 4 x 4 mesh by a normal deviate of 1/32 of the side (after Simard et al., ICDAR 2003).
    """

    CELLS = 4

    def __init__(
        self,
        picture: Callable[[Image.Image], Image.Image],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        strength: float = 1.0,
    ) -> None:
        self.picture = picture
        self.mean, self.std = mean, std
        self.radians = strength * math.radians(15)
        self.scale, self.shear, self.shift = 0.15 * strength, 0.15 * strength, 0.1 * strength
        self.bend = strength / 32

    def __call__(self, image: Image.Image, seed: tuple[int, int, int]) -> Tensor:
        image = self.picture(image)
        x, y = self._knots(np.random.default_rng(seed))
        x, y = ((x + 0.5) * image.width).tolist(), ((y + 0.5) * image.height).tolist()
        edges_x = [round(image.width * i / self.CELLS) for i in range(self.CELLS + 1)]
        edges_y = [round(image.height * i / self.CELLS) for i in range(self.CELLS + 1)]
        mesh = []
        for i, j in itertools.product(range(self.CELLS), repeat=2):
            box = (edges_x[j], edges_y[i], edges_x[j + 1], edges_y[i + 1])
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))  # anticlockwise from the upper left
            mesh.append((box, tuple(value for r, c in corners for value in (x[r][c], y[r][c]))))
        image = image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
        return to_tensor(image, self.mean, self.std)

    def _knots(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Where each knot of the mesh is taken from: x and y in sides from the centre, (CELLS + 1, CELLS + 1)."""
        turn, wide, high, lean, right, down = random.uniform(-1, 1, 6).tolist()
        sine, cosine = math.sin(self.radians * turn), math.cos(self.radians * turn)
        wide, high, lean = math.exp(self.scale * wide), math.exp(self.scale * high), self.shear * lean
        place = np.linspace(-0.5, 0.5, self.CELLS + 1)
        x, y = wide * (place[None, :] + lean * place[:, None]), high * place[:, None]
        noise = self.bend * random.standard_normal((2, self.CELLS + 1, self.CELLS + 1))
        x, y = cosine * x - sine * y, sine * x + cosine * y
        return x + self.shift * right + noise[0], y + self.shift * down + noise[1]


class Photographs:
    """Random resized crop, flip, RandAugment and erasing: the recipe of DeiT and Swin, by timm."""

    def __init__(
        self,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        strength: str,
        color_jitter: float,
        erasing: float,
    ) -> None:
        from timm.data import create_transform

        self.transform = create_transform(
            size,
            is_training=True,
            auto_augment=strength or None,
            color_jitter=color_jitter,
            interpolation="bicubic",
            re_prob=erasing,
            re_mode="pixel",
            mean=mean,
            std=std,
        )

    def __repr__(self) -> str:
        return repr(self.transform)

    def __call__(self, image: Image.Image, seed: tuple[int, int, int]) -> Tensor:
        with _seeded(seed):
            return self.transform(image)


class Plain:
    """No augmentation: what evaluation sees."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, seed: tuple[int, int, int]) -> Tensor:
        return self.transform(image)


@contextlib.contextmanager
def _seeded(seed: tuple[int, int, int]) -> Iterator[None]:
    """The three global generators that timm draws from, seeded for a while and then put back."""
    first, second, third = np.random.SeedSequence(seed).generate_state(3).tolist()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(third)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
