"""How far the half maps agree around each voxel, and the average filtered by it.

The local FSC of Cardone et al. (2013, J. Struct. Biol. 184:226) cuts a window out around each point and correlates its
shells. Here the order is turned around, at the cost of a few transforms of the box for each shell: the half maps
are cut to a band of frequencies, and the windowed sums of the products of the bands, which are convolutions, give the
same correlation at every voxel at once,

    rho_s(r) = <a_s b_s>(r) / sqrt(<a_s^2>(r) <b_s^2>(r)),    <f>(r) = sum_r' w_s(r - r') f(r').

Windows are Gaussians whose width is a number of the band's wavelengths, so that the number of independent values in
one, (4 pi)^(3/2) sigma^3 times the 4 pi k^2 dk of the band, and with it the error of rho_s, is the same in every band:
0.09 for noise alone, at one wavelength. A window of fixed size has too few at low frequencies, or is wide beside the
detail of the high ones. Two parts of a map can be told apart over some two wavelengths of their own resolution; nearer
to a part that is better and stronger a voxel seems better than it is.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import Profile, Spectrum, apply_profile, forward, gaussian, inverse, low_pass
from cryofleet.numerics.fsc import shell_counts, shell_sums
from cryofleet.progress import Progress, no_progress

Volume = NDArray[np.float32]

FIRST_CYCLES = 3.0
"""Centre of the coarsest band, in cycles per box."""
BAND_RATIO = 1.12
"""Each band's centre is so many times the last one's; a band has fallen to half at its neighbours'."""
LEVELS = 24
"""So many low-passes are mixed by `filter_locally`."""


@dataclass(frozen=True)
class LocalResolution:
    """`resolution_angstrom` `[z, y, x]`: where the local FSC falls below `threshold`; between `coarsest_angstrom`,
    the value where even the first band is below, and twice the voxel size, where none is.
    """

    resolution_angstrom: Volume
    threshold: float
    coarsest_angstrom: float

    def quantiles(self, mask: NDArray[np.float32], shares: tuple[float, ...] = (0.1, 0.5, 0.9)) -> tuple[float, ...]:
        """Quantiles of the resolution, in Å, over the voxels where the mask is at least a half.

        Raises InvalidArgument where the mask has another shape, or no such voxel.
        """
        if mask.shape != self.resolution_angstrom.shape:
            raise InvalidArgument(f"the mask is {mask.shape}, the half maps are {self.resolution_angstrom.shape}")
        values = self.resolution_angstrom[mask >= 0.5]
        if values.size == 0:
            raise InvalidArgument("the mask is nowhere 0.5 or more: there is no voxel to look at")
        return tuple(float(q) for q in np.quantile(values, shares))


def band_centres(box_size: int) -> NDArray[np.float64]:
    """The bands' centres in cycles per voxel, up to Nyquist."""
    first = FIRST_CYCLES / box_size
    count = math.floor(math.log(0.5 / first) / math.log(BAND_RATIO) + 1e-9) + 1
    return np.asarray(first * BAND_RATIO ** np.arange(count))


def _band(centre: float) -> Profile:
    """A raised cosine over ln k, 1 at the centre and 0 two ratios from it."""

    def profile(frequency: Volume) -> Volume:
        place = np.log(np.maximum(frequency, 1e-6) / centre) / (2 * math.log(BAND_RATIO))
        return np.asarray(np.cos(np.pi / 2 * np.clip(place, -1, 1)) ** 2, dtype=np.float32)

    return profile


