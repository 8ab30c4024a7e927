"""A platform that does not answer is said to be away while one waits for it, and no longer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from cryofleet.client import Client
from cryofleet.errors import Unavailable
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views import runs
from cryofleet.views.runs import RunsView

# Bokeh's own, with pandas 3.1.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")


class Platform:
    """Answers when `there` is set; refuses where `refuses`."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.refuses = False

    def pipelines(self) -> list[orchestrator_pb2.PipelineDescription]:
        return [orchestrator_pb2.PipelineDescription(name="pick-dog")]

    def runs(self, limit: int) -> list[orchestrator_pb2.Run]:
        if self.refuses:
            raise Unavailable("connection refused")
        assert self.there.wait(30)
        return [orchestrator_pb2.Run(id="a-run", pipeline="pick-dog")]

    def pools(self) -> list[orchestrator_pb2.PoolStatus]:
        return []


async def test_it_says_so_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE_SECONDS", 0.01)
    platform = Platform()
    view = RunsView(cast(Client, platform))
    said = asyncio.Event()
    view.param.watch(lambda event: said.set() if event.new else None, "problem")
    asking = asyncio.create_task(view.refresh())
    await asyncio.wait_for(said.wait(), 20)
    assert "does not answer" in view.problem
    assert not asking.done()
    platform.there.set()
    await asyncio.wait_for(asking, 20)
    assert view.problem == ""
    listed: Any = view._list.value
    assert list(listed["run"]) == ["a-run"]


async def test_refusals_are_said_until_it_answers() -> None:
    platform = Platform()
    platform.there.set()
    view = RunsView(cast(Client, platform))
    platform.refuses = True
    await view.refresh()
    assert "connection refused" in view.problem
    platform.refuses = False
    await view.refresh()
    assert view.problem == ""
