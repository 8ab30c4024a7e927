"""What tests of the alignment service put into its store."""

from __future__ import annotations

import struct

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.volumes import HEADER_BYTES, VolumeInfo, encode_volume, write_subtomograms

VOXEL = 12.0
BOX = 24
WEDGE = (-60.0, 60.0)
#: Boxes of tomograms of 6 Å that were binned by two.
BINNING = 2


def put_subtomograms(store: Store, name: str, boxes: NDArray[np.float32], wedge: tuple[float, float] = WEDGE) -> str:
    """Dark boxes, particles numbered from 100."""
    writer = ResultWriter(store, "default", name)
    info = VolumeInfo(boxes.shape[1:], VOXEL, "dark", *wedge)
    count = len(boxes)
    particles = Particles.from_positions(
        np.full((count, 3), 40.0), VOXEL / BINNING, "t", id=np.arange(100, 100 + count)
    )
    uri = write_subtomograms(writer, store, "boxes", -boxes, info, particles)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def put_file(store: Store, name: str, data: bytes) -> str:
    uri = f"{store.root}/default/inputs/{name}"
    store.put(uri, data)
    return uri


def put_volume(
    store: Store, name: str, volume: NDArray[np.floating], voxel_size_angstrom: float = VOXEL, contrast: str = "light"
) -> str:
    info = VolumeInfo(volume.shape, voxel_size_angstrom, contrast)
    return put_file(store, f"{name}.mrc", encode_volume(volume.astype(np.float32), info))


def put_unsound(store: Store, name: str, volume: NDArray[np.float32]) -> str:
    """A volume with a NaN in it, which no writer of ours would let pass."""
    data = bytearray(encode_volume(volume, VolumeInfo(volume.shape, VOXEL, "light")))
    data[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<f", float("nan"))
    return put_file(store, f"{name}.mrc", bytes(data))


def put_particles(store: Store, name: str, particles: Particles) -> str:
    return put_file(store, f"{name}.parquet", particles.to_parquet())


def posed(rotations: Rotation, shifts: NDArray[np.float64], ids: NDArray[np.int64] | None = None) -> Particles:
    """Particles of the subtomograms with these poses, shifts in voxels of the boxes; all from 100 on, or `ids`."""
    count = len(shifts)
    numbers = 100 + np.arange(count) if ids is None else ids
    table = Particles.from_positions(np.full((count, 3), 40.0), VOXEL / BINNING, "t", id=numbers)
    columns = {f"shift_{axis}": shifts[:, i] * BINNING for i, axis in enumerate("xyz")}
    return table.with_rotations(rotations).with_columns(**columns)


def particles_at(store: Store, uri: str) -> Particles:
    return Particles.from_parquet(store.get(uri))


async def refused(channel: grpc.aio.Channel, request: Message, status: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() == status, caught.value.details()
    for word in words:
        assert word in str(caught.value.details())
