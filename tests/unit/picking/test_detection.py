"""Curves, classes, confusion, volumes and angles of detections, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sklearn.metrics import average_precision_score

from services.picking import detection


def test_each_pick_takes_the_nearest_free_particle_strongest_first() -> None:
    truth = np.array([[0.0, 0, 0], [10, 0, 0]])
    picks = np.array([[4.0, 0, 0], [1.0, 0, 0], [9.0, 0, 0], [50.0, 0, 0]])
    scores = np.array([0.9, 0.8, 0.7, 0.95])
    assert detection.match_in_order(picks, scores, truth, 6.0).tolist() == [0, -1, 1, -1]
    assert detection.match_in_order(picks, -scores, truth, 6.0).tolist() == [-1, 0, 1, -1]
    assert detection.match_in_order(picks, scores, np.empty((0, 3)), 6.0).tolist() == [-1] * 4


def test_curve_by_hand() -> None:
    curve = detection.curve(np.array([5.0, 4, 3, 2, 1]), np.array([True, False, True, True, False]), 4)
    assert curve is not None
    assert curve.precision == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])
    assert curve.recall == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4, 3 / 4])
    assert curve.false_positives.tolist() == [0, 1, 1, 1, 2]
    assert curve.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 4)
    assert curve.best_f1 == pytest.approx(2 * 3 / (4 + 4))
    assert curve.best_threshold == 2
    assert detection.curve(np.empty(0), np.empty(0, np.bool_), 4) is None


def test_average_precision_is_scikit_learns_where_everything_is_found() -> None:
    rng = np.random.default_rng(0)
    found = rng.random(300) < 0.4
    scores = np.round(rng.normal(found * 1.0, 1), 1)  # with ties
    curve = detection.curve(scores, found, int(found.sum()))
    assert curve is not None
    assert curve.average_precision == pytest.approx(average_precision_score(found, scores))
    assert len(curve.to_dict()["recall"]) <= detection.CURVE_POINTS


def test_volumes_give_each_particle_to_its_strongest_pick() -> None:
    labels, scores = np.array([3, 3, 0, 9, 8]), np.array([0.1, 0.5, 0.9, 0.4, 0.3])
    assert detection.match_by_volume(labels, scores, np.array([2, 7])).tolist() == [-1, 0, -1, -1, 1]


def test_classes_and_confusion() -> None:
    picks, truth = ["a", "a", "b", "c"], ["a", "b", "b"]
    figures, macro = detection.by_class({"a": (1, 2), "b": (1, 1)}, picks, truth)
    by_name = {figure["class"]: figure for figure in figures}
    assert by_name["a"]["precision"] == 1 / 2
    assert by_name["a"]["recall"] == 1
    assert by_name["b"]["f1"] == pytest.approx(2 / 3)
    assert by_name["c"]["recall"] is None
    assert macro == pytest.approx((2 / 3 + 2 / 3) / 2)
    table = detection.confusion(np.array([0, -1, 1, 2]), picks, truth)
    assert table == {"a": {"a": 1, "none": 1}, "b": {"b": 1}, "c": {"b": 1}}


def test_angles_are_modulo_the_symmetry_of_the_class() -> None:
    turn = Rotation.from_rotvec([[0, 0, np.pi / 2], [0, 0, np.pi / 2], [0.1, 0, 0]])
    truth = Rotation.random(3, rng=np.random.default_rng(0))
    errors = detection.angular_errors(truth * turn, truth, ["four", "one", "one"], {"four": "C4"})
    assert errors == pytest.approx([0, 90, np.degrees(0.1)], abs=1e-6)
    summary = detection.summary(errors)
    assert summary is not None
    assert summary["median"] == pytest.approx(np.degrees(0.1))
    assert summary["percentile_90"] == pytest.approx(np.percentile(errors, 90))
    assert detection.summary(np.empty(0)) is None
