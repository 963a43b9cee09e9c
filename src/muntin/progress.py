"""A progress bar on stderr, where that is a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar that shows the rate and the time left."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, disable=not sys.stderr.isatty(), leave=False))
