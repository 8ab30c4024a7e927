"""MakeMesh and MakeScene: surfaces of averages, alone and at their particles' poses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.in_tomogram import particles_inside, volume_numbers, without_volume
from cryofleet.numerics.label_colours import CLASS_COLOURS, label_colour
from cryofleet.particles import Particles, row_count
from cryofleet.progress import Progress, part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import io_pb2
from cryofleet.volumes import Volume
from services.io import scene
from services.io.gltf import Node, Shape, encode_glb
from services.io.isosurface import (
    MESH_VERTEX_BYTES,
    MOST_VERTICES,
    Isosurface,
    Mesh,
    Rule,
    isosurface,
    mesh_vertices,
)
from services.io.isosurface import memory_bytes as isosurface_bytes
from services.io.picks import class_colours
from services.io.service.inputs import BASE_BYTES, ROW_BYTES, single
from services.io.service.picks import class_names
from services.io.service.registry import service
from services.io.service.sound import sound


def _surface(
    voxels: NDArray[np.float32],
    volume: Volume,
    rule: Rule,
    value: float,
    request: io_pb2.MakeMeshRequest | io_pb2.MakeSceneRequest,
    progress: Progress,
) -> Isosurface:
    """The surface of a map of either contrast; its threshold, and a value that is one, in the map's own unit."""
    voxels = sound(voxels, volume.uri)
    sign = np.float32(-1 if volume.info.contrast == "dark" else 1)
    value = float(sign) * value if rule == "threshold" else value
    try:
        found = isosurface(
            sign * voxels,
            volume.info.voxel_size_angstrom,
            rule,
            value,
            request.smallest_part,
            request.step_voxels,
            progress,
        )
    except (FailedPrecondition, InvalidArgument) as failure:
        raise type(failure)(f"{volume.uri}: {failure}") from None
    return replace(found, threshold=float(sign) * found.threshold)


# --- MakeMesh ------------------------------------------------------------------------------------------------------


def _make_mesh_needs(request: io_pb2.MakeMeshRequest, reader: Reader) -> Needs:
    info = single(reader, request.volume_uri).info
    return Needs(BASE_BYTES + 2 * info.data_bytes + isosurface_bytes(info.shape))


@service.operation(needs=_make_mesh_needs)
def make_mesh(request: io_pb2.MakeMeshRequest, task: Task) -> io_pb2.MakeMeshResult:
    """Make the surface of an average."""
    volume = single(task, request.volume_uri)
    voxels = volume.read()
    rule, value = _rule(request)
    found = _surface(voxels, volume, rule, value, request, part(task.progress, 0.1, 0.8))
    task.progress(0.8, "writing")
    encoded = encode_glb([Shape("surface", found.mesh, request.colour)], [Node("surface", 0)], about="surface")
    return io_pb2.MakeMeshResult(
        mesh_uri=task.write_bytes("surface.glb", encoded),
        threshold=found.threshold,
        volume_nm3=found.mesh.volume_nm3(),
        area_nm2=found.mesh.area_nm2(),
        triangles=len(found.mesh.triangles),
        parts_left_out=found.parts_left_out,
    )


def _rule(request: io_pb2.MakeMeshRequest) -> tuple[Rule, float]:
    if request.HasField("threshold"):
        return "threshold", request.threshold
    if request.HasField("sigma"):
        return "sigma", request.sigma
    if request.HasField("molecular_weight_kda"):
        return "molecular_weight", request.molecular_weight_kda
    return ("level", request.level) if request.HasField("level") else ("otsu", 0.0)


# --- MakeScene -----------------------------------------------------------------------------------------------------


