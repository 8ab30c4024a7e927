"""SimulateTiltSeries: images of a scene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import write_mdoc, write_tlt
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import detector, imaging, projection
from services.simulation.service.inputs import BASE_BYTES, imaging_of, scheme_of, tilt_range
from services.simulation.service.registry import service
from services.simulation.signal_to_noise import noise_sigma_for_snr

_PROJECTIONS: Mapping[int, Any] = {
    pb.PROJECTION_REAL_SPACE: "real_space",
    pb.PROJECTION_CENTRAL_SLICES: "central_slices",
}


def _tilt_series_needs(request: pb.SimulateTiltSeriesRequest, reader: Reader) -> Needs:
    depth, height, length = _scene_info(request, reader).shape
    width = request.width or length
    tilts = len(scheme_of(request.tilt_scheme))
    series = 4 * tilts * height * width
    # the scene and its projections; then the images without noise, with it, and its halves
    series_kept = 3 + (2 if request.halves else 0)
    work = projection.projection_bytes(tilts, depth, max(length, width), 2) + 64 * 4 * height * width
    return Needs(4 * depth * height * length + series_kept * series + work + BASE_BYTES)


def _scene_info(request: pb.SimulateTiltSeriesRequest, reader: Reader) -> VolumeInfo:
    info = reader.open_volume(request.density_uri).info
    if info.count is not None:
        raise InvalidArgument(f"{request.density_uri}: a stack of {info.count} volumes; a scene is one")
    if info.contrast != "light":
        raise FailedPrecondition(f"{request.density_uri}: protein is {info.contrast}; a scene has it light")
    return info


@service.operation(needs=_tilt_series_needs)
def simulate_tilt_series(request: pb.SimulateTiltSeriesRequest, task: Task) -> pb.SimulateTiltSeriesResult:
    """Image a scene: projections, contrast, noise; and the metadata as a microscope writes it."""
    info = _scene_info(request, task)
    scheme = scheme_of(request.tilt_scheme)
    parameters = imaging_of(request.microscope, info.voxel_size_angstrom)
    # streams of their own: other noise leaves the defocus and the alignment's errors as they are
    drawing, noise, measuring = (np.random.default_rng(seed) for seed in np.random.SeedSequence(request.seed).spawn(3))
    series = imaging.draw_tilt_series(scheme, parameters, drawing)
    angles = series.angles_degrees
    task.progress(0.0, "reading")
    specimen = task.open_volume(request.density_uri).read()
    if not np.isfinite(specimen).all():
        raise FailedPrecondition(f"{request.density_uri} holds voxels that are not finite numbers")
    projections = projection.project(
        specimen,
        angles,
        request.width or None,
        _PROJECTIONS[request.projection],
        task.threads,
        part(task.progress, 0.02, 0.25),
    )
    depth, length = specimen.shape[0], specimen.shape[2]
    del specimen
    contrast = imaging.noise_free_series(projections, series, parameters, task.threads, part(task.progress, 0.25, 0.5))
    del projections
    mtf = detector.sinc_mtf if request.microscope.detector_mtf else None
    thickness = request.ice_thickness_angstrom or depth * info.voxel_size_angstrom
    path = request.microscope.mean_free_path_angstrom
    passing = detector.transmission(angles, thickness, path)
    metrics: dict[str, Any] = {"tilts": len(series), "transmission": passing.tolist(), "noise": None}
    clean = detector.apply_mtf(contrast, mtf, task.threads)
    images_info = VolumeInfo(clean.shape, info.voxel_size_angstrom, "dark", *tilt_range(angles))
    result = pb.SimulateTiltSeriesResult(
        tilts=len(series),
        noise_free_uri=task.write_volume("noise-free.mrc", clean, images_info),
        tilts_uri=task.write_bytes("tilts.json", series.to_json()),
        mdoc_uri=task.write_bytes(
            "tilt-series.mrc.mdoc", write_mdoc(series, "tilt-series.mrc", (clean.shape[2], clean.shape[1]))
        ),
        tlt_uri=task.write_bytes("tilt-series.tlt", write_tlt(angles)),
    )
    if request.noise == pb.NOISE_GAUSSIAN:
        scales = detector.noise_scales(angles, thickness, path)
        level = noise_sigma_for_snr(
            clean,
            angles,
            depth,
            request.snr,
            measuring,
            noise_scales=scales,
            mtf=mtf,
            left_out=_left_out(request, task, (depth, clean.shape[1], length)),
            width=length,
            workers=task.threads,
            progress=part(task.progress, 0.5, 0.75),
        )
        recorded = detector.gaussian_series(
            contrast,
            level.sigma * scales,
            noise,
            mtf=mtf,
            halves=request.halves,
            workers=task.threads,
            progress=part(task.progress, 0.75, 0.95),
        )
        metrics |= {
            "noise": "gaussian",
            "snr": request.snr,
            "sigma": level.sigma,
            "signal_variance": level.signal_variance,
            "noise_variance": level.noise_variance,
        }
    elif request.noise == pb.NOISE_POISSON:
        electrons = request.microscope.dose_per_tilt * info.voxel_size_angstrom**2 * passing
        recorded = detector.poisson_series(
            contrast,
            electrons,
            noise,
            mtf=mtf,
            halves=request.halves,
            workers=task.threads,
            progress=part(task.progress, 0.5, 0.95),
        )
        metrics |= {"noise": "poisson", "electrons_per_pixel": electrons.tolist()}
    else:
        recorded = detector.Recorded(clean, *((clean, clean) if request.halves else ()))
    task.progress(0.95, "writing")
    result.tilt_series_uri = task.write_volume("tilt-series.mrc", recorded.images, images_info)
    if recorded.even is not None and recorded.odd is not None:
        result.even_uri = task.write_volume("even.mrc", recorded.even, images_info)
        result.odd_uri = task.write_volume("odd.mrc", recorded.odd, images_info)
    result.metrics_uri = task.write_table("metrics.json", metrics)
    return result


def _left_out(
    request: pb.SimulateTiltSeriesRequest, task: Task, shape: tuple[int, int, int]
) -> NDArray[np.bool_] | None:
    """The voxels that no SNR counts."""
    if not request.labels_uri or not request.labels_left_out:
        return None
    labels = task.open_volume(request.labels_uri)
    if labels.info.shape != shape:
        raise InvalidArgument(f"{request.labels_uri} has shape {labels.info.shape}, the scene {shape} (z, y, x)")
    mask = np.empty(shape, np.bool_)
    for first in range(shape[0]):
        mask[first] = np.isin(labels.slab(first, first + 1)[0], list(request.labels_left_out))
    return mask
