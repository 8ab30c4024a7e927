"""Volumes and segmentations put back into the tomogram, each at its particle's place.

As in figures 5, 7 and 11 of Zeng et al. 2018 (J. Struct. Biol. 202:150-160), where decoded or segmented subvolumes of
chosen clusters annotate the tomogram that they were cut from.

Volumes of different classes have different scales: those of decoded boxes are standard deviations, those of averages
whatever they were made in. So each is measured from its median, which is the background of a box that is mostly empty,
to its brightest voxels, as where segmentations are learnt from decoded boxes. What is placed is the share of that way.
Where several volumes overlap the largest share counts and not their sum: subtomograms of dense picks overlap, and a
structure that lies in five boxes is there once.

The map is made in slabs along z, so that memory does not grow with the tomogram.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import overlay
from cryofleet.progress import Progress, no_progress
from services.learning.weak_labels import BRIGHTEST

ScalarT = TypeVar("ScalarT", np.float32, np.uint16)
Array = NDArray[np.float32]
Shape = tuple[int, int, int]

#: Labels and density of a slab take about so much.
SLAB_BYTES = 32 << 20
#: The picture's sections at most, and the longest side of each in pixels.
SECTIONS, SECTION_PIXELS = 4, 640
MAX_LABEL = 65535


@dataclass(frozen=True)
class Solid:
    """A volume to be placed.

    shares: `[z, y, x]`, 0 its median and 1 its brightest voxels. scale: its voxel's side in voxels of the tomogram.
    """

    shares: Array
    scale: float


@dataclass(frozen=True)
class Slab:
    """Sections `first` on of the map: labels `[z, y, x]`, and the density where volumes are placed."""

    first: int
    labels: NDArray[np.uint16]
    density: Array | None = None


def solid(volume: Array, scale: float) -> Solid:
    """A volume `[z, y, x]`, protein positive, as it is placed; one without contrast is empty.

    One of finer voxels than the tomogram's is smoothed first, to what those can hold.
    """
    if scale < 1:
        volume = scipy.ndimage.gaussian_filter(volume, 0.5 * math.sqrt(1 / scale**2 - 1), output=np.float32)
    median, bright = (float(limit) for limit in np.quantile(volume, (0.5, BRIGHTEST)))
    if bright <= median:
        # A structure of fewer voxels.
        bright = float(volume.max())
    if bright <= median:
        return Solid(np.zeros(volume.shape, np.float32), scale)
    return Solid(((volume - np.float32(median)) / np.float32(bright - median)).astype(np.float32), scale)


def slab_sections(shape: Shape) -> int:
    """Sections that are made at a time."""
    return max(1, min(shape[0], SLAB_BYTES // (6 * shape[1] * shape[2])))


def place_volumes(
    solids: Sequence[Solid],
    classes: NDArray[np.int64],
    positions: NDArray[np.float64],
    rotations: Rotation | None,
    shape: Shape,
    level: float,
    progress: Progress = no_progress,
) -> Iterator[Slab]:
    """The map of volumes at their particles, slab by slab from z = 0.

    A label is the class plus 1 where the largest share is at or above `level`; the density is that share, and 0 where
    it would be less. Of equal shares that of the first particle counts.

    Args:
        solids: one of each class.
        classes: (n,) which of them is placed.
        positions: (n, 3) x, y, z in voxels of the tomogram, where each box's centre (voxel n // 2) comes to lie.
        rotations: n of them, the volume onto the particle; None leaves all as they are.
        shape: of the tomogram, (z, y, x).
        level: from which share on a voxel is structure.
        progress: told of each particle's part of a slab.
    """
    matrices = None if rotations is None else rotations.as_matrix()[:, ::-1, ::-1]
    reaches = np.empty((len(positions), 3))
    for row, number in enumerate(classes):
        reach = _reach(solids[number].shares.shape, solids[number].scale)
        reaches[row] = reach if matrices is None else np.abs(matrices[row]) @ reach
    centres = positions[:, ::-1]

    def place(row: int, first: int, labels: NDArray[np.uint16], density: Array) -> None:
        placed = solids[classes[row]]
        block = _block(centres[row], reaches[row], first, labels.shape)
        if block is None:
            return
        matrix = None if matrices is None else matrices[row]
        there = _resampled(placed.shares, placed.scale, matrix, centres[row], block, first, order=1)
        known = density[block]
        # Zero where nothing is: what lies below a volume's median never counts.
        stronger = there > known
        known[stronger] = there[stronger]
        labels[block][stronger & (there >= level)] = classes[row] + 1

    for first, count, rows in _slabs(centres, reaches, shape, progress):
        labels, density = np.zeros((count, *shape[1:]), np.uint16), np.zeros((count, *shape[1:]), np.float32)
        for row in rows:
            place(row, first, labels, density)
        yield Slab(first, labels, density)


def place_labels(
    read_box: Callable[[int], NDArray[np.uint16]],
    box_shape: Shape,
    scale: float,
    positions: NDArray[np.float64],
    order: NDArray[np.int64],
    shape: Shape,
    progress: Progress = no_progress,
) -> Iterator[Slab]:
    """The map of segmented boxes, slab by slab from z = 0; they lie as they were cut, whatever their particles' poses.

    Where boxes overlap, the label of the later in `order` counts, unless it is 0.

    Args:
        read_box: the labels `[z, y, x]` of a row.
        box_shape: of each.
        scale: the boxes' voxel in voxels of the tomogram; what lies between is of the nearest voxel.
        positions: (n, 3) x, y, z of the boxes' centres in voxels of the tomogram; each is rounded, as boxes are cut.
        order: rows of those that are placed, in the order of placing.
        shape: of the tomogram, (z, y, x).
        progress: told of each particle's part of a slab.
    """
    centres = np.floor(positions[order, ::-1] + 0.5)
    reaches = np.broadcast_to(_reach(box_shape, scale) + scale / 2, centres.shape)
    for first, count, places in _slabs(centres, reaches, shape, progress):
        labels = np.zeros((count, *shape[1:]), np.uint16)
        for place in places:
            block = _block(centres[place], reaches[place], first, labels.shape)
            if block is None:
                continue
            box = read_box(int(order[place]))
            there = _resampled(box, scale, None, centres[place], block, first, order=0)
            known = labels[block]
            known[there > 0] = there[there > 0]
        yield Slab(first, labels)


def _reach(shape: tuple[int, ...], scale: float) -> NDArray[np.float64]:
    """How far a box goes from its centre's voxel along z, y, x."""
    return np.array([max(side // 2, side - 1 - side // 2) * scale for side in shape])


def _slabs(
    centres: NDArray[np.float64], reaches: NDArray[np.float64], shape: Shape, progress: Progress
) -> Iterator[tuple[int, int, Iterator[int]]]:
    """First section and sections of each slab, and the rows that reach into it, in order."""
    step = slab_sections(shape)
    lowest, highest = centres[:, 0] - reaches[:, 0], centres[:, 0] + reaches[:, 0]

    def told(rows: NDArray[np.intp], first: int, last: int) -> Iterator[int]:
        for done, row in enumerate(rows):
            progress((first + (last - first) * done / len(rows)) / shape[0], "placing", sections=first)
            yield int(row)

    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        rows = np.flatnonzero((lowest < last) & (highest > first - 1))
        yield first, last - first, told(rows, first, last)
        progress(last / shape[0], "placing", sections=last)


def _block(
    centre: NDArray[np.float64], reach: NDArray[np.float64], first: int, shape: tuple[int, ...]
) -> tuple[slice, slice, slice] | None:
    """The part of a slab that a box reaches; None where it is empty."""
    origin = centre - (first, 0, 0)
    low = np.maximum(np.ceil(origin - reach - 1e-9), 0).astype(int)
    high = np.minimum(np.floor(origin + reach + 1e-9) + 1, shape).astype(int)
    if (low >= high).any():
        return None
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _resampled(
    box: NDArray[ScalarT],
    scale: float,
    matrix: NDArray[np.float64] | None,
    centre: NDArray[np.float64],
    block: tuple[slice, slice, slice],
    first: int,
    order: Literal[0, 1],
) -> NDArray[ScalarT]:
    """A box as it lies in a block of the slab that begins at section `first`: voxel r holds box(R^-1 (r - c) / scale +
    n // 2), 0 from outside of it."""
    # Rounded, so that a voxel on the box's edge isn't outside of it by the last digit.
    inverse = np.full(3, 1 / scale) if matrix is None else np.round(matrix.T, 12) / scale
    z, y, x = (part.start for part in block)
    corner = np.array([z + first, y, x]) - centre
    moved = inverse * corner if matrix is None else inverse @ corner
    offset = np.round(moved + [side // 2 for side in box.shape], 9)
    shape = tuple(part.stop - part.start for part in block)
    # Labels go to the nearest voxel, up to half a voxel over the edge.
    mode: Literal["constant", "grid-constant"] = "constant" if order else "grid-constant"
    found = scipy.ndimage.affine_transform(
        box, inverse, offset, shape, output=box.dtype, order=order, mode=mode, prefilter=False
    )
    return np.asarray(found, box.dtype)


def picture_sections(positions: NDArray[np.float64], depth: int) -> list[int]:
    """Up to four sections (z) to be shown, spread among the particles' positions (n, 3); the middle without any."""
    if not len(positions):
        return [depth // 2]
    shares = (np.arange(SECTIONS) + 0.5) / SECTIONS
    found = np.rint(np.quantile(positions[:, 2], shares)).astype(int)
    return sorted({int(z) for z in np.clip(found, 0, depth - 1)})


def picture(sections: Sequence[tuple[int, Array, NDArray[np.integer]]]) -> bytes:
    """A PNG of sections (z, grey values [y, x], labels [y, x]), two in a row, the labels coloured over the grey.

    Raises InvalidArgument where there is none.
    """
    if not sections:
        raise InvalidArgument("a picture needs at least one section")
    gap = 8
    tiles = [_tile(*section) for section in sections]
    width, height = tiles[0].size
    columns, rows = min(2, len(tiles)), math.ceil(len(tiles) / 2)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 2 * (width + gap), number // 2 * (height + gap)))
    packed = io.BytesIO()
    sheet.save(packed, "PNG", compress_level=9)
    return packed.getvalue()


def _tile(z: int, section: Array, labels: NDArray[np.integer]) -> Image.Image:
    low, high = (float(limit) for limit in np.percentile(section, (0.5, 99.5)))
    scaled = np.clip((section - low) / max(high - low, 1e-12), 0, 1)
    tile = Image.fromarray(overlay(np.rint(255 * scaled).astype(np.uint8), labels))
    shrink = SECTION_PIXELS / max(tile.size)
    if shrink < 1:
        tile = tile.resize([max(1, round(side * shrink)) for side in tile.size], Image.Resampling.BOX)
    ImageDraw.Draw(tile).text((4, 2), f"z {z}", fill="white", stroke_width=1, stroke_fill="black")
    return tile
