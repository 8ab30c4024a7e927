"""Clusters among the scores of particles, and how many of them there is evidence for.

Ward's hierarchical clustering joins, step by step, the two clusters whose union costs the least variance. Its tree is
cut at the number of clusters asked for; or it is gone through from the top, and a cluster parted in two as its own
scatter calls for it, by the gap statistic (Tibshirani, Walther & Hastie, J. R. Stat. Soc. B 63 (2001) 411): by how much
the scatter within k parts, log W_k, falls below that of points without any parts, drawn uniformly from the box along
the cluster's own principal axes. One cluster is a possible answer, and the answer where there is no evidence for more.

Each cluster is judged by itself, since a comparison of all cuts of the tree with one box parts tight clusters that are
longer along one axis over and over. Scores spread evenly along one axis, as a continuous motion makes them, may be
taken for several clusters.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from cryofleet.errors import InvalidArgument

EVIDENCE = 1.5
"""A cluster is parted where the best gap of its parts exceeds its own by so many standard errors."""
PARTS = 4
"""So many parts of a cluster are looked at, in case that three or four of them show and two of them don't."""
LEAST = 8
"""Clusters of fewer points are not parted."""
TREE_PARTICLES = 1500
"""The tree, whose memory grows with the square of its leaves, is made of so many particles at most; others join the
nearest centre."""


@dataclass(frozen=True)
class Test:
    """Whether a cluster of `size` was parted: `gap` and its standard `error` for 1, 2, .. parts."""

    size: int
    parted: bool
    gap: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class Clusters:
    """`labels` (particles,) from 0 by falling size; `sizes` (k,); `centres` (k, components); the `tests` by which their
    number was found, none where it was given.
    """

    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    centres: NDArray[np.float64]
    tests: tuple[Test, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def table(self) -> dict[str, object]:
        """As the JSON table that is stored."""
        return {
            "criterion": "gap statistic of Ward's clusters" if self.tests else "given",
            "sizes": self.sizes.tolist(),
            "tests": [
                {"size": t.size, "parted": t.parted, "gap": list(t.gap), "standard_error": list(t.error)}
                for t in self.tests
            ],
        }


def cluster(
    scores: NDArray[np.floating],
    count: int | None = None,
    *,
    largest: int = 8,
    draws: int = 20,
    seed: int = 0,
) -> Clusters:
    """Cluster `scores` (particles, components) into `count` clusters, or into as many as the gap statistic finds.

    Then a cluster is parted in two where the best gap of 2 to `PARTS` parts exceeds that of the whole by more than
    `EVIDENCE` standard errors, `draws` sets being drawn for comparison; and its parts in turn, the most scattered
    first, until there are `largest`.

    The tree is made of `TREE_PARTICLES` particles at most, drawn at random, as its memory grows with their square; the
    others go to the nearest centre. Where points coincide there may be fewer clusters than asked for.

    Raises InvalidArgument for scores that are not finite or of no particle, or more clusters than particles.
    """
    points = np.asarray(scores, dtype=np.float64)
    if points.ndim != 2 or points.size == 0:
        raise InvalidArgument(f"scores are {points.shape}: (particles, components) are expected, at least one of each")
    if not np.isfinite(points).all():
        raise InvalidArgument("the scores hold values that are not finite (NaN or infinity)")
    if count is not None and not 1 <= count <= len(points):
        raise InvalidArgument(f"{count} clusters of {len(points)} particles: 1 to {len(points)} are possible")
    if largest < 1:
        raise InvalidArgument(f"at most {largest} clusters: must be at least 1")
    rng = np.random.default_rng(seed)
    part = np.sort(rng.permutation(len(points))[:TREE_PARTICLES])
    if count is None:
        labels, tests = _parted(points[part], largest, draws, rng)
        return _clusters(points, part, labels, tests)
    return _clusters(points, part, _cut(_tree(points[part]), min(count, len(part))), ())


def _parted(
    points: NDArray[np.float64], largest: int, draws: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], tuple[Test, ...]]:
    """Labels of the points, and the tests of all clusters that were looked at, the most scattered first."""
    every = np.arange(len(points))
    # A cluster's part of Ward's tree is the tree of its own points.
    waiting = [(every, _tree(points))]
    whole: list[NDArray[np.int64]] = []
    tests: list[Test] = []
    while waiting and len(waiting) + len(whole) < largest:
        waiting.sort(key=lambda node: -float(node[1][-1, 2]) if len(node[1]) else 0.0)
        rows, tree = waiting.pop(0)
        if len(rows) < LEAST:
            whole.append(rows)
            continue
        gap, error = _gap(points[rows], tree, draws, rng)
        best = int(gap.argmax())
        parted = bool(gap[best] - gap[0] > EVIDENCE * error[best])
        tests.append(Test(len(rows), parted, tuple(gap.tolist()), tuple(error.tolist())))
        if not parted:
            whole.append(rows)
            continue
        side = _cut(tree, 2)
        waiting += [(rows[side == k], _tree(points[rows[side == k]])) for k in range(int(side.max()) + 1)]
    labels = np.zeros(len(points), dtype=np.int64)
    for k, rows in enumerate([*whole, *(rows for rows, _ in waiting)]):
        labels[rows] = k
    return labels, tuple(tests)


