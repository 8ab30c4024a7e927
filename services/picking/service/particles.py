"""Lists of particles: MergeParticles, FilterParticles, SampleGrid, SampleSurface."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.in_tomogram import tomogram_name
from cryofleet.numerics import object_distance
from cryofleet.particles import Particles
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import VolumeInfo
from services.picking import particle_lists, surface_sampling
from services.picking.score_threshold import background
from services.picking.service.inputs import (
    BASE_BYTES,
    ROW_BYTES,
    classes_of,
    count_rows,
    open_tomogram,
    true_positions,
)
from services.picking.service.registry import service


def _merge_particles_needs(request: picking_pb2.MergeParticlesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + 2 * ROW_BYTES * sum(count_rows(reader, uri) for uri in request.particles_uris))


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


def _filter_needs(request: picking_pb2.FilterParticlesRequest, reader: Reader) -> Needs:
    rows = sum(count_rows(reader, uri) for uri in request.particles_uris)
    needed = BASE_BYTES + 4 * ROW_BYTES * rows
    if request.segmentation_uri:
        needed += object_distance.memory_bytes(open_tomogram(reader, request.segmentation_uri).info.shape)
    return Needs(needed)


@service.operation(needs=_filter_needs)
def filter_particles(request: picking_pb2.FilterParticlesRequest, task: Task) -> picking_pb2.FilterParticlesResult:
    """Join tables and keep the rows that pass every rule, in their order; the strongest first where the number is
    limited.
    """
    particles = particle_lists.join_lists([task.read_particles(uri) for uri in request.particles_uris]).particles
    given = len(particles)
    removed: dict[str, int] = {}
    metrics: dict[str, Any] = {"particles": given, "removed": removed}

    def keep(rule: str, passes: NDArray[np.bool_]) -> None:
        nonlocal particles
        removed[rule] = int(len(particles) - passes.sum())
        particles = particles.select(passes)

    if request.class_names:
        keep("class_names", np.isin(np.array(classes_of(particles) or [""] * given), list(request.class_names)))
    if request.mask_uri:
        mask = open_tomogram(task, request.mask_uri)
        keep("mask", particle_lists.by_mask(_positions_in(particles, mask.info), mask.slab, mask.info.shape))
    if request.segmentation_uri:
        objects = open_tomogram(task, request.segmentation_uri)
        size = objects.info.voxel_size_angstrom
        nearest = request.segmentation_distance_min_angstrom
        has_limit = request.HasField("segmentation_distance_max_angstrom")
        farthest = request.segmentation_distance_max_angstrom if has_limit else np.inf
        away = size * object_distance.object_distances(
            _positions_in(particles, objects.info),
            objects.slab,
            objects.info.shape,
            limit=farthest / size,
            progress=task.progress,
        )
        keep("segmentation", (away >= nearest) & (away <= farthest))
    if request.border_angstrom:
        if particles.tomogram_shape is None:
            raise FailedPrecondition("the particles do not say their tomogram's shape, which border_angstrom needs")
        margin = request.border_angstrom / particles.voxel_size_angstrom
        keep("border", particle_lists.by_border(true_positions(particles), particles.tomogram_shape, margin))
    if request.min_distance_angstrom:
        groups = [particles.table[name] for name in ("tomogram",) if name in particles.table]
        if request.within_class:
            groups.append(pd.Series(classes_of(particles) or [""] * len(particles)))
        ranks = particles.table["score"].to_numpy(np.float64) if "score" in particles.table else None
        distance = request.min_distance_angstrom / particles.voxel_size_angstrom
        keep("distance", particle_lists.deduplicate(true_positions(particles), ranks, distance, groups))
    by_score = [name for name in ("score_min", "score_max", "expected_false_positives") if request.HasField(name)]
    scores = particles.table["score"].to_numpy(np.float64) if "score" in particles.table else None
    if by_score and scores is None:
        raise FailedPrecondition(f"the particles have no scores, which {by_score[0]} needs")
    if by_score:
        assert scores is not None
        least = request.score_min if request.HasField("score_min") else -np.inf
        if request.HasField("expected_false_positives") and not request.HasField("score_min"):
            noise = background(scores)
            least = noise.threshold(request.expected_false_positives)
            metrics |= {"score_min": least, "background": asdict(noise)}
        most = request.score_max if request.HasField("score_max") else np.inf
        keep("score", particle_lists.by_score(scores, least, most))
    if request.max_particles and len(particles) > request.max_particles:
        if "score" not in particles.table:
            raise FailedPrecondition("the particles have no scores, which max_particles needs")
        strongest = np.argsort(-particles.table["score"].to_numpy(np.float64), kind="stable")[: request.max_particles]
        removed["number"] = len(particles) - len(strongest)
        particles = particles.select(strongest)
    metrics["kept"] = len(particles)
    return picking_pb2.FilterParticlesResult(
        particles_uri=task.write_particles("particles.parquet", particles),
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(particles),
        removed=given - len(particles),
    )


def _positions_in(particles: Particles, info: VolumeInfo) -> NDArray[np.float64]:
    """The particles' positions in voxels of a volume of the same field."""
    return true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom)


