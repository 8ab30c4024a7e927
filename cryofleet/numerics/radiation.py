"""What the electron dose leaves of a specimen's detail.

Grant & Grigorieff, eLife 4, e06980 (2015): the amplitude of the Fourier components at frequency k falls as
exp(-N / (2 Ne(k))) with the dose N (e/Å^2), where the critical exposure at 300 kV is (their eq. 3)

    Ne(k) = 0.245 k^-1.665 + 2.81     (e/Å^2, k in 1/Å).

At other voltages Ne goes with the square of the electrons' speed, as the inelastic cross-section goes with its inverse;
at 200 kV that is 0.80, the factor of the paper.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

_SCALE, _POWER, _OFFSET = 0.24499, -1.6649, 2.8141
_REFERENCE_KV = 300.0
_REST_ENERGY_KV = 510.99895


def _squared_speed(voltage_kv: float) -> float:
    """(v / c)^2 of electrons."""
    return 1 - (_REST_ENERGY_KV / (_REST_ENERGY_KV + voltage_kv)) ** 2


def critical_exposure(k: Any, voltage_kv: float = 300.0) -> NDArray[np.float64]:
    """Ne (e/Å^2) at frequencies k (1/Å): the dose that leaves 1/e of the power; infinite at k = 0."""
    if not (math.isfinite(voltage_kv) and voltage_kv > 0):
        raise InvalidArgument(f"voltage_kv is {voltage_kv:g}, it must be positive")
    with np.errstate(divide="ignore"):
        exposure = _SCALE * np.power(np.abs(np.asarray(k, np.float64)), _POWER) + _OFFSET
    return np.asarray(exposure * (_squared_speed(voltage_kv) / _squared_speed(_REFERENCE_KV)), np.float64)


def remaining_amplitude(k: Any, prior_dose: float, dose: float = 0.0, voltage_kv: float = 300.0) -> NDArray[np.float64]:
    """The fraction of the undamaged amplitude at frequencies k (1/Å) in an image.

    Args:
        k: frequencies.
        prior_dose: e/Å^2 before the image.
        dose: e/Å^2 of the image itself, over which the amplitude is averaged; 0 gives exp(-prior_dose / (2 Ne)).
        voltage_kv: acceleration voltage.

    Raises InvalidArgument for a negative dose.
    """
    if not (prior_dose >= 0 and dose >= 0):
        raise InvalidArgument(f"prior_dose ({prior_dose:g}) and dose ({dose:g}) must not be negative")
    rate = 0.5 / critical_exposure(k, voltage_kv)
    amplitude = np.exp(-rate * prior_dose)
    faded = rate * dose
    # the mean of exp(-x) over 0 to faded; its limit where nothing fades
    mean = np.ones_like(faded)
    np.divide(-np.expm1(-faded), faded, out=mean, where=faded > 0)
    return np.asarray(amplitude * mean, np.float64)
