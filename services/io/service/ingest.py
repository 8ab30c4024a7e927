"""Ingest: a user's volume file becomes a tomogram."""

from __future__ import annotations

import math
import zlib

from cryofleet.artifacts import content_digest
from cryofleet.errors import Failure
from cryofleet.formats import mrc
from cryofleet.formats.volumes.catalogue import VolumeReader, open_volume
from cryofleet.formats.volumes.frame import LAYER_BYTES
from cryofleet.progress import part
from cryofleet.requests import CONTRASTS
from cryofleet.server import Needs, Reader, Task
from cryofleet.server.limits import check_volume_bytes
from cryofleet.tomogram_names import file_stem, unique_name
from cryofleet.v1 import io_pb2
from cryofleet.volumes import VolumeInfo, tomogram_of
from services.io import ingest as ingesting
from services.io.service.inputs import BASE_BYTES, slab_bytes
from services.io.service.registry import service

_NAN_POLICIES: dict[int, ingesting.NanPolicy] = {
    io_pb2.NAN_POLICY_REFUSE: "refuse",
    io_pb2.NAN_POLICY_FILL_MEAN: "fill_mean",
}


def _ingest_needs(request: io_pb2.IngestRequest, reader: Reader) -> Needs:
    blob = reader.open_blob(request.source_uri)
    head = blob.read(0, 64 << 10)
    packed = mrc.is_gzip(head)
    try:
        if packed:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, mrc.HEADER_BYTES)
        header = mrc.parse_header(head[: mrc.HEADER_BYTES], request.source_uri)
        # What a file cannot hold is found out, without much memory, when it is read.
        believed = header.file_bytes <= blob.size_bytes * (mrc.DEFLATE_LIMIT if packed else 1)
    except (Failure, zlib.error):
        believed = False
    if believed:
        voxels = math.prod(header.volume_shape)
        check_volume_bytes(request.source_uri, 4 * voxels, reader.max_volume_bytes)
        return Needs(BASE_BYTES + slab_bytes(header.volume_shape))
    # HDF5 and OME-Zarr are decoded in layers of many sections
    layered = head.startswith((b"\x89HDF", b"PK\x03\x04"))
    return Needs(BASE_BYTES + slab_bytes((1, 1, LAYER_BYTES // 4 if layered else 1)))


def _name(request: io_pb2.IngestRequest, task: Task, volume: VolumeReader) -> str:
    """A tomogram that was ingested before stays the one that it is, unless it is given another name."""
    former = tomogram_of(volume.data().labels)
    if former and request.name == file_stem(request.source_uri):
        return former
    return unique_name(request.name, content_digest(task.store, request.source_uri))


@service.operation(needs=_ingest_needs)
def ingest(request: io_pb2.IngestRequest, task: Task) -> io_pb2.IngestResult:
    """Check a user's volume file and keep it as a tomogram."""
    name = request.source_uri.rpartition("/")[2]
    path = task.local_copy(request.source_uri)
    _, volume = open_volume(path, name, task.scratch, part(task.progress, 0.0, 0.3))
    with volume:
        check_volume_bytes(request.source_uri, 4 * math.prod(volume.shape), task.max_volume_bytes)
        size = ingesting.voxel_size(volume, request.voxel_size_angstrom, request.overrule_voxel_size)
        info = VolumeInfo(
            volume.shape,
            size,
            CONTRASTS[request.contrast],
            request.tilt_min_degrees,
            request.tilt_max_degrees,
            tomogram=_name(request, task, volume),
        )
        measured = ingesting.measure(volume, _NAN_POLICIES[request.nan_policy], part(task.progress, 0.3, 0.6))
        with task.volume_writer("tomogram.mrc", info) as writer:
            ingesting.convert(volume, measured, writer.write, part(task.progress, 0.6, 1.0))
    found = measured.statistics
    return io_pb2.IngestResult(
        tomogram_uri=writer.uri,
        size_x=info.shape[2],
        size_y=info.shape[1],
        size_z=info.shape[0],
        voxel_size_angstrom=size,
        statistics=io_pb2.VolumeStatistics(
            mean=found.mean,
            standard_deviation=found.standard_deviation,
            minimum=found.minimum,
            maximum=found.maximum,
            non_finite_voxels=measured.non_finite_voxels,
        ),
    )
