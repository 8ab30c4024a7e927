from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from services.picking import particle_lists as lists


def test_joined_rows_know_where_they_came_from() -> None:
    one = Particles.from_positions([[1, 2, 3], [4, 5, 6]], 10.0, "a")
    two = Particles.from_positions([[7, 8, 9]], 10.0, "b")
    joined = lists.join_lists([one, two])
    assert joined.lists.tolist() == [0, 0, 1]
    assert joined.rows.tolist() == [0, 1, 0]
    assert joined.particles.table["tomogram"].tolist() == ["a", "a", "b"]
    with pytest.raises(InvalidArgument, match="voxels"):
        lists.join_lists([one, Particles.from_positions([[0, 0, 0]], 5.0)])


def test_the_stronger_of_two_stays_and_equal_ones_go_by_order() -> None:
    places = np.array([[0.0, 0, 0], [2, 0, 0], [4, 0, 0], [10, 0, 0], [11, 0, 0]])
    assert lists.deduplicate(places, [1, 3, 2, 5, 5], 3).tolist() == [False, True, False, True, False]
    assert lists.deduplicate(places, None, 2).tolist() == [True, True, True, True, False]
    assert lists.deduplicate(places, None, 0).all()
    with pytest.raises(InvalidArgument, match="NaN"):
        lists.deduplicate(places, [1, 2, 3, 4, np.nan], 1)


def test_only_particles_of_one_group_compete() -> None:
    places = np.zeros((4, 3))
    kept = lists.deduplicate(places, [1, 2, 3, 4], 5, [["a", "a", "b", "a"], ["r", "r", "r", "s"]])
    assert kept.tolist() == [False, True, True, True]


def test_scores_and_borders_include_their_limits() -> None:
    assert lists.by_score([0, 1, 2, 3, np.nan], 1, 2).tolist() == [False, True, True, False, False]
    places = np.array([[2.0, 2, 2], [27, 17, 7], [27.1, 5, 5], [5, 5, 1.9], [5, 18, 5]])
    assert lists.by_border(places, (10, 20, 30), 2).tolist() == [True, True, False, False, False]
    with pytest.raises(InvalidArgument):
        lists.by_score([1], 2, 1)


def test_a_mask_counts_at_the_nearest_voxel_and_not_outside() -> None:
    mask = np.zeros((4, 5, 6), np.float32)
    mask[1, 2, 3] = mask[0, 0, 0] = 1
    places = np.array([[3.4, 2.4, 0.6], [3.6, 2, 1], [-0.4, 0, 0], [-0.6, 0, 0], [6, 2, 1]])
    expected = [True, False, True, False, False]
    assert lists.by_mask(places, mask).tolist() == expected
    read: list[int] = []

    def read_slab(z0: int, z1: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        read.extend(range(z0, z1))
        return mask[z0:z1]

    assert lists.by_mask(places, read_slab, mask.shape).tolist() == expected
    assert read == [0, 1]
