"""Gold beads and the edge of the carbon film.

Their potentials are those of isolated atoms at the solids' densities, gold at 19.3 and amorphous carbon at 2.0 g/cm^3,
less that of the ice which they displace: 25 V and 7.5 V. Bonds lower a solid's mean potential by about a fifth; that
is left out, as beads are opaque either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from services.simulation.potential import VOLT_ANGSTROM_SQUARED
from services.simulation.structures import ICE_SCATTERING

_AVOGADRO = 0.602214
#: g/cm^3.
_DENSITIES = {"Au": 19.3, "C": 2.0}


def potential_above_ice(element: str) -> float:
    """Mean potential (V) of the solid, above that of ice."""
    atom = gemmi.Element(element)
    scattering = float(sum(atom.c4322.a)) * _DENSITIES[element] * _AVOGADRO / atom.weight
    return VOLT_ANGSTROM_SQUARED * (scattering - ICE_SCATTERING)


def soft_inside(distance_voxels: NDArray[np.floating]) -> NDArray[np.float32]:
    """The part of each voxel that lies inside of a surface, by the signed distance of its centre, negative inside."""
    return np.asarray(np.clip(0.5 - distance_voxels, 0, 1), np.float32)


def bead(radius_voxels: float, fraction: NDArray[np.float64]) -> NDArray[np.float32]:
    """The part of each voxel that is in a bead, `[z, y, x]`; its centre lies at the box's middle voxel plus `fraction`
    (x, y, z)."""
    reach = int(np.ceil(radius_voxels)) + 1
    z, y, x = (np.arange(-reach, reach + 1) - offset for offset in fraction[::-1])
    radius = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    return soft_inside(radius - radius_voxels)


@dataclass(frozen=True)
class CarbonEdge:
    """The rim of a round hole; all in voxels: centre (x, y) and radius of the hole, and the film's extent in z."""

    centre: NDArray[np.float64]
    hole_radius: float
    low: float
    high: float

    def plane(self, z: int, shape: tuple[int, int]) -> NDArray[np.float32]:
        """The part of each voxel of plane z, `[y, x]`, that is carbon."""
        inside_z = float(np.clip(0.5 + min(z - self.low, self.high - z), 0, 1))
        if inside_z == 0:
            return np.zeros(shape, np.float32)
        y, x = np.arange(shape[0])[:, None] - self.centre[1], np.arange(shape[1]) - self.centre[0]
        return soft_inside(self.hole_radius - np.hypot(x, y)) * np.float32(inside_z)


def random_carbon_edge(
    shape: tuple[int, int, int], width: float, thickness: float, hole_radius: float, rng: np.random.Generator
) -> CarbonEdge:
    """Carbon that reaches at most `width` voxels into the field from one of its four sides, centred in depth."""
    depth, height, length = shape
    side = int(rng.integers(4))
    middle = np.array([(length - 1) / 2, (height - 1) / 2])
    axis = side % 2
    half = middle[axis]
    along = 1 - axis
    lean = rng.uniform(-0.25, 0.25) * middle[along]
    # the hole is round: in the corner that is farther from its middle the carbon reaches farther in
    corner = min(middle[along] + abs(lean), hole_radius)
    sagitta = hole_radius - float(np.sqrt(hole_radius**2 - corner**2))
    offset = half - (width - sagitta) - hole_radius
    centre = middle.copy()
    centre[axis] += offset if side < 2 else -offset
    centre[along] += lean
    return CarbonEdge(centre, hole_radius, (depth - 1 - thickness) / 2, (depth - 1 + thickness) / 2)
