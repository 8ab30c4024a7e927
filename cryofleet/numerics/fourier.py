"""Fourier transforms and filters of volumes.

Everything works on the last three axes, so a stack of boxes `[n, z, y, x]` is filtered in one call. Frequencies are in
cycles per voxel (Nyquist is 0.5) where no voxel size is given, and resolutions in Å where one is. Transforms are real
to complex in single precision; volumes are taken as periodic, which is what a discrete transform does.

A radial filter is given by its profile, a function of the frequency, and is applied plane by plane: a filter of a large
tomogram needs no second array of the tomogram's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

Array = NDArray[np.float32]
Spectrum = NDArray[np.complex64]
Profile = Callable[[Array], Array]
Shape = tuple[int, int, int]

AXES = (-3, -2, -1)
#: Width of the raised-cosine edge of the filters here, in cycles per voxel: a tenth of Nyquist.
EDGE = 0.05
#: `fourier_crop` transforms so many voxels at a time, which bounds its memory.
CHUNK_VOXELS = 1 << 22


def fast_length(length: int) -> int:
    """The least length, at least `length`, whose transform is fast (a product of small primes)."""
    return int(scipy.fft.next_fast_len(length, real=True))


def forward(volume: NDArray[np.floating[Any]], workers: int = 1) -> Spectrum:
    """The half spectrum `[..., z, y, x // 2 + 1]` of real volumes `[..., z, y, x]`, the origin first on each axis."""
    # SciPy's types know of double precision alone; single stays single
    return cast(Spectrum, scipy.fft.rfftn(np.asarray(volume, np.float32), axes=AXES, workers=workers))


def inverse(spectrum: Spectrum, shape: tuple[int, ...], workers: int = 1, overwrite: bool = False) -> Array:
    """The real volumes of a half spectrum; `shape` is that of the volumes, of which the last three sides count.

    With `overwrite` the spectrum's memory may be used for the work, and its contents are lost.
    """
    sides = tuple(int(side) for side in shape[-3:])
    volume: Array = scipy.fft.irfftn(spectrum, sides, axes=AXES, workers=workers, overwrite_x=overwrite)
    return volume


def axis_frequencies(shape: tuple[int, ...], half: bool = True) -> tuple[Array, Array, Array]:
    """Frequencies (kz, ky, kx) in cycles per voxel of each axis of the FFT grid, shaped to broadcast as `[z, y, x]`.

    With `half` the x axis is that of a real transform, x // 2 + 1 long; Nyquist is then +0.5 there, as numpy has it.
    """
    z, y, x = shape[-3:]
    kz = np.fft.fftfreq(z).astype(np.float32)[:, None, None]
    ky = np.fft.fftfreq(y).astype(np.float32)[None, :, None]
    kx = (np.fft.rfftfreq(x) if half else np.fft.fftfreq(x)).astype(np.float32)[None, None, :]
    return kz, ky, kx


def radial_frequency(shape: tuple[int, ...], voxel_size_angstrom: float = 1.0, half: bool = True) -> Array:
    """|k| on the FFT grid of a volume of `shape`, float32 `[z, y, x]`: in 1/Å, or in cycles per voxel for a voxel size
    of 1."""
    kz, ky, kx = axis_frequencies(shape, half)
    radius: Array = np.sqrt(kz * kz + ky * ky + kx * kx)
    return radius / np.float32(voxel_size_angstrom)


def apply_profile(spectrum: Spectrum, shape: tuple[int, ...], profile: Profile) -> Spectrum:
    """Multiply a half spectrum of volumes of `shape`, in place, by `profile(|k|)`, |k| in cycles per voxel; returns
    it."""
    kz, ky, kx = axis_frequencies(shape)
    in_plane = ky[0] * ky[0] + kx[0] * kx[0]
    for index, frequency in enumerate(kz.ravel()):
        spectrum[..., index, :, :] *= profile(np.sqrt(in_plane + frequency * frequency)).astype(np.float32, copy=False)
    return spectrum


def apply_transfer(volume: NDArray[np.floating[Any]], transfer: NDArray[np.floating[Any]], workers: int = 1) -> Array:
    """Volumes `[..., z, y, x]` times a real transfer function on their half FFT grid `[z, y, x // 2 + 1]` (a wedge
    mask, say)."""
    spectrum = forward(volume, workers)
    if transfer.shape != spectrum.shape[-3:]:
        raise InvalidArgument(
            f"the transfer function has shape {transfer.shape}, the half spectrum {spectrum.shape[-3:]}"
        )
    spectrum *= transfer.astype(np.float32, copy=False)
    return inverse(spectrum, volume.shape, workers, overwrite=True)


def soft_step(frequency: Array, cutoff: float, edge: float = EDGE) -> Array:
    """1 up to `cutoff`, 0 from `cutoff + edge`, half a cosine between them. An edge of 0 is a hard step."""
    if edge <= 0:
        return (frequency <= cutoff).astype(np.float32)
    position = np.clip((frequency - np.float32(cutoff)) / np.float32(edge), 0, 1)
    step: Array = np.float32(0.5) + np.float32(0.5) * np.cos(np.float32(np.pi) * position)
    return step


def band_profile(
    voxel_size_angstrom: float,
    low_resolution_angstrom: float | None = None,
    high_resolution_angstrom: float | None = None,
    edge: float = EDGE,
) -> Profile:
    """The profile of a band pass that keeps 1/low <= |k| <= 1/high whole, for `apply_profile`.

    Args:
        voxel_size_angstrom: voxel size that turns the resolutions into cycles per voxel.
        low_resolution_angstrom: the coarsest detail kept, Å; no high-pass where None.
        high_resolution_angstrom: the finest detail kept, Å; no low-pass where None.
        edge: width of the raised-cosine edges, outside the band, in cycles per voxel.
    """
    if voxel_size_angstrom <= 0:
        raise InvalidArgument(f"voxel_size_angstrom is {voxel_size_angstrom:g}, it must be positive")
    for name, value in (("low", low_resolution_angstrom), ("high", high_resolution_angstrom)):
        if value is not None and value <= 0:
            raise InvalidArgument(f"the {name} resolution is {value:g} Å, it must be positive")
    if (
        low_resolution_angstrom is not None
        and high_resolution_angstrom is not None
        and low_resolution_angstrom <= high_resolution_angstrom
    ):
        raise InvalidArgument(
            f"a band from {low_resolution_angstrom:g} Å to {high_resolution_angstrom:g} Å is empty: "
            "the low resolution must be the larger number"
        )

    def profile(frequency: Array) -> Array:
        kept = np.ones_like(frequency)
        if high_resolution_angstrom is not None:
            kept *= soft_step(frequency, voxel_size_angstrom / high_resolution_angstrom, edge)
        if low_resolution_angstrom is not None:
            start = voxel_size_angstrom / low_resolution_angstrom
            # 0 at and below start - edge and 1 from start; where the edge would pass DC it begins there instead
            width = min(edge, start)
            kept *= np.float32(1) - soft_step(frequency, start - width, width) if width > 0 else np.float32(1)
        return kept

    return profile


def filter_radially(volume: NDArray[np.floating[Any]], profile: Profile, workers: int = 1) -> Array:
    """Volumes `[..., z, y, x]` filtered by a radial profile (a function of |k| in cycles per voxel)."""
    spectrum = apply_profile(forward(volume, workers), volume.shape, profile)
    return inverse(spectrum, volume.shape, workers, overwrite=True)


def low_pass(
    volume: NDArray[np.floating[Any]],
    resolution_angstrom: float,
    voxel_size_angstrom: float,
    *,
    edge: float = EDGE,
    workers: int = 1,
) -> Array:
    """Volumes `[..., z, y, x]` without detail finer than `resolution_angstrom`.

    |k| <= 1/resolution is kept whole and falls to zero over `edge` cycles per voxel (raised cosine). A resolution finer
    than the voxels hold changes nothing but what lies in the corners of Fourier space.
    """
    return filter_radially(volume, band_profile(voxel_size_angstrom, None, resolution_angstrom, edge), workers)


def high_pass(
    volume: NDArray[np.floating[Any]],
    resolution_angstrom: float,
    voxel_size_angstrom: float,
    *,
    edge: float = EDGE,
    workers: int = 1,
) -> Array:
    """Volumes `[..., z, y, x]` without anything coarser than `resolution_angstrom`, the mean included (raised-cosine
    edge)."""
    return filter_radially(volume, band_profile(voxel_size_angstrom, resolution_angstrom, None, edge), workers)


def band_pass(
    volume: NDArray[np.floating[Any]],
    low_resolution_angstrom: float | None,
    high_resolution_angstrom: float | None,
    voxel_size_angstrom: float,
    *,
    edge: float = EDGE,
    workers: int = 1,
) -> Array:
    """Volumes `[..., z, y, x]` with the detail between two resolutions only, e.g. 200 and 30 Å; see `band_profile`."""
    profile = band_profile(voxel_size_angstrom, low_resolution_angstrom, high_resolution_angstrom, edge)
    return filter_radially(volume, profile, workers)


def gaussian(volume: NDArray[np.floating[Any]], sigma: float, *, workers: int = 1) -> Array:
    """Volumes `[..., z, y, x]` convolved (periodically) with a normalised Gaussian of `sigma` voxels: exp(-2 pi^2
    sigma^2 k^2)."""
    if sigma < 0:
        raise InvalidArgument(f"sigma is {sigma:g} voxels, it must not be negative")
    exponent = np.float32(-2 * np.pi**2 * sigma**2)
    return filter_radially(volume, lambda frequency: np.exp(exponent * frequency * frequency), workers)


def fourier_crop(volume: NDArray[np.floating[Any]], factor: int, workers: int = 1) -> Array:
    """Volumes `[..., z, y, x]` binned by an integer factor through the removal of the frequencies above the new
    Nyquist.

    No aliasing, unlike averaging blocks. The mean is kept. Voxel 0 stays at voxel 0: a position p becomes p / factor.
    Sides that the factor does not divide lose their last voxels first, so that the new voxel size is exactly `factor`
    times the old on every axis.

    Separable, so each axis is transformed alone and in chunks: the memory needed besides the input and the output is
    one array of the input's size over the factor, and a few chunks of 16 MiB.
    """
    if factor < 1:
        raise InvalidArgument(f"the binning factor is {factor}, it must be at least 1")
    if min(volume.shape[-3:]) < factor:
        raise InvalidArgument(f"a volume of shape {volume.shape} can't be binned by {factor}")
    z, y, x = (side // factor * factor for side in volume.shape[-3:])
    cropped: Array = np.asarray(volume, np.float32)[..., :z, :y, :x]
    if factor == 1:
        return np.ascontiguousarray(cropped)
    for axis in (-1, -2, -3):
        cropped = _crop_axis(cropped, axis, factor, workers)
    return np.ascontiguousarray(cropped)


def _crop_axis(volume: Array, axis: int, factor: int, workers: int) -> Array:
    """Bin one axis; its length is a multiple of the factor. Chunks run over the first axis of the other two."""
    length = volume.shape[axis] // factor
    result = np.empty(
        [side // factor if a - volume.ndim == axis else side for a, side in enumerate(volume.shape)], np.float32
    )
    lines, cropped = np.moveaxis(volume, axis, -1), np.moveaxis(result, axis, -1)
    step = max(1, CHUNK_VOXELS // max(1, int(np.prod(lines.shape[1:]))))
    for start in range(0, len(lines), step):
        spectrum = scipy.fft.rfft(lines[start : start + step], axis=-1, workers=workers)[..., : length // 2 + 1]
        cropped[start : start + step] = scipy.fft.irfft(spectrum, length, axis=-1, workers=workers)
    cropped /= np.float32(factor)
    return result
