"""What requests of several operations point to, and what reading it needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles, row_count
from cryofleet.server import Reader, Task
from cryofleet.v1 import common_pb2, picking_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.picking.slabs import ReadSlab

#: A row of a particle table in memory, while it is decoded, copied and encoded.
ROW_BYTES = 1000
#: Buffers of reading and writing artifacts, and small things.
BASE_BYTES = 64 << 20


def open_tomogram(reader: Reader, uri: str) -> Volume:
    """A single volume. Raises FailedPrecondition for a stack."""
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; a tomogram is needed")
    return volume


def count_rows(reader: Reader, uri: str) -> int:
    """Of a table of particles, which is not read."""
    return row_count(reader.open_blob(uri), uri)


def chosen_particles(request: picking_pb2.ExtractRequest | picking_pb2.RefinePicksRequest, task: Task) -> Particles:
    """The rows that a request asks for, all where it names none. Raises FailedPrecondition for an empty table."""
    particles = task.read_particles(request.particles_uri)
    if len(particles) == 0:
        raise FailedPrecondition(f"{request.particles_uri} has no particles: there is nothing to do")
    if not request.HasField("rows"):
        return particles
    rows = asked_rows(request.rows, len(particles), request.particles_uri)
    return particles.select(slice(rows.start, rows.stop))


def asked_rows(rows: common_pb2.RowRange, count: int, uri: str) -> range:
    """The rows that are asked for, of as many as there are. Raises InvalidArgument where there are fewer."""
    first, stop = rows.first, rows.first + rows.count
    if stop > count:
        raise InvalidArgument(f"rows {first} to {stop - 1} were asked for, and {uri} has rows 0 to {count - 1}")
    return range(first, stop)


def check_tomogram(
    particles: Particles, info: VolumeInfo, request: picking_pb2.ExtractRequest | picking_pb2.RefinePicksRequest
) -> None:
    """Particles of another tomogram, as far as that can be told, are not cut out of this one."""
    if "tomogram" in particles.table and particles.table["tomogram"].nunique() > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} has particles of {particles.table['tomogram'].nunique()} tomograms; "
            "extract from one at a time"
        )
    same_voxels = np.isclose(particles.voxel_size_angstrom, info.voxel_size_angstrom, rtol=1e-6)
    if same_voxels and particles.tomogram_shape not in (None, info.shape):
        raise FailedPrecondition(
            f"{request.particles_uri} is of a tomogram of {particles.tomogram_shape} voxels (z, y, x), "
            f"{request.tomogram_uri} has {info.shape}: these are not its particles"
        )


def true_positions(particles: Particles) -> NDArray[np.float64]:
    """Where the particles are, in voxels: the centre of their box and their shift from there."""
    return particles.positions() + particles.shifts()


def classes_of(particles: Particles) -> list[str] | None:
    """The class of each row, by name or else by number, from 1 and 0 for none; None where the table has neither."""
    if "class_name" in particles.table:
        return [str(name) for name in particles.table["class_name"]]
    if "class_id" in particles.table:
        return [str(number + 1) for number in particles.table["class_id"]]
    return None


def values_at(read: ReadSlab, positions: NDArray[np.int64], slabs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The values of a map at voxels (x, y, z), read slab by slab."""
    values = np.zeros(len(positions), np.int64)
    for z0, z1 in slabs:
        inside = (positions[:, 2] >= z0) & (positions[:, 2] < z1)
        if inside.any():
            x, y, z = positions[inside].T
            values[inside] = np.rint(read(z0, z1)[z - z0, y, x]).astype(np.int64)
    return values
