"""Packages that talk while they are imported and while they convert."""

import contextlib
import io
import logging
from collections.abc import Iterator

from muntin.runtime.tracing import quiet


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without a converter's warnings, log lines and progress bars, which a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
