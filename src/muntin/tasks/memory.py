"""What to do where a step does not fit into the device's memory."""

import math
import re

import torch
from torch import nn

from muntin.tasks.settings import Settings

GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest goes to fragments and to libraries
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def too_little(task: nn.Module, settings: Settings, error: str, saved: bool) -> str:
    """A message for a step of `settings` that ended with the allocator's `error`; `saved`: a checkpoint exists."""
    need = total = 0
    if torch.cuda.is_available():
        tried = re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", error)
        need = torch.cuda.max_memory_allocated() + (round(float(tried[1]) * _UNITS[tried[2]]) if tried else 0)
        total = torch.cuda.mem_get_info()[1]
    parts = fitting_parts(settings, standing(task), need, total)
    figures = ""
    if need:
        figures = f" (it has {total / GIB:.1f} GiB, and a part of a step came to {need / GIB:.1f} GiB before its end)"
    message = (
        f"the device has too little memory for batch_size={settings.batch_size} at size={settings.size} "
        f"in {settings.accumulate} {'part' if settings.accumulate == 1 else 'parts'}{figures}; "
    )
    if parts > settings.batch_size:
        return f"{message}not even single images would fit: give a smaller model or --set size"
    again = "with --resume --force " if saved else ""
    least = math.ceil(settings.batch_size / parts)
    less = "" if settings.grad_checkpointing else ", keep less for the backward pass: --set grad_checkpointing=true"
    return (
        f"{message}take the same step in more parts, of {least} images each: {again}--set accumulate={parts}"
        f"{less}, or take fewer images, in another run: --set batch_size={least}"
    )


def standing(task: nn.Module) -> int:
    """Bytes that a step needs whatever its images: weights, their average, gradients and AdamW's two moments."""
    held = sum(tensor.nbytes for tensor in (*task.parameters(), *task.buffers()))
    return held + 3 * sum(parameter.nbytes for parameter in task.parameters() if parameter.requires_grad)


def fitting_parts(settings: Settings, fixed: int, need: int, total: int) -> int:
    """The least power of two, above those tried, of parts that a step would fit in.

    `need` bytes were wanted when the memory of `total` bytes ran out, which is less than the step takes in all, so the
    true number may be higher. Without these figures it is twice the parts that were tried.
    """
    parts = 2 * settings.accumulate
    if need <= fixed:
        return parts
    images = settings.batch_size / settings.accumulate
    each = (need - fixed) / images
    while parts <= settings.batch_size and fixed + each * settings.batch_size / parts > USABLE * total:
        parts *= 2
    return parts
