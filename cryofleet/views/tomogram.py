"""The tomogram view: three linked slices, picks and labels over them, a second volume beside or wiped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import panel as pn
import param

from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.v1 import common_pb2, io_pb2
from cryofleet.views import marks
from cryofleet.views.picks import Picks
from cryofleet.views.slice_pane import Mark, Picture, SlicePane, Wanted, frame
from cryofleet.views.slices import Slices, off_the_loop
from cryofleet.views.tables import read_particles
from cryofleet.views.text import text

AXES = ("x", "y", "z")
HELP = """Wheel or Page Up, Page Down: through the slices
Ctrl or Shift and wheel, or + and -: zoom; 0 or double click: all
Drag: move; click or arrows: crosshair"""
NOTHING = "No tomogram is chosen. Take one at the left, or go to Runs, choose a run, and press Look at it."
COMPARE = ("off", "wipe", "side by side")
_ACROSS = {"x": ("y", "z"), "y": ("x", "z"), "z": ("x", "y")}
_UNKNOWN = io_pb2.CutSliceResponse(size_x=1, size_y=1, size_z=1, voxel_size_angstrom=1.0)


class TomogramView(pn.viewable.Viewer):
    """Three orthogonal slices of a volume that stays on the server.

    In a notebook, `TomogramView(client, volume=uri)` as a cell's last line shows it.
    """

    volume = param.String("", doc="URI of the volume.")
    second = param.String("", doc="URI of a volume of the same size to compare with.")
    labels = param.String("", doc="URI of labels of its voxels.")
    particles = param.String("", doc="URI of a table of particles.")
    percentiles = param.Range((0.5, 99.5), bounds=(0, 100), doc="Of a slice: black and white.")
    planes = param.Integer(1, bounds=(1, 63), doc="A picture is the mean of so many.")
    inverted = param.Boolean(False, doc="Low values bright.")
    diameter = param.Number(200.0, bounds=(1, 5000), doc="Of the circles, in Å.")
    colour_by: Any = param.Selector(default="one colour", objects=list(marks.COLOUR_BY))
    compare: Any = param.Selector(default="off", objects=list(COMPARE))
    wipe = param.Number(0.5, bounds=(0, 1))
    position = param.List([0.0, 0.0, 0.0], doc="Of the crosshair: x, y, z in voxels.")
    least_score = param.Number(None, allow_None=True, doc="Picks below it are not shown.")
    problem = param.String("", doc="What the platform answered last, where that was no slice.")

    def __init__(self, client: Client, **params: Any) -> None:
        self._client = client
        self._slices = Slices(client)
        self._limits: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._colours: tuple[Any, list[str]] = (None, [])
        self._second_fits = True
        self.info = _UNKNOWN
        """What the platform says of the volume."""
        self.picks = Picks()
        self.on_hand: Callable[[dict[str, Any], tuple[float, float, float]], None] | None = None
        """Hears of clicks, moves and keys that the view has no use for, with the place in voxels."""
        self.on_failure: Callable[[Failure], None] | None = None
        self.on_table: Callable[[], None] | None = None
        """Hears that the picks are those of another table."""
        self.panes = {axis: SlicePane(self._answer, self._told, axis=axis, sizing_mode="stretch_both") for axis in AXES}
        self._beside = SlicePane(self._answer, self._told, axis="z", sizing_mode="stretch_both", visible=False)
        super().__init__(**params)
        self.message = text()
        self.help = text(HELP, padding="8px", font_size="12px", overflow="auto")
        self._nothing = text(NOTHING, padding="24px", font_size="14px")
        self._grid = pn.Column(sizing_mode="stretch_both", min_height=300)
        self._slices_layout = pn.Column(self._nothing, self._grid, sizing_mode="stretch_both")
        self._arrange()
        self._fill()

    def __panel__(self) -> pn.viewable.Viewable:
        return self._slices_layout

    def controls(self) -> pn.Column:
        """What the view is steered by, to stand beside it."""
        wide = {"sizing_mode": "stretch_width"}
        made, own = pn.widgets, self.param
        return pn.Column(
            self.message,
            made.RangeSlider.from_param(
                own.percentiles, label="Black and white (percentiles)", step=0.1, format="0.0", **wide
            ),
            made.IntSlider.from_param(own.planes, label="Mean of planes", step=2, **wide),
            made.Checkbox.from_param(own.inverted, label="Low values bright", **wide),
            made.Select.from_param(own.colour_by, label="Colour of picks", **wide),
            made.FloatInput.from_param(own.diameter, label="Diameter of circles (Å)", step=10, **wide),
            **wide,
        )

    def comparing(self) -> pn.Column:
        """How the second volume is shown, to stand below its choice; empty while there is none."""
        wide = {"sizing_mode": "stretch_width"}
        how = pn.widgets.RadioButtonGroup.from_param(self.param.compare, **wide)
        wipe = pn.widgets.FloatSlider.from_param(self.param.wipe, label="Wipe at", step=0.01, **wide)

        def fit(*_: Any) -> None:
            how.visible, wipe.visible = bool(self.second), bool(self.second) and self.compare == "wipe"

        self.param.watch(fit, ["second", "compare"])
        fit()
        return pn.Column(how, wipe, **wide)

    async def open(self, position: tuple[float, float, float] | None = None) -> None:
        """Look at the volume, from a place in it or its middle. Call it after `volume` was set."""
        if not self.volume:
            return
        try:
            first = await self._slices.cut(self.volume, "z", pixels=64)
        except Failure as failure:
            self._fail(failure)
            return
        # What panes have asked for until now was of another volume, or of a plane that nobody wants to see.
        self._limits = {}
        self.info, self.problem = first, ""
        sizes = (first.size_x, first.size_y, first.size_z)
        middle = tuple(float(size // 2) for size in sizes)
        place = position or middle
        self.position = [min(max(0.0, at), size - 1.0) for at, size in zip(place, sizes, strict=True)]
        for pane in (*self.panes.values(), self._beside):
            across = [AXES.index(name) for name in _ACROSS[pane.axis]]
            at = round(self.position[AXES.index(pane.axis)])
            pane.param.update(
                columns=sizes[across[0]],
                rows=sizes[across[1]],
                count=sizes[AXES.index(pane.axis)],
                voxel_size=first.voxel_size_angstrom,
                start=at,
            )
            pane.go(at)
        contrast = "dark" if first.contrast == common_pb2.CONTRAST_DARK else "light"
        self.message.object = (
            f"{sizes[0]} x {sizes[1]} x {sizes[2]} voxels (x, y, z) of {first.voxel_size_angstrom:.4g} Å, "
            f"protein {contrast}"
        )
        await self.open_particles()
        self.redraw()

    async def open_particles(self) -> None:
        """Read the table that `particles` names."""
        if not self.particles:
            return
        try:
            particles = await off_the_loop(read_particles, self._client, self.particles)
        except Failure as failure:
            self._fail(failure)
            return
        self.show_picks(Picks.of(particles, self.info.voxel_size_angstrom, self.info.tomogram))
        if self.on_table is not None:
            self.on_table()

    def show_picks(self, picks: Picks) -> None:
        """Other picks, in voxels of the volume."""
        self.picks = picks
        self.mark()

    def mark(self, selected: int | None = None) -> None:
        """Draw the picks anew; where `selected` is given, with that one selected, -1 for none."""
        for pane in (*self.panes.values(), self._beside):
            pane.marks = self._marks(pane, pane.start)
            if selected is not None:
                pane.selected = selected

    def redraw(self) -> None:
        """Have all slices cut anew."""
        for pane in (*self.panes.values(), self._beside):
            pane.version += 1

    def go(self, place: tuple[float, float, float]) -> None:
        """Put the crosshair at x, y, z in voxels."""
        sizes = (self.info.size_x, self.info.size_y, self.info.size_z)
        self.position = [min(max(0.0, float(at)), size - 1.0) for at, size in zip(place, sizes, strict=True)]
        for pane in (*self.panes.values(), self._beside):
            at = round(self.position[AXES.index(pane.axis)])
            if at != pane.start:
                pane.go(at)

    @property
    def selected(self) -> int:
        """The id of the pick that is selected; -1 for none."""
        return int(self.panes["z"].selected)

    # What panes ask and tell

    async def _answer(self, pane: SlicePane, wanted: Wanted) -> None:
        axis = pane.axis
        if self.position[AXES.index(axis)] != wanted.position:
            moved = list(self.position)
            moved[AXES.index(axis)] = float(wanted.position)
            self.position = moved
            if pane is self._beside or self.compare == "side by side":
                other = self.panes["z"] if pane is self._beside else self._beside
                if other.axis == axis and other.start != wanted.position:
                    other.go(wanted.position)
        new = frame(wanted.position, (0, 0, 1, 1), (), "", again=True)
        try:
            new = await self._cut(pane, wanted)
            self.problem = ""
        except Failure as failure:
            away = failure.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
            note = f"{failure}\ntrying again …" if away else str(failure)
            new = frame(wanted.position, (0, 0, 1, 1), (), note, again=away)
            self._fail(failure)
        finally:
            # A pane that is never answered would never ask again.
            pane.param.update(frame=new, marks=self._marks(pane, wanted.position), cross=self._cross(pane))

    async def _cut(self, pane: SlicePane, wanted: Wanted) -> bytes:
        uri = self.second if pane is self._beside else self.volume
        if not uri:
            return frame(wanted.position, (0, 0, 1, 1), (), "no volume is chosen")
        shared: dict[str, Any] = {"region": wanted.region, "pixels": wanted.pixels}
        grey = {**shared, "planes": self.planes, "percentiles": self.percentiles}
        pictures: list[Picture] = []
        region, limits = None, self._limits
        for name, source, options in self._layers(pane, uri, grey, shared):
            zoom = 0 if wanted.region is None else round(math.log2(max(wanted.region[2:])))
            key = (source, pane.axis, self.planes, self.percentiles, zoom)
            if name != "labels" and key in limits:
                options["values"] = limits[key]
            cut = await self._slices.cut(source, pane.axis, wanted.position, **options)
            if cut.HasField("preparing_fraction"):
                done = f"{cut.preparing_fraction:.0%}"
                note = f"The platform arranges the volume for slices along x and y: {done}"
                return frame(wanted.position, (0, 0, 1, 1), (), note, again=True)
            if name != "labels":
                # Kept while one scrolls, so that the picture does not flicker.
                limits[key] = (cut.black_value, cut.white_value)
            region = region or cut.region
            pictures.append(Picture(name, cut.media_type, cut.picture))
        assert region is not None
        place = (region.first_column, region.first_row, region.columns, region.rows)
        return frame(wanted.position, place, pictures)

    def _layers(
        self, pane: SlicePane, uri: str, grey: dict[str, Any], plain: dict[str, Any]
    ) -> list[tuple[str, str, dict[str, Any]]]:
        layers = [("main", uri, dict(grey))]
        if self.compare == "wipe" and self.second:
            layers.append(("second", self.second, dict(grey)))
        if self.labels:
            layers.append(("labels", self.labels, {**plain, "labels": True}))
        # Together they take no more of the line than one.
        for _, _, options in layers:
            options["max_bytes"] = 110_000 // len(layers)
        return layers

    def _told(self, pane: SlicePane, said: dict[str, Any]) -> None:
        match said.get("type"):
            case "view":
                if self.compare == "side by side":
                    (self.panes["z"] if pane is self._beside else self._beside).follow(said["view"])
            case "click" | "move":
                place = self._place(pane, said["place"])
                if said["type"] == "click" and not said.get("add") and not said.get("remove"):
                    self.go(place)
                    self._cross_all()
                if self.on_hand is not None:
                    self.on_hand({**said, "axis": pane.axis}, place)
            case "step":
                x, y, z = self.position
                columns, rows = (AXES.index(name) for name in _ACROSS[pane.axis])
                place_ = [x, y, z]
                place_[columns] += float(said["by"][0])
                place_[rows] += float(said["by"][1])
                if said.get("pick") and self.on_hand is not None:
                    difference = [after - before for after, before in zip(place_, self.position, strict=True)]
                    self.on_hand({"type": "nudge"}, (difference[0], difference[1], difference[2]))
                else:
                    self.go((place_[0], place_[1], place_[2]))
                    self._cross_all()
            case "key" | "stroke":
                if self.on_hand is not None:
                    x, y, z = self.position
                    self.on_hand(said, (x, y, z))

    def _place(self, pane: SlicePane, at: list[float]) -> tuple[float, float, float]:
        place = {_ACROSS[pane.axis][0]: float(at[0]), _ACROSS[pane.axis][1]: float(at[1])}
        place[pane.axis] = float(pane.start)
        return place["x"], place["y"], place["z"]

    # Keeping the panes together

    @param.depends("position", watch=True)
    def _cross_all(self) -> None:
        for pane in (*self.panes.values(), self._beside):
            pane.cross = self._cross(pane)

    def _cross(self, pane: SlicePane) -> list[float]:
        return [float(self.position[AXES.index(name)]) for name in _ACROSS[pane.axis]]

    def _marks(self, pane: SlicePane, position: int) -> list[Mark]:
        if not len(self.picks):
            return []
        key = (self.picks.table, self.colour_by)
        if self._colours[0] is None or any(a is not b for a, b in zip(self._colours[0], key, strict=True)):
            self._colours = (key, marks.colours(self.picks.table, self.picks.scores, self.colour_by))
        radius = self.diameter / 2 / self.info.voxel_size_angstrom
        return marks.marks_on(self.picks, pane.axis, position, self.planes, radius, self._colours[1], self.least_score)

    @param.depends("colour_by", "diameter", "least_score", watch=True)
    def _mark(self) -> None:
        self.mark()

    @param.depends("percentiles", "planes", "compare", "second", "labels", watch=True)
    def _changed(self) -> None:
        self.redraw()
        self.mark()

    @param.depends("wipe", "inverted", watch=True)
    def _styled(self) -> None:
        for pane in (*self.panes.values(), self._beside):
            pane.param.update(wipe=self.wipe, inverted=self.inverted)

    @param.depends("compare", watch=True)
    def _arrange(self) -> None:
        beside = self.compare == "side by side"
        self._beside.visible = beside
        for pane in (self.panes["z"], self._beside):
            pane.paired = beside
        grid = pn.GridSpec(sizing_mode="stretch_both", mode="override", styles={"gap": "0 8px"})
        if beside:
            grid[0, 0], grid[0, 1] = self.panes["z"], self._beside
        else:
            # Tomograms are thin along z: beside the large slice there is room for both others.
            grid[0:20, 0:11] = self.panes["z"]
            grid[0:8, 11:20], grid[8:16, 11:20], grid[16:20, 11:20] = self.panes["x"], self.panes["y"], self.help
        self._grid[:] = [grid]

    @param.depends("second", watch=True)
    def _chosen_second(self) -> None:
        if self.second and self.compare == "off":
            self.compare = "wipe"

    @param.depends("volume", watch=True)
    def _fill(self) -> None:
        self._nothing.visible, self._grid.visible = not self.volume, bool(self.volume)

    def _fail(self, failure: Failure) -> None:
        self.problem = str(failure)
        if self.on_failure is not None:
            self.on_failure(failure)
        else:
            self.message.object = self.problem
