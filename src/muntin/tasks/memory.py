"""What to do where a step does not fit into the device's memory."""

import re

import torch
from torch import nn

from muntin.tasks.base import local
from muntin.tasks.settings import Settings

GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest goes to fragments and to libraries
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is an allocator's, that of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_little(task: nn.Module, settings: Settings, error: str, saved: bool, processes: int = 1) -> str:
    """A message for a step of `settings` that ended with the allocator's `error`; `saved`: a checkpoint exists;
    `processes`: that share the images of each part.
    """
    need = total = 0
    if torch.cuda.is_available():
        tried = re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", error)
        need = torch.cuda.max_memory_allocated() + (round(float(tried[1]) * _UNITS[tried[2]]) if tried else 0)
        total = torch.cuda.mem_get_info()[1]
    parts = fitting_parts(settings, standing(task), need, total, processes)
    figures = ""
    if need:
        figures = f" (it has {total / GIB:.1f} GiB, and a part of a step came to {need / GIB:.1f} GiB before its end)"
    message = (
        f"the device has too little memory for batch_size={settings.batch_size} at size={settings.size} "
        f"in {settings.accumulate} {'part' if settings.accumulate == 1 else 'parts'}"
        f"{'' if processes == 1 else f' over {processes} processes'}{figures}; "
    )
    if parts * processes > settings.batch_size:
        return f"{message}not even single images would fit: give a smaller model or --set size"
    each = settings.batch_size // (parts * processes)  # images of a process at once
    even = parts * processes * each
    again = "with --resume --force " if saved else ""
    more = f"{again}--set accumulate={parts}"
    if even != settings.batch_size:
        more = f"in another run --set accumulate={parts} --set batch_size={even}"
    less = "" if settings.grad_checkpointing else ", keep less for the backward pass: --set grad_checkpointing=true"
    return (
        f"{message}take the same step in more parts, of {each} images each: {more}{less}, or take fewer images, "
        f"in another run: --set batch_size={each * processes * settings.accumulate}"
    )


def standing(task: nn.Module) -> int:
    """Bytes that a step needs whatever its images: weights, their average, gradients and AdamW's two moments."""
    held = sum(local(tensor).nbytes for tensor in (*task.parameters(), *task.buffers()))
    return held + 3 * sum(local(parameter).nbytes for parameter in task.parameters() if parameter.requires_grad)


def fitting_parts(settings: Settings, fixed: int, need: int, total: int, processes: int = 1) -> int:
    """How many parts a step would fit in: those tried, doubled until it would.

    `need` bytes were wanted when the memory of `total` bytes ran out, which is less than the step takes in all, so the
    true number may be higher. Without these figures it is twice the parts that were tried.
    """
    parts = 2 * settings.accumulate
    if need <= fixed:
        return parts
    shared = settings.batch_size / processes  # images of this process in a step
    each = (need - fixed) / (shared / settings.accumulate)
    while parts <= shared and fixed + each * shared / parts > USABLE * total:
        parts *= 2
    return parts
