"""CutSlice: one slice of a stored volume for a screen.

Planes perpendicular to z are read from the object itself, a byte range each. For those perpendicular to x and y a
volume is first copied into cubes on this instance's disk, once, and the caller told how far that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from cryofleet.errors import Cancelled, FailedPrecondition, Failure, InvalidArgument, ResourceExhausted
from cryofleet.server import CallContext
from cryofleet.server.instance import Instance
from cryofleet.space import check_free
from cryofleet.v1 import common_pb2, io_pb2
from cryofleet.volumes import Volume
from services.io import cubes, figures, screen
from services.io.cubes import Cubes
from services.io.screen import Region
from services.io.service.inputs import single
from services.io.service.registry import service
from services.io.service.sound import sound
from services.io.slices import Axis, side

logger = logging.getLogger(__name__)

VERSION = 2
"""Raised when the same request would give another picture."""
_AXES: dict[int, Axis] = {0: "z", io_pb2.AXIS_X: "x", io_pb2.AXIS_Y: "y", io_pb2.AXIS_Z: "z"}
_MAX_PLANE_BYTES = 64 << 20
_CUTS_AT_ONCE, _OPENED, _COPIES = 4, 8, 4
_MAX_SIDE, _MAX_BYTES = 512, 110_000
_BLACK, _WHITE = 0.5, 99.5


@dataclass
class _Copy:
    """A volume's copy in cubes, being made or made."""

    path: Path
    fraction: float = 0.0
    cubes: Cubes | None = None
    failure: Failure | None = None


@dataclass
class Viewing:
    """What an instance keeps for those who look: volumes that were opened, and copies of volumes in cubes."""

    instance: Instance
    cutting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CUTS_AT_ONCE))
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    one_copy: threading.Lock = field(default_factory=threading.Lock)
    volumes: OrderedDict[tuple[str, str, str], Volume] = field(default_factory=OrderedDict)
    copies: OrderedDict[str, _Copy] = field(default_factory=OrderedDict)

    def volume(self, call: CallContext, request: io_pb2.CutSliceRequest) -> tuple[Volume, str]:
        """The volume as the request's project may read it, and what stands for its content."""
        reader = call.reader(request.context)
        # Whether it is there and may be read is asked each time.
        stat = reader.store.stat(request.volume_uri)
        version = stat.version or f"{stat.size_bytes}-{stat.modified}"
        key = (reader.project, stat.uri, version)
        with self.lock:
            volume = self.volumes.get(key)
        if volume is None:
            volume = single(reader, request.volume_uri)
            if volume.info.plane_bytes > _MAX_PLANE_BYTES:
                rows, columns = volume.info.shape[1:]
                raise FailedPrecondition(
                    f"{request.volume_uri}: planes of {columns} x {rows} voxels are too large to be shown, 4096 x 4096 "
                    "are not: bin it with io.Rescale"
                )
            # Another version of the object would be another volume here.
            volume.blob.verify_once()
        with self.lock:
            self.volumes[key] = volume
            self.volumes.move_to_end(key)
            while len(self.volumes) > _OPENED:
                self.volumes.popitem(last=False)
        return volume, volume.blob.digest or f"{stat.uri} {version}"

    def cubes_of(self, volume: Volume, content: str) -> Cubes | float:
        """The volume's copy, or how much of it is made. Raises what making it failed with, once."""
        with self.lock:
            copy = self.copies.get(content)
            if copy is None:
                if sum(each.cubes is None for each in self.copies.values()) >= _COPIES:
                    raise ResourceExhausted("other volumes are being arranged for viewing; come back in a minute")
                self._forget_oldest(_COPIES - 1)
                check_free(self.instance.scratch.folder, cubes.file_bytes(volume.info.shape), self._reserve_bytes)
                copy = self.copies[content] = _Copy(self.instance.scratch.new_folder() / "cubes")
                threading.Thread(target=self._make, args=(copy, volume), name="cubes", daemon=True).start()
            self.copies.move_to_end(content)
            if copy.failure is not None:
                del self.copies[content]
                raise copy.failure
            if copy.cubes is None:
                return copy.fraction
            return copy.cubes

    @property
    def _reserve_bytes(self) -> int:
        return self.instance.settings.reserve_bytes

    def _forget_oldest(self, kept: int) -> None:
        made = [key for key, copy in self.copies.items() if copy.cubes is not None]
        for key in made[: max(0, len(made) - kept)]:
            # Whoever still reads it has it open; the disk is free when they have done.
            self.copies.pop(key).path.unlink(missing_ok=True)

    def _make(self, copy: _Copy, volume: Volume) -> None:
        def progress(fraction: float, phase: str = "", **counters: float) -> None:
            copy.fraction = fraction
            if self.stopping.is_set():
                raise Cancelled("the instance is stopping")

        try:
            with self.one_copy:
                cubes.make(
                    lambda first, last: sound(volume.slab(first, last), volume.uri),
                    volume.info.shape,
                    copy.path,
                    progress,
                )
            copy.cubes = Cubes(copy.path, volume.info.shape)
        except Failure as failure:
            copy.failure = failure
        except Exception as error:
            logger.exception("%s: cannot be arranged for viewing", volume.uri)
            copy.failure = FailedPrecondition(f"{volume.uri}: cannot be arranged for viewing: {type(error).__name__}")
        if copy.failure is not None:
            copy.path.unlink(missing_ok=True)


