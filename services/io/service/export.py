"""Export: particles and volumes for other programs."""

from __future__ import annotations

import math

import numpy as np

from cryofleet.errors import FailedPrecondition
from cryofleet.formats import mrc, star
from cryofleet.formats.particles.csv import encode_csv, plainly_named
from cryofleet.formats.volumes import catalogue
from cryofleet.formats.volumes.frame import LAYER_BYTES, VolumeData, VolumeFrame
from cryofleet.particles import Particles, row_count
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.tomogram_names import plain_names
from cryofleet.v1 import io_pb2
from cryofleet.volumes import VolumeInfo
from services.io.service.inputs import BASE_BYTES, ROW_BYTES, single, slab_bytes
from services.io.service.registry import service

_CHUNK_BYTES = 2 << 20
_VOLUME_FORMATS = {
    io_pb2.EXPORT_FORMAT_MRC: ("mrc", "volume.mrc"),
    io_pb2.EXPORT_FORMAT_EM: ("em-volume", "volume.em"),
    io_pb2.EXPORT_FORMAT_HDF5: ("eman-hdf5", "volume.hdf"),
    io_pb2.EXPORT_FORMAT_OME_ZARR: ("ome-zarr", "volume.zarr.zip"),
    io_pb2.EXPORT_FORMAT_TIFF: ("tiff", "volume.tif"),
}
"""What each is called by `cryofleet.formats`, and its file's name."""


def _export_needs(request: io_pb2.ExportRequest, reader: Reader) -> Needs:
    if request.format in _VOLUME_FORMATS:
        shape = single(reader, request.volume_uri).info.shape
        # a pyramid is written in layers of chunks, held twice
        layer = 2 * LAYER_BYTES if request.format == io_pb2.EXPORT_FORMAT_OME_ZARR else 0
        return Needs(BASE_BYTES + slab_bytes(shape) + layer)
    rows = row_count(reader.open_blob(request.particles_uri), request.particles_uri)
    return Needs(BASE_BYTES + ROW_BYTES * rows)


@service.operation(needs=_export_needs)
def export(request: io_pb2.ExportRequest, task: Task) -> io_pb2.ExportResult:
    """Write particles or a volume for other programs."""
    if request.format in _VOLUME_FORMATS:
        return io_pb2.ExportResult(file_uri=_export_volume(request, task))
    particles = task.read_particles(request.particles_uri)
    task.progress(0.3, "writing", particles=float(len(particles)))
    if request.format == io_pb2.EXPORT_FORMAT_CSV:
        table, tomogram = plainly_named(particles)
        csv = encode_csv(table, tomogram, particles.voxel_size_angstrom)
        return io_pb2.ExportResult(file_uri=task.write_bytes("particles.csv", csv))
    info = single(task, request.volume_uri).info
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
        optics=_optics(request.optics) if request.HasField("optics") else None,
    )
    return io_pb2.ExportResult(file_uri=task.write_bytes("particles.star", text))


def _optics(said: io_pb2.Optics) -> star.Optics:
    return star.Optics(
        said.tilt_series_pixel_size_angstrom, said.voltage_kv, said.spherical_aberration_mm, said.amplitude_contrast
    )


def _export_volume(request: io_pb2.ExportRequest, task: Task) -> str:
    volume = single(task, request.volume_uri)
    format_name, name = _VOLUME_FORMATS[request.format]
    if format_name == "mrc" and request.mrc_mode == 2:
        # As it is stored.
        return task.write_bytes(name, volume.blob.stream())
    labels = mrc.parse_header(volume.blob.read(0, mrc.HEADER_BYTES), request.volume_uri).labels
    info = volume.info
    data = VolumeData(
        request.volume_uri.rpartition("/")[2],
        info.shape,
        volume.slab,
        VolumeFrame((info.voxel_size_angstrom,) * 3),
        labels=labels,
    )
    path = task.scratch / name
    mode = request.mrc_mode if format_name == "mrc" else 2
    catalogue.write(path, data, catalogue.by_name(format_name), mode, part(task.progress, 0, 0.9))
    with path.open("rb") as file:
        return task.write_bytes(name, iter(lambda: file.read(_CHUNK_BYTES), b""))


def _of_one_tomogram(particles: Particles, asked_name: str, uri: str) -> tuple[str, Particles]:
    """The name for the file and the rows of that tomogram, of a table that may have rows of several."""
    if "tomogram" not in particles.table:
        name = asked_name or plain_names([particles.tomogram])[particles.tomogram]
        if not name:
            raise FailedPrecondition(f"{uri} does not name its tomogram: give it with --set tomogram_name=...")
        return name, particles
    plain = plain_names(particles.table["tomogram"])
    names = list(plain.values())
    if len(names) == 1:
        return asked_name or names[0], particles
    if asked_name not in names:
        some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise FailedPrecondition(
            f"{uri} has particles of {len(names)} tomograms ({some}); "
            "name the one of volume_uri with --set tomogram_name=..."
        )
    return asked_name, particles.select((particles.table["tomogram"].map(plain) == asked_name).to_numpy())


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
