"""What training and evaluation do to an image together with its boxes, masks or labels, on bytes.

Everything that is drawn is a function of the seed, as in augment.py. Normalisation follows on the device (device.py).

B batch, H W image, n objects
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from muntin.data.annotated import IGNORE
from muntin.data.augment import Seed
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD, to_bytes
from muntin.errors import UserError

FILL = (124, 116, 104)  # ImageNet's mean colour, so that padding is nearly zero once it is normalised
STRIDE = 32  # sides of a batch of detection are multiples of it
LONGER = {"detect": 1333 / 800, "instance": 1333 / 800, "segment": 4.0}  # longest over shorter side, by task
LEAST = 1.0  # side of a box in pixels, below which there is nothing left to learn from

Target = dict[str, Tensor]


def dense_preprocessing(size: tuple[int, int], shorter: int, longer: int | None) -> dict[str, Any]:
    """How an image becomes a detector's or segmenter's input, as runs and exported files keep it.

    size: (height, width) that a measurement takes. shorter, longer: as in `fit`.
    """
    return {
        "size": list(size),
        "resize": None,
        "fit": {"shorter": shorter, "longer": longer},
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": "bilinear",
        "channels": "RGB",
    }


def fitted(size: tuple[int, int], shorter: float, longer: float | None) -> tuple[int, int]:
    """Height and width at which the shorter side is `shorter`, unless the longer one would exceed `longer`."""
    height, width = size
    scale = shorter / min(size)
    if longer is not None:
        scale = min(scale, longer / max(size))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def fit(picture: Image.Image, size: int, longer: int | None) -> Tensor:
    """What evaluation sees: the picture with the shorter side `size`, or the longer one `longer` where that is less.

    Returns (3, H, W) uint8.
    """
    image = to_bytes(np.array(picture))
    return F.resize_image(image, list(fitted(_sides(image), size, longer)))


class DetectionAugment:
    """Resizing, cropping and flipping with boxes and masks: the multi-scale recipe of DETR and Swin on COCO.

    size, smallest: bounds of the shorter side in pixels, which is drawn between them; longer: the most for the other
    side; flip: its probability; crop: that of a random crop before resizing, whose sides are 384 to 600 where the
    shorter side of the image is 400, 500 or 600, all in proportion to a `size` of 800.

    What comes out has no crowds, and no objects that the crop has left nothing of. Of an object that it has cut, the
    box is drawn around what is left of the mask.
    """

    SHORTER = (400, 500, 600)
    CROP = (384, 600)
    LONGER = 4200
    BASE = 800

    def __init__(
        self, size: int, longer: int | None, smallest: int | None = None, flip: float = 0.5, crop: float = 0.0
    ) -> None:
        self.size = size
        self.longer = longer
        self.smallest = size if smallest is None else smallest
        self.flip = flip
        self.crop = crop
        if not 0 < self.smallest <= size or (longer is not None and longer < size):
            raise UserError(
                f"smallest={smallest}, size={size}, longer={longer}: give sides in pixels, none less than the last"
            )

    def __call__(self, picture: Image.Image, target: dict[str, Any], seed: Seed) -> tuple[Tensor, Target]:
        """(3, H, W) uint8, and "boxes" (n, 4), "labels" (n,) and, where there are some, "masks" (n, H, W) uint8."""
        random = np.random.default_rng(seed)
        shorter = int(random.integers(self.smallest, self.size + 1))
        flipped, cropped = random.random(2) < (self.flip, self.crop)
        image = tv_tensors.Image(to_bytes(np.array(picture)))
        kinds = [name for name in ("boxes", "labels", "masks") if name in target]
        target = keep({name: target[name] for name in kinds}, ~target["crowd"])
        if cropped:
            image, target = _cropped(image, target, self._box(_sides(image), random))
        size = list(fitted(_sides(image), shorter, self.longer))
        image = F.resize(image, size)
        target |= {name: _resized(target[name], size) for name in kinds if name != "labels"}
        if flipped:
            image = F.horizontal_flip(image)
            target |= {name: F.horizontal_flip(target[name]) for name in kinds if name != "labels"}
        target["boxes"] = F.clamp_bounding_boxes(target["boxes"])  # rounding may have moved them out
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), keep(target, visible(target))

    def _box(self, size: tuple[int, int], random: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop in the image's own pixels."""
        unit = self.size / self.BASE
        height, width = fitted(size, int(random.choice(self.SHORTER)) * unit, self.LONGER * unit)
        scale = height / size[0]
        low, high = (side * unit for side in self.CROP)
        sides = [random.uniform(min(side, low), min(side, high)) / scale for side in (height, width)]
        tall, wide = (min(max(round(side), 1), whole) for side, whole in zip(sides, size, strict=True))
        return int(random.integers(size[0] - tall + 1)), int(random.integers(size[1] - wide + 1)), tall, wide

    def __repr__(self) -> str:
        return (
            f"DetectionAugment(size={self.size}, longer={self.longer}, smallest={self.smallest}, flip={self.flip}, "
            f"crop={self.crop})"
        )


