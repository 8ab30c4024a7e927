"""Segmenting a whole tomogram by tiles that overlap, in bounded memory and without seams.

A network that takes regions of any size sees each tile with a margin of at least its reach around it, and only what it
says of the tile itself is kept (the overlap-tile strategy of Ronneberger et al. 2015, MICCAI, 234-241, figure 2). Tiles
begin at multiples of the network's pooling, and end where the volume ends: so each voxel gets the very sums that it
would get from the whole volume at once.

The scale of intensities must not depend on where tiles lie either. A network that was trained on patches of whole
tomograms reads each in its own scale (`tomogram_scale`). EDSS3D is trained on boxes of one scale, that of their whole
set. A tomogram has no boxes, so each of its voxels is taken relative to the mean and in units of the
standard deviation of a window around it, `WINDOW_BOXES` times as wide as a box; at the volume's faces the window is
mirrored. It follows carbon and ice, and must be so wide that no structure fills it. In a simulated tomogram (boxes of
16^3, membranes and globules, labels without an error) Dice is 0.64 and 0.68 with windows of twice a box's side, 0.73
and 0.71 with four times, and 0.72 and 0.72 with eight times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.progress import Progress

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]
"""`read(z0, z1)` gives the planes z0 to z1 - 1 of a volume `[z, y, x]`, protein positive."""

WINDOW_BOXES = 4
"""The window's side in those of a box."""

Predict = Callable[[Array], Array]
"""Probabilities `[class, z, y, x]` of a region `[z, y, x]`."""

CONSTANT = 1e-6
"""A deviation below this share of the window's root mean square is rounding: the window is constant."""


@dataclass(frozen=True)
class Tiling:
    """How a volume is cut.

    Attributes:
        tile: side of the tiles, voxels; a multiple of `multiple`.
        margin: voxels around a tile that the network sees, a multiple of `multiple`, at least its reach.
        window: side of the window that a voxel is scaled by; 0 where `read` gives values in the network's scale.
        multiple: what the network's poolings must divide.
    """

    tile: int
    margin: int
    window: int
    multiple: int

    @property
    def half_window(self) -> int:
        """Voxels on either side of the one that is scaled; the window's side is twice this and 1."""
        return self.window // 2

    @property
    def region(self) -> int:
        """Side of what the network sees at most."""
        return self.tile + 2 * self.margin

    def slab_planes(self, depth: int) -> int:
        """Planes that are held at a time, of a volume so deep."""
        return min(depth, self.region + 2 * self.half_window)


@dataclass(frozen=True)
class Slab:
    """What was found for the planes `start` to `start + len(labels) - 1`.

    Attributes:
        labels: `[z, y, x]`, the likeliest class of each voxel; of equally likely ones the first.
        scores: `[z, y, x]`, the probability of that class.
        probabilities: `[class, z, y, x]`, or None where they are not kept.
        sums: (classes,), the probabilities' sums over the slab.
    """

    start: int
    labels: NDArray[np.uint8]
    scores: Array
    probabilities: Array | None
    sums: NDArray[np.float64]


