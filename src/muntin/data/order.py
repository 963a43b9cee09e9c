"""The order of an epoch's images: a pure function of (seed, epoch)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Order(Protocol):
    """All positions of a data set, once each."""

    def __call__(self, seed: int, epoch: int, /) -> np.ndarray: ...

    def ahead(self, positions: np.ndarray, /) -> None:
        """These positions are about to be read, in this order."""

    def select(self, positions: Sequence[int], /) -> "Order":
        """The order of a data set of these positions alone."""


class Shuffled:
    """Any image may follow any other: for data that are read at random as fast as in a row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(self.count)

    def ahead(self, positions: np.ndarray) -> None:
        """Nothing has to be fetched."""

    def select(self, positions: Sequence[int]) -> "Shuffled":
        return Shuffled(len(positions))


class ShardsShuffled:
    """Shards in a random order, and the images of `together` shards at a time mixed: for shards that are fetched whole.

    shards: the shard of every position; fetch: told the shards that will be read next, soonest first.
    """

    def __init__(self, shards: np.ndarray, together: int, fetch: Callable[[list[int]], None]) -> None:
        self.shards = shards
        self.together = together
        self.near = together * -(-len(shards) // max(len(np.unique(shards)), 1))  # images of a group of usual shards
        self.fetch = fetch

    def __call__(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        present = np.unique(self.shards)
        rank = np.empty(present.max() + 1, dtype=np.int64)
        rank[present] = generator.permutation(len(present)) // self.together
        mixed = generator.permutation(len(self.shards))
        return mixed[np.argsort(rank[self.shards[mixed]], kind="stable")]

    def ahead(self, positions: np.ndarray) -> None:
        shards, first = np.unique(self.shards[positions[: self.near]], return_index=True)
        self.fetch(shards[np.argsort(first)].tolist())

    def select(self, positions: Sequence[int]) -> "ShardsShuffled":
        return ShardsShuffled(self.shards[np.asarray(positions, dtype=np.int64)], self.together, self.fetch)
