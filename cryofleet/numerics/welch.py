"""Power spectra of volumes larger than memory: tapered boxes, averaged (Welch 1967, IEEE Trans. Audio 15, 70)."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.progress import Progress, no_progress

Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], NDArray[np.float32]]


def box_shape(shape: Shape, side: int) -> Shape:
    """Of the boxes (z, y, x): `side` along each axis, or what the volume has, in even numbers.

    In y and x at most two thirds of the volume, so that there are at least four boxes, whose scatter tells errors.
    """
    depth, height, width = shape
    z, y, x = (max(1, min(side, own) // 2 * 2) for own in (depth, 2 * height // 3, 2 * width // 3))
    return z, y, x


def box_starts(shape: Shape, box: Shape, most: int) -> list[Shape]:
    """Where boxes begin that overlap by half and fill the volume; of more than `most`, so many evenly spread, in z
    order."""
    axes = []
    for side, own in zip(shape, box, strict=True):
        count = max(1, math.ceil((side - own) / max(1, own // 2)) + 1)
        axes.append(np.unique(np.linspace(0, side - own, count).round().astype(int)))
    starts = [(int(z), int(y), int(x)) for z in axes[0] for y in axes[1] for x in axes[2]]
    if len(starts) > most:
        # A golden stride passes over each axis alike, where an even one may keep to one of its rows.
        order = np.argsort(np.mod(np.arange(len(starts)) * 0.6180339887498949, 1.0), kind="stable")[:most]
        starts = [starts[i] for i in sorted(order)]
    return starts


def taper(box: Shape) -> NDArray[np.float32]:
    """Hann's, along each axis, with a mean square of 1."""
    z, y, x = (np.hanning(side + 2)[1:-1] for side in box)
    window = z[:, None, None] * y[:, None] * x
    return np.asarray(window / np.sqrt(np.mean(window**2)), np.float32)


def cut_boxes(read: ReadSlab, starts: list[Shape], box: Shape) -> Iterator[NDArray[np.float32]]:
    """The boxes that begin at `starts`, as views. Boxes of one z share what is read."""
    slab, at = np.empty((0, 0, 0), np.float32), -1
    for z, y, x in starts:
        if z != at:
            del slab  # before the next is read
            slab, at = read(z, z + box[0]), z
        yield slab[:, y : y + box[1], x : x + box[2]]


def tapered_boxes(
    read: ReadSlab, starts: list[Shape], box: Shape, progress: Progress = no_progress
) -> Iterator[NDArray[np.float32]]:
    """The boxes that begin at `starts`, less their means, tapered."""
    window = taper(box)
    weight = window / window.sum()
    for number, cut in enumerate(cut_boxes(read, starts, box)):
        yield (cut - np.float32(np.vdot(cut, weight))) * window
        progress((number + 1) / len(starts), "measuring spectra", boxes=float(number + 1))


def power(boxed: NDArray[np.float32], workers: int = 1) -> NDArray[np.float32]:
    """Power of the half spectrum of a box, per voxel: its mean over the whole spectrum is the box's mean square."""
    spectrum = scipy.fft.rfftn(boxed, workers=workers)
    return np.asarray((spectrum.real**2 + spectrum.imag**2) / boxed.size, np.float32)
