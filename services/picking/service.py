"""The picking service: turns requests into calls of the methods, and what they give into artifacts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import POSITION, SHIFT, Particles, row_count
from cryofleet.progress import part
from cryofleet.scratch_array import reserved_array
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.v1 import common_pb2, picking_pb2
from cryofleet.volumes import SHARD_BYTES, Subtomograms, Volume, VolumeInfo
from services.picking import difference_of_gaussians as dog
from services.picking import evaluate as evaluation
from services.picking import extract as extraction
from services.picking import merge

service = Service(picking_pb2.DESCRIPTOR.services_by_name["PickingService"])

#: A row of a particle table in memory, while it is decoded, copied and encoded.
ROW_BYTES = 1000
#: Buffers of reading and writing artifacts, and small things.
BASE_BYTES = 64 << 20

_CONTRASTS = {common_pb2.CONTRAST_DARK: "dark", common_pb2.CONTRAST_LIGHT: "light"}
_NORMALISATIONS = {
    picking_pb2.NORMALISATION_NONE: "none",
    picking_pb2.NORMALISATION_BOX: "box",
    picking_pb2.NORMALISATION_BACKGROUND: "background",
}
_EDGE_POLICIES = {picking_pb2.EDGE_POLICY_SKIP: "skip", picking_pb2.EDGE_POLICY_FILL_MEAN: "fill_mean"}


def _tomogram(reader: Reader, uri: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; a tomogram is needed")
    return volume


def _rows(reader: Reader, uri: str) -> int:
    return row_count(reader.open_blob(uri), uri)


def _dog_needs(request: picking_pb2.DifferenceOfGaussiansRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    return Needs(
        BASE_BYTES
        + dog.memory_bytes(
            info.shape,
            info.voxel_size_angstrom,
            request.particle_diameter_angstrom,
            request.sigma_ratio,
            request.threshold,
        )
    )


@service.operation(needs=_dog_needs)
def difference_of_gaussians(
    request: picking_pb2.DifferenceOfGaussiansRequest, task: Task
) -> picking_pb2.DifferenceOfGaussiansResult:
    """Find particles of one size as peaks of a difference of Gaussians."""
    tomogram = _tomogram(task, request.tomogram_uri)
    info = tomogram.info
    picks = dog.difference_of_gaussians(
        tomogram.slab,
        info.shape,
        info.voxel_size_angstrom,
        request.particle_diameter_angstrom,
        contrast=_CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast,
        sigma_ratio=request.sigma_ratio,
        threshold=request.threshold,
        min_distance_angstrom=request.min_distance_angstrom if request.HasField("min_distance_angstrom") else None,
        max_picks=request.max_picks,
        progress=task.progress,
    )
    particles = Particles.from_positions(
        picks.positions,
        info.voxel_size_angstrom,
        tomogram=f"tomogram-{content_digest(task.store, request.tomogram_uri)[:12]}",
        tomogram_shape=info.shape,
        score=picks.scores,
    )
    return picking_pb2.DifferenceOfGaussiansResult(
        particles_uri=task.write_particles("picks.parquet", particles), count=len(particles)
    )


def _extract_needs(request: picking_pb2.ExtractRequest, reader: Reader) -> Needs:
    shape = _tomogram(reader, request.tomogram_uri).info.shape
    cutting = extraction.memory_bytes(shape, request.box_size_voxels, request.binning, _EDGE_POLICIES[request.edges])
    # a shard is gathered, stacked and encoded
    shard = 3 * max(SHARD_BYTES, 4 * request.box_size_voxels**3)
    return Needs(BASE_BYTES + cutting + shard + ROW_BYTES * _rows(reader, request.particles_uri))


@service.operation(needs=_extract_needs)
def extract(request: picking_pb2.ExtractRequest, task: Task) -> picking_pb2.ExtractResult:
    """Cut subtomograms; the table's x, y, z become the voxel that is each box's centre, the rest of the position its
    shift.
    """
    tomogram = _tomogram(task, request.tomogram_uri)
    info = tomogram.info
    particles = _chosen_particles(request, task)
    _check_tomogram(particles, info, request)
    positions = _true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom)
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


def _chosen_particles(request: picking_pb2.ExtractRequest, task: Task) -> Particles:
    particles = task.read_particles(request.particles_uri)
    if len(particles) == 0:
        raise FailedPrecondition(f"{request.particles_uri} has no particles: there is nothing to extract")
    if not request.HasField("rows"):
        return particles
    first, stop = request.rows.first, request.rows.first + request.rows.count
    if stop > len(particles):
        raise InvalidArgument(
            f"rows {first} to {stop - 1} were asked for, and {request.particles_uri} has rows 0 to {len(particles) - 1}"
        )
    return particles.select(slice(first, stop))


def _check_tomogram(particles: Particles, info: VolumeInfo, request: picking_pb2.ExtractRequest) -> None:
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


def _true_positions(particles: Particles) -> NDArray[np.float64]:
    """Where the particles are, in voxels: the centre of their box and their shift from there."""
    return particles.positions() + particles.shifts()


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


def _merge_particles_needs(request: picking_pb2.MergeParticlesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + 2 * ROW_BYTES * sum(_rows(reader, uri) for uri in request.particles_uris))


@service.operation(needs=_merge_particles_needs)
def merge_particles(request: picking_pb2.MergeParticlesRequest, task: Task) -> picking_pb2.MergeParticlesResult:
    """Join tables; columns that not all of them have are left out."""
    tables = []
    for number, uri in enumerate(request.particles_uris):
        task.progress(0.9 * number / len(request.particles_uris), "reading tables", tables=number)
        tables.append(task.read_particles(uri))
    particles = Particles.concat(tables)
    task.progress(0.9, "writing", tables=len(tables))
    return picking_pb2.MergeParticlesResult(
        particles_uri=task.write_particles("particles.parquet", particles), count=len(particles)
    )


def _evaluate_needs(request: picking_pb2.EvaluateRequest, reader: Reader) -> Needs:
    rows = _rows(reader, request.particles_uri) + _rows(reader, request.truth_uri)
    return Needs(BASE_BYTES + evaluation.memory_bytes(rows) + ROW_BYTES * rows)


@service.operation(needs=_evaluate_needs)
def evaluate(request: picking_pb2.EvaluateRequest, task: Task) -> picking_pb2.EvaluateResult:
    """Compare picks with the truth, in Å, so that their voxel sizes may differ."""
    picks = task.read_particles(request.particles_uri)
    truth = task.read_particles(request.truth_uri)
    if len(truth) == 0:
        raise FailedPrecondition(f"{request.truth_uri} has no particles: there is nothing to compare the picks with")
    classes = None
    for column in ("class_name", "class_id"):
        if classes is None and column in truth.table:
            classes = [str(value) for value in truth.table[column]]
    figures = evaluation.evaluate(
        _true_positions(picks) * picks.voxel_size_angstrom,
        _true_positions(truth) * truth.voxel_size_angstrom,
        request.distance_angstrom,
        classes,
        task.progress,
    )
    return picking_pb2.EvaluateResult(
        metrics_uri=task.write_table("metrics.json", figures.to_dict()),
        precision=figures.precision,
        recall=figures.recall,
        f1=figures.f1,
        matched=figures.matched,
    )
