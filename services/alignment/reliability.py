"""How far a reference can be believed: the sphere in which its particle stands out of the noise, and its components.

A reference is taken as s + m, the particle's density and noise that fills the box evenly, a particle X as R s + n. What
lies far from the particle shows the noise. A reference without noise is believed everywhere.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.numerics.fsc import shell_counts, shell_sums
from cryofleet.numerics.masks import centred_coordinates, cosine_edge, radius_grid, usual_edge_voxels

SEEN = 1 / 3
"""In cycles per voxel: the particle is looked for in so much detail."""
LARGEST_OFFSET = 0.125
"""Of the box: the particle's centre is looked for so far from the box's, along each axis."""
SIGNIFICANT = 5.0
"""Standard deviations by which the particle must stand out of the noise to be seen."""
NO_NOISE = 0.02
"""Of the box's mean square: with so little far from the particle, a reference counts as free of noise."""
INFORMATION = 0.9
"""The band holds this share of what a reference says of rotations."""
LEAST_CYCLES = 7.0
"""The band reaches at least so far, in cycles per box."""


@dataclass(frozen=True)
class Sphere:
    """About `centre` (x, y, z), in voxels from the box's centre."""

    centre: NDArray[np.float64]
    radius_voxels: float

    def mask(self, box_size: int, edge: float) -> NDArray[np.float32]:
        """1 inside, falling to 0 at the surface over `edge` voxels as half a cosine."""
        r = centred_coordinates(box_size)
        x, y, z = (r - offset for offset in self.centre)
        distance = np.sqrt(x**2 + y[:, None] ** 2 + z[:, None, None] ** 2)
        return cosine_edge(distance - self.radius_voxels + edge, edge)


def particle_sphere(reference: NDArray[np.float32]) -> Sphere | None:
    """The sphere within which two volumes like this one would correlate most significantly; None for the whole box: no
    particle stands out of the noise, or there is no noise.

    With E the energy in a sphere of volume V beyond the noise's s^2 V, two such volumes correlate by E, with a variance
    of 2 s^2 E + s^4 V: what is outside adds noise alone. s^2 is taken from the corners, beyond the box's inscribed
    sphere. Components count by their frequency, as they tell of rotations.
    """
    n = reference.shape[0]
    small = _cropped(reference, min(round(SEEN * n), n // 2 - 1))
    m = small.shape[0]
    corners = radius_grid(m) > m / 2
    square = (small - small[corners].mean()) ** 2
    noise = float(square[corners].mean())
    excess = square - noise
    if noise <= NO_NOISE * float(square.mean()):
        return None
    spectrum = scipy.fft.rfftn(excess)
    r = centred_coordinates(m)
    best, found = 0.0, None
    radii = np.arange(2.0, m / 2, 0.5)
    for radius in radii:
        near = np.abs(r) <= min(LARGEST_OFFSET * m, m / 2 - radius)
        ball = np.fft.ifftshift((radius_grid(m) <= radius).astype(np.float64))
        energy = scipy.fft.irfftn(spectrum * scipy.fft.rfftn(ball), s=(m,) * 3)[np.ix_(near, near, near)]
        place = np.unravel_index(int(energy.argmax()), energy.shape)
        most, volume = float(energy[place]), float(ball.sum())
        if most < SIGNIFICANT * noise * np.sqrt(2 * volume):
            continue
        significance = most / np.sqrt(2 * noise * most + noise**2 * volume)
        if significance > best:
            z, y, x = (r[near][i] for i in place)
            best, found = significance, Sphere(np.array([x, y, z]) * n / m, float(radius) * n / m)
    return None if found is None or found.radius_voxels * m / n > radii[-1] - 0.25 else found


def _cropped(volume: NDArray[np.float32], k_max: int) -> NDArray[np.float64]:
    """A volume's components up to `k_max` cycles per box, times their frequency, on a grid that just holds them; the
    centres lie on each other.
    """
    n, m = volume.shape[0], 2 * (k_max + 1)
    spectrum = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(volume.astype(np.float64))))
    kept = slice(n // 2 - m // 2, n // 2 - m // 2 + m)
    radius = radius_grid(m)
    spectrum = spectrum[kept, kept, kept] * np.where(radius <= k_max, radius, 0)
    inner: NDArray[np.float64] = scipy.fft.fftshift(scipy.fft.ifftn(scipy.fft.ifftshift(spectrum)).real) * (m / n) ** 3
    return inner


def weights(reference: NDArray[np.float32], sphere: Sphere | None) -> NDArray[np.float64]:
    """How much each shell 0 to n//2 of the reference counts, at most 1: P / (P + N), its Wiener filter.

    Of particles whose noise is white, the likelihood of a pose is largest where the sum of P / (P + c N) X conj(M) is,
    c between 1, for an average of many, and 2, for one of two particles. P, the particle's power, and N, the noise's,
    are compared within and outside of `sphere`; without one the reference counts as free of noise.
    """
    n = reference.shape[0]
    if sphere is None:
        return np.ones(n // 2 + 1)
    edge = usual_edge_voxels(n)
    inside = sphere.mask(n, edge)
    outside = 1 - Sphere(sphere.centre, sphere.radius_voxels + edge).mask(n, edge)
    level = float((reference * outside).sum() / outside.sum())
    within, noise = (_power(reference - level, mask) for mask in (inside, outside))
    particle = scipy.ndimage.gaussian_filter1d(within - noise, 0.7).clip(min=0)
    reliable: NDArray[np.float64] = particle / np.maximum(particle + noise, 1e-30)
    return np.maximum(reliable / max(float(reliable.max()), 1e-30), 1e-4)


def _power(volume: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spectral power by shell of what a mask shows, for each voxel that it shows."""
    n = volume.shape[0]
    power = np.abs(scipy.fft.rfftn((volume * mask).astype(np.float64))) ** 2
    return np.asarray(shell_sums(power, n) / shell_counts(n) / float(np.square(mask).sum()), dtype=np.float64)


def band_cycles(reference: NDArray[np.float32], reliable: NDArray[np.float64]) -> float:
    """Up to which frequency, in cycles per box, the reference holds nearly all that it says of rotations.

    A component of power P that counts w says w k^2 P; `reference` is the masked one.
    """
    n = reference.shape[0]
    k = np.arange(n // 2 + 1)
    power = shell_sums(np.abs(scipy.fft.rfftn(reference.astype(np.float64))) ** 2, n)
    # Of the power, the share `reliable` is the particle's.
    told = np.cumsum((reliable**2 * k**2 * power)[: n // 2])
    finest = n / 2 - 0.5
    return float(min(max(np.searchsorted(told, INFORMATION * told[-1]) + 0.5, LEAST_CYCLES), finest))
