"""The runs view: what happened in a run, and the pools."""

from __future__ import annotations

from typing import Any, cast

import pytest
from google.protobuf.json_format import ParseDict

from cryofleet.client import Client, RunHandle
from cryofleet.errors import Unavailable
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.run_log import logged_lines, pool_row, run_log, running_lines
from cryofleet.views.runs import RunsView

RUN: dict[str, Any] = {
    "id": "r-1",
    "pipeline": "pick-dog",
    "state": "RUN_STATE_FAILED",
    "attempt": 2,
    "owner": "ana",
    "error": "step pick: <b>no voxel size</b>",
    "created_at": "2026-05-04T10:00:00Z",
    "started_at": "2026-05-04T10:00:01Z",
    "finished_at": "2026-05-04T10:01:00Z",
    "steps": [
        {
            "id": "ingest", "operation": "io.Ingest", "state": "STEP_STATE_SUCCEEDED", "tasks_total": 4,
            "tasks_done": 4, "tasks_cached": 3, "compute_seconds": 2.5,
            "started_at": "2026-05-04T10:00:02Z", "finished_at": "2026-05-04T10:00:59Z",
        },
        {
            "id": "pick", "operation": "picking.Saliency", "state": "STEP_STATE_RUNNING", "fraction": 0.25,
            "phase": "filtering", "started_at": "2026-05-04T10:00:03Z",
        },
    ],
    "set_aside": [{"step": "pick", "item": "2", "status": "DATA_LOSS", "cause": "truncated"}],
}  # fmt: skip
POOL: dict[str, Any] = {
    "name": "picking",
    "tasks_running": 1,
    "tasks_queued": 5,
    "paused_at": "2026-05-04T09:00:00Z",
    "paused_by": "ben",
    "paused_because": "new disks",
    "instances": [
        {
            "instance": "picking-0", "ready": True, "slots_total": 2, "slots_free": 1, "memory_total_bytes": 4 << 30,
            "memory_free_bytes": 1 << 30, "set_aside_until": "2026-05-04T11:00:00Z",
            "running": [{"operation": "picking.Saliency", "run_id": "r-1", "fraction": 0.5, "phase": "filtering"},
                        {"operation": "picking.Extract", "run_id": "r-2"}],
        },
        {"address": "10.0.0.2:50051", "ready": False, "slots_total": 2, "slots_free": 2, "error": "does not answer"},
    ],
}  # fmt: skip


LOG: dict[str, Any] = {
    "lines": [
        {
            "time": "2026-05-04T10:00:05.250Z", "level": "ERROR", "instance": "picking-0", "task_key": "r-1:2/pick",
            "operation": "picking.Saliency", "message": "internal <b>error</b>",
            "fields": {"error_id": "0123456789ab"},
        },
        {"time": "2026-05-04T10:01:00Z", "level": "INFO", "instance": "one", "message": "attempt 2 ended as failed"},
    ],
    "cut": True,
    "unread": [{"pool": "io", "address": "10.0.0.2:50051", "cause": "it did not answer within 2 s"}],
}  # fmt: skip


def log(**other: Any) -> orchestrator_pb2.ReadLogResponse:
    return ParseDict({**LOG, **other}, orchestrator_pb2.ReadLogResponse())


def run(**other: Any) -> orchestrator_pb2.Run:
    return ParseDict({**RUN, **other}, orchestrator_pb2.Run())


def pool() -> orchestrator_pb2.PoolStatus:
    return ParseDict(POOL, orchestrator_pb2.PoolStatus())


def test_a_run_tells_what_happened_in_order() -> None:
    assert run_log(run()) == [
        "10:00:00  submitted by ana",
        "10:00:01  started, attempt 2",
        "10:00:02  ingest (io.Ingest): began",
        "10:00:03  pick (picking.Saliency): began",
        "10:00:59  ingest (io.Ingest): succeeded, 4 of 4 tasks, 3 known already, computed 2.5 s",
        "10:01:00  failed: step pick: <b>no voxel size</b>",
        "set aside: pick 2: DATA_LOSS truncated",
    ]
    assert running_lines(run(), [pool()]) == [
        "now: pick: 25% filtering",
        "now: picking.Saliency on picking-0: 50% filtering",
    ]


