"""SNR, wedge, slab and gold of tomograms made for it: projections of blobs in noise, back-projected."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import welch
from services.io import gold, slab, tomogram_snr, wedge
from services.simulation.projection import project
from services.simulation.weighted_back_projection import weighted_back_projection
from tests.unit.io.arrays import Volume, noise, reader

SHAPE = (64, 96, 96)
ICE = (16, 48)


@dataclass(frozen=True)
class Tomogram:
    """Of dark blobs in sections 16 to 47, with its halves and without noise."""

    whole: Volume
    even: Volume
    odd: Volume
    clean: Volume


def blobs() -> Volume:
    rng = np.random.default_rng(5)
    points = np.zeros(SHAPE, np.float32)
    z, y, x = rng.integers(ICE[0] + 3, ICE[1] - 3, 500), *rng.integers(4, 92, (2, 500))
    points[z, y, x] = -1
    return np.asarray(scipy.ndimage.gaussian_filter(points, 2.0), np.float32)


@lru_cache
def simulated(low: float, high: float, step: float, snr: float) -> Tomogram:
    angles = np.arange(low, high + step / 2, step)
    images = project(blobs(), angles, 96)
    images = images - images.mean(axis=(1, 2), keepdims=True)
    rng = np.random.default_rng(6)
    clean, first, second = (
        weighted_back_projection(stack, angles, SHAPE[0], SHAPE[2])
        for stack in (images, *(rng.standard_normal((2, *images.shape), dtype=np.float32)))
    )
    # each half has twice the noise of the whole
    level = np.float32(np.sqrt(2 * clean.var(dtype=np.float64) / snr / first.var(dtype=np.float64)))
    whole: Volume = clean + level * np.float32(0.5) * (first + second)
    return Tomogram(whole, clean + level * first, clean + level * second, clean)


# --- Spectra -------------------------------------------------------------------------------------------------------


def test_the_spectrum_of_noise_holds_its_variance() -> None:
    volume = noise(60, 100, 90) * np.float32(3)
    box = welch.box_shape(volume.shape, 32)
    starts = welch.box_starts(volume.shape, box, 20)
    assert len(starts) == 20
    assert max(starts)[0] + 32 <= 60
    power = np.mean([welch.power(each) for each in welch.tapered_boxes(reader(volume), starts, box)], axis=0)
    # the outer columns, of kx = 0 and Nyquist, are real for some components
    assert power[..., 1:-1].mean() == pytest.approx(9, rel=0.02)


# --- Wedge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "step", "snr"), [(-60, 60, 3, 0.01), (-50, 50, 2, 0.1), (-50, 70, 2, 0.01)])
def test_tilt_range_and_axis(low: float, high: float, step: float, snr: float) -> None:
    volume = simulated(low, high, step, snr).whole
    found = wedge.estimate_wedge(reader(volume), SHAPE)
    assert found.found
    assert found.tilt_min == pytest.approx(low, abs=2)
    assert found.tilt_max == pytest.approx(high, abs=2)
    assert found.axis == pytest.approx(0, abs=2)
    assert found.depth > 0.95
    assert 0.5 <= found.tilt_min_error < 2


def test_an_axis_that_leans() -> None:
    # counter-clockwise from y seen from +z: from +y towards -x
    volume = simulated(-50, 70, 2, 0.01).whole
    turned = scipy.ndimage.rotate(volume, -25, axes=(1, 2), reshape=False, order=1, mode="reflect")
    marked = np.zeros((96, 96))
    marked[80, 48] = 1  # on the axis
    y, x = np.unravel_index(np.argmax(scipy.ndimage.rotate(marked, -25, reshape=False, order=1)), (96, 96))
    assert np.degrees(np.arctan2(48 - x, y - 48)) == pytest.approx(25, abs=2)
    found = wedge.estimate_wedge(reader(turned), SHAPE)
    assert found.axis == pytest.approx(25, abs=2)
    assert found.tilt_min == pytest.approx(-50, abs=2)
    assert found.tilt_max == pytest.approx(70, abs=2)


def test_where_nothing_is_missing_no_wedge_is_found() -> None:
    found = wedge.estimate_wedge(reader(noise(*SHAPE)), SHAPE)
    assert not found.found
    assert found.depth < 0.1
    with pytest.raises(FailedPrecondition, match="the same everywhere"):
        wedge.estimate_wedge(reader(np.zeros(SHAPE, np.float32)), SHAPE)
    with pytest.raises(FailedPrecondition, match="16 along each axis"):
        wedge.estimate_wedge(reader(noise(8, 40, 40)), (8, 40, 40))


# --- SNR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [0.1, 1.0])
def test_snr_of_halves(snr: float) -> None:
    made = simulated(-60, 60, 3, snr)
    found = tomogram_snr.snr_of_halves(reader(made.even), reader(made.odd), SHAPE)
    assert found.snr == pytest.approx(snr, rel=0.15)
    assert found.error < 0.15 * snr
    assert found.snr_of_half == pytest.approx(found.snr / 2)
    # most of the blobs' power lies below 1 / (2 pi sigma), none at Nyquist
    coarse, fine = found.frequency < 0.06, found.frequency > 0.4
    assert np.nanmean(found.spectral_snr[coarse]) > 5 * snr
    # twice the FSC there, whose error is well below 0.02
    assert abs(np.nanmean(found.spectral_snr[fine])) < 0.05


def test_snr_leaves_out_what_the_mask_has() -> None:
    made = simulated(-60, 60, 3, 1.0)
    even, odd = made.even.copy(), made.odd.copy()
    mask = np.zeros(SHAPE, np.float32)
    mask[20:30, 40:50, 40:50] = 1
    even[mask > 0] -= 50 * even.std()
    odd[mask > 0] -= 50 * odd.std()
    with_gold = tomogram_snr.snr_of_halves(reader(even), reader(odd), SHAPE)
    without = tomogram_snr.snr_of_halves(reader(even), reader(odd), SHAPE, reader(mask))
    assert with_gold.snr > 3
    assert without.snr == pytest.approx(1, rel=0.15)
    with pytest.raises(InvalidArgument, match="leaves every voxel out"):
        tomogram_snr.snr_of_halves(reader(even), reader(odd), SHAPE, reader(np.ones(SHAPE, np.float32)))
    with pytest.raises(FailedPrecondition, match="the halves are the same tomogram"):
        tomogram_snr.snr_of_halves(reader(even), reader(even), SHAPE)


def test_snr_of_a_spectrum_is_within_the_error_it_states() -> None:
    for snr in (0.01, 0.5):
        made = simulated(-60, 60, 3, snr)
        found = tomogram_snr.snr_of_spectrum(reader(made.whole), SHAPE, -60, 60)
        assert abs(found.snr - snr) < 2 * found.error
        assert (found.snr > 2 * found.error) == (snr == 0.5)
    smoothed = scipy.ndimage.gaussian_filter(made.whole, 2)
    with pytest.raises(FailedPrecondition, match="finest details were filtered away"):
        tomogram_snr.snr_of_spectrum(reader(smoothed), SHAPE, -60, 60)


# --- Slab ----------------------------------------------------------------------------------------------------------


def tilted_ice(slope: float) -> Volume:
    """Noise of which that between two planes has structure too."""
    shape = (80, 96, 112)
    structure = scipy.ndimage.gaussian_filter(noise(*shape, seed=1, mean=0.0), 2)
    low = 25 + slope * (np.arange(112) - 56)
    z = np.arange(80)[:, None, None]
    inside = (z >= low) & (z <= low + 30)
    return np.asarray(noise(*shape, mean=0.0) + 3 / structure.std() * structure * inside, np.float32)


def test_surfaces_of_a_tilted_slab() -> None:
    volume = tilted_ice(0.1)
    found = slab.find_slab(reader(volume), volume.shape, 10.0)
    assert found.found
    assert found.bottom.centre == pytest.approx(25, abs=2)
    assert found.top.centre == pytest.approx(55, abs=2)
    assert found.bottom.slope_x == pytest.approx(0.1, abs=0.03)
    assert found.bottom.slope_y == pytest.approx(0, abs=0.03)
    assert abs(found.thickness - 30 * np.cos(np.arctan(0.1))) < 3 * found.thickness_error
    masks: list[Volume] = []
    slab.write_mask(found, volume.shape, masks.append)
    mask = np.concatenate(masks)
    assert mask.shape == volume.shape
    assert mask.sum(axis=0).mean() == pytest.approx(30, abs=4)
    assert mask[30, 48, 56] == 1
    assert mask[10, 48, 56] == mask[70, 48, 56] == 0


def test_no_slab_where_there_is_none() -> None:
    shape = (80, 96, 112)
    assert not slab.find_slab(reader(noise(*shape)), shape, 10.0).found
    with pytest.raises(FailedPrecondition, match="8 sections: 12 are needed"):
        slab.find_slab(reader(noise(8, 96, 96)), (8, 96, 96), 10.0)


# --- Gold ----------------------------------------------------------------------------------------------------------


def test_beads_and_their_mask() -> None:
    beads = np.array([[20.0, 30, 40], [60, 70, 20], [80, 15, 50], [12, 84, 12]])
    volume = 0.3 * noise(*SHAPE, mean=0.0)
    z, y, x = np.indices(SHAPE)
    for bead in beads:
        volume[(x - bead[0]) ** 2 + (y - bead[1]) ** 2 + (z - bead[2]) ** 2 <= 16] -= 5
    # something large and weak, as protein is
    volume[30:40, 45:55, 45:55] -= 0.2
    found = gold.find_gold(reader(volume), SHAPE, 8.0, True, workers=2)
    assert len(found.positions) == 4
    assert np.max(KDTree(found.positions).query(beads)[0]) < 1
    assert found.scores[-1] > 3 * found.next_score
    masks: list[Volume] = []
    gold.write_mask(found.positions, 6.0, SHAPE, masks.append)
    # spheres of radius 6, as a grid holds them
    assert np.concatenate(masks).sum() == pytest.approx(4 * 4 / 3 * np.pi * 6**3, rel=0.05)
    with pytest.raises(FailedPrecondition, match=r"stands out most is light.* check the contrast"):
        gold.find_gold(reader(-volume), SHAPE, 8.0, True, threshold=8.0)


def test_no_gold_is_found_in_noise() -> None:
    volume = noise(*SHAPE)
    assert not len(gold.find_gold(reader(volume), SHAPE, 8.0, True).positions)
    assert len(gold.find_gold(reader(volume), SHAPE, 8.0, True, threshold=3.0).positions)
    with pytest.raises(InvalidArgument, match="beads of 1 voxels: 2 to 64 are found"):
        gold.find_gold(reader(volume), SHAPE, 1.0, True)
