"""From the bytes of an image file to the pixels that are wanted of it, as fast as that goes.

A JPEG is decoded by libjpeg-turbo (simplejpeg; to the bit what Pillow decodes, in half the time), at a reduced scale
where a crop is to be made smaller anyway; resampling is torch's, which agrees with Pillow's within a few levels of 255
and takes a third of its time. Everything else takes Pillow's way.

H W image, 3 channels; boxes are (left, top, right, bottom) in pixels
"""

import io
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from muntin.data.images import ORIENTATION, decode_image, decoding, read_bytes, refuse_bomb

Box = tuple[int, int, int, int]
INTERPOLATIONS = {  # by name: torch's mode, and whether it averages when it makes smaller
    "bicubic": ("bicubic", True),
    "bilinear": ("bilinear", True),
    "nearest": ("nearest-exact", False),
}
EIGHTHS = 8  # of the full size, at any number of which libjpeg decodes
HEADER = 65536  # bytes within which a file's Exif data begin


class Encoded:
    """The bytes of an image file, decoded as far as is asked for. `name` is what errors call it."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name

    @cached_property
    def _jpeg(self) -> tuple[int, int] | None:
        """Width and height of an upright JPEG in grey or colour; None for anything else."""
        turbo = _turbo()
        if turbo is None or not self.data.startswith(b"\xff\xd8") or self._turned():
            return None
        try:
            height, width, space, _ = turbo.decode_jpeg_header(self.data)
        except ValueError:  # Pillow may know better, or says what is wrong
            return None
        refuse_bomb(self.name, width, height)
        return (width, height) if space in ("YCbCr", "RGB", "Gray") else None

    def _turned(self) -> bool:
        if self.data.find(b"Exif\0\0", 0, HEADER) < 0:
            return False
        with decoding(self.name), Image.open(io.BytesIO(self.data)) as image:
            return image.getexif().get(ORIENTATION, 1) != 1

    @cached_property
    def _decoded(self) -> Image.Image:
        return decode_image(self.data, self.name)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height when upright; of a JPEG from its header alone."""
        return self._jpeg or self._decoded.size

    def image(self) -> Image.Image:
        """The upright RGB image. Raises `BadImage` naming the file and what is wrong with it."""
        return Image.fromarray(self.pixels()) if self._jpeg else self._decoded

    def pixels(self, eighths: int = EIGHTHS) -> np.ndarray:
        """(H, W, 3) uint8; a JPEG at so many eighths of its size, rounded up."""
        turbo = _turbo()
        if turbo is not None and self._jpeg:
            width, height = (-(-side * eighths // EIGHTHS) for side in self._jpeg)
            try:
                return turbo.decode_jpeg(self.data, min_height=height, min_width=width)
            except ValueError:  # Pillow decodes what is merely odd, or says what is wrong
                return np.array(self._decoded.resize((width, height), reducing_gap=2.0))
        return np.array(self._decoded)


Picture = Encoded | Image.Image  # what may be augmented or evaluated: a Pillow image is upright RGB


def read_image(path: Path) -> Encoded:
    """A file's bytes. Raises `BadImage` where it cannot be read or is empty."""
    return Encoded(read_bytes(path), str(path))


def cut(
    picture: Picture, box: Box, size: tuple[int, int], interpolation: str = "bicubic", margin: float = 1.0
) -> np.ndarray:
    """The box of a picture, resized to (height, width): (H, W, 3) uint8.

    margin: a JPEG is decoded at the smallest scale that leaves so many pixels for each pixel of the result, along
    both sides; where it is reduced, the box moves by less than a pixel of that scale.
    """
    if isinstance(picture, Image.Image):
        return resample(np.array(picture), box, size, interpolation)
    eighths = _eighths(box, size, margin)
    pixels = picture.pixels(eighths)
    (width, height), (decoded_height, decoded_width) = picture.size, pixels.shape[:2]
    if (decoded_width, decoded_height) != (width, height):
        x, y = decoded_width / width, decoded_height / height
        left, top = round(box[0] * x), round(box[1] * y)
        box = (left, top, max(round(box[2] * x), left + 1), max(round(box[3] * y), top + 1))
    return resample(pixels, box, size, interpolation)


def _eighths(box: Box, size: tuple[int, int], margin: float) -> int:
    """The scale to decode at: 1, 2 or 4 eighths if that is enough; the others take longer than the whole."""
    across, down = (box[2] - box[0]) / (size[1] * margin), (box[3] - box[1]) / (size[0] * margin)
    return next((eighths for eighths in (1, 2, 4) if min(across, down) * eighths >= EIGHTHS), EIGHTHS)


def resample(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """The box of (H, W, 3) uint8 pixels, resized to (height, width) with antialiasing."""
    left, top, right, bottom = box
    pixels = np.ascontiguousarray(
        pixels[top:bottom, left:right]
    )  # or torch rearranges it by channel, in twice the time
    if pixels.shape[:2] == size:
        return pixels
    mode, antialias = INTERPOLATIONS[interpolation]
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # 1 3 H W, channels last
    return np.ascontiguousarray(F.interpolate(batch, size, mode=mode, antialias=antialias)[0].permute(1, 2, 0).numpy())


@lru_cache
def _turbo() -> ModuleType | None:
    """simplejpeg, where it is installed; without it Pillow decodes the same pixels, whole."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
