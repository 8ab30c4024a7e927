"""What `top` makes of the orchestrator's answers."""

from __future__ import annotations

import time

import pytest
from rich.console import Console

from cryofleet.cli.top import (
    Picture,
    Rates,
    _operation_lines,
    _pool_line,
    _run_line,
    _tables,
)
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2


def _instance(name: str, ready: bool = True, free: int = 1) -> pb.InstanceStatus:
    return pb.InstanceStatus(
        address=f"unix:/{name}",
        instance=name,
        ready=ready,
        slots_total=4,
        slots_free=free,
        memory_total_bytes=8 * 2**30,
        memory_free_bytes=5 * 2**30,
    )


def _pool() -> pb.PoolStatus:
    pool = pb.PoolStatus(name="picking", tasks_queued=7, tasks_running=4)
    pool.instances.extend([_instance("a", free=1), _instance("b", free=3), _instance("gone", ready=False)])
    pool.instances[1].set_aside_until.GetCurrentTime()
    operation = runtime_pb2.RunningOperation(operation="picking.Extract", run_id="r", fraction=0.25, phase="cutting")
    operation.started_at.FromSeconds(int(time.time()) - 90)
    pool.instances[0].running.append(operation)
    return pool


def _run(**states: tuple[pb.StepState.ValueType, int, int, int]) -> pb.Run:
    """Steps by id (two underscores for a dot) with state, tasks, those done, and of those the ones from the store."""
    run = pb.Run(id="r", pipeline="discover", project="default", owner="ana", state=pb.RUN_STATE_RUNNING)
    run.started_at.FromSeconds(int(time.time()) - 120)
    for name, (state, total, done, cached) in states.items():
        run.steps.add(
            id=name.replace("__", "."),
            operation="" if name == "outer" else "picking.Extract",
            state=state,
            tasks_total=total,
            tasks_done=done,
            tasks_cached=cached,
            fraction=done / total if total else 0.0,
            phase="cutting" if state == pb.STEP_STATE_RUNNING else "",
        )
    return run


def test_a_pool_is_the_sum_of_its_ready_instances() -> None:
    line = _pool_line(_pool())
    assert (line.instances_ready, line.instances, line.instances_set_aside) == (2, 3, 1)
    assert (line.slots_busy, line.slots, line.waiting) == (4, 8, 7)
    assert (line.memory_granted_bytes, line.memory_bytes) == (6 * 2**30, 16 * 2**30)


def test_an_operation_is_told_with_its_place_and_time() -> None:
    (line,) = _operation_lines(_pool())
    assert (line.operation, line.pool, line.instance, line.run) == ("picking.Extract", "picking", "a", "r")
    assert 89 <= line.seconds <= 95
    assert (line.fraction, line.phase) == (0.25, "cutting")


def test_a_run_is_as_far_as_its_outer_steps() -> None:
    run = _run(
        read=(pb.STEP_STATE_SUCCEEDED, 1, 1, 1),
        left_out=(pb.STEP_STATE_SKIPPED, 0, 0, 0),
        outer=(pb.STEP_STATE_RUNNING, 2, 1, 0),
        outer__cut=(pb.STEP_STATE_RUNNING, 10, 5, 1),
        last=(pb.STEP_STATE_WAITING, 0, 0, 0),
    )
    line = _run_line(run, Rates(), time.monotonic())
    assert line.fraction == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert (line.tasks_done, line.tasks) == (6, 11), "a step that holds others has no tasks of its own"
    assert line.tasks_per_minute == pytest.approx(2.0, rel=0.05), "4 were computed in 2 minutes, 2 were there"
    assert line.doing == "outer.cut: cutting"


def test_the_rate_is_that_of_the_last_minute() -> None:
    rates = Rates()
    assert rates.per_minute("r", 1000, 600, now=0) == 100, "since its start, where it was not watched"
    assert rates.per_minute("r", 1001, 605, now=5) == pytest.approx(1001 / 605 * 60), "not over a moment"
    assert rates.per_minute("r", 1010, 630, now=30) == 20
    assert rates.per_minute("r", 1010, 700, now=100) == 0
    assert rates.per_minute("r", 4, 2, now=102) == 120, "another attempt begins anew"
    rates.keep({"other"})
    assert rates.per_minute("r", 10, 60, now=103) == 10
    assert rates.per_minute("new", 0, 0, now=103) == 0


def test_names_from_outside_are_no_markup() -> None:
    run = _run(cut=(pb.STEP_STATE_RUNNING, 3, 1, 0))
    run.owner = "[red]x[/red]"
    picture = Picture([_pool_line(_pool())], [_run_line(run, Rates(), 0.0)], _operation_lines(_pool()))
    console = Console(width=160, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_tables(picture, "as it was before"))
    text = console.export_text()
    console.file.close()
    assert "[red]x[/red]" in text
    for words in ("picking", "2/3", "4/8", "6.0 GiB of 16.0 GiB", "1 set aside", "cut: cutting", "as it was before"):
        assert words in text
