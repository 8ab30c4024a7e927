"""Particles side by side: central slices or projections, numbered, on one sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cryofleet.progress import Progress, no_progress
from services.io.drawing import Footer, fitting, printable, with_footer
from services.io.figures import Picture, grey, limits

View = Literal["slice", "projection", "orthogonal"]

_GAP, _WORDS = 4, 16
_VIEWS = {"slice": 1, "projection": 1, "orthogonal": 3}


def particle_pictures(box: NDArray[np.float32], view: View, thickness_voxels: int = 1) -> list[Picture]:
    """The pictures that show a box [z, y, x].

    Args:
        box: the particle.
        view: `slice` through the centre along z; `projection`, the mean along z; `orthogonal`, the three central
            slices xy, xz and yz, the last with z to the right.
        thickness_voxels: that slices are the mean of, an odd number.
    """
    if view == "projection":
        return [box.mean(axis=0, dtype=np.float32)]
    half = thickness_voxels // 2
    z, y, x = (slice(max(0, side // 2 - half), side // 2 + half + 1) for side in box.shape)
    xy = box[z].mean(axis=0, dtype=np.float32)
    if view == "slice":
        return [xy]
    return [xy, box[:, y].mean(axis=1, dtype=np.float32), box[:, :, x].mean(axis=2, dtype=np.float32).T]


def sheet(
    read: Callable[[int], NDArray[np.float32]],
    rows: Sequence[int],
    captions: Sequence[str],
    box_size: int,
    voxel_size_angstrom: float,
    view: View = "slice",
    thickness_voxels: int = 1,
    percentiles: tuple[float, float] = (0.5, 99.5),
    own_limits: bool = False,
    inverted: bool = False,
    tile_pixels: int = 128,
    footer: str = "",
    progress: Progress = no_progress,
) -> Image.Image:
    """The sheet, its tiles in the order of `rows` from the upper left.

    Args:
        read: the box [z, y, x] of a row.
        rows: which boxes are drawn.
        captions: what is written below each.
        box_size: side of the boxes.
        voxel_size_angstrom: for the scale bar.
        view: as `particle_pictures` has it.
        thickness_voxels: as there.
        percentiles: of the values drawn, that are black and white.
        own_limits: whether each box has its own black and white, or all have the same.
        inverted: whether high values are black.
        tile_pixels: side of a picture: boxes are averaged down to it, or enlarged by the largest whole factor.
        footer: the sheet's caption.
        progress: called after each box.
    """
    factor = max(1, tile_pixels // box_size)
    tile = box_size * factor if box_size <= tile_pixels else tile_pixels
    pictures: list[list[Picture]] = [[] for _ in rows]
    # In the order that they are stored in, as neighbours lie in one block.
    for done, place in enumerate(np.argsort(rows, kind="stable"), start=1):
        shown = particle_pictures(read(rows[place]), view, thickness_voxels)
        pictures[place] = [_fitted(picture, tile) for picture in shown]
        progress(0.9 * done / len(rows), "reading the particles", particles=done)
    together = None if own_limits else limits([each for shown in pictures for each in shown], *percentiles)

    wide = _VIEWS[view] * (tile + 1) - 1
    columns = max(1, min(len(rows), round(math.sqrt(len(rows) * (tile + _WORDS + _GAP) / (wide + _GAP)))))
    lines = math.ceil(len(rows) / columns)
    image = Image.new("L", (columns * (wide + _GAP) + _GAP, lines * (tile + _WORDS + _GAP) + _GAP))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for number, (shown, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = _GAP + number % columns * (wide + _GAP)
        top = _GAP + number // columns * (tile + _WORDS + _GAP)
        low, high = together or limits(shown, *percentiles)
        for place, picture in enumerate(shown):
            image.paste(Image.fromarray(grey(picture, low, high, inverted)), (left + place * (tile + 1), top))
        words = fitting(printable(caption), font, wide)
        pen.text((left + 1, top + tile + _WORDS // 2), words, fill="white", font=font, anchor="lm")
    return with_footer(image, voxel_size_angstrom * box_size / tile, Footer(footer))


def memory_bytes(count: int, box_size: int, view: View, tile_pixels: int) -> int:
    """What `sheet` needs at most."""
    # Boxes as they are read; pictures, sorted for the percentiles; the sheet, twice.
    return 8 * box_size**3 + 20 * count * _VIEWS[view] * (tile_pixels + _WORDS + _GAP) ** 2


def _fitted(picture: Picture, tile: int) -> Picture:
    if picture.shape[0] > tile:
        small = Image.fromarray(np.ascontiguousarray(picture)).resize((tile, tile), Image.Resampling.BOX)
        return np.asarray(small, np.float32)
    factor = tile // picture.shape[0]
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
