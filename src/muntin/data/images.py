"""Any image file to an upright RGB image, or an error that names the file."""

import os
import warnings
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
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise BadImage(f"{path} is empty (zero bytes); remove it or copy it again")
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit; an image that large is refused here too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Odd EXIF or palettes are decoded all the same.
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(
            f"{path} is too large to decode safely (more than {Image.MAX_IMAGE_PIXELS:,} pixels); "
            "make it smaller or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise BadImage(f"{path} is not a readable image; remove it or convert it to PNG or JPEG") from error
    except FileNotFoundError as error:
        raise BadImage(f"{path} does not exist; check the path") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        # Pillow's decoders raise all of these for truncated or corrupt files.
        raise BadImage(f"{path} is damaged ({error}); remove it or copy it again") from error
