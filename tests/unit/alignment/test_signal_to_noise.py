"""The SNR of particles that were made with one."""

import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc
from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.wedge import wedge_mask
from services.alignment.signal_to_noise import pair_snr, spectral_snr_of_average
from tests.unit.alignment.samples import WEDGE, Blobs, asymmetric, observed, symmetric

BOX = 24
COUNT = 24
TRANSFER = wedge_mask((BOX, BOX, BOX), *WEDGE, half=True)


def particles(
    blobs: Blobs, snr: float, seed: int, wedge: tuple[float, float] | None = WEDGE
) -> tuple[NDArray[np.float32], Rotation, NDArray[np.float64]]:
    """Noise of one level in all, as the mean variance of their signals asks."""
    rng = np.random.default_rng(seed)
    rotations, shifts = uniform_random(COUNT, rng), rng.uniform(-2, 2, (COUNT, 3))
    volumes = [blobs.volume(BOX, rotations[i], shifts[i]) for i in range(COUNT)]
    signal = np.stack([v if wedge is None else observed(v, wedge, None, rng) for v in volumes])
    noise = rng.normal(size=signal.shape)
    if wedge is not None:
        transform = scipy.fft.rfftn(noise, axes=(1, 2, 3)) * wedge_mask((BOX, BOX, BOX), *wedge, half=True)
        noise = scipy.fft.irfftn(transform, signal.shape[1:], axes=(1, 2, 3))
    level = np.sqrt(signal.var(axis=(1, 2, 3)).mean() / snr / noise.var())
    return (signal + level * noise + 3.0).astype(np.float32), rotations, shifts


