"""Slices from the platform, and those seen lately kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from cryofleet.client import Client
from cryofleet.v1 import io_pb2

ValueT = TypeVar("ValueT")

_KEPT = 48
_CALLS = ThreadPoolExecutor(32, thread_name_prefix="views")
AXES = {"x": io_pb2.AXIS_X, "y": io_pb2.AXIS_Y, "z": io_pb2.AXIS_Z}


async def off_the_loop(function: Any, *arguments: Any, **named: Any) -> Any:
    """The result of a blocking call; meanwhile the page answers others."""
    return await asyncio.get_running_loop().run_in_executor(_CALLS, partial(function, *arguments, **named))


class Slices:
    """Cuts slices. A picture that was seen lately is not sent again where the volume is still the same."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seen: OrderedDict[bytes, io_pb2.CutSliceResponse] = OrderedDict()

    async def cut(
        self,
        uri: str,
        axis: str,
        position: int | None = None,
        *,
        planes: int = 1,
        region: tuple[int, int, int, int] | None = None,
        pixels: int = 512,
        percentiles: tuple[float, float] = (0.5, 99.5),
        values: tuple[float, float] | None = None,
        labels: bool = False,
        max_bytes: int = 0,
    ) -> io_pb2.CutSliceResponse:
        """A slice of a volume.

        Args:
            uri: of the volume.
            axis: x, y or z, that the slice is perpendicular to.
            position: in voxels along the axis; the middle where None.
            planes: the picture is the mean of so many.
            region: first column, first row, columns, rows in voxels; all where None.
            pixels: along the longer side, at most.
            percentiles: of the picture, that become black and white.
            values: of black and white, instead.
            labels: the volume holds labels.
            max_bytes: of the picture; the platform's own limit where 0.

        Raises the Failure that the platform answers with.
        """
        request = io_pb2.CutSliceRequest(
            volume_uri=uri,
            axis=AXES[axis],
            planes=planes,
            max_side_pixels=pixels,
            labels=labels,
            max_bytes=max_bytes,
            black_percentile=percentiles[0],
            white_percentile=percentiles[1],
        )
        if position is not None:
            request.position_voxels = position
        if values is not None:
            request.black_value, request.white_value = values
        if region is not None:
            column, row, columns, rows = region
            request.region.CopyFrom(io_pb2.SliceRegion(first_column=column, first_row=row, columns=columns, rows=rows))
        key = request.SerializeToString(deterministic=True)
        seen = self._seen.get(key)
        if seen is not None:
            request.known_etag = seen.etag
        response: io_pb2.CutSliceResponse = await off_the_loop(self._client.cut_slice, request)
        if response.unchanged and seen is not None:
            response = seen
        if response.picture:
            self._seen[key] = response
            self._seen.move_to_end(key)
            while len(self._seen) > _KEPT:
                self._seen.popitem(last=False)
        return response
