"""The density of a structure: a map of its own (`density_map`), or ready to be placed in a scene (`Density`).

Densities to be placed are kept at half the tomogram's voxel size, so that a cubic spline turns them without loss, cut
close and faded to zero at the cut, so that no box edge shows in a scene. The shape, a binary mask, is what may not
overlap: the density low-passed to 15 Å or its own resolution above 15% of its maximum, holes filled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.compiled import compiled
from services.simulation.catalogue import Entry, load_catalogue
from services.simulation.phantoms import phantom
from services.simulation.potential import Scatterers, render
from services.simulation.structures import AS_IT_IS, Map, Treatment, load

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


def load_source(
    name: str,
    file: bytes | None,
    file_name: str,
    treatment: Treatment | None = None,
    catalogue: Mapping[str, Entry] | None = None,
) -> Scatterers | Map:
    """What a structure is made of: a built-in phantom's pseudo-atoms, or what the bytes of its file hold.

    Args:
        name: of a phantom where there is no file; of an entry of the catalogue whose treatment the file takes; or any.
        file: the bytes of a PDB, mmCIF or MRC file (see `structures.load`).
        file_name: what errors call the file.
        treatment: what to take from the file, in place of what the catalogue says.
        catalogue: the built-in one where None.

    Raises:
        InvalidArgument: no phantom of this name; an unreadable file.
        FailedPrecondition: a structure of the catalogue without its file; a map without a voxel size.
    """
    entries = load_catalogue() if catalogue is None else catalogue
    entry = entries.get(name)
    if file is None:
        if entry is not None and entry.kind != "phantom":
            raise FailedPrecondition(
                f"structures: {name!r} is made from a file; pass {' or '.join(entry.files)} ({entry.source}, "
                f"{entry.url}) as its source_uri"
            )
        return phantom(name).scatterers()
    if treatment is None:
        treatment = entry.treatment if entry is not None else AS_IT_IS
    return load(file, file_name, treatment)


def build(
    name: str,
    file: bytes | None,
    file_name: str,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    workers: int = 1,
    treatment: Treatment | None = None,
    catalogue: Mapping[str, Entry] | None = None,
) -> Density:
    """The density of a built-in phantom, or of the structure in a file's bytes, to be placed in a scene; see
    `load_source`."""
    source = load_source(name, file, file_name, treatment, catalogue)
    called = name if file is None else file_name
    return from_source(called, source, voxel_size_angstrom, resolution_angstrom, workers).named(name)


def build_subunit(
    name: str,
    file: bytes | None,
    file_name: str,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    workers: int = 1,
    treatment: Treatment | None = None,
    catalogue: Mapping[str, Entry] | None = None,
) -> Density:
    """The density of one subunit of a filament, its helical axis along z through `centre`: of a helical phantom, or of
    a file whose own origin lies on the axis (of a map, voxel n // 2)."""
    if file is None:
        subunit = phantom(name).subunit()
        return from_source(name, subunit, voxel_size_angstrom, resolution_angstrom, workers)
    if treatment is None:
        entry = (load_catalogue() if catalogue is None else catalogue).get(name)
        treatment = entry.treatment if entry is not None else AS_IT_IS
    source = load(file, file_name, replace(treatment, centred=False))
    return from_source(file_name, source, voxel_size_angstrom, resolution_angstrom, workers).named(name)


def estimated_side(
    name: str,
    file_bytes: int | None,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    catalogue: Mapping[str, Entry] | None = None,
) -> int:
    """The side of the fine grid of a `Density` that a structure is likely to need, for a statement of memory before it
    is read."""
    radius = _estimated_radius(name, file_bytes, catalogue)
    radius += _margin(max(resolution_angstrom, 2 * voxel_size_angstrom))
    factor = oversampling(radius, voxel_size_angstrom)
    return min(MAX_SIDE, int(np.ceil(2 * radius * factor / voxel_size_angstrom)) + 4)


def _estimated_radius(name: str, file_bytes: int | None, catalogue: Mapping[str, Entry] | None) -> float:
    """Of a phantom, or of a file, which is taken to be gzipped coordinates with 20 bytes an atom, an assembly of two,
    packed as protein in a body twice as long as wide."""
    if file_bytes is None:
        source = load_source(name, None, "", None, catalogue)
        assert isinstance(source, Scatterers)  # a phantom, then
        return source.radius_angstrom()
    atoms = max(1000.0, 2 * file_bytes / 20)
    return float(1.6 * (3 * atoms * 20 / (4 * np.pi)) ** (1 / 3))


def oversampling(radius_angstrom: float, voxel_size_angstrom: float) -> int:
    """Fine voxels per tomogram voxel: 2, or 1 for boxes so large that their detail is fine enough and their memory is
    not."""
    return 2 if 4 * radius_angstrom / voxel_size_angstrom <= MAX_SIDE // 2 else 1


def from_source(
    name: str, source: Scatterers | Map, voxel_size_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> Density:
    """The density of what `load_source` gives, to be placed in a scene."""
    if isinstance(source, Map):
        return from_map(name, source, voxel_size_angstrom, resolution_angstrom, workers)
    return from_scatterers(name, source, voxel_size_angstrom, resolution_angstrom, workers)


def from_scatterers(
    name: str, scatterers: Scatterers, voxel_size_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> Density:
    """The density of atoms or pseudo-atoms. A resolution finer than two voxels is taken as two voxels, which is all
    they hold, and as three where the structure is too large for oversampling: see `potential.render`."""
    _check_voxels(name, voxel_size_angstrom, resolution_angstrom)
    resolution = max(resolution_angstrom, 2 * voxel_size_angstrom)
    radius = scatterers.radius_angstrom() + _margin(resolution)
    factor = oversampling(radius, voxel_size_angstrom)
    if factor == 1 and resolution < 3 * voxel_size_angstrom:
        resolution = 3 * voxel_size_angstrom
        radius = scatterers.radius_angstrom() + _margin(resolution)
    spacing = voxel_size_angstrom / factor
    values = render(scatterers, _side(name, radius, spacing), spacing, resolution, workers)
    return _finish(name, values, spacing, factor, resolution, scatterers.molecular_weight_kda, workers)


def from_map(
    name: str, source: Map, voxel_size_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> Density:
    """The density of a map: low-passed, brought to the voxel size by a cubic spline, its centroid at the centre.

    A map has neither a scale nor a zero: its background (the median) becomes 0 and its mean within its shape that of
    protein. What lies outside the shape, the noise of an experimental map, fades out over the resolution.
    """
    _check_voxels(name, voxel_size_angstrom, resolution_angstrom)
    resolution = max(resolution_angstrom, 2 * voxel_size_angstrom)
    cut = _cut_out(name, source, resolution, workers)
    radius = cut.radius_angstrom + _margin(resolution)
    factor = oversampling(radius, voxel_size_angstrom)
    spacing = voxel_size_angstrom / factor
    cube = cut.resampled(_side(name, radius, spacing), spacing, resolution, workers)
    return _finish(name, cube, spacing, factor, resolution, None, workers)


@dataclass(frozen=True)
class DensityMap:
    """A structure's density in a box of its own.

    values: potential above ice (V) `[z, y, x]`, float32, protein positive, the centroid at voxel n // 2 of each axis.
    extent_angstrom: of its shape (see the module) along x, y and z. molecular_weight_kda: None of a map.
    """

    values: NDArray[np.float32]
    voxel_size_angstrom: float
    resolution_angstrom: float
    extent_angstrom: tuple[float, float, float]
    molecular_weight_kda: float | None


def density_map(
    source: Scatterers | Map,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    box_voxels: int | None = None,
    workers: int = 1,
    name: str = "the structure",
) -> DensityMap:
    """A map of a structure: a template, a reference, a ground truth.

    |k| <= 1 / resolution is kept whole. Atoms and pseudo-atoms are exact to that resolution; a map holds no more than
    its file does.

    Args:
        source: what `load_source` gives.
        voxel_size_angstrom: of the map.
        resolution_angstrom: at least two voxels.
        box_voxels: side of the box; where None, an even one with room for what the low-pass spreads.
        workers: threads.
        name: what errors call the structure.

    Raises:
        InvalidArgument: a resolution that the voxels don't hold, a box smaller than the structure, more voxels than
            can be done, a map without density.
    """
    _check_voxels(name, voxel_size_angstrom, resolution_angstrom)
    if resolution_angstrom < 2 * voxel_size_angstrom:
        raise InvalidArgument(
            f"{name}: a resolution of {resolution_angstrom:g} Å is asked for, voxels of {voxel_size_angstrom:g} Å hold "
            f"{2 * voxel_size_angstrom:g} Å"
        )
    factor = _refinement(voxel_size_angstrom, resolution_angstrom)
    spacing = voxel_size_angstrom / factor
    if isinstance(source, Map):
        cut = _cut_out(name, source, resolution_angstrom, workers)
        radius = cut.radius_angstrom
        side = _side(name, radius + _margin(resolution_angstrom), spacing)
        fine = cut.resampled(side, spacing, resolution_angstrom, workers)
        mass = None
    else:
        radius = source.radius_angstrom()
        side = _side(name, radius + _margin(resolution_angstrom), spacing)
        fine = render(source, side, spacing, resolution_angstrom, workers)
        mass = source.molecular_weight_kda
    if box_voxels is not None and box_voxels * voxel_size_angstrom < 2 * radius:
        raise InvalidArgument(
            f"{name}: it needs {2 * radius:.0f} Å, a box of {box_voxels} voxels of {voxel_size_angstrom:g} Å has "
            f"{box_voxels * voxel_size_angstrom:.0f}"
        )
    values = fourier.fourier_crop(fine, factor, workers)
    shape = _shape_of(_at_most(values, resolution_angstrom, voxel_size_angstrom, workers))
    covered = [np.flatnonzero(shape.any(axis=tuple({0, 1, 2} - {axis}))) for axis in (2, 1, 0)]
    x, y, z = (float(along[-1] - along[0] + 1) * voxel_size_angstrom for along in covered)
    if box_voxels is not None:
        values = _boxed(values, box_voxels)
    return DensityMap(values, voxel_size_angstrom, resolution_angstrom, (x, y, z), mass)


def _refinement(voxel_size_angstrom: float, resolution_angstrom: float) -> int:
    """Fine voxels per voxel: so many that what `render` folds over at its Nyquist frequency lies beyond the
    resolution."""
    return 1 if resolution_angstrom >= 3 * voxel_size_angstrom else 2


def density_map_bytes(
    name: str,
    file_bytes: int | None,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    box_voxels: int | None,
    catalogue: Mapping[str, Entry] | None = None,
) -> int:
    """The memory that `density_map` is likely to take, for a statement before the structure is read."""
    radius = _estimated_radius(name, file_bytes, catalogue) + _margin(resolution_angstrom)
    spacing = voxel_size_angstrom / _refinement(voxel_size_angstrom, resolution_angstrom)
    fine = min(MAX_SIDE, math.ceil(2 * radius / spacing) + 4)
    return BUILD_BYTES_PER_VOXEL * fine**3 + 4 * (box_voxels or 0) ** 3


def _boxed(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """A cube cut or filled up with zeros to another side, voxel n // 2 staying voxel n // 2."""
    there = len(values)
    start = there // 2 - side // 2
    low, high = max(0, start), min(there, start + side)
    result = np.zeros((side,) * 3, np.float32)
    result[(slice(low - start, high - start),) * 3] = values[(slice(low, high),) * 3]
    return result


def _check_voxels(name: str, voxel_size_angstrom: float, resolution_angstrom: float) -> None:
    for what, value in (("voxel_size_angstrom", voxel_size_angstrom), ("resolution_angstrom", resolution_angstrom)):
        if not 0 < value < np.inf:
            raise InvalidArgument(f"{name}: {what} is {value:g}, it must be a positive number")


@dataclass(frozen=True)
class _Cut:
    """A map's structure by itself: low-passed, 0 elsewhere. centre: (z, y, x) in its voxels; radius_angstrom: of its
    shape about that centre."""

    values: NDArray[np.float32]
    voxel_sizes_angstrom: NDArray[np.float64]
    centre: NDArray[np.float64]
    radius_angstrom: float

    def resampled(
        self, side: int, spacing_angstrom: float, resolution_angstrom: float, workers: int
    ) -> NDArray[np.float32]:
        """On a cube, the centre at side // 2, with the mean potential of protein within its shape."""
        matrix = spacing_angstrom / self.voxel_sizes_angstrom
        offset = self.centre - matrix * (side // 2)
        coefficients = scipy.ndimage.spline_filter(self.values, order=3, output=np.float32)
        cube: NDArray[np.float32] = scipy.ndimage.affine_transform(
            coefficients, matrix, offset, (side,) * 3, output=np.float32, order=3, prefilter=False
        )
        smooth = fourier.low_pass(cube, max(resolution_angstrom, SHAPE_RESOLUTION), spacing_angstrom, workers=workers)
        shape = _shape_of(smooth)
        cube *= np.float32(PROTEIN_MEAN_VOLTAGE / float(cube[shape].mean()))
        return cube


def _cut_out(name: str, source: Map, resolution_angstrom: float, workers: int) -> _Cut:
    """Tell a map's structure from what is around it; see `Treatment` for level, component and centre."""
    sizes = np.array(source.voxel_sizes_angstrom)
    treatment = source.treatment
    values = source.values - np.median(source.values)
    if treatment.level is None:
        smooth = _isotropic_low_pass(values, sizes, max(resolution_angstrom, SHAPE_RESOLUTION), workers)
        # a body that stands out of its surroundings skews the values to its side
        if not float((smooth.astype(np.float64) ** 3).mean()) > 0:
            raise InvalidArgument(
                f"{name}: the map holds no density above its background, and some below; is its protein dark? "
                "(inverted or level in a catalogue say so)"
            )
        inside = _shape_of(smooth)
    else:
        inside = source.values >= treatment.level
        if not inside.any() or inside.all():
            raise InvalidArgument(
                f"{name}: level is {treatment.level:g}, it must lie among the map's values, "
                f"{float(source.values.min()):g} to {float(source.values.max()):g}"
            )
        inside = scipy.ndimage.binary_fill_holes(inside)
    if treatment.component is not None:
        inside = _component(name, inside, values, sizes, treatment.component)
    values = _isotropic_low_pass(values, sizes, resolution_angstrom, workers)
    weights = np.where(inside, values, 0).astype(np.float64)
    if not weights.sum() > 0:
        raise InvalidArgument(f"{name}: the map holds no density above its background; is its protein light?")
    outside = scipy.ndimage.distance_transform_edt(~inside, sampling=sizes).astype(np.float32)
    values *= fourier.soft_step(outside, 0.5 * resolution_angstrom, resolution_angstrom)
    if treatment.centred:
        grids = np.ogrid[tuple(slice(0, side) for side in values.shape)]
        centre = np.array([float((weights * grid).sum()) for grid in grids]) / weights.sum()
    else:
        centre = np.array([side // 2 for side in values.shape], np.float64)
    corners = np.argwhere(inside)
    radius = float(np.sqrt((((corners - centre) * sizes) ** 2).sum(axis=1).max()))
    return _Cut(values, sizes, centre, radius)


def _component(
    name: str, inside: NDArray[np.bool_], values: NDArray[np.float32], sizes: NDArray[np.float64], wanted: int
) -> NDArray[np.bool_]:
    """The nth largest connected part; `values` nearer to another part than to it become 0."""
    labels, count = scipy.ndimage.label(inside)
    voxels = np.bincount(labels.ravel())[1:]
    order = np.argsort(-voxels, kind="stable")
    if wanted > count:
        largest = ", ".join(str(voxels[index]) for index in order[:5])
        raise InvalidArgument(
            f"{name}: component {wanted} is asked for, at its level the map has {count} (of {largest} voxels)"
        )
    label = int(order[wanted - 1]) + 1
    nearest = scipy.ndimage.distance_transform_edt(
        labels == 0, sampling=sizes, return_distances=False, return_indices=True
    )
    values[labels[tuple(nearest)] != label] = 0
    return np.asarray(labels == label)


def _margin(resolution_angstrom: float) -> float:
    """Room around the atoms for what the low-pass spreads, Å."""
    return 1.25 * resolution_angstrom


def _side(name: str, radius_angstrom: float, spacing_angstrom: float) -> int:
    # a multiple of 4, so that the middle stays a voxel when the grid is halved
    needed = 2 * min(radius_angstrom / spacing_angstrom, 1e9) + 2
    side = 4 * fourier.fast_length(math.ceil(needed / 4))
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
    shape = _shape_of(_at_most(values, resolution_angstrom, spacing_angstrom, workers))
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


def _at_most(
    values: NDArray[np.float32], resolution_angstrom: float, spacing_angstrom: float, workers: int
) -> NDArray[np.float32]:
    """A density of a resolution, low-passed to `SHAPE_RESOLUTION` where it is finer."""
    if resolution_angstrom >= SHAPE_RESOLUTION:
        return values
    return fourier.low_pass(values, SHAPE_RESOLUTION, spacing_angstrom, workers=workers)


def _shape_of(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = scipy.ndimage.binary_fill_holes(values > SHAPE_LEVEL * float(values.max()))
    return mask


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
