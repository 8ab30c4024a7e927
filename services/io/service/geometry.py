"""Rescale, Crop and Rotate: volumes on another grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import io_pb2
from cryofleet.volumes import VolumeInfo
from services.io import rescale as rescaling
from services.io import rotate as rotating
from services.io.ingest import SLAB_BYTES
from services.io.service.inputs import BASE_BYTES, single, slab_bytes
from services.io.service.registry import service


def _factor(request: io_pb2.RescaleRequest, info: VolumeInfo) -> float:
    if request.HasField("factor"):
        return request.factor
    factor = request.voxel_size_angstrom / info.voxel_size_angstrom
    if not 0.125 <= factor <= 64:
        raise InvalidArgument(
            f"voxel_size_angstrom is {request.voxel_size_angstrom:g}; {request.volume_uri} has voxels of "
            f"{info.voxel_size_angstrom:g} Å: from an eighth of that to 64 times is possible"
        )
    return factor


def _rescale_needs(request: io_pb2.RescaleRequest, reader: Reader) -> Needs:
    info = single(reader, request.volume_uri).info
    return Needs(BASE_BYTES + rescaling.memory_bytes(info.shape, _factor(request, info)))


@service.operation(needs=_rescale_needs)
def rescale(request: io_pb2.RescaleRequest, task: Task) -> io_pb2.RescaleResult:
    """Bin a volume by a factor or to a voxel size."""
    volume = single(task, request.volume_uri)
    info = volume.info
    factor = _factor(request, info)
    made = replace(
        info,
        shape=rescaling.rescaled_shape(info.shape, factor),
        voxel_size_angstrom=info.voxel_size_angstrom * factor,
    )
    with task.volume_writer("volume.mrc", made) as writer:
        rescaling.rescale(volume.slab, info.shape, factor, writer.write, task.scratch, task.progress)
    depth, height, width = made.shape
    return io_pb2.RescaleResult(
        volume_uri=writer.uri,
        size_x=width,
        size_y=height,
        size_z=depth,
        voxel_size_angstrom=made.voxel_size_angstrom,
        factor=factor,
    )


def _crop_needs(request: io_pb2.CropRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + slab_bytes(single(reader, request.volume_uri).info.shape))


def _kept(request: io_pb2.CropRequest, axis: str, side: int) -> slice:
    first: int = getattr(request, f"first_{axis}")
    # The least size is 1, so that 0 says that it was left out.
    size: int = getattr(request, f"size_{axis}") or side - first
    if first + size > side or size < 1:
        raise InvalidArgument(
            f"first_{axis} is {first}, size_{axis} {size}: {request.volume_uri} has {side} voxels along {axis}"
        )
    return slice(first, first + size)


@service.operation(needs=_crop_needs)
def crop(request: io_pb2.CropRequest, task: Task) -> io_pb2.CropResult:
    """Cut a box out of a volume."""
    volume = single(task, request.volume_uri)
    info = volume.info
    z, y, x = (_kept(request, axis, side) for axis, side in zip("zyx", info.shape, strict=True))
    shape = (z.stop - z.start, y.stop - y.start, x.stop - x.start)
    step = max(1, SLAB_BYTES // (4 * info.shape[1] * info.shape[2]))
    # other coordinates: particles in it are not the tomogram's
    with task.volume_writer("volume.mrc", replace(info, shape=shape, tomogram="")) as writer:
        for start in range(z.start, z.stop, step):
            stop = min(start + step, z.stop)
            writer.write(volume.slab(start, stop)[:, y, x])
            task.progress((stop - z.start) / shape[0], "cutting")
    return io_pb2.CropResult(volume_uri=writer.uri, size_x=shape[2], size_y=shape[1], size_z=shape[0])


def _rotation(request: io_pb2.RotateRequest) -> Rotation:
    if request.HasField("angle_degrees"):
        axis = np.array([request.axis_x, request.axis_y, request.axis_z])
        length = float(np.linalg.norm(axis))
        if not length > 0:
            raise InvalidArgument("axis_x, axis_y and axis_z are all 0: that is no axis")
        return Rotation.from_rotvec(axis / length * np.radians(request.angle_degrees))
    quaternion = np.array([request.qx, request.qy, request.qz, request.qw])
    length = float(np.linalg.norm(quaternion))
    if abs(length - 1) > 1e-3:
        raise InvalidArgument(f"qx, qy, qz, qw: a quaternion of length {length:g}; a rotation's is 1")
    return Rotation.from_quat(quaternion)


def _rotate_needs(request: io_pb2.RotateRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + rotating.memory_bytes(single(reader, request.volume_uri).info.shape))


@service.operation(needs=_rotate_needs)
def rotate(request: io_pb2.RotateRequest, task: Task) -> io_pb2.RotateResult:
    """Turn a volume about its centre."""
    volume = single(task, request.volume_uri)
    info = volume.info
    rotation = _rotation(request)
    tilts = rotating.rotated_tilt_range(info.tilt_min_degrees, info.tilt_max_degrees, rotation)
    low, high = tilts or (-90.0, 90.0)
    made = replace(info, tilt_min_degrees=low, tilt_max_degrees=high, tomogram="")
    with task.volume_writer("volume.mrc", made) as writer:
        order: rotating.Order = 3 if request.spline_order == 3 else 1 if request.spline_order == 1 else 0
        rotating.rotate(volume.slab, info.shape, rotation, order, writer.write, task.scratch, task.progress)
    return io_pb2.RotateResult(volume_uri=writer.uri, tilt_range_known=tilts is not None)
