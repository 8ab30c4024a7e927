"""Particles of unknown size: maxima of differences of Gaussians in space and in scale.

A difference of Gaussians of constant ratio is, up to a constant factor, the scale-normalised Laplacian (Lindeberg,
Int. J. Comput. Vis. 30 (1998) 79), whose response at the centre of a ball of radius r, (r / sigma)^3 exp(-r^2 / (2
sigma^2)), is greatest at sigma = r / sqrt(3). Here sigma is the geometric mean of the two sigmas. Hence responses of
different scales tell a particle's diameter, and are compared as they are; whether a peak is more than noise is told by
its score, the response in standard deviations of the tomogram filtered at that scale, to which the threshold applies
and by which overlapping picks compete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress, part
from services.picking import difference_of_gaussians as dog
from services.picking.slabs import ReadSlab, Shape


@dataclass(frozen=True)
class Scale:
    """One scale: its diameter in Å, the number of its picks, their mean score (0 without any), and the sum of their
    scores.
    """

    diameter_angstrom: float
    count: int
    mean_score: float
    strength: float


@dataclass(frozen=True)
class ScaleSpacePicks:
    """Picks, strongest first.

    Attributes:
        positions: int64 `[n, 3]`, (x, y, z) voxels.
        scores: float64 `[n]`, (response - mean) / deviation of the tomogram filtered at the pick's scale.
        diameters_angstrom: float64 `[n]`.
        scales: by rising diameter.
        best_diameter_angstrom: of the scale of the greatest strength; None without picks.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float64]
    diameters_angstrom: NDArray[np.float64]
    scales: tuple[Scale, ...]
    best_diameter_angstrom: float | None


def diameters(minimum: float, maximum: float, scales_per_octave: int = 4) -> list[float]:
    """Diameters in equal ratios from `minimum` to `maximum`, at least so many to a factor of two."""
    if not 0 < minimum <= maximum < math.inf:
        raise InvalidArgument(
            f"diameter_min_angstrom is {minimum:g}, diameter_max_angstrom {maximum:g}: they must be positive and rise"
        )
    if scales_per_octave < 1:
        raise InvalidArgument(f"scales_per_octave is {scales_per_octave}, it must be at least 1")
    steps = math.ceil(scales_per_octave * math.log2(maximum / minimum) - 1e-9)
    return [minimum * (maximum / minimum) ** (step / max(steps, 1)) for step in range(steps + 1)]


def memory_bytes(
    shape: Shape,
    voxel_size_angstrom: float,
    diameter_min_angstrom: float,
    diameter_max_angstrom: float,
    scales_per_octave: int = 4,
    sigma_ratio: float = 1.1,
    threshold: float = 3.0,
) -> int:
    """What `scale_space_picks` takes at most: the filter of one scale, and the peaks of all."""
    needs = [
        dog.memory_bytes(shape, voxel_size_angstrom, diameter / math.sqrt(sigma_ratio), sigma_ratio, threshold / 2)
        - dog.plan_tiles(shape, _sigma(diameter, voxel_size_angstrom, sigma_ratio)).memory_bytes
        for diameter in diameters(diameter_min_angstrom, diameter_max_angstrom, scales_per_octave)
    ]
    widest = _sigma(diameter_max_angstrom, voxel_size_angstrom, sigma_ratio)
    return dog.plan_tiles(shape, widest).memory_bytes + 2 * sum(needs)


