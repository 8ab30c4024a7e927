"""A slice as a picture of its own: grey values, labels coloured over them, circles, and a footer with the scale."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cryofleet.numerics.label_colours import overlay, rgb
from cryofleet.progress import Progress, no_progress
from services.io.figures import Circle, Picture, grey, scale_bar_nm

#: Pictures whose longer side is shorter are enlarged by a whole factor.
LEAST_SIDE = 512
_LONGEST_NAME = 60
_CIRCLES_AT_ONCE = 256
_LEAST_FOOTER_LETTERS = 18
"""Where fewer have room beside each other, caption and scale stand below each other."""


@dataclass(frozen=True)
class GreyLevels:
    """The values that are drawn black and white; the other way round where inverted."""

    black: float
    white: float
    inverted: bool = False


@dataclass(frozen=True)
class Footer:
    """What is written under a picture."""

    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """Colours and their names."""


def pixels_per_voxel(rows: int, columns: int, longest_side: int) -> float:
    """How large a picture is drawn: a whole number where it is enlarged, 1 or less where not."""
    longest = max(rows, columns)
    if longest > longest_side:
        return longest_side / longest
    return float(max(1, min(LEAST_SIDE, longest_side) // longest))


def draw(
    values: Picture,
    levels: GreyLevels,
    pixel_size_angstrom: float,
    circles: Sequence[Circle] = (),
    labels: NDArray[np.uint16] | None = None,
    footer: Footer | None = None,
    longest_side: int = 2048,
    progress: Progress = no_progress,
) -> Image.Image:
    """A picture [row, column], its first row on top; colour only where something coloured is on it.

    Args:
        values: the slice.
        levels: its black and white.
        pixel_size_angstrom: of a value of the slice, for the scale bar.
        circles: marks, in pixels of the slice.
        labels: of the slice's pixels, coloured over them; 0 is none.
        footer: what stands below, beside a scale bar; None for the picture alone.
        longest_side: in pixels, without the footer. A larger slice is averaged over areas.
        progress: called after some of the circles.
    """
    height, width = values.shape
    scale = pixels_per_voxel(height, width, longest_side)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    shown = grey(_scaled(values, rows, columns), levels.black, levels.white, levels.inverted)
    if labels is not None:
        shown = overlay(shown, labels[np.ix_(_nearest(labels.shape[0], rows), _nearest(labels.shape[1], columns))])
    if circles:
        if shown.ndim == 2:
            shown = np.repeat(shown[..., None], 3, axis=2)
        thickness = max(1.6, max(rows, columns) / 600)
        for number, circle in enumerate(circles):
            if number % _CIRCLES_AT_ONCE == 0:
                progress(number / len(circles), "drawing")
            # Pixel i's centre lies at i, in either picture.
            x, y = (circle.x + 0.5) * scale - 0.5, (circle.y + 0.5) * scale - 0.5
            _draw_ring(shown, x, y, circle.radius * scale, thickness, circle.colour, circle.opacity)
    image = Image.fromarray(shown)
    return image if footer is None else with_footer(image, pixel_size_angstrom / scale, footer)


def with_footer(image: Image.Image, pixel_size_angstrom: float, footer: Footer) -> Image.Image:
    """The picture with its footer below: the caption, a scale bar of a round length, and the legend.

    Below a narrow picture each has a line of its own. The sheet is as wide as the picture, unless the scale's words are
    wider.
    """
    size = round(min(max(max(image.size) / 45, 13), 40))
    font = ImageFont.load_default(size)
    height, gap = round(1.7 * size), round(0.6 * size)
    bar_nm = scale_bar_nm(image.width * pixel_size_angstrom / 10)
    bar = max(1, round(bar_nm * 10 / pixel_size_angstrom))
    words = f"{bar_nm:g} nm"
    scale_width = math.ceil(font.getlength(words)) + bar + 3 * gap
    width = max(image.width, scale_width)
    narrow = width < _LEAST_FOOTER_LETTERS * size
    first = 2 if narrow and footer.caption else 1
    entries = [(colour, fitting(printable(name), font, width - 2 * gap - size)) for colour, name in footer.legend]
    places, lines = _legend_places([font.getlength(name) for _, name in entries], size, width - 2 * gap)
    mode = "RGB" if entries or image.mode == "RGB" else "L"
    sheet = Image.new(mode, (width, image.height + height * (first + lines)))
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    middle = image.height + height // 2
    left = width - gap - bar
    pen.rectangle((left, middle - size // 8, left + bar - 1, middle + size // 8), fill="white")
    pen.text((left - gap, middle), words, fill="white", font=font, anchor="rm")
    room = width - 2 * gap if narrow else left - 3 * gap - font.getlength(words)
    caption, line = fitting(printable(footer.caption), font, room), middle + (height if narrow else 0)
    pen.text((gap, line), caption, fill="white", font=font, anchor="lm")
    for (colour, name), (x, row) in zip(entries, places, strict=True):
        y = middle + height * (first + row)
        pen.rectangle((gap + x, y - size // 3, gap + x + 2 * (size // 3), y + size // 3), fill=colour)
        pen.text((gap + x + size, y), name, fill="white", font=font, anchor="lm")
    return sheet


def memory_bytes(shape: tuple[int, int], longest_side: int) -> int:
    """What `draw` needs for a slice of these rows and columns."""
    scale = pixels_per_voxel(*shape, longest_side)
    # Colours in float32, over grey, mixed, packed; a circle as large as the picture is mixed in float64.
    return round(120 * scale**2 * shape[0] * shape[1]) + 8 * shape[0] * shape[1]


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return packed.getvalue()


def printable(text: str) -> str:
    """Text as it can be written on one line: without control characters, and not too long."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """As much of the text as has room."""
    while text and font.getlength(text) > room:
        text = text[:-1]
    return text


def _legend_places(lengths: Sequence[float], size: int, width: float) -> tuple[list[tuple[int, int]], int]:
    """Where each entry begins and on which line, and how many lines there are."""
    places, x, line = [], 0.0, 0
    for length in lengths:
        needed = size + length + 1.2 * size
        if x and x + needed > width:
            x, line = 0.0, line + 1
        places.append((round(x), line))
        x += needed
    return places, line + 1 if places else 0


def _scaled(values: Picture, rows: int, columns: int) -> Picture:
    """Averaged over areas, or each value repeated."""
    if rows <= values.shape[0] and columns <= values.shape[1]:
        if (rows, columns) == values.shape:
            return values
        small = Image.fromarray(np.ascontiguousarray(values, np.float32)).resize((columns, rows), Image.Resampling.BOX)
        return np.asarray(small, np.float32)
    return values.repeat(rows // values.shape[0], axis=0).repeat(columns // values.shape[1], axis=1)


def _nearest(count: int, pixels: int) -> NDArray[np.int64]:
    """Which of `count` values lies under the middle of each of `pixels`."""
    return ((np.arange(pixels) + 0.5) * count / pixels).astype(np.int64)


def _draw_ring(
    pixels: NDArray[np.uint8], x: float, y: float, radius: float, width: float, colour: str, opacity: float
) -> None:
    """A smooth ring with a dark rim, so that it is seen on black and on white."""
    reach = radius + width + 2
    rows = slice(max(0, math.floor(y - reach)), max(0, min(pixels.shape[0], math.ceil(y + reach) + 1)))
    columns = slice(max(0, math.floor(x - reach)), max(0, min(pixels.shape[1], math.ceil(x + reach) + 1)))
    patch = pixels[rows, columns]
    if not patch.size:
        return
    down, across = np.ogrid[rows, columns]
    off = np.abs(np.hypot(down - y, across - x) - radius)
    mixed = patch.astype(np.float64)
    for thickness, paint, strength in ((width + 2, (0, 0, 0), 0.5 * opacity), (width, rgb(colour), opacity)):
        cover = (np.clip((thickness + 1) / 2 - off, 0, 1) * strength)[..., None]
        mixed = (1 - cover) * mixed + cover * np.array(paint)
    patch[...] = np.rint(mixed)
