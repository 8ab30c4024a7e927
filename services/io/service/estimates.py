"""EstimateTomogramSnr, EstimateWedge, FindSlab and FindGold: what a tomogram says of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import io_pb2
from cryofleet.volumes import Volume
from services.io import gold, slab, tomogram_snr, wedge
from services.io.service.inputs import BASE_BYTES, finite, single
from services.io.service.registry import service

#: Angles that a volume states are taken for those found where they differ by less.
_SAME_DEGREES = 3.0
_MOST_THREADS = 4


def _listed(values: NDArray[np.floating]) -> list[float | None]:
    return [finite(round(float(value), 6)) for value in values]


# --- SNR -----------------------------------------------------------------------------------------------------------


def _snr_needs(request: io_pb2.EstimateTomogramSnrRequest, reader: Reader) -> Needs:
    volume = single(reader, request.tomogram_uri or request.even_uri)
    return Needs(BASE_BYTES + tomogram_snr.memory_bytes(volume.info.shape))


def _same_shape(volumes: Sequence[Volume]) -> None:
    for other in volumes[1:]:
        if other.info.shape != volumes[0].info.shape:
            raise FailedPrecondition(
                f"{other.uri} has {other.info.shape} voxels (z, y, x), {volumes[0].uri} {volumes[0].info.shape}: "
                "they must be of one tomogram"
            )


@service.operation(needs=_snr_needs)
def estimate_tomogram_snr(request: io_pb2.EstimateTomogramSnrRequest, task: Task) -> io_pb2.EstimateTomogramSnrResult:
    """Estimate the SNR of a tomogram, from halves or its spectrum."""
    if request.tomogram_uri:
        volume = single(task, request.tomogram_uri)
        info, method = volume.info, io_pb2.SNR_METHOD_SPECTRUM
        found = tomogram_snr.snr_of_spectrum(
            volume.slab, info.shape, info.tilt_min_degrees, info.tilt_max_degrees, task.threads, task.progress
        )
    else:
        even, odd = single(task, request.even_uri), single(task, request.odd_uri)
        left_out = single(task, request.left_out_uri) if request.left_out_uri else None
        _same_shape([even, odd, left_out] if left_out else [even, odd])
        info, method = even.info, io_pb2.SNR_METHOD_HALVES
        found = tomogram_snr.snr_of_halves(
            even.slab, odd.slab, info.shape, left_out.slab if left_out else None, task.threads, task.progress
        )
    reliable = found.snr > 2 * found.error
    metrics = {
        "snr": found.snr,
        "snr_error": finite(found.error),
        "reliable": reliable,
        "method": "spectrum" if request.tomogram_uri else "halves",
        "voxel_size_angstrom": info.voxel_size_angstrom,
        "spectral": {
            "frequency_per_angstrom": _listed(found.frequency / info.voxel_size_angstrom),
            "snr": _listed(found.spectral_snr),
        },
    }
    return io_pb2.EstimateTomogramSnrResult(
        snr=found.snr,
        snr_error=found.error,
        method=method,
        snr_of_half=found.snr_of_half,
        correlation=found.correlation,
        reliable=reliable,
        metrics_uri=task.write_table("metrics.json", metrics),
    )


# --- Wedge ---------------------------------------------------------------------------------------------------------


def _wedge_needs(request: io_pb2.EstimateWedgeRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + wedge.memory_bytes(single(reader, request.tomogram_uri).info.shape))


@service.operation(needs=_wedge_needs)
def estimate_wedge(request: io_pb2.EstimateWedgeRequest, task: Task) -> io_pb2.EstimateWedgeResult:
    """Find tilt range and tilt axis in a tomogram's spectrum."""
    volume = single(task, request.tomogram_uri)
    info = volume.info
    found = wedge.estimate_wedge(volume.slab, info.shape, request.tilt_step_degrees, task.threads, task.progress)
    stated = (info.tilt_min_degrees, info.tilt_max_degrees, 0.0)
    own = (found.tilt_min, found.tilt_max, found.axis)
    as_stated = all(abs(a - b) <= _SAME_DEGREES for a, b in zip(stated, own, strict=True))
    angles = {
        "tilt_min_degrees": found.tilt_min,
        "tilt_max_degrees": found.tilt_max,
        "tilt_min_error_degrees": found.tilt_min_error,
        "tilt_max_error_degrees": found.tilt_max_error,
        "tilt_axis_degrees": found.axis,
        "tilt_axis_error_degrees": found.axis_error,
    }
    metrics = {
        "found": found.found,
        **({name: finite(value) for name, value in angles.items()} if found.found else {}),
        "stated_tilt_min_degrees": info.tilt_min_degrees,
        "stated_tilt_max_degrees": info.tilt_max_degrees,
        "depth": found.depth,
        "power_by_angle": {"angle_degrees": _listed(found.angles), "power": _listed(found.power)},
    }
    result = io_pb2.EstimateWedgeResult(
        found=found.found, depth=found.depth, metrics_uri=task.write_table("metrics.json", metrics)
    )
    if found.found:
        result.as_stated = as_stated
        for name, value in angles.items():
            setattr(result, name, value)
    return result