def scale_space_picks(
    read_slab: ReadSlab,
    shape: Shape,
    voxel_size_angstrom: float,
    diameter_min_angstrom: float,
    diameter_max_angstrom: float,
    *,
    contrast: str,
    scales_per_octave: int = 4,
    sigma_ratio: float = 1.1,
    threshold: float = 3.0,
    min_distance_angstrom: float | None = None,
    max_picks: int = 0,
    progress: Progress = no_progress,
    tile_bytes: int = dog.TILE_BYTES,
) -> ScaleSpacePicks:
    """Pick particles of diameters within a range; each scale reads the tomogram once.

    A peak of one scale stays if neither neighbouring scale has one of greater response within a quarter of the larger
    diameter. Neighbours count from half the threshold on. Particles beyond the range end up at its ends. Of two picks
    nearer than half the sum of their diameters, or than `min_distance_angstrom` if given, the one of the greater score
    stays. The other arguments are those of `difference_of_gaussians`.

    Raises:
        InvalidArgument: a range, ratio or number of scales that can't work.
        FailedPrecondition: voxels that are not finite, or a constant tomogram.
    """
    sizes = diameters(diameter_min_angstrom, diameter_max_angstrom, scales_per_octave)
    if sigma_ratio <= 1:
        raise InvalidArgument(f"sigma_ratio is {sigma_ratio:g}, it must be above 1")
    found: list[dog.Picks] = []
    for number, size in enumerate(sizes):
        found.append(
            dog.difference_of_gaussians(
                read_slab,
                shape,
                voxel_size_angstrom,
                size / math.sqrt(sigma_ratio),
                contrast=contrast,
                sigma_ratio=sigma_ratio,
                threshold=min(threshold, threshold / 2),
                min_distance_angstrom=0,
                progress=part(progress, 0.95 * number / len(sizes), 0.95 * (number + 1) / len(sizes)),
                tile_bytes=tile_bytes,
            )
        )
    responses = [picks.scores * picks.deviation + picks.mean for picks in found]
    stays = [picks.scores >= threshold for picks in found]
    for lower in range(len(sizes) - 1):
        reach = sizes[lower + 1] / voxel_size_angstrom / 4
        for one, other in ((lower, lower + 1), (lower + 1, lower)):
            # of equal responses the smaller diameter stays
            beaten = _beaten(found[one], responses[one], found[other], responses[other], reach, one > other)
            stays[one] &= ~beaten
    positions = np.concatenate([picks.positions[stay] for picks, stay in zip(found, stays, strict=True)])
    scores = np.concatenate([picks.scores[stay] for picks, stay in zip(found, stays, strict=True)])
    scale = np.repeat(np.arange(len(sizes)), [int(stay.sum()) for stay in stays])
    size_of = np.array(sizes)[scale]
    kept = _separate(positions, scores, size_of / voxel_size_angstrom, min_distance_angstrom, voxel_size_angstrom)
    kept = kept[: max_picks or len(kept)]
    scales = []
    for number, size in enumerate(sizes):
        own = scores[kept][scale[kept] == number]
        scales.append(Scale(size, len(own), float(own.mean()) if len(own) else 0.0, float(own.sum())))
    best = max(scales, key=lambda entry: entry.strength).diameter_angstrom if len(kept) else None
    progress(1, "separating peaks", picks=len(kept))
    return ScaleSpacePicks(positions[kept], scores[kept], size_of[kept], tuple(scales), best)


def _sigma(diameter_angstrom: float, voxel_size_angstrom: float, sigma_ratio: float) -> float:
    return dog.sigmas_voxels(diameter_angstrom / math.sqrt(sigma_ratio), voxel_size_angstrom, sigma_ratio)[1]


def _beaten(
    one: dog.Picks,
    responses: NDArray[np.float64],
    other: dog.Picks,
    other_responses: NDArray[np.float64],
    reach: float,
    by_equals: bool,
) -> NDArray[np.bool_]:
    """Which peaks of one scale have a stronger one of another within reach (voxels)."""
    beaten = np.zeros(len(responses), np.bool_)
    if len(other_responses) == 0:
        return beaten
    tree = KDTree(other.positions)
    for index, position in enumerate(one.positions):
        rivals = other_responses[tree.query_ball_point(position, max(reach, math.sqrt(3)))]
        beaten[index] = (rivals > responses[index]).any() or (by_equals and (rivals == responses[index]).any())
    return beaten


def _separate(
    positions: NDArray[np.int64],
    scores: NDArray[np.float64],
    sizes: NDArray[np.float64],
    min_distance_angstrom: float | None,
    voxel_size_angstrom: float,
) -> NDArray[np.int64]:
    """Greedy suppression with a distance for each pair; which picks stay, strongest first (equal ones in z, y, x
    order).
    """
    if min_distance_angstrom is not None:
        return dog.suppress(positions, scores, min_distance_angstrom / voxel_size_angstrom)
    order = np.lexsort((sizes, positions[:, 0], positions[:, 1], positions[:, 2], -scores))
    if len(order) == 0:
        return order
    tree = KDTree(positions)
    free = np.ones(len(order), np.bool_)
    kept = []
    for index in order:
        if not free[index]:
            continue
        kept.append(index)
        near = np.array(tree.query_ball_point(positions[index], (sizes[index] + sizes.max()) / 2))
        distances = np.linalg.norm(positions[near] - positions[index], axis=1)
        free[near[distances < (sizes[near] + sizes[index]) / 2]] = False
    return np.array(kept, np.int64)
