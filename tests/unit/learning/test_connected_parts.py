"""Connected parts of labels that come slab by slab, against labelling the whole volume at once."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from cryofleet.errors import FailedPrecondition
from services.learning import connected_parts


@pytest.mark.parametrize("slab", [1, 3, 20])
def test_parts_are_those_of_the_whole_volume(slab: int) -> None:
    random = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(random.standard_normal((20, 40, 40)), 2)
    labels = np.digitize(smooth, [0.02, 0.08]).astype(np.uint8)
    scores = random.uniform(0.5, 1, labels.shape).astype(np.float32)
    gathered = connected_parts.ConnectedParts(2)
    for first in range(0, 20, slab):
        gathered.add(labels[first : first + slab], scores[first : first + slab])
    parts = gathered.parts()
    expected = []
    for label in (1, 2):
        found, count = scipy.ndimage.label(labels == label)
        for number in range(1, count + 1):
            z, y, x = np.nonzero(found == number)
            expected.append((label, -len(z), x.mean(), y.mean(), z.mean(), scores[z, y, x].mean()))
    assert len(parts) == len(expected) > 10
    got = np.column_stack([parts.labels, -parts.voxels, parts.centres, parts.scores])
    np.testing.assert_allclose(got[np.lexsort(got.T[::-1])], np.array(sorted(expected)), rtol=1e-5)
    assert list(zip(parts.labels, -parts.voxels, strict=True)) == sorted(
        zip(parts.labels, -parts.voxels, strict=True)
    ), "by feature, the largest first"


def test_a_part_that_divides_and_joins_again_is_one() -> None:
    labels = np.zeros((5, 5, 7), np.uint8)
    labels[0, 2, 1:6] = labels[4, 2, 1:6] = 1
    labels[:, 2, 1] = labels[:, 2, 5] = 1
    labels[2, 2, 3] = 1
    gathered = connected_parts.ConnectedParts(1)
    for plane in labels:
        gathered.add(plane[None], np.ones((1, 5, 7), np.float32))
    assert gathered.parts().voxels.tolist() == [16, 1]


def test_sizes_in_angstrom() -> None:
    z, y, x = np.mgrid[:41, :41, :41] - 20
    ball = (z**2 + y**2 + x**2 <= 15**2).astype(np.uint8)
    gathered = connected_parts.ConnectedParts(1)
    gathered.add(ball, ball.astype(np.float32))
    parts = gathered.parts()
    # A ball's voxels make up its volume, to the rounding of its surface.
    assert parts.diameters_angstrom(10.0)[0] == pytest.approx(300, rel=0.01)
    assert len(parts.at_least(290, 10.0)) == 1
    assert len(parts.at_least(310, 10.0)) == 0
    assert len(connected_parts.ConnectedParts(1).parts()) == 0


def test_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connected_parts, "MAX_FRAGMENTS", 10)
    labels = np.zeros((1, 9, 9), np.uint8)
    labels[0, ::2, ::2] = 1
    with pytest.raises(FailedPrecondition, match="more than 10 parts"):
        connected_parts.ConnectedParts(1).add(labels, labels.astype(np.float32))
