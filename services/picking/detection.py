"""Picks as detections: curves over the threshold, figures of each class, errors of orientations, matching by volume.

A curve needs each pick's match at every threshold, so picks are matched here in the order of falling scores: each takes
the nearest true particle that is still free, within the distance, as in the benchmarks of object detection (Everingham
et al., Int. J. Comput. Vis. 88 (2010) 303). The average precision is the area under precision over recall as it is,
without interpolation: the mean, over all true particles, of the precision at the pick that found each (0 for those not
found). Picks of equal scores count together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import angular_distance_degrees

Points = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Points of a curve that are kept.
CURVE_POINTS = 200


@dataclass(frozen=True, eq=False)
class Curve:
    """Figures at falling thresholds, each a score of some pick.

    Attributes:
        thresholds, precision, recall: float64 `[n]`.
        false_positives: int64 `[n]`.
        average_precision: area under precision over recall.
        best_f1, best_threshold: where F1 is largest.
    """

    thresholds: Points
    precision: Points
    recall: Points
    false_positives: Indices
    average_precision: float
    best_f1: float
    best_threshold: float

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, thinned out to `CURVE_POINTS`."""
        kept = np.unique(np.linspace(0, len(self.thresholds) - 1, min(CURVE_POINTS, len(self.thresholds))).astype(int))
        return {
            "thresholds": self.thresholds[kept].tolist(),
            "precision": self.precision[kept].tolist(),
            "recall": self.recall[kept].tolist(),
            "false_positives": self.false_positives[kept].tolist(),
            "average_precision": self.average_precision,
            "best_f1": self.best_f1,
            "best_threshold": self.best_threshold,
        }


def match_in_order(picks: Points, scores: Points, truth: Points, max_distance: float) -> Indices:
    """For each pick the true particle it finds, -1 where none: strongest first, each the nearest that is free.

    Args:
        picks, truth: float64 `[n, 3]` and `[m, 3]`.
        scores: float64 `[n]`; of equal ones the first pick comes first.
        max_distance: largest distance of a pair, included.
    """
    found = np.full(len(picks), -1)
    if len(picks) == 0 or len(truth) == 0:
        return found
    near = KDTree(truth).query_ball_point(picks, max_distance)
    free = np.ones(len(truth), np.bool_)
    for pick in np.argsort(-scores, kind="stable"):
        candidates = np.array([index for index in near[pick] if free[index]], np.int64)
        if len(candidates):
            distance = np.linalg.norm(truth[candidates] - picks[pick], axis=1)
            found[pick] = candidates[np.lexsort((candidates, distance))[0]]
            free[found[pick]] = False
    return found


def match_by_volume(labels: Indices, scores: Points, ids: Indices) -> Indices:
    """For each pick the true particle in whose volume it lies, -1 where none; the strongest pick has it.

    Args:
        labels: int64 `[n]`, the instance volume at each pick: a particle's id plus 1; 0 outside of all.
        scores: float64 `[n]`.
        ids: int64 `[m]`, the true particles' ids.
    """
    row = {int(particle) + 1: index for index, particle in enumerate(ids)}
    found = np.full(len(labels), -1)
    taken: set[int] = set()
    for pick in np.argsort(-scores, kind="stable"):
        index = row.get(int(labels[pick]), -1)
        if index >= 0 and index not in taken:
            taken.add(index)
            found[pick] = index
    return found


def curve(scores: Points, found: NDArray[np.bool_], truth: int) -> Curve | None:
    """Figures over the threshold; None without picks.

    Args:
        scores: float64 `[n]` of the picks.
        found: bool `[n]`, whether a pick found a true particle.
        truth: number of true particles, at least 1.
    """
    if len(scores) == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(found[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    thresholds, hits, picks = scores[order][last], hits[last], last + 1
    precision, recall = hits / picks, hits / truth
    f1 = 2 * hits / (picks + truth)
    best = int(f1.argmax())
    area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    return Curve(thresholds, precision, recall, picks - hits, area, float(f1[best]), float(thresholds[best]))


def by_class(
    matched: Mapping[str, tuple[int, int]], pick_classes: Sequence[str], truth_classes: Sequence[str]
) -> tuple[list[dict[str, Any]], float]:
    """Figures of each class, and the mean of their F1 over the true classes.

    Args:
        matched: for each class, how many of its picks found a particle of the class, and of how many.
        pick_classes, truth_classes: the class of each pick and each true particle.
    """
    figures = []
    for name in sorted(set(truth_classes) | set(pick_classes)):
        hits = matched.get(name, (0, 0))[0]
        picks, truth = pick_classes.count(name), truth_classes.count(name)
        figures.append(
            {
                "class": name,
                "picks": picks,
                "truth": truth,
                "matched": hits,
                "precision": hits / picks if picks else None,
                "recall": hits / truth if truth else None,
                "f1": 2 * hits / (picks + truth),
            }
        )
    names = set(truth_classes)
    return figures, float(np.mean([figure["f1"] for figure in figures if figure["class"] in names]))


def confusion(found: Indices, pick_classes: Sequence[str], truth_classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often a pick of one class lies at a true particle of each: `[pick's class][true class]`, matched by place
    alone; "none" are picks at no particle.
    """
    table: dict[str, dict[str, int]] = {}
    for pick, index in enumerate(found):
        row = table.setdefault(pick_classes[pick], {})
        name = truth_classes[index] if index >= 0 else "none"
        row[name] = row.get(name, 0) + 1
    return table


def angular_errors(picks: Rotation, truth: Rotation, classes: Sequence[str], symmetries: Mapping[str, str]) -> Points:
    """The angle in degrees between a pick's orientation and the true one, modulo the point group of its class.

    Args:
        picks, truth: of n matched pairs.
        classes: the true class of each.
        symmetries: point group of each class; C1 for those left out.
    """
    errors = np.zeros(len(classes))
    names = np.asarray(classes, np.str_)
    for name in np.unique(names):
        here = np.flatnonzero(names == name)
        errors[here] = angular_distance_degrees(truth[here], picks[here], symmetries.get(str(name), "C1"))
    return errors


def summary(errors: Points) -> dict[str, float] | None:
    """Mean, median and 90th percentile; None without any."""
    if len(errors) == 0:
        return None
    return {
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "percentile_90": float(np.percentile(errors, 90)),
    }
