"""One slice of a volume on the screen: what the browser draws of it, and what it says of the user's hands."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import param
from panel.custom import JSComponent

_SERIALS = itertools.count()
Mark = tuple[int, float, float, float, str, float, bool]
"""A circle: id, column, row and radius in voxels, colour, opacity, whether dashed."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture by its place in the pane: main, second or labels."""

    name: str
    media_type: str
    data: bytes


@dataclass(frozen=True)
class Wanted:
    """A plane, a region of it (first column, first row, columns, rows; all where None), and in how many pixels."""

    position: int
    region: tuple[int, int, int, int] | None
    pixels: int


def frame(
    position: int,
    region: Sequence[int],
    pictures: Sequence[Picture],
    note: str = "",
    again: bool = False,
    answers: int = 0,
) -> bytes:
    """Pictures of one region of a plane as the pane takes them.

    `again` has it ask once more; `answers` is the number of its last stroke that is in them.
    """
    header = {
        # No two are the same: a value that does not change is not sent, and the pane would wait for it.
        "serial": next(_SERIALS),
        "position": position,
        "region": list(region),
        "images": [{"name": each.name, "type": each.media_type, "bytes": len(each.data)} for each in pictures],
        "note": note,
        "again": again,
        "answers": answers,
    }
    text = json.dumps(header).encode()
    return b"".join([struct.pack("<I", len(text)), text, *(each.data for each in pictures)])


class SlicePane(JSComponent):
    """A slice on a canvas. Its owner answers what it wants, and hears of clicks and keys."""

    axis: Any = param.Selector(default="z", objects=["x", "y", "z"], constant=True)
    columns = param.Integer(0)
    rows = param.Integer(0)
    count = param.Integer(1, doc="Planes along the axis.")
    voxel_size = param.Number(1.0, doc="In Å.")
    start = param.Integer(0, doc="The plane that it opens with.")
    version = param.Integer(0, doc="Raised where the same plane has to be drawn anew.")
    frame = param.Bytes(b"")
    marks = param.List([])
    cross = param.List([0.0, 0.0], doc="Column and row of the crosshair.")
    selected = param.Integer(-1, doc="The id of the mark that is selected; -1 for none.")
    wipe = param.Number(0.5, doc="The share of the width left of the second volume.")
    editable = param.Boolean(False)
    inverted = param.Boolean(False, doc="Low values bright.")
    brush = param.Dict({}, doc="Value, radius in voxels and colour that a drag paints, and by keys; empty: it moves.")
    painted = param.Bytes(b"", doc="A frame of what is painted on a plane.")
    paired = param.Boolean(False, doc="Whether another pane follows what it shows.")

    _esm = Path(__file__).with_name("slice_pane.js")
    _stylesheets = [Path(__file__).with_name("slice_pane.css").read_text()]  # noqa: RUF012

    def __init__(
        self,
        wanted: Callable[[SlicePane, Wanted], Awaitable[None]],
        told: Callable[[SlicePane, dict[str, Any]], None],
        **params: Any,
    ) -> None:
        super().__init__(**params)
        self._wanted, self._told = wanted, told
        self._seen = False

    def go(self, position: int) -> None:
        """Show another plane."""
        self.start = position
        self._send_msg({"type": "go", "position": position})

    def follow(self, view: dict[str, float]) -> None:
        """Show the part that another pane of the same size shows."""
        self._send_msg({"type": "view", "view": view})

    async def _handle_msg(self, data: Any) -> None:  # type: ignore[override]  # Panel awaits it
        if data.get("type") != "want":
            self._told(self, data)
            return
        region = data.get("region")
        position = min(max(0, int(data["position"])), self.count - 1)
        if not self._seen and position != self.start:
            # What a notebook's next cell said before the browser had the pane.
            self._send_msg({"type": "go", "position": self.start})
        self._seen = True
        self.start = position
        part = None
        if region:
            column, row, columns, rows = map(int, region)
            part = (column, row, columns, rows)
        await self._wanted(self, Wanted(position, part, int(data["pixels"])))
