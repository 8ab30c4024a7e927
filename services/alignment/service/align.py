"""Align: the rotation and shift of each subtomogram against one reference."""

from __future__ import annotations

from dataclasses import replace

from cryofleet.numerics import transfer
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from services.alignment.align import align as align_particles
from services.alignment.align import memory_bytes
from services.alignment.service.inputs import (
    Array,
    choose,
    read_mask,
    read_reference,
    search_of,
    shard_of,
    start_poses,
    threads,
    transfer_bytes,
    transfer_of,
    with_poses,
)
from services.alignment.service.registry import service


def _align_needs(request: pb.AlignRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    search = search_of(request, info)
    if search.low_pass_angstrom is None:
        # The reference decides how far the band reaches, up to the Nyquist limit.
        search = replace(search, low_pass_angstrom=2 * info.voxel_size_angstrom)
    return Needs(memory_bytes(search, threads()) + transfer_bytes(request, info))


def _of_reference(task: Task, uri: str) -> Array | None:
    """What imaging left of a reference that says its tilt range, as a single subtomogram does; None where whole."""
    info = task.open_volume(uri).info
    if info.tilt_min_degrees <= -90 and info.tilt_max_degrees >= 90:
        return None
    return transfer.wedge_transfer(info.shape[0], info.tilt_min_degrees, info.tilt_max_degrees)


@service.operation(needs=_align_needs)
def align(request: pb.AlignRequest, task: Task) -> pb.AlignResult:
    """Find the rotation and shift of each subtomogram against one reference."""
    chosen = shard_of(request, choose(request, task))
    info = chosen.subtomograms.info
    start = start_poses(request, chosen.poses() if chosen.own_table else None)
    reference = read_reference(task, request.reference_uri, info)
    search = search_of(request, info, transfer_of(request, task, info))
    poses = align_particles(
        chosen.read,
        len(chosen),
        reference,
        replace(search, reference_transfer=_of_reference(task, request.reference_uri)),
        start=start,
        mask=read_mask(task, request.mask_uri, info) if request.mask_uri else None,
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    return pb.AlignResult(
        particles_uri=task.write_particles("particles.parquet", with_poses(chosen.particles, info, poses)),
        count=len(chosen),
        mean_score=float(poses.scores.mean()),
    )
