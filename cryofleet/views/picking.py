"""The picking view: settings of the difference of Gaussians tuned on a slab, then picks corrected by hand and saved."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param

from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.numerics.score_background import Background
from cryofleet.particles import Particles
from cryofleet.views.buttons import button, button_row
from cryofleet.views.gallery import Gallery, Item, Key
from cryofleet.views.histogram import Histogram, histogram_svg
from cryofleet.views.pick_pictures import PickPictures
from cryofleet.views.picks import Picks
from cryofleet.views.slices import off_the_loop
from cryofleet.views.tables import read_json, read_particles
from cryofleet.views.text import text
from cryofleet.views.tomogram import HELP, TomogramView

LEAST_SCORE, MOST_SCORE = 0.0, 12.0
"""The preview has all picks above the first, so that the threshold can be moved without asking again."""
USUAL_THRESHOLD = 3.0
_MOST = 20_000
_SETTLED_SECONDS = 0.25
_SQRT_12 = 2 * math.sqrt(3)
KEYS = """
a: add a pick at the crosshair; d or Delete: remove the selected one
n, b: next, previous pick; Alt and arrows: move the selected one
u, r: undo, redo; s: save
Shift click: add; Alt click: remove; drag a pick: move it"""
GALLERY_KEYS = """Click or space: choose; Shift: all between; a: all, Escape: none
d or Delete: reject the chosen; Enter: go there; u, r: undo, redo"""


class PickingView(pn.viewable.Viewer):
    """Picks of a tomogram: found on a slab around the current slice while one tunes, on all of it when asked to."""

    diameter_angstrom = param.Number(200.0, bounds=(10, 2000), doc="Of the particles; sigma is diameter / (2 sqrt 3).")
    threshold = param.Number(USUAL_THRESHOLD, doc="Least score; of what was picked here in standard deviations.")
    distance_angstrom = param.Number(200.0, bounds=(0, 2000), doc="Least distance of two picks.")
    slab_planes = param.Integer(32, bounds=(8, 256), doc="Of the preview.")
    show_gallery = param.Boolean(False, doc="Pictures of the picks, the best first.")
    editor = param.String("", doc="Who edits; kept with what is added or moved.")
    saved = param.String("", doc="URI of what was saved last.")

    def __init__(self, client: Client, view: TomogramView, editor: str = "") -> None:
        """`view` is where the picks are shown."""
        super().__init__(editor=editor or _own_name())
        self._client = client
        self.view = view
        self._asked = 0
        self._edited_since = 0
        self._count, self._said = text(font_weight="bold"), text()
        self._histogram = pn.pane.HTML("", sizing_mode="stretch_width")
        self._table = ""
        self._known: Picks | None = None
        self._from_elsewhere = False
        self._background: Background | None = None
        self._searched: Histogram | None = None
        wide = {"sizing_mode": "stretch_width"}
        self._slider = pn.widgets.EditableFloatSlider(
            label="Threshold", start=LEAST_SCORE, end=MOST_SCORE, step=0.1, value=self.threshold, **wide
        )
        self._slider.param.watch(lambda event: setattr(self, "threshold", event.new), "value")
        self._expected = text()
        self._let_pass = pn.widgets.FloatInput(
            label="Let so many false positives pass", value=None, start=0.001, step=1, visible=False, **wide
        )
        self._let_pass.param.watch(self._passed, "value")
        self._pictures = PickPictures(client)
        self._chooser = Gallery(self._pictures_of, label="picks, the best first")
        self._chooser.on_key = self._gallery_key
        self._chooser.on_failure = self._failed
        self._order = pn.widgets.RadioButtonGroup(options=["best first", "worst first"], value="best first")
        self._order.param.watch(lambda _: self._fill_gallery(), "value")
        head = button_row(
            button("Reject chosen", lambda _: self._reject(), "danger"), self._order,
            text(GALLERY_KEYS, font_size="12px", flex="1 1 0", min_width="0"),
        )  # fmt: skip
        head.flex_wrap = "nowrap"
        self.gallery = pn.Column(head, self._chooser, height=320, visible=False, **wide)
        """To stand below the slices."""

    def attach(self) -> None:
        """Take what hands do on the slices."""
        self.view.on_hand = self._hand
        self.view.on_table = self._opened
        self.view.help.object = HELP + KEYS
        for pane in self.view.panes.values():
            pane.editable = True
        self.view.diameter = self.diameter_angstrom
        if len(self.view.picks) and self.view.picks is not self._known:
            self._opened()
        else:
            self.view.least_score = self.threshold
            self._counted()

    def detach(self) -> None:
        """Leave the slices to others."""
        self.view.on_hand = self.view.on_table = None
        self.view.help.object = HELP
        for pane in self.view.panes.values():
            pane.editable = False
        self.view.least_score = None

    def __panel__(self) -> pn.viewable.Viewable:
        wide = {"sizing_mode": "stretch_width"}
        made, own = pn.widgets, self.param
        settings = (
            made.EditableFloatSlider.from_param(own.diameter_angstrom, label="Diameter (Å)", step=5, **wide),
            self._slider,
            made.EditableFloatSlider.from_param(own.distance_angstrom, label="Least distance (Å)", step=5, **wide),
            made.IntSlider.from_param(own.slab_planes, label="Preview planes", step=8, **wide),
            self._sigma,
        )
        row = button_row(
            button("Preview", self._preview_clicked, "primary"),
            button("Pick all", self._all_clicked),
            button("Undo", lambda _: self._key("u")),
            button("Redo", lambda _: self._key("r")),
            button("Save", lambda _: self._key("s"), "success"),
            made.Toggle.from_param(own.show_gallery, label="Gallery"),
        )
        return pn.Column(
            *settings, row, self._said, self._count, self._histogram, self._expected, self._let_pass,
            button_row(button("Estimate false positives", self._estimate_clicked)),
            made.TextInput.from_param(own.editor, label="Edited by", sizing_mode="stretch_width"),
            sizing_mode="stretch_width",
        )  # fmt: skip

    @param.depends("diameter_angstrom")
    def _sigma(self) -> Any:
        sigma = self.diameter_angstrom / _SQRT_12
        voxels = sigma / self.view.info.voxel_size_angstrom
        return text(f"sigma {sigma:.1f} Å, {voxels:.2f} voxels")

    # Finding

    @param.depends("diameter_angstrom", "distance_angstrom", "slab_planes", watch=True)
    async def _tuned(self) -> None:
        self.view.diameter = self.diameter_angstrom
        self._asked += 1
        asked = self._asked
        await asyncio.sleep(_SETTLED_SECONDS)
        if asked == self._asked:  # nobody has tuned on meanwhile
            await self.find(preview=True)

    @param.depends("threshold", watch=True)
    def _cut(self) -> None:
        self._slider.value = self.view.least_score = self.threshold
        self._counted()

    async def _preview_clicked(self, _: Any) -> None:
        await self.find(preview=True)

    async def _all_clicked(self, _: Any) -> None:
        await self.find(preview=False)

    async def find(self, preview: bool) -> None:
        """Find picks on the slab around the current slice, or in the whole tomogram. Edits so far are dropped."""
        if not self.view.volume:
            self._say("choose a tomogram first")
            return
        if self.view.picks.edits > self._edited_since:
            self._say("There are edits that are not saved: save them (s) or undo them (u) before picking anew.")
            return
        self._asked += 1
        asked = self._asked
        parameters: dict[str, Any] = {
            "tomogram_uri": self.view.volume,
            "particle_diameter_angstrom": self.diameter_angstrom,
            "min_distance_angstrom": self.distance_angstrom,
            "threshold": LEAST_SCORE,
            "max_picks": _MOST,
        }
        if preview:
            parameters["preview_z"] = round(self.view.position[2])
            parameters["preview_planes"] = min(self.slab_planes, max(3, self.view.info.size_z))
        self._say("picking …")
        try:
            result = await off_the_loop(self._client.call, "picking.DifferenceOfGaussians", **parameters)
            particles = await off_the_loop(read_particles, self._client, result["particles_uri"])
        except Failure as failure:
            self._say(str(failure))
            self._failed(failure)
            return
        if asked != self._asked:
            return  # another one is on its way
        threshold = ""
        if self._from_elsewhere:
            # What was opened before had scores of its own.
            self._scores_from(LEAST_SCORE, MOST_SCORE, 0.1, USUAL_THRESHOLD)
            threshold = f"; the threshold is {USUAL_THRESHOLD:g} now, as the table before may have had other scores"
        self._table, self._background, self._searched = result["particles_uri"], None, None
        self.view.show_picks(Picks.of(particles, self.view.info.voxel_size_angstrom))
        self._known, self._from_elsewhere = self.view.picks, False
        self._edited_since = 0
        where = f"planes around z {parameters['preview_z']}" if preview else "the whole tomogram"
        self._say(f"picked in {where}" + (f"; the best {_MOST:,}" if len(particles) >= _MOST else "") + threshold)
        self._counted()

    def _failed(self, failure: Failure) -> None:
        if self.view.on_failure is not None:
            self.view.on_failure(failure)

    # A table that was picked elsewhere

    def _opened(self) -> None:
        """Other picks than those found here: all of them are shown, whatever their scores."""
        self._table, self._background, self._searched = self.view.particles, None, None
        self._known, self._from_elsewhere = self.view.picks, True
        self._edited_since = 0
        self._asked += 1
        scores = self.view.picks.scores
        finite = scores[np.isfinite(scores)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        span = max(high - low, 1e-6)
        digits = 2 - math.floor(math.log10(span))
        step = 10.0**-digits
        # Round numbers, the first of them not above the lowest score.
        self._scores_from(round(math.floor(low / step) * step, digits), high, step)
        self._counted()
        pn.state.execute(self._read_figures)

    def _scores_from(self, low: float, high: float, step: float, threshold: float | None = None) -> None:
        """What the threshold can be, and what it is: the lowest where None."""
        value = low if threshold is None else threshold
        self._slider.param.update(start=low, end=max(high, low + step), step=step, value=value)
        self.threshold = self.view.least_score = value

    async def _read_figures(self) -> None:
        """What the operation that made the table says of its scores, in the table beside it."""
        table = self._table
        uri = table.rpartition("/")[0] + "/metrics.json"
        try:
            figures = await off_the_loop(read_json, self._client, uri)
        except Failure as failure:
            if failure.status not in ("NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT"):
                self._failed(failure)
            return  # it says nothing of them
        if table == self._table:
            self._take_figures(figures)

    async def _estimate_clicked(self, _: Any) -> None:
        await self.estimate()

    async def estimate(self) -> None:
        """Have the picking service fit a distribution to the table's scores, of which the background is a part."""
        if not self._table:
            self._say("pick first, or choose a table of picks")
            return
        table = self._table
        try:
            result = await off_the_loop(
                self._client.call, "picking.FilterParticles", particles_uris=[table], expected_false_positives=1.0
            )
            figures = await off_the_loop(read_json, self._client, result["metrics_uri"])
        except Failure as failure:
            self._say(str(failure))
            self._failed(failure)
            return
        if table == self._table:
            self._take_figures(figures)

    def _take_figures(self, figures: dict[str, Any]) -> None:
        self._searched = Histogram.of_search(figures)
        self._background = None
        if figures.get("background") is not None:
            try:
                self._background = Background.from_table(figures["background"])
            except Failure as failure:
                self._say(str(failure))
        self._counted()

    def _passed(self, event: Any) -> None:
        if self._background is not None and event.new:
            self.threshold = self._background.threshold(float(event.new))

    # The gallery

    @param.depends("show_gallery", watch=True)
    def _shown(self) -> None:
        self.gallery.visible = self.show_gallery
        self._fill_gallery()

    def _fill_gallery(self) -> None:
        if not self.show_gallery:
            return
        picks = self.view.picks
        kept = np.flatnonzero(picks.above(self.threshold))
        scores = picks.scores[kept]
        # Those made by hand have none, and stand behind the others.
        ranked = kept[np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")]
        if self._order.value == "worst first":
            ranked = ranked[::-1]
        ids = picks.table["id"].to_numpy()[ranked].tolist()
        if ids == [item.key for item in self._chooser.items]:
            return
        page = self._chooser.page
        self._chooser.fill(
            Item(int(pick), "by hand" if math.isnan(score) else f"{score:.3g}", f"pick {pick}")
            for pick, score in zip(ids, picks.scores[ranked].tolist(), strict=True)
        )
        self._chooser.page = page

    async def _pictures_of(self, keys: Sequence[Key]) -> list[bytes]:
        picks = self.view.picks
        places = [picks.place(int(key)) for key in keys if int(key) in picks]
        side = 2 * self.diameter_angstrom / self.view.info.voxel_size_angstrom
        pictures = await self._pictures.cut(self.view.volume, places, side)
        # One that was rejected meanwhile has none.
        there = iter(pictures)
        return [next(there) if int(key) in picks else b"" for key in keys]

    def _gallery_key(self, key: str, pick: Key) -> None:
        if key in ("d", "Delete"):
            if not self._chooser.selected:
                self._chooser.choose([pick])
            self._reject()
        elif key == "Enter" and int(pick) in self.view.picks:
            self.view.go(self.view.picks.place(int(pick)))
            self._show(int(pick))
        else:
            self._key(key)

    def _reject(self) -> None:
        """Take the chosen ones away, as one edit."""
        chosen = [int(key) for key in self._chooser.selected if int(key) in self.view.picks]
        if not chosen:
            self._say("choose some in the gallery first")
            return
        self.view.picks.reject(chosen)
        self._say(f"{len(chosen)} rejected; u takes it back")
        self._show(-1)

    # By hand

    def _hand(self, said: dict[str, Any], place: tuple[float, float, float]) -> None:
        picks = self.view.picks
        chosen = said.get("pick")
        try:
            match said["type"]:
                case "click" if said.get("add"):
                    self._show(picks.add(place, self.editor))
                case "click" if said.get("remove") and chosen is not None:
                    picks.remove(int(chosen))
                    self._show(-1)
                case "click":
                    self._show(-1 if chosen is None else int(chosen))
                case "move" if chosen is not None:
                    # Within the slice: how far it lies off it stays as it was.
                    along = "xyz".index(said["axis"])
                    kept = list(place)
                    kept[along] = picks.place(int(chosen))[along]
                    picks.move(int(chosen), (kept[0], kept[1], kept[2]), self.editor)
                    self._show(int(chosen))
                case "nudge" if self.view.selected >= 0:
                    x, y, z = picks.place(self.view.selected)
                    picks.move(self.view.selected, (x + place[0], y + place[1], z + place[2]), self.editor)
                    self._show(self.view.selected)
                case "key":
                    self._key(str(said["key"]))
        except Failure as failure:
            self._say(str(failure))

    def _key(self, key: str) -> None:
        picks, selected = self.view.picks, self.view.selected
        match key:
            case "a":
                x, y, z = self.view.position
                self._show(picks.add((x, y, z), self.editor))
            case "d" | "Delete" if selected >= 0:
                picks.remove(selected)
                self._show(-1)
            case "u" | "r":
                changed = picks.undo() if key == "u" else picks.redo()
                self._say(f"nothing to {'undo' if key == 'u' else 'redo'}" if changed is None else "")
                self._show(-1 if changed is None or changed not in picks else changed)
            case "n" | "b":
                self._next(1 if key == "n" else -1)
            case "s":
                pn.state.execute(self.save)

    def _next(self, step: int) -> None:
        picks = self.view.picks
        ids = picks.table["id"].to_numpy()[picks.above(self.threshold)]
        if not len(ids):
            return
        at = np.flatnonzero(ids == self.view.selected)
        chosen = int(ids[(int(at[0]) + step) % len(ids)] if len(at) else ids[0 if step > 0 else -1])
        self.view.go(picks.place(chosen))
        self._show(chosen)

    def _show(self, selected: int) -> None:
        self.view.mark(selected)
        self._counted()

    async def save(self) -> None:
        """Store the picks above the threshold as a particle table."""
        info = self.view.info
        try:
            particles = self.view.picks.to_particles(
                info.voxel_size_angstrom,
                (info.size_z, info.size_y, info.size_x),
                info.tomogram,
                self.threshold,
            )
            self.saved = await off_the_loop(self._upload, particles)
        except Failure as failure:
            self._say(str(failure))
            return
        self._edited_since = self.view.picks.edits
        self._say(f"{len(particles):,} picks saved as\n{self.saved}")

    def _upload(self, particles: Particles) -> str:
        with tempfile.TemporaryDirectory(prefix="cryofleet-") as folder:
            path = Path(folder) / "picks.parquet"
            path.write_bytes(particles.to_parquet())
            return self._client.upload(path)

    # What is said and drawn

    def _say(self, text: str) -> None:
        self._said.object = text

    def _counted(self) -> None:
        picks = self.view.picks
        count = int(picks.above(self.threshold).sum())
        unsaved = picks.edits - self._edited_since
        self._count.object = f"{count:,} picks of {len(picks):,}" + (f", {unsaved} edits not saved" if unsaved else "")
        histogram = self._searched or Histogram.of(picks.scores, self.threshold)
        self._histogram.object = histogram_svg(histogram, self.threshold, self._background)
        self._let_pass.visible = self._background is not None
        self._expected.object = "" if self._background is None else self._expectation(self._background)
        self._fill_gallery()

    def _expectation(self, background: Background) -> str:
        passing, others = background.false_positives(self.threshold), background.others_above(self.threshold)
        kinds = (
            f"; {_number(others)} of these are a kind of its own with lower scores, errors only where that kind is "
            "not looked for"
            if others >= 0.1
            else ""
        )
        return (
            f"Expected false positives above the threshold: {_number(passing)}, by the distribution of "
            f"{background.peaks:,} scores (line: the background){kinds}"
        )


def _number(expected: float) -> str:
    return f"{expected:.0f}" if expected >= 10 else f"{expected:.2g}"


def _own_name() -> str:
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return ""
