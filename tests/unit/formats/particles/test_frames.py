"""Every frame both ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition
from cryofleet.formats.frames import CENTRE_RULES, HANDEDNESSES, ORIGINS, UNITS, Frame, tomogram_centre

sides = st.integers(1, 2000)
frames = st.builds(
    Frame,
    unit=st.sampled_from(UNITS),
    origin=st.sampled_from(ORIGINS),
    centre=st.sampled_from(CENTRE_RULES),
    voxel_size_angstrom=st.floats(0.1, 100),
    tomogram_shape=st.tuples(sides, sides, sides),
    handedness=st.sampled_from(HANDEDNESSES),
    shift=st.sampled_from(["added", "subtracted"]),
    shift_unit=st.sampled_from(UNITS),
)
vectors = st.lists(st.tuples(*[st.floats(-10_000, 10_000)] * 3), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(frame=frames, places=vectors)
def test_both_ways(frame: Frame, places: list[tuple[float, float, float]]) -> None:
    given_places = np.array(places)
    there = frame.from_voxels(given_places, ("t",), "a")
    np.testing.assert_allclose(frame.voxels(there, ("t",), "a"), given_places, atol=1e-10)
    shifted = frame.from_voxel_shifts(given_places, "a")
    np.testing.assert_allclose(frame.voxel_shifts(shifted, "a"), given_places, atol=1e-10)
    rotations = Rotation.random(3, rng=np.random.default_rng(len(places)))
    assert (frame.rotations(frame.rotations(rotations)).inv() * rotations).magnitude().max() < 1e-12


@settings(max_examples=100, deadline=None)
@given(frame=frames, places=vectors)
def test_a_place_and_its_shift_are_one_sum_in_every_frame(
    frame: Frame, places: list[tuple[float, float, float]]
) -> None:
    """What a program with these rules adds up is where the particle is."""
    given_places = np.array(places)
    shifts = np.full_like(given_places, 1.25)
    positions, moved = frame.from_voxels(given_places, ("t",), "a"), frame.from_voxel_shifts(shifts, "a")
    size = frame.voxel_size_angstrom
    assert size is not None
    scale = {"voxel": 1.0, "angstrom": size}
    added = moved / scale[frame.shift_unit] * scale[frame.unit]
    total = positions + added if frame.shift == "added" else positions - added
    whole = frame.from_voxels(given_places + shifts, ("t",), "a")
    np.testing.assert_allclose(total, whole, atol=1e-6)


def test_the_first_voxel_and_the_centre_by_name() -> None:
    first = {
        origin: Frame(origin=origin).from_voxels(np.zeros((1, 3)), ("",), "a")[0].tolist() for origin in ORIGINS[:4]
    }
    assert first == {"first-voxel": [0] * 3, "one": [1] * 3, "corner": [0.5] * 3, "imod": [0.5, 0.5, 0]}
    for rule in CENTRE_RULES:
        frame = Frame(
            unit="angstrom", origin="centre", centre=rule, voxel_size_angstrom=3.0, tomogram_shape=(31, 40, 41)
        )
        np.testing.assert_array_equal(
            frame.voxels(np.zeros((1, 3)), ("",), "a")[0], tomogram_centre((31, 40, 41), rule)
        )


def test_voxels_are_not_touched_by_a_frame_that_is_cryofleets_own() -> None:
    places = np.random.default_rng(3).normal(0, 1e4, (50, 3))
    np.testing.assert_array_equal(Frame().voxels(places, ("",), "a"), places)
    np.testing.assert_array_equal(Frame().from_voxels(places, ("",), "a"), places)


def test_a_mirror_turns_with_the_reference() -> None:
    """M R M of the mirrored reference is the mirror image of R of the reference."""
    rotation, point = Rotation.random(rng=np.random.default_rng(5)), np.array([1.0, 2.0, 3.0])
    mirror = np.array([1.0, 1.0, -1.0])
    np.testing.assert_allclose(
        Frame(handedness="left").rotations(rotation).apply(mirror * point), mirror * rotation.apply(point), atol=1e-12
    )


def test_what_is_missing_is_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"a\.star: the voxel size"):
        Frame(unit="angstrom").voxels(np.zeros((1, 3)), ("",), "a.star")
    with pytest.raises(FailedPrecondition, match="since it is mirrored"):
        Frame(handedness="left").voxels(np.zeros((1, 3)), ("",), "a.star")
