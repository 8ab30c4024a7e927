from __future__ import annotations

import itertools

import numpy as np
import pytest

from services.learning.subvolumes import starts, subvolume_count, subvolumes


@pytest.mark.parametrize(
    ("side", "spacing", "expected"),
    [
        (32, 32, [0]),
        (64, 32, [0, 32]),
        (67, 32, [1, 33]),
        (95, 32, [15, 47]),
        (31, 32, []),
        (31, 8, []),
        (3, 32, []),
        (96, 32, [0, 32, 64]),
        (50, 8, [1, 9, 17]),
        (64, 16, [0, 16, 32]),
    ],
)
def test_whole_ones_lie_in_the_middle_of_an_axis(side: int, spacing: int, expected: list[int]) -> None:
    assert list(starts(side, 32, spacing)) == expected


@pytest.mark.parametrize(("spacing", "count"), [(4, 2 * 3 * 2), (2, 3 * 6 * 3)])
def test_each_is_a_part_of_the_volume_at_its_place(spacing: int, count: int) -> None:
    shape = (9, 14, 8)
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    asked: list[int] = []

    def read(first: int, last: int) -> np.ndarray:
        asked.append(last - first)
        return volume[first:last]

    found = np.concatenate(list(subvolumes(read, shape, 4, spacing)))
    assert len(found) == subvolume_count(shape, 4, spacing) == count
    places = itertools.product(*(starts(side, 4, spacing) for side in shape))
    np.testing.assert_array_equal(found, [volume[z : z + 4, y : y + 4, x : x + 4] for z, y, x in places])
    # None overlap where they lie side by side.
    assert (len(np.unique(found)) == found.size) == (spacing == 4)
    # One layer at a time.
    assert asked == [4] * len(starts(9, 4, spacing))


@pytest.mark.parametrize("shape", [(3, 14, 8), (9, 3, 8), (9, 14, 3)])
def test_a_volume_that_is_too_small_has_none(shape: tuple[int, int, int]) -> None:
    assert list(subvolumes(lambda first, last: np.zeros((last - first, *shape[1:]), np.float32), shape, 4, 4)) == []
    assert subvolume_count(shape, 4, 4) == 0