# --- Slab ----------------------------------------------------------------------------------------------------------


def _plane(plane: slab.Plane) -> dict[str, float]:
    return {
        "z_at_centre_voxels": plane.centre,
        "slope_x_degrees": math.degrees(math.atan(plane.slope_x)),
        "slope_y_degrees": math.degrees(math.atan(plane.slope_y)),
    }


def _slab_needs(request: io_pb2.FindSlabRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + slab.memory_bytes(single(reader, request.tomogram_uri).info.shape))


@service.operation(needs=_slab_needs)
def find_slab(request: io_pb2.FindSlabRequest, task: Task) -> io_pb2.FindSlabResult:
    """Find the surfaces of the ice or the lamella."""
    volume = single(task, request.tomogram_uri)
    info = volume.info
    size = info.voxel_size_angstrom
    patch = request.patch_angstrom / size if request.HasField("patch_angstrom") else None
    found = slab.find_slab(volume.slab, info.shape, size, patch, part(task.progress, 0.0, 0.9))
    planes = {"bottom": _plane(found.bottom), "top": _plane(found.top)} if found.found else {}
    thickness = {
        "thickness_angstrom": found.thickness * size,
        "thickness_error_angstrom": found.thickness_error * size,
    }
    metrics = {
        "found": found.found,
        **(thickness if found.found else {}),
        "contrast": found.contrast,
        "columns_used": float(found.agree.mean()),
        **planes,
        "surfaces": [
            {"x": x, "y": y, "bottom": low, "top": high, "used": bool(used)}
            for (x, y, low, high), used in zip(found.columns.tolist(), found.agree, strict=True)
        ],
    }
    result = io_pb2.FindSlabResult(
        found=found.found,
        contrast=found.contrast,
        columns_used=float(found.agree.mean()),
        metrics_uri=task.write_table("metrics.json", metrics),
    )
    if found.found:
        result.thickness_angstrom = thickness["thickness_angstrom"]
        result.thickness_error_angstrom = thickness["thickness_error_angstrom"]
        for plane, target in ((found.bottom, result.bottom), (found.top, result.top)):
            target.z_at_centre_voxels, target.slope_x, target.slope_y = plane.centre, plane.slope_x, plane.slope_y
        with task.volume_writer("mask.mrc", replace(info, contrast="light")) as writer:
            slab.write_mask(found, info.shape, writer.write, part(task.progress, 0.9, 1.0))
        result.mask_uri = writer.uri
    return result


# --- Gold ----------------------------------------------------------------------------------------------------------


def _gold_needs(request: io_pb2.FindGoldRequest, reader: Reader) -> Needs:
    info = single(reader, request.tomogram_uri).info
    diameter = request.diameter_angstrom / info.voxel_size_angstrom
    return Needs(BASE_BYTES + gold.memory_bytes(info.shape, diameter, _MOST_THREADS))


@service.operation(needs=_gold_needs)
def find_gold(request: io_pb2.FindGoldRequest, task: Task) -> io_pb2.FindGoldResult:
    """Find gold fiducials, and mask them."""
    volume = single(task, request.tomogram_uri)
    info = volume.info
    found = gold.find_gold(
        volume.slab,
        info.shape,
        request.diameter_angstrom / info.voxel_size_angstrom,
        info.contrast == "dark",
        request.threshold if request.HasField("threshold") else None,
        part(task.progress, 0.0, 0.9),
        min(task.threads, _MOST_THREADS),
    )
    radius = (request.diameter_angstrom / 2 + request.margin_angstrom) / info.voxel_size_angstrom
    with task.volume_writer("mask.mrc", replace(info, contrast="light")) as writer:
        gold.write_mask(found.positions, radius, info.shape, writer.write, part(task.progress, 0.9, 1.0))
    particles = Particles.from_positions(
        found.positions, info.voxel_size_angstrom, tomogram_shape=info.shape, score=found.scores
    )
    margin = float(found.scores[-1] / max(found.next_score, 1e-9)) if len(found.scores) else 0.0
    metrics = {
        "count": len(found.positions),
        "margin": margin,
        "weakest_score": float(found.scores[-1]) if len(found.scores) else None,
        "strongest_score_left_out": found.next_score,
    }
    return io_pb2.FindGoldResult(
        particles_uri=task.write_particles("gold.parquet", particles),
        mask_uri=writer.uri,
        count=len(found.positions),
        margin=margin,
        metrics_uri=task.write_table("metrics.json", metrics),
    )
