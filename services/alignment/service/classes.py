"""Which classes there are: Classify, DivideParticles, SettleClasses, MergeAverages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import classify as classification
from services.alignment import distinct as merging
from services.alignment import settling
from services.alignment.align import Poses, Search, memory_bytes
from services.alignment.array_files import pack, unpack
from services.alignment.service.class_averages import classes_bytes, own_classes, write_classes
from services.alignment.service.inputs import (
    BASE_BYTES,
    Array,
    choose,
    optional,
    read_density,
    read_mask,
    search_of,
    threads,
    transfer_of,
    with_poses,
)
from services.alignment.service.registry import service

_PAIR_BYTES = 100


def _classify_needs(request: pb.ClassifyRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    # Features lie in files; the clusters' tree is of a bounded number of particles.
    return Needs(classes_bytes(request, info, request.classes if request.HasField("classes") else request.max_classes))


def _feature_cycles(request: pb.ClassifyRequest, info: VolumeInfo) -> float:
    if not request.HasField("feature_low_pass_angstrom"):
        return 8.0
    cycles = info.shape[0] * info.voxel_size_angstrom / request.feature_low_pass_angstrom
    if cycles < 2:
        raise InvalidArgument(
            f"feature_low_pass_angstrom {request.feature_low_pass_angstrom:g}: leaves nothing to compare in a box of "
            f"{info.shape[0] * info.voxel_size_angstrom:g} Å; at most half of it is possible"
        )
    return cycles


@service.operation(needs=_classify_needs)
def classify(request: pb.ClassifyRequest, task: Task) -> pb.ClassifyResult:
    """Sort aligned subtomograms into classes."""
    chosen = choose(request, task)
    info = chosen.subtomograms.info
    saved = task.load_checkpoint()
    result = classification.classify(
        chosen.read,
        len(chosen),
        chosen.aligned(),
        search_of(request, info, transfer_of(request, task, info)),
        classes=request.classes if request.HasField("classes") else None,
        largest=request.max_classes,
        iterations=request.iterations,
        stable=request.stable_agreement,
        least=request.min_particles,
        components=request.components,
        feature_cycles=_feature_cycles(request, info),
        mask=read_mask(task, request.mask_uri, info) if request.mask_uri else None,
        scratch=task.scratch,
        halves=chosen.halves(),
        seed=request.seed,
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
        checkpoint=lambda state: task.save_checkpoint({"state.npz": pack(state.to_arrays())}),
        resume=None
        if saved is None
        else classification.State.from_arrays(unpack(saved["state.npz"], "the checkpoint")),
    )
    averages, half1, half2 = write_classes(task, result.averages, result.half_maps, info)
    table = with_poses(chosen.particles, info, result.poses).with_columns(
        class_id=result.labels, half=result.halves + 1
    )
    return pb.ClassifyResult(
        classes=len(averages),
        particles_uri=task.write_particles("particles.parquet", table),
        average_uris=averages,
        half1_uris=half1,
        half2_uris=half2,
        sizes=np.bincount(result.labels[result.labels >= 0], minlength=len(averages)).tolist(),
        resolutions_angstrom=result.resolutions_angstrom.tolist(),
        unassigned=int((result.labels < 0).sum()),
        table_uri=task.write_table("classes.json", result.table()),
    )


def _tables_needs(request: pb.DivideParticlesRequest | pb.SettleClassesRequest, reader: Reader) -> Needs:
    if isinstance(request, pb.SettleClassesRequest):
        size = reader.open_blob(request.before_uri).size_bytes
    else:
        size = reader.open_subtomograms(request.subtomograms_uri).count * 200
    return Needs(BASE_BYTES + 20 * size)


@service.operation(needs=_tables_needs)
def divide_particles(request: pb.DivideParticlesRequest, task: Task) -> pb.DivideParticlesResult:
    """Half sets, and clusters that are large enough."""
    chosen = choose(request, task)
    if len(chosen) < 2:
        raise FailedPrecondition(f"{request.subtomograms_uri} holds one subtomogram: there is nothing to average")
    clusters = own_classes(chosen) if chosen.own_table else None
    labels = settling.large_enough(
        np.zeros(len(chosen), dtype=np.int64) if clusters is None else clusters, request.min_particles
    )
    halves = chosen.halves()
    if halves is None:
        halves = settling.even_halves(labels, request.seed)
    plain = chosen.particles.without_columns(
        "qx", "qy", "qz", "qw", "shift_x", "shift_y", "shift_z", "score", "class_name"
    )
    table = plain.with_columns(class_id=labels, half=halves + 1)
    return pb.DivideParticlesResult(
        particles_uri=task.write_particles("particles.parquet", table),
        cluster_uris=[
            task.write_particles(f"cluster{k}.parquet", table.select(labels == k)) for k in range(labels.max() + 1)
        ],
        sizes=np.bincount(labels).tolist(),
        count=len(table),
    )


@service.operation(needs=_tables_needs)
def settle_classes(request: pb.SettleClassesRequest, task: Task) -> pb.SettleClassesResult:
    """All particles in one table, in classes that are large enough."""
    before = task.read_particles(request.before_uri)
    tables = [task.read_particles(uri) for uri in request.particles_uris]
    if request.class_per_table:
        tables = [table.with_columns(class_id=k) for k, table in enumerate(tables)]
    everyone = _all_of(before, tables, request)
    labels = everyone.table["class_id"].to_numpy(dtype=np.int64).clip(min=-1)
    settled = settling.dissolved(labels, everyone.table["half"].to_numpy(), request.min_particles)
    classes = int(settled.max(initial=-1)) + 1
    if classes == 0:
        raise FailedPrecondition(
            f"none of the {int(labels.max(initial=-1)) + 1} classes has {request.min_particles} particles, some in "
            "each half set: set min_particles lower, look for fewer classes, or give more particles"
        )
    earlier = before.table["class_id"].to_numpy(dtype=np.int64) if "class_id" in before.table else -np.ones_like(labels)
    changed = settling.changed(earlier, settled)
    stable = len(np.unique(earlier[earlier >= 0])) == classes and changed <= request.max_changed * len(settled)
    everyone = everyone.with_columns(class_id=settled)
    sizes = np.bincount(settled[settled >= 0]).tolist()
    figures = {
        "classes": classes,
        "particles": len(settled),
        "dissolved": len(np.unique(labels[labels >= 0])) - classes,
        "unassigned": int((settled < 0).sum()),
        "changed": changed,
    }
    return pb.SettleClassesResult(
        particles_uri=task.write_particles("particles.parquet", everyone),
        class_particles_uris=[
            task.write_particles(f"class{k}.parquet", everyone.select(settled == k)) for k in range(classes)
        ],
        sizes=sizes,
        classes=classes,
        dissolved=figures["dissolved"],
        unassigned=figures["unassigned"],
        changed=changed,
        stable=stable,
        table_uri=task.write_table("classes.json", figures | {"sizes": sizes, "stable": stable}),
    )


def _all_of(before: Particles, tables: Sequence[Particles], request: pb.SettleClassesRequest) -> Particles:
    """The particles of the tables, and those of `before` that are in none of them without a class, in its order."""
    place = {int(name): row for row, name in enumerate(before.table["id"])}
    rows: list[int] = []
    for table, uri in zip(tables, request.particles_uris, strict=True):
        for column in ("class_id", "half", "qx"):
            if column not in table.table and len(table):
                raise FailedPrecondition(f"{uri} has no column {column!r}: classes, half sets and rotations are needed")
        for name in table.table["id"]:
            if int(name) not in place:
                raise InvalidArgument(f"particle {name} of {uri} is not in {request.before_uri}")
            rows.append(place[int(name)])
    if len(set(rows)) < len(rows):
        twice = rows[int(np.argmax(pd.Series(rows).duplicated()))]
        raise InvalidArgument(f"particle {before.table['id'].iloc[twice]} is in the tables more than once")
    missing = np.setdiff1d(np.arange(len(before)), rows)
    parts = [table for table in tables if len(table)]
    if len(missing):
        if "half" not in before.table:
            raise FailedPrecondition(f"{request.before_uri} has no half sets, and particles that are in no other table")
        nothing = {f"shift_{axis}": 0.0 for axis in "xyz"} | {"score": np.nan, "class_id": -1}
        rest = before.select(missing)
        parts.append(rest.with_rotations(Rotation.identity(len(missing))).with_columns(**nothing))
    order = np.argsort(np.concatenate([np.array(rows, dtype=np.int64), missing]), kind="stable")
    return Particles.concat(parts).select(order)


def _merge_needs(request: pb.MergeAveragesRequest, reader: Reader) -> Needs:
    info = reader.open_volume(request.average_uris[0]).info
    search = Search(info.shape[0], info.voxel_size_angstrom, low_pass_angstrom=optional(request, "low_pass_angstrom"))
    maps = len(request.average_uris) * (3 if request.half1_uris else 1)
    each = memory_bytes(search, 1) + _PAIR_BYTES * math.prod(info.shape)
    return Needs(8 * maps * math.prod(info.shape) + threads() * each)


def _alike(task: Task, uris: Sequence[str], info: VolumeInfo) -> Array:
    """Volumes of one box in one contrast."""
    volumes = []
    for uri in uris:
        data, own = read_density(task, uri, info)
        volumes.append(data if own.contrast == info.contrast else -data)
    return np.stack(volumes)


@service.operation(needs=_merge_needs)
def merge_averages(request: pb.MergeAveragesRequest, task: Task) -> pb.MergeAveragesResult:
    """Group averages by structure."""
    _, info = read_density(task, request.average_uris[0])
    averages = _alike(task, request.average_uris, info)
    half_maps = None
    if request.half1_uris:
        half_maps = np.stack([_alike(task, request.half1_uris, info), _alike(task, request.half2_uris, info)], axis=1)
    particles = task.read_particles(request.particles_uri) if request.particles_uri else None
    labels = None if particles is None else _labels(particles, len(averages))
    found = merging.distinct(
        averages,
        info.voxel_size_angstrom,
        half_maps=half_maps,
        sizes=None if labels is None else np.bincount(labels[labels >= 0], minlength=len(averages)),
        low_pass_angstrom=optional(request, "low_pass_angstrom"),
        mask=read_mask(task, request.mask_uri, info) if request.mask_uri else None,
        same=request.min_similarity,
        max_candidates=request.max_candidates,
        threads=task.threads,
        progress=task.progress,
    )
    particles_uri = ""
    if particles is not None and labels is not None:
        particles_uri = task.write_particles("particles.parquet", _merged(particles, labels, found, info))
    return pb.MergeAveragesResult(
        groups=len(found.first),
        average_uris=[
            task.write_volume(f"average-class{k}.mrc", averages[member], info) for k, member in enumerate(found.first)
        ],
        group_of_average=found.groups.tolist(),
        particles_uri=particles_uri,
        table_uri=task.write_table("groups.json", found.table()),
    )


def _labels(particles: Particles, averages: int) -> NDArray[np.int64]:
    """The average that each particle is of, -1 for none."""
    if "class_id" not in particles.table:
        raise FailedPrecondition(f"{particles.source} holds no class_id: it says which average a particle is of")
    labels = particles.table["class_id"].to_numpy(dtype=np.int64)
    if labels.max(initial=-1) >= averages:
        raise InvalidArgument(f"{particles.source} has a class_id of {labels.max()}, but there are {averages} averages")
    return np.asarray(labels.clip(min=-1))


def _merged(particles: Particles, labels: NDArray[np.int64], found: merging.Distinct, info: VolumeInfo) -> Particles:
    """The particles in the classes of the groups, their poses in the frames of the groups' best averages."""
    result = particles.with_columns(class_id=np.where(labels >= 0, found.groups[labels], -1))
    rotations = particles.rotations()
    if rotations is None:
        return result
    scale = info.voxel_size_angstrom / particles.voxel_size_angstrom
    quaternions, shifts = np.atleast_2d(rotations.as_quat()).copy(), particles.shifts()
    for k in range(len(found.groups)):
        mine = np.flatnonzero(labels == k)
        if mine.size == 0:
            continue
        poses = Poses(rotations[mine], shifts[mine], np.zeros(len(mine)))
        carried = merging.carried(poses, found.rotations[k], found.shifts[k] * scale)
        quaternions[mine], shifts[mine] = carried.rotations.as_quat(), carried.shifts
    columns = {f"shift_{axis}": shifts[:, i] for i, axis in enumerate("xyz")}
    return result.with_rotations(Rotation.from_quat(quaternions)).with_columns(**columns)
