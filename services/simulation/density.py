"""A structure ready to be placed: its density on a fine grid, and its shape.

Densities are kept at half the tomogram's voxel size, so that a cubic spline turns them without loss, cut close and
faded to zero at the cut, so that no box edge shows in a scene. The shape, a binary mask, is what may not overlap: the
density low-passed to 15 Å or its own resolution above 15% of its maximum, holes filled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.compiled import compiled
from services.simulation.phantoms import phantom
from services.simulation.potential import Scatterers, render
from services.simulation.structures import Map, load

#: Fraction of the maximum above which a density belongs to the shape.
SHAPE_LEVEL = 0.15
#: Detail finer than this does not count for the shape, Å.
SHAPE_RESOLUTION = 15.0
#: Mean potential within the shape of a protein at 20 Å, V (GroEL, 1OEL): maps have no scale of their own and are given
#: this one.
PROTEIN_MEAN_VOLTAGE = 2.1
#: Largest fine grid.
MAX_SIDE = 512
#: What making a density takes at its peak, and what the finished one keeps, bytes per fine voxel.
BUILD_BYTES_PER_VOXEL, KEPT_BYTES_PER_VOXEL = 32, 8


@dataclass(frozen=True)
class Density:
    """A structure at a tomogram's voxel size.

    coefficients: cubic spline coefficients of the density (V above ice) on a fine grid `[z, y, x]` cut close. shape:
    uint8, where it is, on the same grid. centre: (z, y, x) of the centroid in that grid. oversampling: fine voxels per
    tomogram voxel. shape_voxels: the shape's volume in tomogram voxels.
    """

    name: str
    coefficients: NDArray[np.float32]
    shape: NDArray[np.uint8]
    centre: NDArray[np.float64]
    oversampling: int
    shape_voxels: float
    molecular_weight_kda: float | None

    def named(self, name: str) -> Density:
        """The same by another name."""
        return replace(self, name=name)

    def rotated(self, rotation: Rotation, fraction: NDArray[np.float64]) -> NDArray[np.float32]:
        """The density turned, its centroid at the box's middle voxel plus `fraction` (x, y, z), on the tomogram's
        voxels.

        The box `[z, y, x]` has odd sides, as long as this orientation needs.
        """
        matrix, offset, box = self._onto_box(rotation, fraction)
        values = np.zeros(box, np.float32)
        _sample_cubic(self.coefficients, matrix, offset, values)
        return values

    def rotated_shape(self, rotation: Rotation, fraction: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The shape turned likewise, in a box of the same size."""
        matrix, offset, box = self._onto_box(rotation, fraction)
        mask = np.zeros(box, np.bool_)
        _sample_nearest(self.shape, matrix, offset, mask)
        return mask

    def _onto_box(
        self, rotation: Rotation, fraction: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, int, int]]:
        """The map from a voxel of the box to the fine grid, matrix @ index + offset, and the sides of the box."""
        # arrays are [z, y, x] and rotations act on (x, y, z): reverse both sides of the matrix
        turn = np.ascontiguousarray(rotation.as_matrix()[::-1, ::-1])
        reach = np.maximum(self.centre, np.array(self.shape.shape) - 1 - self.centre) / self.oversampling
        half = np.ceil(np.abs(turn) @ reach + 0.5).astype(int)
        matrix = np.ascontiguousarray(turn.T) * self.oversampling
        offset = self.centre - matrix @ (half + fraction[::-1])
        return matrix, offset, (int(2 * half[0] + 1), int(2 * half[1] + 1), int(2 * half[2] + 1))


