"""FAML's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from cryofleet.numerics.fsc import corrected_fsc
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import faml, likelihood_model, sufficient_statistics
from services.alignment.align import Search, memory_bytes
from services.alignment.array_files import pack, unpack
from services.alignment.average import check_halves
from services.alignment.expectation import grid_bytes
from services.alignment.service.half_maps import fsc_table
from services.alignment.service.inputs import (
    BASE_BYTES,
    asked_rows,
    check_fits,
    choose,
    model_needs,
    optional,
    protein_sign,
    search_of,
    threads,
    transfer_bytes,
    transfer_of,
    with_poses,
)
from services.alignment.service.registry import service

_FAML_BYTES = 400

_FAML_CANDIDATES: Mapping[int, likelihood_model.Candidates] = {
    pb.FAML_CANDIDATES_MATCHING: "matching",
    pb.FAML_CANDIDATES_GRID: "grid",
    pb.FAML_CANDIDATES_AUTO: "auto",
}


def _read_state(reader: Reader, uri: str) -> faml.State:
    return faml.State.from_arrays(unpack(reader.read_file(uri), uri), uri)


def _faml_start_needs(request: pb.FamlStartRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    return Needs(BASE_BYTES + transfer_bytes(request, info))


@service.operation(needs=_faml_start_needs)
def faml_start(request: pb.FamlStartRequest, task: Task) -> pb.FamlStartResult:
    """Split particles into half sets and classes, and give them their first poses."""
    chosen = choose(request, task)
    info = chosen.subtomograms.info
    search = replace(search_of(request, info, transfer_of(request, task, info)), symmetry=request.symmetry)
    job = likelihood_model.Task(
        search,
        request.particle_diameter_angstrom,
        request.classes,
        _FAML_CANDIDATES[request.candidates],
        optional(request, "start_low_pass_angstrom"),
        request.joined_angstrom,
        request.similarity,
        request.seed,
    )
    halves = chosen.halves()
    if halves is not None:
        check_halves(halves + 1, len(chosen))
    state = faml.begin(job, len(chosen), chosen.poses() if chosen.own_table else None, halves)
    return pb.FamlStartResult(
        model_uri=task.write_bytes("model.npz", pack(state.to_arrays())),
        particles_uri=task.write_particles("particles.parquet", chosen.particles),
        count=len(chosen),
    )


def _faml_expect_needs(request: pb.FamlExpectRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    search = Search(info.shape[0], info.voxel_size_angstrom)
    state = _read_state(reader, request.model_uri)
    needed = memory_bytes(search, threads(), references=True) + _FAML_BYTES * threads() * info.shape[0] ** 3
    needed += (state.task.classes - 1) * threads() * faml.class_bytes(state.task)
    if state.model is not None:
        needed += grid_bytes(state.task, state.model, threads())
    return Needs(needed + 4 * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_faml_expect_needs)
def faml_expect(request: pb.FamlExpectRequest, task: Task) -> pb.FamlExpectResult:
    """The likely poses and classes of some particles, and the sums at them."""
    state = _read_state(task, request.model_uri)
    chosen = choose(request, task)
    info = check_fits(chosen, state.task.search.box_size, len(state), request.model_uri)
    rows = asked_rows(request, chosen)
    particles = faml.Particles(chosen.read, chosen.names, state.halves, float(protein_sign(info)))
    statistics, posterior = faml.sums_of(
        state, particles, rows, device=task.device, threads=task.threads, progress=task.progress
    )
    found = pack(faml.sums_to_arrays(state, rows.start, statistics, posterior))
    return pb.FamlExpectResult(statistics_uri=task.write_bytes("statistics.npz", found), count=len(rows))


@service.operation(needs=model_needs)
def faml_maximise(request: pb.FamlMaximiseRequest, task: Task) -> pb.FamlMaximiseResult:
    """Add up what the expectation found, and make the next model of it."""
    state = _read_state(task, request.model_uri)
    count = len(request.statistics_uris)
    total: sufficient_statistics.Statistics | None = None
    posteriors: list[sufficient_statistics.Posterior] = []
    reached = 0
    for number, uri in enumerate(request.statistics_uris):
        task.progress(0.6 * number / count, "adding up", shards=number)
        statistics, posterior = faml.read_sums(state, reached, unpack(task.read_file(uri), uri), uri)
        reached += len(posterior)
        total = statistics if total is None else total + statistics
        posteriors.append(posterior)
    assert total is not None
    state = faml.advance(state, total, sufficient_statistics.Posterior.together(posteriors))
    model = state.model
    assert model is not None
    return pb.FamlMaximiseResult(
        model_uri=task.write_bytes("model.npz", pack(state.to_arrays())),
        converged=model.converged,
        resolution_angstrom=model.history[-1].resolution_angstrom if model.history else 0.0,
        low_pass_angstrom=state.task.box_angstrom / model.k_max,
        class_sizes=model.responsibilities.sum(axis=0).tolist(),
    )


@service.operation(needs=model_needs)
def faml_finish(request: pb.FamlFinishRequest, task: Task) -> pb.FamlFinishResult:
    """The maps, poses, classes and resolution of a run."""
    state = _read_state(task, request.model_uri)
    chosen = choose(request, task)
    info = check_fits(chosen, state.task.search.box_size, len(state), request.model_uri)
    result = faml.finish(state, float(protein_sign(info)))
    whole = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)
    table = with_poses(chosen.particles, info, result.poses).with_columns(
        class_id=result.classes.astype(np.int32), half=(result.halves + 1).astype(np.int32)
    )
    mask = state.task.mask(info.shape[0])
    joined = state.task.box_angstrom / state.task.k_joined
    finished = pb.FamlFinishResult(
        joined_angstrom=joined,
        particles_uri=task.write_particles("particles.parquet", table),
        class_sizes=np.bincount(result.classes, minlength=state.task.classes).tolist(),
        history_uri=task.write_table("history.json", {"iterations": [asdict(h) for h in result.model.history]}),
        converged=result.model.converged,
        count=len(chosen),
    )
    for k, (average, (first, second)) in enumerate(zip(result.volumes, result.half_volumes, strict=True)):
        task.progress(0.1 + 0.9 * k / state.task.classes, "resolution", classes=k)
        curves = corrected_fsc(first, second, mask, info.voxel_size_angstrom)
        members = table.select(np.flatnonzero(result.classes == k))
        name = f"class{k + 1}"
        finished.average_uris.append(task.write_volume(f"{name}.mrc", average, whole))
        finished.half1_uris.append(task.write_volume(f"{name}_half1.mrc", first, whole))
        finished.half2_uris.append(task.write_volume(f"{name}_half2.mrc", second, whole))
        finished.class_particles_uris.append(task.write_particles(f"{name}.parquet", members))
        reached = curves.resolution_angstrom()
        figures: dict[str, object] = {
            "fsc": curves.corrected.tolist(),
            "resolution_angstrom": reached,
            "halves_joined_below_angstrom": joined,
            "particles": len(members),
        }
        if not result.model.power[k].any():
            figures["remark"] = "the average holds nothing beyond its noise, and is zero"
        elif reached >= 0.9 * joined:
            figures["remark"] = (
                f"the halves were aligned to one average up to {joined:.1f} Å: that they agree so far says little"
            )
        finished.fsc_uris.append(task.write_table(f"{name}_fsc.json", fsc_table(curves) | figures))
        finished.resolutions_angstrom.append(reached)
    return finished
