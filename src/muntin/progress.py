"""A progress bar on stderr, where that is a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar that shows the rate and the time left."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, disable=not sys.stderr.isatty(), leave=False))


class Bar:
    """A bar of so many steps that says what is being done, with an estimate of the time left; nothing where tqdm is
    not installed, the output is no terminal, or it is not wanted.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self.what = what
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=what, leave=False, file=sys.stderr)

    def say(self, doing: str) -> None:
        """What is being done now."""
        if self._bar is not None:
            self._bar.set_description(f"{self.what}: {doing}")

    def step(self, steps: int = 1) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
