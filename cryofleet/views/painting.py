"""The painting view: a feature, and what is not it, brushed onto sections, for a network to learn from."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param
from numpy.typing import NDArray
from PIL import Image

from cryofleet.client import Client, RunHandle
from cryofleet.errors import Failure, InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, rgb
from cryofleet.v1 import common_pb2, orchestrator_pb2
from cryofleet.views.buttons import button, button_row
from cryofleet.views.painted_sections import (
    FEATURE,
    NOT_FEATURE,
    NOT_LOOKED_AT,
    PaintedSections,
    from_png,
    to_png,
)  # fmt: skip
from cryofleet.views.parameters import PipelineForm
from cryofleet.views.slice_pane import Picture, frame
from cryofleet.views.slices import off_the_loop
from cryofleet.views.text import text
from cryofleet.views.tomogram import HELP, TomogramView

PIPELINE = "annotate"
TOOLS = {"feature": FEATURE, "not it": NOT_FEATURE, "erase": NOT_LOOKED_AT, "move": None}
_COLOURS = {FEATURE: CLASS_COLOURS[0], NOT_FEATURE: CLASS_COLOURS[1], NOT_LOOKED_AT: "#ffffff"}
_TOOL_KEYS = {"b": "feature", "x": "not it", "e": "erase", "h": "move"}
_STEP = 1.25
MOST_PICTURES = 1000
_MOST_INDEX_BYTES = 1 << 20
KEYS = """
On the slice perpendicular to z a drag paints; with Shift it moves
b: the feature; x: not the feature; e: erase; h: move
[ and ]: smaller, larger; p or space: paint at the crosshair
n, N: further sections; comma, full stop: painted sections
u, r: undo, redo; s: save"""


def _brush(value: int | None) -> dict[str, Any]:
    """What a brush paints, as a pane takes it; one without a colour moves."""
    return {"value": value, "colour": "" if value is None else _COLOURS[value]}


_KEYS = {key: _brush(TOOLS[tool]) for key, tool in _TOOL_KEYS.items()}


class PaintingView(pn.viewable.Viewer):
    """Features painted on the z slices of a tomogram view, saved as pictures of sections, which `annotate` takes."""

    tool: Any = param.Selector(default="feature", objects=list(TOOLS))
    radius_voxels = param.Number(6.0, bounds=(0.5, 60), doc="Of the brush.")
    feature = param.String("feature", doc="The name of what is painted.")
    apart = param.Integer(10, bounds=(1, 500), doc="Sections from one that is painted to the next.")
    saved = param.String("", doc="URI of what was saved last.")

    def __init__(self, client: Client, view: TomogramView, **params: Any) -> None:
        """`view` is what is painted on."""
        self._client = client
        self.view = view
        self._paintings: dict[tuple[str, tuple[int, int, int]], PaintedSections] = {}
        self._saved_edits = 0
        self._stroke = 0
        self._pipeline: orchestrator_pb2.PipelineDescription | None = None
        self._form: PipelineForm | None = None
        self._attached = False
        self.on_failure: Callable[[Failure], None] | None = None
        self.on_started: Callable[[str], None] | None = None
        """Hears of the id of a run that was started."""
        super().__init__(**params)
        wide = {"sizing_mode": "stretch_width"}
        self._count, self._said, self._start_said = text(font_weight="bold"), text(), text()
        self._size = text()
        self._features = pn.widgets.Select(label="Feature", options=[self.feature], value=self.feature, **wide)
        self._features.param.watch(self._feature_chosen, "value")
        self._new = pn.widgets.TextInput(label="Another feature", placeholder="membrane", max_length=100, **wide)
        self._new.param.watch(lambda _: self._add_feature(), "enter_pressed")
        self._uri = pn.widgets.TextInput(label="Go on with what was saved", placeholder="URI of a painting", **wide)
        self._uri.param.watch(self._uri_entered, "enter_pressed")
        self._form_place = pn.Column(**wide)
        view.param.watch(lambda _: self._draw(), "position")
        view.param.watch(lambda _: self._fill_form(), "volume")

    def attach(self) -> None:
        """Take what hands do on the slices."""
        self._attached = True
        self.view.on_hand = self._hand
        self.view.help.object = HELP + KEYS
        self._set_brush()
        self._draw()
        pn.state.execute(self._open_pipeline)

    def detach(self) -> None:
        """Leave the slices to others."""
        if not self._attached:
            return
        self._attached = False
        self.view.on_hand = None
        self.view.help.object = HELP
        self.view.panes["z"].param.update(brush={}, painted=b"")

    def __panel__(self) -> pn.viewable.Viewable:
        wide = {"sizing_mode": "stretch_width"}
        made, own = pn.widgets, self.param
        buttons = button_row(
            button("Undo", lambda _: self._key("u")),
            button("Redo", lambda _: self._key("r")),
            button("Next section", lambda _: self._key("n")),
            button("Save", lambda _: self._key("s"), "success"),
        )
        return pn.Column(
            self._features,
            self._new,
            made.RadioButtonGroup.from_param(own.tool, **wide),
            made.FloatSlider.from_param(own.radius_voxels, label="Radius of the brush (voxels)", step=0.5, **wide),
            self._size,
            made.IntInput.from_param(own.apart, label="Sections apart", **wide),
            buttons,
            self._count,
            self._said,
            self._uri,
            self._form_place,
            button_row(button("Start annotate", self._start_clicked, "primary")),
            self._start_said,
            sizing_mode="stretch_width",
        )

    @property
    def painted(self) -> PaintedSections:
        """What is painted on the volume that is looked at."""
        shape = (self.view.info.size_z, self.view.info.size_y, self.view.info.size_x)
        key = (self.view.volume, shape)
        if key not in self._paintings:
            self._paintings[key] = PaintedSections(shape)
        return self._paintings[key]

    # Hands

    def _hand(self, said: dict[str, Any], place: tuple[float, float, float]) -> None:
        try:
            if said["type"] == "stroke":
                self._stroke = int(said["stroke"])
                brush = (float(said["radius"]), int(said["value"]))
                self._paint(int(said["position"]), said["points"], *brush)
            elif said["type"] == "key":
                self._key(str(said["key"]))
        except (Failure, KeyError, TypeError, ValueError) as failure:
            self._say(str(failure))
            self._draw()

    def _paint(self, z: int, points: list[list[float]], radius: float, value: int) -> None:
        if not self.view.volume:
            raise InvalidArgument("choose a tomogram first")
        self.painted.stroke(self.feature, z, points, radius, value)
        self._draw()

    def _key(self, key: str) -> None:
        x, y, z = self.view.position
        match key:
            case "b" | "x" | "e" | "h":
                self.tool = _TOOL_KEYS[key]
            case "[" | "]":
                wanted = self.radius_voxels * _STEP if key == "]" else self.radius_voxels / _STEP
                low, high = self.param.radius_voxels.bounds
                self.radius_voxels = min(max(low, round(2 * wanted) / 2), high)
            case "p" | " " if TOOLS[self.tool] is not None:
                self._paint(round(z), [[x, y]], self.radius_voxels, int(TOOLS[self.tool] or 0))
            case "n" | "N":
                self.view.go((x, y, z + (self.apart if key == "n" else -self.apart)))
            case "," | ".":
                others = [at for at in self.painted.sections(self.feature) if (at > z if key == "." else at < z)]
                if others:
                    self.view.go((x, y, float(others[0] if key == "." else others[-1])))
            case "u" | "r":
                changed = self.painted.undo() if key == "u" else self.painted.redo()
                self._say("" if changed else f"nothing to {'undo' if key == 'u' else 'redo'}")
                if changed is not None:
                    self._show_feature(changed[0])
                    self.view.go((x, y, float(changed[1])))
                self._draw()
            case "s":
                pn.state.execute(self.save)

    # Features and brushes

    def _feature_chosen(self, event: Any) -> None:
        if event.new:
            self.feature = event.new
            self._draw()

    def _add_feature(self) -> None:
        name = (self._new.value_input or self._new.value or "").strip()
        if name:
            self._new.param.update(value="", value_input="")
            self._show_feature(name)

    def _show_feature(self, name: str) -> None:
        options = [*self._features.options, *([name] if name not in self._features.options else [])]
        self._features.param.update(options=options, value=name)

    @param.depends("tool", "radius_voxels", watch=True)
    def _set_brush(self) -> None:
        value = TOOLS[self.tool]
        if self._attached:
            self.view.panes["z"].brush = {"radius": self.radius_voxels, **_brush(value), "keys": _KEYS}
        self._say_size()

    def _say_size(self) -> None:
        diameter = (2 * self.radius_voxels + 1) * self.view.info.voxel_size_angstrom
        self._size.object = f"{diameter:.0f} Å across" if self.view.volume else ""

    # Saving

    async def save(self) -> None:
        """Store a picture of each painted section, and a table of them that `go_on` and `annotate` take."""
        painted = self.painted
        edits = painted.edits
        try:
            if not painted.features:
                raise InvalidArgument("nothing is painted yet")
            self._say("saving …")
            self.saved = await off_the_loop(self._upload, painted, self.view.volume)
        except Failure as failure:
            self._fail(failure)
            return
        self._saved_edits = edits
        self._say(f"saved as\n{self.saved}")
        self._draw()

    def _upload(self, painted: PaintedSections, volume: str) -> str:
        features = []
        with tempfile.TemporaryDirectory(prefix="cryofleet-") as folder:
            for number, name in enumerate(painted.features, start=1):
                sections = painted.sections(name)
                uris = []
                for z in sections:
                    path = Path(folder) / f"painted-{number}-z{z:04d}.png"
                    path.write_bytes(to_png(painted.section(name, z)))
                    uris.append(self._client.upload(path))
                features.append({"name": name, "painted_uris": uris, "sections": sections})
            index = Path(folder) / "painting.json"
            index.write_text(json.dumps({"volume": volume, "features": features}, ensure_ascii=False))
            return self._client.upload(index)

    async def go_on(self, uri: str) -> None:
        """Put what was saved onto the volume that is looked at, in place of what is painted on these sections."""
        try:
            if not self.view.volume:
                raise InvalidArgument("choose a tomogram first")
            painted = self.painted
            for name, z, labels in await off_the_loop(self._download, uri, painted.shape):
                painted.load(name, z, labels)
                self._show_feature(name)
        except Failure as failure:
            self._fail(failure)
            return
        self.saved, self._saved_edits = uri, painted.edits
        self._say("painted before")
        self._draw()

    def _download(self, uri: str, shape: tuple[int, int, int]) -> list[tuple[str, int, NDArray[np.uint8]]]:
        """Feature, section and labels of each picture of a painting."""
        try:
            features = [
                (str(each["name"])[:100], [str(picture) for picture in each["painted_uris"]], list(each["sections"]))
                for each in json.loads(self._fetch(uri, _MOST_INDEX_BYTES))["features"]
            ]
            pictures = [
                (name, int(z), picture)
                for name, pictures, sections in features
                for picture, z in zip(pictures, sections, strict=True)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{uri} is no painting as this view saves it: {error}") from None
        if len(pictures) > MOST_PICTURES or any(not 0 <= z < shape[0] for _, z, _ in pictures):
            raise InvalidArgument(f"{uri} has more than {MOST_PICTURES} pictures, or of sections that are not there")
        most = shape[1] * shape[2] + (64 << 10)
        return [(name, z, from_png(self._fetch(each, most), each, shape[1:])) for name, z, each in pictures]

    def _fetch(self, uri: str, most_bytes: int) -> bytes:
        data = bytearray()
        for chunk in self._client.download_chunks(uri):
            data += chunk
            if len(data) > most_bytes:
                raise InvalidArgument(f"{uri} has more than {most_bytes:,} bytes: it is no part of a painting")
        return bytes(data)

    async def _uri_entered(self, _: Any) -> None:
        uri = (self._uri.value_input or self._uri.value or "").strip()
        if uri:
            await self.go_on(uri)

    # Going on

    async def _open_pipeline(self) -> None:
        if self._pipeline is not None:
            return
        try:
            described = await off_the_loop(self._client.pipelines)
        except Failure as failure:
            self._fail(failure)
            return
        found = next((each for each in described if each.name == PIPELINE), None)
        if found is None:
            return
        self._pipeline = orchestrator_pb2.PipelineDescription(name=found.name, help=found.help)
        own = ("painted", "features", "contrast")
        self._pipeline.parameters.extend(each for each in found.parameters if each.name not in own)
        self._fill_form()

    def _fill_form(self) -> None:
        if self._pipeline is not None:
            self._form = PipelineForm(self._pipeline, {"tomograms": [self.view.volume]} if self.view.volume else {})
            self._form_place[:] = [self._form]

    async def _start_clicked(self, _: Any) -> None:
        await self.start()

    async def start(self) -> None:
        """Save, and have the features found in the tomograms of the form."""
        if self._form is None:
            self._start_said.object = "the platform has no pipeline annotate, or did not say so yet"
            return
        await self.save()
        if self.painted.edits != self._saved_edits or not self.saved:
            return
        try:
            table = json.loads(await off_the_loop(self._fetch, self.saved, _MOST_INDEX_BYTES))
            arguments = self._form.arguments()
            arguments |= {"painted": self.view.volume, "features": table["features"]}
            arguments["contrast"] = "light" if self.view.info.contrast == common_pb2.CONTRAST_LIGHT else "dark"
            handle: RunHandle = await off_the_loop(self._client.run, PIPELINE, **arguments)
        except Failure as failure:
            self._start_said.object = str(failure)
            if self.on_failure is not None:
                self.on_failure(failure)
            return
        self._start_said.object = f"{handle.id} is started"
        if self.on_started is not None:
            self.on_started(handle.id)

    # What is said and drawn

    def _draw(self) -> None:
        if not self._attached or not self.view.volume:
            return
        painted, z = self.painted, round(self.view.position[2])
        labels = painted.section(self.feature, z)
        self.view.panes["z"].painted = overlay_frame(z, labels, self._stroke)
        positive, negative = painted.counts(self.feature)
        sections = painted.sections(self.feature)
        unsaved = ", not saved" if painted.edits != self._saved_edits else ""
        self._count.object = (
            f"{self.feature}: {positive:,} voxels are it, {negative:,} are not, "
            f"on {len(sections)} section{'s' * (len(sections) != 1)}{unsaved}"
        )
        self._say_size()

    def _say(self, said: str) -> None:
        self._said.object = said

    def _fail(self, failure: Failure) -> None:
        self._say(str(failure))
        if self.on_failure is not None:
            self.on_failure(failure)


def overlay_frame(z: int, labels: NDArray[np.uint8], stroke: int) -> bytes:
    """What is painted on a section as a pane takes it, cut to what has something; `stroke` is the last in it."""
    rows = np.flatnonzero(labels.any(axis=1))
    if not len(rows):
        return frame(z, (0, 0, 1, 1), (), answers=stroke)
    columns = np.flatnonzero(labels.any(axis=0))
    part = labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.frombytes("P", (part.shape[1], part.shape[0]), part.tobytes())
    image.putpalette([*(0, 0, 0), *rgb(_COLOURS[FEATURE]), *rgb(_COLOURS[NOT_FEATURE])])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0, compress_level=1)
    region = (int(columns[0]), int(rows[0]), part.shape[1], part.shape[0])
    return frame(z, region, [Picture("painted", "image/png", buffer.getvalue())], answers=stroke)
