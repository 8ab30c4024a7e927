"""The alignment service: turns requests into calls of the methods, and what they give into artifacts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from google.protobuf.message import Message
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import read_tilt_series
from cryofleet.numerics import transfer
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD, CorrectedFsc, corrected_fsc, fsc
from cryofleet.numerics.fsc import resolution as resolution_of
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_cylinder, soft_dilation, soft_ellipsoid, soft_sphere, usual_edge_voxels
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.settings import Settings
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.v1 import common_pb2
from cryofleet.volumes import Subtomograms, VolumeInfo
from services.alignment import classify as classification
from services.alignment import distinct as merging
from services.alignment import (
    faml,
    helical,
    likelihood_model,
    settling,
    sharpening,
    signal_to_noise,
    sufficient_statistics,
    symmetry_detection,
)
from services.alignment import local_resolution as local
from services.alignment.align import Poses, Search, memory_bytes
from services.alignment.align import align as align_particles
from services.alignment.array_files import pack, unpack
from services.alignment.auto_mask import auto_mask
from services.alignment.average import Averaged, begin, check_halves, finish
from services.alignment.average import average as average_particles
from services.alignment.average_expectation import expect
from services.alignment.average_model import Helix, Job, Mask, MaskKind, Model, Options, Statistics
from services.alignment.average_update import update
from services.alignment.expectation import grid_bytes
from services.alignment.rejection import Rejection
from services.alignment.stored_sums import About, StoredSums, add_up

service = Service(pb.DESCRIPTOR.services_by_name["AlignmentService"])

Array = NDArray[np.float32]

VOXEL_SIZE_TOLERANCE = 0.01
"""Reference and particles may differ so much in voxel size; over a box it is less than the alignment can see."""

_Averaging = pb.AverageRequest | pb.AverageStartRequest
_Searching = pb.AlignRequest | _Averaging | pb.FamlStartRequest | pb.ClassifyRequest | pb.ReassignRequest
_Imaged = _Searching | pb.EstimateSnrRequest | pb.SumClassesRequest

# Memory, measured at boxes of 64 to 128 voxels and rounded up: bytes for each voxel of a box, and what any takes.
_BASE_BYTES = 96 << 20
_WEDGE_BYTES = 24
_TILT_BYTES = 60
_FSC_BYTES = 120
_LOCAL_BYTES = 80
_SYMMETRY_BYTES = 200
_HELIX_BYTES = 300
_MASK_BYTES = 80
_PAIR_BYTES = 100
_CLASS_BYTES = 120
_FAML_BYTES = 400

_CTF_CORRECTIONS: Mapping[int, transfer.CtfCorrection] = {
    common_pb2.CTF_CORRECTION_NONE: "none",
    common_pb2.CTF_CORRECTION_PHASE_FLIP: "phase_flip",
    common_pb2.CTF_CORRECTION_WIENER: "wiener",
}


def _optional(request: Message, name: str) -> float | None:
    """A number that the request may have; None where it was left out, or where its kind has no such field."""
    if name not in request.DESCRIPTOR.fields_by_name or not request.HasField(name):
        return None
    return float(getattr(request, name))


# --- What requests point to ----------------------------------------------------------------------------------------


def _transfer(request: _Imaged, task: Task, info: VolumeInfo) -> Array | None:
    """What imaging left of the boxes' components, on the half grid: by a volume or a tilt series that the request
    gives, else by the boxes' tilt range; None where nothing is missing.
    """
    n = info.shape[0]
    if request.wedge_uri:
        volume = task.open_volume(request.wedge_uri)
        if volume.info.count is not None or volume.info.shape != info.shape:
            raise InvalidArgument(
                f"the wedge mask {request.wedge_uri} is {volume.info.array_shape} voxels, the boxes {info.shape}: one "
                "volume of their size, zero frequency at voxel n // 2, is needed"
            )
        return transfer.centred_transfer(volume.read(), f"the wedge mask {request.wedge_uri}")
    if request.tilts_uri:
        series = read_tilt_series(task.read_file(request.tilts_uri), request.tilts_uri)
        known = series.defocus_um is not None and series.voltage_kv is not None
        return transfer.tilt_series_transfer(
            series,
            n,
            info.voxel_size_angstrom,
            ctf_correction=_CTF_CORRECTIONS[request.ctf_correction],
            use_ctf=request.weight_by_ctf if request.HasField("weight_by_ctf") else known,
            use_dose=request.weight_by_dose,
        )
    if info.tilt_min_degrees <= -90 and info.tilt_max_degrees >= 90:
        return None
    return transfer.wedge_transfer(n, info.tilt_min_degrees, info.tilt_max_degrees)


def _search(request: _Searching, info: VolumeInfo, imaged: Array | None = None) -> Search:
    return Search(
        box_size=info.shape[0],
        voxel_size_angstrom=info.voxel_size_angstrom,
        transfer=imaged,
        low_pass_angstrom=_optional(request, "low_pass_angstrom"),
        high_pass_angstrom=_optional(request, "high_pass_angstrom"),
        max_candidates=request.max_candidates,
        max_shift_voxels=_optional(request, "max_shift_voxels"),
        max_angle_degrees=_optional(request, "max_angle_degrees"),
        symmetry=request.symmetry if isinstance(request, pb.AlignRequest | pb.ReassignRequest) else "C1",
    )


def _reference(task: Task, uri: str, boxes: VolumeInfo) -> Array:
    """The reference, in the contrast of the particles."""
    volume = task.open_volume(uri)
    if volume.info.count is not None:
        raise InvalidArgument(f"{uri} is a stack of {volume.info.count} boxes; a reference is a single volume")
    if volume.info.shape != boxes.shape:
        raise InvalidArgument(f"reference {uri} is {volume.info.shape} voxels, the boxes {boxes.shape}: crop or pad it")
    ratio = volume.info.voxel_size_angstrom / boxes.voxel_size_angstrom
    if abs(ratio - 1) > VOXEL_SIZE_TOLERANCE:
        raise InvalidArgument(
            f"reference {uri} has voxels of {volume.info.voxel_size_angstrom:g} Å, the subtomograms of "
            f"{boxes.voxel_size_angstrom:g} Å: resample it"
        )
    data = volume.read()
    _check_density(data, f"reference {uri}")
    return data if volume.info.contrast == boxes.contrast else -data


def _check_density(data: Array, name: str) -> None:
    if not np.isfinite(data).all():
        raise InvalidArgument(f"{name} holds values that are not finite (NaN or infinity)")
    if data.min() == data.max():
        raise InvalidArgument(f"{name} is constant: there is nothing in it")


def _cube(task: Task, uri: str, like: VolumeInfo | None = None) -> tuple[Array, VolumeInfo]:
    """A single cubic volume, of the box and voxel size of another where one is given."""
    volume = task.open_volume(uri)
    info = volume.info
    if info.count is not None or len(set(info.shape)) != 1:
        raise InvalidArgument(f"{uri} is {info.array_shape} voxels; a single cubic volume is needed")
    if like is not None:
        ratio = info.voxel_size_angstrom / like.voxel_size_angstrom
        if info.shape != like.shape or abs(ratio - 1) > VOXEL_SIZE_TOLERANCE:
            raise InvalidArgument(
                f"{uri} is {info.shape} voxels of {info.voxel_size_angstrom:g} Å; {like.shape} voxels of "
                f"{like.voxel_size_angstrom:g} Å are expected"
            )
    return volume.read(), VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)


def _density(task: Task, uri: str, like: VolumeInfo | None = None) -> tuple[Array, VolumeInfo]:
    """A cubic volume as it is, finite and not constant."""
    data, info = _cube(task, uri, like)
    _check_density(data, uri)
    return data, info


def _mask(task: Task, uri: str, info: VolumeInfo) -> Array:
    """A mask of the same box; a sphere of 0.8 of its diameter where no URI is given."""
    if not uri:
        n = info.shape[0]
        return soft_sphere(n, 0.4 * n, usual_edge_voxels(n))
    mask = _cube(task, uri, info)[0]
    # Written so that NaN is refused too.
    if not (mask.min() >= 0 and mask.max() <= 1 + 1e-6):
        raise InvalidArgument(f"the mask {uri} holds values outside 0 to 1")
    if not mask.any():
        raise InvalidArgument(f"the mask {uri} is zero everywhere")
    return mask


def _sign(info: VolumeInfo) -> np.float32:
    """Of protein."""
    return np.float32(-1 if info.contrast == "dark" else 1)


def _with_poses(particles: Particles, boxes: VolumeInfo, poses: Poses) -> Particles:
    """The particles' table with new poses; shifts in voxels of its tomogram, from the voxel at the box's centre."""
    shifts = poses.shifts * (boxes.voxel_size_angstrom / particles.voxel_size_angstrom)
    return particles.with_rotations(poses.rotations).with_columns(
        shift_x=shifts[:, 0], shift_y=shifts[:, 1], shift_z=shifts[:, 2], score=poses.scores
    )


def _threads() -> int:
    return Settings.from_environment().threads


@dataclass(frozen=True)
class _Chosen:
    """Subtomograms that were chosen: their `rows` in the set, their `particles` as the set has them, and as the
    request's own table, where it gives one, has them (`given`).
    """

    subtomograms: Subtomograms
    rows: NDArray[np.int64]
    particles: Particles
    given: Particles
    own_table: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> NDArray[np.int64]:
        return np.asarray(self.particles.table["id"].to_numpy(), dtype=np.int64)

    def read(self, first: int, count: int) -> Array:
        """Boxes of rows `first` to `first + count` of the chosen, neighbours in one read."""
        return _rows_of(self.subtomograms, self.rows, first, count)

    def part(self, first: int, count: int) -> _Chosen:
        cut = slice(first, first + count)
        return _Chosen(
            self.subtomograms, self.rows[cut], self.particles.select(cut), self.given.select(cut), self.own_table
        )

    def poses(self) -> Poses | None:
        """Where they have any; shifts in voxels of the boxes."""
        rotations = self.given.rotations()
        if rotations is None:
            return None
        shifts = self.given.shifts() * (self.given.voxel_size_angstrom / self.subtomograms.info.voxel_size_angstrom)
        return Poses(rotations, shifts, np.zeros(len(self)))

    def aligned(self) -> Poses:
        """Their poses. Raises FailedPrecondition where they have none."""
        poses = self.poses()
        if poses is None:
            raise FailedPrecondition(f"{self.given.source} holds no rotations: align the subtomograms first")
        return poses

    def halves(self) -> NDArray[np.int64] | None:
        """Half set 0 or 1 of each; None where they are in none. Raises InvalidArgument where only some are in one."""
        if "half" not in self.given.table or not self.given.table["half"].to_numpy().any():
            return None
        halves = self.given.table["half"].to_numpy(dtype=np.int64) - 1
        for i in np.flatnonzero(~np.isin(halves, (0, 1)))[:1]:
            raise InvalidArgument(
                f"particle {self.names[i]} of {self.given.source} has half {halves[i] + 1}, others are in half sets: "
                "give each 1 or 2, or leave the column out"
            )
        return halves


def _chosen(
    request: _Imaged
    | pb.AverageExpectRequest
    | pb.AverageFinishRequest
    | pb.FamlExpectRequest
    | pb.FamlFinishRequest
    | pb.DivideParticlesRequest,
    task: Task,
) -> _Chosen:
    """The subtomograms that the request's particles name, all where it names none."""
    subtomograms = task.open_subtomograms(request.subtomograms_uri)
    particles = subtomograms.particles()
    if subtomograms.count == 0:
        raise FailedPrecondition(f"{request.subtomograms_uri} holds no subtomogram")
    if not request.particles_uri:
        return _Chosen(subtomograms, np.arange(len(particles)), particles, particles, False)
    given = task.read_particles(request.particles_uri)
    if len(given) == 0:
        raise FailedPrecondition(f"{request.particles_uri} holds no particle")
    row_of = {int(name): row for row, name in enumerate(particles.table["id"])}
    ids = [int(name) for name in given.table["id"]]
    for name in ids:
        if name not in row_of:
            raise InvalidArgument(
                f"particle {name} of {request.particles_uri} has no subtomogram in {request.subtomograms_uri}"
            )
    if len(set(ids)) < len(ids):
        raise InvalidArgument(f"{request.particles_uri} holds a particle more than once: each id must be there once")
    rows = np.array([row_of[name] for name in ids], dtype=np.int64)
    return _Chosen(subtomograms, rows, particles.select(rows), given, True)


