"""What requests of several operations point to, and what working on it needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import transfer
from cryofleet.numerics.masks import soft_sphere, usual_edge_voxels
from cryofleet.particles import Particles
from cryofleet.requests import tilt_series_transfer
from cryofleet.server import Needs, Reader, Task
from cryofleet.settings import Settings
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import Subtomograms, VolumeInfo
from services.alignment.align import Poses, Search

Array = NDArray[np.float32]

VOXEL_SIZE_TOLERANCE = 0.01
"""Reference and particles may differ so much in voxel size; over a box it is less than the alignment can see."""

Averaging = pb.AverageRequest | pb.AverageStartRequest
Searching = pb.AlignRequest | Averaging | pb.FamlStartRequest | pb.ClassifyRequest | pb.ReassignRequest
Imaged = Searching | pb.EstimateSnrRequest | pb.SumClassesRequest

# Memory, here and beside the operations, measured at boxes of 64 to 128 voxels and rounded up: what any takes, and
# bytes for each voxel of a box.
BASE_BYTES = 96 << 20
FSC_BYTES = 120
_WEDGE_BYTES = 24
_TILT_BYTES = 60


def optional(request: Message, name: str) -> float | None:
    """A number that the request may have; None where it was left out, or where its kind has no such field."""
    if name not in request.DESCRIPTOR.fields_by_name or not request.HasField(name):
        return None
    return float(getattr(request, name))


def transfer_of(request: Imaged, task: Task, info: VolumeInfo) -> Array | None:
    """What imaging left of the boxes' components, on the half grid: by a volume or a tilt series that the request
    gives, else by the boxes' tilt range; None where nothing is missing.
    """
    n = info.shape[0]
    if request.wedge_uri:
        volume = task.open_volume(request.wedge_uri)
        if volume.info.count is not None or volume.info.shape != info.shape:
            raise InvalidArgument(
                f"the wedge mask {request.wedge_uri} is {volume.info.array_shape} voxels, the boxes {info.shape}: one "
                "volume of their size, zero frequency at voxel n // 2, is needed"
            )
        return transfer.centred_transfer(volume.read(), f"the wedge mask {request.wedge_uri}")
    if request.tilts_uri:
        return tilt_series_transfer(request, task, n, info.voxel_size_angstrom)
    if info.tilt_min_degrees <= -90 and info.tilt_max_degrees >= 90:
        return None
    return transfer.wedge_transfer(n, info.tilt_min_degrees, info.tilt_max_degrees)


def search_of(request: Searching, info: VolumeInfo, imaged: Array | None = None) -> Search:
    """The search that a request asks for, in boxes of which imaging left `imaged`."""
    return Search(
        box_size=info.shape[0],
        voxel_size_angstrom=info.voxel_size_angstrom,
        transfer=imaged,
        low_pass_angstrom=optional(request, "low_pass_angstrom"),
        high_pass_angstrom=optional(request, "high_pass_angstrom"),
        max_candidates=request.max_candidates,
        max_shift_voxels=optional(request, "max_shift_voxels"),
        max_angle_degrees=optional(request, "max_angle_degrees"),
        symmetry=request.symmetry if isinstance(request, pb.AlignRequest | pb.ReassignRequest) else "C1",
    )


def read_reference(task: Task, uri: str, boxes: VolumeInfo) -> Array:
    """The reference, in the contrast of the particles."""
    volume = task.open_volume(uri)
    if volume.info.count is not None:
        raise InvalidArgument(f"{uri} is a stack of {volume.info.count} boxes; a reference is a single volume")
    if volume.info.shape != boxes.shape:
        raise InvalidArgument(f"reference {uri} is {volume.info.shape} voxels, the boxes {boxes.shape}: crop or pad it")
    ratio = volume.info.voxel_size_angstrom / boxes.voxel_size_angstrom
    if abs(ratio - 1) > VOXEL_SIZE_TOLERANCE:
        raise InvalidArgument(
            f"reference {uri} has voxels of {volume.info.voxel_size_angstrom:g} Å, the subtomograms of "
            f"{boxes.voxel_size_angstrom:g} Å: resample it"
        )
    data = volume.read()
    check_density(data, f"reference {uri}")
    return data if volume.info.contrast == boxes.contrast else -data


def check_density(data: Array, name: str) -> None:
    """Raises InvalidArgument where it is not finite, or constant."""
    if not np.isfinite(data).all():
        raise InvalidArgument(f"{name} holds values that are not finite (NaN or infinity)")
    if data.min() == data.max():
        raise InvalidArgument(f"{name} is constant: there is nothing in it")


def read_cube(task: Task, uri: str, like: VolumeInfo | None = None) -> tuple[Array, VolumeInfo]:
    """A single cubic volume, of the box and voxel size of another where one is given."""
    volume = task.open_volume(uri)
    info = volume.info
    if info.count is not None or len(set(info.shape)) != 1:
        raise InvalidArgument(f"{uri} is {info.array_shape} voxels; a single cubic volume is needed")
    if like is not None:
        ratio = info.voxel_size_angstrom / like.voxel_size_angstrom
        if info.shape != like.shape or abs(ratio - 1) > VOXEL_SIZE_TOLERANCE:
            raise InvalidArgument(
                f"{uri} is {info.shape} voxels of {info.voxel_size_angstrom:g} Å; {like.shape} voxels of "
                f"{like.voxel_size_angstrom:g} Å are expected"
            )
    return volume.read(), VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)


def read_density(task: Task, uri: str, like: VolumeInfo | None = None) -> tuple[Array, VolumeInfo]:
    """A cubic volume as it is, finite and not constant."""
    data, info = read_cube(task, uri, like)
    check_density(data, uri)
    return data, info


def read_mask(task: Task, uri: str, info: VolumeInfo) -> Array:
    """A mask of the same box; a sphere of 0.8 of its diameter where no URI is given."""
    if not uri:
        n = info.shape[0]
        return soft_sphere(n, 0.4 * n, usual_edge_voxels(n))
    mask = read_cube(task, uri, info)[0]
    # Written so that NaN is refused too.
    if not (mask.min() >= 0 and mask.max() <= 1 + 1e-6):
        raise InvalidArgument(f"the mask {uri} holds values outside 0 to 1")
    if not mask.any():
        raise InvalidArgument(f"the mask {uri} is zero everywhere")
    return mask


def protein_sign(info: VolumeInfo) -> np.float32:
    """The sign of protein."""
    return np.float32(-1 if info.contrast == "dark" else 1)


def with_poses(particles: Particles, boxes: VolumeInfo, poses: Poses) -> Particles:
    """The particles' table with new poses; shifts in voxels of its tomogram, from the voxel at the box's centre."""
    shifts = poses.shifts * (boxes.voxel_size_angstrom / particles.voxel_size_angstrom)
    return particles.with_rotations(poses.rotations).with_columns(
        shift_x=shifts[:, 0], shift_y=shifts[:, 1], shift_z=shifts[:, 2], score=poses.scores
    )


def threads() -> int:
    """How many a task of this instance has."""
    return Settings.from_environment().threads


@dataclass(frozen=True)
class Chosen:
    """Subtomograms that were chosen: their `rows` in the set, their `particles` as the set has them, and as the
    request's own table, where it gives one, has them (`given`).
    """

    subtomograms: Subtomograms
    rows: NDArray[np.int64]
    particles: Particles
    given: Particles
    own_table: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> NDArray[np.int64]:
        return np.asarray(self.particles.table["id"].to_numpy(), dtype=np.int64)

    def read(self, first: int, count: int) -> Array:
        """Boxes of rows `first` to `first + count` of the chosen, neighbours in one read."""
        wanted = self.rows[first : first + count]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        return np.concatenate([self.subtomograms.read(int(run[0]), len(run)) for run in np.split(wanted, breaks)])

    def part(self, first: int, count: int) -> Chosen:
        cut = slice(first, first + count)
        return Chosen(
            self.subtomograms, self.rows[cut], self.particles.select(cut), self.given.select(cut), self.own_table
        )

    def poses(self) -> Poses | None:
        """Where they have any; shifts in voxels of the boxes."""
        rotations = self.given.rotations()
        if rotations is None:
            return None
        shifts = self.given.shifts() * (self.given.voxel_size_angstrom / self.subtomograms.info.voxel_size_angstrom)
        return Poses(rotations, shifts, np.zeros(len(self)))

    def aligned(self) -> Poses:
        """Their poses. Raises FailedPrecondition where they have none."""
        poses = self.poses()
        if poses is None:
            raise FailedPrecondition(f"{self.given.source} holds no rotations: align the subtomograms first")
        return poses

    def halves(self) -> NDArray[np.int64] | None:
        """Half set 0 or 1 of each; None where they are in none. Raises InvalidArgument where only some are in one."""
        if "half" not in self.given.table or not self.given.table["half"].to_numpy().any():
            return None
        halves = self.given.table["half"].to_numpy(dtype=np.int64) - 1
        for i in np.flatnonzero(~np.isin(halves, (0, 1)))[:1]:
            raise InvalidArgument(
                f"particle {self.names[i]} of {self.given.source} has half {halves[i] + 1}, others are in half sets: "
                "give each 1 or 2, or leave the column out"
            )
        return halves


def choose(
    request: Imaged
    | pb.AverageExpectRequest
    | pb.AverageFinishRequest
    | pb.FamlExpectRequest
    | pb.FamlFinishRequest
    | pb.DivideParticlesRequest,
    task: Task,
) -> Chosen:
    """The subtomograms that the request's particles name, all where it names none."""
    subtomograms = task.open_subtomograms(request.subtomograms_uri)
    particles = subtomograms.particles()
    if subtomograms.count == 0:
        raise FailedPrecondition(f"{request.subtomograms_uri} holds no subtomogram")
    if not request.particles_uri:
        return Chosen(subtomograms, np.arange(len(particles)), particles, particles, False)
    given = task.read_particles(request.particles_uri)
    if len(given) == 0:
        raise FailedPrecondition(f"{request.particles_uri} holds no particle")
    row_of = {int(name): row for row, name in enumerate(particles.table["id"])}
    ids = [int(name) for name in given.table["id"]]
    for name in ids:
        if name not in row_of:
            raise InvalidArgument(
                f"particle {name} of {request.particles_uri} has no subtomogram in {request.subtomograms_uri}"
            )
    if len(set(ids)) < len(ids):
        raise InvalidArgument(f"{request.particles_uri} holds a particle more than once: each id must be there once")
    rows = np.array([row_of[name] for name in ids], dtype=np.int64)
    return Chosen(subtomograms, rows, particles.select(rows), given, True)


