"""What imaging leaves of Fourier components: wedge, CTF, dose."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.fourier import radial_frequency
from cryofleet.numerics.radiation import remaining_amplitude
from cryofleet.numerics.transfer import centred_transfer, tilt_series_transfer, wedge_transfer
from cryofleet.numerics.wedge import wedge_mask

BOX, VOXEL = 24, 8.0
ANGLES = np.arange(-50.0, 61.0, 2.0)


def test_many_tilts_fill_the_continuous_wedge() -> None:
    sampled = tilt_series_transfer(TiltSeries(ANGLES), BOX, VOXEL, use_ctf=False)
    wedge = wedge_transfer(BOX, -50, 60)
    kz = np.fft.fftfreq(BOX)[:, None, None] * BOX
    kx = np.fft.rfftfreq(BOX)[None, None, :] * BOX
    angle = np.degrees(np.arctan2(kz, kx)) + 0 * sampled
    reach = np.hypot(kx, kz) + 0 * sampled
    inside = (angle > -46) & (angle < 56) & (reach < 10)
    outside = ((angle < -60) | (angle > 70)) & (reach > 6) & (kx + 0 * sampled > 0.5)
    # slices 2 degrees apart are at most 0.35 of their thickness apart at ten components
    assert sampled[inside].min() > 0.95
    assert sampled[outside].max() == 0
    assert wedge[outside].max() == 0
    assert sampled[0, 0, 0] == 1


def test_a_single_image_holds_its_own_slice() -> None:
    transfer = tilt_series_transfer(TiltSeries(np.array([0.0])), BOX, VOXEL, use_ctf=False)
    assert (transfer[0] == 1).all()
    assert (transfer[1:-1] == 0).all()


def test_ctf_counts_with_protein_positive_and_by_its_correction() -> None:
    series = TiltSeries(np.array([0.0]), defocus_um=np.array([4.0]), voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.07)
    expected = -series.ctf(0)(radial_frequency((BOX,) * 3, VOXEL)[0])
    signed = tilt_series_transfer(series, BOX, VOXEL)[0]
    flipped = tilt_series_transfer(series, BOX, VOXEL, ctf_correction="phase_flip")[0]
    undone = tilt_series_transfer(series, BOX, VOXEL, ctf_correction="wiener")[0]
    here = np.ones(signed.shape, np.bool_)
    here[0, 0] = False
    assert signed[here] == pytest.approx(expected[here], abs=1e-6)
    assert flipped[here] == pytest.approx(np.abs(expected)[here], abs=1e-6)
    assert (undone == 1).all()
    # protein is positive where images have it dark: at low frequency
    assert signed[0, 2] > 0
    with pytest.raises(FailedPrecondition, match="defocus_um"):
        tilt_series_transfer(TiltSeries(np.array([0.0])), BOX, VOXEL)


def test_dose_fades_fine_detail() -> None:
    series = TiltSeries(np.array([0.0]), prior_dose=np.array([60.0]), exposure=np.array([3.0]))
    faded = tilt_series_transfer(series, BOX, VOXEL, use_ctf=False)[0]
    radius = radial_frequency((BOX,) * 3, VOXEL)[0]
    assert faded[3, 4] == pytest.approx(float(remaining_amplitude(radius[3, 4], 60.0, 3.0)), rel=1e-5)
    assert faded[0, 10] < faded[0, 2]
    assert (tilt_series_transfer(series, BOX, VOXEL, use_ctf=False, use_dose=False)[0] == 1).all()


@pytest.mark.parametrize("box", [24, 25])
def test_a_centred_mask_is_the_half_grid_of_its_box(box: int) -> None:
    whole = wedge_mask((box, box, box), -50, 65)
    assert np.array_equal(centred_transfer(np.fft.fftshift(whole)), wedge_transfer(box, -50, 65))
    # As drawn from the angles of voxels, whose Nyquist planes have no mates: the rest is the same but for the edges.
    r = np.arange(box) - box // 2
    angle = np.degrees(np.arctan2(r[:, None], r[None, :]))
    folded = (angle + 90) % 180 - 90
    drawn = ((folded >= -50) & (folded <= 65))[:, None, :].repeat(box, 1).astype(np.float32)
    assert np.abs(centred_transfer(drawn) - wedge_transfer(box, -50, 65)).mean() < 0.02


def test_a_mask_that_is_none_is_named() -> None:
    mask = np.fft.fftshift(wedge_mask((16, 16, 16), -60, 60))
    with pytest.raises(InvalidArgument, match=r"mine is \(16, 16, 9\): it must be a cube"):
        centred_transfer(mask[..., :9], "mine")
    with pytest.raises(InvalidArgument, match="mine is zero everywhere"):
        centred_transfer(np.zeros_like(mask), "mine")
    with pytest.raises(InvalidArgument, match="not finite"):
        centred_transfer(np.where(mask > 0, np.float32(np.nan), mask))
    # Half of Fourier space only, or centred elsewhere.
    for wrong in (np.where(np.arange(16) < 8, mask, np.float32(0)), np.roll(mask, -1, axis=2)):
        with pytest.raises(InvalidArgument, match="not symmetric about voxel 8"):
            centred_transfer(wrong)
