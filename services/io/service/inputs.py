"""What requests of several operations say, and what it needs."""

from __future__ import annotations

import math

from cryofleet.errors import FailedPrecondition
from cryofleet.server import Reader
from cryofleet.volumes import Volume
from services.io.ingest import SLAB_BYTES

BASE_BYTES = 64 << 20
"""Buffers of reading and writing artifacts, and small things."""
ROW_BYTES = 1500
"""A row of a particle table in memory, while it is decoded, converted and written as text."""
_SLAB_COPIES = 6


def single(reader: Reader, uri: str) -> Volume:
    """A volume that is no stack. Raises FailedPrecondition."""
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; one volume is needed")
    return volume


def slab_bytes(shape: tuple[int, int, int]) -> int:
    """Of the slabs that ingestion, export and report work on."""
    return _SLAB_COPIES * max(SLAB_BYTES, 4 * shape[1] * shape[2])


def finite(value: float) -> float | None:
    """The value as a JSON table takes it: None where there is none."""
    return value if math.isfinite(value) else None
