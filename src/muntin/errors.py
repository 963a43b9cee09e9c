"""The one error that means: the input is at fault, and here is what to do about it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names what was given, what is valid and what to do; the command exits with 2."""


def nearest(given: str, valid: Iterable[str], limit: int = 3) -> str:
    """`" (did you mean 'swin_t'?)"` where something valid is near, otherwise an empty string."""
    near = difflib.get_close_matches(given, list(valid), n=limit, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
