"""The pictures of docs/: how each family divides an image. Drawn from the library's own windows and decay."""

import math
from collections.abc import Callable, Iterable
from html import escape

import torch

from muntin.layers.manhattan import log_gamma
from muntin.layers.window import Grid, window_masks, window_tokens

CELL, GAP, TOP = 11, 34, 46
INK, FAINT, QUERY, SEEN, LINE = "#24292f", "#eef1f4", "#b42318", "#f4b183", "#57606a"
LINE_HEIGHT = 15

Colour = Callable[[int, int], str]


def _text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def _picture(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'font-family="system-ui, sans-serif" fill="{INK}">\n<title>{escape(title)}</title>\n'
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _cells(left: float, side: int, colour: Colour) -> str:
    """side x side tokens, the whole 14 cells wide whatever the side."""
    cell = 14 * CELL / side
    return "".join(
        f'<rect x="{left + x * cell:.2f}" y="{TOP + y * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
        f'fill="{colour(y, x)}" stroke="#ffffff" stroke-width="0.6"/>'
        for y in range(side)
        for x in range(side)
    )


def _borders(left: float, grid: Grid) -> str:
    """Lines between the windows of a partition."""
    unit, parts = 14 * CELL / grid.height, []
    for axis in (0, 1):
        window, shift = grid.window[axis], grid.shift[axis]
        for place in {0, grid.height, *range(shift, grid.height, window)}:
            a, b = place * unit, grid.height * unit
            ends = (a, 0, a, b) if axis else (0, a, b, a)
            parts.append(
                f'<path d="M{left + ends[0]:.1f} {TOP + ends[1]:.1f}L{left + ends[2]:.1f} {TOP + ends[3]:.1f}"/>'
            )
    return f'<g stroke="{LINE}" stroke-width="1.8" fill="none">{"".join(parts)}</g>'


def _seen(grid: Grid, query: tuple[int, int]) -> set[int]:
    """Raster tokens that one attends to: those of its window that no mask hides."""
    tokens, masks = window_tokens(grid)[0], None
    if any(grid.shift):
        masks = window_masks(grid, torch.device("cpu"))
    window, place = (tokens == query[0] * grid.width + query[1]).nonzero()[0].tolist()
    shown = tokens[window] if masks is None else tokens[window][masks[window, place] == 0]
    return set(shown.tolist())


def _panels(titles: list[tuple[str, str]], draw: list[Callable[[float], str]], title: str) -> str:
    width = 14 * CELL
    parts = []
    for number, ((first, second), panel) in enumerate(zip(titles, draw, strict=True)):
        left = GAP / 2 + number * (width + GAP)
        parts += [_text(left, 20, first, weight="600"), _text(left, 36, second, 11), panel(left)]
    return _picture(len(titles) * (width + GAP), TOP + width + 16, title, parts)


def swin() -> str:
    """Windows of Swin, shifted ones, and Swin-Free's, with what one token sees."""

    def panel(side: int, window: int, shift: int, query: tuple[int, int]) -> Callable[[float], str]:
        grid = Grid(side, side, (window, window), (shift, shift))
        seen, own = _seen(grid, query), query[0] * side + query[1]

        def colour(y: int, x: int) -> str:
            return QUERY if y * side + x == own else SEEN if y * side + x in seen else FAINT

        return lambda left: _cells(left, side, colour) + _borders(left, grid)

    titles = [
        ("Swin, even blocks", "14 x 14 map, windows of 7"),
        ("Swin, odd blocks", "the partition shifted by 3"),
        ("Swin-Free, stage 2", "28 x 28 map, windows of 14"),
        ("Swin-Free, stage 3", "14 x 14 map, one window"),
    ]
    draw = [panel(14, 7, 0, (5, 5)), panel(14, 7, 3, (5, 5)), panel(28, 14, 0, (10, 10)), panel(14, 14, 0, (5, 5))]
    return _panels(titles, draw, "What one token (red) attends to (orange)")


def rmt() -> str:
    """The decay of one token's attention, whole and decomposed."""
    gammas = log_gamma(4, 2, 4, torch.float64)

    def panel(head: int, rows: bool, columns: bool) -> Callable[[float], str]:
        def colour(y: int, x: int) -> str:
            dy, dx = abs(y - 5), abs(x - 5)
            if (dy and not rows) or (dx and not columns):
                return FAINT
            if dy == dx == 0:
                return QUERY
            weight = math.exp(gammas[head].item() * (dy + dx))
            return "#" + "".join(f"{round(255 - weight * (255 - c)):02x}" for c in (0xE6, 0x77, 0x22))

        return lambda left: _cells(left, 14, colour)

    first, last = (math.exp(gammas[head].item()) for head in (0, 3))
    titles = [
        ("Whole, first head", f"weights {first:.3g} ^ (|dy| + |dx|)"),
        ("Whole, last head of 4", f"weights {last:.3g} ^ (|dy| + |dx|)"),
        ("Decomposed: along rows,", f"weights {first:.3g} ^ |dx|"),
        ("then along columns", f"weights {first:.3g} ^ |dy|, on that"),
    ]
    draw = [panel(0, True, True), panel(3, True, True), panel(0, False, True), panel(0, True, False)]
    return _panels(titles, draw, "How attention of one token (red) decays with Manhattan distance")


def _box(x: float, y: float, words: str, width: float = 92, fill: str = FAINT, height: float = 26) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{LINE}"/>'
        + _text(x + width / 2, y + height / 2 + 4, words, 11, "middle")
    )


