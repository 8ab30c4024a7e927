from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.picking.evaluate import evaluate, match

Points = NDArray[np.float64]


def brute_force(picks: Points, truth: Points, limit: float) -> tuple[int, float]:
    """The best (number, -summed distance) over all one-to-one matchings, by trying every partner for every pick."""

    def best(pick: int, free: frozenset[int]) -> tuple[int, float]:
        if pick == len(picks):
            return 0, 0.0
        found = best(pick + 1, free)
        for true in free:
            distance = float(np.linalg.norm(picks[pick] - truth[true]))
            if distance <= limit:
                number, total = best(pick + 1, free - {true})
                found = max(found, (number + 1, total - distance))
        return found

    return best(0, frozenset(range(len(truth))))


points = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=6).map(
    lambda rows: np.array(rows, float).reshape(-1, 3)
)


@pytest.mark.parametrize("dense", [0, 1_000_000])
@settings(max_examples=80, deadline=None)
@given(picks=points, truth=points, limit=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]))
def test_the_matching_is_the_largest_and_then_the_closest(
    dense: int, picks: Points, truth: Points, limit: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.picking.evaluate.DENSE_COMBINATIONS", dense)
        matching = match(picks, truth, limit)
    number, total = brute_force(picks, truth, limit)
    assert len(matching.picks) == number
    assert matching.distances.sum() == pytest.approx(-total, abs=1e-9)
    assert len({*matching.picks.tolist()}) == len({*matching.truth.tolist()}) == number
    distances = np.linalg.norm(picks[matching.picks] - truth[matching.truth], axis=1)
    np.testing.assert_allclose(matching.distances, distances)
    assert (distances <= limit).all()


def test_a_greedy_matching_would_lose_one() -> None:
    # the middle pick is nearest to the right one, which the last can reach alone
    picks = np.array([[0.0, 0, 0], [10, 0, 0]])
    truth = np.array([[-5.0, 0, 0], [4, 0, 0]])
    matching = match(picks, truth, 6.0)
    assert matching.picks.tolist() == [0, 1]
    assert matching.truth.tolist() == [0, 1]


def test_the_distance_is_included_and_a_pick_on_the_spot_counts() -> None:
    truth = np.array([[0.0, 0, 0], [100, 0, 0], [200, 0, 0]])
    picks = np.array([[100.0, 3, 4], [0, 0, 0], [200, 0, 5.001]])
    matching = match(picks, truth, 5.0)
    assert matching.picks.tolist() == [0, 1]
    assert matching.truth.tolist() == [1, 0]
    assert matching.distances.tolist() == [5.0, 0.0]


def test_many_points_are_matched_group_by_group() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 2000, (20_000, 3))
    picks = np.concatenate([truth[:15_000] + rng.uniform(-2, 2, (15_000, 3)), rng.uniform(3000, 4000, (500, 3))])
    evaluation = evaluate(picks, truth, 10.0)
    # each of the 15,000 has a partner within 2 sqrt(3), so the largest matching has them all
    assert evaluation.matched == 15_000
    assert evaluation.recall == 0.75
    assert evaluation.precision == 15_000 / 15_500


def test_figures_and_classes() -> None:
    truth = np.array([[0.0, 0, 0], [50, 0, 0], [100, 0, 0], [150, 0, 0]])
    picks = np.array([[1.0, 0, 0], [53, 0, 0], [75, 0, 0], [400, 0, 0], [500, 0, 0]])
    figures = evaluate(picks, truth, 5.0, ["ribosome", "ring", "ring", "ribosome"])
    assert (figures.matched, figures.picks, figures.truth) == (2, 5, 4)
    assert figures.precision == 0.4
    assert figures.recall == 0.5
    assert figures.f1 == pytest.approx(2 * 0.4 * 0.5 / 0.9)
    content = json.loads(json.dumps(figures.to_dict(), allow_nan=False))
    assert content["classes"] == [
        {"class": "ribosome", "truth": 2, "matched": 1, "recall": 0.5},
        {"class": "ring", "truth": 2, "matched": 1, "recall": 0.5},
    ]
    assert content["matched_distance_angstrom"] == {"mean": 2.0, "median": 2.0, "max": 3.0}


def test_without_picks_all_figures_are_zero() -> None:
    figures = evaluate(np.empty((0, 3)), np.zeros((3, 3)), 5.0, ["a", "a", "b"])
    assert (figures.precision, figures.recall, figures.f1, figures.matched) == (0, 0, 0, 0)
    assert [score.recall for score in figures.classes] == [0, 0]
    assert "NaN" not in json.dumps(figures.to_dict())


def test_without_truth_there_is_nothing_to_say() -> None:
    with pytest.raises(FailedPrecondition, match="no true particles"):
        evaluate(np.zeros((3, 3)), np.empty((0, 3)), 5.0)


def test_a_distance_that_pairs_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.picking.evaluate.MAX_PAIRS", 99)
    cloud = np.random.default_rng(0).uniform(0, 10, (10, 3))
    with pytest.raises(InvalidArgument, match="100 ways"):
        match(cloud, cloud, 100.0)
