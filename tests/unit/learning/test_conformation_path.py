"""Paths through points: along a component, and through the crowd."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import conformation_path
from services.learning.conformation_path import along_component, nearest_counts, principal_components, through_crowd


def test_components() -> None:
    random = np.random.default_rng(0)
    turn, _ = np.linalg.qr(random.standard_normal((3, 3)))
    points = random.standard_normal((4000, 3)) * [3, 1, 0.2] @ turn.T + [5, 6, 7]
    mean, components, shares = principal_components(points)
    np.testing.assert_allclose(np.abs(np.sum(components * turn.T, axis=1)), 1, atol=1e-3)
    np.testing.assert_allclose(shares, np.array([9, 1, 0.04]) / 10.04, rtol=0.1)
    assert (components[np.arange(3), np.abs(components).argmax(1)] > 0).all()
    for number in (1, 2, 3):
        path = along_component(points, number, 7)
        places = (path - mean) @ components[number - 1]
        np.testing.assert_allclose(np.diff(places), np.diff(places)[0], rtol=1e-6)
        scores = (points - mean) @ components[number - 1]
        assert (scores < places[0]).mean() == pytest.approx(0.05, abs=0.001)
        assert (scores > places[-1]).mean() == pytest.approx(0.05, abs=0.001)
    with pytest.raises(InvalidArgument, match="component is 4; the space has 3 dimensions"):
        along_component(points, 4, 5)
    with pytest.raises(FailedPrecondition, match="all points are the same"):
        along_component(np.ones((9, 2)), 1, 5)
    assert along_component(points[:2], 1, 5).shape == (5, 3), "fewer points than dimensions"


def test_through_the_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points on a horseshoe: the way leads around it, not across."""
    random = np.random.default_rng(0)
    angles = np.sort(random.uniform(0, 1.5 * np.pi, 400))
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 0.01 * random.standard_normal((400, 2))
    path = through_crowd(points, [0, 399], 20)
    np.testing.assert_array_equal(path[[0, -1]], points[[0, 399]])
    assert (np.abs(np.hypot(*path.T) - 1) < 0.1).all()
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(lengths, lengths.mean(), rtol=0.1)
    assert lengths.sum() == pytest.approx(1.5 * np.pi, rel=0.05)
    # There and back, through a waypoint.
    back = through_crowd(points, [100, 300, 100], 21)
    np.testing.assert_allclose(back[10], points[300], atol=0.1)
    np.testing.assert_array_equal(back[[0, -1]], points[[100, 100]])
    counts = nearest_counts(points, path)
    assert counts.sum() == 400
    assert counts.min() > 0
    apart = np.concatenate([points, points + 100])
    assert through_crowd(apart, [0, 500], 5).shape == (5, 2), "across the gap where there is no other way"
    monkeypatch.setattr(conformation_path, "MAX_EDGES", 20 * 800)
    with pytest.raises(FailedPrecondition, match="among the 20 nearest of one another: they lie in crowds apart"):
        through_crowd(apart, [0, 500], 5)
    with pytest.raises(InvalidArgument, match="two particles at least"):
        through_crowd(points, [3], 5)


def test_points_that_coincide() -> None:
    points = np.repeat([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], 4, axis=0)
    path = through_crowd(points, [0, 11], 5)
    np.testing.assert_allclose(path[:, 0], [0, 0.5, 1, 1.5, 2], atol=1e-9)
    assert through_crowd(points, [2, 2], 3).tolist() == [[0, 0]] * 3
