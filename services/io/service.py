"""The io service: turns requests into calls of the methods, and what they give into artifacts; files up and down."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import zlib
from collections.abc import AsyncIterator
from typing import cast

import numpy as np

import cryofleet
from cryofleet.artifacts import Manifest, ResultWriter, complete, find, identity, manifest_for, open_blob
from cryofleet.errors import Cancelled, DataLoss, FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats import mrc, star
from cryofleet.formats.particles.csv import encode_csv
from cryofleet.formats.volume import open_volume_file
from cryofleet.particles import Particles, row_count
from cryofleet.progress import part
from cryofleet.requests import CONTRASTS
from cryofleet.server import CallContext, Needs, Reader, Service, Task
from cryofleet.server.limits import check_file_bytes, check_volume_bytes
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Stat, Store
from cryofleet.v1 import io_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.io import export as exporting
from services.io import filter as filtering
from services.io import ingest as ingesting
from services.io import report as reporting
from services.io import upload as uploading
from services.io.report_tables import Figures

service = Service(io_pb2.DESCRIPTOR.services_by_name["IoService"])

BASE_BYTES = 64 << 20
"""Buffers of reading and writing artifacts, and small things."""
ROW_BYTES = 1500
"""A row of a particle table in memory, while it is decoded, converted and written as text."""
_SLAB_COPIES = 6
_CHUNK_BYTES = 2 << 20
_LISTED_AT_ONCE = 256
_UPLOAD = "io.Upload"
_UPLOAD_VERSION = 1

_NAN_POLICIES: dict[int, ingesting.NanPolicy] = {
    io_pb2.NAN_POLICY_REFUSE: "refuse",
    io_pb2.NAN_POLICY_FILL_MEAN: "fill_mean",
}


def _single(reader: Reader, uri: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; one volume is needed")
    return volume


def _slab_bytes(shape: tuple[int, int, int]) -> int:
    """Of the slabs that ingestion, export and report work on."""
    return _SLAB_COPIES * max(ingesting.SLAB_BYTES, 4 * shape[1] * shape[2])


# --- Ingest --------------------------------------------------------------------------------------------------------


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
    return Needs(BASE_BYTES + _slab_bytes(header.volume_shape if believed else (1, 1, 1)))


@service.operation(needs=_ingest_needs)
def ingest(request: io_pb2.IngestRequest, task: Task) -> io_pb2.IngestResult:
    """Check a user's volume file and keep it as a tomogram."""
    name = request.source_uri.rpartition("/")[2]
    path = task.local_copy(request.source_uri)
    with open_volume_file(path, name, task.scratch, part(task.progress, 0.0, 0.3)) as volume:
        size = ingesting.voxel_size(
            volume, request.voxel_size_angstrom if request.HasField("voxel_size_angstrom") else None
        )
        info = VolumeInfo(
            volume.shape, size, CONTRASTS[request.contrast], request.tilt_min_degrees, request.tilt_max_degrees
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


# --- Filter --------------------------------------------------------------------------------------------------------


def _sigma_voxels(request: io_pb2.FilterRequest, info: VolumeInfo) -> float:
    return request.sigma_angstrom / info.voxel_size_angstrom if request.HasField("sigma_angstrom") else 1.0


def _filter_needs(request: io_pb2.FilterRequest, reader: Reader) -> Needs:
    info = _single(reader, request.volume_uri).info
    if request.kind == io_pb2.FILTER_KIND_BAND_PASS:
        return Needs(BASE_BYTES + filtering.band_pass_memory_bytes(info.shape))
    return Needs(BASE_BYTES + filtering.gaussian_memory_bytes(info.shape, _sigma_voxels(request, info)))


@service.operation(needs=_filter_needs)
def filter(request: io_pb2.FilterRequest, task: Task) -> io_pb2.FilterResult:  # noqa: A001  (the contract's name)
    """Smooth a volume, or keep a band of its details."""
    volume = _single(task, request.volume_uri)
    info = volume.info
    with task.volume_writer("volume.mrc", info) as writer:
        if request.kind == io_pb2.FILTER_KIND_BAND_PASS:
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
        else:
            filtering.gaussian(volume.slab, info.shape, _sigma_voxels(request, info), writer.write, task.progress)
    return io_pb2.FilterResult(volume_uri=writer.uri)


# --- Export --------------------------------------------------------------------------------------------------------


def _export_needs(request: io_pb2.ExportRequest, reader: Reader) -> Needs:
    if request.format == io_pb2.EXPORT_FORMAT_MRC:
        return Needs(BASE_BYTES + _slab_bytes(_single(reader, request.volume_uri).info.shape))
    rows = row_count(reader.open_blob(request.particles_uri), request.particles_uri)
    return Needs(BASE_BYTES + ROW_BYTES * rows)


@service.operation(needs=_export_needs)
def export(request: io_pb2.ExportRequest, task: Task) -> io_pb2.ExportResult:
    """Write particles or a volume for other programs."""
    if request.format == io_pb2.EXPORT_FORMAT_MRC:
        return io_pb2.ExportResult(file_uri=_export_mrc(request, task))
    particles = task.read_particles(request.particles_uri)
    task.progress(0.3, "writing", particles=float(len(particles)))
    if request.format == io_pb2.EXPORT_FORMAT_CSV:
        csv = encode_csv(particles.table, particles.tomogram, particles.voxel_size_angstrom)
        return io_pb2.ExportResult(file_uri=task.write_bytes("particles.csv", csv))
    info = _single(task, request.volume_uri).info
    name, particles = _of_one_tomogram(particles, request.tomogram_name, request.particles_uri)
    _check_same_frame(particles, info, request)
    table = particles.table
    text = star.encode_relion5_particles(
        name,
        info.shape,
        info.voxel_size_angstrom,
        particles.positions(),
        rotations=particles.rotations(),
        shifts=particles.shifts(),
        ids=table["id"].to_numpy(np.int64),
        scores=table["score"].to_numpy(np.float64) if "score" in table else None,
        # RELION counts classes from 1; what is in none is 0.
        class_numbers=np.maximum(table["class_id"].to_numpy(np.int64) + 1, 0) if "class_id" in table else None,
        random_subsets=table["half"].to_numpy(np.int64) if "half" in table else None,
    )
    return io_pb2.ExportResult(file_uri=task.write_bytes("particles.star", text))


def _export_mrc(request: io_pb2.ExportRequest, task: Task) -> str:
    volume = _single(task, request.volume_uri)
    if request.mrc_mode == 2:
        # As it is stored.
        return task.write_bytes("volume.mrc", volume.blob.stream())
    labels = mrc.parse_header(volume.blob.read(0, mrc.HEADER_BYTES), request.volume_uri).labels
    path = task.scratch / "export.mrc"
    info = volume.info
    exporting.write_mrc(
        path, volume.slab, info.shape, info.voxel_size_angstrom, request.mrc_mode, labels, part(task.progress, 0, 0.9)
    )
    with path.open("rb") as file:
        return task.write_bytes("volume.mrc", iter(lambda: file.read(_CHUNK_BYTES), b""))


def _of_one_tomogram(particles: Particles, asked_name: str, uri: str) -> tuple[str, Particles]:
    """The name for the file and the rows of that tomogram, of a table that may have rows of several."""
    if "tomogram" not in particles.table:
        name = asked_name or particles.tomogram
        if not name:
            raise FailedPrecondition(f"{uri} does not name its tomogram: give it with --set tomogram_name=...")
        return name, particles
    names = list(dict.fromkeys(particles.table["tomogram"]))
    if len(names) == 1:
        return asked_name or str(names[0]), particles
    if asked_name not in names:
        some = ", ".join(str(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
        raise FailedPrecondition(
            f"{uri} has particles of {len(names)} tomograms ({some}); "
            "name the one of volume_uri with --set tomogram_name=..."
        )
    return asked_name, particles.select((particles.table["tomogram"] == asked_name).to_numpy())


def _check_same_frame(particles: Particles, info: VolumeInfo, request: io_pb2.ExportRequest) -> None:
    if not math.isclose(particles.voxel_size_angstrom, info.voxel_size_angstrom, rel_tol=1e-3):
        raise FailedPrecondition(
            f"{request.particles_uri} counts in voxels of {particles.voxel_size_angstrom:g} Å, the tomogram "
            f"{request.volume_uri} has {info.voxel_size_angstrom:g} Å: give the tomogram that they were picked in"
        )
    if particles.tomogram_shape is not None and particles.tomogram_shape != info.shape:
        shapes = [" x ".join(map(str, shape[::-1])) for shape in (particles.tomogram_shape, info.shape)]
        raise FailedPrecondition(
            f"{request.particles_uri} is of a tomogram of {shapes[0]} voxels, {request.volume_uri} has {shapes[1]}: "
            "give the tomogram that they were picked in"
        )


# --- Report --------------------------------------------------------------------------------------------------------


def _report_needs(request: io_pb2.ReportRequest, reader: Reader) -> Needs:
    needed = BASE_BYTES
    if request.tomogram_uri:
        needed += _slab_bytes(_single(reader, request.tomogram_uri).info.shape)
    for uri in (request.centres_uri, *request.average_uris):
        needed += 3 * reader.open_volume(uri).info.data_bytes if uri else 0
    # A JSON table as text and as Python's numbers.
    needed += 20 * reader.open_blob(request.embedding_uri).size_bytes if request.embedding_uri else 0
    for uri in (request.particles_uri, *request.average_particles_uris):
        needed += ROW_BYTES * row_count(reader.open_blob(uri), uri) if uri else 0
    return Needs(needed)


@service.operation(needs=_report_needs)
def report(request: io_pb2.ReportRequest, task: Task) -> io_pb2.ReportResult:
    """Draw what a run found on one page."""
    if len(request.fsc_uris) > len(request.average_uris):
        raise InvalidArgument(f"{len(request.fsc_uris)} fsc_uris for {len(request.average_uris)} average_uris")
    if len(request.average_particles_uris) > len(request.average_uris):
        raise InvalidArgument(
            f"{len(request.average_particles_uris)} average_particles_uris for {len(request.average_uris)} average_uris"
        )
    view, size = None, 1.0
    if request.tomogram_uri:
        tomogram = _single(task, request.tomogram_uri)
        size, thickness = tomogram.info.voxel_size_angstrom, request.particle_diameter_angstrom / 4
        view = reporting.central_slices(
            tomogram.slab, tomogram.info.shape, size, thickness, part(task.progress, 0, 0.4)
        )
    labels = _labels(task, request, view.shape) if view is not None and request.labels_uri else None
    sizes = [int(count) for count in request.cluster_sizes]
    averages = []
    for i, uri in enumerate(request.average_uris):
        volume = _single(task, uri)
        table = task.read_table(request.fsc_uris[i]) if i < len(request.fsc_uris) else {}
        count, cluster = sizes[i] if i < len(sizes) else None, None
        if i < len(request.average_particles_uris):
            # Not by its place: clusters before it may have no average.
            particles = task.read_particles(request.average_particles_uris[i])
            count, cluster = len(particles), _cluster(particles)
        averages.append(
            reporting.Average(
                volume.read(),
                _contrast(volume),
                volume.info.voxel_size_angstrom,
                _particle_count(table, count),
                reporting.fsc_curve(table, volume.info.voxel_size_angstrom),
                cluster,
            )
        )
    task.progress(0.8, "drawing")
    page = reporting.build(
        request.title,
        view,
        _picks(task, request, size) if request.particles_uri else None,
        _centres(task, request.centres_uri, sizes) if request.centres_uri else (),
        averages,
        [Figures(_origin(task.store, uri), task.read_table(uri)) for uri in request.metrics_uris],
        labels,
        _embedding(task, request.embedding_uri) if request.embedding_uri else None,
    )
    return io_pb2.ReportResult(report_uri=task.write_bytes("report.html", page.encode()))


def _contrast(volume: Volume) -> reporting.Contrast:
    return cast(reporting.Contrast, volume.info.contrast)


def _cluster(particles: Particles) -> int | None:
    """The cluster, from 0, that all of the particles are of."""
    classes = set(particles.table["class_id"].tolist()) if "class_id" in particles.table else set()
    return int(min(classes)) if len(classes) == 1 and min(classes) >= 0 else None


def _particle_count(table: dict[str, object], otherwise: int | None) -> int | None:
    stated = table.get("particles")
    return stated if isinstance(stated, int) else otherwise


def _picks(task: Task, request: io_pb2.ReportRequest, voxel_size_angstrom: float) -> reporting.Picks:
    particles = task.read_particles(request.particles_uri)
    table = particles.table
    if "tomogram" in table and table["tomogram"].nunique() > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} has particles of {table['tomogram'].nunique()} tomograms; "
            "those of the one that is shown are needed"
        )
    classes: list[str] | None = None
    if "class_name" in table and any(table["class_name"]):
        classes = [str(name) or "no class" for name in table["class_name"]]
    elif "class_id" in table:
        classes = [f"class {number}" if number >= 0 else "no class" for number in table["class_id"]]
    # Voxel i of a binned volume lies at i times the binning.
    scale = particles.voxel_size_angstrom / voxel_size_angstrom
    places = (particles.positions() + particles.shifts()) * scale
    return reporting.Picks(places, request.particle_diameter_angstrom, classes)


def _centres(task: Task, uri: str, sizes: list[int]) -> list[reporting.Centre]:
    volume = task.open_volume(uri)
    boxes = volume.read().reshape(-1, *volume.info.shape)
    if len(sizes) > len(boxes):
        raise InvalidArgument(f"{len(sizes)} cluster_sizes for {len(boxes)} centres")
    contrast = _contrast(volume)
    return [reporting.Centre(box, contrast, sizes[i] if i < len(sizes) else None) for i, box in enumerate(boxes)]


def _labels(task: Task, request: io_pb2.ReportRequest, shape: tuple[int, int, int]) -> reporting.LabelView:
    volume = _single(task, request.labels_uri)
    if volume.info.shape != shape:
        raise FailedPrecondition(
            f"{request.labels_uri} has {volume.info.shape} voxels (z, y, x), {request.tomogram_uri} has {shape}: "
            "give the labels of the tomogram that is shown"
        )
    try:
        return reporting.central_labels(volume.slab, shape, list(request.label_names), part(task.progress, 0.4, 0.7))
    except InvalidArgument as error:
        raise InvalidArgument(f"{request.labels_uri}: {error}") from None


def _embedding(task: Task, uri: str) -> reporting.Embedding:
    embedding = reporting.embedding_of(task.read_table(uri))
    if embedding is None:
        raise InvalidArgument(f"{uri} holds no codes: it must have x, y and cluster, centre_x and centre_y")
    return embedding


def _origin(store: Store, uri: str) -> str:
    """The operation that made a table; the file's name where none of ours did."""
    manifest = manifest_for(store, uri)
    return manifest.operation if manifest else uri.rpartition("/")[2]


# --- Files up and down ---------------------------------------------------------------------------------------------


@service.rpc("Upload")
async def upload(requests: AsyncIterator[io_pb2.UploadRequest], call: CallContext) -> io_pb2.UploadResponse:
    """Store a file as a result of its own, whose identity is its name and content.

    A header alone asks whether the store has the file: `present` is false, and there is no URI, where it has not.
    """
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgument("the first message of an upload must be its header")
    header = first.header
    check_file_bytes(header.name, header.size_bytes, call.settings.max_volume_bytes)
    store = call.store_of(header.context)
    project = header.context.project or DEFAULT_PROJECT
    name = uploading.safe_name(header.name)
    parameters = {"name": name, "size_bytes": header.size_bytes, "digest": header.digest}
    key = identity(_UPLOAD, _UPLOAD_VERSION, parameters, {})
    manifest = await call.in_thread(_finished, store, project, key)
    if manifest is not None:
        return io_pb2.UploadResponse(uri=f"{manifest.uri}/{name}", present=True)
    message = await anext(requests, None)
    if message is None and header.size_bytes:
        return io_pb2.UploadResponse(present=False)

    await call.in_thread(_check_space, call, project, header.size_bytes)
    feed = uploading.Feed(header.name, header.size_bytes)
    storing = asyncio.create_task(
        call.in_thread(_store_upload, store, project, key, parameters, feed, call.instance.name)
    )

    def stored(done: asyncio.Task[str]) -> None:
        feed.close()
        if not done.cancelled():
            done.exception()  # seen here, should the caller have left meanwhile

    storing.add_done_callback(stored)
    failure: Failure | None = Cancelled(f"{header.name}: the upload was broken off")
    try:
        while message is not None:
            if message.WhichOneof("part") != "chunk":
                raise InvalidArgument(f"{header.name}: a second header came where bytes were expected")
            if not await feed.send(message.chunk):
                break
            message = await anext(requests, None)
        failure = None
    finally:
        feed.end(failure)
    uri = await asyncio.shield(storing)
    call.instance.quotas.count(project, header.size_bytes)
    return io_pb2.UploadResponse(uri=uri, present=False)


def _check_space(call: CallContext, project: str, size_bytes: int) -> None:
    call.instance.quotas.check(project, size_bytes)
    call.store.check_space(size_bytes)


def _finished(store: Store, project: str, key: str) -> Manifest | None:
    try:
        manifest = find(store, project, key)
    except DataLoss:
        return None  # what is damaged is written anew
    return manifest if manifest is not None and complete(store, manifest) else None


def _store_upload(
    store: Store, project: str, key: str, parameters: dict[str, str | int], feed: uploading.Feed, host: str
) -> str:
    """Writes the bytes and, if they are those announced, the manifest, without which they count for nothing."""
    started = time.monotonic()
    writer = ResultWriter(store, project, key)
    name = str(parameters["name"])
    try:
        uri = writer.put(name, feed)
        digest = writer.entry(name)["digest"]
        if digest != parameters["digest"]:
            raise InvalidArgument(
                f"{name}: the bytes that came have digest {digest}, announced was {parameters['digest']}"
            )
        writer.commit(
            operation=_UPLOAD,
            version=_UPLOAD_VERSION,
            parameters=parameters,
            inputs={},
            result={"uri": uri},
            seconds=time.monotonic() - started,
            device="cpu",
            software=f"cryofleet {cryofleet.__version__}",
            host=host,
        )
    except BaseException:
        writer.discard()
        raise
    return uri


@service.rpc("Download")
async def download(request: io_pb2.DownloadRequest, call: CallContext) -> AsyncIterator[io_pb2.DownloadResponse]:
    """Stream an object, or a range of it, each piece verified before it leaves."""
    blob = await call.in_thread(open_blob, call.store_of(request.context), request.uri)
    if request.offset_bytes > blob.size_bytes:
        raise InvalidArgument(f"offset_bytes is {request.offset_bytes}; {request.uri} has {blob.size_bytes} bytes")
    length = request.length_bytes or None
    pieces = blob.stream(request.offset_bytes, length)
    sent = False
    while piece := await call.in_thread(next, pieces, b""):
        for start in range(0, len(piece), _CHUNK_BYTES):
            yield io_pb2.DownloadResponse(size_bytes=blob.size_bytes, chunk=piece[start : start + _CHUNK_BYTES])
            sent = True
    if not sent:
        yield io_pb2.DownloadResponse(size_bytes=blob.size_bytes)


@service.rpc("List")
async def list_objects(request: io_pb2.ListRequest, call: CallContext) -> AsyncIterator[io_pb2.ListResponse]:
    """Name the objects under a URI, in order."""
    found = call.store_of(request.context).list(request.uri)

    def some() -> list[Stat]:
        return list(itertools.islice(found, _LISTED_AT_ONCE))

    while listed := await call.in_thread(some):
        for each in listed:
            yield io_pb2.ListResponse(uri=each.uri, size_bytes=each.size_bytes)
