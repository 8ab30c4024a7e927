"""Euler angles of other programs, converted by the program's name.

Inside Cryofleet an orientation is a rotation R that takes the reference onto the particle and acts on (x, y, z)
vectors. Euler angles exist only in files. With Rz(a), Ry(a), Rx(a) the active, right-handed rotations about the fixed
axes, the conventions are

========  =======================  =====================================  ==========================================
name      angles, in this order    R =                                    written by
========  =======================  =====================================  ==========================================
relion    rot, tilt, psi           (Rz(rot) Ry(tilt) Rz(psi))^-1          RELION, Warp, M, cryoSPARC's STAR files
dynamo    tdrot, tilt, narot       (Rz(narot) Rx(tilt) Rz(tdrot))^-1      Dynamo tables
eman      az, alt, phi             (Rz(az) Rx(alt) Rz(phi))^-1            EMAN2 transforms from reference to particle
faml      alpha, beta, gamma       Rz(alpha) Ry(beta) Rz(gamma)           FAML and AITom
av3       phi, theta, psi          Rz(psi) Rx(theta) Rz(phi)              TOM, AV3, PyTom, novaSTA, STOPGAP, cryoCAT
========  =======================  =====================================  ==========================================

All angles are degrees; AITom itself keeps radians. EMAN2's ``xform.align3d`` takes the particle onto the reference:
invert the rotation that is read from such a field.

A triple of angles is not unique; `to_euler` returns the one whose second angle lies in [0, 180], whose others lie in
(-180, 180], and whose rotation about the particle's own axis is zero where the second angle is 0 or 180 degrees.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument

EulerConvention = Literal["relion", "dynamo", "eman", "faml", "av3"]

CONVENTIONS: tuple[EulerConvention, ...] = get_args(EulerConvention)


def from_euler(angles: ArrayLike, convention: EulerConvention) -> Rotation:
    """Rotation that takes the reference onto the particle.

    Args:
        angles: degrees, shape (3,) for one particle or (n, 3), in the order of the convention's table row above.
        convention: the name of the program or paper that wrote the angles.

    Raises:
        InvalidArgument: the name is unknown, the shape is another, or an angle is not finite.
    """
    triple = np.asarray(angles, dtype=np.float64)
    if triple.shape[-1:] != (3,) or triple.ndim > 2:
        raise InvalidArgument(f"Euler angles must have shape (3,) or (n, 3), not {triple.shape}")
    if not np.isfinite(triple).all():
        raise InvalidArgument("Euler angles must be finite numbers of degrees")
    match convention:
        case "relion":
            return Rotation.from_quat(_quaternions(triple, "y")).inv()
        case "dynamo":
            return Rotation.from_quat(_quaternions(triple[..., ::-1], "x")).inv()
        case "eman":
            return Rotation.from_quat(_quaternions(triple, "x")).inv()
        case "faml":
            return Rotation.from_quat(_quaternions(triple, "y"))
        case "av3":
            return Rotation.from_quat(_quaternions(triple[..., ::-1], "x"))
        case _:
            raise InvalidArgument(f"unknown Euler convention {convention!r}; known are {', '.join(CONVENTIONS)}")


def _quaternions(angles: NDArray[np.float64], middle: Literal["x", "y"]) -> NDArray[np.float64]:
    """(x, y, z, w) of Rz(a) Rx(b) Rz(c) or Rz(a) Ry(b) Rz(c), of angles (a, b, c) in degrees.

    Written out, for `Rotation.from_euler` takes five times as long.
    """
    a, b, c = np.moveaxis(np.deg2rad(angles) / 2, -1, 0)
    cos_b, sin_b = np.cos(b), np.sin(b)
    x, y = sin_b * np.cos(a - c), sin_b * np.sin(a - c)
    if middle == "y":
        x, y = -y, x
    return np.stack([x, y, cos_b * np.sin(a + c), cos_b * np.cos(a + c)], axis=-1)


def to_euler(rotation: Rotation, convention: EulerConvention) -> NDArray[np.float64]:
    """Angles, in degrees, of rotations that take the reference onto the particle: the inverse of `from_euler`.

    Returns an array of shape (3,) for a single rotation, (n, 3) for a stack.
    """
    match convention:
        case "relion":
            return _zyz_angles(rotation.inv().as_matrix())
        case "dynamo":
            return _zyz_to_zxz(_zyz_angles(rotation.inv().as_matrix()))[..., ::-1]
        case "eman":
            return _zyz_to_zxz(_zyz_angles(rotation.inv().as_matrix()))
        case "faml":
            return _zyz_angles(rotation.as_matrix())
        case "av3":
            return _zyz_to_zxz(_zyz_angles(rotation.as_matrix()))[..., ::-1]
        case _:
            raise InvalidArgument(f"unknown Euler convention {convention!r}; known are {', '.join(CONVENTIONS)}")


def _zyz_angles(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles (a, b, c) in degrees with matrix = Rz(a) Ry(b) Rz(c).

    The last angle is read from Rz(-a) matrix = Ry(b) Rz(c), so that a + c stays exact as b approaches 0, where the
    usual formula loses it.
    """
    sin_b = np.hypot(matrix[..., 0, 2], matrix[..., 1, 2])
    b = np.arctan2(sin_b, matrix[..., 2, 2])
    on_axis = sin_b < 1e-12
    # On the axis only a + c (or a - c) is determined: all of it goes into a.
    a = np.where(
        on_axis,
        np.arctan2(-matrix[..., 0, 1], matrix[..., 1, 1]),
        np.arctan2(matrix[..., 1, 2], matrix[..., 0, 2]),
    )
    cos_a, sin_a = np.cos(a)[..., None], np.sin(a)[..., None]
    row = cos_a * matrix[..., 1, :] - sin_a * matrix[..., 0, :]
    c = np.where(on_axis, 0.0, np.arctan2(row[..., 0], row[..., 1]))
    return _wrapped(np.rad2deg(np.stack([a, b, c], axis=-1)))


def _zyz_to_zxz(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rz(a) Ry(b) Rz(c) = Rz(a + 90) Rx(b) Rz(c - 90)."""
    return _wrapped(angles + np.array([90.0, 0.0, -90.0]))


def _wrapped(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same angles in (-180, 180], without negative zeros."""
    return 180.0 - np.mod(180.0 - degrees, 360.0) + 0.0
