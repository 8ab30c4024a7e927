"""The contrast transfer function (CTF) of the electron microscope.

    CTF(k) = -[sqrt(1 - A^2) sin chi + A cos chi] = -sin(chi + arcsin A)
    chi(k) = pi lambda defocus k^2 - pi Cs lambda^3 k^4 / 2 + phase shift

Underfocus is positive, A is the fraction of amplitude contrast, k is in 1/Å. The sign makes protein dark: the image of
a weak phase object is 1 + 2 CTF * phase. Where defocus is astigmatic, the azimuth is counted from the image's u axis
(along a row) towards its v axis (across the rows).

The tilt's gradient. The beam runs along z, from the source at +z down to the detector, and the tilt axis is y. Tilting
by theta takes the point (x, y, z) of the specimen to the detector's u = x cos(theta) + z sin(theta) and to the height
z' = -x sin(theta) + z cos(theta) along the beam, in Å from the axis. An underfocused lens is focused on a plane on the
source's side of the specimen, so that a point nearer to the source is less out of focus:

    defocus(x, z) = defocus - z' = defocus + u tan(theta) - z / cos(theta)

which on the specimen's midplane (z = 0) is defocus + u tan(theta). `defocus_at` is the only place that says so.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

#: Rest energy of the electron, kV.
_REST_ENERGY_KV = 510.99895
#: h c in kV Å.
_PLANCK_LIGHT_SPEED = 12.39841984
#: Å in a µm and in a mm.
_MICROMETRE, _MILLIMETRE = 1e4, 1e7
#: Beyond this angle the midplane is seen edge-on and a defocus for each column means nothing: the gradient is that of
#: this angle.
GRADIENT_LIMIT_DEGREES = 80.0


def electron_wavelength_angstrom(voltage_kv: float) -> float:
    """The relativistic wavelength of electrons: h c / sqrt(E (E + 2 m c^2)), E the accelerating energy; 0.019687 Å at
    300 kV."""
    if not (math.isfinite(voltage_kv) and voltage_kv > 0):
        raise InvalidArgument(f"voltage_kv is {voltage_kv:g}, it must be positive")
    return _PLANCK_LIGHT_SPEED / math.sqrt(voltage_kv * (voltage_kv + 2 * _REST_ENERGY_KV))


def interaction_constant(voltage_kv: float) -> float:
    """The phase that a potential gives to electrons, radians for each V Å of its integral along the beam.

    2 pi / (lambda E) (m c^2 + E) / (2 m c^2 + E): Kirkland, Advanced Computing in Electron Microscopy (2010), eq. 2.5;
    6.526e-4 at 300 kV.
    """
    wavelength = electron_wavelength_angstrom(voltage_kv)
    relativity = (_REST_ENERGY_KV + voltage_kv) / (2 * _REST_ENERGY_KV + voltage_kv)
    return 2 * math.pi / (wavelength * voltage_kv * 1e3) * relativity


@dataclass(frozen=True, kw_only=True)
class Ctf:
    """The transfer function of one image; see this file's head for signs.

    defocus_um: mean of the two principal ones, underfocus positive. astigmatism_um: the largest less the least.
    astigmatism_angle_degrees: azimuth of the largest. phase_shift_degrees: of a phase plate. b_factor: envelope
    exp(-b k^2 / 4), Å^2.

    Raises InvalidArgument for values that no microscope has.
    """

    defocus_um: float
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.07
    astigmatism_um: float = 0.0
    astigmatism_angle_degrees: float = 0.0
    phase_shift_degrees: float = 0.0
    b_factor: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise InvalidArgument(f"{field.name} is {getattr(self, field.name)}, it must be a finite number")
        if self.voltage_kv <= 0:
            raise InvalidArgument(f"voltage_kv is {self.voltage_kv:g}, it must be positive")
        if not 0 <= self.amplitude_contrast <= 1:
            raise InvalidArgument(f"amplitude_contrast is {self.amplitude_contrast:g}, it must lie in 0 to 1")
        if self.cs_mm < 0 or self.b_factor < 0:
            raise InvalidArgument(f"cs_mm ({self.cs_mm:g}) and b_factor ({self.b_factor:g}) must not be negative")

    @property
    def wavelength_angstrom(self) -> float:
        return electron_wavelength_angstrom(self.voltage_kv)

    def with_defocus(self, defocus_um: float) -> Ctf:
        """The same at another mean defocus."""
        return dataclasses.replace(self, defocus_um=defocus_um)

    def chi(self, k: Any, azimuth: Any = None) -> NDArray[np.float64]:
        """The phase chi (radians) at frequencies k (1/Å).

        `azimuth` (radians, broadcast against k) counts where there is astigmatism; the mean defocus holds without it.
        """
        squared = np.square(np.asarray(k, np.float64))
        wavelength = self.wavelength_angstrom
        defocus: Any = self.defocus_um * _MICROMETRE
        if azimuth is not None and self.astigmatism_um:
            turn = np.asarray(azimuth, np.float64) - math.radians(self.astigmatism_angle_degrees)
            defocus = defocus + 0.5 * self.astigmatism_um * _MICROMETRE * np.cos(2 * turn)
        aberration = 0.5 * math.pi * self.cs_mm * _MILLIMETRE * wavelength**3
        phase: NDArray[np.float64] = (math.pi * wavelength * defocus - aberration * squared) * squared
        return phase + math.radians(self.phase_shift_degrees)

    def __call__(self, k: Any, azimuth: Any = None) -> NDArray[np.float64]:
        """The CTF at frequencies k (1/Å), envelope included."""
        value = -np.sin(self.chi(k, azimuth) + math.asin(self.amplitude_contrast))
        if self.b_factor:
            value *= np.exp(-self.b_factor / 4 * np.square(np.asarray(k, np.float64)))
        return np.asarray(value, np.float64)

    def zeros(self, max_k: float, azimuth: float | None = None) -> NDArray[np.float64]:
        """The frequencies (1/Å) in (0, max_k] at which the CTF vanishes, ascending.

        chi + arcsin A = n pi is quadratic in k^2, so the roots are exact.
        """
        defocus = self.defocus_um
        if azimuth is not None:
            turn = azimuth - math.radians(self.astigmatism_angle_degrees)
            defocus += 0.5 * self.astigmatism_um * math.cos(2 * turn)
        wavelength = self.wavelength_angstrom
        slope = math.pi * wavelength * defocus * _MICROMETRE
        bend = 0.5 * math.pi * self.cs_mm * _MILLIMETRE * wavelength**3
        offset = math.radians(self.phase_shift_degrees) + math.asin(self.amplitude_contrast)
        squares = [0.0, max_k**2]
        if bend > 0 and 0 < slope / (2 * bend) < max_k**2:
            squares.append(slope / (2 * bend))
        phases = [(slope - bend * s) * s + offset for s in squares]
        orders = range(math.ceil(min(phases) / math.pi), math.floor(max(phases) / math.pi) + 1)
        roots: set[float] = set()
        for order in orders:
            target = offset - order * math.pi
            # bend s^2 - slope s - target = 0
            if bend == 0:
                candidates = [-target / slope] if slope else []
            else:
                under_root = slope**2 + 4 * bend * target
                if under_root < 0:
                    continue
                # the root of the larger magnitude first; the product of the two is -target / bend
                large = (slope + math.copysign(math.sqrt(under_root), slope)) / (2 * bend)
                candidates = [large, -target / (bend * large)] if large else [0.0]
            roots.update(math.sqrt(s) for s in candidates if 0 < s <= max_k**2)
        return np.array(sorted(roots))


def image_frequencies(
    shape: tuple[int, int], pixel_size_angstrom: float, half: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|k| (1/Å) and azimuth (radians) on the FFT grid of images `[y, x]`, the origin first; with `half` that of a real
    transform, x // 2 + 1 wide."""
    ky, kx = _axis_frequencies(shape, pixel_size_angstrom, half)
    return np.hypot(ky, kx), np.arctan2(ky, kx)


