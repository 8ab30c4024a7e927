"""Placing complexes in a volume without overlap, and the grand model that results.

A complex may go where its shape, turned and grown by the least gap, covers no voxel of another one, and lies inside the
volume as a whole. Every place is tried in a random order until one is free, so that "no place left" is a fact and not a
matter of luck. Large shapes go first: small ones fit between them, not the other way about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.compiled import compiled
from cryofleet.numerics.rotations import uniform_random
from cryofleet.progress import Progress, no_progress
from services.simulation.density import Density

#: A complex that finds no place in so many orientations finds none.
ORIENTATIONS = 12
#: Places tried between two looks at whether to stop.
PLACES_PER_CALL = 2_000_000


@dataclass(frozen=True)
class Scene:
    """A grand model and its truth.

    density: potential above ice (V) `[z, y, x]`, protein positive. instances: int32 `[z, y, x]`, 0 is empty, complex i
    has i + 1 on its shape. positions: (n, 3) x, y, z of the complexes' centroids in voxels. rotations: from each
    structure's own frame into the volume. classes: (n,) index of the structure.
    """

    density: NDArray[np.float32]
    instances: NDArray[np.int32]
    positions: NDArray[np.float64]
    rotations: Rotation
    classes: NDArray[np.int32]

    @property
    def occupancy(self) -> float:
        """Fraction of all voxels that belong to a complex."""
        return float(np.count_nonzero(self.instances)) / self.instances.size


def build_scene(
    structures: list[Density],
    counts: list[int],
    shape: tuple[int, int, int],
    min_gap_voxels: float,
    rng: np.random.Generator,
    progress: Progress = no_progress,
) -> Scene:
    """Place `counts[i]` copies of each structure at random, in uniformly random orientations.

    Args:
        structures: what to place.
        counts: how many of each.
        shape: the volume's (z, y, x).
        min_gap_voxels: least distance between the shapes of two complexes, voxel centre to voxel centre.
        rng: of orientations and places.
        progress: told of every complex.

    Raises:
        InvalidArgument: a structure that is larger than the volume.
        FailedPrecondition: there is no place for all; the message says how many were placed.
    """
    density = np.zeros(shape, np.float32)
    instances = np.zeros(shape, np.int32)
    total = sum(counts)
    order = sorted(range(len(structures)), key=lambda index: -structures[index].shape_voxels)
    classes = np.repeat(np.array(order, np.int32), [counts[index] for index in order])
    positions = np.zeros((total, 3))
    quaternions = np.zeros((total, 4))
    for number, index in enumerate(classes.tolist()):
        found = None
        for _ in range(ORIENTATIONS):
            progress(number / total, "placing", placed=number, asked=total)
            rotation = uniform_random(1, rng)[0]
            fraction = rng.uniform(-0.5, 0.5, 3)
            mask = structures[index].rotated_shape(rotation, fraction)
            place = _find_place(instances, mask, min_gap_voxels, rng, progress, number / total)
            if place is not None:
                found = place
                break
        if found is None:
            raise _no_place(structures, counts, classes[:number], index, instances, min_gap_voxels)
        box = structures[index].rotated(rotation, fraction)
        window, inside = _overlap(shape, found, box.shape)
        density[window] += box[inside]
        instances[window][mask[inside]] = number + 1
        positions[number] = np.array(found[::-1]) + fraction
        quaternions[number] = rotation.as_quat()
    return Scene(density, instances, positions, Rotation.from_quat(quaternions), classes)


def _find_place(
    instances: NDArray[np.int32],
    mask: NDArray[np.bool_],
    min_gap_voxels: float,
    rng: np.random.Generator,
    progress: Progress,
    done: float,
) -> tuple[int, int, int] | None:
    """The voxel (z, y, x) for the centre of a mask's box, or None where there is none."""
    own = np.argwhere(mask)
    first, last = own.min(axis=0), own.max(axis=0)
    middle = np.array(mask.shape) // 2
    # the centre's range for which the shape lies inside the volume
    low = np.maximum(0, middle - first)
    high = np.minimum(np.array(instances.shape), np.array(instances.shape) + middle - last)
    extent = high - low
    if (extent <= 0).any():
        return None
    grow = math.ceil(min_gap_voxels)
    grown = mask[tuple(slice(low, high + 1) for low, high in zip(first, last, strict=True))]
    if grow > 0:
        grown = scipy.ndimage.distance_transform_edt(~np.pad(grown, grow)) <= min_gap_voxels
    offsets = (np.argwhere(grown) + (first - grow - middle)).astype(np.int32)
    # in random order a collision is met after a few looks
    offsets = offsets[rng.permutation(len(offsets))]
    count = int(extent.prod())
    # start + i * stride modulo count visits every place once if the two have no common factor
    stride = int(rng.integers(count // 3, 2 * count // 3 + 1)) or 1
    while math.gcd(stride, count) != 1:
        stride += 1
    place = int(rng.integers(count))
    for first in range(0, count, PLACES_PER_CALL):
        if first:
            progress(done, "placing")
        index, place = _first_free(instances, offsets, low, extent, place, stride, min(PLACES_PER_CALL, count - first))
        if index >= 0:
            z, rest = divmod(index, int(extent[1] * extent[2]))
            y, x = divmod(rest, int(extent[2]))
            return z + int(low[0]), y + int(low[1]), x + int(low[2])
    return None


@compiled
def _first_free(
    instances: NDArray[np.int32],
    offsets: NDArray[np.int32],
    low: NDArray[np.int64],
    extent: NDArray[np.int64],
    place: int,
    stride: int,
    tries: int,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """The first free place of the next `tries` ones, or -1; and where to go on from."""
    sz, sy, sx = instances.shape
    count = extent[0] * extent[1] * extent[2]
    for _ in range(tries):
        z = low[0] + place // (extent[1] * extent[2])
        y = low[1] + place // extent[2] % extent[1]
        x = low[2] + place % extent[2]
        free = True
        for n in range(len(offsets)):
            i, j, k = z + offsets[n, 0], y + offsets[n, 1], x + offsets[n, 2]
            if 0 <= i < sz and 0 <= j < sy and 0 <= k < sx and instances[i, j, k] != 0:
                free = False
                break
        if free:
            return place, place
        place = (place + stride) % count
    return -1, place


def _overlap(
    shape: tuple[int, int, int], centre: tuple[int, int, int], box: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of the volume that a box about a centre covers, and the part of the box that lies in the volume."""
    window, inside = [], []
    for length, middle, side in zip(shape, centre, box, strict=True):
        start = middle - side // 2
        low, high = max(0, start), min(length, start + side)
        window.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    return tuple(window), tuple(inside)


def _no_place(
    structures: list[Density],
    counts: list[int],
    placed: NDArray[np.int32],
    index: int,
    instances: NDArray[np.int32],
    min_gap_voxels: float,
) -> FailedPrecondition | InvalidArgument:
    name = structures[index].name
    z, y, x = instances.shape
    if not len(placed):
        return InvalidArgument(
            f"structures: {name!r} does not fit into the empty volume of {x} x {y} x {z} voxels in any of "
            f"{ORIENTATIONS} orientations; make the volume larger"
        )
    occupied = np.count_nonzero(instances) / instances.size
    mine = int((placed == index).sum())
    return FailedPrecondition(
        f"structures: placed {len(placed)} of {sum(counts)} complexes, {mine} of {counts[index]} {name!r}: "
        f"no place is left for another in {ORIENTATIONS} orientations at a gap of {min_gap_voxels:g} voxels, "
        f"with {occupied:.1%} of the volume occupied; ask for fewer, a smaller gap or a larger volume"
    )
