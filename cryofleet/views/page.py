"""All views on one page, for a browser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import panel as pn
from panel.theme.base import Inherit
from panel.theme.native import Native

from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.views.averages import AveragesView
from cryofleet.views.buttons import button
from cryofleet.views.clustered_run import clustered
from cryofleet.views.clusters import ClustersView
from cryofleet.views.painting import PaintingView
from cryofleet.views.picking import PickingView
from cryofleet.views.runs import REFRESH_MS, RunsView, artifacts
from cryofleet.views.text import text
from cryofleet.views.tomogram import TomogramView

VIEWS = ("runs", "tomogram", "picking", "painting", "clusters", "averages")
_SELDOM = 4
_SHEET = Path(__file__).with_name("page.css").read_text()
_HEAD_PIXELS = 46
_STYLE = (
    f"#header {{ height: {_HEAD_PIXELS}px; }}"
    + """
#header { box-sizing: border-box; padding: 0 10px; box-shadow: none !important; }
#header .title { font-size: 17px; font-weight: 600; } #header-items { padding-left: 8px; }
#sidebar { padding: 6px 4px; } #main { padding: 0 6px 0 8px; overflow: hidden; }
"""
)
_HEADER_COLOUR = "#16242f"


class _Look(Native):
    """Panel's plainest design, and what all widgets of the page have in common."""

    modifiers: ClassVar[Any] = {
        **Native.modifiers,
        **{kind: {"stylesheets": [Inherit, _SHEET]} for kind in (pn.widgets.Widget, pn.Tabs, pn.Accordion, pn.Card)},
    }


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
            options={name.capitalize(): name for name in VIEWS}, value="runs", margin=0, css_classes=["tabs"]
        )
        self._problem = text(background="#a84300", color="#ffffff", padding="4px 10px")
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
        made: Any = _Template(
            title="Cryofleet", sidebar_width=300, raw_css=[_STYLE], busy_indicator=None, design=_Look,
            header_background=_HEADER_COLOUR, header_color="#ffffff",
        )  # fmt: skip
        made.header.append(pn.Row(self.choice, pn.layout.HSpacer(), self._theme_button(), sizing_mode="stretch_width"))
        made.sidebar.append(self._side)
        height = f"calc(100vh - {_HEAD_PIXELS}px)"
        made.main.append(pn.Column(self._problem, self._main, sizing_mode="stretch_width", styles={"height": height}))
        self._follow()
        pn.state.onload(self._open)
        return made

    def _theme_button(self) -> pn.widgets.Button:
        """Loads the page again in the other colours, which its address then names."""
        other = "default" if _is_dark() else "dark"
        made = button("Light" if _is_dark() else "Dark", lambda _: None, margin=(8, 0), css_classes=["quiet"])
        made.description = "Light or dark colours"
        made.js_on_click(
            code=f"const at = new URL(window.location); at.searchParams.set('theme', '{other}'); window.location = at"
        )
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
        view = view if view in VIEWS else "runs"
        # Shown once: what is drawn a second time loses a click on what was there the first time.
        if self.choice.value == view:
            self._show()
        else:
            self.choice.value = view
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
            self._main[:] = [self.tomogram, *([self.picking.gallery] if view == "picking" else [])]
            if view == "picking":
                self._side[:] = [self._uris["volume"], self._uris["particles"], self.picking]
            elif view == "painting":
                self._side[:] = [self._uris["volume"], self.painting]
            else:
                files = [self._uris["volume"], self._uris["particles"], self._uris["labels"], self._uris["second"]]
                self._side[:] = [*files, self.tomogram.comparing(), self.tomogram.controls()]
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
        wanted["theme"] = "dark" if _is_dark() else ""
        location.search = "?" + urlencode({name: value for name, value in wanted.items() if value})

    def _say(self) -> None:
        problems = dict.fromkeys(view.problem for view in (self.runs, self.tomogram, self.averages) if view.problem)
        self._problem.object = "\n".join(problems)

    def _failed(self, failure: Failure) -> None:
        if failure.status == "UNAUTHENTICATED" and self._on_sign_out is not None:
            self._on_sign_out()


def _is_dark() -> bool:
    return bool(pn.config.theme == "dark")


def _place(text: str) -> tuple[float, float, float] | None:
    """x,y,z of an address; None where it is no place."""
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (x, y, z) if all(abs(value) < 1e6 for value in (x, y, z)) else None
