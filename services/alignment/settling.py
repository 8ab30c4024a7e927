"""Which classes of a mining last: clusters and classes that are large enough, and how two sortings of the same
particles differ.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

UNASSIGNED = -1
"""The label of particles in no class."""


def large_enough(labels: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Clusters of at least `least` particles each, numbered from 0, the largest first.

    Smaller ones, and the particles in none (negative labels), are put together; where these are too few still, they
    join the smallest of the others. One cluster of all particles may be smaller.
    """
    names, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    alone = (sizes >= least) & (names >= 0)
    together = np.where(alone, np.arange(len(names)), len(names))[places]
    rest = int((together == len(names)).sum())
    if 0 < rest < least and alone.any():
        kept = np.flatnonzero(alone)
        smallest = kept[np.argmin(sizes[kept])]
        together[together == len(names)] = smallest
    return by_size(together)


def by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same classes numbered from 0 by falling size, of two of one size that of the lower number first; negative
    labels stay.
    """
    kept = labels >= 0
    names, places, sizes = np.unique(labels[kept], return_inverse=True, return_counts=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(names))
    result = np.full(len(labels), UNASSIGNED, dtype=np.int64)
    result[kept] = rank[places]
    return result


def even_halves(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Half set 0 or 1 of each particle, at random, even in each cluster."""
    rng = np.random.default_rng([seed, 1])
    halves = np.empty(len(labels), dtype=np.int64)
    first = 0
    for name in np.unique(labels):
        mine = np.flatnonzero(labels == name)
        halves[rng.permutation(mine)] = (first + np.arange(len(mine))) % 2
        first += len(mine)
    return halves


def dissolved(labels: NDArray[np.int64], halves: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Labels without classes of fewer than `least` particles, and without those that hold none of a half set, 0 or 1;
    the rest numbered as by `by_size`.
    """
    result = labels.copy()
    for name in np.unique(labels[labels >= 0]):
        mine = labels == name
        if mine.sum() < least or len(np.unique(halves[mine])) < 2:
            result[mine] = UNASSIGNED
    return by_size(result)


def changed(before: NDArray[np.int64], after: NDArray[np.int64]) -> int:
    """Particles whose class is another than before, classes paired so that these are fewest; classes without a
    partner are others, and being in no class (negative) is like no class.
    """
    both = (before >= 0) & (after >= 0)
    shared = np.zeros((before.max(initial=-1) + 1, after.max(initial=-1) + 1), dtype=np.int64)
    np.add.at(shared, (before[both], after[both]), 1)
    pairs = linear_sum_assignment(shared, maximize=True)
    stay = int(shared[pairs].sum()) + int(((before < 0) & (after < 0)).sum())
    return len(before) - stay