def _tree(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ward's tree; of a single point, none."""
    return linkage(points, "ward") if len(points) > 1 else np.empty((0, 4))


def _cut(tree: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    if count == 1:
        return np.zeros(len(tree) + 1, dtype=np.int64)
    return np.asarray(fcluster(tree, count, "maxclust"), dtype=np.int64) - 1


def _scatter(tree: NDArray[np.float64]) -> NDArray[np.float64]:
    """log W_k of 1, 2, .. parts: half the sum of the squared heights of the joins below the cut."""
    joined = np.concatenate([[0.0], np.cumsum(tree[:, 2] ** 2)]) / 2
    total = joined[::-1][:PARTS]
    # Points that coincide leave no scatter at all.
    return np.asarray(np.log(np.maximum(total, 1e-12 * max(float(joined[-1]), 1e-300))), dtype=np.float64)


def _gap(
    points: NDArray[np.float64], tree: NDArray[np.float64], draws: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The gap of each number of parts, and its standard error."""
    centred = points - points.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    low, high = along.min(axis=0), along.max(axis=0)
    drawn = np.array([_scatter(_tree(rng.uniform(low, high, along.shape))) for _ in range(draws)])
    return drawn.mean(axis=0) - _scatter(tree), drawn.std(axis=0) * math.sqrt(1 + 1 / draws)


def _clusters(
    points: NDArray[np.float64], part: NDArray[np.int64], labels: NDArray[np.int64], tests: tuple[Test, ...]
) -> Clusters:
    """The clusters of all points, the largest first, from the labels of some."""
    centres = np.stack([points[part[labels == c]].mean(axis=0) for c in range(int(labels.max()) + 1)])
    every = np.empty(len(points), dtype=np.int64)
    every[part] = labels
    others = np.setdiff1d(np.arange(len(points)), part)
    for rows in np.array_split(others, max(1, len(others) // 1024)):
        every[rows] = ((points[rows, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    sizes = np.bincount(every, minlength=len(centres))
    order = np.argsort(-sizes, kind="stable")
    return Clusters(np.argsort(order)[every], sizes[order], centres[order], tests)


def adjusted_rand_index(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """How far two partitions of the same particles agree: 1 the same, 0 as by chance (Hubert & Arabie, 1985)."""
    if len(first) != len(second):
        raise InvalidArgument(f"partitions of {len(first)} and {len(second)} particles can't be compared")
    a, b = np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    table = np.zeros((a.max(initial=0) + 1, b.max(initial=0) + 1))
    np.add.at(table, (a, b), 1.0)

    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / max(pairs(np.array([float(len(a))])), 1.0)
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)
