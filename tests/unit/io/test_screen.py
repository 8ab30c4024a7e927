"""A picture in fewer pixels is the mean of what each of them covers."""

from __future__ import annotations

import numpy as np
import pytest

from services.io import screen


@pytest.mark.parametrize(("shape", "longest"), [((12, 18), 6), ((12, 18), 9), ((64, 16), 16), ((7, 21), 3)])
def test_whole_ratios_are_means_of_blocks(shape: tuple[int, int], longest: int) -> None:
    picture = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    rows, columns = (max(1, round(side * longest / max(shape))) for side in shape)
    expected = picture.reshape(rows, shape[0] // rows, columns, shape[1] // columns).mean(axis=(1, 3))
    np.testing.assert_allclose(screen.shrunk(picture, longest), expected, atol=1e-6)


def test_other_ratios_keep_the_range_and_nearly_the_mean() -> None:
    picture = np.random.default_rng(2).uniform(2, 3, (100, 130)).astype(np.float32)
    shrunk = screen.shrunk(picture, 47)
    assert shrunk.shape == (36, 47)
    assert picture.min() < shrunk.min() < shrunk.max() < picture.max()
    assert shrunk.mean() == pytest.approx(picture.mean(), abs=0.01)


def test_what_is_small_enough_stays() -> None:
    picture = np.ones((3, 4), np.float32)
    assert screen.shrunk(picture, 4) is picture
