"""Rotations: uniform samples and grids, point groups, distances modulo symmetry.

All are `scipy.spatial.transform.Rotation`, active, acting on (x, y, z).
"""

import math
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument

_GOLDEN = (1 + math.sqrt(5)) / 2


def uniform_random(count: int, rng: np.random.Generator) -> Rotation:
    """`count` rotations drawn uniformly from SO(3): normalised Gaussian quaternions."""
    return Rotation.from_quat(rng.normal(size=(count, 4)))


def rotation_grid(step_degrees: float, symmetry: str = "C1") -> Rotation:
    """A near-uniform grid on SO(3) whose points are about `step_degrees` apart.

    Super-Fibonacci spirals (Alexa, CVPR 2022), as many points as cells of side `step_degrees` fit into the group's
    volume of 8 pi^2. Of a reference of some point group only one of the rotations that look alike is kept, the one that
    turns least: the grid is as dense, and shorter by the order of the group.
    """
    if not 0.5 <= step_degrees <= 180:
        raise InvalidArgument(f"step_degrees {step_degrees:g}: must lie in 0.5 to 180")
    count = max(1, math.ceil(8 * math.pi**2 / math.radians(step_degrees) ** 3))
    index = np.arange(count)
    t = (index + 0.5) / count
    alpha = 2 * np.pi * (index + 0.5) / math.sqrt(2)
    beta = 2 * np.pi * (index + 0.5) / 1.533751168755204288118041413  # the real root of psi^4 = psi + 4
    inner, outer = np.sqrt(t), np.sqrt(1 - t)
    quaternions = np.stack(
        [inner * np.sin(alpha), inner * np.cos(alpha), outer * np.sin(beta), outer * np.cos(beta)], axis=1
    )
    group = _point_group_quaternions(symmetry)
    # The scalar part of q g is w_q w_g - v_q . v_g, and a rotation turns the less the larger its modulus.
    scalar = np.abs(quaternions @ (group * np.array([-1.0, -1.0, -1.0, 1.0])).T)
    kept = quaternions[scalar[:, 0] >= scalar.max(axis=1) - 1e-12]
    return Rotation.from_quat(kept if len(kept) else quaternions[:1])


@lru_cache(maxsize=64)
def _point_group_quaternions(name: str) -> NDArray[np.float64]:
    match = re.fullmatch(r"([CD])([1-9][0-9]?)|([TOI])", name.upper())
    if match is None:
        raise InvalidArgument(f"symmetry {name!r}: must be Cn, Dn (n from 1 to 99), T, O or I")
    if match[1]:
        order = int(match[2])
        turns = Rotation.from_rotvec(np.outer(2 * np.pi * np.arange(order) / order, [0, 0, 1]))
        if match[1] == "C":
            return turns.as_quat()
        flip = Rotation.from_rotvec([np.pi, 0, 0])
        return np.concatenate([turns.as_quat(), (turns * flip).as_quat()])
    group = {"T": Rotation.create_group("T"), "O": Rotation.create_group("O"), "I": Rotation.create_group("I")}[
        match[3]
    ]
    # SciPy has twofold axes along x, y and z; turn one of the highest order onto z.
    axis = {"T": [1.0, 1.0, 1.0], "O": [0.0, 0.0, 1.0], "I": [1.0, 0.0, _GOLDEN]}[match[3]]
    if match[3] == "I":
        quarter = Rotation.from_rotvec([0, 0, np.pi / 2])
        fivefold = Rotation.from_rotvec(2 * np.pi / 5 * np.array(axis) / np.linalg.norm(axis))
        if np.abs((group.inv() * fivefold).magnitude()).min() > 1e-6:
            group = quarter * group * quarter.inv()
    z = np.array([0.0, 0.0, 1.0])
    unit = np.array(axis) / np.linalg.norm(axis)
    cross = np.cross(unit, z)
    angle = math.atan2(float(np.linalg.norm(cross)), float(unit @ z))
    turn = Rotation.from_rotvec(cross / np.linalg.norm(cross) * angle) if angle > 0 else Rotation.identity()
    quaternions = (turn * group * turn.inv()).as_quat()
    return quaternions[np.argsort(-np.abs(quaternions[:, 3]), kind="stable")]


def point_group(name: str) -> Rotation:
    """All rotations of a point group, the identity first.

    `name` is Cn, Dn, T, O or I, in either case. The axis of highest order lies along z: the n-fold one of Cn and Dn
    (whose twofold is along x), a threefold of T, a fourfold of O, a fivefold of I (with a twofold along y).

    Raises InvalidArgument for any other name.
    """
    return Rotation.from_quat(_point_group_quaternions(name))


def angular_distance_degrees(first: Rotation, second: Rotation, symmetry: str = "C1") -> NDArray[np.float64]:
    """The smallest angle of `first^-1 second g` over the group's g, pair by pair, in degrees.

    Either may be a single rotation, which is then compared to each of the other. Symmetry is the reference's: g acts
    before the rotation that takes the reference onto the particle.
    """
    relative = np.atleast_2d((first.inv() * second).as_quat())
    group = _point_group_quaternions(symmetry)
    # The scalar part of q g is w_q w_g - v_q . v_g; half the angle has the cosine of its modulus.
    scalar = np.abs(relative @ (group * np.array([-1.0, -1.0, -1.0, 1.0])).T)
    best = np.argmax(scalar, axis=1)
    # Small angles by the vector part: arccos loses half the digits there.
    products = (Rotation.from_quat(relative) * Rotation.from_quat(group[best])).magnitude()
    return np.asarray(np.degrees(products), dtype=np.float64)


def frame_between(true: Rotation, estimated: Rotation, symmetry: str = "C1") -> Rotation:
    """The rotation Q that makes `estimated * Q` closest to `true`: averages without a reference have their own frame.

    Q is the mean of `estimated_i^-1 true_i g` over the pairs that agree best with one another, g being the element of
    the group that brings it nearest. Errors are then `angular_distance_degrees(true, estimated * Q, symmetry)`.
    """
    relative = estimated.inv() * true
    group = point_group(symmetry)
    # The best of the pairs' own frames by the median distance of all; a subset bounds the work.
    seeds = np.unique(np.linspace(0, len(relative) - 1, min(len(relative), 200)).astype(int))
    medians = [float(np.median(angular_distance_degrees(relative[i], relative, symmetry))) for i in seeds]
    frame = relative[int(seeds[int(np.argmin(medians))])]
    for _ in range(3):
        distances = angular_distance_degrees(frame, relative, symmetry)
        near = np.flatnonzero(distances <= max(float(np.median(distances)), 1e-3))
        aligned = []
        for i in near:
            options = relative[int(i)] * group
            aligned.append(options[int(np.argmin((frame.inv() * options).magnitude()))].as_quat())
        frame = Rotation.from_quat(np.array(aligned)).mean()
    return frame
