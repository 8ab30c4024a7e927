"""Enrichment against enumeration, closed forms, and what was planted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from cryofleet.errors import FailedPrecondition
from services.learning import enrichment as enriching
from services.learning.enrichment import enrichment, near_points


def test_the_p_value_of_one_tomogram_is_the_share_of_all_shuffles() -> None:
    near = np.array([1, 1, 0, 0, 1, 0, 0, 0], bool)
    classes = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    found = {each.number: each for each in enrichment(near, classes, np.zeros(8, np.int64))}
    shuffles = [near[list(members)].sum() for members in itertools.combinations(range(8), 3)]
    assert found[0].p_value == pytest.approx(np.mean(np.array(shuffles) >= 2))
    assert found[0].ratio == pytest.approx((2 / 3) / (3 / 8))
    assert found[1].ratio == pytest.approx((1 / 5) / (3 / 8))
    assert found[0].expected == pytest.approx(3 * 3 / 8)


def test_the_p_value_of_several_tomograms_is_that_of_shuffles_within_each() -> None:
    near = np.array([1, 1, 0, 0, 0, 1, 0, 0, 1], bool)
    tomograms = np.array([7, 7, 7, 7, 7, 3, 3, 3, 3])
    classes = np.array([4, 4, 0, 0, 0, 4, 0, 0, 0])
    counts = [
        near[list(one)].sum() + near[5 + other] for one in itertools.combinations(range(5), 2) for other in range(4)
    ]
    found = {each.number: each for each in enrichment(near, classes, tomograms)}
    assert found[4].near == 3
    assert found[4].p_value == pytest.approx(np.mean(np.array(counts) >= 3))
    assert found[4].expected == pytest.approx(2 * 2 / 5 + 1 * 2 / 4)
    assert found[4].ratio == pytest.approx(3 / found[4].expected)


def test_the_convolution_keeps_small_tails() -> None:
    # Halves that are alike: the convolution's tail is the sum over how a count divides between them.
    total, close, sizes = np.array([3000, 3000]), np.array([300, 300]), np.array([200, 200])
    one = stats.hypergeom(3000, 300, 200)
    numbers = np.arange(201)
    expected = sum(one.pmf(k) * one.sf(99 - k) for k in numbers)
    assert expected < 1e-15
    assert enriching._at_least(100, total, close, sizes) == pytest.approx(expected, rel=1e-6)


def test_a_planted_enrichment_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, 4000)
    near = rng.random(4000) < np.where(classes == 3, 0.3, 0.1)
    found = enrichment(near, classes, rng.integers(0, 3, 4000))
    assert found[0].number == 3
    share = (near & (classes == 3)).sum() / (classes == 3).sum()
    assert found[0].ratio == pytest.approx(share / near.mean(), rel=0.03)
    assert found[0].corrected_p_value < 1e-10
    low, high = found[0].interval
    assert low < found[0].ratio < high
    # The planted ratio: 0.3 over the mean of 0.3 and four times 0.1.
    assert low < 0.3 / 0.14 < high
    assert all(each.corrected_p_value > 0.05 for each in found[1:])


def test_intervals_are_the_exact_binomial_ones() -> None:
    for count, size in ((0, 9), (3, 9), (9, 9), (40, 500)):
        expected = stats.binomtest(count, size).proportion_ci(0.95, method="exact")
        assert enriching._share_interval(count, size) == pytest.approx((expected.low, expected.high))


def test_corrected_p_values_are_benjamini_and_hochbergs() -> None:
    rng = np.random.default_rng(2)
    found = enrichment(rng.random(500) < 0.2, rng.integers(0, 6, 500), np.zeros(500, np.int64))
    raw = np.sort([each.p_value for each in found])
    by_hand = np.minimum.accumulate((raw * 6 / np.arange(1, 7))[::-1])[::-1].clip(max=1)
    assert np.sort([each.corrected_p_value for each in found]) == pytest.approx(by_hand)


def test_nothing_near_or_nothing_at_all_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="no particle lies near"):
        enrichment(np.zeros(3, bool), np.zeros(3, np.int64), np.zeros(3, np.int64))
    with pytest.raises(FailedPrecondition, match="no particles with a class"):
        enrichment(np.zeros(0, bool), np.zeros(0, np.int64), np.zeros(0, np.int64))


def test_a_class_of_a_tomogram_without_targets_says_nothing() -> None:
    near, tomograms = np.array([1, 0, 0, 0], bool), np.array([0, 0, 1, 1])
    found = {each.number: each for each in enrichment(near, np.array([0, 0, 1, 1]), tomograms)}
    assert (found[1].ratio, found[1].p_value, found[1].expected) == (1.0, 1.0, 0.0)


def test_no_particle_is_near_itself_but_near_its_twin() -> None:
    positions = np.array([[0.0, 0, 0], [50, 0, 0], [50, 0, 0], [200, 0, 0], [290, 0, 0]])
    ids = np.array([1, 2, 3, 4, 5])
    assert near_points(positions, ids, positions, ids, 49.9).tolist() == [False, True, True, False, False]
    assert near_points(positions, ids, positions, ids, 50.0).tolist() == [True, True, True, False, False]
    # The same ids in other places are other particles, and so are other ids in the same place.
    assert near_points(positions, ids, positions + np.array([1, 0, 0]), ids, 5).all()
    assert near_points(positions, ids, positions, ids + 10, 5).all()
    assert near_points(positions, ids, positions[:1], ids[:1], 60).tolist() == [False, True, True, False, False]
    assert not near_points(positions, ids, positions[:0], ids[:0], 60).any()
