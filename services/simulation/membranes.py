"""Lipid bilayers: vesicles and membranes across the field.

The potential across a bilayer follows from what it is made of. With the atoms' electron scattering at zero angle (as
`structures` takes it) and the volumes of Nagle & Tristram-Nagle, Biochim. Biophys. Acta 1469, 159 (2000), fluid DPPC
and DOPC: a head group C10H18NO8P of 319 Å^3 is 4.2 V above ice, of which the water between heads leaves about six
tenths; a CH2 of 27.6 Å^3 is 1.7 V above, a CH3 of 54 Å^3 0.9 V below. The phosphates lie 38 Å apart, so that the
bilayer is 4 nm thick between the outer slopes of its heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.special
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]

#: Thickness of a bilayer, and the heads' distance from its middle, Å.
THICKNESS = 40.0
HEAD_DISTANCE, HEAD_SIGMA, HEAD_VOLTAGE = 19.0, 3.5, 2.5
CHAIN_REACH, CHAIN_SIGMA, CHAIN_VOLTAGE = 14.5, 2.5, 1.7
METHYL_SIGMA, METHYL_VOLTAGE = 3.0, -2.6
#: The Gaussian that stands for a low-pass to a resolution of 1 Å: half of the amplitude is left at 1 / resolution.
SIGMA_PER_RESOLUTION = math.sqrt(math.log(2) / 2) / math.pi


def bilayer_profile(distance_angstrom: NDArray[np.floating], resolution_angstrom: float) -> NDArray[np.float64]:
    """The potential above ice (V) at a distance from the bilayer's middle, low-passed to a resolution."""
    d = np.asarray(distance_angstrom, np.float64)
    blur = (SIGMA_PER_RESOLUTION * resolution_angstrom) ** 2

    def gaussian(x: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
        """Of height 1 before the blur, which keeps its area."""
        wide = math.sqrt(sigma**2 + blur)
        return np.asarray(sigma / wide * np.exp(-0.5 * (x / wide) ** 2))

    heads = gaussian(d - HEAD_DISTANCE, HEAD_SIGMA) + gaussian(d + HEAD_DISTANCE, HEAD_SIGMA)
    soft = math.sqrt(2 * (CHAIN_SIGMA**2 + blur))
    chains = 0.5 * (scipy.special.erf((d + CHAIN_REACH) / soft) - scipy.special.erf((d - CHAIN_REACH) / soft))
    return np.asarray(HEAD_VOLTAGE * heads + CHAIN_VOLTAGE * chains + METHYL_VOLTAGE * gaussian(d, METHYL_SIGMA))


def reach_angstrom(resolution_angstrom: float) -> float:
    """How far from the middle a bilayer's profile goes on."""
    return HEAD_DISTANCE + 4 * math.hypot(HEAD_SIGMA, SIGMA_PER_RESOLUTION * resolution_angstrom)


@dataclass(frozen=True)
class Ellipsoid:
    """A vesicle's middle surface; all in voxels: centre (x, y, z), semi-axes along its own axes, and the rotation that
    takes those into the volume."""

    centre: NDArray[np.float64]
    semi_axes: NDArray[np.float64]
    rotation: Rotation

    def distance(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """The distance (n,) of points (n, 3) from the surface, negative inside; exact to first order near it, which is
        where it counts."""
        own = self.rotation.inv().apply(points - self.centre)
        relative = np.linalg.norm(own / self.semi_axes, axis=1)
        slope = np.linalg.norm(own / self.semi_axes**2, axis=1)
        # at the centre itself the slope vanishes
        inside = -float(self.semi_axes.min())
        return np.asarray(np.where(slope > 0, relative * (relative - 1) / np.maximum(slope, 1e-12), inside))

    def extent(self) -> NDArray[np.float64]:
        """Half of the surface's extent along x, y and z."""
        return np.asarray(np.linalg.norm(self.rotation.as_matrix() * self.semi_axes, axis=1))

    def surface_point(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A point drawn evenly from the surface, and its outward normal."""
        # a direction on the unit sphere is stretched to the surface; its area by this factor, at most by the largest
        largest = float(np.prod(self.semi_axes) / self.semi_axes.min())
        while True:
            direction = rng.standard_normal(3)
            direction /= np.linalg.norm(direction)
            stretched = float(np.prod(self.semi_axes) * np.linalg.norm(direction / self.semi_axes))
            if rng.random() * largest <= stretched:
                break
        normal = direction / self.semi_axes
        normal /= np.linalg.norm(normal)
        point = self.centre + self.rotation.apply(direction * self.semi_axes)
        return np.asarray(point), np.asarray(self.rotation.apply(normal))


@dataclass(frozen=True)
class Plane:
    """A flat membrane: a point (x, y, z) of its middle in voxels, and its normal; `shape` is the volume's."""

    point: NDArray[np.float64]
    normal: NDArray[np.float64]
    shape: tuple[int, int, int]

    def distance(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """The distance (n,) of points (n, 3), positive on the normal's side."""
        return np.asarray((points - self.point) @ self.normal)

    def surface_point(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A point drawn evenly from the part of the plane that lies in the volume, and the normal."""
        across = np.cross(self.normal, [0.0, 0.0, 1.0])
        if np.linalg.norm(across) < 1e-6:
            across = np.array([1.0, 0.0, 0.0])
        across /= np.linalg.norm(across)
        along = np.cross(self.normal, across)
        size = np.array(self.shape[::-1], np.float64)
        reach = float(np.linalg.norm(size))
        while True:
            a, b = rng.uniform(-reach, reach, 2)
            point = self.point + a * across + b * along
            if (point >= 0).all() and (point <= size - 1).all():
                return point, self.normal


Membrane = Ellipsoid | Plane


def random_ellipsoid(
    shape: tuple[int, int, int],
    depth: tuple[float, float],
    radii_voxels: tuple[float, float],
    max_ellipticity: float,
    margin_voxels: float,
    rng: np.random.Generator,
) -> Ellipsoid | None:
    """A vesicle that lies between two depths (z), its middle surface `margin_voxels` away from them; it may be cut by
    the volume's sides in x and y. None where one of that size and orientation doesn't fit."""
    radius = rng.uniform(*radii_voxels)
    axes = radius * rng.uniform(1, max_ellipticity, 3)
    # the mean radius is the one drawn
    axes *= radius / np.cbrt(np.prod(axes))
    ellipsoid = Ellipsoid(np.zeros(3), axes, Rotation.from_quat(rng.normal(size=4)))
    reach = float(ellipsoid.extent()[2]) + margin_voxels
    low, high = depth[0] + reach, depth[1] - reach
    if low > high:
        return None
    centre = np.array([rng.uniform(0, shape[2] - 1), rng.uniform(0, shape[1] - 1), rng.uniform(low, high)])
    return Ellipsoid(centre, axes, ellipsoid.rotation)


def random_plane(
    shape: tuple[int, int, int], depth: tuple[float, float], max_tilt_degrees: float, rng: np.random.Generator
) -> Plane:
    """A membrane through a random point, its plane leaning from the beam's direction by at most an angle."""
    azimuth = rng.uniform(0, 2 * math.pi)
    lean = math.radians(rng.uniform(-max_tilt_degrees, max_tilt_degrees))
    normal = np.array(
        [math.cos(azimuth) * math.cos(lean), math.sin(azimuth) * math.cos(lean), math.sin(lean)], np.float64
    )
    point = np.array([rng.uniform(0, shape[2] - 1), rng.uniform(0, shape[1] - 1), rng.uniform(*depth)])
    return Plane(point, normal, shape)
