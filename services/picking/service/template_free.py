"""Picking without templates: DifferenceOfGaussians and Saliency."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.in_tomogram import tomogram_name
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.requests import CONTRASTS
from cryofleet.server import Needs, Reader, Task
from cryofleet.tomogram_names import plain_names
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import Volume
from services.picking import difference_of_gaussians as dog
from services.picking import few_picks, scale_space
from services.picking import saliency as salience
from services.picking.service.inputs import BASE_BYTES, open_tomogram
from services.picking.service.registry import service
from services.picking.slabs import ReadSlab

_FEW_PICKS = 2


def _dog_needs(request: picking_pb2.DifferenceOfGaussiansRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.tomogram_uri).info
    size = info.voxel_size_angstrom, request.particle_diameter_angstrom
    if request.HasField("particle_diameter_max_angstrom"):
        return Needs(
            BASE_BYTES
            + scale_space.memory_bytes(
                info.shape,
                *size,
                request.particle_diameter_max_angstrom,
                sigma_ratio=request.sigma_ratio,
                threshold=request.threshold,
            )
        )
    return Needs(BASE_BYTES + dog.memory_bytes(info.shape, *size, request.sigma_ratio, request.threshold))


@service.operation(needs=_dog_needs)
def difference_of_gaussians(
    request: picking_pb2.DifferenceOfGaussiansRequest, task: Task
) -> picking_pb2.DifferenceOfGaussiansResult:
    """Find particles of one size, or of a range of sizes, as peaks of differences of Gaussians."""
    tomogram = open_tomogram(task, request.tomogram_uri)
    info = tomogram.info
    read, shape, first = _previewed(request, tomogram)
    contrast = CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast
    min_distance = request.min_distance_angstrom if request.HasField("min_distance_angstrom") else None
    common: dict[str, Any] = {
        "contrast": contrast,
        "sigma_ratio": request.sigma_ratio,
        "threshold": request.threshold,
        "min_distance_angstrom": min_distance,
        "max_picks": request.max_picks,
        "progress": task.progress,
    }
    columns: dict[str, Any] = {}
    metrics: dict[str, Any] = {"preview_planes": None if first is None else [first[0], first[1]]}
    diameter = request.particle_diameter_angstrom
    if request.HasField("particle_diameter_max_angstrom"):
        found = scale_space.scale_space_picks(
            read, shape, info.voxel_size_angstrom, diameter, request.particle_diameter_max_angstrom, **common
        )
        positions, scores = found.positions, found.scores
        columns["diameter_angstrom"] = found.diameters_angstrom
        diameter = found.best_diameter_angstrom or diameter
        metrics["scales"] = [asdict(scale) for scale in found.scales]
    elif first is not None:
        picks = dog.preview(tomogram.slab, info.shape, *first, info.voxel_size_angstrom, diameter, **common)
        positions, scores = picks.positions, picks.scores
    else:
        picks = dog.difference_of_gaussians(read, shape, info.voxel_size_angstrom, diameter, **common)
        positions, scores = picks.positions, picks.scores
    advice = ""
    if len(positions) < max(_FEW_PICKS, request.min_picks) and first is None:
        inverted = common | {"contrast": few_picks.opposite(contrast)}
        others = dog.difference_of_gaussians(read, shape, info.voxel_size_angstrom, diameter, **inverted)
        advice = few_picks.advice(len(positions), len(others.positions), contrast, diameter, request.threshold)
        metrics["advice"] = advice
        if len(positions) < request.min_picks:
            called = plain_names([info.tomogram])[info.tomogram] or request.tomogram_uri
            raise FailedPrecondition(f"{called}: {advice}")
    particles = Particles.from_positions(
        positions,
        info.voxel_size_angstrom,
        tomogram=tomogram_name(task.store, tomogram),
        tomogram_shape=info.shape,
        score=scores,
        **columns,
    )
    return picking_pb2.DifferenceOfGaussiansResult(
        particles_uri=task.write_particles("picks.parquet", particles),
        count=len(particles),
        particle_diameter_angstrom=diameter,
        metrics_uri=task.write_table("metrics.json", {"picks": len(particles), **metrics}),
        advice=advice,
    )


def _previewed(
    request: picking_pb2.DifferenceOfGaussiansRequest, tomogram: Volume
) -> tuple[ReadSlab, tuple[int, int, int], tuple[int, int] | None]:
    """The tomogram as it is picked, and of a preview the first plane and the number of planes."""
    shape = tomogram.info.shape
    if not request.HasField("preview_z"):
        return tomogram.slab, shape, None
    if request.preview_z >= shape[0]:
        raise InvalidArgument(
            f"preview_z is {request.preview_z}; {request.tomogram_uri} has planes 0 to {shape[0] - 1}"
        )
    if request.HasField("particle_diameter_max_angstrom"):
        raise InvalidArgument("a preview is of one diameter: leave preview_z or particle_diameter_max_angstrom out")
    count = min(request.preview_planes, shape[0])
    first = min(max(0, request.preview_z - count // 2), shape[0] - count)
    return tomogram.slab, shape, (first, count)


def _saliency_needs(request: picking_pb2.SaliencyRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.tomogram_uri).info
    working = salience.memory_bytes(info.shape, info.voxel_size_angstrom, request.particle_diameter_angstrom)
    return Needs(BASE_BYTES + working + 4 * int(np.prod(info.shape)))


@service.operation(needs=_saliency_needs)
def saliency(request: picking_pb2.SaliencyRequest, task: Task) -> picking_pb2.SaliencyResult:
    """Find what stands out of the background's features."""
    volume = open_tomogram(task, request.tomogram_uri)
    info = volume.info
    found = salience.saliency(
        volume.read(),
        info.voxel_size_angstrom,
        request.particle_diameter_angstrom,
        contrast=CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast,
        compactness=request.compactness,
        threshold=request.threshold,
        min_distance_angstrom=request.min_distance_angstrom if request.HasField("min_distance_angstrom") else None,
        max_picks=request.max_picks,
        workers=task.threads,
        progress=part(task.progress, 0, 0.9),
    )
    particles = Particles.from_positions(
        found.positions,
        info.voxel_size_angstrom,
        tomogram_name(task.store, volume),
        info.shape,
        score=found.scores,
    )
    reduced = replace(
        info,
        shape=found.saliency.shape,
        voxel_size_angstrom=info.voxel_size_angstrom * found.factor,
        contrast="light",
    )
    task.progress(0.9, "writing", picks=len(particles))
    return picking_pb2.SaliencyResult(
        particles_uri=task.write_particles("picks.parquet", particles),
        saliency_uri=task.write_volume("saliency.mrc", found.saliency, reduced),
        suppressed_uri=task.write_volume("suppressed.mrc", found.suppressed, info),
        count=len(particles),
        supervoxels=found.supervoxels,
    )