def tiling(tile: int, margin: int, box: int, multiple: int) -> Tiling:
    """The tiling whose tiles have at least a side of `tile` voxels, for a network trained on boxes of side `box`."""
    return Tiling(-(-tile // multiple) * multiple, margin, WINDOW_BOXES * box, multiple)


def segment(
    predict: Predict,
    read: ReadSlab,
    shape: Shape,
    classes: int,
    tiles: Tiling,
    progress: Progress,
    keep_probabilities: bool = False,
) -> Iterator[Slab]:
    """Slabs of labels in order of z, each one tile deep.

    Args:
        predict: probabilities `[class, z, y, x]` of a region `[z, y, x]` whose sides are multiples of `tiles.multiple`.
        read: reads planes.
        shape: of the volume, (z, y, x).
        classes: their number.
        tiles: how the volume is cut.
        progress: called after each tile.
        keep_probabilities: whether slabs hold them.
    """
    depth, height, width = shape
    plan = list(itertools.product(range(0, height, tiles.tile), range(0, width, tiles.tile)))
    layers = -(-depth // tiles.tile)
    for layer, z in enumerate(range(0, depth, tiles.tile)):
        z_axis = Span.of(z, depth, tiles)
        planes = read(z_axis.source.start, z_axis.source.stop)
        labels = np.empty((z_axis.length, height, width), np.uint8)
        scores = np.empty(labels.shape, np.float32)
        kept = np.empty((classes, z_axis.length, height, width), np.float32) if keep_probabilities else None
        sums = np.zeros(classes)
        for number, (y, x) in enumerate(plan, start=1):
            y_axis, x_axis = Span.of(y, height, tiles), Span.of(x, width, tiles)
            axes = (z_axis, y_axis, x_axis)
            scaled = planes[:, y_axis.source, x_axis.source]
            if tiles.window:
                scaled = standardise_locally(scaled, tiles.half_window)
            region = np.pad(scaled[tuple(axis.seen for axis in axes)], [(0, axis.padding) for axis in axes])
            found = predict(region)[(slice(None), *(axis.kept for axis in axes))]
            place = (slice(None), slice(y, y + y_axis.length), slice(x, x + x_axis.length))
            labels[place] = found.argmax(axis=0)
            scores[place] = found.max(axis=0)
            sums += found.sum(axis=(1, 2, 3), dtype=np.float64)
            if kept is not None:
                kept[(slice(None), *place)] = found
            progress((layer + number / len(plan)) / layers, "segmenting", planes=z)
        yield Slab(z, labels, scores, kept, sums)


def standardise_locally(volume: Array, half_window: int) -> Array:
    """Each voxel of `[z, y, x]` minus the mean and over the standard deviation of the window around it, whose side is
    2 * half_window + 1. Zero where the window is constant. Mirrored at the faces.
    """
    values = volume.astype(np.float64)
    side = 2 * half_window + 1
    means = scipy.ndimage.uniform_filter(values, side, mode="reflect")
    squares = scipy.ndimage.uniform_filter(values * values, side, mode="reflect")
    deviations = np.sqrt(np.maximum(squares - means * means, 0.0))
    varied = deviations > CONSTANT * np.sqrt(squares)
    scaled: Array = np.where(varied, (values - means) / np.where(varied, deviations, 1.0), 0.0).astype(np.float32)
    return scaled


def memory_bytes(shape: Shape, classes: int, tiles: Tiling, keep_probabilities: bool) -> int:
    """Memory of `segment` beside what `predict` takes: planes as read, labels, and the scaling of a tile.

    Of the scaling by windows: values, squares, means, deviations and two intermediate results as float64.
    """
    planes = (tiles.slab_planes(shape[0]) * 4 + 5 * min(tiles.tile, shape[0])) * shape[1] * shape[2]
    kept = 4 * classes * min(tiles.tile, shape[0]) * shape[1] * shape[2] if keep_probabilities else 0
    scaling = 7 * 8 * voxels(shape, tiles, 2 * tiles.half_window) if tiles.window else 8 * voxels(shape, tiles)
    return 2 * planes + kept + scaling


def voxels(shape: Shape, tiles: Tiling, around: int = 0) -> int:
    """Of the largest region that is handed to `predict`; with so many more along each axis."""
    sides = [min(tiles.region, -(-side // tiles.multiple) * tiles.multiple) + around for side in shape]
    return sides[0] * sides[1] * sides[2]


@dataclass(frozen=True)
class Span:
    """One tile along one axis.

    Attributes:
        length: of the tile.
        source: voxels of the volume that are read: the tile, its margins, and half a window beyond.
        seen: of those, what the network sees.
        padding: voxels behind, at the volume's end, so that the poolings divide the region.
        kept: of what the network saw, the tile.
    """

    length: int
    source: slice
    seen: slice
    padding: int
    kept: slice

    @staticmethod
    def of(start: int, side: int, tiles: Tiling) -> Span:
        stop = min(start + tiles.tile, side)
        first, last = max(start - tiles.margin, 0), min(start + tiles.tile + tiles.margin, side)
        low, high = max(first - tiles.half_window, 0), min(last + tiles.half_window, side)
        return Span(
            length=stop - start,
            source=slice(low, high),
            seen=slice(first - low, last - low),
            padding=-(last - first) % tiles.multiple,
            kept=slice(start - first, stop - first),
        )
