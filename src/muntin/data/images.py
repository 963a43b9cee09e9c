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
    return _decoded(path, Path(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode a file's content to upright RGB. Raises `BadImage` with this name and what is wrong with it."""
    if not content:
        raise BadImage(f"{name} is empty (zero bytes); write it again")
    return _decoded(io.BytesIO(content), name)


def _decoded(file: str | os.PathLike[str] | io.BytesIO, name: Path | str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF or palettes are decoded all the same; bombs are refused below
        with _reading(name), Image.open(file) as image:
            _refuse_bomb(name, image)
            return to_rgb(image)


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of a file that decodes to its end, or `BadImage`. Several times faster than decoding.

    It leaves the process's warning filters alone, so that threads may run it.
    """
    with _reading(path), Image.open(path) as image:
        _refuse_bomb(path, image)
        size = image.size
        image.draft("RGB", (1, 1))  # a JPEG is then read at an eighth of its size, but still to its end
        image.load()
        return size


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong while decoding, as a `BadImage`; a string is the name of what is no file of its own."""
    try:
        if isinstance(path, Path) and path.stat().st_size == 0:
            raise BadImage(f"{path} is empty (zero bytes); remove it or copy it again")
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(path) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{path} is not a readable image; remove it or convert it to PNG or JPEG") from error
    except FileNotFoundError as error:
        raise BadImage(f"{path} does not exist; check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadImage(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        # Pillow's decoders raise all of these for truncated or corrupt files.
        raise BadImage(f"{path} is damaged ({error}); remove it or copy it again") from error


def _refuse_bomb(path: Path | str, image: Image.Image) -> None:
    """Pillow itself refuses only twice its limit, and warns from the limit on."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _bomb(path)


def _bomb(path: Path | str) -> BadImage:
    return BadImage(
        f"{path} is too large to decode safely (more than {Image.MAX_IMAGE_PIXELS:,} pixels); "
        "make it smaller or remove it"
    )
