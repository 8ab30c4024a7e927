"""The SNR of tomograms is the one asked for: rho / (1 - rho) of two with independent noise."""

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from services.simulation.detector import apply_mtf, gaussian_series, noise_scales, sinc_mtf
from services.simulation.imaging import ImagingParameters, draw_tilt_series, noise_free_series
from services.simulation.projection import project
from services.simulation.signal_to_noise import noise_sigma_for_snr
from services.simulation.tilt_scheme import tilt_scheme
from services.simulation.weighted_back_projection import weighted_back_projection

SHAPE = (32, 40, 44)
SCHEME = tilt_scheme(-60, 60, 6)
ANGLES = SCHEME.angles_degrees
#: Ice of a third of a mean free path: at 60 degrees noise is 1.2 times what it is untilted.
SCALES = noise_scales(ANGLES, 1000, 3000)


def _scene() -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    points = np.zeros(SHAPE, np.float32)
    points[tuple(rng.integers(4, np.array(SHAPE)[:, None] - 4, (3, 60)))] = 1
    blobs: NDArray[np.float32] = scipy.ndimage.gaussian_filter(points, 1.5)
    return blobs * np.float32(5 / blobs.max())


@pytest.fixture(scope="module")
def contrast() -> NDArray[np.float32]:
    """Images of a scene as they reach the detector."""
    parameters = ImagingParameters(pixel_size_angstrom=8)
    series = draw_tilt_series(SCHEME, parameters, np.random.default_rng(0))
    return noise_free_series(project(_scene(), ANGLES), series, parameters)


def tomogram(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """As `tomogram.reconstruct` makes it of prepared images."""
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    return weighted_back_projection(centred, ANGLES, SHAPE[0], SHAPE[2]).astype(np.float64)


@pytest.fixture(scope="module")
def noises() -> NDArray[np.float64]:
    """Tomograms (n, voxels) of noise alone, of unit sigma in untilted images: reconstruction is linear."""
    flat = np.zeros((len(ANGLES), SHAPE[1], SHAPE[2]), np.float32)
    rng = np.random.default_rng(11)
    return np.stack([tomogram(gaussian_series(flat, SCALES, rng).images).ravel() for _ in range(60)])


@pytest.mark.parametrize("snr", [0.003, 0.01, 0.1, 1.0])
def test_pairs_of_tomograms_correlate_as_the_snr_says(
    contrast: NDArray[np.float32], noises: NDArray[np.float64], snr: float
) -> None:
    """1,770 pairs of 56,000 voxels know a correlation to some 2e-4, 6% of 0.003; within 10% as asked."""
    silent = apply_mtf(contrast, sinc_mtf)
    level = noise_sigma_for_snr(
        silent, ANGLES, SHAPE[0], snr, np.random.default_rng(5), noise_scales=SCALES, mtf=sinc_mtf
    )
    assert level.signal_variance / level.noise_variance == pytest.approx(snr)
    tomograms = tomogram(silent).ravel() + level.sigma * noises
    correlations = np.asarray(np.corrcoef(tomograms))[np.triu_indices(len(tomograms), 1)]
    rho = correlations.mean()
    assert rho / (1 - rho) == pytest.approx(snr, rel=0.1)


def test_the_whole_way_gives_the_snr(contrast: NDArray[np.float32]) -> None:
    level = noise_sigma_for_snr(
        apply_mtf(contrast, sinc_mtf),
        ANGLES,
        SHAPE[0],
        0.5,
        np.random.default_rng(5),
        noise_scales=SCALES,
        mtf=sinc_mtf,
        workers=2,
    )
    rng = np.random.default_rng(6)
    pair = [tomogram(gaussian_series(contrast, level.sigma * SCALES, rng).images).ravel() for _ in range(2)]
    rho = np.asarray(np.corrcoef(pair))[0, 1]
    assert rho / (1 - rho) == pytest.approx(0.5, rel=0.05)


def test_gold_left_out_does_not_count() -> None:
    """A bead far brighter than the scene changes nothing of the noise, but for the streaks that it casts."""
    scene = _scene()
    gold = np.zeros(SHAPE, bool)
    gold[14:18, 18:22, 20:24] = True

    def sigma(volume: NDArray[np.float32], left_out: NDArray[np.bool_] | None) -> float:
        return noise_sigma_for_snr(
            project(volume, ANGLES), ANGLES, SHAPE[0], 0.1, np.random.default_rng(2), left_out=left_out
        ).sigma

    with_gold = scene.copy()
    with_gold[gold] = 60
    alone = sigma(scene, None)
    assert sigma(with_gold, None) > 3 * alone
    assert sigma(with_gold, scipy.ndimage.binary_dilation(gold, iterations=6)) < 2 * alone
    # what is left out is left out of both variances
    volume = tomogram(project(scene, ANGLES))
    half = np.zeros(SHAPE, bool)
    half[:, : SHAPE[1] // 2] = True
    expected = alone * np.sqrt(volume[~half].var() / volume.var())
    assert sigma(scene, half) == pytest.approx(expected, rel=0.02)


def test_what_has_no_snr_is_named(contrast: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(0)
    for snr in (0.0, -1.0, np.nan):
        with pytest.raises(InvalidArgument, match="snr is"):
            noise_sigma_for_snr(contrast, ANGLES, SHAPE[0], snr, rng)
    with pytest.raises(InvalidArgument, match="the scene is empty"):
        noise_sigma_for_snr(np.zeros_like(contrast), ANGLES, SHAPE[0], 0.1, rng)
    with pytest.raises(InvalidArgument, match="left_out has shape"):
        noise_sigma_for_snr(contrast, ANGLES, SHAPE[0], 0.1, rng, left_out=np.zeros((2, 2, 2), bool))
    with pytest.raises(InvalidArgument, match="noise_scales have shape"):
        noise_sigma_for_snr(contrast, ANGLES, SHAPE[0], 0.1, rng, noise_scales=np.ones(3))
