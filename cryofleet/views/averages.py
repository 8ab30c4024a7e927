"""The averages view: slices, surface, resolution, directions of view and classes of what a run has averaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import panel as pn
import param

from cryofleet.client import ENDED, Client, state_name
from cryofleet.errors import Failure
from cryofleet.provenance import Origin, trace
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.buttons import button, button_row
from cryofleet.views.class_tree import ClassTree, class_tree_svg, classes_of_tables, tree_of_history, tree_of_steps
from cryofleet.views.fsc_curve import fsc_curves, fsc_svg
from cryofleet.views.run_averages import AverageSet, RunAverage, average_sets, class_tables, tomograms
from cryofleet.views.slices import off_the_loop
from cryofleet.views.surface import Density, Surface, read_density
from cryofleet.views.tables import read_json, read_particles
from cryofleet.views.text import text
from cryofleet.views.tomogram import TomogramView
from cryofleet.views.view_directions import directions_svg, view_directions

FOLLOW_MS = 1500
HELP = """Slices: wheel, Page Up, Page Down; click or arrows move the crosshair
Surface: drag or arrows turn it; wheel, + and - zoom; 0 shows all"""
_WIDE = {"sizing_mode": "stretch_width"}
_FULL = {"sizing_mode": "stretch_both"}
# A drawing must not hold its cell open: it would lie over the next one where the window becomes smaller.
_CELL = {"min-width": "0", "min-height": "0", "overflow": "hidden"}


class AveragesView(pn.viewable.Viewer):
    """What a run has averaged, one average at a time, and its particles in their tomogram.

    In a notebook: `view = AveragesView(client, run_id=run.id)`, then `await view.open()`, then
    `pn.Row(view.controls(), view, height=800)`.
    """

    run_id = param.String("", doc="The run whose averages are shown.")
    threshold = param.Number(0.0, doc="Of the surface, in the map's own unit, protein positive.")
    problem = param.String("", doc="What the platform answered last, where that was not what was asked for.")

    def __init__(self, client: Client, **params: Any) -> None:
        super().__init__(**params)
        self._client = client
        self.slices = TomogramView(client)
        self.slices.help.object = HELP
        self.on_look: Callable[[str, str, str, str], None] | None = None
        """Is told of a run, a tomogram, a table of particles and a volume of labels that somebody wants to look at."""
        self.on_failure: Callable[[Failure], None] | None = None
        self.record = orchestrator_pb2.Run()
        self.density: Density | None = None
        self._sets: list[AverageSet] = []
        self._shown = ""
        self._mapping = ""
        self._follower: Any = None
        self._which = pn.widgets.Select(label="Average", options={}, **_WIDE)
        self._tomogram = pn.widgets.Select(label="Tomogram", options={"none": ""}, value="", **_WIDE)
        self._slider = pn.widgets.FloatSlider(
            label="Threshold of the surface", start=0.0, end=1.0, step=0.005, show_value=False, **_WIDE
        )
        self._cut_said, self._said, self._resolution = text(), text(), text()
        self._look = button("Show particles", lambda _: self._show_particles(), "primary", disabled=True)
        self._map = button("Map back", self._map_back, disabled=True)
        self._labels = button("Show labels", lambda _: self._show_labels(), "success", visible=False)
        self._mapped: tuple[str, str, str, str] = ("", "", "", "")
        self._surface = Surface(**_FULL)
        self._fsc, self._directions, self._classes = (pn.Column(**_FULL, styles=_CELL) for _ in range(3))
        self._nothing = text(padding="24px", font_size="14px")
        self._grid = pn.GridSpec(**_FULL, mode="override", styles={"gap": "8px"}, visible=False)
        self._grid[0:11, 0:7], self._grid[0:11, 7:12] = self.slices, self._surface
        for number, place in enumerate((self._fsc, self._directions, self._classes)):
            self._grid[11:18, 4 * number : 4 * number + 4] = place
        self.slices.on_failure = self._fail
        self._which.param.watch(self._chosen, "value")
        self._slider.param.watch(self._moved, "value")
        self._tomogram.param.watch(lambda _: self._offer(), "value")

    def __panel__(self) -> pn.viewable.Viewable:
        return pn.Column(self._nothing, self._grid, **_FULL)

    def controls(self) -> pn.Column:
        """What the view is steered by, to stand beside it."""
        buttons = button_row(self._look, self._map, self._labels)
        return pn.Column(
            self._which, self._slider, self._cut_said, self._resolution, self._tomogram, buttons, self._said, **_WIDE
        )

    # What is looked at

    async def open(self) -> None:
        """Look at the averages of the run. Call it after `run_id` was set, and to look again at one that goes on."""
        if not self.run_id:
            self._empty("No run is chosen. Go to Runs and choose one that averages: average, faml, mine or discover.")
            return
        try:
            handle = await off_the_loop(self._client.get, self.run_id)
        except Failure as failure:
            self._fail(failure)
            return
        self.problem = ""
        if handle.record == self.record and self._shown:
            return
        self.record = handle.record
        self._sets = average_sets(self.record)
        if not self._sets:
            self._empty(f"Run {self.run_id} has no averages" + ("" if self._ended else " yet") + ".")
            return
        self._said.object = self._nothing.object = ""
        self._grid.visible = True
        options = {average.name: average.volume for each in self._sets for average in each.averages}
        kept = self._which.value if self._which.value in options.values() else next(iter(options.values()))
        self._which.param.update(options=options, value=kept)
        found = tomograms(self.record)
        self._tomogram.param.update(options={**found, "none": ""}, value=next(iter(found.values()), ""))
        await self._show(kept)
        if not found:
            await self._find_tomogram()

    @property
    def _ended(self) -> bool:
        return self.record.state in ENDED

    def _empty(self, why: str) -> None:
        self._shown, self.density, self._sets = "", None, []
        self._which.param.update(options={}, value=None)
        self._said.object, self._nothing.object = "", why
        self._grid.visible = False
        self._surface.display(None, "")
        self.slices.volume = ""
        for place in (self._fsc, self._directions, self._classes):
            place[:] = []
        self._resolution.object = self._cut_said.object = ""
        self._offer()

    def _average(self, volume: str) -> tuple[AverageSet, RunAverage] | None:
        pairs = ((each, average) for each in self._sets for average in each.averages)
        return next(((each, average) for each, average in pairs if average.volume == volume), None)

    def _chosen(self, event: Any) -> None:
        if event.new and event.new != self._shown:
            pn.state.execute(partial(self._show, event.new))

    async def _show(self, volume: str) -> None:
        """One average: each part of it as soon as it is there, whatever becomes of the others."""
        found = self._average(volume)
        if found is None or volume == self._shown:
            return
        self._shown = volume
        whole, average = found
        self._offer()
        self.slices.volume = volume
        await self.slices.open()
        await self._part(volume, self._show_surface, average)
        await self._part(volume, self._show_fsc, average)
        await self._part(volume, self._show_directions, average)
        await self._part(volume, self._show_classes, whole)

    async def _part(self, volume: str, show: Any, what: Any) -> None:
        if volume != self._shown:
            return  # another one was chosen meanwhile
        try:
            await show(what)
        except Failure as failure:
            self._fail(failure)

    async def _show_surface(self, average: RunAverage) -> None:
        self.density = None
        self._surface.display(None, "reading …")
        try:
            density: Density = await off_the_loop(read_density, self._client, average.volume)
        except Failure as failure:
            self._surface.display(None, str(failure))
            raise
        if average.volume != self._shown:
            return
        self.density = density
        low, high = density.range
        self._surface.display(density)
        step = (high - low) / 400
        # The ends themselves have no surface.
        self._slider.param.update(start=low + step, end=high - step, step=step, value=density.otsu())
        self._cut()

    async def _show_fsc(self, average: RunAverage) -> None:
        self._resolution.object = "" if average.fsc else "The run left no FSC of this average."
        self._fsc[:] = []
        if average.fsc:
            curves = fsc_curves(await off_the_loop(read_json, self._client, average.fsc), average.fsc)
            self._resolution.object = curves.summary()
            self._fsc[:] = [text("FSC of the half maps", font_size="12px"), pn.pane.HTML(fsc_svg(curves), **_FULL)]

    async def _show_directions(self, average: RunAverage) -> None:
        if not average.particles:
            self._directions[:] = [text("The run left no particles of this average.")]
            return
        particles = await off_the_loop(read_particles, self._client, average.particles)
        rotations = particles.rotations()
        if rotations is None or not len(particles):
            self._directions[:] = [text("The particles of this average have no orientations.")]
            return
        caption = text(f"Sides that the beam saw, z upwards: {len(particles):,} particles", font_size="12px")
        plot = pn.pane.HTML(directions_svg(view_directions(rotations)), **_FULL)
        self._directions[:] = [caption, plot]

    async def _show_classes(self, whole: AverageSet) -> None:
        if whole.history:
            history = await off_the_loop(read_json, self._client, whole.history)
            tree, caption = tree_of_history(history, whole.history), "Sizes of the classes by iteration"
        else:
            tree, caption = await self._tree(), "Classes by step"
        drawn = class_tree_svg(tree) if tree.worth_drawing else ""
        told = text(caption if drawn else "All particles are of one class.", font_size="12px")
        # All text in the drawing is escaped.
        self._classes[:] = [told, *([pn.pane.HTML(drawn, **_FULL)] if drawn else [])]

    async def _tree(self) -> ClassTree:
        steps = []
        for each in class_tables(self.record):
            tables = [await off_the_loop(read_particles, self._client, uri) for uri in each.uris]
            steps.append((each.step, classes_of_tables(tables, each.one_each)))
        return tree_of_steps(steps)

    # The surface

    def _moved(self, event: Any) -> None:
        if self.density is not None:
            self._cut()

    def _cut(self) -> None:
        assert self.density is not None
        self.threshold = self._slider.value
        self._surface.cut(self.density, self.threshold)
        self._cut_said.object = (
            f"{self.threshold:.4g}: {self.density.deviations(self.threshold):.2f} standard deviations above the mean; "
            f"encloses {self.density.volume_nm3(self.threshold):,.0f} nm³"
        )

    # In the tomogram

    async def _find_tomogram(self) -> None:
        """The tomogram that the run's particles were cut from, by what the results say of their making."""
        average = self._average(self._shown)
        if average is None or not average[1].particles:
            return
        self._said.object = "looking for the tomogram …"
        try:
            origin = await off_the_loop(trace, self._client, average[1].particles)
        except Failure as failure:
            self._fail(failure)
            return
        uris = [uri for uri in dict.fromkeys(_tomograms_in(origin)) if uri.endswith(".mrc")]
        self._said.object = "" if uris else "The particles were not cut from a tomogram of the platform."
        named = {uri.rsplit("/", 1)[-1] + (f" {n}" if len(uris) > 1 else ""): uri for n, uri in enumerate(uris, 1)}
        self._tomogram.param.update(options={**named, "none": ""}, value=next(iter(uris), ""))

    def _offer(self) -> None:
        found = self._average(self._shown)
        ready = bool(found is not None and found[1].particles and self._tomogram.value)
        self._look.disabled = not ready
        self._map.disabled = not ready or bool(self._mapping)

    def _show_particles(self) -> None:
        found = self._average(self._shown)
        if found is not None and self.on_look is not None:
            self.on_look(self.run_id, self._tomogram.value, found[1].particles, "")

    def _show_labels(self) -> None:
        if self.on_look is not None:
            self.on_look(*self._mapped)

    async def _map_back(self, _: Any) -> None:
        """Start a run that puts the average into the tomogram, at the poses of its particles."""
        found = self._average(self._shown)
        if found is None or self._mapping:
            return
        whole, average = found
        all_of_them = bool(whole.particles) and len(whole.averages) > 1
        averages = [each.volume for each in whole.averages] if all_of_them else [average.volume]
        particles = whole.particles if all_of_them else average.particles
        tomogram = self._tomogram.value
        self._map.disabled = True
        try:
            handle = await off_the_loop(
                self._client.run, "map-back", tomogram=tomogram, particles=particles, averages=averages
            )
        except Failure as failure:
            self._said.object = str(failure)
            self._fail(failure)
            self._offer()
            return
        self._mapping = handle.id
        self._labels.visible = False
        self._said.object = f"{handle.id} is started"

        async def follow() -> None:
            await self._follow_mapping(handle.id, tomogram, particles)

        # It ends with the visitor's session.
        self._follower = pn.state.add_periodic_callback(follow, period=FOLLOW_MS)  # type: ignore[arg-type]  # awaited

    async def _follow_mapping(self, run_id: str, tomogram: str, particles: str) -> None:
        try:
            handle = await off_the_loop(self._client.get, run_id)
        except Failure as failure:
            self._fail(failure)
            if failure.status == "UNAVAILABLE":
                return  # asked again
            self._stop_following(str(failure))
            return
        state = state_name(handle.record)
        if handle.record.state not in ENDED:
            self._said.object = f"{run_id}: {state}"
            return
        labels = handle.outputs.get("labels")
        self._stop_following(f"{run_id}: {state}\n{handle.record.error or handle.outputs.get('note') or ''}".strip())
        if state == "succeeded" and labels is not None:
            self._mapped = (run_id, tomogram, particles, labels.uri)
            self._labels.visible = True

    def _stop_following(self, said: str) -> None:
        if self._follower is not None:
            self._follower.stop()
        self._follower, self._mapping = None, ""
        self._said.object = said
        self._offer()

    def _fail(self, failure: Failure) -> None:
        self.problem = str(failure)
        if self.on_failure is not None:
            self.on_failure(failure)


def _tomograms_in(origin: Origin) -> list[str]:
    """What an artifact's ancestors were cut from, the nearest first."""
    found, waiting = [], [origin]
    while waiting:
        each = waiting.pop(0)
        if each.operation == "picking.Extract":
            found += [source.uri for source in each.inputs.get("tomogram_uri", ())]
        else:
            waiting += [source for sources in each.inputs.values() for source in sources]
    return found
