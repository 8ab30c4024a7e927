"""Which averages show the same structure, and how each is brought onto another.

Two averages of one structure, of particles of their own, differ by their noise alone. How well they can then correlate
in a shell is known from their half maps: the whole map's share of signal is F = 2 FSC / (1 + FSC), its correlation with
the truth the square root of that (Rosenthal & Henderson, J. Mol. Biol. 333 (2003) 721), and so the FSC of the two is
sqrt(F_1 F_2). What they reach of that ceiling c, fitted over the shells s that both resolve,

    r = sum_s N_s c_s FSC_s / sum_s N_s c_s^2,

(N_s components, each FSC_s being as uncertain as 1 / sqrt(N_s)) is near 1 for one structure however noisy the averages
are, and stays below for two. Both maps are compared in their best relative pose over all rotations, within a mask, and
without their radial mean, which any two globules share. Mirror images are different structures: hands are never
changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution, shell_index
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import radius_grid, soft_sphere, usual_edge_voxels
from cryofleet.progress import Progress, no_progress
from services.alignment.align import Poses, Search, align, in_parallel

SAME = 0.85
"""Averages that reach this share of what noise lets them reach are one structure."""
LEAST_SHELLS = 4
"""So many shells above zero frequency are always compared."""


@dataclass(frozen=True)
class Distinct:
    """Averages in groups of one structure.

    `groups` (averages,) number the groups from 0, the group of the best average first; `first` (groups,) is each one's
    best member. `rotations` and `shifts` (averages, 3) as (x, y, z) in voxels bring each average onto its group's
    first: the rotation about the box's centre, then the shift. `similarity` (averages, averages) is r of each pair, 1
    on the diagonal. `ranks` (averages,) is 0 for the best; `resolutions_angstrom` (averages,), nan where there are no
    half maps.
    """

    groups: NDArray[np.int64]
    first: NDArray[np.int64]
    rotations: Rotation
    shifts: NDArray[np.float64]
    similarity: NDArray[np.float64]
    ranks: NDArray[np.int64]
    resolutions_angstrom: NDArray[np.float64]

    def table(self) -> dict[str, object]:
        """As the JSON table that the service stores."""
        known = np.isfinite(self.resolutions_angstrom)
        return {
            "group": self.groups.tolist(),
            "first": self.first.tolist(),
            "rank": self.ranks.tolist(),
            "resolution_angstrom": [
                float(r) if k else None for r, k in zip(self.resolutions_angstrom, known, strict=True)
            ],
            "rotation_onto_first": self.rotations.as_quat().tolist(),
            "shift_onto_first_voxels": self.shifts.tolist(),
            "similarity": self.similarity.tolist(),
        }


def distinct(
    averages: NDArray[np.float32],
    voxel_size_angstrom: float,
    *,
    half_maps: NDArray[np.float32] | None = None,
    sizes: NDArray[np.int64] | None = None,
    low_pass_angstrom: float | None = None,
    mask: NDArray[np.float32] | None = None,
    same: float = SAME,
    max_candidates: int = 50,
    threads: int = 1,
    progress: Progress = no_progress,
) -> Distinct:
    """Group `averages` (averages, n, n, n) by structure: complete linkage, so that any two of a group reach `same`.

    `half_maps` (averages, 2, n, n, n) say how noisy they are; without them they are taken as free of noise up to
    `low_pass_angstrom` (four voxels where left out), which no comparison exceeds. Nothing may be missing in them: every
    direction must have been seen by some particle. `mask` (n, n, n), about the box's centre and soft, is what is
    compared; the sphere that the box holds where left out. They are ranked by resolution, then by `sizes`, the
    particles in each, then as they come. One pair takes an alignment.

    Raises InvalidArgument for maps that do not fit together, are not finite or constant, or a criterion that can't be.
    """
    count, n = _check(averages, half_maps, sizes, mask, same)
    search = Search(n, voxel_size_angstrom, None, low_pass_angstrom, max_candidates=max_candidates)
    search.check()
    edge = usual_edge_voxels(n)
    within = soft_sphere(n, n / 2 - edge, edge) if mask is None else mask
    finest = n * voxel_size_angstrom / search.k_max
    resolutions = np.full(count, np.nan)
    if half_maps is not None:
        curves = [fsc(_prepared(a, within), _prepared(b, within)) for a, b in half_maps]
        resolutions = np.array([resolution(*curve, voxel_size_angstrom) for curve in curves])
    particles = np.zeros(count) if sizes is None else sizes
    order = np.lexsort((np.arange(count), -particles, np.nan_to_num(resolutions)))

    def pairs() -> Iterator[tuple[int, int]]:
        for i in range(count):
            for j in range(i + 1, count):
                yield int(order[i]), int(order[j])

    def work(pair: tuple[int, int]) -> tuple[int, int, Poses, float]:
        i, j = pair
        # As fine as the coarser of them shows; at the least what the search needs.
        coarser = max(finest, float(np.nan_to_num(resolutions[[i, j]]).max()))
        limit = min(coarser, n * voxel_size_angstrom / LEAST_SHELLS)
        narrowed = Search(n, voxel_size_angstrom, None, limit, max_candidates=max_candidates)
        pose = align(lambda first, number: averages[j : j + 1], 1, averages[i], narrowed, mask=within)
        halves = None if half_maps is None else (half_maps[i], half_maps[j])
        k_max = n * voxel_size_angstrom / limit
        return i, j, pose, _similarity(averages[i], averages[j], halves, pose, within, k_max)

    similarity = np.eye(count)
    quaternions = np.zeros((count, count, 4))
    quaternions[..., 3] = 1.0
    shifts = np.zeros((count, count, 3))
    finished = 0

    def done(result: tuple[int, int, Poses, float]) -> None:
        nonlocal finished
        i, j, pose, value = result
        similarity[i, j] = similarity[j, i] = value
        inverse = pose.rotations.inv()
        quaternions[j, i] = inverse.as_quat()[0]
        shifts[j, i] = -inverse.apply(pose.shifts)[0]
        finished += 1
        progress(finished / (count * (count - 1) / 2), "comparing averages", pairs=float(finished))

    in_parallel(pairs(), work, threads, done)
    groups, first = _grouped(similarity, order, same)
    onto = first[groups]
    every = np.arange(count)
    ranks = np.empty(count, dtype=np.int64)
    ranks[order] = every
    return Distinct(
        groups,
        first,
        Rotation.from_quat(quaternions[every, onto]),
        shifts[every, onto],
        similarity,
        ranks,
        resolutions,
    )


def carried(poses: Poses, rotation: Rotation, shift_voxels: NDArray[np.float64]) -> Poses:
    """Poses relative to a reference as poses relative to that which the rotation and shift bring it onto.

    If B moves average a onto b, b(r) = a(B^-1 (r - s)), then a particle that R and t take a onto is what R B^-1 and
    t - R B^-1 s take b onto.
    """
    rotations = poses.rotations * rotation.inv()
    return Poses(rotations, poses.shifts - rotations.apply(shift_voxels), poses.scores)


def _check(
    averages: NDArray[np.float32],
    half_maps: NDArray[np.float32] | None,
    sizes: NDArray[np.int64] | None,
    mask: NDArray[np.float32] | None,
    same: float,
) -> tuple[int, int]:
    if averages.ndim != 4 or len(averages) == 0 or len(set(averages.shape[1:])) != 1:
        raise InvalidArgument(f"averages are {averages.shape}: one or more cubes (averages, n, n, n) are expected")
    count, n = averages.shape[:2]
    if half_maps is not None and half_maps.shape != (count, 2, n, n, n):
        raise InvalidArgument(f"half maps are {half_maps.shape}: {(count, 2, n, n, n)} is expected")
    if sizes is not None and sizes.shape != (count,):
        raise InvalidArgument(f"there are sizes of {sizes.shape} averages, but {count} averages")
    if mask is not None and mask.shape != (n, n, n):
        raise InvalidArgument(f"the mask is {mask.shape}, the averages are boxes of {n} voxels")
    if not 0 < same <= 1:
        raise InvalidArgument(f"same {same:g}: must lie in 0 to 1, 0 excluded")
    for k, volume in enumerate(averages):
        if not np.isfinite(volume).all():
            raise InvalidArgument(f"average {k} holds values that are not finite (NaN or infinity): leave it out")
        if float(np.ptp(volume)) == 0:
            raise InvalidArgument(f"average {k} is constant: leave it out")
    if half_maps is not None and not np.isfinite(half_maps).all():
        raise InvalidArgument("the half maps hold values that are not finite (NaN or infinity)")
    return count, n


def _prepared(volume: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """The volume within the mask, less its mean at each radius there."""
    shells = np.rint(radius_grid(volume.shape[0])).astype(np.int64).ravel()
    weight = mask.ravel().astype(np.float64)
    total = np.bincount(shells, weights=volume.ravel() * weight)
    mean = total / np.maximum(np.bincount(shells, weights=weight), 1e-12)
    return np.asarray((volume - mean[shells].reshape(volume.shape)) * mask, dtype=np.float32)


def _signal(halves: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of signal in the whole map, from the FSC of its halves."""
    positive = np.clip(halves, 0.0, 1.0)
    return 2 * positive / (1 + positive)


