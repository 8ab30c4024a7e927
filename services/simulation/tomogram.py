"""From a scene to the tomogram that one would have reconstructed of it: missing wedge, noise to an SNR, contrast.

The wedge is applied in Fourier space to the whole volume, the noise included, as a reconstruction holds no data there
at all. White Gaussian noise is scaled so that the variance of the signal (the noise-free reconstruction) over that of
the noise (what is left in the reconstruction) is the SNR asked for, over the whole unfiltered tomogram. The transform
takes the volume as periodic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.progress import Progress, no_progress

#: Peak memory of `reconstruct` in bytes per voxel, its input included: scene, signal, noise, a spectrum and the
#: transform's work.
BYTES_PER_VOXEL = 28


@dataclass(frozen=True)
class Reconstruction:
    """A tomogram `[z, y, x]` (V, sign by contrast) and its variances: signal without noise, and tomogram less
    signal."""

    tomogram: NDArray[np.float32]
    signal_variance: float
    noise_variance: float

    @property
    def snr(self) -> float:
        """The measured ratio of the two."""
        return self.signal_variance / self.noise_variance


def reconstruct(
    density: NDArray[np.float32],
    snr: float,
    tilt_min_degrees: float,
    tilt_max_degrees: float,
    contrast: str,
    rng: np.random.Generator,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Reconstruction:
    """The tomogram of a scene.

    Args:
        density: the grand model `[z, y, x]`, protein positive; left as it is.
        snr: variance of the signal over that of the noise, both within the wedge.
        tilt_min_degrees: lowest tilt angle.
        tilt_max_degrees: highest tilt angle.
        contrast: "dark" makes protein negative, "light" leaves it positive.
        rng: of the noise.
        workers: threads of the transforms; the result does not depend on them.
        progress: told of each stage.

    Raises InvalidArgument where the scene is empty, so that no noise level has the SNR asked for.
    """
    if contrast not in ("dark", "light"):
        raise InvalidArgument(f"contrast is {contrast!r}, it must be 'dark' or 'light'")
    if snr <= 0:
        raise InvalidArgument(f"snr is {snr:g}, it must be positive")
    z, _, x = density.shape
    # the same for every ky: one plane does for the volume
    wedge = wedge_mask((z, 1, x), tilt_min_degrees, tilt_max_degrees, half=True)
    progress(0.0, "missing wedge")
    signal = _within(density, wedge, workers)
    if contrast == "dark":
        np.negative(signal, out=signal)
    signal_variance = _variance(signal)
    if signal_variance <= 0:
        raise InvalidArgument("the scene is empty: without a signal no noise has the snr asked for")
    progress(0.35, "noise")
    noise = rng.standard_normal(density.shape, dtype=np.float32)
    progress(0.55, "noise within the wedge")
    noise = _within(noise, wedge, workers)
    noise *= np.float32(np.sqrt(signal_variance / snr / _variance(noise)))
    progress(0.9, "measuring")
    noise += signal
    return Reconstruction(noise, signal_variance, _variance(noise, signal))


def _within(volume: NDArray[np.float32], wedge: NDArray[np.float32], workers: int) -> NDArray[np.float32]:
    spectrum = fourier.forward(volume, workers)
    spectrum *= wedge
    return fourier.inverse(spectrum, volume.shape, workers, overwrite=True)


def _variance(volume: NDArray[np.float32], less: NDArray[np.float32] | None = None) -> float:
    """Variance over all voxels, of the difference where a second volume is given; in double precision, plane by
    plane."""
    count, total, squares = 0, 0.0, 0.0
    for index, plane in enumerate(volume):
        values = plane.astype(np.float64)
        if less is not None:
            values -= less[index]
        count += values.size
        total += float(values.sum())
        squares += float((values * values).sum())
    return max(0.0, squares / count - (total / count) ** 2)
