"""RefinePicks: picks' positions and orientations against a template."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import POSITION, QUATERNION, SHIFT
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import picking_pb2
from services.picking import pose_refinement
from services.picking import template_matching as matching
from services.picking.service.inputs import (
    BASE_BYTES,
    ROW_BYTES,
    check_tomogram,
    chosen_particles,
    count_rows,
    open_tomogram,
    true_positions,
)
from services.picking.service.registry import service
from services.picking.service.templates import is_filtered, searched_tomogram, template_info, template_of


def _refine_needs(request: picking_pb2.RefinePicksRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.tomogram_uri).info
    box = template_info(request.template_uri, 1, info, reader).shape[0]
    shift = round(request.max_shift_angstrom / info.voxel_size_angstrom)
    working = pose_refinement.memory_bytes(info.shape, box, shift, disturbed=is_filtered(request))
    return Needs(BASE_BYTES + working + ROW_BYTES * count_rows(reader, request.particles_uri))


@service.operation(needs=_refine_needs)
def refine_picks(request: picking_pb2.RefinePicksRequest, task: Task) -> picking_pb2.RefinePicksResult:
    """Refine positions and orientations; the table's shifts become part of the positions."""
    volume = open_tomogram(task, request.tomogram_uri)
    info = volume.info
    particles = chosen_particles(request, task)
    check_tomogram(particles, info, request)
    rotations = particles.rotations()
    if rotations is None:
        raise FailedPrecondition(f"{request.particles_uri} has no orientations; RefinePicks needs them to begin with")
    measured = matching.survey(volume.slab, info.shape, part(task.progress, 0, 0.1))
    tomogram = searched_tomogram(request, volume, 1, measured)
    refined = pose_refinement.refine(
        tomogram,
        template_of(request, info, 1, tomogram.profile, task),
        true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom),
        rotations,
        angle_degrees=request.angle_degrees,
        max_shift_voxels=round(request.max_shift_angstrom / info.voxel_size_angstrom),
        device=task.device,
        threads=task.threads,
        progress=part(task.progress, 0.1, 1),
    )
    columns = dict(zip(POSITION, refined.positions.T, strict=True))
    columns |= dict(zip(QUATERNION, refined.rotations.as_quat().reshape(-1, 4).T, strict=True))
    columns |= {"score": refined.scores}
    if "shift_x" in particles.table:
        columns |= {name: np.zeros(len(particles)) for name in SHIFT}
    found = replace(particles, voxel_size_angstrom=info.voxel_size_angstrom, tomogram_shape=info.shape).with_columns(
        **columns
    )
    return picking_pb2.RefinePicksResult(particles_uri=task.write_particles("refined.parquet", found), count=len(found))
