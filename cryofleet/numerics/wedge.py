"""The missing wedge of a single-axis tilt series.

The beam runs along z and the tilt axis along y. Tilting the sample by theta puts the central slice that contains
(cos theta, 0, sin theta) into the detector's plane, so what is sampled are the frequencies whose folded angle
atan2(kz, kx) lies between the smallest and the largest tilt, and the tilt axis itself, which every slice contains.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

# Angles at the very edge of the range belong to it; this takes up rounding (radians).
_EDGE = 1e-6


def check_tilt_range(tilt_min_degrees: float, tilt_max_degrees: float) -> None:
    """Raise InvalidArgument unless -90 <= tilt_min < tilt_max <= 90."""
    if not -90.0 <= tilt_min_degrees < tilt_max_degrees <= 90.0:
        raise InvalidArgument(
            f"tilt range {tilt_min_degrees:g} to {tilt_max_degrees:g} degrees: "
            "both must lie in -90 to 90, the smaller first"
        )


def is_sampled(kx: Any, kz: Any, tilt_min_degrees: float, tilt_max_degrees: float) -> Any:
    """Whether frequencies are sampled; `kx` and `kz` are arrays of NumPy or tensors of PyTorch in any common unit.

    The wedge test is two signed distances to the planes that bound it, so that no angle is ever computed.
    """
    low, high = np.radians(tilt_min_degrees), np.radians(tilt_max_degrees)
    # Fold k and -k onto kx >= 0.
    z = kz * (1 - 2 * (kx < 0))
    x = abs(kx)
    slack = _EDGE * (x + abs(z))
    above = z * float(np.cos(low)) - x * float(np.sin(low)) >= -slack
    below = z * float(np.cos(high)) - x * float(np.sin(high)) <= slack
    sampled = above & below
    if tilt_min_degrees <= -90.0 or tilt_max_degrees >= 90.0:
        # -90 and +90 degrees are one direction, and the fold of kx = 0 may take either.
        sampled = sampled | (x <= _EDGE * abs(z))
    return sampled


@lru_cache(maxsize=8)
def _full_mask(shape: tuple[int, int, int], tilt_min_degrees: float, tilt_max_degrees: float) -> NDArray[np.float32]:
    kz = np.fft.fftfreq(shape[0])[:, None]
    kx = np.fft.fftfreq(shape[2])[None, :]
    plane = is_sampled(kx, kz, tilt_min_degrees, tilt_max_degrees)
    # A sample at the Nyquist frequency stands for +1/2 and -1/2 alike: it is sampled if either is.
    mate = np.roll(plane[::-1, ::-1], 1, axis=(0, 1))
    plane = plane | mate
    mask: NDArray[np.float32] = np.repeat(plane[:, None, :], shape[1], axis=1).astype(np.float32)
    mask.setflags(write=False)
    return mask


def wedge_mask(
    shape: tuple[int, int, int], tilt_min_degrees: float, tilt_max_degrees: float, half: bool = False
) -> NDArray[np.float32]:
    """The wedge mask of a box: 1 where sampled, 0 where missing, 1 at zero frequency, Friedel-symmetric.

    `shape` is (z, y, x) of the box in real space. The mask is in the order of `fftfreq`, zero frequency first; with
    `half` only the part that `rfftn` keeps along x. The array is the caller's own.

    Raises InvalidArgument where the tilt range is none.
    """
    check_tilt_range(tilt_min_degrees, tilt_max_degrees)
    mask = _full_mask((shape[0], shape[1], shape[2]), float(tilt_min_degrees), float(tilt_max_degrees))
    return mask[..., : shape[2] // 2 + 1].copy() if half else mask.copy()
