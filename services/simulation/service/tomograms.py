"""Reconstruct: tomograms of tilt series."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.images import open_image_stack
from cryofleet.formats.tilt_series import TiltSeries, read_tilt_series
from cryofleet.progress import Progress, part
from cryofleet.requests import CONTRASTS, CTF_CORRECTIONS
from cryofleet.scratch_array import ScratchVolume
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import common_pb2
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import tomogram
from services.simulation.service.inputs import BASE_BYTES, SLAB_BYTES, file_name, tilt_range, write_slabs
from services.simulation.service.registry import service

_METHODS: Mapping[int, Any] = {
    pb.RECONSTRUCTION_WEIGHTED_BACK_PROJECTION: "weighted_back_projection",
    pb.RECONSTRUCTION_SIRT: "sirt",
    pb.RECONSTRUCTION_FOURIER: "fourier",
}
_WINDOWS: Mapping[int, Any] = {
    pb.BACK_PROJECTION_WINDOW_RAMP: "ramp",
    pb.BACK_PROJECTION_WINDOW_HAMMING: "hamming",
    pb.BACK_PROJECTION_WINDOW_SIRT: "sirt",
}


def _reconstruct_needs(request: pb.ReconstructRequest, reader: Reader) -> Needs:
    # an image's pixels can't be known before the file is unpacked; no image is larger than its file
    size = reader.open_blob(request.tilt_series_uri).size_bytes
    tilts = len(read_tilt_series(reader.read_file(request.tilts_uri), request.tilts_uri))
    pixels = 4 * size // max(1, tilts)
    side = int(np.sqrt(pixels)) + 1
    preparing = tomogram.PREPARATION_BYTES_PER_PIXEL * pixels
    # the series and the tomogram lie on disk
    block = 4 * tomogram.BLOCK_ROWS * (4 * tilts * side + 6 * request.size_z * side)
    return Needs(preparing + block + 4 * SLAB_BYTES + BASE_BYTES)


@service.operation(needs=_reconstruct_needs)
def reconstruct(request: pb.ReconstructRequest, task: Task) -> pb.ReconstructResult:
    """Reconstruct a tomogram, and its halves where they are asked for."""
    if bool(request.even_uri) != bool(request.odd_uri):
        raise InvalidArgument("even_uri and odd_uri: give both halves or none")
    if request.even_uri and request.split_tilts:
        raise InvalidArgument("split_tilts: there are halves of the dose already; leave one of the two out")
    options = tomogram.Preparation(
        binning=request.binning,
        ctf_correction=CTF_CORRECTIONS[request.ctf_correction],
        wiener_snr=request.wiener_snr,
        dose_weighting=request.dose_weighting,
        tilt_axis_degrees=request.tilt_axis_degrees if request.HasField("tilt_axis_degrees") else None,
        align=request.align_images,
        normalise=request.normalise,
    )
    method = tomogram.Reconstruction(_METHODS[request.method], _WINDOWS[request.window], request.iterations)
    series = tomogram.with_optics(
        read_tilt_series(task.read_file(request.tilts_uri), request.tilts_uri),
        request.defocus_um if request.HasField("defocus_um") else None,
        request.voltage_kv,
        request.cs_mm,
        request.amplitude_contrast,
    )
    tomogram.check_series(series, options, request.tilts_uri)
    all_tilts = np.arange(len(series))
    # name, source, which of its tilts
    wanted = [("tomogram", request.tilt_series_uri, all_tilts)]
    if request.even_uri:
        wanted += [("even", request.even_uri, all_tilts), ("odd", request.odd_uri, all_tilts)]
    elif request.split_tilts:
        if len(series) < 4:
            raise InvalidArgument(f"split_tilts: a series of {len(series)} tilts is too short to be split")
        wanted += [("even", request.tilt_series_uri, all_tilts[::2]), ("odd", request.tilt_series_uri, all_tilts[1::2])]
    uris, residuals = {}, {}
    with ExitStack() as files:
        prepared: ScratchVolume | None = None
        before = ""
        for number, (name, uri, tilts) in enumerate(wanted):
            progress = part(task.progress, number / len(wanted), (number + 0.9) / len(wanted))
            if prepared is None or uri != before:
                files.close()
                prepared, pixel = _prepared(request, uri, series, options, task, part(progress, 0.0, 0.4))
                files.enter_context(prepared)
                before = uri
            shape = (request.size_z, *prepared.shape[1:])
            angles = series.angles_degrees[tilts]

            def rows(
                first: int, last: int, images: ScratchVolume = prepared, tilts: NDArray[np.intp] = tilts
            ) -> NDArray[np.float32]:
                return images.rows(first, last)[tilts]

            with ScratchVolume(task.scratch / f"{name}.f32", shape) as volume:
                residuals[name] = tomogram.reconstruct(
                    rows, angles, shape, volume.write_rows, method, task.threads, part(progress, 0.4, 1.0)
                )
                info = VolumeInfo(shape, pixel, CONTRASTS[request.contrast], *tilt_range(angles))
                light = request.contrast == common_pb2.CONTRAST_LIGHT
                uris[name] = write_slabs(task, f"{name}.mrc", volume.sections, info, negated=light)
    metrics = {
        "tilts": len(series),
        "angles_degrees": series.angles_degrees.tolist(),
        "voxel_size_angstrom": pixel,
        "method": method.method,
        "ctf_correction": options.ctf_correction,
        "dose_weighting": options.dose_weighting,
        "sirt_residuals": residuals["tomogram"],
    }
    return pb.ReconstructResult(
        tomogram_uri=uris["tomogram"],
        even_uri=uris.get("even", ""),
        odd_uri=uris.get("odd", ""),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _prepared(
    request: pb.ReconstructRequest,
    uri: str,
    series: TiltSeries,
    options: tomogram.Preparation,
    task: Task,
    progress: Progress,
) -> tuple[ScratchVolume, float]:
    """A series prepared for its reconstruction, on disk, and its pixel size after binning."""
    with open_image_stack(task.local_copy(uri), file_name(uri), task.scratch, progress) as stack:
        if stack.shape[0] != len(series):
            raise InvalidArgument(
                f"{file_name(uri)} has {stack.shape[0]} images and {file_name(request.tilts_uri)} {len(series)} "
                "angles; there must be one for each image"
            )
        pixel = stack.pixel_size(request.pixel_size_angstrom or None)
        height, width = tomogram.binned_shape(stack.shape[1:], options.binning)
        prepared = ScratchVolume(task.scratch / "prepared.f32", (len(series), height, width))
        tomogram.prepare_images(
            stack.read, stack.shape, series, pixel, options, prepared.write_section, task.threads, progress
        )
    return prepared, pixel * options.binning
