"""Any image file to an upright RGB image, or an error that names the file."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from muntin.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # Exif's tag; 1 is upright
QUARTER_TURNS = 5  # the first of its values that exchange width and height


class BadImage(UserError):
    """An image file that cannot be used; the message names it and says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image: EXIF rotation applied, transparency over white, 16 bits scaled down to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*WHITE, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greys by their high byte. 32-bit greys and floats have no fixed range, so by their own."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and 0 <= values.min() and values.max() <= 65535):
        return Image.fromarray((values / 257).round().astype(np.uint8))
    values = np.nan_to_num(values)
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a file to upright RGB. Raises `BadImage` naming the file and what is wrong with it."""
    return decode_image(read_bytes(Path(path)), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of a file to upright RGB. Raises `BadImage` naming it and what is wrong with it."""
    refuse_empty(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF or palettes are decoded all the same; bombs are refused below
        with decoding(name), Image.open(io.BytesIO(data)) as image:
            refuse_bomb(name, *image.size)
            return to_rgb(image)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises `BadImage` where it cannot be read or has none."""
    with decoding(str(path)):
        data = path.read_bytes()
    refuse_empty(data, str(path))
    return data


def refuse_empty(data: bytes, name: str) -> None:
    """Raises `BadImage` for the bytes of an empty file."""
    if not data:
        raise BadImage(f"{name} is empty (zero bytes); remove it or copy it again")


def check_image(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of an image file that decodes to its end, or `BadImage`. Several times faster than decoding.

    It leaves the process's warning filters alone, so that threads may run it.
    """
    with decoding(name), Image.open(io.BytesIO(data)) as image:
        refuse_bomb(name, *image.size)
        size = image.size
        image.draft("RGB", (1, 1))  # a JPEG is then read at an eighth of its size, but still to its end
        image.load()
        return size


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height when upright, from the file's header alone. Raises `BadImage` where it has none."""
    with decoding(str(path)), Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION, 1) >= QUARTER_TURNS
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever goes wrong while an image is read and decoded, as a `BadImage` that names it."""
    try:
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{name} is not a readable image; remove it or convert it to PNG or JPEG") from error
    except FileNotFoundError as error:
        raise BadImage(f"{name} does not exist; check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadImage(f"{name} cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        # Pillow's decoders raise all of these for truncated or corrupt files.
        raise BadImage(f"{name} is damaged ({error}); remove it or copy it again") from error


def refuse_bomb(name: str, width: int, height: int) -> None:
    """Pillow itself refuses only twice its limit, and warns from the limit on."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _bomb(name)


def _bomb(name: str) -> BadImage:
    return BadImage(
        f"{name} is too large to decode safely (more than {Image.MAX_IMAGE_PIXELS:,} pixels); "
        "make it smaller or remove it"
    )