def _grid_needs(request: picking_pb2.SampleGridRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.tomogram_uri).info
    spacing = max(1.0, request.spacing_angstrom / info.voxel_size_angstrom)
    points = np.prod([side / spacing + 1 for side in info.shape])
    return Needs(BASE_BYTES + int(ROW_BYTES * points) + 8 * info.shape[1] * info.shape[2])


@service.operation(needs=_grid_needs)
def sample_grid(request: picking_pb2.SampleGridRequest, task: Task) -> picking_pb2.SampleGridResult:
    """Lay out a regular grid of particles."""
    tomogram = open_tomogram(task, request.tomogram_uri)
    info = tomogram.info
    read_mask = None
    if request.mask_uri:
        mask = open_tomogram(task, request.mask_uri)
        if mask.info.shape != info.shape:
            raise FailedPrecondition(
                f"{request.mask_uri} has {mask.info.shape} voxels (z, y, x), {request.tomogram_uri} has {info.shape}"
            )
        read_mask = mask.slab
    spacing = request.spacing_angstrom / info.voxel_size_angstrom
    positions = surface_sampling.grid(info.shape, spacing, read_mask, task.progress)
    particles = Particles.from_positions(
        positions, info.voxel_size_angstrom, tomogram_name(task.store, tomogram), info.shape
    )
    return picking_pb2.SampleGridResult(
        particles_uri=task.write_particles("grid.parquet", particles), count=len(particles)
    )


def _surface_needs(request: picking_pb2.SampleSurfaceRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.segmentation_uri).info
    lengths = request.smoothing_angstrom / info.voxel_size_angstrom, request.spacing_angstrom / info.voxel_size_angstrom
    return Needs(BASE_BYTES + surface_sampling.memory_bytes(info.shape, *lengths))


@service.operation(needs=_surface_needs)
def sample_surface(request: picking_pb2.SampleSurfaceRequest, task: Task) -> picking_pb2.SampleSurfaceResult:
    """Spread oriented particles over a segmented surface."""
    volume = open_tomogram(task, request.segmentation_uri)
    info = volume.info
    found = surface_sampling.sample(
        volume.slab,
        info.shape,
        request.spacing_angstrom / info.voxel_size_angstrom,
        surface="boundary" if request.surface == picking_pb2.SURFACE_BOUNDARY else "middle",
        sigma_voxels=request.smoothing_angstrom / info.voxel_size_angstrom,
        offset_voxels=request.offset_angstrom / info.voxel_size_angstrom,
        progress=task.progress,
    )
    particles = Particles.from_positions(
        found.positions, info.voxel_size_angstrom, tomogram_shape=info.shape, rotations=found.rotations()
    )
    return picking_pb2.SampleSurfaceResult(
        particles_uri=task.write_particles("surface.parquet", particles), count=len(particles)
    )
