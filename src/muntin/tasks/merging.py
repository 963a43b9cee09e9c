"""Detections of one image seen several times (at several scales, mirrored) made into one list.

n objects; a view is {"boxes": (n, 4), "scores": (n,), "labels": (n,), "masks": (n, m, m) where there are any}, its
boxes in the pixels that all views share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIKE = 0.7  # intersection over union from which boxes of one class vote on where the object is

View = dict[str, Tensor]


def merge(views: Sequence[View], iou: float, most: int) -> View:
    """What all views found, best first, at most `most`.

    Of boxes of one class that overlap by more than `iou` the best remains, with its score and its mask. Its corners
    are the mean of all boxes of its class that overlap it by `ALIKE` or more, weighted by their scores (box voting,
    Gidaris and Komodakis, 2015). A single view is left as it is.
    """
    if len(views) == 1:
        return views[0]
    from torchvision.ops import batched_nms, box_iou

    every = {key: torch.cat([view[key] for view in views]) for key in views[0]}
    kept = batched_nms(every["boxes"], every["scores"], every["labels"], iou)[:most]
    best = {key: values[kept] for key, values in every.items()}
    votes = (box_iou(best["boxes"], every["boxes"]) >= ALIKE) & (best["labels"][:, None] == every["labels"])
    votes[torch.arange(len(kept)), kept] = True  # a box without an area too has its own vote
    weights = votes * every["scores"].clamp(min=1e-6)
    return best | {"boxes": (weights @ every["boxes"]) / weights.sum(1, keepdim=True)}
