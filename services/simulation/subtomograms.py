"""Subtomograms of isolated particles: each is turned, imaged at every tilt, and reconstructed, as in a tilt series.

The path is that of a tomogram (`projection`, `imaging`, `detector`, `weighted_back_projection`), except that particles
lie on the tilt axis, where the defocus has no gradient, and that no neighbours are there. Boxes lie side by side along
the tilt axis, whose rows are independent, so that a batch of them is projected and reconstructed as one volume.

SNR is rho / (1 - rho), rho the correlation of two subtomograms of one pose with independent noise over the whole
unfiltered box: the variance of the noise-free box over that of the noise in it (Frank & Al-Ali, Nature 256, 376
(1975)). All particles of a set have the same noise, which gives the SNR on average over the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.fourier import fast_length
from cryofleet.progress import Progress, no_progress
from services.simulation.ctf_correction import correction_grid
from services.simulation.density import Density
from services.simulation.detector import Mtf, mtf_grid
from services.simulation.imaging import ImagingParameters, spread_angstrom, transfer_grid
from services.simulation.poses import Poses
from services.simulation.projection import project
from services.simulation.tomogram import CtfCorrection
from services.simulation.weighted_back_projection import weighted_back_projection

Array = NDArray[np.float32]

#: Voxels of the boxes that are worked on together.
BATCH_VOXELS = 1 << 21
#: Particles of each structure by which the signal's variance is measured, and boxes of noise.
SIGNAL_SAMPLE, NOISE_SAMPLE = 24, 16
#: Peak memory, bytes per voxel of a batch and image.
BYTES_PER_SAMPLE = 24


@dataclass(frozen=True)
class Setup:
    """What all particles of a set share.

    densities: of the structures. series: the tilts' truth. parameters: of the imaging. mtf: of the detector, or None.
    ctf_correction: what the images go through before the reconstruction.
    """

    densities: Sequence[Density]
    box_size: int
    series: TiltSeries
    parameters: ImagingParameters
    mtf: Mtf | None
    ctf_correction: CtfCorrection = "none"


@dataclass(frozen=True)
class Calibration:
    """sigma: standard deviation of the images' noise before the detector. signal_variances: of the noise-free boxes,
    by structure, 0 where the set has none of it. noise_variance: of the noise in a box."""

    sigma: float
    signal_variances: tuple[float, ...]
    noise_variance: float


def check_sizes(setup: Setup) -> None:
    """Raise InvalidArgument for a structure that does not fit into the box in all orientations."""
    for density in setup.densities:
        corners = np.argwhere(density.shape)
        radius = float(np.linalg.norm(corners - density.centre, axis=1).max()) / density.oversampling
        if 2 * radius > setup.box_size:
            raise InvalidArgument(
                f"structures: {density.name!r} is {2 * radius:.0f} voxels across, the box has {setup.box_size}; take a "
                "larger box or larger voxels"
            )


def calibrate(
    setup: Setup,
    poses: Poses,
    snr: float,
    seed: np.random.SeedSequence,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Calibration:
    """The noise that gives the whole set an SNR; `poses` are those of the whole set, not of a part of it."""
    counts = np.bincount(poses.classes, minlength=len(setup.densities))
    variances = []
    for structure in range(len(setup.densities)):
        rows = np.flatnonzero(poses.classes == structure)
        if not len(rows):
            variances.append(0.0)
            continue
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, SIGNAL_SAMPLE).round().astype(int))]
        boxes = np.concatenate(list(subtomograms(setup, _select(poses, chosen), None, [], workers)))
        variances.append(float(boxes.var(axis=(1, 2, 3), dtype=np.float64).mean()))
        progress((structure + 1) / (len(setup.densities) + 1), "measuring the signal")
    signal = float(counts @ np.array(variances)) / counts.sum()
    if not signal > 0:
        raise InvalidArgument("structures: they give no signal to set noise against")
    unit = Calibration(1.0, (), 0.0)
    empty = Poses(np.full(NOISE_SAMPLE, -1, np.int32), Rotation.identity(NOISE_SAMPLE), np.zeros((NOISE_SAMPLE, 3)))
    seeds = seed.spawn(NOISE_SAMPLE)
    noise = np.concatenate(list(subtomograms(setup, empty, unit, seeds, workers)))
    variance = float(noise.var(dtype=np.float64))
    sigma = math.sqrt(signal / (snr * variance))
    return Calibration(sigma, tuple(variances), variance * sigma**2)


def subtomograms(
    setup: Setup,
    poses: Poses,
    noise: Calibration | None,
    seeds: Sequence[np.random.SeedSequence],
    workers: int = 1,
    progress: Progress = no_progress,
) -> Iterator[Array]:
    """The boxes `[n, z, y, x]` of particles, batch by batch, protein dark.

    Args:
        setup: what they share.
        poses: of the particles; of class -1 is one that is not there, whose box holds noise alone.
        noise: from `calibrate`; None for none.
        seeds: of each particle's noise, so that a part of a set is the same as that part of the whole.
        workers: threads; the result does not depend on them.
        progress: told of each batch.
    """
    side = setup.box_size
    batch = max(1, BATCH_VOXELS // side**3)
    for first in range(0, len(poses.classes), batch):
        rows = np.arange(first, min(first + batch, len(poses.classes)))
        progress(first / len(poses.classes), "imaging", subtomograms=first)
        images = _images(setup, _select(poses, rows), workers)
        if noise is not None:
            generators = [np.random.default_rng(seeds[row]) for row in rows.tolist()]
            _add_noise(images, setup, noise.sigma, generators, workers)
        if setup.ctf_correction != "none":
            _correct(images, setup, workers)
        count, tilts, _, width = images.shape
        stack = np.ascontiguousarray(images.transpose(1, 0, 2, 3)).reshape(tilts, count * side, width)
        angles = setup.series.angles_degrees
        volume = weighted_back_projection(stack, angles, side, side, workers=workers)
        yield np.ascontiguousarray(volume.reshape(side, count, side, side).transpose(1, 0, 2, 3))
    progress(1.0, "imaging", subtomograms=len(poses.classes))


def image_width(side: int) -> int:
    """Pixels across the tilt axis by which a box is filled at every tilt."""
    return math.ceil(math.sqrt(2) * side) + 2


def _select(poses: Poses, rows: NDArray[np.intp]) -> Poses:
    return Poses(poses.classes[rows], poses.rotations[rows], poses.shifts_voxels[rows])


def specimen(density: Density, rotation: Rotation, shift_voxels: NDArray[np.float64], side: int) -> Array:
    """A cube `[z, y, x]` of V above ice with one particle at voxel side // 2 plus its shift (x, y, z)."""
    whole = np.rint(shift_voxels).astype(int)
    box = density.rotated(rotation, shift_voxels - whole)
    cube = np.zeros((side,) * 3, np.float32)
    there, own = [], []
    for axis in range(3):
        start = side // 2 + int(whole[2 - axis]) - box.shape[axis] // 2
        low, high = max(0, start), min(side, start + box.shape[axis])
        if high <= low:
            return cube
        there.append(slice(low, high))
        own.append(slice(low - start, high - start))
    cube[tuple(there)] = box[tuple(own)]
    return cube


