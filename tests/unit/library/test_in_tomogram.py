"""Which particles lie in a tomogram, and which volume each is an instance of."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.in_tomogram import inside, volume_numbers, without_volume
from cryofleet.particles import Particles


def test_positions_outside_are_known() -> None:
    positions = np.array([[0.0, 0, 0], [-0.6, 0, 0], [39.4, 35.4, 29.4], [39.6, 0, 0], [0, 36, 0]])
    assert inside(positions, (30, 36, 40)).tolist() == [True, False, True, False, False]


def test_volumes_go_by_the_classes_numbers() -> None:
    classes = np.array([5, -1, 2, 5], np.int32)
    particles = Particles.from_positions(np.zeros((4, 3)), 10.0, class_id=classes)
    # As many single volumes as classes: by their order. Else, and in a stack, by their numbers.
    assert volume_numbers(particles, 2, False, "p").tolist() == [1, -1, 0, 1]
    assert volume_numbers(particles, 6, False, "p").tolist() == [5, -1, 2, 5]
    assert volume_numbers(particles, 6, True, "p").tolist() == [5, -1, 2, 5]
    # What has no volume is said by the numbers that reports show.
    numbers = volume_numbers(particles, 3, False, "p")
    assert numbers.tolist() == [-1, -1, 2, -1]
    assert without_volume(particles, numbers) == "2 particles are left out: there is no average of class 6"
    assert not without_volume(particles, volume_numbers(particles, 2, False, "p"))
    plain = Particles.from_positions(np.zeros((4, 3)), 10.0)
    assert volume_numbers(plain, 1, False, "p").tolist() == [0, 0, 0, 0]
    with pytest.raises(InvalidArgument, match="p has no classes, and there are 2 volumes"):
        volume_numbers(plain, 2, False, "p")
