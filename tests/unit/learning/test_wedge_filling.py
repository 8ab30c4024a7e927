"""The wedge from another volume, against the transform of the whole volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.numerics.wedge import wedge_mask
from cryofleet.progress import no_progress
from cryofleet.scratch_array import ScratchVolume
from services.learning import wedge_filling
from services.learning.wedge_filling import fill, fill_volume, on_its_side

SHAPE = (12, 9, 14)


def test_what_was_measured_stays_and_the_wedge_is_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    measured, other = (rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    mask = wedge_mask(SHAPE, -50, 70).astype(bool)
    spectrum = np.where(mask, np.fft.fftn(measured), np.fft.fftn(other))
    expected = np.fft.ifftn(spectrum)
    assert np.abs(expected.imag).max() < 1e-6
    found = fill(measured, other, -50, 70)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.real, atol=1e-5)
    # Filled with itself it is the same again; without a wedge nothing is of the other.
    np.testing.assert_allclose(fill(measured, measured, -50, 70), measured, atol=1e-5)
    np.testing.assert_allclose(fill(measured, other, -90, 90), measured, atol=1e-5)

    monkeypatch.setattr(wedge_filling, "CHUNK_BYTES", 4 * 12 * 14 * 4)
    with ScratchVolume(tmp_path / "a", SHAPE) as a, ScratchVolume(tmp_path / "b", SHAPE) as b:
        for z in range(12):
            a.write_section(z, measured[z])
            b.write_section(z, other[z])
        fill_volume(a, b, -50, 70, no_progress)
        np.testing.assert_allclose(b.sections(0, 12), found, atol=1e-6)


@pytest.mark.parametrize("tilts", [(-60, 60), (-50, 70), (-30, 60)])
def test_what_is_missing_upright_is_there_on_its_side(tilts: tuple[int, int]) -> None:
    # Odd sides, so that there is no Nyquist frequency, which belongs to either side.
    volume = np.random.default_rng(1).standard_normal((2, 15, 9, 15), np.float32)
    missing = ~wedge_mask((15, 9, 15), *tilts).astype(bool)
    upright = fill(volume[0], np.zeros_like(volume[0]), *tilts)
    turned = on_its_side(np.stack([upright, volume[1]]))
    assert turned.shape == volume.shape
    power = np.abs(np.fft.fftn(turned[0])) ** 2
    assert (power[missing] > 1e-3).all()
    # It is turned, not mirrored: as x, y, z rotate about y by 90 degrees, up to the direction.
    expected = Rotation.from_euler("y", 90, degrees=True).apply([[3.0, 2.0, 1.0]])[0]
    point = np.zeros((15, 9, 15), np.float32)
    point[7 + 1, 4 + 2, 7 + 3] = 1
    z, y, x = (int(place[0]) for place in np.nonzero(on_its_side(point)))
    found = np.array([x - 7, y - 4, z - 7])
    assert np.allclose(found, expected) or np.allclose(found, [-expected[0], expected[1], -expected[2]])
