"""Wavelet shrinkage, and the noise level that wavelets tell.

Noise spreads evenly over an orthogonal wavelet's coefficients, structure gathers in few. Those of each sub-band are
moved towards 0 by its own threshold sigma^2 / sigma_x, sigma_x^2 the variance of the sub-band less that of noise
(BayesShrink: Chang, Yu & Vetterli 2000, IEEE Trans. Image Process. 9, 1532). A tomogram's noise is not the same at all
frequencies, so each sub-band has a noise level of its own (Johnstone & Silverman 1997, J. R. Stat. Soc. B 59, 319).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress, no_progress, part
from services.io.bricks import Array, ReadSlab, Shape, by_bricks
from services.io.bricks import memory_bytes as brick_bytes

WAVELET = "db2"
_TAPS = 4
_MODE = "symmetric"
_COPIES = 6
# Median of the modulus of a normal variate, as a share of its standard deviation.
_MEDIAN_MODULUS = 0.6744897501960817
_SAMPLES = 8
_SAMPLE_SIDE = 128

Thresholds = list[dict[str, float]]


def wavelet_shrinkage(
    read: ReadSlab,
    shape: Shape,
    noise_standard_deviation: float | None,
    levels: int,
    strength: float,
    write: Callable[[Array], object],
    progress: Progress = no_progress,
    workers: int = 1,
) -> None:
    """Shrinks the coefficients of the wavelet db2, the same everywhere in the volume.

    Thresholds are set by blocks of 128 voxels spread over the volume; then the volume is transformed brick by brick.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        noise_standard_deviation: of noise that is the same at all frequencies, in the volume's unit; where left out,
            each sub-band has its own: median modulus / 0.6745, of its coefficients or of those of its orientation in
            the finest octave, whichever is less, as coarse sub-bands hold more structure than noise.
        levels: octaves of detail that are shrunk.
        strength: factor of the thresholds.
        write: takes the filtered slabs in order.
        progress: called after each brick.
        workers: threads.

    Raises FailedPrecondition for a volume too small for so many levels.
    """
    import pywt  # rarely asked for

    most = pywt.dwt_max_level(min(shape), _TAPS)
    if levels > most:
        raise FailedPrecondition(
            f"a volume of {min(shape)} voxels along its shortest side has {most} levels; wavelet_levels is {levels}"
        )
    thresholds = _thresholds(read, shape, noise_standard_deviation, levels, strength)

    def shrunk(brick: Array) -> Array:
        approximation, *details = pywt.wavedecn(brick, WAVELET, _MODE, levels)
        for detail, limits in zip(details, thresholds, strict=True):
            for band, coefficients in detail.items():
                detail[band] = pywt.threshold(coefficients, limits[band], "soft")
        restored: Array = pywt.waverecn([approximation, *details], WAVELET, _MODE)
        return restored[: brick.shape[0], : brick.shape[1], : brick.shape[2]]

    told = part(progress, 0.05, 1.0)
    by_bricks(read, shape, _halo(levels), shrunk, write, told, "shrinking wavelets", workers)


def memory_bytes(shape: Shape, levels: int, workers: int = 1) -> int:
    """What `wavelet_shrinkage` needs at most."""
    return brick_bytes(shape, _halo(levels), _COPIES, workers)


def noise_standard_deviation(read: ReadSlab, shape: Shape) -> float:
    """That of the noise in a volume, from its finest details.

    The root mean square over the seven sub-bands of the finest octave of median modulus / 0.6745 (Donoho & Johnstone
    1994, Biometrika 81, 425), which few strong coefficients, those of structure, don't move; of noise that is the same
    at all frequencies it is the standard deviation. In eight blocks spread over the volume. Raises FailedPrecondition
    where there is none.
    """
    import pywt

    if min(shape) < 2:
        raise FailedPrecondition(f"a volume of {shape} voxels (z, y, x) tells nothing of noise: give its deviation")
    squares = []
    for block in _blocks(read, shape):
        details = pywt.dwtn(block, WAVELET, _MODE)
        del details["aaa"]
        squares += [float(np.median(np.abs(each))) ** 2 for each in details.values()]
    deviation = float(np.sqrt(np.mean(squares))) / _MEDIAN_MODULUS
    if not deviation > 0:
        raise FailedPrecondition("the volume's finest details are 0: give noise_standard_deviation")
    return deviation


def _halo(levels: int) -> int:
    """Voxels that a coefficient of the coarsest level reaches, there and back, on its grid."""
    step = 1 << levels
    reach = 2 * (_TAPS - 1) * (step - 1)
    grid = max(step, 16)
    return -(-reach // grid) * grid


def _blocks(read: ReadSlab, shape: Shape) -> list[Array]:
    """Blocks along the volume's diagonal."""
    size = [min(side, _SAMPLE_SIDE) for side in shape]
    found = []
    for share in np.linspace(0, 1, _SAMPLES if max(shape) > _SAMPLE_SIDE else 1):
        z, y, x = (round(share * (side - own)) for side, own in zip(shape, size, strict=True))
        found.append(np.ascontiguousarray(read(z, z + size[0])[:, y : y + size[1], x : x + size[2]]))
    return found


def _thresholds(read: ReadSlab, shape: Shape, given: float | None, levels: int, strength: float) -> Thresholds:
    """For each level, coarsest first, and each sub-band."""
    import pywt

    squares: list[dict[str, list[float]]] = [{} for _ in range(levels)]
    medians: list[dict[str, list[float]]] = [{} for _ in range(levels)]
    largest: list[dict[str, float]] = [{} for _ in range(levels)]
    for block in _blocks(read, shape):
        details: list[dict[str, NDArray[Any]]] = pywt.wavedecn(block, WAVELET, _MODE, levels)[1:]
        for level, bands in enumerate(details):
            for band, coefficients in bands.items():
                squares[level].setdefault(band, []).append(float(np.mean(np.square(coefficients, dtype=np.float64))))
                medians[level].setdefault(band, []).append(float(np.median(np.abs(coefficients))))
                largest[level][band] = max(largest[level].get(band, 0.0), float(np.abs(coefficients).max()))
    thresholds: Thresholds = []
    for level in range(levels):
        found = {}
        for band, each in squares[level].items():
            own, finest = (float(np.mean(medians[at][band])) / _MEDIAN_MODULUS for at in (level, -1))
            sigma = min(own, finest) if given is None else given
            signal = np.sqrt(max(float(np.mean(each)) - sigma**2, 0.0))
            # where there is nothing but noise, all goes
            found[band] = min(strength * sigma**2 / signal, largest[level][band]) if signal else largest[level][band]
        thresholds.append(found)
    return thresholds
