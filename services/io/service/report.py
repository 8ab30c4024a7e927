"""Report: what a run found, on one page."""

from __future__ import annotations

from typing import cast

from cryofleet.artifacts import manifest_for
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles, row_count
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.storage import Store
from cryofleet.v1 import io_pb2
from cryofleet.volumes import Volume
from services.io import report as reporting
from services.io.picks import Picks
from services.io.report_tables import Figures
from services.io.service.inputs import BASE_BYTES, ROW_BYTES, single, slab_bytes
from services.io.service.picks import class_names
from services.io.service.registry import service

PNG_START = b"\x89PNG\r\n\x1a\n"
LARGEST_PICTURE_BYTES = 8 << 20


def _report_needs(request: io_pb2.ReportRequest, reader: Reader) -> Needs:
    needed = BASE_BYTES
    if request.tomogram_uri:
        needed += slab_bytes(single(reader, request.tomogram_uri).info.shape)
    for uri in (request.centres_uri, *request.average_uris):
        needed += 3 * reader.open_volume(uri).info.data_bytes if uri else 0
    # A JSON table as text and as Python's numbers.
    needed += 20 * reader.open_blob(request.embedding_uri).size_bytes if request.embedding_uri else 0
    # A picture as bytes and as text, and in the page.
    needed += 5 * sum(reader.open_blob(uri).size_bytes for uri in request.picture_uris)
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
        tomogram = single(task, request.tomogram_uri)
        size, thickness = tomogram.info.voxel_size_angstrom, request.particle_diameter_angstrom / 4
        view = reporting.central_slices(
            tomogram.slab, tomogram.info.shape, size, thickness, part(task.progress, 0, 0.4)
        )
    labels = _labels(task, request, view.shape) if view is not None and request.labels_uri else None
    sizes = [int(count) for count in request.cluster_sizes]
    averages = []
    for i, uri in enumerate(request.average_uris):
        volume = single(task, uri)
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
        [_drawn(task, uri) for uri in request.picture_uris],
    )
    return io_pb2.ReportResult(report_uri=task.write_bytes("report.html", page.encode()))


def _contrast(volume: Volume) -> reporting.Contrast:
    return cast(reporting.Contrast, volume.info.contrast)


def _cluster(particles: Particles) -> int | None:
    """The cluster, from 1, that all of the particles are of."""
    classes = set(particles.table["class_id"].tolist()) if "class_id" in particles.table else set()
    return int(min(classes)) + 1 if len(classes) == 1 and min(classes) >= 0 else None


def _particle_count(table: dict[str, object], otherwise: int | None) -> int | None:
    stated = table.get("particles")
    return stated if isinstance(stated, int) else otherwise


def _picks(task: Task, request: io_pb2.ReportRequest, voxel_size_angstrom: float) -> Picks:
    particles = task.read_particles(request.particles_uri)
    table = particles.table
    if "tomogram" in table and table["tomogram"].nunique() > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} has particles of {table['tomogram'].nunique()} tomograms; "
            "those of the one that is shown are needed"
        )
    # Voxel i of a binned volume lies at i times the binning.
    scale = particles.voxel_size_angstrom / voxel_size_angstrom
    places = (particles.positions() + particles.shifts()) * scale
    return Picks(places, request.particle_diameter_angstrom, class_names(particles))


def _centres(task: Task, uri: str, sizes: list[int]) -> list[reporting.Centre]:
    volume = task.open_volume(uri)
    boxes = volume.read().reshape(-1, *volume.info.shape)
    if len(sizes) > len(boxes):
        raise InvalidArgument(f"{len(sizes)} cluster_sizes for {len(boxes)} centres")
    contrast = _contrast(volume)
    return [reporting.Centre(box, contrast, sizes[i] if i < len(sizes) else None) for i, box in enumerate(boxes)]


def _labels(task: Task, request: io_pb2.ReportRequest, shape: tuple[int, int, int]) -> reporting.LabelView:
    volume = single(task, request.labels_uri)
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
        raise InvalidArgument(f"{uri} holds no codes: it must have x, y and cluster, from 1, centre_x and centre_y")
    return embedding


def _drawn(task: Task, uri: str) -> reporting.Drawn:
    blob = task.open_blob(uri)
    if blob.size_bytes > LARGEST_PICTURE_BYTES:
        raise InvalidArgument(
            f"{uri} has {blob.size_bytes} bytes; pictures on a page have {LARGEST_PICTURE_BYTES} at most"
        )
    data = blob.read()
    if not data.startswith(PNG_START):
        raise InvalidArgument(f"{uri} is no PNG picture")
    return reporting.Drawn(_origin(task.store, uri), data)


def _origin(store: Store, uri: str) -> str:
    """The operation that made a table; the file's name where none of ours did."""
    manifest = manifest_for(store, uri)
    return manifest.operation if manifest else uri.rpartition("/")[2]
