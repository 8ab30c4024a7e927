"""Positions spread over a segmented surface, with its normals.

The segmentation is smoothed to a density s. The middle of a sheet is the ridge of s: there the curvature across the
sheet, the most negative eigenvalue of the Hessian, is large and the slope along its eigenvector, the normal n, is zero;
from a voxel beside the ridge it is (n . grad s) / (n . H n) away (Steger, IEEE TPAMI 20 (1998) 113). The boundary of a
body is where s = 1/2, and its normal points down the slope.

Normals of a sheet have no sign of their own. Neighbours are given the same one along a minimum spanning tree (Hoppe et
al., SIGGRAPH 1992), and each connected part the one that points out of what it encloses, as far as it encloses
anything; the part of an open sheet the one whose largest component is positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress
from services.picking.difference_of_gaussians import suppress
from services.picking.slabs import ReadSlab, Shape

Points = NDArray[np.float64]

#: Voxels smoothed and differentiated at a time.
BLOCK_VOXELS = 1 << 22
#: Least smoothing, voxels: derivatives of the voxels' own steps mean nothing.
LEAST_SIGMA = 1.0
#: Neighbours that the sign of a normal is passed on to.
_NEIGHBOURS = 8
#: Voxels of the coarse volume in which the inside of closed surfaces is told.
_COARSE_VOXELS = 1 << 24


@dataclass(frozen=True)
class SurfacePicks:
    """Positions on a surface.

    Attributes:
        positions: float64 `[n, 3]`, (x, y, z) voxels.
        normals: float64 `[n, 3]`, unit vectors (x, y, z).
    """

    positions: Points
    normals: Points

    def rotations(self) -> Rotation:
        """The least rotations that take z onto the normals."""
        return onto_normals(self.normals)


def onto_normals(normals: Points) -> Rotation:
    """The least rotations that take the z axis onto unit vectors `[n, 3]`; about x by 180 degrees onto -z."""
    if len(normals) == 0:
        return Rotation.identity(0)
    x, y, z = normals.T
    quaternions = np.stack([-y, x, np.zeros(len(normals)), 1 + z], axis=1)
    quaternions[1 + z < 1e-9] = (1, 0, 0, 0)
    return Rotation.from_quat(quaternions)


def memory_bytes(shape: Shape, sigma_voxels: float, spacing_voxels: float) -> int:
    """What `sample` takes at most, for a surface of up to six times the volume's largest face."""
    z, y, x = shape
    halo = math.ceil(4 * max(sigma_voxels, LEAST_SIGMA)) + 1
    block = min(z, max(1, BLOCK_VOXELS // (y * x)) + 2 * halo) * y * x
    surface = 6 * max(z * y, z * x, y * x)
    coarse = 8 * min(_COARSE_VOXELS, 2 * z * y * x)
    return 4 * 12 * block + 400 * surface + 1000 * round(surface / max(1.0, spacing_voxels) ** 2) + coarse


def sample(
    read_slab: ReadSlab,
    shape: Shape,
    spacing_voxels: float,
    *,
    surface: Literal["middle", "boundary"] = "middle",
    sigma_voxels: float = 2.0,
    offset_voxels: float = 0.0,
    progress: Progress = no_progress,
) -> SurfacePicks:
    """Spread positions over a segmented surface, none nearer to another than the spacing, and no room left for more.

    Args:
        read_slab, shape: the segmentation; what is not 0 is the sheet or the body.
        spacing_voxels: least distance of two positions.
        surface: "middle" of a sheet, or "boundary" of a body.
        sigma_voxels: the segmentation is smoothed by a Gaussian of this deviation, at least `LEAST_SIGMA`; a sheet
            must be thinner than about four of it.
        offset_voxels: the positions are moved so far along their normals.
        progress: told how far the work is.

    Raises:
        InvalidArgument: a spacing below one voxel.
        FailedPrecondition: a segmentation in which no surface is found.
    """
    if spacing_voxels < 1:
        raise InvalidArgument(f"the spacing is {spacing_voxels:g} voxels, it must be at least 1")
    sigma = max(sigma_voxels, LEAST_SIGMA)
    find = _ridge if surface == "middle" else _boundary
    places: list[Points] = []
    directions: list[Points] = []
    for z0, z1, low, block in _blocks(read_slab, shape, math.ceil(4 * sigma) + 1):
        if block.any():
            position, normal = find(block.astype(np.float32), sigma, z0 - low, z1 - low)
            places.append(position + np.array([0, 0, low]))
            directions.append(normal)
        progress(0.7 * z1 / shape[0], "finding the surface")
    if sum(map(len, places)) == 0:
        raise FailedPrecondition("the segmentation has no surface: it is 0 everywhere, or the same everywhere")
    positions, normals = np.concatenate(places), np.concatenate(directions)
    kept = suppress(positions, np.zeros(len(positions)), spacing_voxels)
    positions, normals = positions[kept], normals[kept]
    if surface == "middle":
        progress(0.9, "turning normals outwards")
        normals = _outwards(positions, normals, spacing_voxels, read_slab, shape, 2 * sigma)
    return SurfacePicks(positions + offset_voxels * normals, normals)


def _blocks(read_slab: ReadSlab, shape: Shape, halo: int) -> Iterator[tuple[int, int, int, NDArray[np.bool_]]]:
    """Planes z0 to z1 - 1 with their surroundings, which begin at plane `low`."""
    step = max(1, BLOCK_VOXELS // (shape[1] * shape[2]))
    for z0 in range(0, shape[0], step):
        z1 = min(z0 + step, shape[0])
        low = max(0, z0 - halo)
        yield z0, z1, low, read_slab(low, min(shape[0], z1 + halo)) != 0


def _derivative(block: NDArray[np.float32], sigma: float, *axes: int) -> NDArray[np.float32]:
    """A derivative of the smoothed block along (z, y, x) axes 0 to 2."""
    order = [axes.count(axis) for axis in range(3)]
    result: NDArray[np.float32] = gaussian_filter(block, sigma, order=order, mode="nearest")
    return result


def _gradient(block: NDArray[np.float32], sigma: float, voxels: tuple[NDArray[np.int64], ...]) -> Points:
    """(x, y, z) of the smoothed block's slope at some voxels."""
    return np.stack([_derivative(block, sigma, axis)[voxels] for axis in (2, 1, 0)], axis=1).astype(np.float64)


def _ridge(block: NDArray[np.float32], sigma: float, first: int, stop: int) -> tuple[Points, Points]:
    """Points (x, y, z) on the ridge in planes `first` to `stop - 1`, and their normals without a sign."""
    near = np.zeros(block.shape, np.bool_)
    near[first:stop] = block[first:stop] > 0
    voxels = np.nonzero(near)
    gradient = _gradient(block, sigma, voxels)
    hessian = np.empty((len(gradient), 3, 3))
    for i, a in enumerate((2, 1, 0)):
        for j, b in enumerate((2, 1, 0)):
            if j >= i:
                hessian[:, i, j] = hessian[:, j, i] = _derivative(block, sigma, a, b)[voxels]
    values, vectors = np.linalg.eigh(hessian)
    normal, bend = vectors[:, :, 0], values[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        step = -(gradient * normal).sum(axis=1) / bend
    # the ridge bends much, and much more across than along; at the sheet's faces s hardly bends at all
    ridge = bend < 0.3 * min(float(bend.min(initial=0.0)), -1e-6)
    sheet = ridge & (np.abs(step) <= 0.5) & (np.abs(values[:, 1]) < 0.7 * np.abs(bend))
    place = np.stack(voxels[::-1], axis=1).astype(np.float64) + step[:, None] * normal
    return place[sheet], normal[sheet]


def _boundary(block: NDArray[np.float32], sigma: float, first: int, stop: int) -> tuple[Points, Points]:
    """Points (x, y, z) where the smoothed block is 1/2, and the normals down its slope."""
    smooth = gaussian_filter(block, sigma, mode="nearest")
    near = np.zeros(block.shape, np.bool_)
    near[first:stop] = np.abs(smooth[first:stop] - 0.5) < 0.4
    voxels = np.nonzero(near)
    gradient = _gradient(block, sigma, voxels)
    slope = np.linalg.norm(gradient, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        normal = -gradient / slope[:, None]
        step = (smooth[voxels] - 0.5) / slope
    there = (slope > 0) & (np.abs(step) <= 0.5)
    place = np.stack(voxels[::-1], axis=1)[there] + step[there, None] * normal[there]
    return place, normal[there]


def _outwards(
    positions: Points, normals: Points, spacing: float, read_slab: ReadSlab, shape: Shape, clear: float
) -> Points:
    """The normals with one sign in each connected part, outwards where the part encloses something."""
    oriented, parts = _agreeing(positions, normals, spacing)
    exterior, coarse = _exterior(read_slab, shape)
    for part in np.unique(parts):
        members = parts == part
        beyond, within = (
            _share_outside(positions[members] + sign * clear * oriented[members], exterior, coarse) for sign in (1, -1)
        )
        if abs(beyond - within) > 0.02:
            flip = beyond < within
        else:
            # encloses nothing: one rule for all such parts
            mean = oriented[members].sum(axis=0)[::-1]
            flip = mean[np.argmax(np.abs(mean))] < 0
        if flip:
            oriented[members] *= -1
    return oriented


def _agreeing(positions: Points, normals: Points, spacing: float) -> tuple[Points, NDArray[np.int64]]:
    """The normals with signs that agree with their neighbours', and the connected part that each belongs to."""
    count = len(positions)
    if count < 2:
        return normals.copy(), np.zeros(count, np.int64)
    nearest = KDTree(positions).query(positions, min(_NEIGHBOURS + 1, count), distance_upper_bound=2.5 * spacing)
    distance, neighbour = np.asarray(nearest[0])[:, 1:], np.asarray(nearest[1])[:, 1:]
    rows, columns = np.nonzero(np.isfinite(distance))
    others = neighbour[rows, columns]
    # across the gap between two sheets the way to a neighbour runs along the normal
    way = positions[others] - positions[rows]
    along_surface = np.abs((way * normals[rows]).sum(axis=1)) <= 0.7 * np.linalg.norm(way, axis=1)
    rows, others = rows[along_surface], others[along_surface]
    # the tree prefers neighbours whose normals are alike; a weight of 0 would be no edge
    weights = 1 + 1e-6 - np.abs((normals[rows] * normals[others]).sum(axis=1))
    graph = coo_array((weights, (rows, others)), shape=(count, count)).tocsr()
    graph = graph.maximum(graph.T)
    parts = connected_components(graph, directed=False)[1].astype(np.int64)
    tree = minimum_spanning_tree(graph)
    tree = tree.maximum(tree.T)
    signs = np.ones(count)
    for start in np.unique(parts, return_index=True)[1]:
        order, before = breadth_first_order(tree, int(start), directed=False)
        for node in order[1:]:
            parent = before[node]
            signs[node] = signs[parent] if normals[node] @ normals[parent] >= 0 else -signs[parent]
    return normals * signs[:, None], parts


def _exterior(read_slab: ReadSlab, shape: Shape) -> tuple[NDArray[np.bool_], int]:
    """What is connected with the volume's faces around the objects, in voxels so many times as large."""
    step = max(1, math.ceil((math.prod(shape) / _COARSE_VOXELS) ** (1 / 3)))
    planes = []
    for z in range(0, shape[0], step):
        plane = (read_slab(z, min(z + step, shape[0])) != 0).any(axis=0)
        padded = np.pad(plane, ((0, -plane.shape[0] % step), (0, -plane.shape[1] % step)))
        planes.append(padded.reshape(padded.shape[0] // step, step, -1, step).any(axis=(1, 3)))
    empty = np.pad(~np.stack(planes), 1, constant_values=True)
    regions, _ = label(empty)
    return (regions == regions[0, 0, 0])[1:-1, 1:-1, 1:-1], step


def _share_outside(positions: Points, exterior: NDArray[np.bool_], step: int) -> float:
    """The share of positions that lie in the exterior; what is outside the volume does."""
    voxels = np.rint(positions[:, ::-1]).astype(np.int64) // step
    inside = ((voxels >= 0) & (voxels < np.array(exterior.shape))).all(axis=1)
    outside: NDArray[np.bool_] = np.logical_not(inside)
    z, y, x = voxels[inside].T
    outside[inside] = exterior[z, y, x]
    return float(outside.mean())


def grid(
    shape: Shape, spacing_voxels: float, read_mask: ReadSlab | None = None, progress: Progress = no_progress
) -> Points:
    """Positions (x, y, z) on a regular grid about the volume's centre, where the mask is not 0.

    Raises:
        InvalidArgument: a spacing below one voxel.
        FailedPrecondition: a mask that leaves none.
    """
    if spacing_voxels < 1:
        raise InvalidArgument(f"the spacing is {spacing_voxels:g} voxels, it must be at least 1")
    lines = []
    for side in shape:
        count = math.floor((side - 1) / spacing_voxels) + 1
        lines.append((side - 1 - (count - 1) * spacing_voxels) / 2 + spacing_voxels * np.arange(count))
    found: list[Points] = []
    for index, z in enumerate(lines[0]):
        y, x = (plane.ravel() for plane in np.meshgrid(lines[1], lines[2], indexing="ij"))
        layer = np.stack([x, y, np.full(len(x), z)], axis=1)
        if read_mask is not None:
            plane = read_mask(round(z), round(z) + 1)[0]
            layer = layer[plane[np.rint(y).astype(int), np.rint(x).astype(int)] != 0]
        found.append(layer)
        progress((index + 1) / len(lines[0]), "laying out the grid")
    positions = np.concatenate(found)
    if len(positions) == 0:
        raise FailedPrecondition("the mask is 0 at all points of the grid")
    return positions
