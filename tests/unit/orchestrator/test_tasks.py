"""One task against instances that refuse, fail, hang, lie and die."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cryofleet.channels import REASON_DRAINING, REASON_KEY, REASON_NEVER_FITS, REASON_TOO_LARGE
from cryofleet.operations import find_operation
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2, runtime_pb2
from orchestrator import set_aside, tasks
from orchestrator.cache import ResultCache
from orchestrator.placement import Placement
from orchestrator.tasks import Outcome, TaskRequest, TaskRunner
from tests.unit.orchestrator.fake import FakeService, settings_in, short_folder


class Instances:
    """Some instances of one pool, and a runner of tasks."""

    def __init__(self, home: Path, count: int, pool_wait_seconds: float = 5.0, slots: int = 2) -> None:
        self.services = [FakeService(f"i{number}", slots) for number in range(count)]
        self.addresses = [f"unix:{home}/{service.name}.sock" for service in self.services]
        self.settings = settings_in(home, pools={"io": ",".join(self.addresses)}, pool_wait_seconds=pool_wait_seconds)
        self.placement = Placement(self.settings)
        self.runner = TaskRunner(self.settings, ResultCache(Store(self.settings.store)), self.placement)
        self.reported: list[tuple[float, str]] = []

    async def start(self) -> None:
        for service, address in zip(self.services, self.addresses, strict=True):
            await service.start(address)
        await self.placement.start()

    async def stop(self) -> None:
        await self.placement.close()
        self.runner.close()
        for service in self.services:
            await service.kill()

    async def do(self, index: int = 0, **fields: Any) -> Outcome:
        task = TaskRequest(f"task-{index}", "run", "default", "runtime.SelfTest", {"index": index, **fields})
        return await self.runner.run(task, lambda fraction, phase: self.reported.append((fraction, phase)))

    @property
    def calls(self) -> list[str]:
        return [service.name for service in self.services for _ in service.calls]


class Home:
    """A folder, and the instances that were made in it."""

    def __init__(self) -> None:
        self.path = short_folder()
        self.made: list[Instances] = []


@pytest.fixture
async def home(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    monkeypatch.setattr(tasks, "_BACKOFF_SECONDS", (0.01, 0.05))
    home = Home()
    yield home
    for made in home.made:
        await made.stop()
    shutil.rmtree(home.path)


async def instances(home: Home, count: int, start: bool = True, **options: Any) -> Instances:
    made = Instances(home.path, count, **options)
    home.made.append(made)
    if start:
        await made.start()
    return made


def failing(status: grpc.StatusCode, times: int, details: str = "on purpose", reason: str = "") -> Any:
    left = [times]

    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            await context.abort(status, details, ((REASON_KEY, reason),) if reason else ())

    return behave


async def test_a_result_with_its_key(home: Home) -> None:
    made = await instances(home, 1)
    outcome = await made.do(7, rows={"first": 64, "count": 3})
    assert outcome["status"] == "OK"
    assert outcome["task"] == "task-7"
    assert outcome["result"] == {"index": 7, "first_row": 64, "instance": "i0", "next_index": 8, "counted": True}
    assert outcome["seconds"] == 0.25
    assert outcome["attempts"] == 1
    assert (0.5, "testing") in made.reported


async def test_more_tasks_than_slots_wait_for_theirs(home: Home) -> None:
    made = await instances(home, 2, slots=2)
    outcomes = await asyncio.gather(*(made.do(index, seconds=0.02) for index in range(20)))
    assert [outcome["result"]["index"] for outcome in outcomes] == list(range(20))
    assert [service.peak for service in made.services] == [2, 2]
    assert [service.refused for service in made.services] == [0, 0]


async def test_busy_is_no_failed_attempt(home: Home) -> None:
    made = await instances(home, 1, slots=1)
    service = made.services[0]
    await _ready(made)
    service.running += 1  # somebody else's, of which the orchestrator has not heard yet
    task = asyncio.create_task(made.do())
    async with asyncio.timeout(5):
        while not service.refused:
            await asyncio.sleep(0.005)
    service.running -= 1
    outcome = await task
    assert outcome["status"] == "OK"
    assert outcome["attempts"] == 1
    assert service.calls == ["task-0"]


async def _ready(made: Instances) -> None:
    async with asyncio.timeout(5):
        while made.placement.pools["io"].slots < sum(service.slots for service in made.services):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED"])
async def test_what_cannot_get_better_is_not_tried_again(home: Home, status: str) -> None:
    made = await instances(home, 2)
    for service in made.services:
        service.behave = failing(grpc.StatusCode[status], 99, "no such thing")
    outcome = await made.do()
    assert (outcome["status"], outcome["cause"]) == (status, "no such thing")
    assert len(made.calls) == 1


@pytest.mark.parametrize("status", ["INTERNAL", "UNKNOWN", "DATA_LOSS"])
async def test_what_may_get_better_is_tried_once_more_elsewhere(home: Home, status: str) -> None:
    made = await instances(home, 2)
    await _ready(made)
    behave = failing(grpc.StatusCode[status], 1)
    for service in made.services:
        service.behave = behave
    outcome = await made.do()
    assert outcome["status"] == "OK"
    assert outcome["attempts"] == 2
    assert sorted(made.calls) == ["i0", "i1"]
    for service in made.services:
        service.calls.clear()
        service.behave = failing(grpc.StatusCode[status], 99)
    outcome = await made.do()
    assert (outcome["status"], len(made.calls)) == (status, 2)
    assert "tried 2 times" in outcome["cause"]


async def test_a_draining_instance_is_left_for_another(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    for service in made.services:
        service.behave = failing(grpc.StatusCode.UNAVAILABLE, 1, "is stopping", REASON_DRAINING)
    made.services[1].behave = None
    made.services[0].draining = True
    outcomes = [await made.do(index) for index in range(4)]
    assert all(outcome["status"] == "OK" and outcome["attempts"] == 1 for outcome in outcomes)
    assert len(made.services[1].done) == 4


async def test_storage_that_is_away_is_waited_for(home: Home) -> None:
    made = await instances(home, 1)
    made.services[0].behave = failing(grpc.StatusCode.UNAVAILABLE, 8, "the store at s3://x is away")
    outcome = await made.do()
    assert outcome["status"] == "OK"
    assert outcome["attempts"] == 9


async def test_storage_is_not_waited_for_for_ever(home: Home) -> None:
    made = await instances(home, 1, pool_wait_seconds=0.3)
    made.services[0].behave = failing(grpc.StatusCode.UNAVAILABLE, 10**6, "the store at s3://x is away")
    outcome = await made.do()
    assert outcome["status"] == "UNAVAILABLE"
    assert "the store at s3://x is away" in outcome["cause"]


async def test_a_killed_instance_costs_only_time(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    begun = asyncio.Event()

    async def hold(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        begun.set()
        await asyncio.sleep(30)

    for service in made.services:
        service.behave = hold
    task = asyncio.create_task(made.do())
    await begun.wait()
    first = next(service for service in made.services if service.calls)
    other = next(service for service in made.services if service is not first)
    other.behave = None
    await first.kill()
    outcome = await task
    assert outcome["status"] == "OK"
    assert outcome["result"]["instance"] == other.name


async def test_an_instance_that_comes_back_is_used_again_soon(home: Home) -> None:
    made = await instances(home, 1)
    assert (await made.do(1))["status"] == "OK"
    await made.services[0].kill()
    task = asyncio.create_task(made.do(2))
    await asyncio.sleep(0.7)
    await made.services[0].start(made.addresses[0])
    started = time.monotonic()
    outcome = await task
    waited = time.monotonic() - started
    assert outcome["status"] == "OK"
    assert waited < 3.0, "gRPC's default back-off would be much longer"


async def test_a_task_that_ends_its_instances_is_given_up(home: Home) -> None:
    made = await instances(home, 4)
    await _ready(made)

    def deadly(service: FakeService) -> Any:
        async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
            asyncio.get_running_loop().create_task(service.kill())
            await asyncio.sleep(30)

        return behave

    for service in made.services:
        service.behave = deadly(service)
    outcome = await made.do()
    assert outcome["status"] == "UNAVAILABLE"
    assert "failed on 3 instances" in outcome["cause"]
    assert len(made.calls) == 3


async def test_no_instance_at_all_names_the_pool(home: Home) -> None:
    made = await instances(home, 1, start=False, pool_wait_seconds=0.4)
    await made.placement.start()
    outcome = await made.do()
    assert outcome["status"] == "UNAVAILABLE"
    assert f"pool io ({made.addresses[0]}) has had no ready instance" in outcome["cause"]


async def test_a_hang_behind_heartbeats_is_ended(home: Home) -> None:
    made = await instances(home, 1)
    limit = find_operation("runtime.SelfTest").stall_limit_seconds

    async def hang(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        for seconds in (1.0, limit - 1, limit + 1):
            heartbeat = common_pb2.Heartbeat(seconds_since_progress=seconds)
            await context.write(runtime_pb2.SelfTestResponse(heartbeat=heartbeat))
        await asyncio.sleep(30)

    made.services[0].behave = hang
    outcome = await made.do()
    assert outcome["status"] == "DEADLINE_EXCEEDED"
    assert "made no progress for 121 s on instance i0 (tried 2 times)" in outcome["cause"]
    async with asyncio.timeout(5):
        while len(made.services[0].cancelled) < 2:  # the service is told of it, too
            await asyncio.sleep(0.005)


async def test_a_silent_stream_counts_as_lost(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SILENCE_SECONDS", 0.1)
    made = await instances(home, 2)
    await _ready(made)
    slow = [True]

    async def silent(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if slow.pop() if slow else False:
            await asyncio.sleep(30)

    for service in made.services:
        service.behave = silent
    outcome = await made.do()
    assert outcome["status"] == "OK"
    assert outcome["attempts"] == 2


async def test_another_tasks_result_is_never_taken(home: Home) -> None:
    made = await instances(home, 1)
    made.services[0].answers_for = "task-8"
    outcome = await made.do(7)
    assert outcome["status"] == "INTERNAL"
    assert "answered task task-7 with that of 'task-8'" in outcome["cause"]


async def test_an_instance_that_is_too_small_is_left_for_a_larger_one(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    made.services[0].behave = failing(grpc.StatusCode.FAILED_PRECONDITION, 99, "needs 9 GiB", REASON_NEVER_FITS)
    outcomes = [await made.do(index) for index in range(4)]
    assert all(outcome["result"]["instance"] == "i1" for outcome in outcomes)
    made.services[1].behave = failing(grpc.StatusCode.FAILED_PRECONDITION, 99, "needs 9 GiB", REASON_NEVER_FITS)
    outcome = await made.do()
    assert (outcome["status"], outcome["cause"]) == ("FAILED_PRECONDITION", "needs 9 GiB")


async def test_what_is_too_large_is_given_up_at_once(home: Home) -> None:
    made = await instances(home, 2)
    for service in made.services:
        service.behave = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 99, "of 9 GiB", REASON_TOO_LARGE)
    outcome = await made.do()
    assert (outcome["status"], outcome["cause"]) == ("RESOURCE_EXHAUSTED", "of 9 GiB")
    assert sum(len(service.calls) for service in made.services) == 1


async def test_a_task_that_fails_on_three_instances_is_given_up_with_all_causes(home: Home) -> None:
    made = await instances(home, 4)
    await _ready(made)
    for service in made.services:
        service.behave = failing(grpc.StatusCode.INTERNAL, 99, f"of {service.name}")
    outcome = await made.do()
    tried = made.calls
    assert len(set(tried)) == len(tried) == 3
    assert outcome["status"] == "INTERNAL"
    assert outcome["cause"].endswith(" (failed on 3 instances)")
    for name in tried:
        assert f"{name}: of {name}" in outcome["cause"]
    aside = made.placement.pools["io"].set_aside
    assert all(aside.works(address) and not aside.causes(address) for address in made.addresses)


async def test_an_instance_that_fails_what_others_do_is_set_aside_and_tried_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_aside, "SECONDS", (0.6, 3.0))
    made = await instances(home, 2, slots=2)
    await _ready(made)
    bad, good = made.services
    bad.behave = failing(grpc.StatusCode.INTERNAL, 10**6, "CUDA error")
    outcomes = await asyncio.gather(*(made.do(index, seconds=0.02) for index in range(40)))
    assert all(outcome["status"] == "OK" for outcome in outcomes)
    assert len(good.done) == 40
    aside = made.placement.pools["io"].set_aside
    assert not aside.works(made.addresses[0])
    assert aside.causes(made.addresses[0]) == ["INTERNAL: CUDA error"]
    assert 3 <= len(bad.calls) <= 5, "those that were there already, and perhaps a trial"
    async with asyncio.timeout(5):
        while not aside.on_trial(made.addresses[0]):
            await asyncio.sleep(0.01)
    before = len(bad.calls)
    assert (await made.do(100))["status"] == "OK"
    assert len(bad.calls) == before + 1, "one task is tried there, and then done elsewhere"
    assert not aside.on_trial(made.addresses[0])
    bad.behave = None
    async with asyncio.timeout(5):
        while not aside.on_trial(made.addresses[0]):
            await asyncio.sleep(0.01)
    bad.peak = 0
    bad.done.clear()
    outcomes = await asyncio.gather(*(made.do(index, seconds=0.05) for index in range(200, 212)))
    assert all(outcome["attempts"] == 1 for outcome in outcomes)
    assert aside.works(made.addresses[0])
    assert bad.peak == 2, "after its trial it takes work as before"


async def test_an_instance_that_answers_for_other_tasks_is_set_aside(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    made.services[0].answers_for = "another"
    outcomes = await asyncio.gather(*(made.do(index) for index in range(12)))
    assert all(outcome["status"] == "OK" and outcome["result"]["instance"] == "i1" for outcome in outcomes)
    aside = made.placement.pools["io"].set_aside
    assert not aside.works(made.addresses[0])
    assert "with that of 'another'" in aside.causes(made.addresses[0])[0]


async def test_wrong_arguments_set_no_instance_aside(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    for service in made.services:
        service.behave = failing(grpc.StatusCode.INVALID_ARGUMENT, 99, "no such thing")
    await asyncio.gather(*(made.do(index) for index in range(12)))
    aside = made.placement.pools["io"].set_aside
    assert all(aside.works(address) for address in made.addresses)


async def test_where_only_set_aside_instances_are_left_they_are_tried_at_once(home: Home) -> None:
    made = await instances(home, 2)
    await _ready(made)
    aside = made.placement.pools["io"].set_aside
    for number in range(3):
        aside.failed(made.addresses[0], f"{number}", "INTERNAL: once")
    assert not aside.works(made.addresses[0])
    await made.services[1].kill()
    outcomes = await asyncio.gather(*(made.do(index, seconds=0.01) for index in range(6)))
    assert all(outcome["status"] == "OK" for outcome in outcomes)
    assert aside.works(made.addresses[0])


async def test_wrong_fields_are_an_outcome_too(home: Home) -> None:
    made = await instances(home, 1)
    unknown = await made.do(colour="red")
    wrong = await made.do(seconds="long")
    missing = await made.runner.run(
        TaskRequest("t", "run", "default", "picking.Evaluate", {"truth_uri": "file:///x"}), lambda *_: None
    )
    nothing = f"file://{home.path}/store/default/none.mrc"
    nowhere = await made.runner.run(
        TaskRequest("t", "run", "default", "io.Filter", {"volume_uri": nothing}), lambda *_: None
    )
    assert (unknown["status"], wrong["status"], missing["status"]) == ("INVALID_ARGUMENT",) * 3
    assert "colour" in unknown["cause"]
    assert "seconds" in wrong["cause"]
    assert "particles_uri" in missing["cause"]
    assert nowhere["status"] == "NOT_FOUND"
    assert nowhere["input_uri"] == nothing
    assert made.calls == []
