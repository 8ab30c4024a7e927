from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from services.learning.preparation import Preparation, Scale, standardise

IDS = np.array([70, 71, 72, 73, 74])


def boxes(side: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(5, 3, (5, side, side, side)).astype(np.float32)


def test_prepared_boxes_are_standardised_with_protein_positive() -> None:
    dark = Preparation(8, 1, False, "dark")(boxes(), IDS)
    light = Preparation(8, 1, False, "light")(boxes(), IDS)
    np.testing.assert_allclose(dark, -light, atol=1e-6)
    np.testing.assert_allclose(light.mean(axis=(1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(light.std(axis=(1, 2, 3)), 1, atol=1e-6)


@pytest.mark.parametrize(("contrast", "sign"), [("dark", -1), ("light", 1)])
def test_one_scale_for_all_boxes_keeps_what_is_brighter(contrast: str, sign: int) -> None:
    bright = boxes()
    bright[2] = 5 + 4 * (bright[2] - 5)
    found = Preparation(8, 1, False, contrast, scale=Scale(5.0, 3.0))(bright, IDS)
    np.testing.assert_allclose(found, sign * (bright - 5) / 3, atol=1e-5)


def test_binning_keeps_low_frequencies_only() -> None:
    side = 16
    x = np.arange(side)
    slow, fast = np.cos(2 * np.pi * x / side), np.cos(2 * np.pi * 7 * x / side)
    both = np.broadcast_to(slow + 3 * fast, (1, side, side, side)).astype(np.float32)
    prepared = Preparation(side, 2, False, "light")(both, IDS[:1])
    expected = standardise(np.broadcast_to(slow[::2], (1, 8, 8, 8)).astype(np.float32))
    np.testing.assert_allclose(prepared, expected, atol=1e-5)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_values_that_are_not_finite_are_named_by_particle(value: float, message: str) -> None:
    bad = boxes()
    bad[3, 1, 2, 3] = value
    with pytest.raises(InvalidArgument, match=f"set.json: the box of particle 73 .*{message}"):
        Preparation(8, 2, False, "dark", "set.json")(bad, IDS)


def test_constant_boxes_are_named_by_particle() -> None:
    bad = boxes()
    bad[1] = 4.25
    with pytest.raises(InvalidArgument, match="particle 71 is constant"):
        Preparation(8, 1, True, "dark")(bad, IDS)


def test_a_box_that_is_constant_once_binned_is_refused() -> None:
    bad = boxes()
    bad[4] = 7 + np.indices((8, 8, 8)).sum(axis=0) % 2
    with pytest.raises(InvalidArgument, match="particle 74 is constant, binned by 2"):
        Preparation(8, 2, False, "dark")(bad, IDS)


def test_binning_must_divide_the_box() -> None:
    with pytest.raises(InvalidArgument, match="binning"):
        Preparation(20, 3, False, "dark")
