"""Every convention against values computed by other programs, and both ways."""

from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import CONVENTIONS, EulerConvention, from_euler, to_euler

GOLDEN = (30.0, 40.0, 50.0)


def test_relion_angles_are_those_of_the_inverse_rotation() -> None:
    # Written out from the definition of rot, tilt, psi: the matrix of the golden rotation, reference to particle.
    rot, tilt, psi = np.deg2rad(GOLDEN)
    ca, sa, cb, sb, cg, sg = np.cos(rot), np.sin(rot), np.cos(tilt), np.sin(tilt), np.cos(psi), np.sin(psi)
    expected = np.array(
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ]
    )
    np.testing.assert_allclose(from_euler(GOLDEN, "relion").as_matrix(), expected, atol=1e-12)


def test_dynamo_and_cryocat_values_of_the_golden_rotation() -> None:
    golden = from_euler(GOLDEN, "relion")
    dynamo = from_euler((-40.0, 40.0, 120.0), "dynamo")
    cryocat = Rotation.from_euler("zxz", (-120.0, -40.0, 40.0), degrees=True)
    assert np.rad2deg((golden.inv() * dynamo).magnitude()) < 1e-4
    assert np.rad2deg((golden.inv() * cryocat).magnitude()) < 1e-4
    np.testing.assert_allclose(to_euler(golden, "dynamo"), (-40.0, 40.0, 120.0), atol=1e-4)


def test_dynamo_to_relion_as_the_eulerangles_package_converts_them() -> None:
    dynamo, relion = (-47.2730, 1.1777, -132.3000), (137.7000, 1.1777, 42.7270)
    np.testing.assert_allclose(to_euler(from_euler(dynamo, "dynamo"), "relion"), relion, atol=1e-4)
    np.testing.assert_allclose(to_euler(from_euler(relion, "relion"), "dynamo"), dynamo, atol=1e-4)


def test_eman_matrix_and_its_relation_to_relion() -> None:
    az, alt, phi = np.deg2rad((25.0, 65.0, -110.0))
    # EMAN2's transform is the product of these three, as its documentation prints them.
    c, s = np.cos, np.sin
    z_phi = np.array([[c(phi), s(phi), 0], [-s(phi), c(phi), 0], [0, 0, 1]])
    x_alt = np.array([[1, 0, 0], [0, c(alt), s(alt)], [0, -s(alt), c(alt)]])
    z_az = np.array([[c(az), s(az), 0], [-s(az), c(az), 0], [0, 0, 1]])
    rotation = from_euler((25.0, 65.0, -110.0), "eman")
    np.testing.assert_allclose(rotation.as_matrix(), z_phi @ x_alt @ z_az, atol=1e-12)
    # az = rot + 90, alt = tilt, phi = psi - 90
    np.testing.assert_allclose(to_euler(from_euler(GOLDEN, "relion"), "eman"), (120.0, 40.0, -40.0), atol=1e-9)


def test_faml_angles_rotate_the_reference_first_about_z_by_the_last_angle() -> None:
    rotation = from_euler((20.0, 90.0, 30.0), "faml")
    # z is not moved by gamma, goes to x by beta, and turns about z by alpha.
    np.testing.assert_allclose(rotation.apply([0, 0, 1]), [np.cos(np.pi / 9), np.sin(np.pi / 9), 0], atol=1e-12)
    np.testing.assert_allclose(to_euler(rotation, "faml"), (20.0, 90.0, 30.0), atol=1e-9)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=60, deadline=None)
@given(
    first=st.floats(-360, 360),
    second=st.one_of(st.floats(-360, 360), st.sampled_from([0.0, 1e-9, 1e-6, 180.0, 180 - 1e-7, -180.0])),
    third=st.floats(-360, 360),
)
def test_both_ways_everywhere_even_on_the_axis(
    convention: EulerConvention, first: float, second: float, third: float
) -> None:
    rotation = from_euler((first, second, third), convention)
    angles = to_euler(rotation, convention)
    # acos of the trace loses half the digits near zero; magnitude() does not.
    assert np.rad2deg((rotation.inv() * from_euler(angles, convention)).magnitude()) < 1e-5
    assert 0 <= angles[1] <= 180
    assert angles.min() > -180
    assert angles.max() <= 180


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_stacks_are_converted_like_single_rotations(convention: EulerConvention) -> None:
    rotations = Rotation.random(50, rng=np.random.default_rng(7))
    angles = to_euler(rotations, convention)
    assert angles.shape == (50, 3)
    np.testing.assert_array_equal(angles[9], to_euler(rotations[9], convention))
    assert (from_euler(angles, convention).inv() * rotations).magnitude().max() < 1e-12


def test_wrong_input_is_named() -> None:
    with pytest.raises(InvalidArgument, match="known are relion, dynamo, eman, faml"):
        from_euler(GOLDEN, "imagic")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="finite"):
        from_euler((0.0, np.nan, 0.0), "relion")
    with pytest.raises(InvalidArgument, match=r"shape \(3,\) or \(n, 3\)"):
        from_euler(np.zeros((2, 4)), "relion")


def test_the_closed_form_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    angles = np.concatenate([rng.uniform(-720, 720, (1000, 3)), rng.choice([-180.0, -90, 0, 90, 180], (100, 3))])
    reversed_angles = angles[:, ::-1]
    for convention, order, sequence, inverted in (
        ("relion", angles, "ZYZ", True),
        ("dynamo", reversed_angles, "ZXZ", True),
        ("eman", angles, "ZXZ", True),
        ("faml", angles, "ZYZ", False),
        ("av3", reversed_angles, "ZXZ", False),
    ):
        expected = Rotation.from_euler(sequence, order, degrees=True)
        expected = expected.inv() if inverted else expected
        found = from_euler(angles, cast(EulerConvention, convention))
        np.testing.assert_allclose(found.as_matrix(), expected.as_matrix(), atol=1e-12)
        np.testing.assert_allclose(found[7].as_matrix(), expected[7].as_matrix(), atol=1e-12)
