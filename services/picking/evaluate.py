"""How good picks are: precision, recall and F1 by one-to-one matching with the truth within a distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress

#: More pairs within the distance than this mean a distance far above the particles' spacing, and too much memory.
MAX_PAIRS = 20_000_000
#: A point with its share of the trees, and a pair with its share of the graph.
POINT_BYTES, PAIR_BYTES = 200, 150
#: Groups of up to so many pick-truth combinations are solved as dense matrices, larger ones as sparse graphs.
DENSE_COMBINATIONS = 1_000_000

Points = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Matching:
    """Pairs of a pick and a true particle: their indices, and the distance of each pair."""

    picks: Indices
    truth: Indices
    distances: Points


@dataclass(frozen=True)
class ClassScore:
    """How many of the true particles of a class were found."""

    name: str
    truth: int
    matched: int

    @property
    def recall(self) -> float:
        return self.matched / self.truth


@dataclass(frozen=True)
class Evaluation:
    """The figures of a set of picks. Without picks precision, recall and F1 are 0."""

    distance_angstrom: float | None
    picks: int
    truth: int
    matching: Matching
    classes: tuple[ClassScore, ...]

    @property
    def matched(self) -> int:
        return len(self.matching.picks)

    @property
    def precision(self) -> float:
        return self.matched / self.picks if self.picks else 0.0

    @property
    def recall(self) -> float:
        return self.matched / self.truth

    @property
    def f1(self) -> float:
        return 2 * self.matched / (self.picks + self.truth)

    def to_dict(self) -> dict[str, object]:
        """As a JSON object; the distances of the matches are null where there are none."""
        distances = self.matching.distances
        found = len(distances) > 0
        return {
            "distance_angstrom": self.distance_angstrom,
            "picks": self.picks,
            "truth": self.truth,
            "matched": self.matched,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "matched_distance_angstrom": {
                "mean": float(distances.mean()) if found else None,
                "median": float(np.median(distances)) if found else None,
                "max": float(distances.max()) if found else None,
            },
            "classes": [
                {"class": score.name, "truth": score.truth, "matched": score.matched, "recall": score.recall}
                for score in self.classes
            ],
        }


def memory_bytes(points: int) -> int:
    """What `match` takes at most for so many points in all, with up to ten pairs to a point."""
    return points * (POINT_BYTES + 10 * PAIR_BYTES) + 32 * DENSE_COMBINATIONS


def evaluate(
    picks_angstrom: Points,
    truth_angstrom: Points,
    distance_angstrom: float,
    truth_classes: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Compare picks with the truth.

    Args:
        picks_angstrom, truth_angstrom: float64 `[n, 3]`, positions in Å with one origin.
        distance_angstrom: a pick at most so far from a true particle can be its match.
        truth_classes: the class of each true particle.
        progress: told how far the work is.

    Raises:
        FailedPrecondition: no true particles.
        InvalidArgument: a distance so large that nearly everything matches nearly everything.
    """
    if len(truth_angstrom) == 0:
        raise FailedPrecondition("there are no true particles to compare the picks with")
    matching = match(picks_angstrom, truth_angstrom, distance_angstrom, progress)
    return of_matching(matching, len(picks_angstrom), len(truth_angstrom), truth_classes, distance_angstrom)


def of_matching(
    matching: Matching,
    picks: int,
    truth: int,
    truth_classes: Sequence[str] | None = None,
    distance_angstrom: float | None = None,
) -> Evaluation:
    """The figures of picks and true particles, so many of each, that were matched by whatever rule."""
    classes: list[ClassScore] = []
    if truth_classes is not None:
        names = np.asarray(truth_classes, dtype=np.str_)
        found = np.zeros(len(names), np.bool_)
        found[matching.truth] = True
        for name in np.unique(names):
            members = names == name
            classes.append(ClassScore(str(name), int(members.sum()), int(found[members].sum())))
    return Evaluation(distance_angstrom, picks, truth, matching, tuple(classes))


