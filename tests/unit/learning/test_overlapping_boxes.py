from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning.overlap_tile import Array
from services.learning.overlapping_boxes import classify_boxes, planes, starts, window_matrix

BOX = 8


def half_and_half(boxes: Array) -> NDArray[np.float64]:
    """The probability of class 1 grows with the middle voxel."""
    one = 1 / (1 + np.exp(-boxes[:, 4, 4, 4].astype(np.float64)))
    return np.stack([1 - one, one], axis=1)


def classified(volume: Array, batch: int = 5) -> Array:
    grid = classify_boxes(half_and_half, lambda a, b: volume[a:b], volume.shape, BOX, 2, batch, no_progress)
    return np.stack(list(planes(grid, volume.shape, BOX)), axis=1)


def test_boxes_overlap_by_half_and_reach_the_end() -> None:
    assert starts(24, 8).tolist() == [0, 4, 8, 12, 16]
    assert starts(26, 8).tolist() == [0, 4, 8, 12, 16, 18]
    assert starts(8, 8).tolist() == [0]
    with pytest.raises(InvalidArgument, match="side of 7 voxels, and the network takes boxes of 8"):
        starts(7, 8)


def test_windows_half_a_box_apart_sum_to_one() -> None:
    weights = window_matrix(24, 8)
    np.testing.assert_allclose(weights[4:20].sum(axis=1), 1, atol=1e-12)
    assert (weights.sum(axis=1) > 0).all()


def test_each_voxel_is_the_weighted_mean_of_its_boxes() -> None:
    volume = np.random.default_rng(0).standard_normal((10, 16, 21), np.float32)
    found = classified(volume)
    windows = [np.sin(np.pi * (np.arange(BOX) + 0.5) / BOX) ** 2] * 3
    window = np.einsum("i,j,k->ijk", *windows)
    sums, total = np.zeros((2, *volume.shape)), np.zeros(volume.shape)
    for z in starts(10, BOX):
        for y in starts(16, BOX):
            for x in starts(21, BOX):
                place = (slice(z, z + BOX), slice(y, y + BOX), slice(x, x + BOX))
                box = volume[place]
                chances = half_and_half(((box - box.mean()) / box.std())[None])[0]
                sums[(slice(None), *place)] += chances[:, None, None, None] * window
                total[place] += window
    np.testing.assert_allclose(found, sums / total, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(classified(volume, 1000), found, rtol=0, atol=1e-6)


def test_constant_boxes_belong_to_no_class() -> None:
    volume = np.random.default_rng(0).standard_normal((8, 8, 32), np.float32)
    volume[..., 16:] = 3.25
    found = classified(volume)
    np.testing.assert_allclose(found[..., :16].sum(axis=0), 1, atol=1e-5)
    assert not found[..., 21:].any()
