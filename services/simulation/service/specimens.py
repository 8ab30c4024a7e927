"""What is imaged: SimulateDensity and SimulateScene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import density, phantoms, scene
from services.simulation.service.inputs import (
    BASE_BYTES,
    build_structures,
    check_names,
    file_bytes,
    read_catalogue,
    resolution_of,
    structure_bytes,
    write_slabs,
)
from services.simulation.service.registry import service

_PLACES: Mapping[int, Any] = {
    pb.PLACEMENT_CYTOPLASM: "cytoplasm",
    pb.PLACEMENT_MEMBRANE: "membrane",
    pb.PLACEMENT_VESICLE: "vesicle",
}


def _density_needs(request: pb.SimulateDensityRequest, reader: Reader) -> Needs:
    size = file_bytes(request.source_uri, reader)
    box = request.box_size_voxels or None
    memory = density.density_map_bytes(request.name, size, request.voxel_size_angstrom, resolution_of(request), box)
    return Needs(memory + 12 * (size or 0) + BASE_BYTES)


@service.operation(needs=_density_needs)
def simulate_density(request: pb.SimulateDensityRequest, task: Task) -> pb.SimulateDensityResult:
    """Compute the density map of one structure."""
    catalogue = read_catalogue(request.catalogue_uri, task)
    file = task.read_file(request.source_uri) if request.source_uri else None
    task.progress(0.1, f"reading {request.name}")
    source = density.load_source(request.name, file, request.source_uri, catalogue=catalogue)
    task.progress(0.3, "rendering")
    made = density.density_map(
        source,
        request.voxel_size_angstrom,
        resolution_of(request),
        request.box_size_voxels or None,
        task.threads,
        request.source_uri or request.name,
    )
    entry = catalogue.get(request.name)
    metrics = {
        "name": request.name,
        "source": entry.source if entry else request.source_uri,
        "symmetry": entry.symmetry if entry else None,
        "molecular_weight_kda": made.molecular_weight_kda,
        "extent_angstrom": list(made.extent_angstrom),
        "voxel_size_angstrom": made.voxel_size_angstrom,
        "resolution_angstrom": made.resolution_angstrom,
        "box_size_voxels": len(made.values),
    }
    info = VolumeInfo(made.values.shape, made.voxel_size_angstrom, "light")
    return pb.SimulateDensityResult(
        density_uri=task.write_volume("density.mrc", made.values, info),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _scene_needs(request: pb.SimulateSceneRequest, reader: Reader) -> Needs:
    chosen = [(structure.name, structure.source_uri) for structure in request.structures]
    chosen += [(strand.name, strand.source_uri) for strand in request.filaments]
    kept, building = structure_bytes(chosen, request.voxel_size_angstrom, resolution_of(request), reader)
    volume = request.size_x * request.size_y * request.size_z
    # the structures are built first, then the scene lives beside them; labels and instances are written as floats
    return Needs(kept + max(building, volume * (scene.BYTES_PER_VOXEL + 5)) + BASE_BYTES)


@service.operation(needs=_scene_needs)
def simulate_scene(request: pb.SimulateSceneRequest, task: Task) -> pb.SimulateSceneResult:
    """Place everything in ice, and keep the truth."""
    voxel, resolution = request.voxel_size_angstrom, resolution_of(request)
    shape = (request.size_z, request.size_y, request.size_x)
    if len(request.carbon_edges) > 1:
        raise InvalidArgument("carbon_edges: a field has one at most")
    check_names([*request.structures, *request.filaments])
    built = build_structures(
        request.structures, request.catalogue_uri, voxel, resolution, task, part(task.progress, 0.0, 0.15)
    )
    specimen = scene.Specimen(
        shape,
        voxel,
        resolution,
        placements=[
            scene.Placement(
                made,
                structure.count,
                structure.concentration_micromolar,
                _PLACES[structure.placement],
                structure.membrane_depth_angstrom,
            )
            for made, structure in zip(built, request.structures, strict=True)
        ],
        vesicles=[
            scene.Vesicles(
                vesicles.count, vesicles.radius_min_angstrom, vesicles.radius_max_angstrom, vesicles.max_ellipticity
            )
            for vesicles in request.vesicles
        ],
        flat_membranes=[scene.FlatMembranes(flat.count, flat.max_tilt_degrees) for flat in request.flat_membranes],
        filaments=[_filaments(strand, request, resolution, task) for strand in request.filaments],
        gold_beads=[scene.GoldBeads(beads.count, beads.diameter_angstrom) for beads in request.gold_beads],
        carbon=next(
            (
                scene.Carbon(edge.width_angstrom, edge.thickness_angstrom, edge.hole_radius_angstrom)
                for edge in request.carbon_edges
            ),
            None,
        ),
        ice_thickness_angstrom=request.ice_thickness_angstrom or None,
        min_gap_angstrom=request.min_gap_angstrom,
        allow_partial=request.allow_partial,
    )
    truth = scene.build_scene(specimen, np.random.default_rng(request.seed), part(task.progress, 0.15, 0.9))
    task.progress(0.9, "writing")
    particles = Particles.from_positions(
        truth.positions,
        voxel,
        "tomogram",
        shape,
        truth.rotations,
        class_id=truth.classes,
        class_name=np.array(truth.class_names, np.str_)[truth.classes],
        **({"filament": truth.filaments} if request.filaments else {}),
    )
    weights = {made.name: made.molecular_weight_kda for made in built}
    metrics = {
        "structures": [
            asdict(placed) | {"molecular_weight_kda": weights.get(placed.name)} for placed in _in_order(truth)
        ],
        "placed": len(truth.positions),
        "occupancy": truth.occupancy,
        "label_names": list(truth.label_names),
    }
    info = VolumeInfo(shape, voxel, "light")
    return pb.SimulateSceneResult(
        density_uri=task.write_volume("density.mrc", truth.density, info),
        truth_uri=task.write_particles("truth.parquet", particles),
        labels_uri=write_slabs(task, "labels.mrc", lambda first, last: truth.labels[first:last], info),
        instances_uri=write_slabs(task, "instances.mrc", lambda first, last: truth.instances[first:last], info),
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(truth.positions),
        gold_labels=truth.labels_of("gold"),
    )


def _in_order(truth: scene.Scene) -> list[scene.Placed]:
    """What was placed, the classes first and in their order."""
    names = {name: place for place, name in enumerate(truth.class_names)}
    return sorted(truth.placed, key=lambda placed: names.get(placed.name, len(names)))


def _filaments(
    strand: pb.Filaments, request: pb.SimulateSceneRequest, resolution_angstrom: float, task: Task
) -> scene.Filaments:
    """A kind of filament; a phantom's own helix where the request does not say another."""
    file = task.read_file(strand.source_uri) if strand.source_uri else None
    subunit = density.build_subunit(
        strand.name,
        file,
        strand.source_uri,
        request.voxel_size_angstrom,
        resolution_angstrom,
        task.threads,
        catalogue=read_catalogue(request.catalogue_uri, task),
    )
    helix = phantoms.phantom(strand.name).helix if file is None else None
    rise = strand.rise_angstrom or (helix.rise_angstrom if helix else 0.0)
    if strand.HasField("twist_degrees"):
        twist: float | None = strand.twist_degrees
    else:
        twist = helix.twist_degrees if helix else None
    if not rise or twist is None:
        raise InvalidArgument(f"filaments: {strand.name!r} needs a rise_angstrom and a twist_degrees")
    return scene.Filaments(
        subunit, strand.count, rise, twist, strand.persistence_length_angstrom, strand.length_angstrom or None
    )