def match(picks: Points, truth: Points, max_distance: float, progress: Progress = no_progress) -> Matching:
    """The largest one-to-one matching of points within a distance of each other, and of all such that of least summed
    distance.

    Points that no chain of neighbours joins can't compete for a match, so each connected group is an assignment
    problem of its own.

    Args:
        picks, truth: float64 `[n, 3]` and `[m, 3]`.
        max_distance: largest distance of a pair, included.
        progress: told how far the work is.

    Returns:
        The pairs, in the order of the picks.
    """
    if len(picks) == 0 or len(truth) == 0:
        nothing = np.empty(0, np.int64)
        return Matching(nothing, nothing, np.empty(0))
    pick_tree, truth_tree = KDTree(picks), KDTree(truth)
    pairs = int(pick_tree.count_neighbors(truth_tree, max_distance))
    if pairs > MAX_PAIRS:
        raise InvalidArgument(
            f"a distance of {max_distance:g} pairs {len(picks)} picks and {len(truth)} true particles in {pairs} ways: "
            "use one of about a particle's radius"
        )
    near = pick_tree.sparse_distance_matrix(truth_tree, max_distance, output_type="ndarray")
    pick, true, distance = near["i"], near["j"], near["v"]
    taken = np.zeros(len(pick), np.bool_)
    done = 0
    for edges in _groups(pick, true, len(picks), len(truth)):
        taken[edges[_assign(pick[edges], true[edges], distance[edges] / max_distance)]] = True
        done += len(edges)
        progress(done / pairs, "matching picks and truth", pairs=done)
    # an edge that shares neither of its points needs no choice
    taken |= (np.bincount(pick, minlength=len(picks))[pick] == 1) & (np.bincount(true, minlength=len(truth))[true] == 1)
    order = np.flatnonzero(taken)[np.argsort(pick[taken])]
    return Matching(pick[order], true[order], distance[order])


def _groups(picks: Indices, truth: Indices, pick_count: int, truth_count: int) -> Iterator[Indices]:
    """The edges of a bipartite graph, one connected component of more than one edge at a time, by their indices."""
    if len(picks) == 0:
        return
    nodes = pick_count + truth_count
    graph = coo_array((np.ones(len(picks), np.int8), (picks, truth + pick_count)), shape=(nodes, nodes))
    labels = connected_components(graph, directed=False)[1][picks]
    order = np.argsort(labels, kind="stable")
    for edges in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(edges) > 1:
            yield edges


def _assign(picks: Indices, truth: Indices, costs: Points) -> Indices:
    """Which edges of a connected group to take; `costs` are 0 to 1.

    An edge that is not there costs more than all that are could together, so that as few as possible of those are
    taken: the matching is the largest there is.
    """
    pick_ids, row = np.unique(picks, return_inverse=True)
    truth_ids, column = np.unique(truth, return_inverse=True)
    absent = min(len(pick_ids), len(truth_ids)) + 1.0
    if len(pick_ids) * len(truth_ids) <= DENSE_COMBINATIONS:
        matrix = np.full((len(pick_ids), len(truth_ids)), absent)
        matrix[row, column] = costs
        rows, columns = linear_sum_assignment(matrix)
        assigned = np.full(len(pick_ids), -1)
        assigned[rows] = columns
    else:
        # every pick may also take a partner of its own, at the price of an absent edge; the solver drops weights of
        # 0, hence + 1
        own = np.arange(len(pick_ids))
        weights = np.concatenate([costs, np.full(len(own), absent)]) + 1
        places = (np.concatenate([row, own]), np.concatenate([column, len(truth_ids) + own]))
        graph = coo_array((weights, places), shape=(len(own), len(truth_ids) + len(own))).tocsr()
        assigned = min_weight_full_bipartite_matching(graph)[1]
    return np.flatnonzero(assigned[row] == column)
