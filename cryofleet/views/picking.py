"""The picking view: settings of the difference of Gaussians tuned on a slab, then picks corrected by hand and saved."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param

from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.particles import Particles
from cryofleet.views.histogram import histogram_svg
from cryofleet.views.picks import Picks
from cryofleet.views.slices import off_the_loop
from cryofleet.views.tables import read_particles
from cryofleet.views.text import text
from cryofleet.views.tomogram import HELP, TomogramView

LEAST_SCORE = 0.0
"""The preview has all picks above it, so that the threshold can be moved without asking again."""
_MOST = 20_000
_SETTLED_SECONDS = 0.25
_SQRT_12 = 2 * math.sqrt(3)
KEYS = """
a: add a pick at the crosshair; d or Delete: remove the selected one
n, b: next, previous pick; Alt and arrows: move the selected one
u, r: undo, redo; s: save
Shift click: add; Alt click: remove; drag a pick: move it"""


class PickingView(pn.viewable.Viewer):
    """Picks of a tomogram: found on a slab around the current slice while one tunes, on all of it when asked to."""

    diameter_angstrom = param.Number(200.0, bounds=(10, 2000), doc="Of the particles; sigma is diameter / (2 sqrt 3).")
    threshold = param.Number(3.0, bounds=(LEAST_SCORE, 12), doc="Least score, in standard deviations.")
    distance_angstrom = param.Number(200.0, bounds=(0, 2000), doc="Least distance of two picks.")
    slab_planes = param.Integer(32, bounds=(8, 256), doc="Of the preview.")
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

    def attach(self) -> None:
        """Take what hands do on the slices."""
        self.view.on_hand = self._hand
        self.view.help.object = HELP + KEYS
        for pane in self.view.panes.values():
            pane.editable = True
        self.view.param.update(diameter=self.diameter_angstrom, least_score=self.threshold)
        self._counted()

    def detach(self) -> None:
        """Leave the slices to others."""
        self.view.on_hand = None
        self.view.help.object = HELP
        for pane in self.view.panes.values():
            pane.editable = False
        self.view.least_score = None

    def __panel__(self) -> pn.viewable.Viewable:
        wide = {"sizing_mode": "stretch_width"}
        made, own = pn.widgets, self.param
        settings = (
            made.EditableFloatSlider.from_param(own.diameter_angstrom, label="Diameter (Å)", step=5, **wide),
            made.EditableFloatSlider.from_param(own.threshold, label="Threshold", step=0.1, **wide),
            made.EditableFloatSlider.from_param(own.distance_angstrom, label="Least distance (Å)", step=5, **wide),
            made.IntSlider.from_param(own.slab_planes, label="Preview planes", step=8, **wide),
            self._sigma,
            made.TextInput.from_param(own.editor, label="Edited by", sizing_mode="stretch_width"),
        )
        buttons = [
            ("Preview", "primary", self._preview_clicked),
            ("Pick all", "default", self._all_clicked),
            ("Undo", "default", lambda _: self._key("u")),
            ("Redo", "default", lambda _: self._key("r")),
            ("Save", "success", lambda _: self._key("s")),
        ]
        row = pn.FlexBox(*[_button(name, kind, action) for name, kind, action in buttons], gap="6px")
        return pn.Column(
            *settings, row, self._count, self._histogram, self._said,
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
        self.view.least_score = self.threshold
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
            if self.view.on_failure is not None:
                self.view.on_failure(failure)
            return
        if asked != self._asked:
            return  # another one is on its way
        self.view.show_picks(Picks.of(particles, self.view.info.voxel_size_angstrom))
        self._edited_since = 0
        where = f"planes around z {parameters['preview_z']}" if preview else "the whole tomogram"
        self._say(f"picked in {where}" + (f"; the best {_MOST:,}" if len(particles) >= _MOST else ""))
        self._counted()

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
        self._histogram.object = histogram_svg(picks.scores, self.threshold)


def _button(name: str, kind: str, action: Any) -> pn.widgets.Button:
    button = pn.widgets.Button(label=name, color=kind)
    button.on_click(action)
    return button


def _own_name() -> str:
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return ""