def _arrow(x0: float, y0: float, x1: float, y1: float, bend: bool = False) -> str:
    path = f"M{x0:g} {y0:g}" + (f"V{(y0 + y1) / 2:g}H{x1:g}V{y1:g}" if bend else f"L{x1:g} {y1:g}")
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#tip)"/>'


_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
)


def _row(left: float, top: float, words: list[str], widths: list[float], marked: Iterable[str]) -> str:
    parts, x = [], left
    for word, width in zip(words, widths, strict=True):
        parts.append(_box(x, top, word, width, SEEN if word in marked else FAINT))
        if x > left:
            parts.append(_arrow(x - 16, top + 13, x - 2, top + 13))
        x += width + 18
    return "".join(parts)


def efficientvit() -> str:
    """The sandwich, and the cascade of heads inside its attention."""
    block = ["DWConv 3x3", "FFN", "attention", "DWConv 3x3", "FFN"]
    parts = [
        _TIP,
        _text(17, 24, "A block: one attention between feed-forward layers; each is x + f(x)", weight="600"),
    ]
    parts.append(_row(17, 38, block, [92, 60, 92, 92, 60], {"attention"}))
    parts.append(
        _text(17, 96, "Its attention: a head sees its own channels, and what the one before gave", weight="600")
    )
    for head in range(3):
        x = 17 + head * 190
        parts.append(_box(x, 110, f"channels {head + 1} of h", 128))
        parts.append(_arrow(x + 64, 136, x + 64, 156))
        parts.append(_box(x, 158, "q, k, v; DWConv on q", 128))
        parts.append(_arrow(x + 64, 184, x + 64, 204))
        parts.append(_box(x, 206, f"attention {head + 1}", 128, SEEN))
        parts.append(_arrow(x + 64, 232, x + 64, 256))
        if head < 2:
            parts.append(
                f'<path d="M{x + 128} 219H{x + 158}V147H{x + 246}" fill="none" stroke="{QUERY}" stroke-width="1.6" '
                'marker-end="url(#tip)"/>'
            )
            parts.append(_text(x + 162, 200, "+", 14))
    parts.append(_box(17, 258, "concatenated, ReLU, 1x1 convolution", 508))
    return _picture(545, 300, "EfficientViT's block and its cascaded group attention", parts)


def swinv2() -> str:
    """Where the norm stands, and the coordinates that the position bias is computed from."""
    parts = [_TIP, _text(17, 24, "Swin: the norm first", weight="600")]
    parts.append(_row(17, 36, ["LayerNorm", "attention", "+ x"], [80, 80, 40], ()))
    parts.append(_text(17, 92, "SwinV2: the norm on what is added", weight="600"))
    parts.append(_row(17, 104, ["attention", "LayerNorm", "+ x"], [80, 80, 40], {"LayerNorm"}))
    for number, line in enumerate(
        (
            "Attention is cosine similarity times a learned",
            "scale of each head. The bias is not a table: a",
            "small network computes it from the offset on a",
            "logarithmic scale, so it serves larger windows.",
        )
    ):
        parts.append(_text(17, 158 + LINE_HEIGHT * number, line, 11))
    left, top, width, height = 330.0, 40.0, 200.0, 150.0

    def place(offset: float, value: float) -> str:
        return f"{left + width * (offset + 15) / 30:.1f} {top + height * (1.4 - value) / 2.8:.1f}"

    def logarithmic(offset: float) -> float:
        scaled = 8 * offset / 7  # a window of 8 spans -7 to 7; a larger one goes on
        return math.copysign(math.log2(1 + abs(scaled)) / 3, offset)

    steps = [i / 4 for i in range(-60, 61)]
    curve = "M" + "L".join(place(x, logarithmic(x)) for x in steps)
    straight = "M" + "L".join((place(-9.8, -1.4), place(9.8, 1.4)))
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="{FAINT}"/>')
    for offset in (-7, 7):
        parts.append(f'<path d="M{place(offset, 1.4)}L{place(offset, -1.4)}" stroke="#ffffff" stroke-width="1.5"/>')
    parts.append(f'<path d="{straight}" stroke="{LINE}" fill="none" stroke-dasharray="4 4"/>')
    parts.append(f'<path d="{curve}" stroke="{QUERY}" fill="none" stroke-width="2"/>')
    parts.append(_text(left, 24, "Coordinate that the bias sees", weight="600"))
    for offset in (-15, -7, 0, 7, 15):
        parts.append(_text(left + width * (offset + 15) / 30, top + height + 15, str(offset), 10, "middle"))
    parts.append(_text(left + width / 2, top + height + 30, "offset in tokens; dashed: linear", 10, "middle"))
    return _picture(555, 232, "SwinV2's block and its log-spaced coordinates", parts)


def pictures() -> dict[str, str]:
    """Name of each picture -> SVG."""
    return {"swin": swin(), "swinv2": swinv2(), "efficientvit": efficientvit(), "rmt": rmt()}