def _images(setup: Setup, poses: Poses, workers: int) -> Array:
    """Noise-free images `[particle, tilt, y, u]` as the detector passes them."""
    side, width, series = setup.box_size, image_width(setup.box_size), setup.series
    count = len(poses.classes)
    images = np.zeros((count, len(series), side, width), np.float32)
    there = np.flatnonzero(poses.classes >= 0)
    if not len(there):
        return images
    # what a shift moves out of the box is imaged all the same
    reach = math.ceil(float(np.abs(poses.shifts_voxels).max()))
    large = side + 2 * reach
    pixel = setup.parameters.pixel_size_angstrom
    margin = min(large, math.ceil(spread_angstrom(series, setup.parameters) / pixel) + 4)
    sides = (fast_length(large + 2 * margin), fast_length(image_width(large) + 2 * margin))
    cubes = np.concatenate(
        [
            specimen(setup.densities[poses.classes[row]], poses.rotations[row], poses.shifts_voxels[row], large)
            for row in there
        ],
        axis=1,
    )
    projections = project(cubes, series.angles_degrees, image_width(large), workers=workers)
    projections = projections.reshape(len(series), len(there), large, -1)
    top, left = (large - side) // 2, image_width(large) // 2 - width // 2
    mtf = mtf_grid(sides, setup.mtf)
    for tilt in range(len(series)):
        spectrum = scipy.fft.rfft2(projections[tilt], sides, workers=workers)
        spectrum *= transfer_grid(series, tilt, setup.parameters, sides) * mtf
        passed = scipy.fft.irfft2(spectrum, sides, workers=workers, overwrite_x=True)
        # the margin lies to the right and below; what spreads to the left and above comes round, and is cut off
        images[there, tilt] = passed[:, top : top + side, left : left + width]
    return images


def _add_noise(
    images: Array, setup: Setup, sigma: float, generators: Sequence[np.random.Generator], workers: int
) -> None:
    shape = images.shape[1:]
    mtf = mtf_grid(shape[1:], setup.mtf)
    for image, generator in zip(images, generators, strict=True):
        noise = generator.standard_normal(shape, dtype=np.float32)
        spectrum = scipy.fft.rfft2(noise, workers=workers)
        spectrum *= np.float32(sigma) * mtf
        image += scipy.fft.irfft2(spectrum, shape[1:], workers=workers, overwrite_x=True)


def _correct(images: Array, setup: Setup, workers: int) -> None:
    """Undo the CTF at the tilt axis; protein stays dark."""
    assert setup.ctf_correction != "none"
    shape, pixel = images.shape[2:], setup.parameters.pixel_size_angstrom
    for tilt in range(len(setup.series)):
        correction = correction_grid(setup.series.ctf(tilt), shape, pixel, method=setup.ctf_correction)
        spectrum = scipy.fft.rfft2(images[:, tilt], workers=workers)
        spectrum *= correction
        images[:, tilt] = scipy.fft.irfft2(spectrum, shape, workers=workers, overwrite_x=True)
