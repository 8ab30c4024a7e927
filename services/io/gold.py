"""Gold fiducials: where they are, and a mask of them.

Gold is several times as dense as anything else in the ice. A difference of Gaussians that suits a bead's diameter is
highest at its centre, and beads stand far above all other peaks of it, measured in robust standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress, part
from services.io.bricks import Array, ReadSlab, Shape, by_bricks
from services.io.bricks import memory_bytes as brick_bytes

_TRUNCATE = 3.0
_COPIES = 8
_LEAST_DIAMETER, _MOST_DIAMETER = 2.0, 64.0
#: Blocks by which the deviation is measured, and their side without what their border spoils.
_SAMPLED_SLABS, _SAMPLED_SIDE = 4, 48
#: Of a bead, where the threshold is left out; of a peak that is listed to compare with.
_LEAST_SCORE, _LEAST_LISTED = 8.0, 4.0
#: Gold lies four to six times above all else in simulated tomograms; complexes above noise, up to twice.
_GAP = 2.5
#: The most peaks that are kept to choose from; more means that the threshold tells nothing.
_MOST_PEAKS = 1_000_000
# Standard deviation over median absolute deviation, of a normal variate.
_DEVIATIONS = 1.4826022185056018


@dataclass(frozen=True)
class Gold:
    """positions: (n, 3) as x, y, z in voxels, best first; scores: (n,). next_score: of the best peak that is none."""

    positions: NDArray[np.float64]
    scores: NDArray[np.float64]
    next_score: float


def find_gold(
    read: ReadSlab,
    shape: Shape,
    diameter_voxels: float,
    dark: bool,
    threshold: float | None = None,
    progress: Progress = no_progress,
    workers: int = 1,
) -> Gold:
    """Beads of a tomogram [z, y, x], read by sections.

    Args:
        read: sections start to stop.
        shape: of the tomogram.
        diameter_voxels: of the beads, 2 to 64 voxels.
        dark: whether what is dense is dark.
        threshold: least score; scores are the filtered tomogram over 1.48 times its median modulus. Where left out,
            beads are what lies above the widest gap between scores: the last above it must be at least 8, and 2.5
            times the first below; where there is no such gap, there are no beads.
        progress: called as the work goes on.
        workers: threads.

    Raises InvalidArgument for a diameter out of range, or a threshold that a million peaks pass; FailedPrecondition
    where what stands out most has the other sign.
    """
    if not _LEAST_DIAMETER <= diameter_voxels <= _MOST_DIAMETER:
        raise InvalidArgument(
            f"beads of {diameter_voxels:.3g} voxels: {_LEAST_DIAMETER:g} to {_MOST_DIAMETER:g} are found; "
            "rescale the tomogram"
        )
    sigma = diameter_voxels / (2 * math.sqrt(3))
    sign = np.float32(-1 if dark else 1)

    def filtered(brick: Array) -> Array:
        narrow = scipy.ndimage.gaussian_filter(brick, sigma, truncate=_TRUNCATE)
        narrow -= scipy.ndimage.gaussian_filter(brick, 1.6 * sigma, truncate=_TRUNCATE)
        narrow *= sign
        return narrow

    least = _LEAST_SCORE if threshold is None else threshold
    reach = math.ceil(_TRUNCATE * 1.6 * sigma)
    deviation = _deviation(read, shape, reach, filtered)
    if not deviation > 0:
        raise InvalidArgument("the tomogram is the same nearly everywhere: there is nothing to find")
    radius = max(1, int(diameter_voxels / 2))

    troughs: list[float] = []

    def peaks(brick: Array) -> Array:
        response = filtered(brick)
        troughs.append(-float(response.min()) / deviation)
        highest = scipy.ndimage.maximum_filter(response, 2 * radius + 1)
        response[response < highest] = 0
        return response

    found: list[NDArray[np.float64]] = []
    depth = count = 0

    def gather(slab: Array) -> None:
        nonlocal depth, count
        z, y, x = np.nonzero(slab > min(least, _LEAST_LISTED) * deviation)
        scores = slab[z, y, x] / deviation
        found.append(np.stack([x, y, z + depth, scores], axis=1).astype(np.float64))
        depth += len(slab)
        count += len(z)
        if count > _MOST_PEAKS:
            raise InvalidArgument(f"over {_MOST_PEAKS} peaks: raise threshold, which is {least:g}")

    told = part(progress, 0.1, 1.0)
    by_bricks(read, shape, reach + radius, peaks, gather, told, "looking for gold", workers)
    table = np.concatenate(found)
    table = table[np.argsort(-table[:, 3], kind="stable")]
    table = table[_apart(table[:, :3], diameter_voxels)]
    scores = table[:, 3]
    count = int((scores >= least).sum())
    if threshold is None:
        count = _above_the_gap(scores, count)
    if count and max(troughs) > scores[0]:
        raise FailedPrecondition(
            f"what stands out most is {'light' if dark else 'dark'}, and what is dense should be "
            f"{'dark' if dark else 'light'}: check the contrast that the tomogram states"
        )
    return Gold(table[:count, :3], scores[:count], float(scores[count]) if count < len(scores) else 0.0)


def memory_bytes(shape: Shape, diameter_voxels: float, workers: int = 1) -> int:
    """What `find_gold` needs at most."""
    reach = math.ceil(diameter_voxels * (_TRUNCATE * 1.6 / (2 * math.sqrt(3)) + 0.5)) + 1
    sample = 4 * (2 * reach + _SAMPLED_SIDE) * shape[1] * shape[2]
    return max(brick_bytes(shape, reach, _COPIES, workers), sample) + 100 * _MOST_PEAKS


def write_mask(
    positions: NDArray[np.float64],
    radius_voxels: float,
    shape: Shape,
    write: Callable[[Array], object],
    progress: Progress = no_progress,
) -> None:
    """Writes the mask slab by slab: 1 within the radius of a position, 0 elsewhere."""
    step = max(1, (32 << 20) // (4 * shape[1] * shape[2]))
    reach = math.ceil(radius_voxels)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        slab = np.zeros((stop - start, *shape[1:]), np.float32)
        for x, y, z in positions:
            low = [max(0, math.floor(at) - reach) for at in (y, x)]
            first, last = max(start, math.floor(z) - reach), min(stop, math.ceil(z) + reach + 1)
            if first >= last:
                continue
            rows = np.arange(low[0], min(math.ceil(y) + reach + 1, shape[1]))
            columns = np.arange(low[1], min(math.ceil(x) + reach + 1, shape[2]))
            planes = np.arange(first, last)
            distance = (planes[:, None, None] - z) ** 2 + (rows[:, None] - y) ** 2 + (columns - x) ** 2
            target = slab[first - start : last - start, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            target[distance <= radius_voxels**2] = 1
        write(slab)
        progress(stop / shape[0], "writing the mask")


def _above_the_gap(scores: NDArray[np.float64], most: int) -> int:
    """How many of the scores, highest first, lie above the widest gap that begins among the first `most`."""
    if not most:
        return 0
    following = np.append(scores[1:], min(_LEAST_LISTED, float(scores[-1])))[:most]
    ratios = scores[:most] / following
    widest = int(np.argmax(ratios))
    return widest + 1 if ratios[widest] >= _GAP else 0


def _deviation(read: ReadSlab, shape: Shape, reach: int, filtered: Callable[[Array], Array]) -> float:
    """The robust standard deviation of the filtered tomogram, by blocks along its diagonal."""
    size = [min(side, 2 * reach + _SAMPLED_SIDE) for side in shape]
    values = []
    for share in np.linspace(0, 1, _SAMPLED_SLABS):
        z, y, x = (round(share * (side - own)) for side, own in zip(shape, size, strict=True))
        response = filtered(read(z, z + size[0])[:, y : y + size[1], x : x + size[2]])
        # what the block's own border has spoiled is left out, where the block is large enough
        inner = tuple(slice(reach, -reach) if own > 2 * reach else slice(None) for own in size)
        values.append(response[inner].ravel())
    joined = np.concatenate(values)
    return _DEVIATIONS * float(np.median(np.abs(joined - np.median(joined))))


def _apart(positions: NDArray[np.float64], distance: float) -> NDArray[np.int64]:
    """The positions, best first, that lie at least so far from all better ones."""
    if not len(positions):
        return np.empty(0, np.int64)
    tree = KDTree(positions)
    kept = np.ones(len(positions), bool)
    for number, position in enumerate(positions):
        if kept[number]:
            near = np.asarray(tree.query_ball_point(position, distance * (1 - 1e-9)), np.int64)
            kept[near[near > number]] = False
    return np.flatnonzero(kept)
