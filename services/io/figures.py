"""Pictures of a report as inline SVG: greyscale slices with marks on them, and line charts.

The same input gives the same text. Colours of lines and words are the page's CSS variables, so that they follow its
light or dark scheme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryofleet.numerics.label_colours import overlay

Picture = NDArray[np.float32]

_LARGEST_SIDE = 800


@dataclass(frozen=True)
class Circle:
    """A mark, in pixels of the picture that it lies on; pixel i's centre is at i."""

    x: float
    y: float
    radius: float
    colour: str
    opacity: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Dots:
    """Points of one colour, the number of one of the page's eight."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int


def limits(pictures: Sequence[Picture], black: float = 0.5, white: float = 99.5) -> tuple[float, float]:
    """Grey values of black and white: the given percentiles of all pictures together."""
    values = np.concatenate([picture.ravel() for picture in pictures])
    low, high = (float(limit) for limit in np.percentile(values, (black, white)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def grey(picture: Picture, low: float, high: float, inverted: bool = False) -> NDArray[np.uint8]:
    """8-bit grey values, `low` black and `high` white, or the other way round."""
    scaled = np.clip((picture - low) / (high - low), 0, 1)
    levels: NDArray[np.uint8] = np.rint(255 * (1 - scaled if inverted else scaled)).astype(np.uint8)
    return levels


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """A picture as a PNG in a data URI, made smaller where a side has over 800 pixels."""
    image = Image.fromarray(pixels)
    scale = _LARGEST_SIDE / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    packed = io.BytesIO()
    image.save(packed, "PNG", compress_level=9)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def picture(pixels: NDArray[np.uint8], alt: str) -> str:
    """A plain picture that fills its box."""
    return f'<img src="{data_uri(pixels)}" alt="{escape(alt)}">'


def embedded_png(data: bytes, alt: str) -> str:
    """A picture that is a PNG already, as it is."""
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}" alt="{escape(alt)}">'


def scale_bar_nm(width_nm: float) -> float:
    """A length of 1, 2 or 5 times a power of ten, at most a quarter of the width."""
    power = 10.0 ** math.floor(math.log10(width_nm / 4))
    return max(step * power for step in (1, 2, 5) if step * power <= width_nm / 4)


def orthogonal_views(
    xy: Picture,
    xz: Picture,
    yz: Picture,
    centre: tuple[int, int, int],
    voxel_size_angstrom: float,
    circles: tuple[Sequence[Circle], Sequence[Circle], Sequence[Circle]],
    inverted: bool = False,
    labels: tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16]] | None = None,
) -> str:
    """Three central slices in one drawing, side by side as their axes meet: xy, yz on its right, xz below it.

    Args:
        xy: [y, x].
        xz: [z, x].
        yz: [z, y]; drawn with z to the right.
        centre: (x, y, z) that the slices go through, shown by thin lines.
        voxel_size_angstrom: for the scale bar.
        circles: marks of the three pictures, each in (column, row) of the picture as drawn.
        inverted: whether high values are black.
        labels: of the three pictures' pixels, coloured over them.
    """
    height, width = xy.shape
    depth = xz.shape[0]
    gap = max(2.0, 0.012 * max(width, height))
    low, high = limits((xy, xz, yz))
    over = (None, None, None) if labels is None else (labels[0], labels[1], labels[2].T)
    views = (
        ("xy", xy, 0.0, 0.0, (centre[0], centre[1]), circles[0]),
        ("xz", xz, 0.0, height + gap, (centre[0], centre[2]), circles[1]),
        ("yz", yz.T, width + gap, 0.0, (centre[2], centre[1]), circles[2]),
    )
    whole_width, whole_height = width + gap + depth, height + gap + depth
    # One CSS pixel of a drawing shown 1000 pixels wide.
    unit = whole_width / 1000
    parts = []
    for (name, values, left, top, (column, row), marks), labelled in zip(views, over, strict=True):
        rows, columns = values.shape
        pixels = grey(values, low, high, inverted)
        pixels = pixels if labelled is None else overlay(pixels, labelled)
        # A nested svg cuts off what reaches over the picture's edge.
        parts.append(
            f'<svg x="{left:.2f}" y="{top:.2f}" width="{columns}" height="{rows}" viewBox="-0.5 -0.5 {columns} {rows}">'
            f'<image x="-0.5" y="-0.5" width="{columns}" height="{rows}" preserveAspectRatio="none" '
            f'href="{data_uri(pixels)}"/>'
            f'<g class="cross"><path d="M{column} -0.5V{rows}M-0.5 {row}H{columns}"/></g>'
        )
        parts += [
            f'<circle cx="{mark.x:.2f}" cy="{mark.y:.2f}" r="{mark.radius:.2f}" stroke="{mark.colour}" '
            f'opacity="{mark.opacity:.2f}"><title>{escape(mark.label)}</title></circle>'
            for mark in marks
        ]
        parts.append(
            f'<text class="view" x="{8 * unit:.2f}" y="{24 * unit:.2f}" font-size="{18 * unit:.2f}">{name}</text></svg>'
        )
    bar_nm = scale_bar_nm(width * voxel_size_angstrom / 10)
    bar = bar_nm * 10 / voxel_size_angstrom
    x, y = width - bar - 14 * unit, height - 16 * unit
    parts.append(
        f'<rect class="bar" x="{x:.2f}" y="{y:.2f}" width="{bar:.2f}" height="{5 * unit:.2f}"/>'
        f'<text class="view" x="{x + bar / 2:.2f}" y="{y - 7 * unit:.2f}" text-anchor="middle" '
        f'font-size="{18 * unit:.2f}">{bar_nm:g} nm</text>'
    )
    words = "central slices of the tomogram" + ("" if labels is None else ", its labels coloured")
    return (
        f'<svg class="views" viewBox="0 0 {whole_width:.2f} {whole_height:.2f}" role="img" '
        f'aria-label="{words}" style="--unit:{unit:.4f}px">{"".join(parts)}</svg>'
    )


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
    markers: Sequence[tuple[float, str]] = (),
    logarithmic: bool = False,
    width: int = 520,
    height: int = 300,
) -> str:
    """A line chart.

    Args:
        lines: the curves, at most eight.
        x_label: what x is.
        y_label: what y is.
        x_ticks: places and words of the x axis; round numbers where left out.
        y_range: limits of the y axis; those of the data where left out.
        levels: horizontal dashed lines and their words.
        markers: vertical dashed lines and their words.
        logarithmic: of the y axis; all y must be positive.
        width: of the drawing, in CSS pixels.
        height: of the drawing, in CSS pixels.
    """
    left, right, top, bottom = 58, 16, 14 if len(lines) < 2 else 36, 46
    transform: Callable[[float], float] = math.log10 if logarithmic else float
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = (
        (transform(y) for y in y_range) if y_range else _widened(transform(min(ys)), transform(max(ys)), 0.05)
    )

    def at_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (transform(value) - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for value, word in y_ticks(y_low, y_high, logarithmic):
        y = at_y(value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{word}</text>')
    for value, word in x_ticks if x_ticks is not None else round_ticks(x_low, x_high):
        if x_low <= value <= x_high:
            x = at_x(value)
            parts.append(f'<path class="axis" d="M{x:.1f} {height - bottom}v5"/>')
            parts.append(f'<text x="{x:.1f}" y="{height - bottom + 19}" text-anchor="middle">{escape(word)}</text>')
    parts.append(f'<path class="axis" d="M{left} {height - bottom}H{width - right}"/>')
    for value, word in levels:
        y = at_y(value)
        parts.append(f'<path class="level" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text x="{width - right}" y="{y - 5:.1f}" text-anchor="end">{escape(word)}</text>')
    for i, line in enumerate(lines):
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="line c{i % 8}" points="{points}"><title>{escape(line.name)}</title></polyline>')
    for value, word in markers:
        x = at_x(value)
        over = x > width - right - 80
        parts.append(f'<path class="level" d="M{x:.1f} {top}V{height - bottom}"/>')
        parts.append(
            f'<text class="strong" x="{x + (-6 if over else 6):.1f}" y="{top + 12}" '
            f'text-anchor="{"end" if over else "start"}">{escape(word)}</text>'
        )
    if len(lines) > 1:
        x = float(left)
        for i, line in enumerate(lines):
            parts.append(f'<path class="line c{i % 8}" d="M{x:.1f} 14h18"/>')
            parts.append(f'<text x="{x + 23:.1f}" y="18">{escape(line.name)}</text>')
            x += 40 + 7.0 * len(line.name)
    across, down = (left + width - right) / 2, (top + height - bottom) / 2
    for place, word in (
        (f"translate({across:.1f} {height - 6})", x_label),
        (f"translate(13 {down:.1f}) rotate(-90)", y_label),
    ):
        parts.append(f'<text class="label" transform="{place}" text-anchor="middle">{escape(word)}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">{"".join(parts)}</svg>'
    )


def scatter(
    groups: Sequence[Dots],
    x_label: str,
    y_label: str,
    *,
    marks: Sequence[tuple[float, float, str]] = (),
    width: int = 760,
    height: int = 520,
) -> str:
    """Dots in a plane whose axes have the same scale.

    Args:
        groups: the dots, the later over the earlier; those that have any are named above them.
        x_label: what x is.
        y_label: what y is.
        marks: words (x, y, word) over the dots.
        width: of the drawing, in CSS pixels.
        height: of the drawing, in CSS pixels.
    """
    left, right, top, bottom = 34, 12, 40, 34
    groups = [group for group in groups if len(group.x)]
    xs = [x for group in groups for x in group.x]
    ys = [y for group in groups for y in group.y]
    x_low, x_high = _widened(min(xs), max(xs), 0.03)
    y_low, y_high = _widened(min(ys), max(ys), 0.03)
    scale = min((width - left - right) / (x_high - x_low), (height - top - bottom) / (y_high - y_low))
    x_from = left + ((width - left - right) - scale * (x_high - x_low)) / 2
    y_from = top + ((height - top - bottom) + scale * (y_high - y_low)) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return x_from + (x - x_low) * scale, y_from - (y - y_low) * scale

    parts = [f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>']
    key = float(left)
    for group in groups:
        places = (at(x, y) for x, y in zip(group.x, group.y, strict=True))
        # A line of no length with round ends is a dot, and the shortest way to write one.
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        parts.append(f'<path class="dots c{group.colour}" d="{path}"><title>{escape(group.name)}</title></path>')
        parts.append(f'<path class="dots key c{group.colour}" d="M{key + 5:.1f} 14h0"/>')
        parts.append(f'<text x="{key + 15:.1f}" y="18">{escape(group.name)}</text>')
        key += 32 + 6.5 * len(group.name)
    for mark_x, mark_y, word in marks:
        x, y = at(mark_x, mark_y)
        parts.append(f'<text class="mark" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(word)}</text>')
    across, down = (left + width - right) / 2, (top + height - bottom) / 2
    for place, word in (
        (f"translate({across:.1f} {height - 10})", x_label),
        (f"translate(20 {down:.1f}) rotate(-90)", y_label),
    ):
        parts.append(f'<text class="label" transform="{place}" text-anchor="middle">{escape(word)}</text>')
    names = ", ".join(f"{group.name}: {len(group.x)}" for group in groups)
    return (
        f'<svg class="chart plane" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}; dots of {escape(names)}">{"".join(parts)}</svg>'
    )


def round_ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """About so many round numbers between two limits, as places and words."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:.6g}") for i in range(first, last + 1)]


def y_ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """Ticks between two limits of an axis; of a logarithmic one the limits are the logarithms."""
    if not logarithmic:
        return round_ticks(low, high)
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in ((1,) if high - low > 3 else (1, 2, 5))
    ]
    return [(tick, f"{tick:g}") for tick in ticks if low <= math.log10(tick) <= high]


def resolution_ticks(highest_frequency: float) -> list[tuple[float, str]]:
    """Places (1/Å) and words (Å) of an axis of spatial frequency, far enough apart to be read."""
    ticks: list[tuple[float, str]] = []
    for resolution in (200, 100, 60, 40, 30, 25, 20, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.5, 1):
        frequency = 1 / resolution
        if frequency <= highest_frequency and (not ticks or frequency - ticks[-1][0] >= 0.08 * highest_frequency):
            ticks.append((frequency, f"1/{resolution:g}"))
    return ticks


def _widened(low: float, high: float, share: float = 0.0) -> tuple[float, float]:
    if high <= low:
        return low - 0.5, low + 0.5
    return low - share * (high - low), high + share * (high - low)
