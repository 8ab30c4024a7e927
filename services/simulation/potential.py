"""From scatterers to a density: the electrostatic potential of atoms, or of a phantom's pseudo-atoms, on a grid.

A scatterer is a Gaussian of a given width, convolved with the form factor of its kind: a sum of a exp(-b k^2 / 4). Both
real atoms (electron form factors, B-factors) and phantoms (plain Gaussians) are of this form, so both are rendered here
and nowhere else.

Potentials are in volts and relative to vitreous ice, so that solvent is 0 and structures of different sources have
their right brightness beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.numerics import fourier
from cryofleet.numerics.compiled import compiled

#: Electron scattering factor (Å) to the integral of its potential (V Å^3): h^2 / (2 pi m_e e). Kirkland, Advanced
#: Computing in Electron Microscopy (2010), appendix C.
VOLT_ANGSTROM_SQUARED = 47.87801
#: Width of the Gaussian by which scatterers are put onto the grid, in voxels of that grid; it is divided out again in
#: Fourier space.
SMEAR_VOXELS = 1.0


@dataclass(frozen=True)
class FormFactor:
    """f(k) = sum of amplitude exp(-b k^2 / 4), amplitudes in V Å^3, b in Å^2, k in 1/Å."""

    amplitudes: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def total(self) -> float:
        """f(0), the integral of the potential, V Å^3."""
        return float(sum(self.amplitudes))

    def __call__(self, frequency: NDArray[np.float32]) -> NDArray[np.float32]:
        squared = frequency * frequency
        value = np.zeros_like(squared)
        for amplitude, b in zip(self.amplitudes, self.b, strict=True):
            value += np.float32(amplitude) * np.exp(np.float32(-b / 4) * squared)
        return value


#: The form factor of a scatterer whose weight is its integral (V Å^3) and whose width is its sigma: a phantom's
#: pseudo-atom.
UNIT = FormFactor((1.0,), (0.0,))


@dataclass(frozen=True)
class Scatterers:
    """What makes up a structure.

    positions: (n, 3), x, y, z in Å. weights: (n,), occupancies, or V Å^3 for kind `UNIT`. sigmas: (n,), Gaussian width
    in Å, thermal motion included. kinds: (n,), indices into `factors`. molecular_weight_kda: of all of them.
    """

    positions: NDArray[np.float64]
    weights: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    kinds: NDArray[np.int32]
    factors: tuple[FormFactor, ...]
    molecular_weight_kda: float

    def centred(self) -> Scatterers:
        """The same with the centroid of its potential at the origin, which is what a position in a truth table
        means."""
        integrals = self._integrals()
        centroid = integrals @ self.positions / integrals.sum()
        return Scatterers(
            self.positions - centroid, self.weights, self.sigmas, self.kinds, self.factors, self.molecular_weight_kda
        )

    def integral(self) -> float:
        """The integral of its potential, V Å^3."""
        return float(self._integrals().sum())

    def _integrals(self) -> NDArray[np.float64]:
        return np.asarray(self.weights * np.array([factor.total for factor in self.factors])[self.kinds])

    def radius_angstrom(self) -> float:
        """Distance of the farthest scatterer from the origin."""
        return float(np.sqrt((self.positions**2).sum(axis=1).max()))


def render(
    scatterers: Scatterers, side: int, spacing_angstrom: float, resolution_angstrom: float, workers: int = 1
) -> NDArray[np.float32]:
    """The potential (V) of scatterers on a cube `[z, y, x]`, the origin at voxel side // 2, low-passed to a resolution.

    Each kind is put onto the grid as Gaussians wide enough for it and multiplied by its form factor in Fourier space,
    where that width is divided out: exact for every resolution the grid holds. |k| <= 1 / resolution is kept whole,
    with a soft edge of `fourier.EDGE` / 2 above; the resolution should be at least 3 spacings, or what the grid's
    aliasing adds shows at the edge.
    """
    total = np.zeros((side, side, side // 2 + 1), np.complex64)
    centre = side // 2
    positions = scatterers.positions[:, ::-1] / spacing_angstrom + centre
    widths = np.sqrt((scatterers.sigmas / spacing_angstrom) ** 2 + SMEAR_VOXELS**2)
    cutoff = spacing_angstrom / resolution_angstrom
    for kind, factor in enumerate(scatterers.factors):
        chosen = scatterers.kinds == kind
        if not chosen.any():
            continue
        grid = np.zeros((side, side, side), np.float32)
        _splat(grid, positions[chosen], scatterers.weights[chosen], widths[chosen])

        def profile(frequency: NDArray[np.float32], factor: FormFactor = factor) -> NDArray[np.float32]:
            # beyond the cutoff the division would blow up noise of the rounding; the step is 0 there anyway
            inside: NDArray[np.float32] = np.minimum(frequency, np.float32(cutoff + fourier.EDGE))
            sharpened: NDArray[np.float32] = np.exp(np.float32(2 * np.pi**2 * SMEAR_VOXELS**2) * inside * inside)
            step = fourier.soft_step(frequency, cutoff, fourier.EDGE / 2)
            return step * sharpened * factor(inside / np.float32(spacing_angstrom))

        total += fourier.apply_profile(fourier.forward(grid, workers), grid.shape, profile)
    total *= np.float32(spacing_angstrom**-3)
    return fourier.inverse(total, (side, side, side), workers, overwrite=True)


@compiled
def _splat(
    grid: NDArray[np.float32], positions: NDArray[np.float64], weights: NDArray[np.float64], widths: NDArray[np.float64]
) -> None:  # pragma: no cover - compiled
    """Add normalised Gaussians, out to 4.5 widths, to `grid`; positions (z, y, x) and widths in its voxels."""
    side = grid.shape[0]
    longest = int(np.ceil(4.5 * widths.max())) * 2 + 2
    profile = np.empty((3, longest))
    first = np.empty(3, np.int64)
    count = np.empty(3, np.int64)
    for n in range(len(positions)):
        width = widths[n]
        reach = 4.5 * width
        for axis in range(3):
            position = positions[n, axis]
            low = max(0, int(np.ceil(position - reach)))
            high = min(side - 1, int(np.floor(position + reach)))
            first[axis] = low
            count[axis] = max(0, high - low + 1)
            for i in range(count[axis]):
                distance = (low + i - position) / width
                profile[axis, i] = np.exp(-0.5 * distance * distance) / (width * np.sqrt(2 * np.pi))
        for i in range(count[0]):
            for j in range(count[1]):
                in_plane = weights[n] * profile[0, i] * profile[1, j]
                for k in range(count[2]):
                    grid[first[0] + i, first[1] + j, first[2] + k] += np.float32(in_plane * profile[2, k])
