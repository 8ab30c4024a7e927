"""Projections of a volume along the beam, and their adjoint, for a single tilt axis.

The tilt axis is y and the beam runs along z. Tilting by theta takes the voxel at (x, y, z) from the volume's centre to
the detector's (u, v) = (x cos(theta) + z sin(theta), y) from the image's centre, centres being voxel n // 2. A
projection is the sum over the voxels along the beam; times the voxel size it is a line integral. Rows y are independent
of each other.

In real space each voxel is spread by a Kaiser-Bessel kernel over four pixels of a detector line of twice the pixels;
the line is then divided by the kernel's transform and cut to the detector's band in Fourier space. What the kernel lets
in from beyond the line's band is at most `ALIASING` of what the volume has there. `back_project` is the transpose of
these steps in their reverse order.

As central slices, the two-dimensional transform of each row's plane, padded to twice its sides, is interpolated along
the line at theta by a kernel over six points, whose transform is divided out beforehand: exact to about 2e-4. The
kernels are those of Beatty, Nishimura & Pauly, IEEE Trans. Med. Imaging 24, 799 (2005), eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

import numpy as np
import scipy.fft
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.compiled import compiled
from cryofleet.numerics.fourier import fast_length
from cryofleet.progress import Progress, no_progress

Array = NDArray[np.float32]
Projection = Literal["real_space", "central_slices"]

#: Rows that are worked on together: they lie side by side in memory, so that one instruction serves several.
BLOCK_ROWS = 16
#: Pixels that a detector line is longer than the image, for what the kernel and its inverse reach.
MARGIN = 16
#: Points that the kernels reach over, on a detector line and in a plane's transform.
LINE_KERNEL, PLANE_KERNEL = 4, 6
#: Entries of the line kernel's table for each pixel.
TABLE = 2048
#: What the line kernel lets in from outside of the band, of the amplitude there.
ALIASING = 1.5e-3


def project(
    volume: Array,
    tilt_angles_degrees: ArrayLike,
    width: int | None = None,
    method: Projection = "real_space",
    workers: int = 1,
    progress: Progress = no_progress,
) -> Array:
    """The projections `[tilt, y, u]` of a volume `[z, y, x]`, sums over voxels along the beam.

    Args:
        volume: left as it is.
        tilt_angles_degrees: of each image.
        width: pixels along u; the volume's x where None.
        method: "real_space" or "central_slices"; see this file's head.
        workers: threads; the result does not depend on them.
        progress: told of each block of rows.

    Raises InvalidArgument for angles or sizes that make no sense.
    """
    angles = checked_angles(tilt_angles_degrees)
    if volume.ndim != 3 or 0 in volume.shape:
        raise InvalidArgument(f"a volume of shape {volume.shape} has no projections; expected (z, y, x)")
    depth, height, length = volume.shape
    width = length if width is None else width
    if width < 1:
        raise InvalidArgument(f"width is {width}, it must be at least 1")
    stack = np.empty((len(angles), height, width), np.float32)
    if method == "real_space":
        transform = _real_space(angles, width)
    elif method == "central_slices":
        transform = _central_slices(angles, depth, length, width)
    else:
        raise InvalidArgument(f"method is {method!r}, it must be 'real_space' or 'central_slices'")

    def block(first: int, last: int) -> None:
        # rows last, so that they are side by side
        rows = np.ascontiguousarray(volume[:, first:last].transpose(0, 2, 1), dtype=np.float32)
        stack[:, first:last] = transform(rows).transpose(0, 2, 1)

    in_blocks(height, block, workers, progress, "projecting")
    return stack


def back_project(
    stack: Array,
    tilt_angles_degrees: ArrayLike,
    depth: int,
    width: int,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Array:
    """The adjoint of `project` in real space: images `[tilt, y, u]` summed back into a volume `[z, y, x]`.

    Args:
        stack: the images.
        tilt_angles_degrees: of each image.
        depth: voxels along z.
        width: voxels along x.
        workers: threads; the result does not depend on them.
        progress: told of each block of rows.

    Raises InvalidArgument for angles or sizes that make no sense.
    """
    angles = checked_images(stack, tilt_angles_degrees, depth, width)
    volume = np.empty((depth, stack.shape[1], width), np.float32)
    line = _Line(stack.shape[2])
    directions = _directions(angles)

    def block(first: int, last: int) -> None:
        images = np.ascontiguousarray(stack[:, first:last].transpose(0, 2, 1), dtype=np.float32)
        fine = line.spread(images)
        rows = np.zeros((depth, width, last - first), np.float32)
        _gather(fine, directions, float(line.centre), _line_table(), rows)
        volume[:, first:last] = rows.transpose(0, 2, 1)

    in_blocks(stack.shape[1], block, workers, progress, "back-projecting")
    return volume


def checked_angles(tilt_angles_degrees: ArrayLike) -> NDArray[np.float64]:
    """The angles as an array. Raises InvalidArgument where there are none, or one is not within -90 to 90."""
    angles = np.atleast_1d(np.asarray(tilt_angles_degrees, np.float64))
    if angles.ndim != 1 or not len(angles):
        raise InvalidArgument(f"tilt angles of shape {angles.shape}: expected a list of at least one")
    wrong = ~(np.abs(angles) <= 90)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InvalidArgument(f"tilt angle {index} is {angles[index]:g}, it must lie in -90 to 90 degrees")
    return angles


def checked_images(stack: Array, tilt_angles_degrees: ArrayLike, depth: int, width: int) -> NDArray[np.float64]:
    """The angles of images `[tilt, y, u]` that a volume is to be made of.

    Raises InvalidArgument as `checked_angles`, where the images are not as many, or where the volume would be empty.
    """
    angles = checked_angles(tilt_angles_degrees)
    if stack.ndim != 3 or len(stack) != len(angles) or 0 in stack.shape:
        raise InvalidArgument(f"{len(angles)} angles do not fit images of shape {stack.shape}; expected (tilt, y, u)")
    if depth < 1 or width < 1:
        raise InvalidArgument(f"a volume of depth {depth} and width {width}: both must be at least 1")
    return angles


def projection_bytes(tilts: int, depth: int, width: int, workers: int = 1) -> int:
    """What `project` and `back_project` take beside the volume and the images."""
    line = fast_length(width + MARGIN)
    return workers * BLOCK_ROWS * 4 * (2 * depth * width + 6 * tilts * line)


def _directions(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """(cos, sin) of each angle."""
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


def in_blocks(height: int, block: Callable[[int, int], None], workers: int, progress: Progress, phase: str) -> None:
    """Call `block(first, last)` for all rows, on several threads, and report from this one."""
    starts = range(0, height, BLOCK_ROWS)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending = [pool.submit(block, first, min(first + BLOCK_ROWS, height)) for first in starts]
        try:
            for number, future in enumerate(pending):
                future.result()
                progress((number + 1) / len(pending), phase)
        finally:
            for future in pending:
                future.cancel()


class _Line:
    """A detector line: the image's pixels, a margin on either side, and twice as many fine pixels."""

    def __init__(self, width: int) -> None:
        length = fast_length(width + MARGIN)
        self.length = length + length % 2
        self.width = width
        self.first = self.length // 2 - width // 2
        self.centre = self.length
        """The fine pixel at u = 0."""
        # at the fine pixels' frequencies; the Nyquist frequency of the image is left out: it has no phase
        k = np.arange(self.length // 2) / (2 * self.length)
        self._sharpen = (1 / kaiser_bessel_transform(k, LINE_KERNEL)).astype(np.float32)[:, None]

    def collect(self, fine: Array) -> Array:
        """Fine lines `[tilt, fine u, row]` to images `[tilt, u, row]`."""
        spectrum = scipy.fft.rfft(fine, axis=1)[:, : self.length // 2]
        spectrum *= self._sharpen
        lines: Array = scipy.fft.irfft(spectrum, self.length, axis=1)
        return lines[:, self.first : self.first + self.width]

    def spread(self, images: Array) -> Array:
        """The adjoint: images `[tilt, u, row]` to fine lines `[tilt, fine u, row]`."""
        lines = np.zeros((images.shape[0], self.length, images.shape[2]), np.float32)
        lines[:, self.first : self.first + self.width] = images
        spectrum = scipy.fft.rfft(lines, axis=1)[:, : self.length // 2]
        spectrum *= 2 * self._sharpen
        fine: Array = scipy.fft.irfft(spectrum, 2 * self.length, axis=1)
        return fine


def kaiser_bessel(distance: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The kernel over `width` points of a grid of twice the sides, at a distance in its points; 0 beyond."""
    inside = np.clip(1 - (2 * distance / width) ** 2, 0, None)
    value: NDArray[np.float64] = np.where(inside > 0, np.i0(_shape(width) * np.sqrt(inside)), 0.0) / width
    return value


def kaiser_bessel_transform(frequency: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The kernel's Fourier transform at frequencies in cycles per point of its grid."""
    root = np.sqrt((_shape(width) ** 2 - (np.pi * width * frequency) ** 2).astype(np.complex128))
    return np.asarray(np.real(np.sinh(root) / root), np.float64)


def _shape(width: int) -> float:
    """The parameter beta for a grid of twice the sides (Beatty et al., eq. 5)."""
    return float(np.pi * np.sqrt((width / 2 * 1.5) ** 2 - 0.8))


@cache
def _line_table() -> NDArray[np.float32]:
    """The kernel's weights on the four points around a place, by how far it lies beyond the second of them."""
    beyond = np.linspace(0, 1, TABLE + 1)[:, None]
    table = kaiser_bessel(np.abs(np.arange(LINE_KERNEL) - 1 - beyond), LINE_KERNEL).astype(np.float32)
    table.setflags(write=False)
    return table


def _real_space(angles: NDArray[np.float64], width: int) -> Callable[[Array], Array]:
    line = _Line(width)
    directions = _directions(angles)

    def transform(rows: Array) -> Array:
        fine = np.zeros((len(angles), 2 * line.length, rows.shape[2]), np.float32)
        _scatter(rows, directions, float(line.centre), _line_table(), fine)
        return line.collect(fine)

    return transform


@compiled
def _scatter(
    rows: NDArray[np.float32],
    directions: NDArray[np.float64],
    centre: float,
    table: NDArray[np.float32],
    fine: NDArray[np.float32],
) -> None:  # pragma: no cover - compiled
    """Add `rows` `[z, x, row]` to `fine` `[tilt, fine u, row]` by the kernel in `table` (see `_line_table`)."""
    depth, width, count = rows.shape
    length = fine.shape[1]
    for tilt in range(len(directions)):
        for z in range(depth):
            for x in range(width):
                place = 2 * ((x - width // 2) * directions[tilt, 0] + (z - depth // 2) * directions[tilt, 1]) + centre
                first = int(np.floor(place)) - 1
                if first < 0 or first + 3 >= length:
                    continue
                a, b, c, d = table[int((place - np.floor(place)) * (len(table) - 1) + 0.5)]
                for row in range(count):
                    value = rows[z, x, row]
                    fine[tilt, first, row] += a * value
                    fine[tilt, first + 1, row] += b * value
                    fine[tilt, first + 2, row] += c * value
                    fine[tilt, first + 3, row] += d * value


@compiled
def _gather(
    fine: NDArray[np.float32],
    directions: NDArray[np.float64],
    centre: float,
    table: NDArray[np.float32],
    rows: NDArray[np.float32],
) -> None:  # pragma: no cover - compiled
    """The transpose of `_scatter`: add to `rows` what `fine` has at each voxel's place."""
    depth, width, count = rows.shape
    length = fine.shape[1]
    for z in range(depth):
        for tilt in range(len(directions)):
            for x in range(width):
                place = 2 * ((x - width // 2) * directions[tilt, 0] + (z - depth // 2) * directions[tilt, 1]) + centre
                first = int(np.floor(place)) - 1
                if first < 0 or first + 3 >= length:
                    continue
                a, b, c, d = table[int((place - np.floor(place)) * (len(table) - 1) + 0.5)]
                for row in range(count):
                    rows[z, x, row] += (
                        a * fine[tilt, first, row]
                        + b * fine[tilt, first + 1, row]
                        + c * fine[tilt, first + 2, row]
                        + d * fine[tilt, first + 3, row]
                    )


# --- central slices ------------------------------------------------------------------------------------------------


def slice_matrix(
    angles: NDArray[np.float64], frequencies: NDArray[np.float64], depth: int, width: int
) -> scipy.sparse.csr_array:
    """Interpolates a plane's transform `[kz, kx]`, of sides depth and width and the origin first, along central lines.

    Rows are (tilt, frequency), frequencies in cycles per voxel; columns the grid's points in C order.
    """
    kz = np.sin(np.radians(angles))[:, None] * frequencies * depth
    kx = np.cos(np.radians(angles))[:, None] * frequencies * width
    taps = np.arange(PLANE_KERNEL) - PLANE_KERNEL // 2 + 1
    z = np.floor(kz).astype(np.int64)[..., None] + taps
    x = np.floor(kx).astype(np.int64)[..., None] + taps
    weights = (
        kaiser_bessel(z - kz[..., None], PLANE_KERNEL)[..., :, None]
        * kaiser_bessel(x - kx[..., None], PLANE_KERNEL)[..., None, :]
    )
    columns = (z % depth)[..., :, None] * width + (x % width)[..., None, :]
    count = PLANE_KERNEL**2
    return scipy.sparse.csr_array(
        (weights.astype(np.float32).ravel(), columns.ravel(), np.arange(0, weights.size + 1, count)),
        shape=(kz.size, depth * width),
    )


def _central_slices(angles: NDArray[np.float64], depth: int, length: int, width: int) -> Callable[[Array], Array]:
    padded_depth, padded_length = fast_length(2 * depth), fast_length(2 * length)
    # the line must hold what of the volume reaches beyond the image, or it would wrap into it
    reach = float(np.max(np.abs(np.cos(np.radians(angles))) * length + np.abs(np.sin(np.radians(angles))) * depth))
    line = fast_length(int(np.ceil(max(width, (reach + width) / 2, reach))) + MARGIN)
    line += line % 2
    frequencies = np.arange(line // 2) / line
    matrix = slice_matrix(angles, frequencies, padded_depth, padded_length)
    z, x = np.arange(depth) - depth // 2, np.arange(length) - length // 2
    apodisation = (
        kaiser_bessel_transform(z / padded_depth, PLANE_KERNEL)[:, None]
        * kaiser_bessel_transform(x / padded_length, PLANE_KERNEL)
    ).astype(np.float32)
    # the transform takes the origin for the centre of volume and line alike
    signs = np.where(np.arange(line // 2) % 2, -1, 1).astype(np.float32)
    rows_z, rows_x = z % padded_depth, x % padded_length

    def transform(rows: Array) -> Array:
        count = rows.shape[2]
        plane = np.zeros((padded_depth, padded_length, count), np.complex64)
        plane[np.ix_(rows_z, rows_x)] = rows / apodisation[..., None]
        plane = scipy.fft.fft2(plane, axes=(0, 1), overwrite_x=True)
        slices = (matrix @ plane.reshape(-1, count)).reshape(len(angles), line // 2, count)
        slices *= signs[:, None]
        lines: Array = scipy.fft.irfft(slices, line, axis=1)
        first = line // 2 - width // 2
        return lines[:, first : first + width]

    return transform