def _similarity(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    halves: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    pose: Poses,
    mask: NDArray[np.float32],
    k_max: float,
) -> float:
    """r of two averages, `pose` taking the first onto the second, up to `k_max` cycles per box."""
    inverse = pose.rotations.inv()[0]
    shift = -inverse.apply(pose.shifts[0])

    def moved(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return _prepared(transform_volume(volume, inverse, shift), mask)

    n = first.shape[0]
    _, values = fsc(_prepared(first, mask), moved(second))
    ceiling = np.ones(len(values))
    if halves is not None:
        _, one = fsc(_prepared(halves[0][0], mask), _prepared(halves[0][1], mask))
        _, two = fsc(moved(halves[1][0]), moved(halves[1][1]))
        ceiling = np.sqrt(_signal(one) * _signal(two))
    components = np.bincount(shell_index(n).ravel(), minlength=len(values))[: len(values)]
    last = min(max(int(np.floor(k_max)), LEAST_SHELLS), len(values) - 1)
    shells = slice(1, last + 1)
    weight = components[shells] * ceiling[shells]
    reach = float((weight * ceiling[shells]).sum())
    # Averages that are all noise have nothing in common that could be seen.
    return 0.0 if reach <= 0 else float((weight * values[shells]).sum() / reach)


def _grouped(
    similarity: NDArray[np.float64], order: NDArray[np.int64], same: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group of each average, numbered by their best members, and these."""
    count = len(order)
    if count == 1:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    distance = np.maximum(1 - similarity, 0.0)
    np.fill_diagonal(distance, 0.0)
    names = fcluster(linkage(squareform(distance, checks=False), "complete"), max(1 - same, 1e-9), "distance")
    found: dict[int, int] = {}
    first: list[int] = []
    for i in order:
        if int(names[i]) not in found:
            found[int(names[i])] = len(first)
            first.append(int(i))
    return np.array([found[int(name)] for name in names]), np.array(first)