@pytest.mark.parametrize("snr", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("blobs", [asymmetric(1), symmetric("D7")], ids=["asymmetric", "D7"])
def test_the_snr_is_recovered_within_three_standard_errors(blobs: Blobs, snr: float) -> None:
    boxes, rotations, shifts = particles(blobs, snr, seed=2)
    result = pair_snr(lambda i, n: boxes[i : i + n], rotations, shifts, BOX, transfer=TRANSFER, pairs=50)
    assert result.pairs == 50
    assert abs(result.snr - snr) < 3 * result.snr_error
    assert result.snr_error < (0.2 if snr < 0.1 else 0.06) * snr
    assert result.snr == pytest.approx(result.correlation / (1 - result.correlation))


def test_shells_have_the_snr_of_the_spectrum() -> None:
    """Nothing missing, white noise: each shell's ratio is the structure's power over the noise's."""
    blobs = asymmetric(4)
    boxes, rotations, shifts = particles(blobs, 0.01, seed=5, wedge=None)
    result = pair_snr(lambda i, n: boxes[i : i + n], rotations, shifts, BOX, pairs=60)
    volume = blobs.volume(BOX)
    power = np.abs(scipy.fft.fftn(volume)) ** 2
    k = scipy.fft.fftfreq(BOX) * BOX
    shells = np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)).astype(int)
    noise = volume.size * volume.var() / 0.01
    for s in range(1, 5):
        count = (shells == s).sum()
        ratio = power[shells == s].mean() / noise
        # A correlation r of `count` components is known to (1 - r) sqrt(1 + 2 r) / sqrt(count pairs), or so.
        error = (1 + ratio) * np.sqrt(1 + 3 * ratio) / np.sqrt(count * 60)
        assert abs(result.spectral_snr[s] - ratio) < 4 * error
        assert result.signal_power[s] == pytest.approx(count * ratio / volume.size / 1.01, rel=0.5)
    assert result.spectral_snr[1] > 1
    assert abs(result.spectral_snr[8:]).max() < 0.02
    np.testing.assert_allclose(result.frequency, np.arange(BOX // 2) / BOX)


def test_wrong_poses_and_noise_have_no_snr() -> None:
    boxes, rotations, shifts = particles(asymmetric(2), 0.2, seed=3)
    right = pair_snr(lambda i, n: boxes[i : i + n], rotations, shifts, BOX, transfer=TRANSFER)
    wrong = pair_snr(lambda i, n: boxes[i : i + n], rotations.inv(), shifts, BOX, transfer=TRANSFER)
    assert wrong.snr < 0.7 * right.snr
    noise = np.random.default_rng(0).normal(size=boxes.shape).astype(np.float32)
    none = pair_snr(lambda i, n: noise[i : i + n], rotations, shifts, BOX)
    assert abs(none.snr) < 3 * none.snr_error
    # The correlation of a pair's noise: one over the root of the components in the inner sphere, over all.
    assert 0.3 / np.sqrt(BOX**3 * 24) < none.correlation_error < 1.2 / np.sqrt(BOX**3 * 24)


def test_the_seed_draws_the_pairs_and_scale_does_not_count() -> None:
    boxes, rotations, shifts = particles(asymmetric(2), 0.2, seed=4)
    first, again, other = (
        pair_snr(lambda i, n: boxes[i : i + n], rotations, shifts, BOX, transfer=TRANSFER, pairs=8, seed=s)
        for s in (1, 1, 2)
    )
    assert first.snr == again.snr != other.snr
    scaled = boxes * np.linspace(0.5, 20, COUNT, dtype=np.float32)[:, None, None, None] - np.float32(40)
    same = pair_snr(lambda i, n: scaled[i : i + n], rotations, shifts, BOX, transfer=TRANSFER, pairs=8, seed=1)
    assert same.snr == pytest.approx(first.snr, rel=2e-3)


def test_an_average_has_twice_the_ratio_of_its_halves() -> None:
    """White signal of power 1 and noise of power 2 in each half: the average has 1 / 1."""
    rng = np.random.default_rng(6)
    signal, *noises = (rng.normal(size=(40, 40, 40)) for _ in range(3))
    a, b = ((signal + np.sqrt(2) * n).astype(np.float32) for n in noises)
    ratio = spectral_snr_of_average(fsc(a, b)[1])
    # d(2F/(1-F)) = 4.5 dF at 1/3, and dF is 0.008 over these shells' 15,000 components.
    assert ratio[8:].mean() == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(spectral_snr_of_average(np.array([0.5, 0.0, 1.0])), [2.0, 0.0, np.inf])


def test_bad_input_is_named() -> None:
    boxes, rotations, shifts = particles(asymmetric(2), 1.0, seed=7)

    def run(data: NDArray[np.float32], box: int = BOX, **options: object) -> None:
        pair_snr(lambda i, n: data[i : i + n], rotations, shifts, box, **options)  # type: ignore[arg-type]

    broken = boxes.copy()
    broken[:] = 1
    with pytest.raises(InvalidArgument, match="particle 7 is constant"):
        run(broken, names=np.full(COUNT, 7))
    with pytest.raises(InvalidArgument, match="not finite"):
        run(np.full_like(boxes, np.nan))
    with pytest.raises(InvalidArgument, match="expected a box of 16"):
        run(boxes, 16)
    with pytest.raises(InvalidArgument, match="transfer function is"):
        run(boxes, transfer=TRANSFER[:4])
    with pytest.raises(InvalidArgument, match="zero everywhere"):
        run(boxes, transfer=np.zeros_like(TRANSFER))
    with pytest.raises(InvalidArgument, match="at least 2"):
        run(boxes, pairs=1)
    with pytest.raises(InvalidArgument, match="at least 4 particles"):
        pair_snr(lambda i, n: boxes[i : i + n], rotations[:3], shifts[:3], BOX)
    # Nyquist and corners apart, particles without noise agree.
    clean, rotations, shifts = particles(asymmetric(2), 1e9, seed=8, wedge=None)
    with pytest.raises(InvalidArgument, match="without noise there is no SNR"):
        pair_snr(lambda i, n: clean[:1].repeat(n, 0), Rotation.identity(COUNT), 0 * shifts, BOX)