def _make_scene_needs(request: io_pb2.MakeSceneRequest, reader: Reader) -> Needs:
    infos = [reader.open_volume(uri).info for uri in request.volume_uris]
    # One map at a time; all meshes, and the file that they become, in pieces and whole. A last one makes it too many.
    maps = max(isosurface_bytes(info.shape) + 8 * info.data_bytes // (info.count or 1) for info in infos)
    vertices = min(sum(mesh_vertices(info.shape) * (info.count or 1) for info in infos), 2 * MOST_VERTICES)
    meshes = 3 * MESH_VERTEX_BYTES * vertices
    rows = ROW_BYTES * row_count(reader.open_blob(request.particles_uri), request.particles_uri)
    return Needs(BASE_BYTES + maps + meshes + rows + scene.NODE_BYTES * request.max_particles)


@dataclass(frozen=True)
class _Chosen:
    """The particles that may be placed: rows of the table, and where they are."""

    rows: NDArray[np.int64]
    places_angstrom: NDArray[np.float64]
    outside: int
    tomogram_shape: tuple[int, int, int] | None
    voxel_size_angstrom: float


@service.operation(needs=_make_scene_needs)
def make_scene(request: io_pb2.MakeSceneRequest, task: Task) -> io_pb2.MakeSceneResult:
    """Put the surfaces of averages at their particles' poses."""
    volumes = [task.open_volume(uri) for uri in request.volume_uris]
    stacks = [volume for volume in volumes if volume.info.count is not None]
    if stacks and len(volumes) > 1:
        raise InvalidArgument(
            f"volume_uris: {stacks[0].uri} is a stack of {stacks[0].info.count} boxes beside {len(volumes) - 1} more; "
            "give one stack, or one volume of each class"
        )
    count = (volumes[0].info.count or 1) if stacks else len(volumes)
    for name, values in (("thresholds", request.thresholds), ("molecular_weights_kda", request.molecular_weights_kda)):
        if values and len(values) != count:
            raise InvalidArgument(f"{name} has {len(values)} values for {count} averages: give one for each")

    particles = task.read_particles(request.particles_uri)
    chosen = _chosen(request, task, particles)
    numbers = volume_numbers(particles, count, bool(stacks), request.particles_uri)
    note = without_volume(particles, numbers)
    numbers = numbers[chosen.rows]
    kept = numbers >= 0
    without_class = int((~kept).sum())
    if not kept.any():
        raise FailedPrecondition(
            f"no particle of {request.particles_uri} has a class with an average: there is nothing to place"
        )
    places = np.flatnonzero(kept)
    if len(places) > request.max_particles and "score" in particles.table:
        scores = particles.table["score"].to_numpy(np.float64)[chosen.rows[places]]
        places = places[np.sort(np.argsort(-scores, kind="stable")[: request.max_particles])]
    left_out = int(kept.sum()) - len(places[: request.max_particles])
    places = places[: request.max_particles]

    present = np.unique(numbers[places])
    meshes: list[Mesh] = []
    for done, number in enumerate(present.tolist()):
        volume = volumes[0] if stacks else volumes[number]
        voxels = volume.boxes(number, number + 1)[0] if stacks else volume.read()
        rule, value = _rule_of(request, number)
        progress = part(task.progress, 0.8 * done / len(present), 0.8 * (done + 1) / len(present))
        meshes.append(_surface(voxels, volume, rule, value, request, progress).mesh)
        if sum(len(mesh.vertices) for mesh in meshes) > MOST_VERTICES:
            raise InvalidArgument(
                f"the first {done + 1} of {len(present)} surfaces have more than {MOST_VERTICES} vertices together: "
                "take larger step_voxels, or smoother averages"
            )
        progress(1, "making surfaces", surfaces=done + 1)
    rows = chosen.rows[places]
    poses = particles.rotations() if request.poses else None
    shapes = np.searchsorted(present, numbers[places])
    instances = scene.Instances(
        shapes,
        chosen.places_angstrom[places],
        None if poses is None else poses[rows],
        particles.table["id"].to_numpy(np.int64)[rows],
    )
    names = [_name(particles, rows[shapes == shape]) for shape in range(len(present))]
    colours = _colours(particles.select(chosen.rows), names)
    encoded = scene.encode_scene(meshes, names, colours, instances, chosen.tomogram_shape, chosen.voxel_size_angstrom)
    return io_pb2.MakeSceneResult(
        scene_uri=task.write_bytes("scene.glb", encoded),
        placed=len(places),
        left_out=left_out,
        without_class=without_class,
        outside=chosen.outside,
        triangles=int(sum(len(meshes[shape].triangles) for shape in shapes)),
        note=note,
    )


def _chosen(request: io_pb2.MakeSceneRequest, task: Task, particles: Particles) -> _Chosen:
    if request.tomogram_uri:
        tomogram = single(task, request.tomogram_uri)
        inside = particles_inside(task.store, particles, request.particles_uri, tomogram)
        size = tomogram.info.voxel_size_angstrom
        places = (inside.positions + inside.shifts if request.poses else inside.positions) * size
        return _Chosen(inside.rows, places, inside.outside, tomogram.info.shape, size)
    if "tomogram" in particles.table and particles.table["tomogram"].nunique() > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} has particles of {particles.table['tomogram'].nunique()} tomograms: "
            "give tomogram_uri, the one that is shown"
        )
    size = particles.voxel_size_angstrom
    positions = particles.positions() + particles.shifts() if request.poses else particles.positions()
    return _Chosen(np.arange(len(particles)), positions * size, 0, particles.tomogram_shape, size)


def _colours(particles: Particles, names: list[str]) -> list[str]:
    """Of the averages: those that their particles have on slices, and beyond these, one for each."""
    ranked = class_colours(class_names(particles) or [], CLASS_COLOURS, "")
    return [ranked.of(name) or label_colour(number + 1) for number, name in enumerate(names)]


def _rule_of(request: io_pb2.MakeSceneRequest, number: int) -> tuple[Rule, float]:
    if request.thresholds:
        return "threshold", request.thresholds[number]
    if request.HasField("sigma"):
        return "sigma", request.sigma
    if request.molecular_weights_kda:
        return "molecular_weight", request.molecular_weights_kda[number]
    return ("level", request.level) if request.HasField("level") else ("otsu", 0.0)


def _name(particles: Particles, rows: NDArray[np.int64]) -> str:
    """What particles of one average are called."""
    names = set(class_names(particles.select(rows)) or ["average"])
    return names.pop() if len(names) == 1 else f"class {particles.table['class_id'].iloc[rows[0]] + 1}"
