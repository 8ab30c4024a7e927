"""Extract and MergeSubtomograms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import POSITION, SHIFT
from cryofleet.progress import part
from cryofleet.scratch_array import reserved_array
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import SHARD_BYTES, Subtomograms
from services.picking import extract as extraction
from services.picking import merge
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

_NORMALISATIONS = {
    picking_pb2.NORMALISATION_NONE: "none",
    picking_pb2.NORMALISATION_BOX: "box",
    picking_pb2.NORMALISATION_BACKGROUND: "background",
}
_EDGE_POLICIES = {picking_pb2.EDGE_POLICY_SKIP: "skip", picking_pb2.EDGE_POLICY_FILL_MEAN: "fill_mean"}


def _extract_needs(request: picking_pb2.ExtractRequest, reader: Reader) -> Needs:
    shape = open_tomogram(reader, request.tomogram_uri).info.shape
    cutting = extraction.memory_bytes(shape, request.box_size_voxels, request.binning, _EDGE_POLICIES[request.edges])
    # a shard is gathered, stacked and encoded
    shard = 3 * max(SHARD_BYTES, 4 * request.box_size_voxels**3)
    return Needs(BASE_BYTES + cutting + shard + ROW_BYTES * count_rows(reader, request.particles_uri))


@service.operation(needs=_extract_needs)
def extract(request: picking_pb2.ExtractRequest, task: Task) -> picking_pb2.ExtractResult:
    """Cut subtomograms; the table's x, y, z become the voxel that is each box's centre, the rest of the position its
    shift.
    """
    tomogram = open_tomogram(task, request.tomogram_uri)
    info = tomogram.info
    particles = chosen_particles(request, task)
    check_tomogram(particles, info, request)
    positions = true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom)
    edges = _EDGE_POLICIES[request.edges]
    placement = extraction.place_boxes(positions, info.shape, request.box_size_voxels, request.binning, edges)
    count = len(placement.rows)
    # A shard may lie wholly at the edges; whether the whole set has any box, its reduction sees.
    if count == 0 and not request.HasField("rows"):
        raise FailedPrecondition(
            f"none of the {len(particles)} particles of {request.particles_uri} has a box of {placement.side} tomogram "
            f"voxels within {request.tomogram_uri}: take smaller boxes, other particles, or edges EDGE_POLICY_FILL_MEAN"
        )
    box = (request.box_size_voxels,) * 3
    # boxes are cut in the tomogram's order and written in the table's; between the two they wait on disk
    boxes: NDArray[np.float32] = np.empty((0, *box), np.float32)
    if count:
        boxes = reserved_array(task.scratch / "boxes.f32", (count, *box), np.float32)
        extraction.cut_boxes(
            tomogram.slab,
            info.shape,
            placement,
            boxes,
            normalisation=_NORMALISATIONS[request.normalisation],
            progress=part(task.progress, 0, 0.9),
        )
    task.progress(0.9, "writing", boxes=count)
    # a box's centre voxel is at x, y, z; the particle is shift_x, shift_y, shift_z from there
    columns = dict(zip(POSITION, placement.centres.T.astype(np.float64), strict=True))
    columns |= dict(zip(SHIFT, placement.offsets.T, strict=True))
    cut = replace(
        particles.select(placement.rows),
        voxel_size_angstrom=info.voxel_size_angstrom,
        tomogram_shape=info.shape,
    ).with_columns(**columns)
    box_info = replace(info, shape=box, voxel_size_angstrom=info.voxel_size_angstrom * request.binning)
    return picking_pb2.ExtractResult(
        subtomograms_uri=task.write_subtomograms("subtomograms", boxes, box_info, cut),
        count=count,
        skipped=placement.skipped,
    )


def _merge_subtomograms_needs(request: picking_pb2.MergeSubtomogramsRequest, reader: Reader) -> Needs:
    count = sum(reader.open_subtomograms(uri).count for uri in request.subtomograms_uris)
    return Needs(BASE_BYTES + 2 * ROW_BYTES * count)


@service.operation(needs=_merge_subtomograms_needs)
def merge_subtomograms(
    request: picking_pb2.MergeSubtomogramsRequest, task: Task
) -> picking_pb2.MergeSubtomogramsResult:
    """Join sets of subtomograms: a new index and table, no voxels."""
    sets: list[Subtomograms] = []
    members: list[merge.Member] = []
    for number, uri in enumerate(request.subtomograms_uris):
        task.progress(0.9 * number / len(request.subtomograms_uris), "reading tables", sets=number)
        found = task.open_subtomograms(uri)
        info = found.info
        tilts = (info.tilt_min_degrees, info.tilt_max_degrees)
        sets.append(found)
        members.append(
            merge.Member(uri, found.particles(), found.box_size, info.voxel_size_angstrom, info.contrast, tilts)
        )
    particles = merge.merge_particles(members)
    if len(particles) == 0:
        raise FailedPrecondition(
            f"none of the {len(sets)} sets, the first {request.subtomograms_uris[0]}, has a subtomogram: take smaller "
            "boxes, other particles, or edges EDGE_POLICY_FILL_MEAN"
        )
    task.progress(0.9, "writing", sets=len(sets))
    shards = [shard for found in sets for shard in found.shards]
    return picking_pb2.MergeSubtomogramsResult(
        subtomograms_uri=task.write_subtomograms_index("subtomograms", shards, sets[0].info, particles),
        count=len(particles),
    )