def asked_rows(
    request: pb.AlignRequest
    | pb.ReassignRequest
    | pb.SumClassesRequest
    | pb.AverageExpectRequest
    | pb.FamlExpectRequest,
    chosen: Chosen,
) -> range:
    """The rows of them that the request asks for."""
    if not request.HasField("rows"):
        return range(len(chosen))
    first, count = request.rows.first, request.rows.count
    if first + count > len(chosen):
        raise InvalidArgument(
            f"rows {first} to {first + count - 1} were asked for, but "
            f"{request.particles_uri or request.subtomograms_uri} has {len(chosen)}"
        )
    return range(first, first + count)


def shard_of(request: pb.AlignRequest | pb.ReassignRequest, chosen: Chosen) -> Chosen:
    """The shard of them that the request asks for."""
    rows = asked_rows(request, chosen)
    return chosen if len(rows) == len(chosen) else chosen.part(rows.start, len(rows))


def start_poses(request: pb.AlignRequest | pb.ReassignRequest, poses: Poses | None) -> Poses | None:
    """The poses, which a search of limited angles must have. Raises FailedPrecondition where it has none."""
    if poses is None and request.HasField("max_angle_degrees"):
        raise FailedPrecondition(
            "max_angle_degrees counts from the poses that particles start from: give a particles_uri with rotations"
        )
    return poses


def transfer_bytes(request: Imaged, info: VolumeInfo) -> int:
    """What making the transfer function takes at most."""
    return (_TILT_BYTES if request.tilts_uri else _WEDGE_BYTES) * info.shape[0] ** 3


def check_fits(chosen: Chosen, box_size: int, count: int, uri: str) -> VolumeInfo:
    """The boxes' properties, which must be those that the model at `uri` was made of. Raises InvalidArgument where they
    are not.
    """
    info = chosen.subtomograms.info
    if info.shape != (box_size,) * 3 or count != len(chosen):
        raise InvalidArgument(
            f"{uri} is of {count} particles in boxes of {box_size} voxels; these are {len(chosen)} of {info.shape[0]}"
        )
    return info


def model_needs(
    request: pb.AverageUpdateRequest | pb.AverageFinishRequest | pb.FamlMaximiseRequest | pb.FamlFinishRequest,
    reader: Reader,
) -> Needs:
    """A model is at least the sums, some four bytes a voxel, and what is made of them takes FSC_BYTES."""
    return Needs(BASE_BYTES + (FSC_BYTES // 2) * reader.open_blob(request.model_uri).size_bytes)
