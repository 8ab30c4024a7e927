"""Which classes last, and how many particles changed theirs."""

import numpy as np

from services.alignment.settling import changed, dissolved, even_halves, large_enough


def test_small_clusters_are_put_together() -> None:
    labels = np.repeat([5, 2, 7, 9], [10, 30, 4, 6])
    found = large_enough(labels, 10)
    # 7 and 9 are ten together, as many as 5 has; of two of one size that of the lower number is first.
    assert found.tolist() == np.repeat([1, 0, 2, 2], [10, 30, 4, 6]).tolist()


def test_too_few_left_over_join_the_smallest_cluster() -> None:
    labels = np.repeat([0, 1, 2, -1], [30, 12, 3, 2])
    assert large_enough(labels, 10).tolist() == np.repeat([0, 1, 1, 1], [30, 12, 3, 2]).tolist()


def test_few_particles_are_one_cluster() -> None:
    assert large_enough(np.array([0, 0, 1, 2]), 10).tolist() == [0, 0, 0, 0]


def test_half_sets_are_even_in_each_cluster_and_of_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [7, 9, 4])
    halves = even_halves(labels, 3)
    assert halves.sum() == 10
    for k in range(3):
        mine = halves[labels == k]
        assert abs(2 * mine.sum() - len(mine)) <= 1
    assert (halves == even_halves(labels, 3)).all()
    assert (halves != even_halves(labels, 4)).any()


def test_classes_too_small_and_those_of_one_half_set_are_dissolved() -> None:
    labels = np.repeat([0, 1, 2, 3, -1], [4, 8, 3, 6, 2])
    halves = np.arange(len(labels)) % 2
    halves[labels == 1] = 1
    assert dissolved(labels, halves, 4).tolist() == np.repeat([1, -1, -1, 0, -1], [4, 8, 3, 6, 2]).tolist()


def test_changes_do_not_depend_on_the_numbers_of_classes() -> None:
    before = np.repeat([0, 1, 2], 5)
    assert changed(before, np.repeat([2, 0, 1], 5)) == 0
    after = np.repeat([2, 0, 1], 5)
    after[[0, 7]] = 1, -1
    assert changed(before, after) == 2
    # Merging 1 and 2 changes those of the smaller part; being in no class stays what it is.
    assert changed(np.repeat([0, 1, 2, -1], [5, 5, 3, 2]), np.repeat([0, 1, 1, -1], [5, 5, 3, 2])) == 3
    assert changed(np.full(4, -1), np.zeros(4, dtype=np.int64)) == 4
