"""Average, whole and in steps that many tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import helical
from services.alignment.align import Search, memory_bytes
from services.alignment.array_files import pack, unpack
from services.alignment.average import Averaged, begin, finish
from services.alignment.average import average as average_particles
from services.alignment.average_expectation import expect
from services.alignment.average_model import Helix, Job, Mask, MaskKind, Model, Options, Statistics
from services.alignment.average_update import update
from services.alignment.rejection import Rejection
from services.alignment.service.inputs import (
    FSC_BYTES,
    Averaging,
    Chosen,
    asked_rows,
    check_fits,
    choose,
    model_needs,
    optional,
    protein_sign,
    read_mask,
    read_reference,
    search_of,
    threads,
    transfer_bytes,
    transfer_of,
    with_poses,
)
from services.alignment.service.registry import service


def _average_needs(request: Averaging, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    needed = memory_bytes(search_of(request, info), threads(), references=True) + FSC_BYTES * info.shape[0] ** 3
    return Needs(needed + transfer_bytes(request, info))


_AVERAGE_MASKS: Mapping[int, MaskKind] = {
    pb.AVERAGE_MASK_SPHERE: "sphere",
    pb.AVERAGE_MASK_CYLINDER: "cylinder",
    pb.AVERAGE_MASK_AUTO: "auto",
}


def _averaging_options(request: Averaging) -> Options:
    kind = "given" if request.mask_uri else _AVERAGE_MASKS[request.mask]
    helix = None
    if request.HasField("helix_rise_angstrom"):
        symmetry = helical.HelicalSymmetry(
            request.helix_rise_angstrom, request.helix_twist_degrees, request.helix_order
        )
        helix = Helix(symmetry, request.refine_helix, optional(request, "helix_radius_angstrom"))
    return Options(
        start_low_pass_angstrom=optional(request, "start_low_pass_angstrom"),
        mask=Mask(kind, optional(request, "mask_radius_angstrom"), optional(request, "mask_height_angstrom")),
        helix=helix,
        rejection=Rejection(
            request.reject_share,
            optional(request, "reject_score_deviations"),
            optional(request, "reject_signal_deviations"),
        ),
        b_factor_angstrom2=optional(request, "b_factor_angstrom2"),
        sharpen_from_angstrom=optional(request, "sharpen_from_angstrom"),
    )


def _kept_halves(chosen: Chosen) -> NDArray[np.int64] | None:
    """The half sets 1 and 2 that particles are in already."""
    halves = chosen.halves()
    return None if halves is None else halves + 1


def _write_average(task: Task, particles: Particles, info: VolumeInfo, result: Averaged) -> pb.AverageResult:
    whole = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)
    table = with_poses(particles, info, result.poses).with_columns(half=result.halves)
    names = np.asarray(particles.table["id"].to_numpy(), dtype=np.int64)
    return pb.AverageResult(
        average_uri=task.write_volume("average.mrc", result.average, whole),
        half1_uri=task.write_volume("half1.mrc", result.half_maps[0], whole),
        half2_uri=task.write_volume("half2.mrc", result.half_maps[1], whole),
        particles_uri=task.write_particles("particles.parquet", table.select(result.kept)),
        fsc_uri=task.write_table("fsc.json", result.table(names)),
        resolution_angstrom=result.resolution_angstrom,
        count=int(result.kept.sum()),
        rejected_uri=task.write_particles("rejected.parquet", table.select(~result.kept)),
        rejected=int((~result.kept).sum()),
        iterations=len(result.iterations),
        converged=result.converged,
        rise_angstrom=None if result.helix is None else result.helix.rise_angstrom,
        twist_degrees=None if result.helix is None else result.helix.twist_degrees,
    )


@service.operation(needs=_average_needs)
def average(request: pb.AverageRequest, task: Task) -> pb.AverageResult:
    """Align and average subtomograms over and over, in two half sets."""
    chosen = choose(request, task)
    info = chosen.subtomograms.info
    saved = task.load_checkpoint()
    result = average_particles(
        chosen.read,
        len(chosen),
        search_of(request, info, transfer_of(request, task, info)),
        iterations=request.iterations,
        symmetry=request.symmetry,
        contrast=info.contrast,
        start=chosen.poses() if chosen.own_table else None,
        reference=read_reference(task, request.reference_uri, info) if request.reference_uri else None,
        mask=read_mask(task, request.mask_uri, info) if request.mask_uri else None,
        halves=_kept_halves(chosen),
        seed=request.seed,
        options=_averaging_options(request),
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
        checkpoint=lambda model: task.save_checkpoint({"model.npz": pack(model.to_arrays())}),
        resume=None if saved is None else Model.from_arrays(unpack(saved["model.npz"], "the checkpoint")),
    )
    return _write_average(task, chosen.particles, info, result)


def _read_model(task: Task, uri: str) -> Model:
    return Model.from_arrays(unpack(task.read_file(uri), uri), uri)


@service.operation(needs=_average_needs)
def average_start(request: pb.AverageStartRequest, task: Task) -> pb.AverageStartResult:
    """Split particles into half sets, and find a first reference where none is given."""
    chosen = choose(request, task)
    info = chosen.subtomograms.info
    job = Job(
        search_of(request, info), request.symmetry, float(protein_sign(info)), request.seed, _averaging_options(request)
    )
    model = begin(
        job,
        len(chosen),
        chosen.read,
        transfer=transfer_of(request, task, info),
        poses=chosen.poses() if chosen.own_table else None,
        reference=read_reference(task, request.reference_uri, info) if request.reference_uri else None,
        mask=read_mask(task, request.mask_uri, info) if request.mask_uri else None,
        halves=_kept_halves(chosen),
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    return pb.AverageStartResult(
        model_uri=task.write_bytes("model.npz", pack(model.to_arrays())),
        particles_uri=task.write_particles("particles.parquet", chosen.particles),
        count=len(chosen),
    )


def _expect_needs(request: pb.AverageExpectRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    search = Search(info.shape[0], info.voxel_size_angstrom)
    needed = memory_bytes(search, threads(), references=True) + FSC_BYTES * info.shape[0] ** 3
    return Needs(needed + 3 * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_expect_needs)
def average_expect(request: pb.AverageExpectRequest, task: Task) -> pb.AverageExpectResult:
    """Align some particles, each to the average of all others, and sum them at their new poses."""
    model = _read_model(task, request.model_uri)
    chosen = choose(request, task)
    check_fits(chosen, model.job.search.box_size, len(model), request.model_uri)
    rows = asked_rows(request, chosen)
    found = expect(
        model,
        chosen.read,
        chosen.names,
        rows,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    return pb.AverageExpectResult(
        statistics_uri=task.write_bytes("statistics.npz", pack(found.to_arrays())),
        count=len(rows),
        mean_score=float(found.scores.mean()),
    )


@service.operation(needs=model_needs)
def average_update(request: pb.AverageUpdateRequest, task: Task) -> pb.AverageUpdateResult:
    """Add up what the expectation found, and make the next model of it."""
    before = _read_model(task, request.model_uri)
    components, count = len(before.job.band()), len(request.statistics_uris)

    def statistics() -> Iterator[Statistics]:
        for number, uri in enumerate(request.statistics_uris):
            task.progress(0.6 * number / count, "adding up", shards=number)
            yield Statistics.from_arrays(unpack(task.read_file(uri), uri), components, uri)

    model = update(before, statistics())
    last = model.history[-1] if model.history else None
    return pb.AverageUpdateResult(
        model_uri=task.write_bytes("model.npz", pack(model.to_arrays())),
        converged=model.converged,
        mean_score=float(model.scores.mean()),
        resolution_angstrom=0.0 if last is None else last.resolution_angstrom,
        low_pass_angstrom=model.job.box_angstrom / model.k_max,
        rejected=int((model.leaving != 0).sum()),
    )


@service.operation(needs=model_needs)
def average_finish(request: pb.AverageFinishRequest, task: Task) -> pb.AverageResult:
    """The maps, poses and resolution of an averaging."""
    model = _read_model(task, request.model_uri)
    chosen = choose(request, task)
    info = check_fits(chosen, model.job.search.box_size, len(model), request.model_uri)
    if model.iteration < 0:
        raise FailedPrecondition(f"{request.model_uri} is the start of an averaging: nothing was averaged yet")
    return _write_average(task, chosen.particles, info, finish(model))
