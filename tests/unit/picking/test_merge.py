from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles
from services.picking.merge import Member, merge_particles


def member(name: str, ids: list[int], tomogram: str = "one") -> Member:
    positions = np.arange(3 * len(ids), dtype=float).reshape(-1, 3)
    particles = Particles.from_positions(positions, 10.0, tomogram, id=np.array(ids, np.int64))
    return Member(name, particles, 32, 20.0, "dark", (-60.0, 60.0))


def test_particles_come_in_the_order_of_the_sets() -> None:
    merged = merge_particles([member("a", [7, 3]), member("b", [5])])
    assert merged.table["id"].tolist() == [7, 3, 5]
    assert merged.table["x"].tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"box_size": 48}, "box size.*32 in a, 48 in b"),
        ({"voxel_size_angstrom": 20.01}, "voxel size of the boxes.*20 in a, 20.01 in b"),
        ({"contrast": "light"}, "contrast.*dark in a, light in b"),
        ({"tilt_range_degrees": (-50.0, 60.0)}, "tilt range"),
    ],
)
def test_sets_that_do_not_fit_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words):
        merge_particles([member("a", [0]), replace(member("b", [1]), **changes)])  # type: ignore[arg-type]


def test_positions_in_other_voxels_are_refused() -> None:
    other = member("b", [1])
    coarse = replace(other.particles, voxel_size_angstrom=11.0)
    with pytest.raises(FailedPrecondition, match=r"voxel size of the positions.*10 in a, 11 in b"):
        merge_particles([member("a", [0]), replace(other, particles=coarse)])


def test_a_particle_is_in_a_set_once() -> None:
    with pytest.raises(FailedPrecondition, match="particle 4 is in b and again in c"):
        merge_particles([member("a", [0, 1]), member("b", [3, 4]), member("c", [5, 4])])


def test_particles_of_different_tomograms_may_have_the_same_id() -> None:
    merged = merge_particles([member("a", [0, 1], "one"), member("b", [0, 1], "two")])
    assert merged.table["tomogram"].tolist() == ["one", "one", "two", "two"]
    assert merged.table["id"].is_unique
