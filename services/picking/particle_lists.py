"""Lists of particles: joining them, removing doubles, and filters that say which particles to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from services.picking.slabs import ReadSlab, Shape

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Joined:
    """Several lists as one: `particles`, and for each row which list (int64, from 0) it came from and its row there."""

    particles: Particles
    lists: NDArray[np.int64]
    rows: NDArray[np.int64]


def join_lists(lists: Sequence[Particles]) -> Joined:
    """The particles of all lists, in order.

    Columns that not all lists have are left out; ids are numbered anew where they are not distinct.

    Raises:
        InvalidArgument: no list, or voxel sizes that differ.
    """
    particles = Particles.concat(lists)
    counts = [len(part) for part in lists]
    rows = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    return Joined(particles, np.repeat(np.arange(len(lists), dtype=np.int64), counts), rows)


def deduplicate(
    positions: Points, scores: ArrayLike | None, min_distance_voxels: float, groups: Sequence[ArrayLike] = ()
) -> Mask:
    """Which particles stay so that no two of a group are nearer to each other than a distance.

    Greedy: particles are taken in falling score, equal ones in their order, and each that stays removes those nearer
    than `min_distance_voxels`; exactly so far apart both stay.

    Args:
        positions: `[n, 3]`, (x, y, z) voxels.
        scores: `[n]`; None for the order alone.
        min_distance_voxels: 0 keeps all.
        groups: columns of `[n]`, such as tomogram and class: only particles equal in all of them compete.

    Raises:
        InvalidArgument: a negative distance, scores that are NaN, or columns of another length.
    """
    count = len(positions)
    if not (math.isfinite(min_distance_voxels) and min_distance_voxels >= 0):
        raise InvalidArgument(f"min_distance_voxels is {min_distance_voxels:g}, it must be 0 or more")
    strengths = np.zeros(count) if scores is None else np.asarray(scores, dtype=np.float64)
    if strengths.shape != (count,) or np.isnan(strengths).any():
        raise InvalidArgument(f"scores must be {count} numbers, none of them NaN")
    codes = np.zeros(count, np.int64)
    for column in groups:
        values = np.asarray(column)
        if values.shape != (count,):
            raise InvalidArgument(f"a column to group by has shape {values.shape}, it must be ({count},)")
        _, code = np.unique(values, return_inverse=True)
        codes = np.unique(codes * (int(code.max(initial=0)) + 1) + code, return_inverse=True)[1].astype(np.int64)
    kept = np.ones(count, np.bool_)
    if min_distance_voxels == 0:
        return kept
    order = np.lexsort((np.arange(count), -strengths, codes))
    reach = min_distance_voxels * (1 - 1e-9)
    for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        if len(members) < 2:
            continue
        places = positions[members]
        tree = KDTree(places)
        free = np.ones(len(members), np.bool_)
        for rank, place in enumerate(places):
            if free[rank]:
                free[tree.query_ball_point(place, reach)] = False
                free[rank] = True
        kept[members] = free
    return kept


def by_score(scores: ArrayLike, minimum: float = -math.inf, maximum: float = math.inf) -> Mask:
    """Which scores lie in minimum to maximum, both included; NaN never does."""
    if minimum > maximum:
        raise InvalidArgument(f"the least score {minimum:g} is above the largest, {maximum:g}")
    values = np.asarray(scores, dtype=np.float64)
    return np.asarray((values >= minimum) & (values <= maximum))


def by_mask(positions: Points, mask: NDArray[np.generic] | ReadSlab, shape: Shape | None = None) -> Mask:
    """Which particles have their nearest voxel in the tomogram, with a mask that is not 0 there.

    Args:
        positions: `[n, 3]`, (x, y, z) voxels of the mask.
        mask: `[z, y, x]`, or a reader of its planes; of those only planes with particles are read, one at a time.
        shape: (z, y, x) of the mask; needed with a reader.
    """
    size = mask.shape if isinstance(mask, np.ndarray) else shape
    if size is None or len(size) != 3:
        raise InvalidArgument(f"the mask's shape is {size}, it must be (z, y, x)")
    # halves go up, so that each voxel owns [i - 0.5, i + 0.5)
    voxels = np.floor(np.asarray(positions, dtype=np.float64)[:, ::-1] + 0.5)
    kept = np.asarray(((voxels >= 0) & (voxels < np.array(size))).all(axis=1))
    inside = np.flatnonzero(kept)
    z, y, x = voxels[inside].astype(np.int64).T
    if isinstance(mask, np.ndarray):
        kept[inside] = mask[z, y, x] != 0
        return kept
    for plane in np.unique(z):
        here = z == plane
        kept[inside[here]] = mask(int(plane), int(plane) + 1)[0][y[here], x[here]] != 0
    return kept


def by_border(positions: Points, shape: Shape, margin_voxels: float) -> Mask:
    """Which particles keep `margin_voxels` or more from the centres of the volume's outermost voxels."""
    if not (math.isfinite(margin_voxels) and margin_voxels >= 0):
        raise InvalidArgument(f"margin_voxels is {margin_voxels:g}, it must be 0 or more")
    last = np.array(shape[::-1]) - 1
    return np.asarray(((positions >= margin_voxels) & (positions <= last - margin_voxels)).all(axis=1))
