"""Subtomograms without tomograms: SimulateParticles and SimulateSubtomograms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.requests import CONTRASTS, CTF_CORRECTIONS
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import common_pb2
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import detector, imaging, poses, subtomograms
from services.simulation.service.inputs import (
    BASE_BYTES,
    build_structures,
    check_names,
    imaging_of,
    resolution_of,
    scheme_of,
    structure_bytes,
    tilt_range,
)
from services.simulation.service.registry import service

#: What a row of a particle table takes while it is worked on.
ROW_BYTES = 512


def _particles_needs(request: pb.SimulateParticlesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + ROW_BYTES * sum(structure.count for structure in request.structures))


@service.operation(needs=_particles_needs)
def simulate_particles(request: pb.SimulateParticlesRequest, task: Task) -> pb.SimulateParticlesResult:
    """Draw the poses of a set of subtomograms."""
    check_names(request.structures)
    for structure in request.structures:
        if structure.count < 1:
            raise InvalidArgument(f"structures: {structure.name!r} has a count of {structure.count}; give at least 1")
    about_axis = request.orientations == pb.ORIENTATIONS_ABOUT_AXIS
    drawn = poses.draw_poses(
        [structure.count for structure in request.structures],
        np.random.default_rng(request.seed),
        request.max_shift_angstrom / request.voxel_size_angstrom,
        (list(request.axis) or [0.0, 1.0, 0.0]) if about_axis else None,
        list(request.structure_axis) or [0.0, 0.0, 1.0],
    )
    count = len(drawn.classes)
    side = request.box_size_voxels
    names = np.array([structure.name for structure in request.structures])
    particles = Particles.from_positions(
        np.full((count, 3), float(side // 2)),
        request.voxel_size_angstrom,
        "subtomograms",
        (side, side, side),
        drawn.rotations,
        class_id=drawn.classes,
        class_name=names[drawn.classes],
        shift_x=drawn.shifts_voxels[:, 0],
        shift_y=drawn.shifts_voxels[:, 1],
        shift_z=drawn.shifts_voxels[:, 2],
    )
    return pb.SimulateParticlesResult(particles_uri=task.write_particles("particles.parquet", particles), count=count)


def _subtomograms_needs(request: pb.SimulateSubtomogramsRequest, reader: Reader) -> Needs:
    chosen = [(structure.name, structure.source_uri) for structure in request.structures]
    kept, building = structure_bytes(chosen, request.voxel_size_angstrom, resolution_of(request), reader)
    side = request.box_size_voxels
    width = subtomograms.image_width(side)
    tilts = len(scheme_of(request.tilt_scheme))
    batch = max(1, subtomograms.BATCH_VOXELS // side**3)
    working = batch * subtomograms.BYTES_PER_SAMPLE * (side**3 + tilts * side * width)
    return Needs(kept + max(building, working) + (256 << 20) + BASE_BYTES)


@service.operation(needs=_subtomograms_needs)
def simulate_subtomograms(request: pb.SimulateSubtomogramsRequest, task: Task) -> pb.SimulateSubtomogramsResult:
    """Image and reconstruct a subtomogram for each pose; rows of a set come out as they do of the whole."""
    particles = task.read_particles(request.particles_uri)
    if not np.isclose(particles.voxel_size_angstrom, request.voxel_size_angstrom, rtol=1e-6):
        raise FailedPrecondition(
            f"{request.particles_uri} counts in voxels of {particles.voxel_size_angstrom:g} Å, the subtomograms have "
            f"{request.voxel_size_angstrom:g} Å"
        )
    drawn = _poses(particles, request)
    first = request.rows.first if request.HasField("rows") else 0
    stop = first + request.rows.count if request.HasField("rows") else len(particles)
    if stop > len(particles):
        raise InvalidArgument(
            f"rows {first} to {stop - 1} were asked for, and {request.particles_uri} has rows 0 to {len(particles) - 1}"
        )
    built = build_structures(
        request.structures,
        request.catalogue_uri,
        request.voxel_size_angstrom,
        resolution_of(request),
        task,
        part(task.progress, 0.0, 0.1),
    )
    parameters = imaging_of(request.microscope, request.voxel_size_angstrom)
    drawing, measuring, noise = np.random.SeedSequence(request.seed).spawn(3)
    setup = subtomograms.Setup(
        built,
        request.box_size_voxels,
        imaging.draw_tilt_series(scheme_of(request.tilt_scheme), parameters, np.random.default_rng(drawing)),
        parameters,
        detector.sinc_mtf if request.microscope.detector_mtf else None,
        CTF_CORRECTIONS[request.ctf_correction],
    )
    subtomograms.check_sizes(setup)
    level = None
    if request.HasField("snr"):
        level = subtomograms.calibrate(
            setup, drawn, request.snr, measuring, task.threads, part(task.progress, 0.1, 0.3)
        )
    rows = np.arange(first, stop)
    # by the place in the whole set, so that a shard's noise is the whole's
    seeds = [np.random.SeedSequence(noise.entropy, spawn_key=(*noise.spawn_key, int(row))) for row in rows]
    light = request.contrast == common_pb2.CONTRAST_LIGHT
    part_of_set = poses.Poses(drawn.classes[rows], drawn.rotations[rows], drawn.shifts_voxels[rows])

    def boxes() -> Iterator[NDArray[np.float32]]:
        made = subtomograms.subtomograms(setup, part_of_set, level, seeds, task.threads, part(task.progress, 0.3, 0.99))
        for batch in made:
            yield -batch if light else batch

    side = request.box_size_voxels
    info = VolumeInfo(
        (side, side, side),
        request.voxel_size_angstrom,
        CONTRASTS[request.contrast],
        *tilt_range(setup.series.angles_degrees),
    )
    metrics: dict[str, Any] = {"snr": request.snr if level else None, "structures": []}
    for index, built_density in enumerate(built):
        metrics["structures"].append(
            {
                "name": built_density.name,
                "molecular_weight_kda": built_density.molecular_weight_kda,
                "signal_variance": level.signal_variances[index] if level else None,
            }
        )
    metrics["noise_variance"] = level.noise_variance if level else None
    return pb.SimulateSubtomogramsResult(
        subtomograms_uri=task.write_subtomograms("subtomograms", boxes(), info, particles.select(rows)),
        count=len(rows),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _poses(particles: Particles, request: pb.SimulateSubtomogramsRequest) -> poses.Poses:
    """The poses of a table, its classes told by their names."""
    rotations = particles.rotations()
    if rotations is None or "class_name" not in particles.table:
        raise FailedPrecondition(f"{request.particles_uri}: the particles need a rotation and a class_name each")
    places = {structure.name: place for place, structure in enumerate(request.structures)}
    names = particles.table["class_name"]
    unknown = sorted(set(names) - set(places))
    if unknown:
        raise InvalidArgument(
            f"{request.particles_uri} has particles of class {unknown[0]!r}, which none of the structures is called"
        )
    classes = np.asarray(names.map(places), np.int32)
    shifts = particles.shifts() if "shift_x" in particles.table else np.zeros((len(particles), 3))
    return poses.Poses(classes, rotations, shifts)
