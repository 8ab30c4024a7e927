"""Classes and clusters against true classes."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from services.learning.class_comparison import compare, match_rows, unseen_area_under_roc


def test_clusters_are_matched_so_that_most_particles_agree() -> None:
    # A greedy choice would take cluster 0 for class 5 and leave class 6 nothing.
    truth = np.repeat([5, 6], [6, 5])
    found = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    result = compare(found, truth)
    assert result.true_names == ("5", "6")
    assert result.table.tolist() == [[3, 3], [5, 0]]
    assert result.matched == (1, 0)
    assert result.accuracy == pytest.approx(8 / 11)
    assert result.purity == pytest.approx((5 + 3) / 11)
    assert result.recall == pytest.approx([3 / 6, 1])
    assert result.precision == pytest.approx([1, 5 / 8])


def test_classes_of_one_name_are_the_same_whatever_their_numbers() -> None:
    truth, found = np.array([1, 1, 2, 2]), np.array([2, 2, 1, 2])
    named = compare(found, truth, ["a", "a", "b", "a"], ["a", "a", "b", "b"])
    assert named.accuracy == 0.75
    # By their names these are wrong, though a matching would have them right.
    assert compare(found, truth, ["b", "b", "a", "b"], ["a", "a", "b", "b"]).accuracy == 0.25
    # A class without a name goes by its number.
    assert compare(found, truth, ["1", "1", "2", "1"], None).accuracy == 0.75


def test_classes_of_other_names_are_matched_to_what_is_left() -> None:
    truth = np.repeat([0, 1, 2], 4)
    found_names = ["a"] * 4 + ["unseen-1"] * 3 + ["a"] + ["unseen-2"] * 4
    found = np.repeat([0, 7, 0, 8], [4, 3, 1, 4])
    result = compare(found, truth, found_names, ["a"] * 4 + ["b"] * 4 + ["c"] * 4)
    assert result.found_names == ("a", "unseen-1", "unseen-2")
    assert result.matched == (0, 1, 2)
    assert result.accuracy == pytest.approx(11 / 12)


def test_more_clusters_than_classes_leave_some_that_agree_with_none() -> None:
    truth = np.zeros(6, np.int64)
    result = compare(np.array([0, 0, 0, 1, 1, 2]), truth)
    assert result.matched == (0, -1, -1)
    assert result.accuracy == 0.5
    assert result.purity == 1.0


def test_information_and_rand_index_do_not_depend_on_numbers() -> None:
    truth = np.repeat([0, 1, 2], 10)
    same = compare((truth + 1) % 3, truth)
    assert (same.normalised_mutual_information, same.adjusted_rand_index, same.accuracy) == pytest.approx((1, 1, 1))
    # One cluster tells nothing.
    one = compare(np.zeros(30, np.int64), truth)
    assert (one.normalised_mutual_information, one.adjusted_rand_index) == pytest.approx((0, 0))
    # Two classes in halves over two clusters of four each: H = ln 2 of both, and no information in common.
    crossed = compare(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert crossed.normalised_mutual_information == pytest.approx(0, abs=1e-9)
    # Hubert & Arabie: (0 - 2 * 2 / 6) / (2 - 2 * 2 / 6) pairs.
    assert crossed.adjusted_rand_index == pytest.approx(-0.5)


def test_particles_are_the_same_by_id_and_tomogram() -> None:
    found, truth = np.array([7, 3]), np.array([3, 5, 7])
    assert match_rows(found, truth).tolist() == [2, 0]
    twice, names = np.array([1, 1]), ["a", "b"]
    assert match_rows(twice, twice, names, ["b", "a"]).tolist() == [1, 0]
    with pytest.raises(InvalidArgument, match="truth has no particle 4, and lacks 1 of 2"):
        match_rows(np.array([3, 4]), truth)
    with pytest.raises(InvalidArgument, match="particles: particle 1 is there more than once"):
        match_rows(twice, truth)
    with pytest.raises(InvalidArgument, match="truth has no particle 1 of c"):
        match_rows(twice, twice, ["a", "c"], names)
    with pytest.raises(InvalidArgument, match="no particle"):
        compare(np.array([], np.int64), np.array([], np.int64))


def test_area_under_roc_by_hand() -> None:
    # Pairs of an unseen and a seen particle where the seen one's score is the higher: 3 of 4.
    scores, truth = np.array([0.9, 0.5, 0.6, 0.1]), np.array([1, 2, 3, 3])
    assert unseen_area_under_roc(scores, truth, [1, 2]) == pytest.approx(3 / 4)
    for known in ([1, 2, 3], [9]):
        with pytest.raises(InvalidArgument, match="known_classes"):
            unseen_area_under_roc(scores, truth, known)
