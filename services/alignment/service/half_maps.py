"""Half maps as requests point to them, and their FSC as results have it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD, CorrectedFsc
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.alignment import signal_to_noise
from services.alignment.service.inputs import BASE_BYTES, Array, protein_sign, read_density

Halves = pb.ResolutionRequest | pb.LocalResolutionRequest | pb.DetectSymmetryRequest | pb.SharpenRequest


def read_halves(task: Task, request: Halves | pb.EstimateSnrRequest) -> tuple[Array, Array, VolumeInfo]:
    """The half maps with protein positive, and the first one's header."""
    first, info = read_density(task, request.half1_uri)
    second, other = read_density(task, request.half2_uri, info)
    if other.contrast != info.contrast:
        raise InvalidArgument(
            f"{request.half1_uri} is {info.contrast} and {request.half2_uri} {other.contrast}: both must be of one "
            "contrast"
        )
    return protein_sign(info) * first, protein_sign(info) * second, info


def maps_needs(bytes_per_voxel: int) -> Callable[[Halves, Reader], Needs]:
    """What work on half maps needs that takes so many bytes for each of their voxels."""

    def needs(request: Halves, reader: Reader) -> Needs:
        return Needs(BASE_BYTES + bytes_per_voxel * math.prod(reader.open_volume(request.half1_uri).info.shape))

    return needs


def json_number(value: float) -> float | None:
    """As JSON has it, which knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def json_numbers(values: NDArray[np.float64]) -> list[float | None]:
    """As JSON has them."""
    return [json_number(value) for value in values.tolist()]


def fsc_table(curves: CorrectedFsc) -> dict[str, object]:
    """The curves of an FSC as its file has them."""
    return {
        "frequency_per_angstrom": (curves.frequency / curves.voxel_size_angstrom).tolist(),
        "unmasked": curves.unmasked.tolist(),
        "masked": curves.masked.tolist(),
        "randomised": curves.randomised.tolist(),
        "corrected": curves.corrected.tolist(),
        "randomised_from_angstrom": curves.randomised_from_angstrom,
        "spectral_snr": json_numbers(signal_to_noise.spectral_snr_of_average(curves.corrected)),
        "threshold": HALF_MAP_THRESHOLD,
    }
