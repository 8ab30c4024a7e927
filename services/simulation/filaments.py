"""Filaments: a subunit repeated along a smooth random curve.

The curve is a worm-like chain: from one subunit to the next its direction turns at random about both axes across it, by
a variance of step over persistence length each, so that directions lose their correlation as exp(-s / L). The frame is
carried along without a twist of its own (parallel transport); the helix's twist comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation


@dataclass(frozen=True)
class Pose:
    """Of one subunit: where its origin on the helical axis lies, (x, y, z) in voxels, and its rotation."""

    position: NDArray[np.float64]
    rotation: Rotation


def grow(
    start: NDArray[np.float64],
    direction: Rotation,
    rise_voxels: float,
    twist_degrees: float,
    persistence_voxels: float,
    max_subunits: int,
    accepts: Callable[[Pose], bool],
    rng: np.random.Generator,
) -> list[Pose]:
    """The subunits of a filament that grows from a point in both directions until it is stopped.

    Args:
        start: (x, y, z), where the first subunit lies.
        direction: takes z onto the filament's direction there.
        rise_voxels: from one subunit to the next along the curve.
        twist_degrees: about it.
        persistence_voxels: how stiff the curve is.
        max_subunits: it stops at so many.
        accepts: whether a subunit may lie at a pose; where not, that end stops.
        rng: of the curve.

    Returns:
        The subunits in their order along the curve; none where the first is not accepted.
    """
    first = Pose(np.asarray(start, np.float64), direction)
    if not accepts(first):
        return []
    ahead: list[Pose] = [first]
    behind: list[Pose] = []
    bend = math.sqrt(rise_voxels / persistence_voxels)
    ends = [(ahead, 1), (behind, -1)]
    for poses, sign in ends:
        position, frame, number = first.position, direction, 0
        while len(ahead) + len(behind) < max_subunits:
            number += sign
            # half of the bend before the step and half after it would change nothing at these angles
            turn = Rotation.from_rotvec([*rng.normal(0, bend, 2), 0.0])
            frame = frame * turn
            position = position + sign * rise_voxels * frame.apply([0.0, 0.0, 1.0])
            pose = Pose(position, frame * Rotation.from_euler("z", number * twist_degrees, degrees=True))
            if not accepts(pose):
                break
            poses.append(pose)
    return behind[::-1] + ahead


def random_direction(rng: np.random.Generator, max_lean_degrees: float = 15.0) -> Rotation:
    """A rotation that takes z onto a direction near the plane of the ice, with a random turn about it."""
    azimuth = rng.uniform(0, 2 * math.pi)
    lean = math.radians(rng.uniform(-max_lean_degrees, max_lean_degrees))
    towards = np.array([math.cos(azimuth) * math.cos(lean), math.sin(azimuth) * math.cos(lean), math.sin(lean)])
    laid, _ = Rotation.align_vectors(towards[None], np.array([[0.0, 0.0, 1.0]]))
    return laid * Rotation.from_euler("z", rng.uniform(0, 360), degrees=True)
