"""All views on one page, for a browser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlencode

import panel as pn

from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.views.averages import AveragesView
from cryofleet.views.clustered_run import clustered
from cryofleet.views.clusters import ClustersView
from cryofleet.views.painting import PaintingView
from cryofleet.views.picking import PickingView
from cryofleet.views.runs import REFRESH_MS, RunsView, artifacts
from cryofleet.views.text import text
from cryofleet.views.tomogram import TomogramView

VIEWS = ("runs", "tomogram", "picking", "painting", "clusters", "averages")
_SELDOM = 4
_STYLE = """
#main { padding: 0; } #sidebar { padding: 10px; }
#header .title { font-size: 1.2em; }
"""


class _Template(pn.template.VanillaTemplate):
    """Panel's plainest template, without the font that it would fetch from elsewhere."""

    _resources: ClassVar[Any] = {}


class Page:
    """One visitor's page. What is looked at is in its address, so that a link can be shared."""

    def __init__(self, client: Client, editor: str = "", on_sign_out: Callable[[], None] | None = None) -> None:
        """`on_sign_out` is called where the platform does not take the visitor's token any more."""
        self._client = client
        self._on_sign_out = on_sign_out
        self.runs = RunsView(client)
        self.tomogram = TomogramView(client)
        self.picking = PickingView(client, self.tomogram, editor)
        self.painting = PaintingView(client, self.tomogram)
        self.clusters = ClustersView(client)
        self.averages = AveragesView(client)
        self.choice = pn.widgets.RadioButtonGroup(
            options={name.capitalize(): name for name in VIEWS}, value="runs", color="primary"
        )
        self._problem = text(background="#d55e00", color="#ffffff", padding="4px 10px")
        self._problem.visible = False
        self._problem.css_classes = ["problem"]
        self._run = ""
        self._ticks = 0
        self._uris = {
            name: pn.widgets.Select(label=title, options={"none": ""}, value="", sizing_mode="stretch_width")
            for name, title in (
                ("volume", "Tomogram"), ("particles", "Picks"), ("second", "Compare with"), ("labels", "Labels"),
            )
        }  # fmt: skip
        self._main = pn.Column(sizing_mode="stretch_both")
        self._side = pn.Column(sizing_mode="stretch_width")

    def template(self) -> Any:
        """The page as Panel serves it."""
        made: Any = _Template(title="Cryofleet", sidebar_width=300, raw_css=[_STYLE], busy_indicator=None)
        made.header.append(self.choice)
        made.sidebar.append(self._side)
        height = {"height": "calc(100vh - 80px)"}
        made.main.append(pn.Column(self._problem, self._main, sizing_mode="stretch_both", styles=height))
        self._main.styles = height
        self._follow()
        pn.state.onload(self._open)
        return made

    def _follow(self) -> None:
        self.choice.param.watch(lambda _: self._show(), "value")
        self.runs.on_look = self.averages.on_look = self._look
        self.clusters.on_started = self.painting.on_started = self._started
        self.painting.on_failure = self.clusters.on_failure = self._failed
        for view in (self.runs, self.tomogram, self.averages):
            view.on_failure = self._failed
            view.param.watch(lambda _: self._say(), "problem")
        for name, select in self._uris.items():
            select.param.watch(partial(self._selected, name), "value")
        self.tomogram.param.watch(lambda _: self._address(), "position")
        self.runs.param.watch(lambda _: self._address(), "run_id")

    async def _open(self) -> None:
        asked = dict(pn.state.location.query_params) if pn.state.location else {}
        self._run = str(asked.get("run", ""))
        self.runs.run_id = self._run
        await self.runs.refresh()
        self._offer()
        place = _place(str(asked.get("at", "")))
        chosen = {name: str(asked[name]) for name in self._uris if asked.get(name)}
        if "volume" in chosen:
            self._put(chosen)
            await self.tomogram.open(place)
        view = str(asked.get("view", ""))
        self.choice.value = view if view in VIEWS else "runs"
        self._show()
        pn.state.add_periodic_callback(self._tick, period=REFRESH_MS)  # type: ignore[arg-type]  # awaited

    async def _tick(self) -> None:
        """Runs are followed closely where they are shown; elsewhere it is enough to hear that the platform is away."""
        self._ticks += 1
        if self.choice.value == "runs" or self._ticks % _SELDOM == 0:
            await self.runs.refresh()

    def _show(self) -> None:
        view = self.choice.value
        self.painting.detach()
        if view == "picking":
            self.picking.attach()
        else:
            self.picking.detach()
        if view == "painting":
            self.painting.attach()
        if view == "clusters":
            self._main[:] = [self.clusters]
            self._side[:] = [self.clusters.controls()]
            pn.state.execute(self._open_clusters)
        elif view == "averages":
            self._main[:] = [self.averages]
            self._side[:] = [self.averages.controls()]
            pn.state.execute(self._open_averages)
        elif view == "runs":
            self._main[:] = [self.runs]
            self._side[:] = [self.runs.form()]
        else:
            files = pn.Column(*self._uris.values(), sizing_mode="stretch_width")
            self._main[:] = [self.tomogram]
            if view == "picking":
                self._main[:] = [self.tomogram, self.picking.gallery]
                self._side[:] = [self._uris["volume"], self._uris["particles"], self.picking]
            elif view == "painting":
                self._side[:] = [self._uris["volume"], self.painting]
            else:
                self._side[:] = [files, self.tomogram.controls()]
        self._address()

    async def _open_clusters(self) -> None:
        if self.runs.run_id and clustered(self.runs.record) is not None:
            self.clusters.run_id = self.runs.run_id
        await self.clusters.open()

    async def _open_averages(self) -> None:
        self.averages.run_id = self.runs.run_id
        await self.averages.open()

    def _started(self, run: str) -> None:
        """Follow a run that another view has started."""

        async def follow() -> None:
            await self.runs.choose(run)
            self.choice.value = "runs"

        pn.state.execute(follow)

    def _look(self, run: str, volume: str, particles: str, labels: str = "") -> None:
        async def open_it() -> None:
            self._run = run
            self._offer()
            self._put({"volume": volume, "particles": particles, "labels": labels})
            await self.tomogram.open()
            self.choice.value = "tomogram"

        pn.state.execute(open_it)

    def _put(self, chosen: dict[str, str]) -> None:
        """What is looked at, without each choice opening it anew."""
        self.tomogram.param.update(**{name: chosen.get(name, "") for name in self._uris})
        for name, select in self._uris.items():
            uri = chosen.get(name, "")
            if uri not in select.options.values():
                select.options = {**select.options, uri.rsplit("/", 1)[-1]: uri}
            select.value = uri

    def _selected(self, name: str, event: Any) -> None:
        pn.state.execute(partial(self._chosen, name, event.new))

    async def _chosen(self, name: str, uri: str) -> None:
        if getattr(self.tomogram, name) == uri:
            return
        setattr(self.tomogram, name, uri)
        if name == "volume":
            await self.tomogram.open()
        elif name == "particles":
            await self.tomogram.open_particles()
        self._address()

    def _offer(self) -> None:
        found = list(artifacts(self.runs.record))
        for name, select in self._uris.items():
            ending = ".parquet" if name == "particles" else ".mrc"
            options = {"none": "", **{title: uri for title, uri in found if uri.endswith(ending)}}
            if select.value and select.value not in options.values():
                options[select.value.rsplit("/", 1)[-1]] = select.value
            select.options = options

    def _address(self) -> None:
        location = pn.state.location
        if location is None:
            return
        at = ",".join(f"{value:.0f}" for value in self.tomogram.position) if self.tomogram.volume else ""
        wanted = {"view": self.choice.value, "run": self.runs.run_id, "at": at}
        wanted |= {name: getattr(self.tomogram, name) for name in self._uris}
        location.search = "?" + urlencode({name: value for name, value in wanted.items() if value})

    def _say(self) -> None:
        problems = dict.fromkeys(view.problem for view in (self.runs, self.tomogram, self.averages) if view.problem)
        self._problem.object = "\n".join(problems)
        self._problem.visible = bool(problems)

    def _failed(self, failure: Failure) -> None:
        if failure.status == "UNAUTHENTICATED" and self._on_sign_out is not None:
            self._on_sign_out()


def _place(text: str) -> tuple[float, float, float] | None:
    """x,y,z of an address; None where it is no place."""
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (x, y, z) if all(abs(value) < 1e6 for value in (x, y, z)) else None
