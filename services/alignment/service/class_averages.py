"""The averages of known classes: Reassign, SumClasses, AverageClasses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fsc import corrected_fsc
from cryofleet.numerics.masks import soft_sphere, usual_edge_voxels
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import classify as classification
from services.alignment.align import Search, memory_bytes
from services.alignment.array_files import pack, unpack
from services.alignment.service.half_maps import fsc_table
from services.alignment.service.inputs import (
    BASE_BYTES,
    FSC_BYTES,
    Array,
    Chosen,
    asked_rows,
    choose,
    read_reference,
    search_of,
    shard_of,
    start_poses,
    threads,
    transfer_bytes,
    transfer_of,
    with_poses,
)
from services.alignment.service.registry import service
from services.alignment.stored_sums import About, StoredSums, add_up

_CLASS_BYTES = 120


def classes_bytes(request: pb.ClassifyRequest | pb.ReassignRequest, info: VolumeInfo, classes: int) -> int:
    """What sorting particles into so many classes takes."""
    needed = memory_bytes(search_of(request, info), threads(), references=True) + transfer_bytes(request, info)
    return needed + classes * _CLASS_BYTES * math.prod(info.shape)


def write_classes(
    task: Task, averages: Array, half_maps: Array, info: VolumeInfo
) -> tuple[list[str], list[str], list[str]]:
    """URIs of the averages and of their half maps."""
    plain = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)

    def write(name: str, volumes: Array) -> list[str]:
        return [task.write_volume(f"{name}-class{k}.mrc", volume, plain) for k, volume in enumerate(volumes)]

    return write("average", averages), write("half1", half_maps[:, 0]), write("half2", half_maps[:, 1])


def own_classes(chosen: Chosen) -> NDArray[np.int64] | None:
    """The classes that particles are in, -1 for none; None where the table has no classes."""
    if "class_id" not in chosen.given.table:
        return None
    return np.asarray(chosen.given.table["class_id"].to_numpy().clip(min=-1), dtype=np.int64)


def _reassign_needs(request: pb.ReassignRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    needed = classes_bytes(request, info, len(request.average_uris) or _known_classes(request, reader))
    if request.sums_uri:
        needed += 3 * reader.open_blob(request.sums_uri).size_bytes
    return Needs(needed)


def _known_classes(request: pb.ReassignRequest, reader: Reader) -> int:
    """How many classes the particles are in."""
    if request.sums_uri:
        return 0  # What the sums take is counted by their file.
    if request.particles_uri:
        table = reader.read_particles(request.particles_uri).table
    else:
        table = reader.open_subtomograms(request.subtomograms_uri).particles().table
    return int(table["class_id"].max()) + 1 if "class_id" in table and len(table) else 1


@service.operation(needs=_reassign_needs)
def reassign(request: pb.ReassignRequest, task: Task) -> pb.ReassignResult:
    """Put each subtomogram into the class whose average it fits best."""
    everyone = choose(request, task)
    chosen = shard_of(request, everyone)
    info = chosen.subtomograms.info
    search = search_of(request, info, transfer_of(request, task, info))
    before = own_classes(chosen)
    common: dict[str, Any] = {"names": chosen.names, "device": task.device, "threads": task.threads}
    averages: Array | classification.ClassSums
    if request.average_uris:
        averages = np.stack([read_reference(task, uri, info) for uri in request.average_uris])
    elif request.sums_uri:
        averages = _own_sums(request, task, everyone, chosen)
    else:
        if before is None:
            raise FailedPrecondition(f"{chosen.given.source} holds no class_id: give average_uris, or classify first")
        averages = classification.class_sums(
            chosen.read,
            len(chosen),
            chosen.aligned(),
            before,
            int(before.max()) + 1,
            search,
            halves=chosen.halves(),
            progress=part(task.progress, 0.0, 0.1),
            **common,
        )
    near = chosen.poses() if request.HasField("max_angle_degrees") else None
    found = classification.reassign(
        chosen.read,
        len(chosen),
        averages,
        search,
        start=start_poses(request, near),
        progress=part(task.progress, 0.1, 0.9),
        **common,
    )
    labels = found.labels
    result = pb.ReassignResult(
        changed=int((labels != before).sum()) if before is not None else len(chosen),
        mean_score=float(found.poses.scores.mean()),
    )
    if request.make_averages:
        # Classes that nobody is left in go; the others keep their order.
        _, labels = np.unique(labels, return_inverse=True)
        sums = classification.class_sums(
            chosen.read,
            len(chosen),
            found.poses,
            labels,
            int(labels.max()) + 1,
            search,
            halves=chosen.halves(),
            progress=part(task.progress, 0.9, 1.0),
            **common,
        )
        uris = write_classes(task, sums.averages(), sums.half_maps(), info)
        for field, values in zip(("average_uris", "half1_uris", "half2_uris"), uris, strict=True):
            getattr(result, field).extend(values)
        result.resolutions_angstrom.extend(sums.resolutions(info.voxel_size_angstrom).tolist())
    result.sizes.extend(np.bincount(labels).tolist())
    table = with_poses(chosen.particles, info, found.poses).with_columns(class_id=labels)
    halves = chosen.halves()
    if halves is not None:
        table = table.with_columns(half=halves + 1)
    result.particles_uri = task.write_particles("particles.parquet", table)
    return result


def _own_sums(request: pb.ReassignRequest, task: Task, everyone: Chosen, chosen: Chosen) -> classification.ClassSums:
    """The sums that the particles made, for those that are chosen. Raises InvalidArgument where others made them."""
    stored = StoredSums.from_arrays(unpack(task.read_file(request.sums_uri), request.sums_uri), request.sums_uri)
    wanted = _about_sums(request, task, everyone, range(len(everyone)))
    if stored.about != wanted:
        raise InvalidArgument(
            f"{request.sums_uri} holds other sums than those of all particles of {everyone.given.source}, imaged and "
            "symmetric as this request says: make them with the same arguments"
        )
    return stored.class_sums(*_sorted(chosen), chosen.aligned(), task.device)


def _sorted(chosen: Chosen) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes and half sets. Raises FailedPrecondition where they are not all known."""
    labels, halves = own_classes(chosen), chosen.halves()
    if labels is None:
        raise FailedPrecondition(f"{chosen.given.source} holds no class_id: it says what to average")
    if halves is None:
        raise FailedPrecondition(f"{chosen.given.source} does not have every particle in half set 1 or 2")
    return labels, halves


