"""Joining sets of subtomograms: what must agree before their boxes count as one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles

#: Voxel sizes as kept in headers agree to about six digits.
VOXEL_SIZE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Member:
    """One of the sets to join.

    Attributes:
        name: what messages call it, its URI.
        particles: the table; row i belongs to box i.
        box_size: side of the boxes, voxels.
        voxel_size_angstrom: of the boxes.
        contrast: "dark" or "light".
        tilt_range_degrees: least and largest tilt angle.
    """

    name: str
    particles: Particles
    box_size: int
    voxel_size_angstrom: float
    contrast: str
    tilt_range_degrees: tuple[float, float]


def merge_particles(members: Sequence[Member]) -> Particles:
    """The particles of all sets, in order, once it is sure that the sets can be one.

    Boxes must agree in side, voxel size, contrast and tilt range (they share one missing wedge), positions in
    their voxel size, and no particle of a tomogram may be there twice. Particles of different tomograms that have the
    same id are numbered anew.

    Raises:
        FailedPrecondition: names the two sets that do not fit, and what differs.
    """
    first = members[0]
    for other in members[1:]:
        _same(first, other, "box size (voxels)", first.box_size, other.box_size)
        _same(first, other, "contrast", first.contrast, other.contrast)
        _same(first, other, "tilt range (degrees)", first.tilt_range_degrees, other.tilt_range_degrees)
        _close(first, other, "voxel size of the boxes (Å)", first.voxel_size_angstrom, other.voxel_size_angstrom)
        sizes = first.particles.voxel_size_angstrom, other.particles.voxel_size_angstrom
        _close(first, other, "voxel size of the positions (Å)", *sizes)
    keys = pd.concat([_keys(member) for member in members], ignore_index=True)
    twice = keys.duplicated(["tomogram", "id"])
    if twice.any():
        again = keys.loc[twice].iloc[0]
        before = keys.loc[(keys["id"] == again["id"]) & (keys["tomogram"] == again["tomogram"])].iloc[0]
        raise FailedPrecondition(
            f"particle {again['id']} is in {before['set']} and again in {again['set']}: "
            "a particle can be in a set only once"
        )
    return Particles.concat([member.particles for member in members])


def _keys(member: Member) -> pd.DataFrame:
    """What tells the particles of all sets apart: id, tomogram and, for messages, the set."""
    table = member.particles.table
    tomogram = table.get("tomogram", member.particles.tomogram)
    return pd.DataFrame({"id": table["id"]}).assign(tomogram=tomogram, set=member.name)


def _same(first: Member, other: Member, what: str, one: object, two: object) -> None:
    if one != two:
        raise FailedPrecondition(f"{what} differs: {one} in {first.name}, {two} in {other.name}")


def _close(first: Member, other: Member, what: str, one: float, two: float) -> None:
    if abs(one - two) > VOXEL_SIZE_TOLERANCE * abs(one):
        raise FailedPrecondition(f"{what} differs: {one:g} in {first.name}, {two:g} in {other.name}")
