"""Masks of objects, given within their boxes, into whole images."""

import torch
from torch import Tensor

from muntin.errors import UserError


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """masks: (n, m, m), probabilities of the object within its box. boxes: (n, 4) x1 y1 x2 y2 in pixels.
    size: (H, W) of the image. -> (n, H, W) bool, true where the probability is at least `threshold`.

    Each pixel takes the bilinear value at its centre; beyond the centres of a mask's outermost cells it falls to zero,
    as in the field's usual code. Raises UserError where masks and boxes are not as many.
    """
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise UserError(f"masks {tuple(masks.shape)} and boxes {tuple(boxes.shape)}: give (n, m, m) and (n, 4)")
    height, width = size
    image = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for i, (mask, box) in enumerate(zip(masks.float(), boxes.tolist(), strict=True)):
        rows, y = _weights(box[1], box[3], height, mask)
        columns, x = _weights(box[0], box[2], width, mask)
        if len(rows) and len(columns):
            image[i, y : y + len(rows), x : x + len(columns)] = rows @ mask @ columns.t() >= threshold
    return image


def _weights(low: float, high: float, side: int, mask: Tensor) -> tuple[Tensor, int]:
    """How much a pixel takes of each cell along an axis: (pixels, m), and the first pixel."""
    cells = mask.shape[-1]
    start, stop = max(int(low) - 1, 0), min(int(high) + 2, side)
    if stop <= start or high <= low:
        return mask.new_empty(0, cells), 0
    centres = torch.arange(start, stop, device=mask.device, dtype=mask.dtype) + 0.5
    places = (centres - low) * (cells / (high - low)) - 0.5
    return (1 - (places[:, None] - torch.arange(cells, device=mask.device)).abs()).clamp(min=0), start
