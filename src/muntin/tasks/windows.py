"""Logits of an image in bands from its top to its bottom, and from them the label of every pixel.

A segmenter's logits of a large image with many classes take gigabytes, so no more is held than is still needed.

B batch, K classes, H W picture, h w what the model sees
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**23  # logits that are held at the picture's size at once


def windows(
    model: nn.Module,
    images: Tensor,
    crop: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    mirrored: bool = False,
    limit: int = 8,
) -> Iterator[tuple[int, Tensor]]:
    """The first row and the logits (B, K, rows, w) of one band of rows after the other, each valid until the next.

    images: (B, 3, h, w), normalised. crop, stride: of windows whose logits are averaged where they overlap, placed as
    mmsegmentation places them (the last ones end at the border); None for one look at the whole. mirrored: look at the
    mirror image, and return what belongs to the image itself. limit: windows in a batch, where B is not more.
    """
    height, width = images.shape[2:]
    if mirrored:
        images = images.flip(-1)
    if crop is None or stride is None or (crop[0] >= height and crop[1] >= width):
        bands: Iterator[tuple[int, Tensor]] = iter([(0, _logits(model, images))])
    else:
        bands = _sliding(model, images, (min(crop[0], height), min(crop[1], width)), stride, limit)
    for top, band in bands:
        yield top, band.flip(-1) if mirrored else band


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images).float()


def _sliding(
    model: nn.Module, images: Tensor, crop: tuple[int, int], stride: tuple[int, int], limit: int
) -> Iterator[tuple[int, Tensor]]:
    (count, _, height, width), (high, wide) = images.shape, crop
    tops, lefts = _starts(height, high, stride[0]), _starts(width, wide, stride[1])
    together = max(1, limit // count)
    across = images.new_tensor(_cover(lefts, wide, 0, width))
    band = torch.empty(0)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for first in range(0, len(lefts), together):
            places = lefts[first : first + together]
            parts = torch.cat([images[:, :, top : top + high, left : left + wide] for left in places])
            for left, logits in zip(places, _logits(model, parts).chunk(len(places)), strict=True):
                if not band.numel():
                    band = logits.new_zeros(count, logits.shape[1], high, width)
                band[..., left : left + wide] += logits
        done = following - top
        down = images.new_tensor(_cover(tops, high, top, done))
        yield top, band[:, :, :done].div_(down[:, None] * across)
        band[:, :, : high - done] = band[:, :, done:].clone()
        band[:, :, high - done :] = 0


def _starts(side: int, crop: int, stride: int) -> list[int]:
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, side - crop) for i in range(count)]


def _cover(starts: list[int], crop: int, begin: int, length: int) -> list[int]:
    """How many windows lie over each position from `begin` on, along one axis."""
    return [sum(start <= at < start + crop for start in starts) for at in range(begin, begin + length)]


class LabelMap:
    """The label of every pixel of one picture, from the bands of each of its views.

    views: how many are averaged, by their probabilities; of a single one the class of the largest logit is taken.
    """

    def __init__(self, size: tuple[int, int], views: int) -> None:
        self.size, self.views = size, views
        self.map = torch.zeros(size, dtype=torch.uint8)
        self.total: Tensor | None = None
        self.rows = torch.empty(0)  # of the view that is being added: those from `first` on that are still needed
        self.first, self.next = 0, 0  # row of the view and of the picture

    def add(self, band: Tensor, top: int, height: int) -> None:
        """The rows from `top` on of a view that has `height` of them: (K, rows, w). Bands follow each other."""
        if top == 0:
            self.rows, self.first, self.next = band[:, :0], 0, 0
        places = ((torch.arange(self.size[0]) + 0.5) * (height / self.size[0]) - 0.5).clamp(0, height - 1)
        step = max(1, STRIP // (band.shape[0] * max(self.size[1], band.shape[2])))
        for part in band.split(step, 1):
            self._add(part, places, height, step)

    def _add(self, part: Tensor, places: Tensor, height: int, step: int) -> None:
        """places: the row of the view, as a fraction, that each row of the picture lies at."""
        rows = torch.cat([self.rows, part], 1)
        lower = places.floor().long()
        upper = (lower + 1).clamp(max=height - 1)
        known = self.first + rows.shape[1]
        ready = int((upper < known).sum())
        for begin in range(self.next, ready, step):
            strip = slice(begin, min(begin + step, ready))
            above, below = (rows[:, (each[strip] - self.first).to(rows.device)] for each in (lower, upper))
            logits = above.lerp(below, (places - lower)[strip, None].to(rows))
            self._put(strip, F.interpolate(logits[None], (logits.shape[1], self.size[1]), mode="bilinear")[0])
        self.next = ready
        needed = min(int(lower[ready]), known) if ready < self.size[0] else known
        self.rows, self.first = rows[:, needed - self.first :].clone(), needed

    def _put(self, strip: slice, logits: Tensor) -> None:
        """logits: (K, rows, W) of some rows of the picture."""
        classes = logits.shape[0]
        if classes > 255 and self.map.dtype == torch.uint8:
            self.map = self.map.int()
        if self.views == 1:
            self.map[strip] = logits.argmax(0).to(self.map)
            return
        if self.total is None:
            self.total = torch.zeros(classes, *self.size, dtype=torch.float16, device=logits.device)
        self.total[:, strip] += (logits.softmax(0) / self.views).half()

    def labels(self) -> Tensor:
        """(H, W) class indices on the CPU."""
        if self.total is not None:
            for row in range(0, self.size[0], 64):  # argmax makes a copy of what it is given
                self.map[row : row + 64] = self.total[:, row : row + 64].argmax(0).to(self.map)
        return self.map
