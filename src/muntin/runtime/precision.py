"""The number formats that a model can be exported to and measured in."""

import torch

from muntin.errors import UserError, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "f32": "float32", "f16": "float16"}


def precision(name: str) -> str:
    """The full name of a precision: float32, float16 or bfloat16, also written fp32, fp16, bf16.

    Raises UserError for any other.
    """
    full = SHORT.get(name, name)
    if full not in DTYPES:
        valid = ", ".join(DTYPES)
        raise UserError(f"precision {name!r} is unknown{nearest(name, [*DTYPES, *SHORT])}; valid are {valid}")
    return full
