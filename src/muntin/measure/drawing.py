"""Pictures of what was annotated or found: boxes, masks and label maps over an image.

Lines and letters are made for the picture's size; a small picture is enlarged first, so that they fit.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from muntin.errors import UserError
from muntin.measure.colours import Colour, class_colours, ink

AT_LEAST = 512  # longer side of what is drawn on; a smaller picture is enlarged by a whole number
SHADE = 0.42  # of a mask's colour over the picture
TINT = 0.55  # of a label map's
PAPER: Colour = (255, 255, 255)
TEXT: Colour = (28, 32, 38)
UNKNOWN: Colour = (120, 120, 120)
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf")  # for names beyond Latin


def draw(
    picture: Image.Image,
    boxes: Any = None,
    labels: Any = None,
    scores: Any = None,
    masks: Any = None,
    classes: Sequence[str] = (),
    label_map: Any = None,
    palette: Sequence[Colour] | None = None,
    ignore: int = 255,
) -> Image.Image:
    """The picture with its objects (boxes with class and score, masks with outlines) or its label map and a legend.

    boxes: (n, 4), x1 y1 x2 y2 in the picture's pixels. labels: (n,), indices of `classes`. scores: (n,), 0..1.
    masks: n masks (H, W), not zero inside. label_map: (H, W) of class indices; `ignore` is left as it is and said in
    the legend, which is a strip below the picture. palette: a colour for each class, chosen here by default. Tensors
    and arrays are taken.

    Raises `UserError` where numbers or sizes do not belong together.
    """
    factor = max(1, math.ceil(AT_LEAST / max(picture.size)))
    canvas = picture.convert("RGB").resize((factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC)
    names = list(classes)
    if label_map is not None:
        values = _sized(np.asarray(label_map), picture, "the label map").repeat(factor, 0).repeat(factor, 1)
        count = 1 + int(values[values != ignore].max(initial=0))
        colours = _colours(palette, max(len(names), count))
        canvas = _tinted(canvas, values, colours, ignore)
    if boxes is not None or masks is not None:
        canvas = _with_objects(canvas, picture, factor, (boxes, labels, scores, masks), names, palette)
    if label_map is not None:
        canvas = _with_legend(canvas, values, names, colours, ignore)
    return canvas


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int, titles: Sequence[str] | None = None, side: int | None = None
) -> Image.Image:
    """Pictures in rows on white, each in a cell of one size, with a title above where there are any.

    side: longest side of a picture on the sheet; by default nothing is made smaller.
    """
    if not pictures or columns < 1 or (titles is not None and len(titles) != len(pictures)):
        raise UserError(
            f"{len(pictures)} pictures in {columns} columns with {len(titles or ())} titles: give at least one picture "
            "and one column, and a title for each picture or none"
        )
    shown = [_no_larger(picture.convert("RGB"), side) for picture in pictures]
    wide, high = max(p.width for p in shown), max(p.height for p in shown)
    gap = max(6, round(0.02 * max(wide, high)))
    size = _letters((wide, high))
    head = round(1.7 * size) if titles is not None else 0
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (gap + columns * (wide + gap), gap + rows * (head + high + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(shown):
        left = gap + i % columns * (wide + gap)
        top = gap + i // columns * (head + high + gap)
        sheet.paste(picture, (left + (wide - picture.width) // 2, top + head))
        if titles is not None:
            text, font = _fitting(titles[i], wide, size)
            pen.text((left + wide / 2, top + head / 2), text, TEXT, font, anchor="mm")
    return sheet


def _no_larger(picture: Image.Image, side: int | None) -> Image.Image:
    if side is None or max(picture.size) <= side:
        return picture
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _sized(values: np.ndarray, picture: Image.Image, what: str) -> np.ndarray:
    if values.shape != (picture.height, picture.width):
        raise UserError(
            f"{what} has the shape {values.shape} and its picture {picture.height}x{picture.width}; give both at one "
            "size"
        )
    return values


def _colours(palette: Sequence[Colour] | None, count: int) -> np.ndarray:
    colours = class_colours(count)
    if palette is not None:
        given = [(int(r), int(g), int(b)) for r, g, b in palette[:count]]
        colours[: len(given)] = given
    return np.array(colours, np.uint8).reshape(-1, 3)


# ------------------------------------------------------------------------------------------------------- label maps


def _tinted(canvas: Image.Image, values: np.ndarray, colours: np.ndarray, ignore: int) -> Image.Image:
    known = values != ignore
    colour = Image.fromarray(colours[np.where(known, values, 0)])
    pixels = np.array(Image.blend(canvas, colour, TINT))
    pixels[~known] = np.asarray(canvas)[~known]
    borders = np.zeros(values.shape, bool)
    borders[:, 1:] |= values[:, 1:] != values[:, :-1]
    borders[1:] |= values[1:] != values[:-1]
    pixels[borders] = 0.35 * pixels[borders]
    return Image.fromarray(pixels)


def _with_legend(
    canvas: Image.Image, values: np.ndarray, names: list[str], colours: np.ndarray, ignore: int
) -> Image.Image:
    """The classes that occur, the largest first, with their share of the picture, in a strip below it."""
    found, counts = np.unique(values, return_counts=True)
    entries: list[tuple[str, Colour]] = []
    for k, share in sorted(zip(found.tolist(), counts / values.size, strict=True), key=lambda pair: -pair[1]):
        name = "not annotated" if k == ignore else names[k] if k < len(names) else f"class {k}"
        colour = UNKNOWN if k == ignore else (int(colours[k][0]), int(colours[k][1]), int(colours[k][2]))
        entries.append((f"{name} {_percent(share)}", colour))
    size = _letters(canvas.size)
    gap, line = round(0.6 * size), round(1.6 * size)
    room = canvas.width - 2 * gap
    placed, x, row = [], 0, 0
    for text, colour in entries:
        text, font = _fitting(text, room - line, size)
        wide = line + math.ceil(font.getlength(text))
        if x and x + wide > room:
            x, row = 0, row + 1
        placed.append((gap + x, row, text, font, colour))
        x += wide + 2 * gap
    sheet = Image.new("RGB", (canvas.width, canvas.height + 2 * gap + (row + 1) * line), PAPER)
    sheet.paste(canvas)
    pen = ImageDraw.Draw(sheet)
    for left, row, text, font, colour in placed:
        top = canvas.height + gap + row * line
        pen.rectangle((left, top + 0.3 * size, left + size, top + 1.3 * size), colour, (0, 0, 0))
        pen.text((left + line, top + line / 2), text, TEXT, font, anchor="lm")
    return sheet


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0095 else "<1%"


# ---------------------------------------------------------------------------------------------------------- objects


def _with_objects(
    canvas: Image.Image,
    picture: Image.Image,
    factor: int,
    objects: tuple[Any, Any, Any, Any],
    names: list[str],
    palette: Sequence[Colour] | None,
) -> Image.Image:
    boxes, labels, scores, masks = (None if given is None else np.asarray(given) for given in objects)
    count = len(boxes) if boxes is not None else len(masks)  # type: ignore[arg-type]
    for given, what in ((labels, "labels"), (scores, "scores"), (masks, "masks")):
        if given is not None and len(given) != count:
            raise UserError(f"{count} objects and {len(given)} {what} are given; give one for each object")
    labels = np.zeros(count, int) if labels is None else labels.astype(int)
    colours = _colours(palette, max(len(names), 1 + int(labels.max(initial=0))))
    strokes = [(int(r), int(g), int(b)) for r, g, b in colours[labels]]
    order = list(range(count)) if scores is None else np.argsort(scores, kind="stable").tolist()  # the surest on top
    width = max(2, round(max(canvas.size) / 320))
    if masks is not None:
        pixels = np.array(canvas)
        for i in order:
            _shade(pixels, _sized(masks[i], picture, f"mask {i}"), factor, strokes[i], width)
        canvas = Image.fromarray(pixels)
    if boxes is None:
        return canvas
    pen = ImageDraw.Draw(canvas)
    edges = [[float(v) * factor for v in box] for box in boxes]
    for i in order:
        _frame(pen, edges[i], strokes[i], width, canvas.size)
    if not names and scores is None:
        return canvas
    plates: list[tuple[float, float, float, float]] = []
    for i in reversed(order):
        said = [] if not names else [names[labels[i]] if labels[i] < len(names) else f"class {labels[i]}"]
        said += [] if scores is None else [f"{scores[i]:.2f}"]
        _plate(pen, " ".join(said), edges[i], strokes[i], width, (canvas.size, plates))
    return canvas


def _shade(pixels: np.ndarray, mask: np.ndarray, factor: int, colour: Colour, width: int) -> None:
    """One mask over the picture, in place: translucent, with an outline just inside of its border."""
    rows, columns = np.flatnonzero((mask != 0).any(1)), np.flatnonzero((mask != 0).any(0))
    if not len(rows):
        return
    part = np.zeros((rows[-1] - rows[0] + 3, columns[-1] - columns[0] + 3), np.uint8)  # a pixel outside all around it
    part[1:-1, 1:-1] = 255 * (mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] != 0)
    shape = Image.fromarray(part).resize((factor * part.shape[1], factor * part.shape[0]), Image.Resampling.BILINEAR)
    inside = shape.point(lambda value: 255 * (value > 127))
    near = inside.filter(ImageFilter.BoxBlur(min(width // 2, 10)))  # 255 where all around is inside; up to 21 x 21
    edge = slice(factor, -factor)
    full, inner = np.asarray(inside)[edge, edge] > 0, np.asarray(near)[edge, edge] == 255
    place = pixels[factor * rows[0] :, factor * columns[0] :][: full.shape[0], : full.shape[1]]
    place[full] = np.float32(1 - SHADE) * place[full] + SHADE * np.array(colour, np.float32)
    place[full & ~inner] = colour


def _frame(pen: ImageDraw.ImageDraw, box: list[float], colour: Colour, width: int, size: tuple[int, int]) -> None:
    """A box in its colour between dark hairlines, which part it from any background; inside of the picture."""
    left, top = (max(0, min(round(v), side - 1)) for v, side in zip(box[:2], size, strict=True))
    right, bottom = (max(0, min(round(v) - 1, side - 1)) for v, side in zip(box[2:], size, strict=True))
    right, bottom = max(left, right), max(top, bottom)
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=width + 2)
    pen.rectangle((left, top, right, bottom), outline=colour, width=width)


def _plate(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: list[float],
    colour: Colour,
    width: int,
    around: tuple[tuple[int, int], list[tuple[float, float, float, float]]],
) -> None:
    """The text on its colour at a corner of the box: the first place inside the picture that no other text holds."""
    (across, down), taken = around
    size = _letters((across, down))
    pad = round(0.25 * size)
    text, font = _fitting(text, across - 2 * pad, size)
    wide, high = math.ceil(font.getlength(text)) + 2 * pad, round(1.3 * size)
    left, top, right, bottom = box
    places = [
        (left, top - high),
        (left, bottom),
        (right - wide, top - high),
        (right - wide, bottom),
        (left, top),
        (right - wide, bottom - high),
        (right, top),
        (left - wide, top),
        *((left, top + step * high) for step in range(1, 8)),
    ]
    inside = [(min(max(x, 0), across - wide), min(max(y, 0), down - high)) for x, y in places]
    free = [
        i
        for i, (x, y) in enumerate(inside)
        if all(x + wide <= a or x >= c or y + high <= b or y >= d for a, b, c, d in taken)
    ]
    whole = [i for i in free if inside[i] == places[i]]
    x, y = inside[(whole or free or [0])[0]]
    taken.append((x, y, x + wide, y + high))
    pen.rectangle((x, y, x + wide - 1, y + high - 1), colour)
    pen.text((x + wide / 2, y + high / 2), text, ink(colour), font, anchor="mm")


# ---------------------------------------------------------------------------------------------------------- letters


def _letters(size: tuple[int, int]) -> int:
    """Height of letters for a picture of this size, in pixels."""
    return max(13, round(math.sqrt(size[0] * size[1]) / 36))


@lru_cache(64)
def _font(size: int, beyond_latin: bool) -> Any:
    if beyond_latin:
        for name in FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _fitting(text: str, room: int, size: int) -> tuple[str, Any]:
    """The text and its font, shortened with an ellipsis where it is wider than the room."""
    text = " ".join(text.split())
    font = _font(size, any(ord(letter) > 0x17F for letter in text))
    if font.getlength(text) <= room:
        return text, font
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…", font
