"""The poses of a set of subtomograms: which structure, turned how, shifted how far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import uniform_random


@dataclass(frozen=True)
class Poses:
    """Of n particles.

    classes: (n,) index of the structure. rotations: from the structure's own frame onto the particle. shifts_voxels:
    (n, 3) x, y, z, after the rotation.
    """

    classes: NDArray[np.int32]
    rotations: Rotation
    shifts_voxels: NDArray[np.float64]


def draw_poses(
    counts: Sequence[int],
    rng: np.random.Generator,
    max_shift_voxels: float = 0.0,
    axis: Sequence[float] | None = None,
    structure_axis: Sequence[float] = (0.0, 0.0, 1.0),
) -> Poses:
    """Draw `counts[i]` particles of structure i, in a random order.

    Args:
        counts: of each structure.
        rng: of everything.
        max_shift_voxels: shifts are uniform in a ball of this radius.
        axis: None for orientations uniform on SO(3); else the direction (x, y, z) that every particle's
            `structure_axis` is laid along, the turn about it being uniform.
        structure_axis: the direction (x, y, z) in the structure's own frame.

    Raises InvalidArgument for a direction of no length or not of three numbers.
    """
    classes = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
    total = len(classes)
    if axis is None:
        rotations = uniform_random(total, rng)
    else:
        target, own = _direction(axis, "axis"), _direction(structure_axis, "structure_axis")
        laid, _ = Rotation.align_vectors(target[None], own[None])
        rotations = Rotation.from_rotvec(rng.uniform(0, 2 * np.pi, total)[:, None] * target) * laid
    directions = rng.standard_normal((total, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    radii = max_shift_voxels * np.cbrt(rng.random(total))
    return Poses(classes, rotations, directions * radii[:, None])


def _direction(vector: Sequence[float], name: str) -> NDArray[np.float64]:
    values = np.asarray(vector, np.float64)
    length = float(np.linalg.norm(values))
    if values.shape != (3,) or not np.isfinite(length) or length == 0:
        raise InvalidArgument(f"{name} is {list(vector)}; a direction has three numbers x, y, z that are not all 0")
    return values / length
