"""Which particles of a table lie in a tomogram, and which of several volumes each of them is an instance of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.tomogram_names import plain_names
from cryofleet.volumes import Volume

_VOXEL_SIZE_TOLERANCE = 1e-3
"""Relative: files round their voxel size."""


def tomogram_name(store: Store, tomogram: Volume) -> str:
    """As particles call their tomogram: by the name it was ingested with or, without one, by its content."""
    return tomogram.info.tomogram or f"tomogram-{content_digest(store, tomogram.uri)[:12]}"


@dataclass(frozen=True)
class Inside:
    """The particles that lie in a tomogram."""

    rows: NDArray[np.int64]
    """Of the table."""
    positions: NDArray[np.float64]
    """(n, 3), x, y, z in voxels of the tomogram, shifts left out."""
    shifts: NDArray[np.float64]
    """(n, 3), in voxels of the tomogram."""
    outside: int
    """How many of the tomogram's own particles don't lie in it."""
    elsewhere: int
    """How many are of other tomograms."""

    def take(self, kept: NDArray[np.bool_]) -> Inside:
        """Those of a mask."""
        return Inside(self.rows[kept], self.positions[kept], self.shifts[kept], self.outside, self.elsewhere)


def inside(positions: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which positions (n, 3), as x, y, z, round to a voxel of a tomogram of shape (z, y, x)."""
    voxels = np.floor(positions + 0.5)
    within = ((voxels >= 0) & (voxels < np.array(shape[::-1]))).all(axis=1)
    return np.asarray(within)


def particles_inside(store: Store, particles: Particles, source: str, tomogram: Volume) -> Inside:
    """The particles of a table, which errors call `source`, whose position rounds to a voxel of the tomogram.

    Of a table of several tomograms those of this one are taken. Raises FailedPrecondition where they can't be its own.
    """
    info = tomogram.info
    scale = particles.voxel_size_angstrom / info.voxel_size_angstrom
    known = particles.tomogram_shape
    same_voxels = math.isclose(scale, 1, rel_tol=_VOXEL_SIZE_TOLERANCE)
    if same_voxels and known is not None and known != info.shape:
        raise FailedPrecondition(
            f"{source} is of a tomogram of {known} voxels (z, y, x), {tomogram.uri} has {info.shape}: "
            "give the tomogram that they are in"
        )
    rows = np.arange(len(particles))
    # Picks in a filtered copy name that copy, so one name is not compared; of several this tomogram's is taken.
    if "tomogram" in particles.table and particles.table["tomogram"].nunique() > 1:
        names = particles.table["tomogram"].to_numpy()
        own = tomogram_name(store, tomogram)
        # as an exported and imported table calls it
        plain = plain_names([own])[own]
        rows = np.flatnonzero((names == own) | (names == plain))
        if not len(rows):
            raise FailedPrecondition(
                f"{source} has particles of {len(set(names))} tomograms and none of {tomogram.uri}, "
                f"which particles call {own}: give those of this tomogram alone"
            )
    # Voxel i of a binned volume lies at i times the binning.
    positions, shifts = particles.positions()[rows] * scale, particles.shifts()[rows] * scale
    within = inside(positions, info.shape)
    if not within.any():
        raise FailedPrecondition(
            f"none of the {len(rows)} particles of {source} lies in {tomogram.uri} of {info.shape} "
            f"voxels (z, y, x) of {info.voxel_size_angstrom:g} Å: give the tomogram that they are in"
        )
    kept = rows[within]
    return Inside(kept, positions[within], shifts[within], len(rows) - len(kept), len(particles) - len(rows))


def volume_numbers(particles: Particles, count: int, stack: bool, source: str) -> NDArray[np.int64]:
    """Which of `count` volumes each particle is an instance of; -1 for none.

    Boxes of a stack go by the classes' numbers. Single volumes go by the order of the numbers that there are where they
    are as many, so that classes can begin at 1 or have gaps, and else by their numbers too; particles of a class beyond
    the last volume are instances of none. Raises InvalidArgument.
    """
    if "class_id" not in particles.table:
        if count == 1:
            return np.zeros(len(particles), np.int64)
        raise InvalidArgument(
            f"{source} has no classes, and there are {count} volumes: one is needed for all particles"
        )
    classes = particles.table["class_id"].to_numpy(np.int64)
    numbers = np.unique(classes[classes >= 0])
    if not stack and len(numbers) == count:
        return np.where(classes >= 0, np.searchsorted(numbers, classes), -1)
    return np.where((classes >= 0) & (classes < count), classes, -1)


def without_volume(particles: Particles, numbers: NDArray[np.int64]) -> str:
    """One sentence about particles whose class has no volume, by what `volume_numbers` gave; empty where none has."""
    if "class_id" not in particles.table:
        return ""
    classes = particles.table["class_id"].to_numpy(np.int64)
    lacking = (classes >= 0) & (numbers < 0)
    if not lacking.any():
        return ""
    which = np.unique(classes[lacking]) + 1
    some = ", ".join(map(str, which[:10].tolist())) + (", ..." if len(which) > 10 else "")
    return f"{int(lacking.sum())} particles are left out: there is no average of class{'es' * (len(which) > 1)} {some}"
