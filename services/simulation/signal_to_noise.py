"""The noise of images that gives their tomogram the SNR asked for.

SNR is the variance of the noise-free tomogram over that of the noise in it, over the whole unfiltered tomogram that a
plain weighted back-projection gives of images less their means, gold left out: rho / (1 - rho) for the correlation rho
of two tomograms with independent noise. Reconstruction is linear, so that noise of any level is a factor times noise of
level 1; both variances are measured on reconstructions, neither is estimated from a formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress, part
from services.simulation.detector import Mtf, apply_mtf
from services.simulation.weighted_back_projection import weighted_back_projection

#: Random numbers that the variance of noise is measured by: it is good to sqrt(2 / this), times a small factor for the
#: tomogram's correlations.
NOISE_SAMPLES = 2_000_000
#: Bytes of tomogram reconstructed at once.
BLOCK_BYTES = 1 << 26


class Reconstruct(Protocol):
    """A linear reconstruction of rows: images (n, y, x) to a volume (depth, y, width)."""

    def __call__(
        self,
        stack: NDArray[np.float32],
        tilt_angles_degrees: NDArray[np.float64],
        depth: int,
        width: int,
        *,
        workers: int,
    ) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class NoiseLevel:
    """sigma: standard deviation of the noise of an untilted image, before the detector. signal_variance: of the
    noise-free tomogram. noise_variance: of the noise that sigma gives to the tomogram."""

    sigma: float
    signal_variance: float
    noise_variance: float


def noise_sigma_for_snr(
    images: NDArray[np.float32],
    tilt_angles_degrees: NDArray[np.float64],
    depth: int,
    snr: float,
    rng: np.random.Generator,
    *,
    noise_scales: NDArray[np.float64] | None = None,
    mtf: Mtf | None = None,
    left_out: NDArray[np.bool_] | None = None,
    width: int | None = None,
    reconstruct: Reconstruct = weighted_back_projection,
    workers: int = 1,
    progress: Progress = no_progress,
) -> NoiseLevel:
    """The noise that gives a tomogram of noise-free images an SNR.

    Args:
        images: (n, y, x) without noise, as the detector passes them (`detector.apply_mtf`).
        tilt_angles_degrees: (n,).
        depth: of the tomogram.
        snr: asked for.
        rng: of the noise that is measured.
        noise_scales: (n,) noise of each image over that of an untilted one (`detector.noise_scales`); 1 if left out.
        mtf: the detector's transfer, which the noise passes.
        left_out: voxels (depth, y, width) that don't count: gold.
        width: of the tomogram; that of the images if left out.
        reconstruct: how the tomogram is made.
        workers: threads of the reconstruction.
        progress: told of each block of rows.

    Raises InvalidArgument: the SNR is not positive, or there is no signal to set noise against.
    """
    if not (math.isfinite(snr) and snr > 0):
        raise InvalidArgument(f"snr is {snr:g}, it must be positive")
    count, height, image_width = images.shape
    width = image_width if width is None else width
    scales = np.ones(count) if noise_scales is None else np.asarray(noise_scales, np.float64)
    if scales.shape != (count,):
        raise InvalidArgument(f"noise_scales have shape {scales.shape}, expected ({count},)")
    if left_out is not None and left_out.shape != (depth, height, width):
        raise InvalidArgument(f"left_out has shape {left_out.shape}, the tomogram {(depth, height, width)}")

    # as `tomogram` does, so that the edges of the field don't count as signal
    means = np.array([image.mean(dtype=np.float64) for image in images], np.float32)[:, None, None]
    block = min(height, max(1, BLOCK_BYTES // (4 * depth * width)))
    signal = _Variance()
    for start in range(0, height, block):
        progress(0.8 * start / height, "measuring the signal")
        rows = np.arange(start, min(start + block, height))
        volume = reconstruct(images[:, rows] - means, tilt_angles_degrees, depth, width, workers=workers)
        signal.add(volume, None if left_out is None else left_out[:, rows])
    if not signal.variance > 0:
        raise InvalidArgument("the scene is empty: without a signal no noise has the snr asked for")

    report = part(progress, 0.8, 1.0)
    wanted = max(1, math.ceil(NOISE_SAMPLES / (count * image_width)))
    noise = _Variance()
    rows_done = 0
    while rows_done < wanted:
        report(rows_done / wanted, "measuring noise")
        # rows spread over the whole height, as what is left out may lie anywhere
        rows = np.unique(np.linspace(0, height - 1, min(block, height, wanted - rows_done)).round().astype(int))
        sample = np.empty((count, len(rows), image_width), np.float32)
        for index, scale in enumerate(scales):
            plane = rng.standard_normal((height, image_width), dtype=np.float32)
            sample[index] = np.float32(scale) * apply_mtf(plane, mtf, workers)[rows]
        volume = reconstruct(sample, tilt_angles_degrees, depth, width, workers=workers)
        noise.add(volume, None if left_out is None else left_out[:, rows])
        rows_done += len(rows)
    if not noise.variance > 0:
        raise InvalidArgument("no voxel of the tomogram counts for the snr: everything is left out")
    sigma = math.sqrt(signal.variance / (snr * noise.variance))
    return NoiseLevel(sigma, signal.variance, sigma**2 * noise.variance)


class _Variance:
    """Variance over voxels that come in blocks, in double precision."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.floating[Any]], left_out: NDArray[np.bool_] | None) -> None:
        counted = values.ravel() if left_out is None else values[~left_out]
        self._count += counted.size
        self._total += float(counted.sum(dtype=np.float64))
        self._squares += float(np.einsum("i,i->", counted, counted, dtype=np.float64))

    @property
    def variance(self) -> float:
        if not self._count:
            return 0.0
        return max(0.0, self._squares / self._count - (self._total / self._count) ** 2)
