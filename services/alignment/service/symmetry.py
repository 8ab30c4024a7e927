"""The symmetry of averages: DetectSymmetry and FindHelix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import helical, symmetry_detection
from services.alignment.service.half_maps import json_number, maps_needs, read_halves
from services.alignment.service.inputs import BASE_BYTES, Array, optional, protein_sign, read_density
from services.alignment.service.registry import service

_SYMMETRY_BYTES = 200
_HELIX_BYTES = 300


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


@service.operation(needs=maps_needs(_SYMMETRY_BYTES))
def detect_symmetry(request: pb.DetectSymmetryRequest, task: Task) -> pb.DetectSymmetryResult:
    """The point group of an average and its axes."""
    first, second, info = read_halves(task, request)
    found = symmetry_detection.detect_symmetry(
        first,
        second,
        info.voxel_size_angstrom,
        candidates=tuple(request.candidates) or symmetry_detection.CANDIDATES,
        low_pass_angstrom=optional(request, "low_pass_angstrom"),
        tolerance=request.tolerance,
        device=task.device,
        progress=task.progress,
    )
    table = {
        "symmetry": found.chosen,
        "remark": found.remark,
        "standard_error": json_number(found.error),
        "threshold": json_number(found.threshold),
        "finest_angstrom": found.finest_angstrom,
        "groups": [
            {
                "group": fit.group,
                "order": fit.order,
                "fits": fit.fits,
                "correlation": fit.correlation,
                "mean_correlation": fit.mean_correlation,
                "half_step_correlation": json_number(fit.half_step),
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
            return task.write_volume(f"{name}.mrc", frame.turned(protein_sign(info) * volume), info)

        result.average_uri = turned("average", (first + second) * np.float32(0.5))
        result.half1_uri, result.half2_uri = turned("half1", first), turned("half2", second)
    return result


def _helix_needs(request: pb.FindHelixRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + _HELIX_BYTES * math.prod(reader.open_volume(request.volume_uri).info.shape))


def _candidate(candidate: helical.Candidate) -> dict[str, object]:
    symmetry = candidate.symmetry
    return {
        "rise_angstrom": symmetry.rise_angstrom,
        "twist_degrees": symmetry.twist_degrees,
        "order": symmetry.order,
        "hand": symmetry.hand,
        "subunits_per_turn": json_number(symmetry.subunits_per_turn),
        "pitch_angstrom": json_number(symmetry.pitch_angstrom),
        "score": candidate.score,
        "mirror_score": candidate.mirror_score,
        "line_score": candidate.line_score,
        "line_pitch_angstrom": json_number(candidate.line_pitch_angstrom),
        "rise_width_angstrom": json_number(candidate.rise_width_angstrom),
        "twist_width_degrees": json_number(candidate.twist_width_degrees),
        "ambiguities": list(candidate.ambiguities),
    }


@service.operation(needs=_helix_needs)
def find_helix(request: pb.FindHelixRequest, task: Task) -> pb.FindHelixResult:
    """The axis, rise and twist of a helix, and its average over the subunits."""
    volume, info = read_density(task, request.volume_uri)
    voxel = info.voxel_size_angstrom
    cylinder = helical.Cylinder(
        optional(request, "outer_radius_angstrom"), request.inner_radius_angstrom, request.central_fraction
    )
    low_pass, high_pass = optional(request, "low_pass_angstrom"), optional(request, "high_pass_angstrom")
    axis = helical.ALONG_Z
    if request.find_axis:
        task.progress(0.0, "finding the axis")
        axis = helical.find_axis(volume, protein_sign=float(protein_sign(info)))
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