_viewing: dict[Instance, Viewing] = {}


@contextlib.asynccontextmanager
async def _lifespan(instance: Instance) -> AsyncIterator[None]:
    _viewing[instance] = Viewing(instance)
    try:
        yield
    finally:
        _viewing.pop(instance).stopping.set()


service.lifespan = _lifespan


@service.rpc("CutSlice")
async def cut_slice(request: io_pb2.CutSliceRequest, call: CallContext) -> io_pb2.CutSliceResponse:
    """Cut a slice, unless the caller has it or the volume is not yet arranged for it."""
    viewing = _viewing[call.instance]
    async with viewing.cutting:
        return await call.in_thread(_cut, viewing, request, call)


def _cut(viewing: Viewing, request: io_pb2.CutSliceRequest, call: CallContext) -> io_pb2.CutSliceResponse:
    volume, content = viewing.volume(call, request)
    info, axis = volume.info, _AXES[request.axis]
    depth, height, width = info.shape
    position = _position(request, axis, info.shape)
    region = _region(request, axis, info.shape)
    response = io_pb2.CutSliceResponse(
        etag=_etag(request, content),
        position_voxels=position,
        region=io_pb2.SliceRegion(
            first_column=region.first_column, first_row=region.first_row, columns=region.columns, rows=region.rows
        ),
        size_x=width,
        size_y=height,
        size_z=depth,
        voxel_size_angstrom=info.voxel_size_angstrom,
        contrast=common_pb2.CONTRAST_DARK if info.contrast == "dark" else common_pb2.CONTRAST_LIGHT,
        tomogram=info.tomogram or (f"tomogram-{volume.blob.digest[:12]}" if volume.blob.digest else ""),
    )
    if request.known_etag == response.etag:
        response.unchanged = True
        return response
    source: Volume | Cubes = volume
    if axis != "z":
        found = viewing.cubes_of(volume, content)
        if isinstance(found, float):
            response.preparing_fraction = found
            return response
        source = found
    longest, most = request.max_side_pixels or _MAX_SIDE, request.max_bytes or _MAX_BYTES
    if request.labels:
        plane = region.of(_plane(source, axis, position, volume.uri))
        response.picture = screen.labels_png(plane, longest, most, volume.uri)
        response.media_type = "image/png"
        return response
    before = (max(1, request.planes) - 1) // 2
    first = max(0, position - before)
    last = min(side(info.shape, axis), first + max(1, request.planes))
    total = region.of(_plane(source, axis, first, volume.uri))
    for other in range(first + 1, last):
        total = total + region.of(_plane(source, axis, other, volume.uri))
    picture = screen.shrunk(total, longest) / np.float32(last - first)
    if request.HasField("black_value"):
        black, white = request.black_value, request.white_value
    else:
        black_percentile = request.black_percentile if request.HasField("black_percentile") else _BLACK
        white_percentile = request.white_percentile if request.HasField("white_percentile") else _WHITE
        black, white = screen.limits(picture, black_percentile, white_percentile)
    response.black_value, response.white_value = black, white
    response.picture = screen.jpeg(figures.grey(picture, black, white), most)
    response.media_type = "image/jpeg"
    return response


def _plane(source: Volume | Cubes, axis: Axis, position: int, uri: str) -> NDArray[np.float32]:
    if isinstance(source, Cubes):
        assert axis != "z"
        return source.plane(axis, position)
    return sound(source.slab(position, position + 1)[0], uri)


def _position(request: io_pb2.CutSliceRequest, axis: Axis, shape: tuple[int, int, int]) -> int:
    count = side(shape, axis)
    position = request.position_voxels if request.HasField("position_voxels") else count // 2
    if position >= count:
        raise InvalidArgument(
            f"position_voxels: {position} is not in {request.volume_uri}, which has {count} voxels along {axis}"
        )
    return position


def _region(request: io_pb2.CutSliceRequest, axis: Axis, shape: tuple[int, int, int]) -> Region:
    rows, columns = (length for name, length in zip("zyx", shape, strict=True) if name != axis)
    if not request.HasField("region"):
        return Region(0, 0, rows, columns)
    asked = request.region
    if asked.first_row + asked.rows > rows or asked.first_column + asked.columns > columns:
        raise InvalidArgument(
            f"region: {asked.columns} columns from {asked.first_column} and {asked.rows} rows from {asked.first_row} "
            f"are not in a slice of {columns} columns and {rows} rows"
        )
    return Region(asked.first_row, asked.first_column, asked.rows, asked.columns)


def _etag(request: io_pb2.CutSliceRequest, content: str) -> str:
    asked = json_format.MessageToDict(request)
    for name in ("knownEtag", "context", "volumeUri"):
        asked.pop(name, None)
    text = json.dumps([VERSION, content, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
