"""Many small pictures in a grid, to choose among: what is not looked at is not fetched."""

from __future__ import annotations

import io
import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param
from numpy.typing import NDArray
from panel.custom import JSComponent
from PIL import Image

from cryofleet.errors import Failure
from cryofleet.views.slice_pane import Picture, frame

Key = int | str
SmallPicture = bytes | NDArray[np.uint8]
"""An encoded PNG or JPEG, or grey values (rows, columns)."""
PER_PAGE = 60
AT_ONCE = 16
"""Pictures in one answer to the browser, at most."""
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_SERIALS = itertools.count()


@dataclass(frozen=True)
class Item:
    """One picture of the gallery: its key, two lines of plain text below it, and the colour of its second line's mark,
    if any.
    """

    key: Key
    title: str
    note: str = ""
    colour: str = ""


class Gallery(pn.viewable.Viewer):
    """Pictures in pages that scroll. Only those that come into sight are asked for.

    A click or space chooses one or lets it go, Shift with either all since the last; arrows go from one to the next,
    Page Up and Page Down from page to page; `a` chooses all, Escape none.
    """

    selected = param.List([], doc="Keys of those that are chosen, in the order of the items.")
    page = param.Integer(0, bounds=(0, None), doc="From 0.")
    problem = param.String("", doc="What the platform answered last, where that was no picture.")

    def __init__(
        self,
        pictures: Callable[[Sequence[Key]], Awaitable[Sequence[SmallPicture]]],
        *,
        label: str,
        side: int = 96,
        per_page: int = PER_PAGE,
        **params: Any,
    ) -> None:
        """Show nothing yet.

        Args:
            pictures: gives the pictures of the items of some keys, in their order; may raise a Failure, which is shown.
            label: what the gallery is called where it is read aloud.
            side: of a picture on the screen, in CSS pixels.
            per_page: items on a page.
            params: what the gallery's own parameters are at first.
        """
        self._pictures = pictures
        self._per_page = per_page
        self._items: list[Item] = []
        self._place: dict[Key, int] = {}
        self._anchor = 0
        self._from_behind = False
        self.on_key: Callable[[str, Key], None] | None = None
        """Hears of further keys, with the item that has the focus; of Enter and a double click as Enter."""
        self.on_failure: Callable[[Failure], None] | None = None
        self._sheet = Sheet(self._told, label=label, side=side, sizing_mode="stretch_both", min_height=180)
        super().__init__(**params)

    def __panel__(self) -> pn.viewable.Viewable:
        return self._sheet

    @property
    def items(self) -> Sequence[Item]:
        """All of them, in order."""
        return self._items

    def fill(self, items: Iterable[Item]) -> None:
        """Other items, from the first page on. What was chosen and is still there stays chosen."""
        self._items = list(items)
        self._place = {item.key: place for place, item in enumerate(self._items)}
        self._anchor = 0
        kept = [key for key in self.selected if key in self._place]
        self.selected = self._ordered(kept)
        if self.page:
            self.page = 0
        else:
            self._lay_out(0)

    def retitle(self, items: Iterable[Item]) -> None:
        """Other texts and colours for items that are there; pictures, page and choice stay."""
        for item in items:
            self._items[self._place[item.key]] = item
        self._sheet.captions = self._captions()

    def choose(self, keys: Iterable[Key], more: bool = False) -> None:
        """Choose those of the keys that there are, and `more`: beside those that are chosen already."""
        wanted = {key for key in keys if key in self._place}
        self.selected = self._ordered(wanted | set(self.selected) if more else wanted)

    # What the browser tells

    async def _told(self, said: dict[str, Any]) -> None:
        kind = said.get("type")
        if kind == "want":
            await self._answer([int(place) for place in said["places"]][:AT_ONCE], int(said["serial"]))
            return
        if kind == "all":
            self.selected = [item.key for item in self._items]
        elif kind == "none":
            self.selected = []
        elif kind == "page":
            self._from_behind = bool(said.get("end"))
            self.page = min(max(0, int(said["page"])), self._last_page)
        else:
            place = int(said["place"])
            if not 0 <= place < len(self._items):
                return  # of a page that has changed meanwhile
            key = self._items[place].key
            if kind == "choose":
                among = set(self.selected)
                self.choose(among - {key} if key in among else among | {key})
                self._anchor = place
            elif kind == "range":
                first, last = sorted((min(self._anchor, len(self._items) - 1), place))
                self.choose((item.key for item in self._items[first : last + 1]), more=True)
            elif kind == "key" and self.on_key is not None:
                self.on_key(str(said["key"]), key)

    async def _answer(self, places: Sequence[int], serial: int) -> None:
        """The pictures at `places` of the items; also where there are none, so that the browser does not wait."""
        there = [place for place in places if 0 <= place < len(self._items)]
        note, again = "", False
        sent: list[Picture] = []
        try:
            pictures = await self._pictures([self._items[place].key for place in there])
            sent = [_encoded(str(place), picture) for place, picture in zip(there, pictures, strict=True)]
            self.problem = ""
        except Failure as failure:
            note, again = str(failure), failure.status in _PASSING
            self.problem = note
            if self.on_failure is not None:
                self.on_failure(failure)
        finally:
            self._sheet.frame = frame(serial, (), sent, note, again)

    # What it shows

    @property
    def _last_page(self) -> int:
        return max(0, (len(self._items) - 1) // self._per_page)

    @property
    def _shown(self) -> Sequence[Item]:
        return self._items[self.page * self._per_page :][: self._per_page]

    def _ordered(self, keys: Iterable[Key]) -> list[Key]:
        return sorted(keys, key=self._place.__getitem__)

    def _captions(self) -> list[list[str]]:
        return [[item.title, item.note, item.colour] for item in self._shown]

    def _lay_out(self, focus: int) -> None:
        self._sheet.param.update(captions=self._captions(), chosen=self._chosen())
        self._sheet.sheet = {
            # No two are the same: pictures of another sheet are known by it.
            "serial": next(_SERIALS),
            "first": self.page * self._per_page,
            "page": self.page,
            "pages": self._last_page + 1,
            "count": len(self._items),
            "focus": focus,
        }

    def _chosen(self) -> list[int]:
        among = set(self.selected)
        return [number for number, item in enumerate(self._shown) if item.key in among]

    @param.depends("selected", watch=True)
    def _mark(self) -> None:
        self._sheet.param.update(chosen=self._chosen(), chosen_count=len(self.selected))

    @param.depends("page", watch=True)
    def _turn(self) -> None:
        if self.page > self._last_page:
            self.page = self._last_page
        else:
            self._lay_out(len(self._shown) - 1 if self._from_behind else 0)
            self._from_behind = False


class Sheet(JSComponent):
    """One page of the gallery in the browser. (Bokeh sends no definition of a class whose name begins with _.)"""

    label = param.String("")
    side = param.Integer(96)
    sheet = param.Dict({})
    captions = param.List([], doc="Title, note and colour of each item on the page.")
    chosen = param.List([], doc="Places on the page.")
    chosen_count = param.Integer(0, doc="On all pages.")
    frame = param.Bytes(b"")

    _esm = Path(__file__).with_name("gallery.js")
    _stylesheets = [Path(__file__).with_name("gallery.css").read_text()]  # noqa: RUF012

    def __init__(self, told: Callable[[dict[str, Any]], Awaitable[None]], **params: Any) -> None:
        super().__init__(**params)
        self._told = told

    async def _handle_msg(self, data: Any) -> None:  # type: ignore[override]  # Panel awaits it
        await self._told(data)


def grey_picture(values: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.uint8]:
    """Values (rows, columns) as grey: `low` black, `high` white; what is not finite is black."""
    scaled = (values - low) * (255 / max(high - low, 1e-30))
    grey: NDArray[np.uint8] = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255).astype(np.uint8)
    return grey


def _encoded(name: str, picture: SmallPicture) -> Picture:
    if isinstance(picture, bytes):
        return Picture(name, "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg", picture)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return Picture(name, "image/png", buffer.getvalue())