def _whitening(spectra: tuple[Spectrum, Spectrum], box_size: int) -> Profile:
    """1 / amplitude of the two maps by shells: else a band shows what its coarser and stronger side has."""
    power = sum(shell_sums(np.abs(s).astype(np.float64) ** 2, box_size) for s in spectra)
    amplitude = np.sqrt(power / shell_counts(box_size))
    inverse_amplitude = 1 / np.maximum(amplitude, 1e-6 * amplitude[1:].max())
    shells = np.arange(box_size // 2 + 1) / box_size

    def profile(frequency: Volume) -> Volume:
        return np.asarray(np.interp(frequency, shells, inverse_amplitude), dtype=np.float32)

    return profile


def local_resolution(
    first: Volume,
    second: Volume,
    voxel_size_angstrom: float,
    *,
    threshold: float = 0.5,
    window_wavelengths: float = 1.0,
    workers: int = 1,
    progress: Progress = no_progress,
) -> LocalResolution:
    """The resolution around each voxel, from two half maps.

    Going from coarse to fine, a voxel's resolution is where its local FSC first falls below the threshold, interpolated
    between bands. The threshold of 0.5 is far from the local FSC's error; 0.143 is not far from it, unless the windows
    are wide (the error falls with window_wavelengths^1.5).

    The box is taken as periodic. Memory: about eight volumes, whatever the number of bands.

    Args:
        first: half map, cubic `[z, y, x]`, not masked.
        second: the other one.
        voxel_size_angstrom: of both.
        threshold: of the local FSC.
        window_wavelengths: standard deviation of the window, in wavelengths of the band.
        workers: threads of the transforms.
        progress: told of each band.

    Raises InvalidArgument where the maps are not cubes of one size, at least 16 wide, finite and not constant, or a
    parameter is out of range.
    """
    if first.ndim != 3 or len(set(first.shape)) != 1 or first.shape != second.shape:
        raise InvalidArgument(f"half maps must be two cubes of one size, not {first.shape} and {second.shape}")
    n = first.shape[0]
    if n < 16:
        raise InvalidArgument(f"a box of {n} voxels is too small for a local resolution: at least 16 are needed")
    if not 0 < threshold < 1:
        raise InvalidArgument(f"threshold is {threshold:g}: it must lie between 0 and 1")
    if not 0.5 <= window_wavelengths <= 10:
        raise InvalidArgument(f"window_wavelengths is {window_wavelengths:g}: it must lie in 0.5 to 10")
    for name, volume in (("first", first), ("second", second)):
        if not np.isfinite(volume).all() or not float(volume.max()) > float(volume.min()):
            raise InvalidArgument(f"the {name} half map is constant or holds values that are not finite")
    spectra = forward(first, workers), forward(second, workers)
    white = _whitening(spectra, n)
    for spectrum in spectra:
        apply_profile(spectrum, first.shape, white)
    centres = band_centres(n)
    frequency = np.full(first.shape, 0.5, dtype=np.float32)
    resolved = np.ones(first.shape, dtype=bool)
    last = np.ones(first.shape, dtype=np.float32)
    for i, centre in enumerate(centres):
        progress(i / len(centres), "correlating the half maps", band=i)
        a, b = (inverse(apply_profile(s.copy(), first.shape, _band(centre)), first.shape, workers) for s in spectra)
        window = window_wavelengths / centre
        cross = gaussian(a * b, window, workers=workers)
        power = gaussian(a * a, window, workers=workers) * gaussian(b * b, window, workers=workers)
        # Rounding may leave a little less than nothing where nothing is.
        floor = 1e-8 * float(power.max())
        here = np.where(power > floor, cross / np.sqrt(np.maximum(power, max(floor, 1e-30))), np.float32(0))
        falls = resolved & (here < threshold)
        if i == 0:
            frequency[falls] = centre
        else:
            part = (last[falls] - threshold) / (last[falls] - here[falls])
            frequency[falls] = centres[i - 1] + part * (centre - centres[i - 1])
        resolved &= ~falls
        last = here
    coarsest = voxel_size_angstrom / float(centres[0])
    return LocalResolution(np.float32(voxel_size_angstrom) / frequency, threshold, coarsest)


def filter_locally(
    volume: Volume,
    resolution_angstrom: Volume,
    voxel_size_angstrom: float,
    *,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Volume:
    """The average low-passed at each voxel to the resolution there.

    Low-passes at up to 24 frequencies, with edges of one shell, are mixed linearly by each voxel's own frequency: where
    the resolution is the same everywhere the result is the ordinary low-pass.

    Args:
        volume: `[z, y, x]`.
        resolution_angstrom: the same shape, positive.
        voxel_size_angstrom: of both.
        workers: threads of the transforms.
        progress: told of each low-pass.

    Raises InvalidArgument where the shapes differ or a resolution is not positive.
    """
    if volume.shape != resolution_angstrom.shape:
        raise InvalidArgument(f"the average is {volume.shape}, the resolution map {resolution_angstrom.shape}")
    if not (np.isfinite(resolution_angstrom).all() and float(resolution_angstrom.min()) > 0):
        raise InvalidArgument("the resolution map must be positive everywhere")
    frequency = np.minimum(np.float32(voxel_size_angstrom) / resolution_angstrom, np.float32(0.5))
    low, high = float(frequency.min()), float(frequency.max())
    edge = 1 / min(volume.shape)
    steps = min(LEVELS - 1, math.ceil((high - low) / (edge / 2)))
    result = np.zeros(volume.shape, dtype=np.float32)
    for level in range(steps + 1):
        progress(level / (steps + 1), "filtering")
        share = np.maximum(0, 1 - np.abs((frequency - low) * np.float32(steps / max(high - low, 1e-9)) - level))
        cutoff = low + level * (high - low) / max(steps, 1)
        result += share * low_pass(
            volume, voxel_size_angstrom / cutoff, voxel_size_angstrom, edge=edge, workers=workers
        )
    return result
