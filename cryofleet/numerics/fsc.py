"""Fourier shell correlation and the resolution read off it."""

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument


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


def fsc(
    first: NDArray[np.float32], second: NDArray[np.float32], mask: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fourier shell correlation of two cubic volumes, each multiplied by `mask` where there is one.

    Returns the shells' frequencies in cycles per voxel (0, 1/n, .. up to Nyquist) and the correlation in each; a
    shell that is empty in either volume correlates to 0.

    Raises InvalidArgument where the volumes are not cubes of one size.
    """
    if first.ndim != 3 or len(set(first.shape)) != 1 or first.shape != second.shape:
        raise InvalidArgument(f"FSC needs two cubes of one size, not {first.shape} and {second.shape}")
    if mask is not None and mask.shape != first.shape:
        raise InvalidArgument(f"FSC: the mask is {mask.shape}, the volumes are {first.shape}")
    n = first.shape[0]
    a = first.astype(np.float64) if mask is None else first.astype(np.float64) * mask
    b = second.astype(np.float64) if mask is None else second.astype(np.float64) * mask
    fa, fb = scipy.fft.rfftn(a), scipy.fft.rfftn(b)
    shells = shell_index(n).ravel()
    count = n // 2 + 1
    weights = _half_weights(n)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.bincount(shells, weights=(values * weights).ravel(), minlength=count)
        return np.asarray(sums[:count], dtype=np.float64)

    cross = total((fa * fb.conj()).real)
    power_a, power_b = total(np.abs(fa) ** 2), total(np.abs(fb) ** 2)
    product = np.sqrt(power_a * power_b)
    # Rounding leaves power of order eps^2 in a shell that is empty.
    empty = product <= 1e-24 * max(float(product.max()), 1e-300)
    values = np.where(empty, 0.0, cross / np.where(empty, 1.0, product))
    return np.arange(count) / n, values


def resolution(
    frequency: NDArray[np.float64], values: NDArray[np.float64], voxel_size_angstrom: float, threshold: float = 0.143
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