def _asked(
    request: pb.AlignRequest
    | pb.ReassignRequest
    | pb.SumClassesRequest
    | pb.AverageExpectRequest
    | pb.FamlExpectRequest,
    chosen: _Chosen,
) -> range:
    """The rows of them that the request asks for."""
    if not request.HasField("rows"):
        return range(len(chosen))
    first, count = request.rows.first, request.rows.count
    if first + count > len(chosen):
        raise InvalidArgument(
            f"rows {first} to {first + count - 1} were asked for, but "
            f"{request.particles_uri or request.subtomograms_uri} has {len(chosen)}"
        )
    return range(first, first + count)


def _of_rows(request: pb.AlignRequest | pb.ReassignRequest, chosen: _Chosen) -> _Chosen:
    """The shard of them that the request asks for."""
    rows = _asked(request, chosen)
    return chosen if len(rows) == len(chosen) else chosen.part(rows.start, len(rows))


def _start(request: pb.AlignRequest | pb.ReassignRequest, poses: Poses | None) -> Poses | None:
    if poses is None and request.HasField("max_angle_degrees"):
        raise FailedPrecondition(
            "max_angle_degrees counts from the poses that particles start from: give a particles_uri with rotations"
        )
    return poses


def _rows_of(subtomograms: Subtomograms, rows: NDArray[np.int64], first: int, count: int) -> Array:
    """Boxes of `rows[first : first + count]`, neighbours in one read."""
    wanted = rows[first : first + count]
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    return np.concatenate([subtomograms.read(int(run[0]), len(run)) for run in np.split(wanted, breaks)])