class SegmentationAugment:
    """Random scale, crop, flip and colours with a class for every pixel: the recipe of ADE20K.

    size: of the crop, height and width in pixels; scale: bounds of the shorter side, in units of `size`; flip: its
    probability; distort: whether brightness, contrast, saturation and hue are changed, each every other time.

    At most three quarters of a crop are one class if one of ten tries brings that about. Where the image is smaller
    than the crop, it is padded on the right and below, with labels 255.
    """

    LONGER = 4  # the longer side in units of the shorter, at most
    TRIES = 10
    LARGEST = 0.75  # share of the labelled pixels that are of one class
    BRIGHTNESS = 0.25
    CONTRAST = SATURATION = 0.5
    HUE = 0.1  # of a turn

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.5, 2.0), flip: float = 0.5, distort: bool = True
    ) -> None:
        self.size = size
        self.scale = scale
        self.flip = flip
        self.distort = distort
        if size < 1 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"size={size}, scale={scale}: give a size of at least 1, and a scale as in (0.5, 2.0)")

    def __call__(self, picture: Image.Image, target: dict[str, Any], seed: Seed) -> tuple[Tensor, Target]:
        """(3, size, size) uint8, and "labels" (size, size) uint8."""
        random = np.random.default_rng(seed)
        ratio, flipped = random.uniform(*self.scale), random.random() < self.flip
        colours, corners = random.random((4, 2)), random.random((self.TRIES, 2))
        image = tv_tensors.Image(to_bytes(np.array(picture)))
        shorter = self.size * ratio
        size = list(fitted(_sides(image), shorter, self.LONGER * shorter))
        image, labels = F.resize(image, size), _resized(target["labels"], size)
        box = self._box(labels, corners)
        image, labels = F.crop(image, *box), F.crop(labels, *box)
        if flipped:
            image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
        if self.distort:
            image = self._distorted(image, colours)
        padding = [0, 0, self.size - box[3], self.size - box[2]]  # left, top, right, bottom
        image = F.pad(image, padding, fill=list(FILL))
        labels = F.pad(labels, padding, fill=IGNORE)
        return image.as_subclass(Tensor), {"labels": labels.as_subclass(Tensor)}

    def _box(self, labels: Tensor, corners: np.ndarray) -> tuple[int, int, int, int]:
        """Top, left, height and width of the first crop that is not nearly all of one class, or of the last one."""
        height, width = _sides(labels)
        tall, wide = min(height, self.size), min(width, self.size)
        for down, across in corners.tolist():
            top, left = int(down * (height - tall + 1)), int(across * (width - wide + 1))
            counts = labels.as_subclass(Tensor)[top : top + tall, left : left + wide].flatten().bincount(minlength=256)
            counts[IGNORE] = 0
            if counts.max() < self.LARGEST * counts.sum():
                break
        return top, left, tall, wide

    def _distorted(self, image: Tensor, draws: np.ndarray) -> Tensor:
        """Brightness, contrast, saturation and hue, in this order. draws: (4, 2), whether and how much."""
        chosen, amounts = draws[:, 0] < 0.5, 2 * draws[:, 1] - 1
        changes = (
            (F.adjust_brightness, 1 + self.BRIGHTNESS * amounts[0]),
            (F.adjust_contrast, 1 + self.CONTRAST * amounts[1]),
            (F.adjust_saturation, 1 + self.SATURATION * amounts[2]),
            (F.adjust_hue, self.HUE * amounts[3]),
        )
        for wanted, (change, amount) in zip(chosen, changes, strict=True):
            if wanted:
                image = change(image, float(amount))
        return image

    def __repr__(self) -> str:
        return f"SegmentationAugment(size={self.size}, scale={self.scale}, flip={self.flip}, distort={self.distort})"


