"""The clusters view: decoded centres to choose among, the embedding with a lasso, and runs started from the choice."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import param
from numpy.typing import NDArray

from cryofleet.client import Client, RunHandle
from cryofleet.errors import Failure, InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR
from cryofleet.particles import Particles
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.boxes import Boxes, open_boxes, read_box, sections_picture
from cryofleet.views.buttons import button, button_row
from cryofleet.views.clustered_run import ClusteredRun, Embedding, clustered, embedding_of
from cryofleet.views.gallery import Gallery, Item, Key, SmallPicture
from cryofleet.views.groups import Groups, ranges_text
from cryofleet.views.parameters import PipelineForm
from cryofleet.views.scatter import Scatter, within
from cryofleet.views.slices import off_the_loop
from cryofleet.views.tables import MOST_BYTES, read_particles
from cryofleet.views.text import text

CLUSTERING = ("mine-features", "discover", "mine")
"""Pipelines whose runs have clusters."""
STARTS = ("segment-weakly", "average", "faml")
"""Pipelines that a choice of clusters can be given to."""
HELP = """In the gallery: click or space chooses, Shift with it all between; a all, Escape none;
arrows, Page Up, Page Down move; g puts the chosen into the group named at the left.
In the plot: drag a lasso, with Shift to add; wheel, + and - zoom; Alt and drag, arrows move; 0 all."""
_RECENT, _OFFERED = 100, 20
NOTHING = "No run has clusters yet. Go to Runs and start mine-features or discover, which make them."
_GREY = "#bbbbbb"
# What picks and boxes of further tomograms must have in common with those that were clustered.
_AS_MINED = (
    "voxel_size_angstrom", "overrule_voxel_size", "tilt_min_degrees", "tilt_max_degrees", "contrast",
    "smoothing_angstrom", "particle_diameter_angstrom", "sigma_ratio", "min_distance_angstrom", "threshold",
    "max_picks", "box_size_voxels", "edges",
)  # fmt: skip


class ClustersView(pn.viewable.Viewer):
    """Clusters of a run of mine-features, discover or mine: look, choose, name, and go on with the choice.

    In a notebook: `view = ClustersView(client, run_id=run.id)`, then `await view.open()`, then
    `pn.Row(view.controls(), view)`.
    """

    run_id = param.String("", doc="The run whose clusters are shown.")
    lasso_takes: Any = param.Selector(default="clusters", objects=["clusters", "particles"])

    def __init__(self, client: Client, **params: Any) -> None:
        self._client = client
        self.groups = Groups()
        self.lassoed: NDArray[np.int64] = np.zeros(0, np.int64)
        """Ids of the particles in the lasso, where it takes particles."""
        self.on_failure: Callable[[Failure], None] | None = None
        self.on_started: Callable[[str], None] | None = None
        """Hears of the id of a run that was started."""
        self.found: ClusteredRun | None = None
        self._boxes: Boxes | None = None
        self._embedding: Embedding | None = None
        self._form: PipelineForm | None = None
        self._pipelines: dict[str, orchestrator_pb2.PipelineDescription] = {}
        self.gallery = Gallery(self._pictures, label="decoded cluster centres", side=120)
        self.gallery.on_key = self._key
        self.gallery.on_failure = self._fail
        self.plot = Scatter(
            self._lassoed, self._marked, palette=[_GREY, *CLASS_COLOURS, OTHER_CLASSES_COLOUR],
            sizing_mode="stretch_both", min_height=240,
        )  # fmt: skip
        super().__init__(**params)
        wide = {"sizing_mode": "stretch_width"}
        self._said, self._count, self._start_said = text(), text(font_weight="bold"), text()
        self._nothing = text(NOTHING, padding="24px", font_size="14px")
        self._nothing.visible = False
        self._both = pn.Row(sizing_mode="stretch_both")
        self._runs = pn.widgets.Select(label="Run", options={"none": ""}, value="", **wide)
        self._runs.param.watch(self._run_chosen, "value")
        self._name = pn.widgets.TextInput(label="Name of a group", placeholder="membrane", max_length=100, **wide)
        self._name.param.watch(lambda _: self._group(), "enter_pressed")
        self._listed = pn.Column(**wide)
        self._which = pn.widgets.Select(label="Start from the choice", options=[], **wide)
        self._which.param.watch(lambda _: self._fill_form(), "value")
        self._form_place = pn.Column(**wide)
        self.gallery.param.watch(lambda _: self._draw(), "selected")

    def __panel__(self) -> pn.viewable.Viewable:
        takes = pn.widgets.RadioButtonGroup.from_param(self.param.lasso_takes, sizing_mode="stretch_width")
        beside = pn.Column(
            text("A lasso takes", font_weight="bold"), takes, self.plot, text(HELP, font_size="12px"),
            sizing_mode="stretch_height", styles={"width": "38%", "min-width": "340px"},
        )  # fmt: skip
        self._both[:] = [self.gallery, beside]
        return pn.Column(self._nothing, self._both, sizing_mode="stretch_both")

    def controls(self) -> pn.Column:
        """What is done with the clusters, to stand beside them."""
        wide = {"sizing_mode": "stretch_width"}
        group = button("Put into the group", lambda _: self._group(), "primary")
        release = button("Take out", lambda _: self._release())
        save = button("Save the particles", self._save_clicked)
        start = button("Start", self._start_clicked, "success")
        return pn.Column(
            self._runs, self._count, self._name, button_row(group, release, save), self._listed, self._said,
            self._which, self._form_place, button_row(start), self._start_said,
            **wide,
        )  # fmt: skip

    # Opening

    async def open(self) -> None:
        """Show the clusters of the run that `run_id` names, and offer the others that have some."""
        try:
            if not self._pipelines:
                described = await off_the_loop(self._client.pipelines)
                self._pipelines = {each.name: each for each in described}
                starts = [name for name in STARTS if name in self._pipelines]
                self._which.param.update(options=starts, value=next(iter(starts), None))
            offered = await self._with_clusters()
            if not self.run_id or self.run_id not in offered.values():
                self.run_id = await self._other(offered)
            self._runs.param.update(options={**offered, **({} if offered else {"none": ""})}, value=self.run_id)
            self._nothing.visible, self._both.visible = not self.run_id, bool(self.run_id)
            if self.run_id:
                await self._show()
        except Failure as failure:
            self._fail(failure)

    async def _with_clusters(self) -> dict[str, str]:
        """The newest runs that have clusters. A list comes without steps: those that may have some are asked."""
        runs = await off_the_loop(self._client.runs, _RECENT)
        made = [run.id for run in runs if run.pipeline in CLUSTERING and run.HasField("finished_at")][:_OFFERED]
        handles = await asyncio.gather(*(off_the_loop(self._client.get, run) for run in made))
        return {handle.id: handle.id for handle in handles if clustered(handle.record) is not None}

    async def _other(self, offered: dict[str, str]) -> str:
        """The run that is asked for where it has clusters after all, being an old one; else the newest that has."""
        if self.run_id:
            handle = await off_the_loop(self._client.get, self.run_id)
            if clustered(handle.record) is not None:
                offered[self.run_id] = self.run_id
                return self.run_id
        return next(iter(offered.values()), "")

    async def _show(self) -> None:
        handle: RunHandle = await off_the_loop(self._client.get, self.run_id)
        found = clustered(handle.record)
        if found is None:
            raise InvalidArgument(f"run {self.run_id} has no clusters")
        if self.found is not None and found.centres_uri == self.found.centres_uri:
            return
        boxes = await off_the_loop(open_boxes, self._client, found.centres_uri)
        embedding = await off_the_loop(self._read_embedding, found.embedding_uri)
        self.found, self._boxes, self._embedding = found, boxes, embedding
        self.groups, self.lassoed = Groups(), np.zeros(0, np.int64)
        shares = [f", {share:.0%} of the variance" for share in embedding.explained] + ["", ""]
        self.plot.fill(embedding.points, f"first component{shares[0]}", f"second component{shares[1]}")
        self.gallery.selected = []
        self.gallery.fill(self._items())
        part = f"; the plot has {len(embedding.ids):,} of them" if len(embedding.ids) < embedding.particles else ""
        self._say(f"{len(boxes)} clusters of {embedding.particles:,} particles{part}")
        self._fill_form()
        self._draw()

    def _read_embedding(self, uri: str) -> Embedding:
        data = bytearray()
        for chunk in self._client.download_chunks(uri):
            data += chunk
            if len(data) > MOST_BYTES:
                raise InvalidArgument(f"{uri} has more than {MOST_BYTES >> 20} MiB: the page shows none as large")
        try:
            table = json.loads(data)
        except ValueError as error:
            raise InvalidArgument(f"{uri} is no JSON: {error}") from None
        return embedding_of(table, uri)

    async def _pictures(self, keys: Sequence[Key]) -> Sequence[SmallPicture]:
        boxes = self._boxes
        if boxes is None:
            return []
        return [await off_the_loop(self._picture, boxes, int(key) - 1) for key in keys]

    def _picture(self, boxes: Boxes, place: int) -> SmallPicture:
        return sections_picture(read_box(self._client, boxes, place), boxes.info.contrast)

    # Choosing

    @property
    def chosen(self) -> list[int]:
        """Numbers of the clusters that are chosen, from 1."""
        return [int(key) for key in self.gallery.selected]

    def _lassoed(self, corners: NDArray[np.float64], more: bool) -> None:
        if self._embedding is None:
            return
        if self.lasso_takes == "clusters":
            inside = np.flatnonzero(within(self._embedding.centres, corners)) + 1
            self.gallery.choose(inside.tolist(), more)
            return
        inside = self._embedding.ids[within(self._embedding.points, corners)]
        self.lassoed = np.union1d(self.lassoed, inside) if more else np.sort(inside)
        self._draw()

    def _marked(self, number: int, more: bool) -> None:
        among = set(self.chosen)
        self.gallery.choose(among ^ {number} if more else {number})

    @param.depends("lasso_takes", watch=True)
    def _took(self) -> None:
        self.lassoed = np.zeros(0, np.int64)
        self._draw()

    # Groups

    def _key(self, key: str, _: Key) -> None:
        if key == "g":
            self._group()

    def _group(self) -> None:
        try:
            self.groups.put(self._name.value_input or self._name.value or "", self.chosen)
        except Failure as failure:
            self._say(str(failure))
            return
        self._regrouped()

    def _release(self) -> None:
        self.groups.release(self.chosen)
        self._regrouped()

    def _regrouped(self) -> None:
        self._say("")
        self._listed[:] = [self._group_row(name) for name in self.groups]
        self.gallery.retitle(self._items())
        self._draw()

    def _group_row(self, name: str) -> pn.Row:
        members = self.groups.members(name)
        choose = button("Choose", lambda _: self.gallery.choose(members), margin=(2, 10))
        mark = pn.Spacer(width=12, height=12, styles={"background": self.groups.colour(name)}, margin=(10, 0, 10, 10))
        said = text(f"{name}: {ranges_text(members)} ({self._particles(members):,} particles)")
        said.margin = (8, 6)
        return pn.Row(mark, said, choose, sizing_mode="stretch_width")

    # Going on with the choice

    async def _run_chosen(self, event: Any) -> None:
        if event.new and event.new != self.run_id:
            self.run_id = event.new
            await self.open()

    def _fill_form(self) -> None:
        description = self._pipelines.get(self._which.value or "")
        if description is None or self.found is None:
            return
        given = {}
        if description.name == "segment-weakly":
            given = {name: self.found.arguments[name] for name in _AS_MINED if name in self.found.arguments}
            source = self.found.arguments.get("tomogram")
            given |= {"tomograms": [source]} if isinstance(source, str) else {}
        rest = orchestrator_pb2.PipelineDescription(name=description.name, help=description.help)
        rest.parameters.extend(each for each in description.parameters if each.name not in self._own(description.name))
        self._form = PipelineForm(rest, given)
        self._form_place[:] = [self._form]

    def _own(self, pipeline: str) -> tuple[str, ...]:
        """Parameters that the view itself gives."""
        return ("subtomograms", "model", "particles", "groups") if pipeline == "segment-weakly" else (
            "subtomograms", "particles"
        )  # fmt: skip

    async def _start_clicked(self, _: Any) -> None:
        await self.start()

    async def start(self) -> None:
        """Start the pipeline of the form from the choice: weak segmentation from the groups, others from the particles
        of the lasso or of the chosen clusters.
        """
        if self._form is None or self.found is None:
            self._start_said.object = "there are no clusters to start from"
            return
        self._start_said.object = "starting …"
        pipeline = self._form.pipeline.name
        try:
            arguments = self._form.arguments()
            if not self.found.subtomograms_uri:
                raise InvalidArgument(f"run {self.found.run_id} does not say what its subtomograms are")
            arguments["subtomograms"] = self.found.subtomograms_uri
            if pipeline == "segment-weakly":
                if not len(self.groups):
                    raise InvalidArgument("put clusters into a group first: the groups are what is learnt")
                arguments |= {"model": self.found.model_uri, "particles": self.found.particles_uri}
                arguments["groups"] = self.groups.texts()
            else:
                arguments["particles"] = await self.save()
            handle: RunHandle = await off_the_loop(self._client.run, pipeline, **arguments)
        except Failure as failure:
            self._start_said.object = str(failure)
            if self.on_failure is not None:
                self.on_failure(failure)
            return
        self._start_said.object = f"{handle.id} is started"
        if self.on_started is not None:
            self.on_started(handle.id)

    async def _save_clicked(self, _: Any) -> None:
        try:
            uri = await self.save()
        except Failure as failure:
            self._say(str(failure))
            if self.on_failure is not None:
                self.on_failure(failure)
            return
        self._say(f"saved as\n{uri}")

    async def save(self) -> str:
        """Store the particles of the lasso, or of the chosen clusters, as a table with their groups; its URI.

        Raises InvalidArgument where none are chosen, and the Failure that the platform answers with.
        """
        if self.found is None or not (len(self.lassoed) or self.chosen):
            raise InvalidArgument("choose some clusters, or particles by the lasso, first")
        uri: str = await off_the_loop(self._save, self.found.particles_uri, self.lassoed, self.chosen)
        return uri

    def _save(self, particles_uri: str, ids: NDArray[np.int64], clusters: Sequence[int]) -> str:
        particles = read_particles(self._client, particles_uri)
        if "class_id" not in particles.table:
            raise InvalidArgument(f"{particles_uri} has no column class_id: it is no table of clusters' particles")
        numbers = particles.table["class_id"].to_numpy() + 1
        rows = np.isin(particles.table["id"].to_numpy(), ids) if len(ids) else np.isin(numbers, clusters)
        chosen: Particles = particles.select(rows)
        names = np.array([self.groups.of(int(number)) for number in numbers[rows]], object)
        if any(names):
            chosen = chosen.with_columns(class_name=names)
        with tempfile.TemporaryDirectory(prefix="cryofleet-") as folder:
            path = Path(folder) / "chosen-particles.parquet"
            path.write_bytes(chosen.to_parquet())
            return self._client.upload(path)

    # What is said and drawn

    def _items(self) -> list[Item]:
        count = len(self._boxes) if self._boxes is not None else 0
        items = []
        for number in range(1, count + 1):
            group = self.groups.of(number)
            size = self._particles([number])
            title = f"{number}: {size:,} particle{'s' * (size != 1)}"
            items.append(Item(number, title, group, self.groups.colour(group) if group else ""))
        return items

    def _particles(self, clusters: Sequence[int]) -> int:
        sizes = self.found.sizes if self.found is not None else ()
        return sum(sizes[number - 1] for number in clusters if number <= len(sizes))

    def _draw(self) -> None:
        chosen = self.chosen
        if len(self.lassoed):
            self._count.object = f"{len(self.lassoed):,} particles in the lasso"
        else:
            self._count.object = (
                f"{len(chosen)} cluster{'s' * (len(chosen) != 1)} chosen, {self._particles(chosen):,} particles"
            )
        embedding = self._embedding
        if embedding is None:
            return
        kind_of = np.zeros(len(embedding.centres) + 1, np.uint8)  # by cluster; 0 for none
        for rank, name in enumerate(self.groups, start=1):
            members = [number for number in self.groups.members(name) if number < len(kind_of)]
            kind_of[members] = min(rank, len(CLASS_COLOURS) + 1)
        lit = np.isin(embedding.ids, self.lassoed) if len(self.lassoed) else np.isin(embedding.clusters, chosen)
        among = set(chosen)
        self.plot.param.update(
            kinds=kind_of[embedding.clusters].tobytes(),
            lit=lit.astype(np.uint8).tobytes() if lit.any() else b"",
            marks=[
                [number, float(x), float(y), self.plot.palette[kind_of[number]], number in among]
                for number, (x, y) in enumerate(embedding.centres, start=1)
            ],
        )

    def _say(self, said: str) -> None:
        self._said.object = said

    def _fail(self, failure: Failure) -> None:
        self._say(str(failure))
        if self.on_failure is not None:
            self.on_failure(failure)