# --- Aligning and averaging ----------------------------------------------------------------------------------------


def _transfer_bytes(request: _Imaged, info: VolumeInfo) -> int:
    """What making the transfer function takes at most."""
    return (_TILT_BYTES if request.tilts_uri else _WEDGE_BYTES) * info.shape[0] ** 3


def _align_needs(request: pb.AlignRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    search = _search(request, info)
    if search.low_pass_angstrom is None:
        # The reference decides how far the band reaches, up to the Nyquist limit.
        search = replace(search, low_pass_angstrom=2 * info.voxel_size_angstrom)
    return Needs(memory_bytes(search, _threads()) + _transfer_bytes(request, info))


def _of_reference(task: Task, uri: str) -> Array | None:
    """What imaging left of a reference that says its tilt range, as a single subtomogram does; None where whole."""
    info = task.open_volume(uri).info
    if info.tilt_min_degrees <= -90 and info.tilt_max_degrees >= 90:
        return None
    return transfer.wedge_transfer(info.shape[0], info.tilt_min_degrees, info.tilt_max_degrees)


@service.operation(needs=_align_needs)
def align(request: pb.AlignRequest, task: Task) -> pb.AlignResult:
    """Find the rotation and shift of each subtomogram against one reference."""
    chosen = _of_rows(request, _chosen(request, task))
    info = chosen.subtomograms.info
    start = _start(request, chosen.poses() if chosen.own_table else None)
    reference = _reference(task, request.reference_uri, info)
    search = _search(request, info, _transfer(request, task, info))
    poses = align_particles(
        chosen.read,
        len(chosen),
        reference,
        replace(search, reference_transfer=_of_reference(task, request.reference_uri)),
        start=start,
        mask=_mask(task, request.mask_uri, info) if request.mask_uri else None,
        names=chosen.names,
        device=task.device,
        threads=task.threads,
        progress=task.progress,
    )
    return pb.AlignResult(
        particles_uri=task.write_particles("particles.parquet", _with_poses(chosen.particles, info, poses)),
        count=len(chosen),
        mean_score=float(poses.scores.mean()),
    )


def _average_needs(request: _Averaging, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    needed = memory_bytes(_search(request, info), _threads(), references=True) + _FSC_BYTES * info.shape[0] ** 3
    return Needs(needed + _transfer_bytes(request, info))


_AVERAGE_MASKS: Mapping[int, MaskKind] = {
    pb.AVERAGE_MASK_SPHERE: "sphere",
    pb.AVERAGE_MASK_CYLINDER: "cylinder",
    pb.AVERAGE_MASK_AUTO: "auto",
}


def _averaging_options(request: _Averaging) -> Options:
    kind = "given" if request.mask_uri else _AVERAGE_MASKS[request.mask]
    helix = None
    if request.HasField("helix_rise_angstrom"):
        symmetry = helical.HelicalSymmetry(
            request.helix_rise_angstrom, request.helix_twist_degrees, request.helix_order
        )
        helix = Helix(symmetry, request.refine_helix, _optional(request, "helix_radius_angstrom"))
    return Options(
        start_low_pass_angstrom=_optional(request, "start_low_pass_angstrom"),
        mask=Mask(kind, _optional(request, "mask_radius_angstrom"), _optional(request, "mask_height_angstrom")),
        helix=helix,
        rejection=Rejection(
            request.reject_share,
            _optional(request, "reject_score_deviations"),
            _optional(request, "reject_signal_deviations"),
        ),
        b_factor_angstrom2=_optional(request, "b_factor_angstrom2"),
        sharpen_from_angstrom=_optional(request, "sharpen_from_angstrom"),
    )


def _kept_halves(chosen: _Chosen) -> NDArray[np.int64] | None:
    """The half sets 1 and 2 that particles are in already."""
    halves = chosen.halves()
    return None if halves is None else halves + 1


def _write_average(task: Task, particles: Particles, info: VolumeInfo, result: Averaged) -> pb.AverageResult:
    whole = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)
    table = _with_poses(particles, info, result.poses).with_columns(half=result.halves)
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
    chosen = _chosen(request, task)
    info = chosen.subtomograms.info
    saved = task.load_checkpoint()
    result = average_particles(
        chosen.read,
        len(chosen),
        _search(request, info, _transfer(request, task, info)),
        iterations=request.iterations,
        symmetry=request.symmetry,
        contrast=info.contrast,
        start=chosen.poses() if chosen.own_table else None,
        reference=_reference(task, request.reference_uri, info) if request.reference_uri else None,
        mask=_mask(task, request.mask_uri, info) if request.mask_uri else None,
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


# --- Averaging in many tasks ---------------------------------------------------------------------------------------


def _read_model(task: Task, uri: str) -> Model:
    return Model.from_arrays(unpack(task.read_file(uri), uri), uri)


def _fit(model: Model, chosen: _Chosen, uri: str) -> VolumeInfo:
    """The boxes' properties, which must be those of the model. Raises InvalidArgument where they are not."""
    info = chosen.subtomograms.info
    n = model.job.search.box_size
    if info.shape != (n,) * 3 or len(model) != len(chosen):
        raise InvalidArgument(
            f"{uri} is of {len(model)} particles in boxes of {n} voxels; these are {len(chosen)} of {info.shape[0]}"
        )
    return info


@service.operation(needs=_average_needs)
def average_start(request: pb.AverageStartRequest, task: Task) -> pb.AverageStartResult:
    """Split particles into half sets, and find a first reference where none is given."""
    chosen = _chosen(request, task)
    info = chosen.subtomograms.info
    job = Job(_search(request, info), request.symmetry, float(_sign(info)), request.seed, _averaging_options(request))
    model = begin(
        job,
        len(chosen),
        chosen.read,
        transfer=_transfer(request, task, info),
        poses=chosen.poses() if chosen.own_table else None,
        reference=_reference(task, request.reference_uri, info) if request.reference_uri else None,
        mask=_mask(task, request.mask_uri, info) if request.mask_uri else None,
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
    needed = memory_bytes(search, _threads(), references=True) + _FSC_BYTES * info.shape[0] ** 3
    return Needs(needed + 3 * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_expect_needs)
def average_expect(request: pb.AverageExpectRequest, task: Task) -> pb.AverageExpectResult:
    """Align some particles, each to the average of all others, and sum them at their new poses."""
    model = _read_model(task, request.model_uri)
    chosen = _chosen(request, task)
    _fit(model, chosen, request.model_uri)
    rows = _asked(request, chosen)
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


def _model_needs(request: pb.AverageUpdateRequest | pb.AverageFinishRequest, reader: Reader) -> Needs:
    # A model is at least the sums, some four bytes a voxel, and what is made of them takes _FSC_BYTES.
    return Needs(_BASE_BYTES + (_FSC_BYTES // 2) * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_model_needs)
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


@service.operation(needs=_model_needs)
def average_finish(request: pb.AverageFinishRequest, task: Task) -> pb.AverageResult:
    """The maps, poses and resolution of an averaging."""
    model = _read_model(task, request.model_uri)
    chosen = _chosen(request, task)
    info = _fit(model, chosen, request.model_uri)
    if model.iteration < 0:
        raise FailedPrecondition(f"{request.model_uri} is the start of an averaging: nothing was averaged yet")
    return _write_average(task, chosen.particles, info, finish(model))


# --- What half maps say --------------------------------------------------------------------------------------------

_Halves = pb.ResolutionRequest | pb.LocalResolutionRequest | pb.DetectSymmetryRequest | pb.SharpenRequest
TRUTH_THRESHOLD = 0.5


def _halves(task: Task, request: _Halves | pb.EstimateSnrRequest) -> tuple[Array, Array, VolumeInfo]:
    """The half maps with protein positive, and the first one's header."""
    first, info = _density(task, request.half1_uri)
    second, other = _density(task, request.half2_uri, info)
    if other.contrast != info.contrast:
        raise InvalidArgument(
            f"{request.half1_uri} is {info.contrast} and {request.half2_uri} {other.contrast}: both must be of one "
            "contrast"
        )
    return _sign(info) * first, _sign(info) * second, info


def _maps_needs(bytes_per_voxel: int) -> Callable[[_Halves, Reader], Needs]:
    def needs(request: _Halves, reader: Reader) -> Needs:
        return Needs(_BASE_BYTES + bytes_per_voxel * math.prod(reader.open_volume(request.half1_uri).info.shape))

    return needs


def _number(value: float) -> float | None:
    """As JSON has it, which knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _curves(curves: CorrectedFsc) -> dict[str, object]:
    return {
        "frequency_per_angstrom": (curves.frequency / curves.voxel_size_angstrom).tolist(),
        "unmasked": curves.unmasked.tolist(),
        "masked": curves.masked.tolist(),
        "randomised": curves.randomised.tolist(),
        "corrected": curves.corrected.tolist(),
        "randomised_from_angstrom": curves.randomised_from_angstrom,
        "spectral_snr": _numbers(signal_to_noise.spectral_snr_of_average(curves.corrected)),
        "threshold": HALF_MAP_THRESHOLD,
    }


@service.operation(needs=_maps_needs(_FSC_BYTES))
def resolution(request: pb.ResolutionRequest, task: Task) -> pb.ResolutionResult:
    """The FSC of half maps, corrected for the mask, and what it says."""
    first, second, info = _halves(task, request)
    voxel = info.voxel_size_angstrom
    mean = (first + second) * np.float32(0.5)
    if not request.mask_uri and request.mask_source == pb.MASK_SOURCE_AUTO:
        mask = auto_mask(mean, voxel).mask
    else:
        mask = _mask(task, request.mask_uri, info)
    start = _optional(request, "randomise_from_angstrom")
    curves = corrected_fsc(first, second, mask, voxel, randomise_from_angstrom=start, seed=request.seed)
    table = _curves(curves)
    result = pb.ResolutionResult(
        resolution_angstrom=curves.resolution_angstrom(),
        masked_resolution_angstrom=resolution_of(curves.frequency, curves.masked, voxel),
        unmasked_resolution_angstrom=resolution_of(curves.frequency, curves.unmasked, voxel),
    )
    if request.truth_uri:
        truth, other = _density(task, request.truth_uri, info)
        against = fsc(mean, _sign(other) * truth, mask)[1]
        table |= {"truth": against.tolist(), "truth_threshold": TRUTH_THRESHOLD}
        result.truth_resolution_angstrom = resolution_of(curves.frequency, against, voxel, TRUTH_THRESHOLD)
    result.fsc_uri = task.write_table("fsc.json", table)
    result.mask_uri = task.write_volume("mask.mrc", mask, info)
    return result


@service.operation(needs=_maps_needs(_LOCAL_BYTES))
def local_resolution(request: pb.LocalResolutionRequest, task: Task) -> pb.LocalResolutionResult:
    """The resolution around each voxel, and the average filtered by it."""
    first, second, info = _halves(task, request)
    voxel = info.voxel_size_angstrom
    mask = _mask(task, request.mask_uri, info)
    found = local.local_resolution(
        first,
        second,
        voxel,
        threshold=request.threshold,
        window_wavelengths=request.window_wavelengths,
        workers=task.threads,
        progress=part(task.progress, 0.0, 0.7 if request.filter else 1.0),
    )
    finest, median, coarsest = found.quantiles(mask)
    filtered_uri = ""
    if request.filter:
        filtered = local.filter_locally(
            _sign(info) * np.float32(0.5) * (first + second),
            found.resolution_angstrom,
            voxel,
            workers=task.threads,
            progress=part(task.progress, 0.7, 1.0),
        )
        filtered_uri = task.write_volume("filtered.mrc", filtered, info)
    return pb.LocalResolutionResult(
        resolution_uri=task.write_volume("resolution.mrc", found.resolution_angstrom, info),
        filtered_uri=filtered_uri,
        finest_angstrom=finest,
        median_angstrom=median,
        coarsest_angstrom=coarsest,
    )


@service.operation(needs=_maps_needs(_FSC_BYTES))
def sharpen(request: pb.SharpenRequest, task: Task) -> pb.SharpenResult:
    """Sharpen the average of half maps, as far as their FSC bears it out."""
    first, second, info = _halves(task, request)
    voxel = info.voxel_size_angstrom
    curves = corrected_fsc(first, second, _mask(task, request.mask_uri, info), voxel, seed=request.seed)
    reached = _optional(request, "resolution_angstrom") or curves.resolution_angstrom()
    result = sharpening.sharpen(
        _sign(info) * np.float32(0.5) * (first + second),
        voxel,
        reached,
        b_factor_angstrom2=_optional(request, "b_factor_angstrom2"),
        fit_from_angstrom=_optional(request, "fit_from_angstrom"),
        fsc=curves.corrected,
        workers=task.threads,
    )
    guinier_uri = ""
    if result.fit is not None:
        guinier_uri = task.write_table(
            "guinier.json",
            {
                "inverse_square_angstrom": result.fit.inverse_square_angstrom.tolist(),
                "log_amplitude": result.fit.log_amplitude.tolist(),
                "intercept": result.fit.intercept,
                "b_factor_angstrom2": result.fit.b_factor_angstrom2,
                "standard_error_angstrom2": result.fit.standard_error_angstrom2,
            },
        )
    return pb.SharpenResult(
        sharpened_uri=task.write_volume("sharpened.mrc", result.volume, info),
        b_factor_angstrom2=result.b_factor_angstrom2,
        resolution_angstrom=reached,
        guinier_uri=guinier_uri,
    )


def _snr_needs(request: pb.EstimateSnrRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    needed = signal_to_noise.memory_bytes(info.shape[0]) + _transfer_bytes(request, info)
    return Needs(_BASE_BYTES + needed + (_FSC_BYTES * math.prod(info.shape) if request.half1_uri else 0))


@service.operation(needs=_snr_needs)
def estimate_snr(request: pb.EstimateSnrRequest, task: Task) -> pb.EstimateSnrResult:
    """The SNR of aligned subtomograms by pairs, and that of their average by shells."""
    chosen = _chosen(request, task)
    info = chosen.subtomograms.info
    start = chosen.aligned()
    table: dict[str, object] = {}
    if request.half1_uri:
        first, second, of_average = _halves(task, request)
        curves = corrected_fsc(first, second, _mask(task, "", of_average), of_average.voxel_size_angstrom)
        table["average"] = _curves(curves)
    result = signal_to_noise.pair_snr(
        chosen.read,
        start.rotations,
        start.shifts,
        info.shape[0],
        transfer=_transfer(request, task, info),
        pairs=request.pairs if request.HasField("pairs") else None,
        names=chosen.names,
        seed=request.seed,
        progress=task.progress,
    )
    table |= {
        "frequency_per_angstrom": (result.frequency / info.voxel_size_angstrom).tolist(),
        "spectral_snr": _numbers(result.spectral_snr),
        "signal_power": result.signal_power.tolist(),
        "box_size": info.shape[0],
        "voxel_size_angstrom": info.voxel_size_angstrom,
    }
    return pb.EstimateSnrResult(
        snr=result.snr,
        snr_error=result.snr_error,
        correlation=result.correlation,
        correlation_error=result.correlation_error,
        pairs=result.pairs,
        spectrum_uri=task.write_table("snr.json", table),
    )


# --- Symmetry ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Another frame of an average: new(r) = average(Q r + c), `rotation` Q, `centre` c (x, y, z) in voxels."""

    rotation: Rotation
    centre: NDArray[np.float64]

    def turned(self, volume: Array) -> Array:
        back = self.rotation.inv()
        return transform_volume(volume, back, -back.apply(self.centre))

    def describe(self, result: pb.DetectSymmetryResult | pb.FindHelixResult) -> None:
        """Put it into a result."""
        result.qx, result.qy, result.qz, result.qw = (float(value) for value in self.rotation.as_quat())
        result.centre_x_voxels, result.centre_y_voxels, result.centre_z_voxels = (float(c) for c in self.centre)

    def write_particles(self, task: Task, uri: str, info: VolumeInfo) -> str:
        """The particles with their poses (R, t) in this frame, (R Q, t + R c); empty where there are none."""
        if not uri:
            return ""
        particles = task.read_particles(uri)
        rotations = particles.rotations()
        if rotations is None:
            raise FailedPrecondition(f"{uri} holds no rotations: these must be the poses that the average was made at")
        centre = self.centre * (info.voxel_size_angstrom / particles.voxel_size_angstrom)
        shifts = particles.shifts() + rotations.apply(centre)
        columns = {f"shift_{axis}": shifts[:, i] for i, axis in enumerate("xyz")}
        moved = particles.with_rotations(rotations * self.rotation).with_columns(**columns)
        return task.write_particles("particles.parquet", moved)


@service.operation(needs=_maps_needs(_SYMMETRY_BYTES))
def detect_symmetry(request: pb.DetectSymmetryRequest, task: Task) -> pb.DetectSymmetryResult:
    """The point group of an average and its axes."""
    first, second, info = _halves(task, request)
    found = symmetry_detection.detect_symmetry(
        first,
        second,
        info.voxel_size_angstrom,
        candidates=tuple(request.candidates) or symmetry_detection.CANDIDATES,
        low_pass_angstrom=_optional(request, "low_pass_angstrom"),
        tolerance=request.tolerance,
        device=task.device,
        progress=task.progress,
    )
    table = {
        "symmetry": found.chosen,
        "remark": found.remark,
        "standard_error": _number(found.error),
        "threshold": _number(found.threshold),
        "finest_angstrom": found.finest_angstrom,
        "groups": [
            {
                "group": fit.group,
                "order": fit.order,
                "fits": fit.fits,
                "correlation": fit.correlation,
                "mean_correlation": fit.mean_correlation,
                "half_step_correlation": _number(fit.half_step),
                "quaternion": fit.rotation.as_quat().tolist(),
            }
            for fit in found.fits
        ],
    }
    frame = _Frame(found.rotation, np.asarray(found.centre_voxels))
    result = pb.DetectSymmetryResult(
        symmetry=found.chosen,
        remark=found.remark,
        table_uri=task.write_table("symmetry.json", table),
        particles_uri=frame.write_particles(task, request.particles_uri, info),
    )
    frame.describe(result)
    if request.turn:

        def turned(name: str, volume: Array) -> str:
            return task.write_volume(f"{name}.mrc", frame.turned(_sign(info) * volume), info)

        result.average_uri = turned("average", (first + second) * np.float32(0.5))
        result.half1_uri, result.half2_uri = turned("half1", first), turned("half2", second)
    return result


def _helix_needs(request: pb.FindHelixRequest, reader: Reader) -> Needs:
    return Needs(_BASE_BYTES + _HELIX_BYTES * math.prod(reader.open_volume(request.volume_uri).info.shape))


def _candidate(candidate: helical.Candidate) -> dict[str, object]:
    symmetry = candidate.symmetry
    return {
        "rise_angstrom": symmetry.rise_angstrom,
        "twist_degrees": symmetry.twist_degrees,
        "order": symmetry.order,
        "hand": symmetry.hand,
        "subunits_per_turn": _number(symmetry.subunits_per_turn),
        "pitch_angstrom": _number(symmetry.pitch_angstrom),
        "score": candidate.score,
        "mirror_score": candidate.mirror_score,
        "line_score": candidate.line_score,
        "line_pitch_angstrom": _number(candidate.line_pitch_angstrom),
        "rise_width_angstrom": _number(candidate.rise_width_angstrom),
        "twist_width_degrees": _number(candidate.twist_width_degrees),
        "ambiguities": list(candidate.ambiguities),
    }


@service.operation(needs=_helix_needs)
def find_helix(request: pb.FindHelixRequest, task: Task) -> pb.FindHelixResult:
    """The axis, rise and twist of a helix, and its average over the subunits."""
    volume, info = _density(task, request.volume_uri)
    voxel = info.voxel_size_angstrom
    cylinder = helical.Cylinder(
        _optional(request, "outer_radius_angstrom"), request.inner_radius_angstrom, request.central_fraction
    )
    low_pass, high_pass = _optional(request, "low_pass_angstrom"), _optional(request, "high_pass_angstrom")
    axis = helical.ALONG_Z
    if request.find_axis:
        task.progress(0.0, "finding the axis")
        axis = helical.find_axis(volume, protein_sign=float(_sign(info)))
    candidates = helical.find(
        helical.upright(volume, axis),
        (request.min_rise_angstrom, request.max_rise_angstrom),
        (request.min_twist_degrees, request.max_twist_degrees),
        voxel,
        cylinder,
        order=request.order,
        low_pass_angstrom=low_pass,
        high_pass_angstrom=high_pass,
        count=request.candidates,
        progress=part(task.progress, 0.1, 0.5),
    )
    best = candidates[0]
    if request.refine_axis:
        axis, best = helical.refine_axis(
            volume,
            axis,
            best.symmetry,
            voxel,
            cylinder,
            low_pass_angstrom=low_pass,
            high_pass_angstrom=high_pass,
            progress=part(task.progress, 0.5, 0.9),
        )
    frame = _Frame(axis.rotation, axis.shift_voxels)
    standing = frame.turned(volume)
    symmetrised = helical.symmetrise(standing, best.symmetry, voxel, cylinder)
    result = pb.FindHelixResult(
        rise_angstrom=best.symmetry.rise_angstrom,
        twist_degrees=best.symmetry.twist_degrees,
        score=best.score,
        remark="; ".join(best.ambiguities),
        symmetrised_uri=task.write_volume("symmetrised.mrc", symmetrised.volume, info),
        coverage_uri=task.write_volume("coverage.mrc", symmetrised.coverage, info),
        upright_uri=task.write_volume("upright.mrc", standing, info),
        candidates_uri=task.write_table(
            "candidates.json", {"best": _candidate(best), "candidates": [_candidate(c) for c in candidates]}
        ),
        particles_uri=frame.write_particles(task, request.particles_uri, info),
    )
    frame.describe(result)
    return result


# --- Masks ---------------------------------------------------------------------------------------------------------

_SHAPES: Mapping[int, tuple[str, int, frozenset[str]]] = {
    pb.MASK_SHAPE_SPHERE: ("sphere", 1, frozenset()),
    pb.MASK_SHAPE_CYLINDER: ("cylinder", 1, frozenset({"height_angstrom"})),
    pb.MASK_SHAPE_ELLIPSOID: ("ellipsoid", 3, frozenset()),
    pb.MASK_SHAPE_AUTO: ("auto", 0, frozenset({"low_pass_angstrom", "threshold_sigma", "dilation_angstrom"})),
    pb.MASK_SHAPE_DILATE: ("dilate", 0, frozenset({"threshold", "dilation_angstrom"})),
}
"""Name, number of radii and other parameters of each shape."""


def _check_shape(request: pb.MakeMaskRequest) -> None:
    name, radii, own = _SHAPES[request.shape]
    if len(request.radii_angstrom) != radii:
        raise InvalidArgument(f"a mask of shape {name} takes {radii} radii_angstrom, not {len(request.radii_angstrom)}")
    for other in ("height_angstrom", "low_pass_angstrom", "threshold_sigma", "threshold", "dilation_angstrom"):
        if other not in own and _optional(request, other) is not None:
            raise InvalidArgument(f"a mask of shape {name} takes no {other}")
    if request.shape == pb.MASK_SHAPE_CYLINDER and not request.HasField("height_angstrom"):
        raise InvalidArgument("a mask of shape cylinder needs its height_angstrom")


def _mask_needs(request: pb.MakeMaskRequest, reader: Reader) -> Needs:
    return Needs(_BASE_BYTES + _MASK_BYTES * math.prod(reader.open_volume(request.volume_uri).info.shape))


@service.operation(needs=_mask_needs)
def make_mask(request: pb.MakeMaskRequest, task: Task) -> pb.MakeMaskResult:
    """A soft mask in the box of a volume."""
    _check_shape(request)
    volume, info = _cube(task, request.volume_uri)
    n, voxel = info.shape[0], info.voxel_size_angstrom
    radii = [radius / voxel for radius in request.radii_angstrom]
    edge = request.edge_angstrom / voxel if request.HasField("edge_angstrom") else max(4.0, n / 12)
    dilation = request.dilation_angstrom / voxel if request.HasField("dilation_angstrom") else max(2.0, n / 32)
    match request.shape:
        case pb.MASK_SHAPE_SPHERE:
            mask = soft_sphere(n, radii[0], edge)
        case pb.MASK_SHAPE_CYLINDER:
            mask = soft_cylinder(n, radii[0], request.height_angstrom / (2 * voxel), edge)
        case pb.MASK_SHAPE_ELLIPSOID:
            mask = soft_ellipsoid(n, (radii[0], radii[1], radii[2]), edge)
        case pb.MASK_SHAPE_AUTO:
            _check_density(volume, request.volume_uri)
            mask = auto_mask(
                _sign(info) * volume,
                voxel,
                low_pass_angstrom=_optional(request, "low_pass_angstrom"),
                threshold_sigma=_optional(request, "threshold_sigma"),
                dilation_voxels=dilation,
                edge_voxels=edge,
            ).mask
        case _:
            inside = volume > (request.threshold if request.HasField("threshold") else 0.5)
            if not inside.any():
                raise InvalidArgument(f"no voxel of {request.volume_uri} is above the threshold: nothing to dilate")
            mask = soft_dilation(inside, dilation, edge)
    return pb.MakeMaskResult(mask_uri=task.write_volume("mask.mrc", mask, info), share=float(mask.mean()))


# --- Classes -------------------------------------------------------------------------------------------------------


def _class_needs(request: pb.ClassifyRequest | pb.ReassignRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    if isinstance(request, pb.ClassifyRequest):
        # Features lie in files; the clusters' tree is of a bounded number of particles.
        classes = request.classes if request.HasField("classes") else request.max_classes
    else:
        classes = len(request.average_uris) or _known_classes(request, reader)
    needed = memory_bytes(_search(request, info), _threads(), references=True) + _transfer_bytes(request, info)
    if isinstance(request, pb.ReassignRequest) and request.sums_uri:
        needed += 3 * reader.open_blob(request.sums_uri).size_bytes
    return Needs(needed + classes * _CLASS_BYTES * math.prod(info.shape))


def _known_classes(request: pb.ReassignRequest, reader: Reader) -> int:
    """How many classes the particles are in."""
    if request.sums_uri:
        return 0  # What the sums take is counted by their file.
    if request.particles_uri:
        table = reader.read_particles(request.particles_uri).table
    else:
        table = reader.open_subtomograms(request.subtomograms_uri).particles().table
    return int(table["class_id"].max()) + 1 if "class_id" in table and len(table) else 1


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


def _write_classes(
    task: Task, averages: Array, half_maps: Array, info: VolumeInfo
) -> tuple[list[str], list[str], list[str]]:
    """URIs of the averages and of their half maps."""
    plain = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)

    def write(name: str, volumes: Array) -> list[str]:
        return [task.write_volume(f"{name}-class{k}.mrc", volume, plain) for k, volume in enumerate(volumes)]

    return write("average", averages), write("half1", half_maps[:, 0]), write("half2", half_maps[:, 1])


@service.operation(needs=_class_needs)
def classify(request: pb.ClassifyRequest, task: Task) -> pb.ClassifyResult:
    """Sort aligned subtomograms into classes."""
    chosen = _chosen(request, task)
    info = chosen.subtomograms.info
    saved = task.load_checkpoint()
    result = classification.classify(
        chosen.read,
        len(chosen),
        chosen.aligned(),
        _search(request, info, _transfer(request, task, info)),
        classes=request.classes if request.HasField("classes") else None,
        largest=request.max_classes,
        iterations=request.iterations,
        stable=request.stable_agreement,
        least=request.min_particles,
        components=request.components,
        feature_cycles=_feature_cycles(request, info),
        mask=_mask(task, request.mask_uri, info) if request.mask_uri else None,
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
    averages, half1, half2 = _write_classes(task, result.averages, result.half_maps, info)
    table = _with_poses(chosen.particles, info, result.poses).with_columns(
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


def _own_classes(chosen: _Chosen) -> NDArray[np.int64] | None:
    """The classes that particles are in, -1 for none; None where the table has no classes."""
    if "class_id" not in chosen.given.table:
        return None
    return np.asarray(chosen.given.table["class_id"].to_numpy().clip(min=-1), dtype=np.int64)


@service.operation(needs=_class_needs)
def reassign(request: pb.ReassignRequest, task: Task) -> pb.ReassignResult:
    """Put each subtomogram into the class whose average it fits best."""
    everyone = _chosen(request, task)
    chosen = _of_rows(request, everyone)
    info = chosen.subtomograms.info
    search = _search(request, info, _transfer(request, task, info))
    before = _own_classes(chosen)
    common: dict[str, Any] = {"names": chosen.names, "device": task.device, "threads": task.threads}
    averages: Array | classification.ClassSums
    if request.average_uris:
        averages = np.stack([_reference(task, uri, info) for uri in request.average_uris])
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
        start=_start(request, near),
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
        uris = _write_classes(task, sums.averages(), sums.half_maps(), info)
        for field, values in zip(("average_uris", "half1_uris", "half2_uris"), uris, strict=True):
            getattr(result, field).extend(values)
        result.resolutions_angstrom.extend(sums.resolutions(info.voxel_size_angstrom).tolist())
    result.sizes.extend(np.bincount(labels).tolist())
    table = _with_poses(chosen.particles, info, found.poses).with_columns(class_id=labels)
    halves = chosen.halves()
    if halves is not None:
        table = table.with_columns(half=halves + 1)
    result.particles_uri = task.write_particles("particles.parquet", table)
    return result


def _own_sums(request: pb.ReassignRequest, task: Task, everyone: _Chosen, chosen: _Chosen) -> classification.ClassSums:
    """The sums that the particles made, for those that are chosen. Raises InvalidArgument where others made them."""
    stored = StoredSums.from_arrays(unpack(task.read_file(request.sums_uri), request.sums_uri), request.sums_uri)
    wanted = _about_sums(request, task, everyone, range(len(everyone)))
    if stored.about != wanted:
        raise InvalidArgument(
            f"{request.sums_uri} holds other sums than those of all particles of {everyone.given.source}, imaged and "
            "symmetric as this request says: make them with the same arguments"
        )
    return stored.class_sums(*_sorted(chosen), chosen.aligned(), task.device)


def _sorted(chosen: _Chosen) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes and half sets. Raises FailedPrecondition where they are not all known."""
    labels, halves = _own_classes(chosen), chosen.halves()
    if labels is None:
        raise FailedPrecondition(f"{chosen.given.source} holds no class_id: it says what to average")
    if halves is None:
        raise FailedPrecondition(f"{chosen.given.source} does not have every particle in half set 1 or 2")
    return labels, halves


def _about_sums(
    request: pb.SumClassesRequest | pb.ReassignRequest, task: Task, everyone: _Chosen, rows: range
) -> About:
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
    needed = memory_bytes(Search(info.shape[0], info.voxel_size_angstrom), _threads()) + _transfer_bytes(request, info)
    return Needs(needed + max(classes, 1) * _CLASS_BYTES * math.prod(info.shape))


@service.operation(needs=_sum_needs)
def sum_classes(request: pb.SumClassesRequest, task: Task) -> pb.SumClassesResult:
    """What some particles add to the averages of their classes."""
    everyone = _chosen(request, task)
    info = everyone.subtomograms.info
    labels, halves = _sorted(everyone)
    if labels.max() < 0:
        raise FailedPrecondition(f"{request.particles_uri} has no particle in any class: there is nothing to average")
    rows = _asked(request, everyone)
    mine = slice(rows.start, rows.stop)
    chosen = everyone.part(rows.start, len(rows))
    sums = classification.class_sums(
        chosen.read,
        len(chosen),
        chosen.aligned(),
        labels[mine],
        int(labels.max()) + 1,
        Search(
            info.shape[0], info.voxel_size_angstrom, transfer=_transfer(request, task, info), symmetry=request.symmetry
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
    return Needs(_BASE_BYTES + (_FSC_BYTES // 4) * reader.open_blob(request.sums_uris[0]).size_bytes)


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
    uris = _write_classes(task, averages, half_maps, info)
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
        result.fsc_uris.append(task.write_table(f"class{k}_fsc.json", _curves(curves) | figures))
        result.resolutions_angstrom.append(reached)
    return result


def _tables_needs(request: pb.DivideParticlesRequest | pb.SettleClassesRequest, reader: Reader) -> Needs:
    if isinstance(request, pb.SettleClassesRequest):
        size = reader.open_blob(request.before_uri).size_bytes
    else:
        size = reader.open_subtomograms(request.subtomograms_uri).count * 200
    return Needs(_BASE_BYTES + 20 * size)


@service.operation(needs=_tables_needs)
def divide_particles(request: pb.DivideParticlesRequest, task: Task) -> pb.DivideParticlesResult:
    """Half sets, and clusters that are large enough."""
    chosen = _chosen(request, task)
    if len(chosen) < 2:
        raise FailedPrecondition(f"{request.subtomograms_uri} holds one subtomogram: there is nothing to average")
    clusters = _own_classes(chosen) if chosen.own_table else None
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
    search = Search(info.shape[0], info.voxel_size_angstrom, low_pass_angstrom=_optional(request, "low_pass_angstrom"))
    maps = len(request.average_uris) * (3 if request.half1_uris else 1)
    each = memory_bytes(search, 1) + _PAIR_BYTES * math.prod(info.shape)
    return Needs(8 * maps * math.prod(info.shape) + _threads() * each)


def _alike(task: Task, uris: Sequence[str], info: VolumeInfo) -> Array:
    """Volumes of one box in one contrast."""
    volumes = []
    for uri in uris:
        data, own = _density(task, uri, info)
        volumes.append(data if own.contrast == info.contrast else -data)
    return np.stack(volumes)


@service.operation(needs=_merge_needs)
def merge_averages(request: pb.MergeAveragesRequest, task: Task) -> pb.MergeAveragesResult:
    """Group averages by structure."""
    _, info = _density(task, request.average_uris[0])
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
        low_pass_angstrom=_optional(request, "low_pass_angstrom"),
        mask=_mask(task, request.mask_uri, info) if request.mask_uri else None,
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


# --- FAML ------------------------------------------------------------------------------------------------------------

_FAML_CANDIDATES: Mapping[int, likelihood_model.Candidates] = {
    pb.FAML_CANDIDATES_MATCHING: "matching",
    pb.FAML_CANDIDATES_GRID: "grid",
    pb.FAML_CANDIDATES_AUTO: "auto",
}


def _read_state(reader: Reader, uri: str) -> faml.State:
    return faml.State.from_arrays(unpack(reader.read_file(uri), uri), uri)


def _fitting(state: faml.State, chosen: _Chosen, uri: str) -> VolumeInfo:
    """The boxes' properties, which must be those of the state. Raises InvalidArgument where they are not."""
    info, n = chosen.subtomograms.info, state.task.search.box_size
    if info.shape != (n,) * 3 or len(state) != len(chosen):
        raise InvalidArgument(
            f"{uri} is of {len(state)} particles in boxes of {n} voxels; these are {len(chosen)} of {info.shape[0]}"
        )
    return info


def _faml_start_needs(request: pb.FamlStartRequest, reader: Reader) -> Needs:
    info = reader.open_subtomograms(request.subtomograms_uri).info
    return Needs(_BASE_BYTES + _transfer_bytes(request, info))


@service.operation(needs=_faml_start_needs)
def faml_start(request: pb.FamlStartRequest, task: Task) -> pb.FamlStartResult:
    """Split particles into half sets and classes, and give them their first poses."""
    chosen = _chosen(request, task)
    info = chosen.subtomograms.info
    search = replace(_search(request, info, _transfer(request, task, info)), symmetry=request.symmetry)
    job = likelihood_model.Task(
        search,
        request.particle_diameter_angstrom,
        request.classes,
        _FAML_CANDIDATES[request.candidates],
        _optional(request, "start_low_pass_angstrom"),
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
    needed = memory_bytes(search, _threads(), references=True) + _FAML_BYTES * _threads() * info.shape[0] ** 3
    needed += (state.task.classes - 1) * _threads() * faml.class_bytes(state.task)
    if state.model is not None:
        needed += grid_bytes(state.task, state.model, _threads())
    return Needs(needed + 4 * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_faml_expect_needs)
def faml_expect(request: pb.FamlExpectRequest, task: Task) -> pb.FamlExpectResult:
    """The likely poses and classes of some particles, and the sums at them."""
    state = _read_state(task, request.model_uri)
    chosen = _chosen(request, task)
    info = _fitting(state, chosen, request.model_uri)
    rows = _asked(request, chosen)
    particles = faml.Particles(chosen.read, chosen.names, state.halves, float(_sign(info)))
    statistics, posterior = faml.sums_of(
        state, particles, rows, device=task.device, threads=task.threads, progress=task.progress
    )
    found = pack(faml.sums_to_arrays(state, rows.start, statistics, posterior))
    return pb.FamlExpectResult(statistics_uri=task.write_bytes("statistics.npz", found), count=len(rows))


def _faml_model_needs(request: pb.FamlMaximiseRequest | pb.FamlFinishRequest, reader: Reader) -> Needs:
    return Needs(_BASE_BYTES + (_FSC_BYTES // 2) * reader.open_blob(request.model_uri).size_bytes)


@service.operation(needs=_faml_model_needs)
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


@service.operation(needs=_faml_model_needs)
def faml_finish(request: pb.FamlFinishRequest, task: Task) -> pb.FamlFinishResult:
    """The maps, poses, classes and resolution of a run."""
    state = _read_state(task, request.model_uri)
    chosen = _chosen(request, task)
    info = _fitting(state, chosen, request.model_uri)
    result = faml.finish(state, float(_sign(info)))
    whole = VolumeInfo(info.shape, info.voxel_size_angstrom, info.contrast)
    table = _with_poses(chosen.particles, info, result.poses).with_columns(
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
        finished.fsc_uris.append(task.write_table(f"{name}_fsc.json", _curves(curves) | figures))
        finished.resolutions_angstrom.append(reached)
    return finished