def radial_frequency(shape: tuple[int, int], pixel_size_angstrom: float, half: bool = True) -> NDArray[np.float64]:
    """The |k| of `image_frequencies` alone."""
    ky, kx = _axis_frequencies(shape, pixel_size_angstrom, half)
    return np.sqrt(ky * ky + kx * kx)


def _axis_frequencies(
    shape: tuple[int, int], pixel_size_angstrom: float, half: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if not (math.isfinite(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InvalidArgument(f"pixel_size_angstrom is {pixel_size_angstrom:g}, it must be positive")
    height, width = shape
    ky = np.fft.fftfreq(height, pixel_size_angstrom)
    kx = np.fft.rfftfreq(width, pixel_size_angstrom) if half else np.fft.fftfreq(width, pixel_size_angstrom)
    return ky.astype(np.float64)[:, None], kx.astype(np.float64)[None, :]


def ctf_grid(ctf: Ctf, shape: tuple[int, int], pixel_size_angstrom: float, half: bool = True) -> NDArray[np.float32]:
    """The CTF on the FFT grid of images `[y, x]`, float32; with `half` that of a real transform, x // 2 + 1 wide."""
    if ctf.astigmatism_um:
        return ctf(*image_frequencies(shape, pixel_size_angstrom, half)).astype(np.float32)
    return ctf(radial_frequency(shape, pixel_size_angstrom, half)).astype(np.float32)


def defocus_at(defocus_um: float, tilt_degrees: float, u_angstrom: Any, height_angstrom: Any = 0.0) -> Any:
    """The defocus (µm, underfocus positive) at the detector's coordinate u of an image tilted by theta.

    defocus + u tan(theta) - z / cos(theta); see this file's head for the geometry it follows from.

    Args:
        defocus_um: where the tilt axis is.
        tilt_degrees: theta; taken as +-`GRADIENT_LIMIT_DEGREES` where it is beyond.
        u_angstrom: distance from the tilt axis on the detector, a number or an array.
        height_angstrom: z of the point in the untilted specimen, above its midplane towards the source.
    """
    theta = math.radians(min(max(tilt_degrees, -GRADIENT_LIMIT_DEGREES), GRADIENT_LIMIT_DEGREES))
    return defocus_um + (u_angstrom * math.tan(theta) - height_angstrom / math.cos(theta)) / _MICROMETRE
