"""The surface of a map at a threshold, as a closed mesh of triangles in Å.

Marching cubes (Lorensen & Cline 1987, SIGGRAPH, 163), as scikit-image has it. Its table cuts a face that could be cut
in two ways always in the same one, so that cubes meet without holes whatever the map; that of Lewiner et al. leaves
some where voxels lie on the threshold. The box is taken to be surrounded by what is low, so that a map that reaches its
edge is closed there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress

Array = NDArray[np.float32]
Rule = Literal["otsu", "level", "threshold", "sigma", "molecular_weight"]

#: A level is a share of the way from the median to this quantile: where learning.MapBack draws its labels' border.
BRIGHTEST = 0.95
#: Of protein of 0.73 cm^3/g: Erickson 2009, Biol. Proced. Online 11, 32.
NM3_PER_KDA = 1.212
MOST_VERTICES = 2_000_000
#: Of a mesh: place and normal of a vertex, and two triangles.
MESH_VERTEX_BYTES = 48


@dataclass(frozen=True)
class Mesh:
    """A closed surface.

    Seen from outside, the corners of each triangle go round counter-clockwise.
    """

    vertices: Array
    """(n, 3), x, y, z in Å from the centre of the box, voxel side // 2."""
    normals: Array
    """(n, 3), of length 1, outwards: the mean of the triangles' about, by their area."""
    triangles: NDArray[np.uint32]
    """(m, 3), numbers of vertices."""

    def area_nm2(self) -> float:
        """Of the surface."""
        return float(np.linalg.norm(self._crosses(), axis=1).sum() / 2 / 100)

    def volume_nm3(self) -> float:
        """What the surface encloses, hollows left out."""
        corners = self.vertices.astype(np.float64)[self.triangles[:, 0]]
        return float(np.einsum("ij,ij->", corners, self._crosses()) / 6 / 1000)

    def _crosses(self) -> NDArray[np.float64]:
        a, b, c = (self.vertices.astype(np.float64)[self.triangles[:, corner]] for corner in range(3))
        return np.cross(b - a, c - a)


@dataclass(frozen=True)
class Isosurface:
    """A mesh and how it came about."""

    mesh: Mesh
    threshold: float
    """In the unit of the map, protein positive."""
    parts_left_out: int
    """Small parts that the mesh does not have."""


def threshold_of(volume: Array, voxel_size_angstrom: float, rule: Rule, value: float) -> float:
    """The threshold of a map [z, y, x], protein positive, by a rule.

    `otsu`: between the means of those voxels on either side that differ least among themselves, whatever the value
    (Otsu 1979, IEEE Trans. Syst. Man Cybern. 9, 62); `level`: the share of the way from the median to the 95th
    percentile; `threshold`: the value itself; `sigma`: so many standard deviations above the mean; `molecular_weight`:
    in kDa, as many of the highest voxels as a protein of this weight fills, at 1.212 nm^3 per kDa.

    Raises FailedPrecondition for a map without contrast, InvalidArgument where no surface has this threshold.
    """
    lowest, highest = float(volume.min()), float(volume.max())
    if not lowest < highest:
        raise FailedPrecondition(f"all voxels are {lowest:g}: there is no surface")
    if rule == "otsu":
        from skimage.filters import threshold_otsu  # heavy, and rarely asked for

        above = volume > threshold_otsu(volume)  # type: ignore[no-untyped-call]
        # Between voxels of two values all thresholds are as good; this is the one in the middle.
        threshold = float((volume[above].mean(dtype=np.float64) + volume[~above].mean(dtype=np.float64)) / 2)
    elif rule == "level":
        median, bright = (float(limit) for limit in np.quantile(volume, (0.5, BRIGHTEST)))
        # A structure may have fewer voxels than 5% of the box.
        threshold = median + value * ((bright if bright > median else highest) - median)
    elif rule == "sigma":
        threshold = float(volume.mean(dtype=np.float64) + value * volume.std(dtype=np.float64))
    elif rule == "molecular_weight":
        filled = value * NM3_PER_KDA * 1000 / voxel_size_angstrom**3
        if not 1 <= filled < volume.size:
            raise InvalidArgument(
                f"{value:g} kDa fill {filled:.3g} voxels of {voxel_size_angstrom:g} Å; the box has {volume.size}"
            )
        threshold = float(np.quantile(volume, 1 - filled / volume.size))
    else:
        threshold = value
    # As voxels are: what is only closer to the highest than they can be would leave no voxel above.
    threshold = float(np.float32(threshold))
    if not lowest < threshold < highest:
        raise InvalidArgument(
            f"no surface has the threshold {threshold:g}: voxels, protein positive, go from {lowest:g} to {highest:g}"
        )
    return threshold