def _about_sums(request: pb.SumClassesRequest | pb.ReassignRequest, task: Task, everyone: Chosen, rows: range) -> About:
    """What sums over rows of the particles are of."""
    info = everyone.subtomograms.info
    uris = [request.subtomograms_uri, request.particles_uri, request.wedge_uri, request.tilts_uri]
    made_of: list[object] = [content_digest(task.store, uri) if uri else "" for uri in uris]
    if request.tilts_uri:
        ctf = request.weight_by_ctf if request.HasField("weight_by_ctf") else None
        made_of += [ctf, request.weight_by_dose, request.ctf_correction]
    return About(
        info.shape[0],
        info.voxel_size_angstrom,
        info.contrast,
        request.symmetry.upper(),
        hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        len(everyone),
        rows.start,
        len(rows),
    )


def _sum_needs(request: pb.SumClassesRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    table = reader.read_particles(request.particles_uri).table
    classes = int(table["class_id"].max()) + 1 if "class_id" in table and len(table) else 1
    needed = memory_bytes(Search(info.shape[0], info.voxel_size_angstrom), threads()) + transfer_bytes(request, info)
    return Needs(needed + max(classes, 1) * _CLASS_BYTES * math.prod(info.shape))


@service.operation(needs=_sum_needs)
def sum_classes(request: pb.SumClassesRequest, task: Task) -> pb.SumClassesResult:
    """What some particles add to the averages of their classes."""
    everyone = choose(request, task)
    info = everyone.subtomograms.info
    labels, halves = _sorted(everyone)
    if labels.max() < 0:
        raise FailedPrecondition(f"{request.particles_uri} has no particle in any class: there is nothing to average")
    rows = asked_rows(request, everyone)
    mine = slice(rows.start, rows.stop)
    chosen = everyone.part(rows.start, len(rows))
    sums = classification.class_sums(
        chosen.read,
        len(chosen),
        chosen.aligned(),
        labels[mine],
        int(labels.max()) + 1,
        Search(
            info.shape[0],
            info.voxel_size_angstrom,
            transfer=transfer_of(request, task, info),
            symmetry=request.symmetry,
        ),
        halves=halves[mine],
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    stored = StoredSums.of(sums, _about_sums(request, task, everyone, rows))
    return pb.SumClassesResult(sums_uri=task.write_bytes("sums.npz", pack(stored.to_arrays())), count=len(rows))


def _average_classes_needs(request: pb.AverageClassesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + (FSC_BYTES // 4) * reader.open_blob(request.sums_uris[0]).size_bytes)


@service.operation(needs=_average_classes_needs)
def average_classes(request: pb.AverageClassesRequest, task: Task) -> pb.AverageClassesResult:
    """Add up what shards found, and make the averages of it."""

    def parts() -> Iterator[tuple[StoredSums, str]]:
        for number, uri in enumerate(request.sums_uris):
            task.progress(0.3 * number / len(request.sums_uris), "adding up", shards=number)
            yield StoredSums.from_arrays(unpack(task.read_file(uri), uri), uri), uri

    total = add_up(parts())
    whole = total.whole()
    n, voxel_size = total.about.box_size, total.about.voxel_size_angstrom
    info = VolumeInfo((n, n, n), voxel_size, "dark" if total.about.contrast == "dark" else "light")
    edge = usual_edge_voxels(n)
    radius = (
        0.4 * n
        if not request.HasField("particle_diameter_angstrom")
        else (min(request.particle_diameter_angstrom / voxel_size / 2 + edge / 2, n / 2 - edge))
    )
    mask = soft_sphere(n, radius, edge)
    averages, half_maps = whole.averages(), whole.half_maps()
    uris = write_classes(task, averages, half_maps, info)
    result = pb.AverageClassesResult(
        sums_uri=task.write_bytes("sums.npz", pack(total.to_arrays())),
        sizes=total.counts.sum(axis=1).tolist(),
    )
    for field, values in zip(("average_uris", "half1_uris", "half2_uris"), uris, strict=True):
        getattr(result, field).extend(values)
    for k, (first, second) in enumerate(half_maps):
        task.progress(0.4 + 0.6 * k / len(half_maps), "resolution", classes=k)
        if total.counts[k].min() == 0:
            raise FailedPrecondition(f"class {k} has no particle in one of its half sets: dissolve it first")
        curves = corrected_fsc(first, second, mask, voxel_size)
        reached = curves.resolution_angstrom()
        figures = {
            "fsc": curves.corrected.tolist(),
            "resolution_angstrom": reached,
            "particles": int(total.counts[k].sum()),
        }
        result.fsc_uris.append(task.write_table(f"class{k}_fsc.json", fsc_table(curves) | figures))
        result.resolutions_angstrom.append(reached)
    return result
