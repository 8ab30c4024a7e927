"""What imaging leaves of each Fourier component of a small box: the missing wedge tilt by tilt, CTF and dose.

Each image holds the central slice of its tilt, as thick as the box is wide: a component at the distance d of that
slice, in units of 1 / (box side), has the share w = max(0, 1 - d) of it. A reconstruction weights its images so that
components which several of them hold count once; what is left of a component is then

    sum_t w_t h_t / max(1, sum_t w_t),    h_t = CTF_t(k) * exp(-dose_t / (2 Ne(k)))

(the 3D-CTF of Bharat et al., Structure 23 (2015) 1743, normalised as above). Without a tilt series the sampled part is
the continuous wedge between the tilts' limits.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.fourier import Profile, axis_frequencies, radial_frequency
from cryofleet.numerics.radiation import remaining_amplitude
from cryofleet.numerics.wedge import check_tilt_range, wedge_mask

Array = NDArray[np.float32]
CtfCorrection = Literal["none", "phase_flip", "wiener"]

LARGEST_ASYMMETRY = 2.0
"""Of a transfer function, as a share of its sum, over the box's side: a wedge mask drawn on voxels has up to 0.6 at its
edges, one whose centre is off by a voxel 5 or more."""


def wedge_transfer(box: int, tilt_min_degrees: float, tilt_max_degrees: float) -> Array:
    """1 where sampled, on the half grid `[z, y, x]` of a box of side `box`."""
    check_tilt_range(tilt_min_degrees, tilt_max_degrees)
    return wedge_mask((box, box, box), tilt_min_degrees, tilt_max_degrees, half=True)


def tilt_series_transfer(
    series: TiltSeries,
    box: int,
    voxel_size_angstrom: float,
    *,
    ctf_correction: CtfCorrection = "none",
    use_ctf: bool = True,
    use_dose: bool = True,
) -> Array:
    """What the images of a tilt series leave, float32 on the half grid `[z, y, x]`, protein positive.

    Args:
        series: angles, and as far as used: defocus, voltage, Cs, amplitude contrast; prior dose and exposure.
        box: side of the box, voxels.
        voxel_size_angstrom: of the box.
        ctf_correction: of the tomogram: with `none` the CTF counts with its sign, with `phase_flip` its modulus, with
            `wiener` it is taken as undone.
        use_ctf, use_dose: whether they count.

    Raises FailedPrecondition where the series does not say what is used.
    """
    kz, ky, kx = (axis * box for axis in axis_frequencies((box, box, box)))
    radius = radial_frequency((box, box, box), voxel_size_angstrom).astype(np.float64)
    weights = np.zeros(radius.shape)
    total = np.zeros(radius.shape)
    use_ctf = use_ctf and ctf_correction != "wiener"
    for image, angle in enumerate(np.radians(series.angles_degrees)):
        # the slice of tilt theta is normal to (-sin theta, 0, cos theta)
        distance = np.abs(kz * math.cos(angle) - kx * math.sin(angle)) + 0 * ky
        weight = np.clip(1 - distance, 0, None)
        amplitude = np.ones(radius.shape)
        if use_ctf:
            # protein is dark in images and positive here
            ctf = -series.ctf(image)(radius)
            amplitude = np.abs(ctf) if ctf_correction == "phase_flip" else ctf
        if use_dose and series.prior_dose is not None:
            dose = 0.0 if series.exposure is None else float(series.exposure[image])
            amplitude = amplitude * remaining_amplitude(
                radius, float(series.prior_dose[image]), dose, series.voltage_kv or 300.0
            )
        weights += weight
        total += weight * amplitude
    result: Array = (total / np.maximum(weights, 1)).astype(np.float32)
    # every image holds the mean
    result[0, 0, 0] = 1
    return result


def centred_transfer(volume: Array, name: str = "the transfer function") -> Array:
    """A wedge mask or transfer function as a cube `[z, y, x]` with zero frequency at voxel n // 2, as other programs
    write it, on the half grid.

    Each component is the mean of it and its Friedel mate, which must be equal but for the edges of a mask.

    Raises InvalidArgument, which says `name`, where it is no cube, not finite, zero everywhere, or not symmetric about
    zero frequency.
    """
    box = volume.shape[0]
    if volume.shape != (box,) * 3:
        raise InvalidArgument(f"{name} is {volume.shape}: it must be a cube, zero frequency at voxel n // 2")
    if not np.isfinite(volume).all():
        raise InvalidArgument(f"{name} holds values that are not finite (NaN or infinity)")
    grid = np.fft.ifftshift(volume.astype(np.float32))
    if not grid.ravel()[1:].any():
        raise InvalidArgument(f"{name} is zero everywhere: nothing was imaged")
    mate = np.roll(grid[::-1, ::-1, ::-1], 1, axis=(0, 1, 2))
    if float(np.abs(grid - mate).sum()) > LARGEST_ASYMMETRY / box * float(np.abs(grid).sum()):
        raise InvalidArgument(
            f"{name} is not symmetric about voxel {box // 2} of each axis, where zero frequency must be"
        )
    half: Array = ((grid + mate) / 2)[..., : box // 2 + 1].astype(np.float32)
    return half


def filtered(transfer: Array, profile: Profile) -> Array:
    """A transfer function times a radial profile of |k| in cycles per voxel."""
    box = transfer.shape[0]
    result: Array = (transfer * profile(radial_frequency((box, box, box)))).astype(np.float32)
    return result