def isosurface(
    volume: Array,
    voxel_size_angstrom: float,
    rule: Rule = "otsu",
    value: float = 0.0,
    smallest_part: float = 0.05,
    step_voxels: int = 1,
    progress: Progress = no_progress,
) -> Isosurface:
    """The surface of a map.

    Args:
        volume: [z, y, x], protein positive.
        voxel_size_angstrom: of the map.
        rule: how the threshold is found, as `threshold_of` has it.
        value: the rule's.
        smallest_part: parts of fewer voxels than this share of the largest one's are left out.
        step_voxels: side of the mesh's cubes; the map is smoothed to what they can hold.
        progress: called between the steps.

    Raises what `threshold_of` does, and InvalidArgument for a surface of more than two million vertices.
    """
    from skimage.measure import marching_cubes  # heavy, and rarely asked for

    threshold = threshold_of(volume, voxel_size_angstrom, rule, value)
    low = float(volume.min())
    # Numbers of the box's centre on the mesh's grid, which it is a point of.
    centre = np.array([side // 2 // step_voxels for side in volume.shape])
    if step_voxels > 1:
        smooth = scipy.ndimage.gaussian_filter(volume, 0.5 * math.sqrt(step_voxels**2 - 1), output=np.float32)
        z, y, x = (side // 2 % step_voxels for side in volume.shape)
        volume = smooth[z::step_voxels, y::step_voxels, x::step_voxels]
        if not volume.max() > threshold:
            raise InvalidArgument(
                f"at steps of {step_voxels} voxels the map only reaches {volume.max():g}, and the threshold is "
                f"{threshold:g}: take smaller steps or a lower threshold"
            )
    progress(0.2, "finding parts")
    padded = np.pad(volume, 1, constant_values=low)
    left_out = _remove_small_parts(padded, threshold, smallest_part, low)
    _check_size(padded > threshold)
    progress(0.5, "making the surface")
    vertices, triangles, _, _ = marching_cubes(padded, threshold, method="lorensen")  # type: ignore[no-untyped-call]
    progress(0.8, "making the surface")
    places = (vertices[:, ::-1] - 1 - centre[::-1]) * (step_voxels * voxel_size_angstrom)
    positions = np.ascontiguousarray(places, np.float32)
    corners = np.ascontiguousarray(triangles, np.uint32)
    return Isosurface(Mesh(positions, _normals(positions, corners), corners), threshold, left_out)


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `isosurface` needs: copies of the map, its parts, and the mesh, about 450 bytes for each vertex while its
    triangles' normals are taken; noise has up to 1.6 vertices a voxel."""
    return 24 * shape[0] * shape[1] * shape[2] + 450 * mesh_vertices(shape)


def mesh_vertices(shape: tuple[int, int, int]) -> int:
    """How many vertices a surface has at most."""
    return min(8 * shape[0] * shape[1] * shape[2] // 5, MOST_VERTICES)


def _check_size(inside: NDArray[np.bool_]) -> None:
    """Raises InvalidArgument for a mesh of too many vertices: there is one where an edge of the grid is cut."""
    vertices = sum(int(np.count_nonzero(np.diff(inside, axis=axis))) for axis in range(3))
    if vertices > MOST_VERTICES:
        raise InvalidArgument(
            f"the surface has {vertices} vertices, and {MOST_VERTICES} are taken: smooth or bin the map, take larger "
            "steps, or a threshold that is not in the noise"
        )


def _remove_small_parts(padded: Array, threshold: float, smallest_part: float, low: float) -> int:
    """Takes parts below the share of the largest out of a map; how many. Parts that touch at a corner are one."""
    parts, count = scipy.ndimage.label(padded > threshold, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    small = sizes < smallest_part * sizes.max()
    small[0] = False
    padded[small[parts]] = low
    return int(np.count_nonzero(small))


def _normals(vertices: Array, triangles: NDArray[np.uint32]) -> Array:
    a, b, c = (vertices[triangles[:, corner]].astype(np.float64) for corner in range(3))
    of_triangles = np.cross(b - a, c - a)
    sums = np.stack(
        [
            np.bincount(triangles.ravel(), np.repeat(of_triangles[:, axis], 3), minlength=len(vertices))
            for axis in range(3)
        ],
        axis=1,
    )
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    # Where triangles cancel, any direction will do.
    unit = np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), (0.0, 0.0, 1.0))
    return unit.astype(np.float32)