@compiled
def _sample_cubic(
    coefficients: NDArray[np.float32],
    matrix: NDArray[np.float64],
    offset: NDArray[np.float64],
    box: NDArray[np.float32],
) -> None:  # pragma: no cover - compiled
    """Fill `box` from cubic B-spline coefficients; 0 where the spline's support leaves the grid."""
    weights = np.empty((3, 4), np.float32)
    first = np.empty(3, np.int64)
    for z in range(box.shape[0]):
        for y in range(box.shape[1]):
            for x in range(box.shape[2]):
                inside = True
                for axis in range(3):
                    position = matrix[axis, 0] * z + matrix[axis, 1] * y + matrix[axis, 2] * x + offset[axis]
                    low = int(np.floor(position))
                    if low < 1 or low + 2 >= coefficients.shape[axis]:
                        inside = False
                        break
                    t = position - low
                    first[axis] = low - 1
                    weights[axis, 0] = (1 - t) ** 3 / 6
                    weights[axis, 1] = (3 * t**3 - 6 * t**2 + 4) / 6
                    weights[axis, 2] = (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6
                    weights[axis, 3] = t**3 / 6
                if not inside:
                    continue
                total = np.float32(0)
                for i in range(4):
                    for j in range(4):
                        row = coefficients[first[0] + i, first[1] + j]
                        k = first[2]
                        total += (weights[0, i] * weights[1, j]) * (
                            weights[2, 0] * row[k]
                            + weights[2, 1] * row[k + 1]
                            + weights[2, 2] * row[k + 2]
                            + weights[2, 3] * row[k + 3]
                        )
                box[z, y, x] = total


@compiled
def _sample_nearest(
    shape: NDArray[np.uint8], matrix: NDArray[np.float64], offset: NDArray[np.float64], mask: NDArray[np.bool_]
) -> None:  # pragma: no cover - compiled
    """Fill `mask` with the nearest voxel of `shape`."""
    for z in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                i = int(np.floor(matrix[0, 0] * z + matrix[0, 1] * y + matrix[0, 2] * x + offset[0] + 0.5))
                j = int(np.floor(matrix[1, 0] * z + matrix[1, 1] * y + matrix[1, 2] * x + offset[1] + 0.5))
                k = int(np.floor(matrix[2, 0] * z + matrix[2, 1] * y + matrix[2, 2] * x + offset[2] + 0.5))
                if 0 <= i < shape.shape[0] and 0 <= j < shape.shape[1] and 0 <= k < shape.shape[2]:
                    mask[z, y, x] = shape[i, j, k] != 0


def build(
    name: str,
    file: bytes | None,
    file_name: str,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    workers: int = 1,
) -> Density:
    """The density of a built-in phantom, or of the structure in a file's bytes (see `structures.load`).

    Errors call a file by `file_name`.
    """
    if file is None:
        return from_scatterers(name, phantom(name).scatterers(), voxel_size_angstrom, resolution_angstrom, workers)
    source = load(file, file_name)
    if isinstance(source, Map):
        return from_map(file_name, source, voxel_size_angstrom, resolution_angstrom, workers).named(name)
    return from_scatterers(file_name, source, voxel_size_angstrom, resolution_angstrom, workers).named(name)


def estimated_side(name: str, file_bytes: int | None, voxel_size_angstrom: float, resolution_angstrom: float) -> int:
    """The side of the fine grid that a structure is likely to need, for a statement of memory before it is read.

    A file is taken to be gzipped coordinates with 20 bytes an atom, an assembly of two, packed as protein in a body
    twice as long as wide.
    """
    if file_bytes is None:
        radius = phantom(name).scatterers().radius_angstrom()
    else:
        atoms = max(1000.0, 2 * file_bytes / 20)
        radius = 1.6 * (3 * atoms * 20 / (4 * np.pi)) ** (1 / 3)
    radius += _margin(max(resolution_angstrom, 2 * voxel_size_angstrom))
    factor = oversampling(radius, voxel_size_angstrom)
    return min(MAX_SIDE, int(np.ceil(2 * radius * factor / voxel_size_angstrom)) + 2)


def oversampling(radius_angstrom: float, voxel_size_angstrom: float) -> int:
    """Fine voxels per tomogram voxel: 2, or 1 for boxes so large that their detail is fine enough and their memory is
    not."""
    return 2 if 4 * radius_angstrom / voxel_size_angstrom <= MAX_SIDE // 2 else 1


def from_scatterers(
    name: str, scatterers: Scatterers, voxel_size_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> Density:
    """The density of atoms or pseudo-atoms. A resolution finer than two voxels is taken as two voxels, which is all
    they hold."""
    resolution = max(resolution_angstrom, 2 * voxel_size_angstrom)
    radius = scatterers.radius_angstrom() + _margin(resolution)
    factor = oversampling(radius, voxel_size_angstrom)
    spacing = voxel_size_angstrom / factor
    side = _side(name, radius, spacing)
    values = render(scatterers, side, spacing, resolution, workers)
    return _finish(name, values, spacing, factor, resolution, scatterers.molecular_weight_kda, workers)


def from_map(
    name: str, source: Map, voxel_size_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> Density:
    """The density of a map: low-passed, brought to the voxel size by a cubic spline, its centroid at the centre.

    A map has neither a scale nor a zero: its background (the median) becomes 0 and its mean within its shape that of
    protein. What lies outside the shape, the noise of an experimental map, fades out over the resolution.
    """
    resolution = max(resolution_angstrom, 2 * voxel_size_angstrom)
    sizes = np.array(source.voxel_sizes_angstrom)
    values = _isotropic_low_pass(source.values - np.median(source.values), sizes, resolution, workers)
    inside = _shape_of(_isotropic_low_pass(values, sizes, max(resolution, SHAPE_RESOLUTION), workers))
    if not inside.any() or not float(values[inside].sum()) > 0:
        raise InvalidArgument(f"{name}: the map holds no density above its background; is its protein light?")
    outside = scipy.ndimage.distance_transform_edt(~inside, sampling=sizes)
    values *= _fade(outside.astype(np.float32), 0.5 * resolution, resolution)
    weights = np.where(inside, values, 0).astype(np.float64)
    grids = np.ogrid[tuple(slice(0, side) for side in values.shape)]
    centre = np.array([float((weights * grid).sum()) for grid in grids]) / weights.sum()
    corners = np.argwhere(inside)
    radius = float(np.sqrt((((corners - centre) * sizes) ** 2).sum(axis=1).max())) + _margin(resolution)
    factor = oversampling(radius, voxel_size_angstrom)
    spacing = voxel_size_angstrom / factor
    side = _side(name, radius, spacing)
    matrix = spacing / sizes
    offset = centre - matrix * (side // 2)
    coefficients = scipy.ndimage.spline_filter(values, order=3, output=np.float32)
    cube = scipy.ndimage.affine_transform(
        coefficients, matrix, offset, (side,) * 3, output=np.float32, order=3, prefilter=False
    )
    shape = _shape_of(fourier.low_pass(cube, max(resolution, SHAPE_RESOLUTION), spacing, workers=workers))
    cube *= np.float32(PROTEIN_MEAN_VOLTAGE / float(cube[shape].mean()))
    return _finish(name, cube, spacing, factor, resolution, None, workers)


def _margin(resolution_angstrom: float) -> float:
    """Room around the atoms for what the low-pass spreads, Å."""
    return 1.25 * resolution_angstrom


def _side(name: str, radius_angstrom: float, spacing_angstrom: float) -> int:
    side = fourier.fast_length(2 * int(np.ceil(radius_angstrom / spacing_angstrom)) + 2)
    if side > MAX_SIDE:
        raise InvalidArgument(
            f"{name}: {2 * radius_angstrom:.0f} Å across are {side} voxels of {spacing_angstrom:g} Å, "
            f"at most {MAX_SIDE} can be done; use a larger voxel size"
        )
    return side


def _finish(
    name: str,
    values: NDArray[np.float32],
    spacing_angstrom: float,
    factor: int,
    resolution_angstrom: float,
    molecular_weight_kda: float | None,
    workers: int,
) -> Density:
    """Take the shape of a cube of density, cut the cube close to it, fade the cut, prefilter."""
    smooth = values
    if resolution_angstrom < SHAPE_RESOLUTION:
        smooth = fourier.low_pass(values, SHAPE_RESOLUTION, spacing_angstrom, workers=workers)
    shape = _shape_of(smooth)
    margin = _margin(resolution_angstrom) / spacing_angstrom
    fade = 0.5 * resolution_angstrom / spacing_angstrom
    window, centre = [], []
    for axis in range(3):
        covered = np.flatnonzero(shape.any(axis=tuple(other for other in range(3) if other != axis)))
        low = max(0, int(np.floor(covered[0] - margin)))
        high = min(values.shape[axis], int(np.ceil(covered[-1] + margin)) + 1)
        window.append(slice(low, high))
        centre.append(values.shape[axis] // 2 - low)
        # the distance of each plane from the nearer face of the cut
        depth = np.minimum(np.arange(high - low), np.arange(high - low)[::-1]).astype(np.float32)
        ramp = 1 - fourier.soft_step(depth, 0, fade)
        values[(slice(None),) * axis + (window[axis],)] *= ramp.reshape([-1 if a == axis else 1 for a in range(3)])
    cut = np.ascontiguousarray(values[tuple(window)])
    return Density(
        name,
        scipy.ndimage.spline_filter(cut, order=3, output=np.float32, mode="constant"),
        np.ascontiguousarray(shape[tuple(window)]).astype(np.uint8),
        np.array(centre, np.float64),
        factor,
        float(np.count_nonzero(shape)) / factor**3,
        molecular_weight_kda,
    )


def _shape_of(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = scipy.ndimage.binary_fill_holes(values > SHAPE_LEVEL * float(values.max()))
    return mask


def _fade(distance: NDArray[np.float32], start: float, width: float) -> NDArray[np.float32]:
    """1 up to a distance, 0 beyond it by `width`, half a cosine between."""
    return fourier.soft_step(distance, start, width)


def _isotropic_low_pass(
    values: NDArray[np.float32], sizes: NDArray[np.float64], resolution_angstrom: float, workers: int
) -> NDArray[np.float32]:
    """A low-pass that takes voxels of unequal sides for what they are."""
    kz, ky, kx = (k / np.float32(size) for k, size in zip(fourier.axis_frequencies(values.shape), sizes, strict=True))
    cutoff, edge = 1 / resolution_angstrom, fourier.EDGE / float(sizes.max())
    spectrum = fourier.forward(values, workers)
    for index, frequency in enumerate(kz.ravel()):
        spectrum[index] *= fourier.soft_step(np.sqrt(ky[0] ** 2 + kx[0] ** 2 + frequency**2), cutoff, edge)
    return fourier.inverse(spectrum, values.shape, workers, overwrite=True)
