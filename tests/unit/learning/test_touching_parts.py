"""Touching particles of a segmentation, and parts of the wrong size, in made shapes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.progress import no_progress
from services.learning.connected_parts import ConnectedParts
from services.learning.touching_parts import part_in_box, sized_parts, split_part

Z, Y, X = np.mgrid[:30, :50, :60]


def ball(x: float, y: float, z: float, radius: float) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (Z - z) ** 2 + (Y - y) ** 2 + (X - x) ** 2 <= radius**2
    return inside


VOLUME = float(ball(15, 15, 15, 8).sum())


@pytest.mark.parametrize("hollow", [False, True])
def test_touching_balls_are_parted_at_their_centres(hollow: bool) -> None:
    places = [(12, 15, 14), (27, 15, 14), (20, 28, 14)]
    inside = np.any([ball(*place, 8) for place in places], axis=0)
    if hollow:
        inside &= ~np.any([ball(*place, 5) for place in places], axis=0)
    found = split_part(inside, inside.sum() / 3)
    assert len(found) == 3
    assert sum(count for count, _ in found) == inside.sum()
    for place in places:
        # Where balls overlap by a voxel, the border may move a centre by some of it.
        assert min(np.linalg.norm(centre - place) for _, centre in found) < 1


def test_one_long_particle_stays_whole() -> None:
    rod = (((Z - 15) / 5) ** 2 + ((Y - 25) / 5) ** 2 + ((X - 30) / 13) ** 2) <= 1
    # As if its class were smaller: it holds two by its volume, and has one mode.
    found = split_part(rod, rod.sum() / 1.7)
    assert len(found) == 1
    np.testing.assert_allclose(found[0][1], (30, 25, 15), atol=0.01)


def test_sizes_decide_what_is_a_particle() -> None:
    labels = np.zeros(Z.shape, np.uint8)
    labels[ball(9, 10, 15, 8)] = 1
    labels[ball(25, 10, 15, 8)] = 1  # touches the first
    labels[ball(50, 10, 15, 3)] = 1  # too small
    labels[ball(15, 38, 15, 11)] = 1  # too large, and one mode
    labels[ball(45, 38, 15, 11)] = 2  # of any size
    gathered = ConnectedParts(2)
    for first in range(0, 30, 7):
        gathered.add(labels[first : first + 7])
    parts = gathered.parts()
    found = sized_parts(parts, lambda box: labels[box], {1: VOLUME}, 0.3, 2.0, no_progress)
    assert (found.split, found.too_small, found.too_large) == ({1: 1}, {1: 1}, {1: 1})
    assert found.parts.labels.tolist() == [1, 1, 2]
    centres = found.parts.centres[np.argsort(found.parts.centres[:, 0])]
    np.testing.assert_allclose(centres, [(9, 10, 15), (25, 10, 15), (45, 38, 15)], atol=0.1)
    np.testing.assert_allclose(found.parts.voxels[:2], VOLUME, rtol=0.02)
    assert (found.parts.scores == 1).all()


def test_a_part_is_told_from_others_in_its_box() -> None:
    inside = np.zeros((9, 9, 9), np.bool_)
    inside[0, :, 0] = inside[0, 0, :] = inside[:, 0, 0] = True  # spans the box
    inside[4:6, 4:6, 4:6] = True
    arms = inside.copy()
    arms[4:6, 4:6, 4:6] = False
    z, y, x = np.nonzero(arms)
    found = part_in_box(inside, int(arms.sum()), np.array([x.mean(), y.mean(), z.mean()]))
    np.testing.assert_array_equal(found, arms)
