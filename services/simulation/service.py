"""The simulation service: requests into calls, results into messages."""

from __future__ import annotations

import numpy as np

from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.v1 import common_pb2, simulation_pb2
from cryofleet.volumes import VolumeInfo
from services.simulation import density, scene, structures, tomogram

service = Service(simulation_pb2.DESCRIPTOR.services_by_name["SimulationService"])


def _resolution(request: simulation_pb2.SimulateTomogramRequest) -> float:
    return request.resolution_angstrom or 2 * request.voxel_size_angstrom


def _needs(request: simulation_pb2.SimulateTomogramRequest, reader: Reader) -> Needs:
    kept = building = 0
    for structure in request.structures:
        size = None
        if structure.source_uri:
            size = reader.open_blob(structure.source_uri).size_bytes
            if size > structures.MAX_FILE_BYTES:
                raise InvalidArgument(
                    f"{structure.source_uri}: {size} bytes, at most {structures.MAX_FILE_BYTES} are read"
                )
        voxels = density.estimated_side(structure.name, size, request.voxel_size_angstrom, _resolution(request)) ** 3
        kept += voxels * density.KEPT_BYTES_PER_VOXEL
        building = max(building, voxels * density.BUILD_BYTES_PER_VOXEL + 12 * (size or 0))
    volume = request.size_x * request.size_y * request.size_z
    # the structures are built first, then the scene and its reconstruction live beside them
    return Needs(memory_bytes=kept + max(building, volume * tomogram.BYTES_PER_VOXEL) + (64 << 20))


@service.operation(needs=_needs)
def simulate_tomogram(
    request: simulation_pb2.SimulateTomogramRequest, task: Task
) -> simulation_pb2.SimulateTomogramResult:
    """Place structures at random without overlap, remove the missing wedge, add noise to a stated SNR, and keep the
    truth."""
    names = [structure.name for structure in request.structures]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidArgument(f"structures: {', '.join(repeated)} stands there more than once; names must differ")
    counts = [structure.count for structure in request.structures]
    shape = (request.size_z, request.size_y, request.size_x)
    voxel_size, contrast = request.voxel_size_angstrom, _CONTRASTS[request.contrast]
    # separate streams: another noise level or tilt range leaves the scene as it is
    placing, noise = (np.random.default_rng(seed) for seed in np.random.SeedSequence(request.seed).spawn(2))

    built = []
    for number, structure in enumerate(request.structures):
        task.progress(0.15 * number / len(names), f"building {structure.name}")
        file = task.read_file(structure.source_uri) if structure.source_uri else None
        built.append(
            density.build(
                structure.name, file, structure.source_uri, voxel_size, _resolution(request), workers=task.threads
            )
        )
    truth = scene.build_scene(
        built, counts, shape, request.min_gap_angstrom / voxel_size, placing, part(task.progress, 0.15, 0.75)
    )
    clean_uri = task.write_volume("clean.mrc", truth.density, VolumeInfo(shape, voxel_size, "light"))
    made = tomogram.reconstruct(
        truth.density,
        request.snr,
        request.tilt_min_degrees,
        request.tilt_max_degrees,
        contrast,
        noise,
        task.threads,
        part(task.progress, 0.75, 0.95),
    )
    task.progress(0.95, "writing")
    info = VolumeInfo(shape, voxel_size, contrast, request.tilt_min_degrees, request.tilt_max_degrees)
    particles = Particles.from_positions(
        truth.positions,
        voxel_size,
        "tomogram",
        shape,
        truth.rotations,
        class_id=truth.classes,
        class_name=np.array(names)[truth.classes],
    )
    metrics = {
        "structures": [
            {
                "name": name,
                "asked": count,
                "placed": int((truth.classes == index).sum()),
                "molecular_weight_kda": built[index].molecular_weight_kda,
                "shape_voxels": built[index].shape_voxels,
            }
            for index, (name, count) in enumerate(zip(names, counts, strict=True))
        ],
        "placed": len(truth.classes),
        "occupancy": truth.occupancy,
        "snr_asked": request.snr,
        "snr_measured": made.snr,
        "signal_variance": made.signal_variance,
        "noise_variance": made.noise_variance,
    }
    return simulation_pb2.SimulateTomogramResult(
        tomogram_uri=task.write_volume("tomogram.mrc", made.tomogram, info),
        truth_uri=task.write_particles("truth.parquet", particles),
        clean_uri=clean_uri,
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(truth.classes),
    )


_CONTRASTS = {common_pb2.CONTRAST_DARK: "dark", common_pb2.CONTRAST_LIGHT: "light"}
