"""Fourier shell correlation, its correction for a mask, and the resolution read off it."""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

HALF_MAP_THRESHOLD = 0.143
"""Of the FSC of half maps (Rosenthal & Henderson, J. Mol. Biol. 333 (2003) 721)."""


def shell_index(box_size: int) -> NDArray[np.int64]:
    """Shell of every component of `rfftn` of a cubic box: the nearest integer to n |k|, k in cycles per voxel."""
    k = np.fft.fftfreq(box_size) * box_size
    kx = np.fft.rfftfreq(box_size) * box_size
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + kx[None, None, :] ** 2)
    return np.asarray(np.rint(radius), dtype=np.int64)


def _half_weights(box_size: int) -> NDArray[np.float64]:
    """How many components of the full transform each plane x of `rfftn` stands for."""
    weights = np.full(box_size // 2 + 1, 2.0)
    weights[0] = 1.0
    if box_size % 2 == 0:
        weights[-1] = 1.0
    return weights


def shell_counts(box_size: int) -> NDArray[np.float64]:
    """How many components of the full transform of a cubic box lie in each shell 0 to n//2."""
    weights = np.broadcast_to(_half_weights(box_size), (box_size, box_size, box_size // 2 + 1))
    counts = np.bincount(shell_index(box_size).ravel(), weights=weights.ravel())
    return np.asarray(counts[: box_size // 2 + 1], dtype=np.float64)


def shell_sums(values: NDArray[np.float64], box_size: int) -> NDArray[np.float64]:
    """Sums over the shells 0 to n//2 of the full transform, of real values on the grid of `rfftn`."""
    weighted = (values * _half_weights(box_size)).ravel()
    count = box_size // 2 + 1
    sums = np.bincount(shell_index(box_size).ravel(), weights=weighted, minlength=count)
    return np.asarray(sums[:count], dtype=np.float64)


def _check(first: NDArray[np.float32], second: NDArray[np.float32], mask: NDArray[np.float32] | None) -> None:
    if first.ndim != 3 or len(set(first.shape)) != 1 or first.shape != second.shape:
        raise InvalidArgument(f"FSC needs two cubes of one size, not {first.shape} and {second.shape}")
    if mask is not None and mask.shape != first.shape:
        raise InvalidArgument(f"FSC: the mask is {mask.shape}, the volumes are {first.shape}")


def _correlation(
    fa: NDArray[np.complex128], fb: NDArray[np.complex128], box_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frequencies and correlation of two transforms (`rfftn`) by shells."""
    cross = shell_sums((fa * fb.conj()).real, box_size)
    power_a, power_b = shell_sums(np.abs(fa) ** 2, box_size), shell_sums(np.abs(fb) ** 2, box_size)
    product = np.sqrt(power_a * power_b)
    # Rounding leaves power of order eps^2 in a shell that is empty.
    empty = product <= 1e-24 * max(float(product.max()), 1e-300)
    values = np.where(empty, 0.0, cross / np.where(empty, 1.0, product))
    return np.arange(box_size // 2 + 1) / box_size, values


def fsc(
    first: NDArray[np.float32], second: NDArray[np.float32], mask: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fourier shell correlation of two cubic volumes, each multiplied by `mask` where there is one.

    Returns the shells' frequencies in cycles per voxel (0, 1/n, .. up to Nyquist) and the correlation in each; a
    shell that is empty in either volume correlates to 0.

    Raises InvalidArgument where the volumes are not cubes of one size.
    """
    _check(first, second, mask)
    a = first.astype(np.float64) if mask is None else first.astype(np.float64) * mask
    b = second.astype(np.float64) if mask is None else second.astype(np.float64) * mask
    return _correlation(scipy.fft.rfftn(a), scipy.fft.rfftn(b), first.shape[0])


def resolution(
    frequency: NDArray[np.float64],
    values: NDArray[np.float64],
    voxel_size_angstrom: float,
    threshold: float = HALF_MAP_THRESHOLD,
) -> float:
    """Resolution in Å where the FSC first falls below `threshold`, interpolated between shells.

    The zero frequency is left out. Where it never falls below, twice the voxel size (Nyquist); where it is below from
    the start, the first shell's wavelength.
    """
    below = np.flatnonzero(values[1:] < threshold)
    if below.size == 0:
        return 2.0 * voxel_size_angstrom
    i = int(below[0]) + 1
    if i == 1:
        return voxel_size_angstrom / float(frequency[1])
    part = (values[i - 1] - threshold) / (values[i - 1] - values[i])
    crossing = frequency[i - 1] + part * (frequency[i] - frequency[i - 1])
    return voxel_size_angstrom / float(crossing)


RANDOMISED_BELOW = 0.8
"""Phases are randomised from the first shell on where the unmasked FSC lies below this."""


@dataclass(frozen=True)
class CorrectedFsc:
    """FSC curves by shells of `frequency` in cycles per voxel (0, 1/n, .. up to Nyquist).

    `randomised` is the masked FSC after the phases beyond `randomised_from_angstrom` were made random: what the mask
    alone makes of two volumes that have no detail in common. `corrected` is the masked FSC without that.
    """

    voxel_size_angstrom: float
    frequency: NDArray[np.float64]
    unmasked: NDArray[np.float64]
    masked: NDArray[np.float64]
    randomised: NDArray[np.float64]
    corrected: NDArray[np.float64]
    randomised_from_angstrom: float

    def resolution_angstrom(self, threshold: float = HALF_MAP_THRESHOLD) -> float:
        """Where the corrected FSC first falls below `threshold`, in Å."""
        return resolution(self.frequency, self.corrected, self.voxel_size_angstrom, threshold)


def _with_random_phases(
    spectrum: NDArray[np.complex128], chosen: NDArray[np.bool_], box_size: int, rng: np.random.Generator
) -> NDArray[np.complex128]:
    """A transform (`rfftn`) with the phases of the `chosen` components replaced by those of white noise, which are
    uniform and those of a real volume.
    """
    noise = scipy.fft.rfftn(rng.standard_normal((box_size,) * 3))
    result = spectrum.copy()
    result[chosen] = np.abs(spectrum[chosen]) * np.exp(1j * np.angle(noise[chosen]))
    return result


def corrected_fsc(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    mask: NDArray[np.float32],
    voxel_size_angstrom: float,
    *,
    randomise_from_angstrom: float | None = None,
    seed: int = 0,
    realisations: int = 8,
) -> CorrectedFsc:
    """FSC of two half maps under a mask, freed of what the mask itself adds (Chen et al. 2013, Ultramicroscopy 135:24).

    A mask convolves the transform, so it carries what the halves have in common at low resolution, its own edge above
    all, into shells where they have nothing in common. How much is measured on the halves with random phases beyond
    some frequency: corrected = (masked - randomised) / (1 - randomised) from there on, masked before.
    The first shells are corrected too: it is there that a mask spills most of what the halves have in common, and where
    they agree indeed, as smoothly falling curves do, the correction takes little (some programs leave two shells out).

    The masked FSC has a sampling error, and so has the randomised one. The second is averaged over `realisations` of
    the phases: with m of them the error of the corrected FSC of noise is sqrt(1 + 1/m) times that of the masked FSC,
    where a single one makes it 1.4 times.

    Args:
        first: half map, cubic `[z, y, x]`.
        second: the other one.
        mask: 0 to 1, same shape; its edge soft.
        voxel_size_angstrom: of all three.
        randomise_from_angstrom: phases of finer detail than this are randomised; where left out, from the first shell
            on in which the unmasked FSC is below 0.8. Where none is, nothing is randomised, nothing corrected.
        seed: of the random phases.
        realisations: how often they are drawn.

    Raises InvalidArgument where shapes differ, the mask is empty, or `randomise_from_angstrom` is beyond the box or
    finer than the voxels hold.
    """
    _check(first, second, mask)
    if not mask.any():
        raise InvalidArgument("FSC: the mask is zero everywhere")
    if realisations < 1:
        raise InvalidArgument(f"realisations is {realisations}: at least 1 is needed")
    n = first.shape[0]
    spectra = [scipy.fft.rfftn(v.astype(np.float64)) for v in (first, second)]
    frequency, unmasked = _correlation(spectra[0], spectra[1], n)
    _, masked = fsc(first, second, mask)
    shells = n // 2
    if randomise_from_angstrom is None:
        below = np.flatnonzero(unmasked[1:] < RANDOMISED_BELOW)
        start = int(below[0]) + 1 if below.size else shells + 1
    else:
        largest, smallest = n * voxel_size_angstrom, 2 * voxel_size_angstrom
        if not smallest <= randomise_from_angstrom <= largest:
            raise InvalidArgument(
                f"randomise_from_angstrom is {randomise_from_angstrom:g}: it must lie between Nyquist and the box, "
                f"{smallest:g} to {largest:g} Å"
            )
        start = max(1, round(n * voxel_size_angstrom / randomise_from_angstrom))
    randomised, corrected = masked.copy(), masked.copy()
    if start <= shells:
        chosen = shell_index(n) >= start
        rng = np.random.default_rng(seed)
        curves = []
        for _ in range(realisations):
            noisy = [scipy.fft.irfftn(_with_random_phases(s, chosen, n, rng), s=first.shape) * mask for s in spectra]
            curves.append(_correlation(scipy.fft.rfftn(noisy[0]), scipy.fft.rfftn(noisy[1]), n)[1])
        randomised = np.mean(curves, axis=0)
        applied = np.arange(shells + 1) >= start
        left = np.maximum(1 - randomised, 1e-6)
        corrected = np.where(applied, np.clip((masked - randomised) / left, -1.0, 1.0), masked)
    return CorrectedFsc(
        voxel_size_angstrom,
        frequency,
        unmasked,
        masked,
        randomised,
        corrected,
        n * voxel_size_angstrom / min(start, shells),
    )