def test_what_processes_logged_is_told_line_by_line() -> None:
    assert logged_lines(log()) == [
        "logged:",
        "(older lines are not kept)",
        "10:00:05.250  ERROR  picking-0 picking.Saliency pick: internal <b>error</b> (error_id 0123456789ab)",
        "10:01:00.000  INFO  one: attempt 2 ended as failed",
        "10.0.0.2:50051 (io) does not say what it logged: it did not answer within 2 s",
    ]
    assert logged_lines(orchestrator_pb2.ReadLogResponse()) == []


def test_a_pool_counts_what_is_ready() -> None:
    assert pool_row(pool()) == {
        "pool": "picking",
        "state": "paused by ben: new disks; does not answer",
        "instances": "1 of 2 ready, 1 set aside",
        "slots free": "1 of 2",
        "memory free": "1.0 of 4.0 GiB",
        "running": "1",
        "queued": "5",
    }


class Platform:
    """Answers as an orchestrator would, or not at all."""

    def __init__(self) -> None:
        self.away = False
        self.done: list[str] = []
        self.logged = log()
        self.log_read = 0

    def pipelines(self) -> list[orchestrator_pb2.PipelineDescription]:
        return [orchestrator_pb2.PipelineDescription(name="pick-dog")]

    def runs(self, limit: int) -> list[orchestrator_pb2.Run]:
        if self.away:
            raise Unavailable("the orchestrator is away")
        return [run()]

    def pools(self) -> list[orchestrator_pb2.PoolStatus]:
        return [pool()]

    def log(self, run_id: str, limit: int) -> orchestrator_pb2.ReadLogResponse:
        self.log_read += 1
        return self.logged

    def get(self, run_id: str) -> RunHandle:
        platform = self

        class Handle:
            record = run()

            def resume(self) -> None:
                platform.done.append(f"resume {run_id}")

        return cast(RunHandle, Handle())


# Bokeh calls pandas in a way that pandas is going to leave.
@pytest.mark.filterwarnings("ignore:The inplace keyword")
async def test_the_view_shows_log_and_pools_and_resumes() -> None:
    platform = Platform()
    view = RunsView(cast(Client, platform), run_id="r-1")
    await view.refresh()
    assert view._log.object.splitlines()[-2:] == [
        "now: pick: 25% filtering", "now: picking.Saliency on picking-0: 50% filtering",
    ]  # fmt: skip
    assert list(view._pools.value["slots free"]) == ["1 of 2"]
    assert (view._cancel.disabled, view._resume.disabled, view._retry.disabled) == (True, False, True)
    before = view._pools.value
    await view.refresh()
    assert view._pools.value is before  # what has not changed is not drawn anew
    await view._act("resume")
    assert platform.done == ["resume r-1"]
    platform.away = True
    await view.refresh()
    assert view.problem == "the orchestrator is away"
    platform.away = False
    await view.refresh()
    assert view.problem == ""


@pytest.mark.filterwarnings("ignore:The inplace keyword")
async def test_the_log_is_read_while_it_is_looked_at_and_until_all_of_it_is_there() -> None:
    platform = Platform()
    view = RunsView(cast(Client, platform), run_id="r-1")
    await view.refresh()
    assert platform.log_read == 0
    view._details.active = 1
    await view.refresh()
    shown = view._logged.object.splitlines()
    assert logged_lines(log())[2] in shown
    assert "<b>" not in view._logged._transform_object(view._logged.object)["object"]
    assert shown[-1].startswith("10.0.0.2:50051 (io) does not say")
    read = platform.log_read
    await view.refresh()
    assert platform.log_read == read + 1, "an instance did not answer"
    platform.logged = log(unread=[])
    for _ in range(4):
        await view.refresh()
    assert platform.log_read == read + 3, "of a run that has ended, until nothing more comes"
    assert "does not say" not in view._logged.object
