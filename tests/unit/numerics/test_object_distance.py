"""Distances to segmented objects, against the distance transform of the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from cryofleet.errors import FailedPrecondition
from cryofleet.numerics import object_distance
from cryofleet.numerics.object_distance import object_distances

SHAPE = (24, 30, 26)


def labels() -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    volume = np.zeros(SHAPE, np.float32)
    volume[5:12, 8:20, 6:9] = 2
    volume[15:18, 3:9, 12:20] = 1
    return volume


@pytest.mark.parametrize("label", [None, 1, 2])
@pytest.mark.parametrize("limit", [np.inf, 4.5])
def test_they_are_those_of_the_distance_transform(
    monkeypatch: pytest.MonkeyPatch, label: int | None, limit: float
) -> None:
    monkeypatch.setattr(object_distance, "READ_VOXELS", 30 * 26 * 5)
    volume = labels()
    positions = np.random.default_rng(3).integers(0, SHAPE[::-1], (200, 3))
    x, y, z = positions.T
    truth = ndimage.distance_transform_edt(volume == 0 if label is None else volume != label)[z, y, x]
    truth[truth > limit] = np.inf
    found = object_distances(positions.astype(float), lambda i, j: volume[i:j], SHAPE, label, limit)
    np.testing.assert_allclose(found, truth)
    assert 10 < np.isfinite(found).sum() <= 200


def test_positions_may_lie_outside() -> None:
    volume = labels()
    found = object_distances(np.array([[7.0, 10, 30], [7, 10, 60]]), lambda i, j: volume[i:j], SHAPE, 2)
    np.testing.assert_allclose(found, [19, 49])


def test_there_must_be_an_object() -> None:
    volume = labels()
    with pytest.raises(FailedPrecondition, match="no voxel of the segmentation has the label 9"):
        object_distances(np.zeros((1, 3)), lambda i, j: volume[i:j], SHAPE, 9)
    with pytest.raises(FailedPrecondition, match="no voxel of the segmentation is not 0"):
        object_distances(np.zeros((1, 3)), lambda i, j: 0 * volume[i:j], SHAPE)
