"""AdjustContrast and EstimateContrast: the values of a volume, and the sign of protein in it."""

from __future__ import annotations

from dataclasses import replace

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import common_pb2, io_pb2
from services.io import contrast as adjusting
from services.io import contrast_sign
from services.io.service.inputs import BASE_BYTES, finite, single
from services.io.service.registry import service

_MESSAGES = {"dark": common_pb2.CONTRAST_DARK, "light": common_pb2.CONTRAST_LIGHT}


def _adjust_needs(request: io_pb2.AdjustContrastRequest, reader: Reader) -> Needs:
    shapes = [single(reader, uri).info.shape for uri in (request.volume_uri, request.reference_uri) if uri]
    return Needs(BASE_BYTES + max(adjusting.memory_bytes(shape) for shape in shapes))


@service.operation(needs=_adjust_needs)
def adjust_contrast(request: io_pb2.AdjustContrastRequest, task: Task) -> io_pb2.AdjustContrastResult:
    """Invert a volume, standardise it, or give its values another's distribution."""
    volume = single(task, request.volume_uri)
    info = volume.info
    sign = -1 if request.invert else 1
    contrast = info.contrast if sign > 0 else "light" if info.contrast == "dark" else "dark"
    reference = single(task, request.reference_uri) if request.reference_uri else None
    if reference is not None and reference.info.contrast != contrast:
        raise FailedPrecondition(
            f"protein is {contrast} in the result, and {reference.info.contrast} in {request.reference_uri}: "
            f"{'leave out invert' if request.invert else 'set invert=true'}, or take another reference"
        )
    with task.volume_writer("volume.mrc", replace(info, contrast=contrast)) as writer:
        if reference is not None:
            adjusting.match_histogram(
                volume.slab, info.shape, reference.slab, reference.info.shape, sign, writer.write, task.progress
            )
        else:
            found = adjusting.statistics_of(volume.slab, info.shape, part(task.progress, 0.0, 0.4))
            change = (
                adjusting.linear(sign / found.standard_deviation, found.mean, 0.0)
                if request.standardise
                else adjusting.linear(sign, found.mean, found.mean)
            )
            adjusting.adjust(volume.slab, info.shape, change, writer.write, part(task.progress, 0.4, 1.0))
    return io_pb2.AdjustContrastResult(volume_uri=writer.uri, contrast=_MESSAGES[contrast])


def _estimate_needs(request: io_pb2.EstimateContrastRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + contrast_sign.memory_bytes(single(reader, request.tomogram_uri).info.shape))


@service.operation(needs=_estimate_needs)
def estimate_contrast(request: io_pb2.EstimateContrastRequest, task: Task) -> io_pb2.EstimateContrastResult:
    """Find out whether protein is dark or light."""
    volume = single(task, request.tomogram_uri)
    info = volume.info
    found = contrast_sign.estimate_skewness(volume.slab, info.shape, info.voxel_size_angstrom, task.progress)
    contrast = ("dark" if found.value < 0 else "light") if found.significant else None
    metrics = {
        "contrast": contrast or "not to be told",
        "stated": info.contrast,
        "skewness": found.value,
        "skewness_error": finite(found.error),
        "reliable": found.significant,
    }
    return io_pb2.EstimateContrastResult(
        contrast=_MESSAGES[contrast] if contrast else common_pb2.CONTRAST_UNSPECIFIED,
        skewness=found.value,
        skewness_error=found.error,
        reliable=found.significant,
        as_stated=contrast == info.contrast if contrast else None,
        metrics_uri=task.write_table("metrics.json", metrics),
    )
