"""MapBack, Enrichment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.in_tomogram import Inside, particles_inside, volume_numbers, without_volume
from cryofleet.numerics import object_distance
from cryofleet.particles import Particles, row_count
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import ScratchVolume
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.learning import enrichment as enriching
from services.learning import map_back as mapping
from services.learning.service import inputs
from services.learning.service.registry import service

#: A row of a particle table in memory, while it is decoded and copied, with its place in the map.
ROW_BYTES = 1500
#: Boxes of a stack that are read at a time.
_READ_BYTES = 16 << 20


# --- MapBack -------------------------------------------------------------------------------------------------------


def _map_back_needs(request: learning_pb2.MapBackRequest, reader: Reader) -> Needs:
    shape = _tomogram(reader, request.tomogram_uri).info.shape
    # Labels and density of a slab, a block of them and their encoded copies; sections for the picture.
    slab = 24 * mapping.slab_sections(shape) * shape[1] * shape[2] + 24 * mapping.SECTIONS * shape[1] * shape[2]
    # Voxels as they are read, as shares, and sorted for the percentiles.
    solids = sum(3 * reader.open_volume(uri).info.data_bytes for uri in request.volume_uris)
    boxes = 2 * _READ_BYTES if request.segmentations_uri else 0
    rows = ROW_BYTES * row_count(reader.open_blob(request.particles_uri), request.particles_uri)
    return Needs(inputs.BASE_BYTES + slab + solids + boxes + rows)


@service.operation(needs=_map_back_needs)
def map_back(request: learning_pb2.MapBackRequest, task: Task) -> learning_pb2.MapBackResult:
    """Place volumes or segmentations at their particles' positions in a tomogram."""
    tomogram = _tomogram(task, request.tomogram_uri)
    particles = task.read_particles(request.particles_uri)
    chosen = particles_inside(task.store, particles, request.particles_uri, tomogram)
    info = tomogram.info
    map_info = VolumeInfo(info.shape, info.voxel_size_angstrom, "light")
    shown = mapping.picture_sections(chosen.positions, info.shape[0])
    pictures, voxels = [], np.zeros(mapping.MAX_LABEL + 1, np.int64)
    progress = part(task.progress, 0.1, 0.95)
    with ExitStack() as opened:
        density = None
        if request.segmentations_uri:
            slabs, counted = _placed_labels(request, task, particles, chosen, tomogram, opened, progress)
        else:
            slabs, counted = _placed_volumes(request, task, particles, chosen, tomogram, progress)
            density = opened.enter_context(task.volume_writer("density.mrc", map_info))
        labels = opened.enter_context(task.volume_writer("labels.mrc", map_info))
        for slab in slabs:
            labels.write(slab.labels)
            if density is not None and slab.density is not None:
                density.write(slab.density)
            voxels += np.bincount(slab.labels.ravel(), minlength=len(voxels))
            pictures += [
                (z, tomogram.slab(z, z + 1)[0], slab.labels[z - slab.first].copy())
                for z in shown
                if slab.first <= z < slab.first + len(slab.labels)
            ]

    names = _names(particles, 0 if request.segmentations_uri else 1)
    placed = int(counted.pop("placed"))
    by_label = counted.pop("by_label")
    metrics = {
        "particles": len(particles),
        "placed": placed,
        "outside_of_the_tomogram": chosen.outside,
        "of_other_tomograms": chosen.elsewhere,
        **counted,
        "classes": [
            {
                "label": label,
                "name": names.get(label, ""),
                "particles": int(by_label.get(label, 0)),
                "voxels": int(voxels[label]),
                "share_of_tomogram": float(voxels[label] / math.prod(info.shape)),
            }
            for label in sorted({*by_label, *np.flatnonzero(voxels).tolist()} - {0})
        ],
    }
    return learning_pb2.MapBackResult(
        labels_uri=labels.uri,
        density_uri="" if density is None else density.uri,
        picture_uri=task.write_bytes("picture.png", mapping.picture(pictures)),
        placed=placed,
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _tomogram(reader: Reader, uri: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; a tomogram is needed")
    return volume


def _placed_volumes(
    request: learning_pb2.MapBackRequest,
    task: Task,
    particles: Particles,
    chosen: Inside,
    tomogram: Volume,
    progress: Progress,
) -> tuple[Iterator[mapping.Slab], dict[str, Any]]:
    """The map of volumes, and how many particles were placed of each label."""
    volumes = [task.open_volume(uri) for uri in request.volume_uris]
    stacks = [volume for volume in volumes if volume.info.count is not None]
    if stacks and len(volumes) > 1:
        raise InvalidArgument(
            f"volume_uris: {stacks[0].uri} is a stack of {stacks[0].info.count} boxes beside {len(volumes) - 1} more; "
            "give one stack, or one volume of each class"
        )
    count = (volumes[0].info.count or 1) if stacks else len(volumes)
    classes = volume_numbers(particles, count, bool(stacks), request.particles_uri)
    note = without_volume(particles, classes)
    classes = classes[chosen.rows]
    if count > mapping.MAX_LABEL:
        raise InvalidArgument(f"volume_uris: {count} classes; labels go up to {mapping.MAX_LABEL}")
    classified = classes >= 0
    chosen, classes = chosen.take(classified), classes[classified]
    known = particles.rotations() if request.poses else None
    rotations = None if known is None else known[chosen.rows]
    positions = chosen.positions + chosen.shifts if request.poses else chosen.positions

    solids = []
    for number in range(count):
        volume = volumes[0] if stacks else volumes[number]
        voxels = volume.boxes(number, number + 1)[0] if stacks else volume.read()
        protein = -voxels if volume.info.contrast == "dark" else voxels
        solids.append(mapping.solid(protein, _scale(volume.info, tomogram.info)))
        task.progress(0.1 * (number + 1) / count, "reading the volumes")
    slabs = mapping.place_volumes(solids, classes, positions, rotations, tomogram.info.shape, request.level, progress)
    numbers, sizes = np.unique(classes + 1, return_counts=True)
    counted = {
        "placed": len(classes),
        "without_class": int((~classified).sum()),
        "turned": rotations is not None,
        "by_label": dict(zip(numbers.tolist(), sizes.tolist(), strict=True)),
        **({"note": note} if note else {}),
    }
    return slabs, counted


def _placed_labels(
    request: learning_pb2.MapBackRequest,
    task: Task,
    particles: Particles,
    chosen: Inside,
    tomogram: Volume,
    opened: ExitStack,
    progress: Progress,
) -> tuple[Iterator[mapping.Slab], dict[str, Any]]:
    """The map of segmented boxes, and in how many of them each label is; `opened` closes what it reads from."""
    stack = task.open_volume(request.segmentations_uri)
    info = stack.info
    if info.count != len(particles):
        raise InvalidArgument(
            f"{stack.uri} has {info.count or 1} boxes, {request.particles_uri} {len(particles)} particles: "
            "segmentations must be those of the particles, in their order"
        )
    z, y, x = info.shape
    boxes = opened.enter_context(ScratchVolume(task.scratch / "segmentations", (info.count, z * y, x)))
    placed = np.zeros(info.count, np.bool_)
    placed[chosen.rows] = True
    by_label: dict[int, int] = {}
    step = max(1, _READ_BYTES // (4 * z * y * x))
    for first in range(0, info.count, step):
        read = stack.boxes(first, min(first + step, info.count))
        if not ((read >= 0) & (read <= mapping.MAX_LABEL) & (read == np.rint(read))).all():
            raise InvalidArgument(f"{stack.uri} holds no labels: they are whole numbers from 0 to {mapping.MAX_LABEL}")
        for row, box in enumerate(read, start=first):
            boxes.write_section(row, box.reshape(z * y, x))
            for label in np.unique(box).astype(int).tolist() if placed[row] else ():
                by_label[label] = by_label.get(label, 0) + 1
        task.progress(0.1 * min(first + step, info.count) / info.count, "reading the segmentations")
    order = np.arange(len(chosen.rows))
    if "score" in particles.table:
        order = np.argsort(particles.table["score"].to_numpy(np.float64)[chosen.rows], kind="stable")

    def read_box(place: int) -> NDArray[np.uint16]:
        row = int(chosen.rows[place])
        return boxes.sections(row, row + 1).reshape(z, y, x).astype(np.uint16)

    slabs = mapping.place_labels(
        read_box, info.shape, _scale(info, tomogram.info), chosen.positions, order, tomogram.info.shape, progress
    )
    return slabs, {"placed": len(chosen.rows), "by_label": by_label}


def _scale(box: VolumeInfo, tomogram: VolumeInfo) -> float:
    """A box's voxel in voxels of the tomogram; a whole number where it is one but for rounding."""
    scale = box.voxel_size_angstrom / tomogram.voxel_size_angstrom
    whole = float(round(scale))
    return whole if math.isclose(scale, whole, rel_tol=inputs.VOXEL_SIZE_TOLERANCE) else scale


def _names(particles: Particles, first_label: int) -> dict[int, str]:
    """The classes' names by their labels, as far as each class has one."""
    table = particles.table
    if "class_id" not in table or "class_name" not in table:
        return {}
    pairs = set(zip(table["class_id"].tolist(), table["class_name"].tolist(), strict=True))
    numbers = [number for number, _ in pairs]
    return {number + first_label: name for number, name in pairs if numbers.count(number) == 1}


# --- Enrichment ----------------------------------------------------------------------------------------------------


def _enrichment_needs(request: learning_pb2.EnrichmentRequest, reader: Reader) -> Needs:
    rows = sum(
        ROW_BYTES * row_count(reader.open_blob(uri), uri)
        for uri in (request.particles_uri, request.near_particles_uri)
        if uri
    )
    labels = 0
    if request.near_labels_uri:
        labels = object_distance.memory_bytes(_tomogram(reader, request.near_labels_uri).info.shape)
    return Needs(inputs.BASE_BYTES + rows + labels)


@service.operation(needs=_enrichment_needs)
def enrichment(request: learning_pb2.EnrichmentRequest, task: Task) -> learning_pb2.EnrichmentResult:
    """Say whether particles of each class lie near others more often than by chance."""
    particles = task.read_particles(request.particles_uri)
    if "class_id" not in particles.table:
        raise InvalidArgument(f"{request.particles_uri} has no classes: give particles with class_id")
    given = len(particles)
    particles = particles.select(particles.table["class_id"].to_numpy() >= 0)
    names = _tomogram_names(particles)
    progress = part(task.progress, 0.0, 0.9)
    if request.near_particles_uri:
        near = _near_particles(request, task, particles, names, progress)
    else:
        near = _near_label(request, task, particles, names, progress)
    _, tomograms = np.unique(names, return_inverse=True)
    classes = particles.table["class_id"].to_numpy(np.int64)
    found = enriching.enrichment(near, classes, tomograms, part(task.progress, 0.9, 1.0))
    titles = _names(particles, 0)
    metrics = {
        "distance_angstrom": request.distance_angstrom,
        "particles": len(particles),
        "particles_without_class": given - len(particles),
        "particles_near": int(near.sum()),
        "share_near": float(near.mean()),
        "tomograms": len(set(names.tolist())),
        "confidence": enriching.CONFIDENCE,
        "classes": [
            {
                "class": each.number + 1,
                "name": titles.get(each.number, ""),
                "particles": each.particles,
                "near": each.near,
                "near_by_chance": each.expected,
                "ratio": each.ratio,
                "ratio_low": each.interval[0],
                "ratio_high": each.interval[1] if math.isfinite(each.interval[1]) else None,
                "p_value": each.p_value,
                "corrected_p_value": each.corrected_p_value,
            }
            for each in found
        ],
    }
    return learning_pb2.EnrichmentResult(
        classes=[each.number + 1 for each in found],
        ratios=[each.ratio for each in found],
        p_values=[each.corrected_p_value for each in found],
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _tomogram_names(particles: Particles) -> NDArray[Any]:
    """The name of each particle's tomogram."""
    if "tomogram" in particles.table:
        return particles.table["tomogram"].to_numpy(dtype=str)
    return np.full(len(particles), particles.tomogram)


def _places(particles: Particles) -> NDArray[np.float64]:
    """Where the particles are, in Å: the centre of their box and their shift from there."""
    return (particles.positions() + particles.shifts()) * particles.voxel_size_angstrom


def _near_particles(
    request: learning_pb2.EnrichmentRequest,
    task: Task,
    particles: Particles,
    names: NDArray[Any],
    progress: Progress,
) -> NDArray[np.bool_]:
    targets = task.read_particles(request.near_particles_uri)
    target_names = _tomogram_names(targets)
    together = sorted(set(names.tolist()) & set(target_names.tolist()))
    if not together:
        raise FailedPrecondition(
            f"{request.particles_uri} is of {_some(names)}, {request.near_particles_uri} of {_some(target_names)}: "
            "they must be of the same tomograms, by name"
        )
    here, there = _places(particles), _places(targets)
    ids, target_ids = inputs.ids(particles), inputs.ids(targets)
    near = np.zeros(len(particles), np.bool_)
    for done, name in enumerate(together):
        own, others = np.flatnonzero(names == name), np.flatnonzero(target_names == name)
        near[own] = enriching.near_points(
            here[own], ids[own], there[others], target_ids[others], request.distance_angstrom
        )
        progress((done + 1) / len(together), "measuring distances")
    return near


def _near_label(
    request: learning_pb2.EnrichmentRequest,
    task: Task,
    particles: Particles,
    names: NDArray[Any],
    progress: Progress,
) -> NDArray[np.bool_]:
    if len(set(names.tolist())) > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} is of {_some(names)}, and {request.near_labels_uri} is of one tomogram: "
            "give the particles of that one"
        )
    labels = _tomogram(task, request.near_labels_uri)
    size = labels.info.voxel_size_angstrom
    away = object_distance.object_distances(
        _places(particles) / size,
        labels.slab,
        labels.info.shape,
        request.near_label,
        request.distance_angstrom / size,
        progress,
    )
    return np.isfinite(away)


def _some(names: NDArray[Any]) -> str:
    """Tomograms' names, the first few of them."""
    found = sorted(set(names.tolist()))
    shown = ", ".join(repr(name) for name in found[:3])
    return f"tomogram{'s' if len(found) > 1 else ''} {shown}{' and more' if len(found) > 3 else ''}"
