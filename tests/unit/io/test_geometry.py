"""Rescaling and turning, against closed forms and SciPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.wedge import wedge_mask
from services.io import rescale, rotate
from tests.unit.io.arrays import Volume, collected, noise, reader


def rescaled(volume: Volume, factor: float, scratch: Path) -> Volume:
    return collected(lambda write: rescale.rescale(reader(volume), volume.shape, factor, write, scratch))


@pytest.mark.parametrize("shape", [(20, 21, 23), (24, 24, 24)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_binning_is_fourier_cropping(
    shape: tuple[int, int, int], factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescale, "CHUNK_BYTES", 1)
    volume = noise(*shape)
    found = rescaled(volume, factor, tmp_path)
    assert found.shape == rescale.rescaled_shape(shape, factor) == tuple(side // factor for side in shape)
    np.testing.assert_allclose(found, fourier.fourier_crop(volume, factor), atol=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.5, 1 / 3])
def test_voxel_i_lies_at_i_times_the_factor(factor: float, tmp_path: Path) -> None:
    shape = (20, 30, 40)

    def waves(step: float) -> Volume:
        z, y, x = (np.arange(int(side / step + 1e-6)) * step for side in shape)
        # below the new Nyquist of the coarsest factor, whole numbers of periods
        wave = np.cos(2 * np.pi * 2 * z / 20 + 0.3)[:, None, None] * np.sin(2 * np.pi * 3 * y / 30 + 1)[:, None]
        return np.asarray(7 + wave * np.cos(2 * np.pi * 5 * x / 40), np.float32)

    np.testing.assert_allclose(rescaled(waves(1), factor, tmp_path), waves(factor), atol=2e-5)


def test_what_is_finer_than_the_new_nyquist_is_gone_not_folded(tmp_path: Path) -> None:
    x = np.arange(40)
    fine = np.broadcast_to(1 + np.cos(2 * np.pi * 12 * x / 40), (8, 8, 40)).astype(np.float32)
    np.testing.assert_allclose(rescaled(fine, 2, tmp_path), 1, atol=1e-5)


def test_a_factor_longer_than_a_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"an axis of 3 voxels can't be resampled in steps of 4"):
        rescaled(noise(3, 20, 20), 4, tmp_path)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_turning_in_bricks_is_scipys(order: rotate.Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "SIDE", 16)
    monkeypatch.setattr(rotate, "CHUNK_BYTES", 1)
    volume = noise(30, 33, 36)
    rotation = Rotation.from_rotvec([0.3, 0.5, -0.7])
    found = collected(lambda write: rotate.rotate(reader(volume), volume.shape, rotation, order, write, tmp_path))
    inverse, centre = rotation.inv().as_matrix()[::-1, ::-1], np.array([15, 16, 18])
    whole = scipy.ndimage.affine_transform(
        volume, inverse, centre - inverse @ centre, order=order, mode="constant", cval=float(volume.mean())
    )
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_a_point_goes_where_the_rotation_takes_it(tmp_path: Path) -> None:
    volume = np.zeros((24, 24, 24), np.float32)
    volume[12, 12, 18] = 1  # 6 along x from the centre
    quarter = Rotation.from_euler("z", 90, degrees=True)
    found = collected(lambda write: rotate.rotate(reader(volume), volume.shape, quarter, 1, write, tmp_path))
    assert np.argwhere(found == found.max()).tolist() == [[12, 18, 12]]


@pytest.mark.parametrize(
    ("axis", "angle", "expected"),
    [
        ("y", 10, (-60.0, 60.0)),
        ("z", 180, (-70.0, 50.0)),
        ("x", 180, (-70.0, 50.0)),
        ("y", 180, (-50.0, 70.0)),
        ("y", 90, None),
        ("z", 5, None),
        ("x", 90, None),
    ],
)
def test_the_wedge_turns_with_the_volume(axis: str, angle: float, expected: tuple[float, float] | None) -> None:
    found = rotate.rotated_tilt_range(-50, 70, Rotation.from_euler(axis, angle, degrees=True))
    assert found == (None if expected is None else pytest.approx(expected))
    assert rotate.rotated_tilt_range(-90, 90, Rotation.from_euler("z", 33, degrees=True)) == (-90, 90)


def test_the_tilt_range_after_a_turn_is_that_of_its_spectrum(tmp_path: Path) -> None:
    n = 48
    mask = wedge_mask((n, n, n), -50, 70, half=True)
    volume = fourier.apply_transfer(noise(n, n, n, mean=0), mask)
    turn = Rotation.from_euler("y", 15, degrees=True)
    found = collected(lambda write: rotate.rotate(reader(volume), volume.shape, turn, 3, write, tmp_path))
    low, high = rotate.rotated_tilt_range(-50, 70, turn) or (0, 0)
    power = np.abs(fourier.forward(found * np.hanning(n)[:, None, None] * np.hanning(n))) ** 2
    k = fourier.radial_frequency((n, n, n))
    band = (k > 0.1) & (k < 0.3)
    outside = wedge_mask((n, n, n), low - 6, high + 6, half=True) == 0
    inside = wedge_mask((n, n, n), low + 6, high - 6, half=True) > 0
    assert power[band & outside].mean() < 0.05 * power[band & inside].mean()
