"""The alignment service: turns requests into calls of the methods, and what they give into artifacts."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.transfer import wedge_transfer
from cryofleet.particles import Particles
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.settings import Settings
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import Subtomograms, VolumeInfo
from services.alignment.align import Poses, Search, memory_bytes
from services.alignment.align import align as align_particles
from services.alignment.average import State
from services.alignment.average import average as average_particles

service = Service(pb.DESCRIPTOR.services_by_name["AlignmentService"])

VOXEL_SIZE_TOLERANCE = 0.01
"""Reference and particles may differ so much in voxel size; over a box it is less than the alignment can see."""


def _transfer(info: VolumeInfo) -> NDArray[np.float32] | None:
    """What imaging left of the boxes' components."""
    if info.tilt_min_degrees <= -90 and info.tilt_max_degrees >= 90:
        return None
    return wedge_transfer(info.shape[0], info.tilt_min_degrees, info.tilt_max_degrees)


def _search(request: pb.AlignRequest | pb.AverageRequest, info: VolumeInfo) -> Search:
    high_pass = None
    if isinstance(request, pb.AlignRequest) and request.HasField("high_pass_angstrom"):
        high_pass = request.high_pass_angstrom
    return Search(
        box_size=info.shape[0],
        voxel_size_angstrom=info.voxel_size_angstrom,
        transfer=_transfer(info),
        low_pass_angstrom=request.low_pass_angstrom if request.HasField("low_pass_angstrom") else None,
        high_pass_angstrom=high_pass,
        max_candidates=request.max_candidates,
        max_shift_voxels=request.max_shift_voxels if request.HasField("max_shift_voxels") else None,
    )


def _reference(task: Task, uri: str, boxes: VolumeInfo) -> NDArray[np.float32]:
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
    return data if volume.info.contrast == boxes.contrast else -data


def _with_poses(particles: Particles, boxes: VolumeInfo, poses: Poses) -> Particles:
    """The particles' table with new poses; shifts in voxels of its tomogram, from the voxel at the box's centre."""
    shifts = poses.shifts * (boxes.voxel_size_angstrom / particles.voxel_size_angstrom)
    return particles.with_rotations(poses.rotations).with_columns(
        shift_x=shifts[:, 0], shift_y=shifts[:, 1], shift_z=shifts[:, 2], score=poses.scores
    )


def _threads() -> int:
    return Settings.from_environment().threads


def _align_needs(request: pb.AlignRequest, reader: Reader) -> Needs:
    subtomograms = reader.open_subtomograms(request.subtomograms_uri)
    return Needs(memory_bytes(_search(request, subtomograms.info), _threads()))


@service.operation(needs=_align_needs)
def align(request: pb.AlignRequest, task: Task) -> pb.AlignResult:
    """Find the rotation and shift of each subtomogram against one reference."""
    subtomograms = task.open_subtomograms(request.subtomograms_uri)
    first, count = 0, subtomograms.count
    if request.HasField("rows"):
        first, count = request.rows.first, request.rows.count
        if first + count > subtomograms.count:
            raise InvalidArgument(
                f"rows {first} to {first + count - 1} were asked for, but {request.subtomograms_uri} has "
                f"{subtomograms.count}"
            )
    if count == 0:
        raise FailedPrecondition(f"{request.subtomograms_uri} holds no subtomogram")
    particles = subtomograms.particles().select(slice(first, first + count))
    poses = align_particles(
        lambda start, number: subtomograms.read(first + start, number),
        count,
        _reference(task, request.reference_uri, subtomograms.info),
        _search(request, subtomograms.info),
        names=particles.table["id"].to_numpy(),
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    return pb.AlignResult(
        particles_uri=task.write_particles("particles.parquet", _with_poses(particles, subtomograms.info, poses)),
        count=count,
        mean_score=float(poses.scores.mean()),
    )


def _chosen(
    request: pb.AverageRequest, task: Task, subtomograms: Subtomograms
) -> tuple[Particles, NDArray[np.int64], Poses | None]:
    """The particles to average, their rows in the set, and their starting poses."""
    particles = subtomograms.particles()
    if not request.particles_uri:
        return particles, np.arange(len(particles)), None
    chosen = task.read_particles(request.particles_uri)
    row_of = {int(name): row for row, name in enumerate(particles.table["id"])}
    ids = [int(name) for name in chosen.table["id"]]
    for name in ids:
        if name not in row_of:
            raise InvalidArgument(
                f"particle {name} of {request.particles_uri} has no subtomogram in {request.subtomograms_uri}"
            )
    if len(set(ids)) < len(ids):
        raise InvalidArgument(f"{request.particles_uri} holds a particle more than once: each id must be there once")
    rows = np.array([row_of[name] for name in ids], dtype=np.int64)
    rotations = chosen.rotations()
    start = None
    if rotations is not None:
        shifts = chosen.shifts() * (chosen.voxel_size_angstrom / subtomograms.info.voxel_size_angstrom)
        start = Poses(rotations, shifts, np.zeros(len(rows)))
    return particles.select(rows), rows, start


def _rows_of(subtomograms: Subtomograms, rows: NDArray[np.int64], first: int, count: int) -> NDArray[np.float32]:
    """Boxes of `rows[first : first + count]`, neighbours in one read."""
    wanted = rows[first : first + count]
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    return np.concatenate([subtomograms.read(int(run[0]), len(run)) for run in np.split(wanted, breaks)])


def _load(files: dict[str, bytes] | None) -> State | None:
    if files is None:
        return None
    return State.from_arrays({name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in files.items()})


def _saved(state: State) -> dict[str, bytes]:
    files = {}
    for name, array in state.to_arrays().items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files[name] = buffer.getvalue()
    return files


def _average_needs(request: pb.AverageRequest, reader: Reader) -> Needs:
    subtomograms = reader.open_subtomograms(request.subtomograms_uri)
    return Needs(memory_bytes(_search(request, subtomograms.info), _threads(), references=True))


@service.operation(needs=_average_needs)
def average(request: pb.AverageRequest, task: Task) -> pb.AverageResult:
    """Align and average subtomograms over and over, in two half sets."""
    subtomograms = task.open_subtomograms(request.subtomograms_uri)
    info = subtomograms.info
    particles, rows, start = _chosen(request, task, subtomograms)
    result = average_particles(
        lambda first, count: _rows_of(subtomograms, rows, first, count),
        len(rows),
        _search(request, info),
        iterations=request.iterations,
        symmetry=request.symmetry,
        contrast=info.contrast,
        start=start,
        reference=_reference(task, request.reference_uri, info) if request.reference_uri else None,
        seed=request.seed,
        names=particles.table["id"].to_numpy(),
        device=task.device,
        threads=task.threads,
        progress=task.progress,
        checkpoint=lambda state: task.save_checkpoint(_saved(state)),
        resume=_load(task.load_checkpoint()),
    )
    whole = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)
    table = _with_poses(particles, info, result.poses).with_columns(half=result.halves)
    return pb.AverageResult(
        average_uri=task.write_volume("average.mrc", result.average, whole),
        half1_uri=task.write_volume("half1.mrc", result.half_maps[0], whole),
        half2_uri=task.write_volume("half2.mrc", result.half_maps[1], whole),
        particles_uri=task.write_particles("particles.parquet", table),
        fsc_uri=task.write_table("fsc.json", result.table()),
        resolution_angstrom=result.resolution_angstrom,
        count=len(rows),
    )
