"""Filter: take noise from a volume, or keep a band of its details."""

from __future__ import annotations

from collections.abc import Mapping

from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import io_pb2
from cryofleet.volumes import VolumeInfo
from services.io import anisotropic_diffusion, median, non_local_means, wavelet
from services.io import filter as filtering
from services.io.service.inputs import BASE_BYTES, single
from services.io.service.registry import service

_CONDUCTANCES: Mapping[int, anisotropic_diffusion.Conductance] = {
    io_pb2.CONDUCTANCE_EXPONENTIAL: "exponential",
    io_pb2.CONDUCTANCE_RATIONAL: "rational",
}
#: Threads of filters that hold several copies of a brick each.
_MOST_THREADS = 4


def _sigma_voxels(request: io_pb2.FilterRequest, info: VolumeInfo) -> float:
    return request.sigma_angstrom / info.voxel_size_angstrom if request.HasField("sigma_angstrom") else 1.0


def _filter_needs(request: io_pb2.FilterRequest, reader: Reader) -> Needs:
    info = single(reader, request.volume_uri).info
    shape = info.shape
    match request.kind:
        case io_pb2.FILTER_KIND_BAND_PASS:
            needed = filtering.band_pass_memory_bytes(shape)
        case io_pb2.FILTER_KIND_MEDIAN:
            needed = median.memory_bytes(shape, request.radius_voxels, _MOST_THREADS)
        case io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION:
            needed = anisotropic_diffusion.memory_bytes(shape, request.iterations, _MOST_THREADS)
        case io_pb2.FILTER_KIND_NON_LOCAL_MEANS:
            patch, search = request.patch_radius_voxels, request.search_radius_voxels
            needed = non_local_means.memory_bytes(shape, patch, search, _MOST_THREADS)
        case io_pb2.FILTER_KIND_WAVELET:
            needed = wavelet.memory_bytes(shape, request.wavelet_levels, _MOST_THREADS)
        case _:
            needed = filtering.gaussian_memory_bytes(shape, _sigma_voxels(request, info))
    return Needs(BASE_BYTES + needed)


@service.operation(needs=_filter_needs)
def filter(request: io_pb2.FilterRequest, task: Task) -> io_pb2.FilterResult:  # noqa: A001  (the contract's name)
    """Take noise from a volume, or keep a band of its details."""
    volume = single(task, request.volume_uri)
    info = volume.info
    threads = min(task.threads, _MOST_THREADS)
    result = io_pb2.FilterResult()
    with task.volume_writer("volume.mrc", info) as writer:
        match request.kind:
            case io_pb2.FILTER_KIND_BAND_PASS:
                filtering.band_pass(
                    volume.slab,
                    info.shape,
                    info.voxel_size_angstrom,
                    request.low_pass_angstrom if request.HasField("low_pass_angstrom") else None,
                    request.high_pass_angstrom if request.HasField("high_pass_angstrom") else None,
                    writer.write,
                    task.progress,
                    task.threads,
                )
            case io_pb2.FILTER_KIND_MEDIAN:
                median.median(volume.slab, info.shape, request.radius_voxels, writer.write, task.progress, threads)
            case io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION:
                given = request.HasField("kappa")
                result.kappa = (
                    request.kappa if given else anisotropic_diffusion.estimated_kappa(volume.slab, info.shape)
                )
                anisotropic_diffusion.anisotropic_diffusion(
                    volume.slab,
                    info.shape,
                    result.kappa,
                    request.iterations,
                    request.time_step,
                    _CONDUCTANCES[request.conductance],
                    writer.write,
                    task.scratch,
                    task.progress,
                    threads,
                )
            case io_pb2.FILTER_KIND_NON_LOCAL_MEANS:
                result.noise_standard_deviation = _noise(request, volume.slab, info)
                non_local_means.non_local_means(
                    volume.slab,
                    info.shape,
                    result.noise_standard_deviation,
                    request.patch_radius_voxels,
                    request.search_radius_voxels,
                    request.strength,
                    writer.write,
                    task.progress,
                    threads,
                )
            case io_pb2.FILTER_KIND_WAVELET:
                result.noise_standard_deviation = _noise(request, volume.slab, info)
                wavelet.wavelet_shrinkage(
                    volume.slab,
                    info.shape,
                    request.noise_standard_deviation if request.HasField("noise_standard_deviation") else None,
                    request.wavelet_levels,
                    request.strength,
                    writer.write,
                    task.progress,
                    threads,
                )
            case _:
                filtering.gaussian(volume.slab, info.shape, _sigma_voxels(request, info), writer.write, task.progress)
    result.volume_uri = writer.uri
    return result


def _noise(request: io_pb2.FilterRequest, read: filtering.ReadSlab, info: VolumeInfo) -> float:
    if request.HasField("noise_standard_deviation"):
        return request.noise_standard_deviation
    return wavelet.noise_standard_deviation(read, info.shape)
