from __future__ import annotations

import numpy as np
import pytest

from services.learning.subvolumes import starts, subvolume_count, subvolumes


@pytest.mark.parametrize(
    ("side", "expected"), [(32, [0]), (64, [0, 32]), (67, [1, 33]), (95, [15, 47]), (31, []), (96, [0, 32, 64])]
)
def test_whole_ones_lie_in_the_middle_of_an_axis(side: int, expected: list[int]) -> None:
    assert list(starts(side, 32)) == expected


def test_each_is_a_part_of_the_volume_and_none_overlap() -> None:
    shape = (9, 14, 8)
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    asked: list[int] = []

    def read(first: int, last: int) -> np.ndarray:
        asked.append(last - first)
        return volume[first:last]

    found = np.concatenate(list(subvolumes(read, shape, 4)))
    assert len(found) == subvolume_count(shape, 4) == 2 * 3 * 2
    expected = [
        volume[z : z + 4, y : y + 4, x : x + 4] for z in starts(9, 4) for y in starts(14, 4) for x in starts(8, 4)
    ]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) == found.size
    # One layer at a time.
    assert asked == [4, 4]
    assert list(subvolumes(read, (3, 14, 8), 4)) == []
    assert subvolume_count((3, 14, 8), 4) == 0
