"""What half maps say: Resolution, LocalResolution, Sharpen, EstimateSnr."""

from __future__ import annotations

import math

import numpy as np

from cryofleet.numerics.fsc import corrected_fsc, fsc
from cryofleet.numerics.fsc import resolution as resolution_of
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from services.alignment import local_resolution as local
from services.alignment import sharpening, signal_to_noise
from services.alignment.auto_mask import auto_mask
from services.alignment.service.half_maps import fsc_table, json_numbers, maps_needs, read_halves
from services.alignment.service.inputs import (
    BASE_BYTES,
    FSC_BYTES,
    choose,
    optional,
    protein_sign,
    read_density,
    read_mask,
    transfer_bytes,
    transfer_of,
)
from services.alignment.service.registry import service

_LOCAL_BYTES = 80
TRUTH_THRESHOLD = 0.5


@service.operation(needs=maps_needs(FSC_BYTES))
def resolution(request: pb.ResolutionRequest, task: Task) -> pb.ResolutionResult:
    """The FSC of half maps, corrected for the mask, and what it says."""
    first, second, info = read_halves(task, request)
    voxel = info.voxel_size_angstrom
    mean = (first + second) * np.float32(0.5)
    if not request.mask_uri and request.mask_source == pb.MASK_SOURCE_AUTO:
        mask = auto_mask(mean, voxel).mask
    else:
        mask = read_mask(task, request.mask_uri, info)
    start = optional(request, "randomise_from_angstrom")
    curves = corrected_fsc(first, second, mask, voxel, randomise_from_angstrom=start, seed=request.seed)
    table = fsc_table(curves)
    result = pb.ResolutionResult(
        resolution_angstrom=curves.resolution_angstrom(),
        masked_resolution_angstrom=resolution_of(curves.frequency, curves.masked, voxel),
        unmasked_resolution_angstrom=resolution_of(curves.frequency, curves.unmasked, voxel),
    )
    if request.truth_uri:
        truth, other = read_density(task, request.truth_uri, info)
        against = fsc(mean, protein_sign(other) * truth, mask)[1]
        table |= {"truth": against.tolist(), "truth_threshold": TRUTH_THRESHOLD}
        result.truth_resolution_angstrom = resolution_of(curves.frequency, against, voxel, TRUTH_THRESHOLD)
    result.fsc_uri = task.write_table("fsc.json", table)
    result.mask_uri = task.write_volume("mask.mrc", mask, info)
    return result


@service.operation(needs=maps_needs(_LOCAL_BYTES))
def local_resolution(request: pb.LocalResolutionRequest, task: Task) -> pb.LocalResolutionResult:
    """The resolution around each voxel, and the average filtered by it."""
    first, second, info = read_halves(task, request)
    voxel = info.voxel_size_angstrom
    mask = read_mask(task, request.mask_uri, info)
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
            protein_sign(info) * np.float32(0.5) * (first + second),
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


@service.operation(needs=maps_needs(FSC_BYTES))
def sharpen(request: pb.SharpenRequest, task: Task) -> pb.SharpenResult:
    """Sharpen the average of half maps, as far as their FSC bears it out."""
    first, second, info = read_halves(task, request)
    voxel = info.voxel_size_angstrom
    curves = corrected_fsc(first, second, read_mask(task, request.mask_uri, info), voxel, seed=request.seed)
    reached = optional(request, "resolution_angstrom") or curves.resolution_angstrom()
    result = sharpening.sharpen(
        protein_sign(info) * np.float32(0.5) * (first + second),
        voxel,
        reached,
        b_factor_angstrom2=optional(request, "b_factor_angstrom2"),
        fit_from_angstrom=optional(request, "fit_from_angstrom"),
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
    needed = signal_to_noise.memory_bytes(info.shape[0]) + transfer_bytes(request, info)
    return Needs(BASE_BYTES + needed + (FSC_BYTES * math.prod(info.shape) if request.half1_uri else 0))


@service.operation(needs=_snr_needs)
def estimate_snr(request: pb.EstimateSnrRequest, task: Task) -> pb.EstimateSnrResult:
    """The SNR of aligned subtomograms by pairs, and that of their average by shells."""
    chosen = choose(request, task)
    info = chosen.subtomograms.info
    start = chosen.aligned()
    table: dict[str, object] = {}
    if request.half1_uri:
        first, second, of_average = read_halves(task, request)
        curves = corrected_fsc(first, second, read_mask(task, "", of_average), of_average.voxel_size_angstrom)
        table["average"] = fsc_table(curves)
    result = signal_to_noise.pair_snr(
        chosen.read,
        start.rotations,
        start.shifts,
        info.shape[0],
        transfer=transfer_of(request, task, info),
        pairs=request.pairs if request.HasField("pairs") else None,
        names=chosen.names,
        seed=request.seed,
        progress=task.progress,
    )
    table |= {
        "frequency_per_angstrom": (result.frequency / info.voxel_size_angstrom).tolist(),
        "spectral_snr": json_numbers(result.spectral_snr),
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
