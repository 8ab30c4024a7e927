"""RELION 5 particle files as the io service exports them, of one tomogram and ready for RELION's import.

`cryofleet.formats.particles.relion` reads and writes every version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import CentreRule, tomogram_centre
from cryofleet.formats.rows import Column, encode_rows, literal


@dataclass(frozen=True)
class Optics:
    """What RELION's optics table says of a tilt series: all of it, for RELION completes none that it finds."""

    tilt_series_pixel_size_angstrom: float
    """Of the unbinned tilt images, which RELION turns coordinates in Å into pixels of."""
    voltage_kv: float
    spherical_aberration_mm: float
    amplitude_contrast: float


def encode_relion5_particles(
    tomogram_name: str,
    tomogram_shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    positions: NDArray[np.float64],
    *,
    rotations: Rotation | None = None,
    shifts: NDArray[np.float64] | None = None,
    ids: NDArray[np.int64] | None = None,
    scores: NDArray[np.float64] | None = None,
    class_numbers: NDArray[np.int64] | None = None,
    random_subsets: NDArray[np.int64] | None = None,
    optics: Optics | None = None,
    centre_rule: CentreRule = "size/2",
) -> Iterator[bytes]:
    """The text of a particles.star as RELION 5 imports it, in pieces.

    Coordinates are ``rlnCenteredCoordinate[XYZ]Angst`` = (position + shift - centre) * voxel size. A shift moves the
    reference onto the particle, in the tomogram's frame, so it is part of where the particle is; RELION's own origins
    have the other sign (coordinate - origin) and are written as zero beside the angles. ``rlnAngle[Rot,Tilt,Psi]`` are
    RELION's convention, those of the inverse rotation (`cryofleet.formats.euler`). Without `optics` there is no optics
    table: RELION then makes it from its tomograms.star.

    Args:
        tomogram_name: rlnTomoName, without white space, as RELION's tomograms.star has it.
        tomogram_shape: (z, y, x) in voxels.
        voxel_size_angstrom: of the tomogram that positions and shifts are in voxels of.
        positions: (n, 3), (x, y, z) in voxels from the first voxel's centre.
        rotations: n rotations, reference onto particle.
        shifts: (n, 3), voxels, (x, y, z).
        ids: n numbers; particle i is named "TOMOGRAM/id". From 1 where left out.
        scores: n figures of merit.
        class_numbers: n classes, from 1.
        random_subsets: n half sets, 1 or 2.
        optics: one optics group, called as the tomogram, as RELION makes it.
        centre_rule: see `tomogram_centre`.

    Raises:
        InvalidArgument: the name cannot stand in a STAR file, or a coordinate is not finite.
    """
    if not tomogram_name or any(character.isspace() or character in "\"'#" for character in tomogram_name):
        raise InvalidArgument(
            f"the tomogram's name {tomogram_name!r} cannot stand in a STAR file: "
            "give one without spaces, quotes and # with --set tomogram_name=..."
        )
    count = len(positions)
    placed = positions if shifts is None else positions + shifts
    centred = (placed - tomogram_centre(tomogram_shape, centre_rule)) * voxel_size_angstrom
    if not np.isfinite(centred).all():
        row = int(np.argmin(np.isfinite(centred).all(axis=1)))
        raise InvalidArgument(f"particle in row {row} has a position or shift that is not finite")
    numbers = np.arange(1, count + 1) if ids is None else ids

    columns: list[tuple[str, Column]] = [("rlnTomoParticleName", (f"{literal(tomogram_name)}/%d", numbers))]
    columns += [(f"rlnCenteredCoordinate{axis}Angst", ("%.6f", centred[:, i])) for i, axis in enumerate("XYZ")]
    if rotations is not None:
        angles = to_euler(rotations, "relion")
        columns += [(f"rlnAngle{name}", ("%.6f", angles[:, i])) for i, name in enumerate(("Rot", "Tilt", "Psi"))]
        columns += [(f"rlnOrigin{axis}Angst", ("%.6f", np.zeros(count))) for axis in "XYZ"]
    if class_numbers is not None:
        columns.append(("rlnClassNumber", ("%d", class_numbers)))
    if random_subsets is not None:
        columns.append(("rlnRandomSubset", ("%d", random_subsets)))
    if scores is not None:
        columns.append(("rlnAutopickFigureOfMerit", ("%.6f", scores)))
    if optics is not None:
        columns.append(("rlnOpticsGroup", ("%d", np.ones(count, np.int64))))
        known = {
            "rlnVoltage": f"{optics.voltage_kv:.6f}",
            "rlnSphericalAberration": f"{optics.spherical_aberration_mm:.6f}",
            "rlnAmplitudeContrast": f"{optics.amplitude_contrast:.6f}",
            "rlnTomoTiltSeriesPixelSize": f"{optics.tilt_series_pixel_size_angstrom:.6f}",
            "rlnOpticsGroup": "1",
            "rlnOpticsGroupName": tomogram_name,
        }
        yield _head("optics", list(known)) + "\t".join(known.values()).encode() + b"\n\n"

    names = ["rlnTomoName", *(label for label, _ in columns)]
    yield _head("particles", names)
    # The tomogram's name stands in every row.
    yield from encode_rows([column for _, column in columns], "\t", f"{literal(tomogram_name)}\t")
    yield b"\n"


def _head(block: str, labels: Sequence[str]) -> bytes:
    listed = "".join(f"_{label} #{i}\n" for i, label in enumerate(labels, start=1))
    return f"\n# version 50001\n\ndata_{block}\n\nloop_\n{listed}".encode()
