"""Tilt schemes and what the dose of their order does."""

import math

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.radiation import critical_exposure, remaining_amplitude
from services.simulation.tilt_scheme import MAX_TILTS, TiltOrder, TiltScheme, tilt_scheme


def recorded(scheme: TiltScheme) -> list[float]:
    """The angles in the order of recording."""
    return list(scheme.angles_degrees[np.argsort(scheme.acquisition_order)])


def test_angles_ascend_in_the_stack_and_end_within_the_range() -> None:
    scheme = tilt_scheme(-50, 70, 3)
    assert scheme.angles_degrees[0] == -50
    assert scheme.angles_degrees[-1] == 70
    assert len(scheme) == 41
    assert np.allclose(np.diff(scheme.angles_degrees), 3)
    assert tilt_scheme(-60, 60, 7).angles_degrees[-1] == 59
    # a step of a binary fraction does not lose the last angle, nor show its rounding
    assert tilt_scheme(-0.3, 0.3, 0.1).angles_degrees.tolist() == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert len(tilt_scheme(-90, 90, 1)) == 181


@pytest.mark.parametrize(
    ("order", "start", "group", "expected"),
    [
        ("sequential", 0, 1, [-6, -4, -2, 0, 2, 4, 6]),
        ("bidirectional", 0, 1, [0, 2, 4, 6, -2, -4, -6]),
        ("bidirectional", -4, 1, [-4, -2, 0, 2, 4, 6, -6]),
        ("dose_symmetric", 0, 1, [0, 2, -2, 4, -4, 6, -6]),
        ("dose_symmetric", 0, 2, [0, 2, 4, -2, -4, 6, -6]),
        ("dose_symmetric", 2, 1, [2, 4, 0, 6, -2, -4, -6]),
        ("dose_symmetric", 0.9, 3, [0, 2, 4, 6, -2, -4, -6]),
    ],
)
def test_orders_of_recording(order: TiltOrder, start: float, group: int, expected: list[float]) -> None:
    scheme = tilt_scheme(-6, 6, 2, order, start, group)
    assert recorded(scheme) == expected
    # the n-th recorded has had n doses
    assert scheme.prior_dose(2.5)[np.argsort(scheme.acquisition_order)].tolist() == [2.5 * n for n in range(7)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-60, 60, 0), "tilt_step_degrees is 0, it must be positive"),
        ((-60, 60, -3), "tilt_step_degrees is -3, it must be positive"),
        ((-10, 10, 21), "more than the whole range of 20 degrees"),
        ((-60, 60, 0.12), f"at most {MAX_TILTS} are possible; the step must be at least 0.12"),
        ((-60, 60, 1e-300), f"at most {MAX_TILTS}"),
        ((60, -60, 3), "the smaller first"),
        ((-91, 60, 3), "-90 to 90"),
        ((-60, math.nan, 3), "tilt_max_degrees is nan"),
        ((-60, 60, math.inf), "tilt_step_degrees is inf"),
        ((-60, 60, 3, "spiral"), "order is 'spiral'"),
        ((-60, 60, 3, "dose_symmetric", 70), "start_degrees is 70"),
        ((-60, 60, 3, "dose_symmetric", 0, 0), "group_size is 0"),
    ],
)
def test_impossible_schemes_are_named(arguments: tuple[float, ...], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        tilt_scheme(*arguments)  # type: ignore[arg-type]


def test_the_most_tilts_there_can_be() -> None:
    assert len(tilt_scheme(-49.95, 49.95, 0.1)) == MAX_TILTS


def test_critical_exposures_are_those_of_grant_and_grigorieff() -> None:
    """Their eq. 3 and constants; at 3 Å some 4 e/Å^2, at 10 Å some 14, and 0.8 of it at 200 kV."""
    for resolution in (2.0, 3.0, 10.0, 30.0):
        expected = 0.24499 * resolution**1.6649 + 2.8141
        assert float(critical_exposure(1 / resolution)) == pytest.approx(expected, rel=1e-9)
        assert float(critical_exposure(1 / resolution, 200.0)) == pytest.approx(0.8 * expected, rel=0.01)
    assert float(critical_exposure(1 / 3)) == pytest.approx(4.34, abs=0.01)
    assert float(critical_exposure(1 / 10)) == pytest.approx(14.14, abs=0.01)


def test_the_critical_exposure_leaves_1_over_e_of_the_power() -> None:
    k = np.array([0.02, 0.1, 0.3])
    for frequency in k:
        exposure = float(critical_exposure(frequency))
        assert float(remaining_amplitude(frequency, exposure)) ** 2 == pytest.approx(1 / math.e)
    assert remaining_amplitude(np.array([0.0]), 100.0, 5.0)[0] == 1.0


def test_an_image_has_the_mean_over_its_own_exposure() -> None:
    doses = np.linspace(20, 26, 2001)
    single = [float(remaining_amplitude(0.15, dose)) for dose in doses]
    assert float(remaining_amplitude(0.15, 20.0, 6.0)) == pytest.approx(np.trapezoid(single, doses) / 6, rel=1e-6)


def test_doses_cannot_be_negative() -> None:
    with pytest.raises(InvalidArgument, match="prior_dose"):
        remaining_amplitude(0.1, -1.0)