def keep(target: Target, chosen: Tensor) -> Target:
    """The objects that are chosen, (n,) bool."""
    if chosen.all():  # masks are large: they are not copied for nothing
        return target
    return {name: _like(value[chosen], value) for name, value in target.items()}


def visible(target: Target) -> Tensor:
    """(n,) bool: which objects have a box of at least a pixel each way and, if any, a mask that is not empty."""
    boxes = target["boxes"]
    found = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(1)
    return found & target["masks"].flatten(1).any(1).bool() if "masks" in target else found


def around(masks: Tensor) -> Tensor:
    """(n, 4) boxes x1 y1 x2 y2 around the pixels of masks (n, H, W); zeros for a mask that has none."""
    found = []
    for lines in (masks.any(1).bool(), masks.any(2).bool()):  # which columns, which rows
        place = torch.arange(lines.shape[1])
        first, last = torch.where(lines, place, len(place)).amin(1), torch.where(lines, place + 1, 0).amax(1)
        found.append((torch.minimum(first, last), last))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], 1).float()


def _cropped(image: Tensor, target: Target, box: tuple[int, int, int, int]) -> tuple[Tensor, Target]:
    """What is inside of top, left, height and width."""
    image = F.crop(image, *box)
    boxes = F.crop(target["boxes"], *box)
    if "masks" not in target:
        return image, target | {"boxes": boxes}
    masks = F.crop(target["masks"], *box)
    whole = target["boxes"].as_subclass(Tensor) - torch.tensor([box[1], box[0], box[1], box[0]])
    cut = (whole != boxes.as_subclass(Tensor)).any(1)
    around_masks = torch.where(cut[:, None], around(masks.as_subclass(Tensor)), boxes.as_subclass(Tensor))
    return image, target | {"boxes": tv_tensors.wrap(around_masks, like=boxes), "masks": masks}


def _resized(value: Tensor, size: list[int]) -> Tensor:
    """Boxes, masks or labels. Nearest-exact pixels: plain nearest ones would lie half a pixel off the image's."""
    return F.resize(value, size, interpolation=InterpolationMode.NEAREST_EXACT)


def _like(value: Tensor, original: Tensor) -> Tensor:
    """The same kind of tensor: indexing makes a plain one."""
    return tv_tensors.wrap(value, like=original) if isinstance(original, tv_tensors.TVTensor) else value


def _sides(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return height, width


def collate_detection(
    batch: Sequence[tuple[Tensor, Target]],
) -> tuple[Tensor, list[tuple[int, int]], list[Target]]:
    """Images, (B, 3, H, W) uint8, padded on the right and below to sides that are multiples of 32; the (height, width)
    of each that is image; and the targets as they are."""
    sizes = [_sides(image) for image, _ in batch]
    return _stacked([image for image, _ in batch], STRIDE), sizes, [target for _, target in batch]


def collate_segmentation(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, Tensor]:
    """Images, (B, 3, H, W) uint8, and labels, (B, H, W) int64; smaller ones are padded, with labels 255."""
    images = _stacked([image for image, _ in batch], 1)
    labels = torch.full((len(batch), *images.shape[2:]), IGNORE)
    for place, (_, target) in zip(labels, batch, strict=True):
        height, width = _sides(target["labels"])
        place[:height, :width] = target["labels"]
    return images, labels


def _stacked(images: list[Tensor], multiple: int) -> Tensor:
    """(B, 3, H, W) uint8, channels last as images are decoded."""
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*map(_sides, images), strict=True))
    batch = torch.tensor(FILL, dtype=torch.uint8).repeat(len(images), height, width, 1)  # B H W 3
    for place, image in zip(batch, images, strict=True):
        tall, wide = _sides(image)
        place[:tall, :wide] = image.permute(1, 2, 0)
    return batch.permute(0, 3, 1, 2)
