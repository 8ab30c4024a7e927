"""Small pictures of picks, cut out of their tomogram by the platform."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from cryofleet.client import Client
from cryofleet.views.slices import Slices

PLANES = 3
"""A picture is the mean of so many."""
_PIXELS = 96
_LEAST_VOXELS = 8
_WHOLE_PIXELS = 128
_KEPT = 1000

Place = tuple[float, float, float]


def square_about(place: Place, side: int, columns: int, rows: int) -> tuple[int, int, int, int]:
    """First column, first row, columns and rows of a square around a place, moved inwards at the plane's rim."""
    wide, high = min(side, columns), min(side, rows)
    column = min(max(0, round(place[0]) - side // 2), columns - wide)
    row = min(max(0, round(place[1]) - side // 2), rows - high)
    return column, row, wide, high


class PickPictures:
    """Pictures of places in a volume; those seen lately are kept."""

    def __init__(self, client: Client) -> None:
        self._slices = Slices(client)
        self._kept: OrderedDict[tuple[str, int, Place], bytes] = OrderedDict()
        self._greys: tuple[str, tuple[float, float]] = ("", (0.0, 1.0))

    async def cut(self, volume: str, places: Sequence[Place], side_voxels: float) -> list[bytes]:
        """Around each place x, y, z in voxels a square perpendicular to the beam, all with the same greys.

        Raises the Failure that the platform answers with.
        """
        side = max(_LEAST_VOXELS, round(side_voxels))
        whole = await self._slices.cut(volume, "z", planes=PLANES, pixels=_WHOLE_PIXELS)
        if self._greys[0] != volume:
            self._greys = (volume, (whole.black_value, whole.white_value))

        async def one(place: Place) -> bytes:
            key = (volume, side, place)
            if key not in self._kept:
                z = min(max(0, round(place[2])), whole.size_z - 1)
                region = square_about(place, side, whole.size_x, whole.size_y)
                cut = await self._slices.cut(
                    volume, "z", z, planes=PLANES, region=region, pixels=_PIXELS, values=self._greys[1]
                )
                self._kept[key] = cut.picture
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key]

        return list(await asyncio.gather(*(one(place) for place in places)))
