"""Whether particles of a class lie near something more often than chance has it.

Chance is the shuffling of the classes among the particles of a tomogram, whose places stay as they are: so a target
that fills much of the tomogram, or picks that crowd around it, make nothing look enriched. Of N particles of a tomogram
K lie near; a shuffle gives a class of m particles a hypergeometric number of these. That distribution is exact, so
nothing is drawn at random; of several tomograms it is the convolution of theirs. The p-value is the probability of as
many as there are or more; all classes' p-values are corrected together after Benjamini and Hochberg 1995 (J. R. Stat.
Soc. B 57:289-300).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import spatial, stats

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress, no_progress

#: Of the intervals.
CONFIDENCE = 0.95
#: Probabilities below this are left out of a convolution.
_NEGLIGIBLE = 1e-30
#: Positions of one particle in two tables differ by no more than this, in Å.
_SAME_PLACE = 1e-3


@dataclass(frozen=True)
class ClassEnrichment:
    """What was found of one class.

    particles: of the class. near: how many of them lie near. expected: how many do by chance. ratio: near over
    expected, which within one tomogram is the class's share near over that of all particles. interval: of the ratio,
    from Clopper and Pearson's 95% interval of the class's share; the share of all, at fixed places, has no error.
    p_value, corrected_p_value: see the module.
    """

    number: int
    particles: int
    near: int
    expected: float
    ratio: float
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float


def enrichment(
    near: NDArray[np.bool_],
    classes: NDArray[np.int64],
    tomograms: NDArray[np.int64],
    progress: Progress = no_progress,
) -> list[ClassEnrichment]:
    """Each class's enrichment, the most enriched first, of equal ones the larger.

    Args:
        near: (n,) which particles lie near.
        classes: (n,) their classes.
        tomograms: (n,) the number of the tomogram that each is in.
        progress: told of each class.

    Raises FailedPrecondition where there is no particle or none lies near.
    """
    if not len(classes):
        raise FailedPrecondition("there are no particles with a class: nothing can be compared")
    if not near.any():
        raise FailedPrecondition("no particle lies near: a larger distance_angstrom, or other targets, are needed")
    numbers, members = np.unique(classes, return_inverse=True)
    _, places = np.unique(tomograms, return_inverse=True)
    total = np.bincount(places)
    close = np.bincount(places, near).astype(np.int64)
    found = []
    for row, number in enumerate(numbers):
        own = members == row
        sizes = np.bincount(places[own], minlength=len(total))
        count, size = int((own & near).sum()), int(own.sum())
        expected = float((sizes * close / total).sum())
        p_value = _at_least(count, total, close, sizes)
        low, high = _share_interval(count, size)
        # A class none of whose tomograms has anything near says nothing: its ratio is chance's.
        share = expected / size
        ratio, interval = (count / expected, (low / share, high / share)) if expected > 0 else (1.0, (0.0, np.inf))
        found.append((int(number), size, count, expected, ratio, interval, p_value))
        progress((row + 1) / len(numbers), "comparing")
    corrected = stats.false_discovery_control([each[-1] for each in found])
    results = [ClassEnrichment(*each, float(q)) for each, q in zip(found, corrected, strict=True)]
    return sorted(results, key=lambda each: (-each.ratio, -each.particles, each.number))


def _at_least(count: int, total: NDArray[np.int64], close: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    """The probability that a shuffle within each tomogram puts `count` or more of a class near.

    Of each tomogram: its particles, those of them that lie near, those of the class.
    """
    concerned = np.flatnonzero((close > 0) & (sizes > 0))
    if not len(concerned):
        return 1.0
    if len(concerned) == 1:
        at = concerned[0]
        return float(min(1.0, stats.hypergeom.sf(count - 1, total[at], close[at], sizes[at])))
    first, density = 0, np.ones(1)
    for at in concerned:
        low, high = max(0, sizes[at] + close[at] - total[at]), min(sizes[at], close[at])
        own = stats.hypergeom.pmf(np.arange(low, high + 1), total[at], close[at], sizes[at])
        kept = np.flatnonzero(own > _NEGLIGIBLE)
        density = np.convolve(density, own[kept[0] : kept[-1] + 1])
        first += int(low + kept[0])
    tail = density[max(0, count - first) :]
    # The smallest first, so that none is lost to rounding.
    return float(min(1.0, tail[::-1].sum()))


def _share_interval(count: int, size: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of which `count` of `size` were seen."""
    beyond = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(beyond, count, size - count + 1) if count > 0 else 0.0
    high = stats.beta.ppf(1 - beyond, count + 1, size - count) if count < size else 1.0
    return float(low), float(high)


def near_points(
    positions: NDArray[np.float64],
    ids: NDArray[np.int64],
    targets: NDArray[np.float64],
    target_ids: NDArray[np.int64],
    distance: float,
) -> NDArray[np.bool_]:
    """Which positions (n, 3) have a target (m, 3) within a distance, all in Å of one tomogram.

    A particle is not near itself: a target of the same id in the same place is passed over.
    """
    near = np.zeros(len(positions), np.bool_)
    if not len(positions) or not len(targets):
        return near
    found = spatial.KDTree(targets).query(positions, k=[1, 2])
    away, which = (np.asarray(each) for each in found)
    for nth in range(2):
        # The second nearest counts where the nearest is the particle itself, and is infinitely far where there is none.
        known = np.isfinite(away[:, nth])
        itself = known & (away[:, nth] <= _SAME_PLACE)
        itself[itself] = target_ids[which[itself, nth]] == ids[itself]
        near |= known & ~itself & (away[:, nth] <= distance)
    return near
