"""Suppression of overlapping boxes as one operator of a graph: ONNX's NonMaxSuppression, here as PyTorch runs it.

torchvision's `nms` takes one set of boxes; a graph that cannot loop over classes needs all of them at once.
B sets of boxes, G groups, N boxes
"""

import itertools

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op("muntin::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    """What is kept of boxes (B, N, 4) with scores (B, G, N), each group for itself: (m, 3) int64, set, group and box.

    Boxes with scores above `least`, best first; of two that overlap by more than `iou` the better one.
    """
    kept = [scores.new_empty(0, 3, dtype=torch.long)]
    for number, group in itertools.product(range(len(scores)), range(scores.shape[1])):
        here = torch.where(scores[number, group] > least)[0]
        rows = here[nms(boxes[number, here], scores[number, group, here], iou)]
        kept.append(torch.stack((torch.full_like(rows, number), torch.full_like(rows, group), rows), 1))
    return torch.cat(kept)


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((count, 3), dtype=torch.long)
