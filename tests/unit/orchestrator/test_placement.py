from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cryofleet.channels import open_channel
from cryofleet.errors import Unavailable
from orchestrator import placement
from orchestrator.placement import Instance, Placement, Pool
from tests.unit.orchestrator.fake import FakeService, settings_in, short_folder


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_least_loaded_instance_is_taken(home: Path) -> None:
    services = [FakeService("small", 2), FakeService("large", 6)]
    addresses = [f"unix:{home}/{service.name}" for service in services]
    for service, address in zip(services, addresses, strict=True):
        await service.start(address)
    pool = Pool("io", ",".join(addresses), settings_in(home, pools={}))
    await pool.start()
    try:
        await until(lambda: pool.slots == 8)
        taken = []
        async with asyncio.TaskGroup() as group:
            leave = asyncio.Event()

            async def hold() -> None:
                async with pool.slot() as instance:
                    taken.append(instance.name)
                    await leave.wait()

            for _ in range(9):
                group.create_task(hold())
            await until(lambda: len(taken) == 8)
            assert (taken.count("small"), taken.count("large")) == (2, 6)
            # By the fourth, the larger one has had three of its six and the smaller one of its two.
            assert sorted(taken[:4]) == ["large", "large", "large", "small"]
            assert (pool.running, pool.waiting) == (8, 1)
            leave.set()
        assert (pool.running, pool.waiting) == (0, 0)
        # Slots that others have taken are not there for us.
        services[1].running = 6
        await until(lambda: pool.instances[addresses[1]].others == 6)
        async with pool.slot() as first, pool.slot() as second:
            assert (first.name, second.name) == ("small", "small")
    finally:
        await pool.close()
        for service in services:
            await service.kill()


async def test_names_are_resolved_again_and_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New addresses are found, those that are gone are left, and a name server that is away changes nothing."""
    services = {ip: FakeService(ip, 1) for ip in ("10.0.0.1", "10.0.0.2")}
    for ip, service in services.items():
        await service.start(f"unix:{home}/{ip}")
    answers: list[str] | None = []
    opened: list[tuple[str, str | None]] = []

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("learning.cluster", 7000)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers]

    def open_unix(address: str, tls: Any, server_name: str | None) -> Any:
        opened.append((address, server_name))
        return open_channel(f"unix:{home}/{address.partition(':')[0]}")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    monkeypatch.setattr(placement, "open_channel", open_unix)
    monkeypatch.setattr(placement, "RESOLVE_SECONDS", 0.02)
    pool = Pool("learning", "dns:///learning.cluster:7000", settings_in(home, pools={}, pool_wait_seconds=0.3))
    await pool.start()
    try:
        with pytest.raises(Unavailable, match=r"pool learning .*Name or service not known"):
            async with pool.slot():
                pass
        waiting = asyncio.create_task(_name_of_slot(pool))
        answers = ["10.0.0.1"]
        assert await waiting == "10.0.0.1", "scaled up from zero"
        answers = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: pool.slots == 2)
        answers = None
        await asyncio.sleep(0.1)
        assert pool.slots == 2
        answers = ["10.0.0.2"]
        await until(lambda: set(pool.instances) == {"10.0.0.2:7000"})
        assert opened == [("10.0.0.1:7000", "learning.cluster"), ("10.0.0.2:7000", "learning.cluster")]
    finally:
        await pool.close()
        for service in services.values():
            await service.kill()


async def test_a_new_instance_takes_work_within_ten_seconds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = {ip: FakeService(ip, 1) for ip in ("10.0.0.1", "10.0.0.2")}
    answers = ["10.0.0.1"]

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers]

    def open_unix(address: str, tls: Any, server_name: str | None) -> Any:
        return open_channel(f"unix:{home}/{address.partition(':')[0]}")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    monkeypatch.setattr(placement, "open_channel", open_unix)
    pool = Pool("learning", "dns:///learning.cluster:7000", settings_in(home, pools={}))
    await services["10.0.0.1"].start(f"unix:{home}/10.0.0.1")
    await pool.start()
    try:
        async with pool.slot():
            waiting = asyncio.create_task(_name_of_slot(pool))
            await asyncio.sleep(0.1)
            assert pool.waiting == 1
            await services["10.0.0.2"].start(f"unix:{home}/10.0.0.2")
            answers.append("10.0.0.2")
            async with asyncio.timeout(10):
                assert await waiting == "10.0.0.2"
    finally:
        await pool.close()
        for service in services.values():
            await service.kill()


async def _name_of_slot(pool: Pool) -> str:
    async with pool.slot() as instance:
        return instance.name


async def test_a_gpu_is_preferred_while_one_is_free(home: Path) -> None:
    pool = Pool("learning", "", settings_in(home, pools={}))
    for name, devices in (("c", ("cpu",)), ("g", ("cpu", "cuda"))):
        channel = open_channel(f"unix:{home}/{name}")
        pool.instances[name] = Instance(name, channel, name, ready=True, slots_total=1, devices=devices)
    async with pool.slot(gpu=True) as first, pool.slot(gpu=True) as second:
        assert (first.name, second.name) == ("g", "c")
    async with pool.slot(avoid=frozenset({"g"}), gpu=True) as only:
        assert only.name == "c"
    async with pool.slot(avoid=frozenset({"g", "c"})):
        pass  # where all are to be avoided, any will do
    await pool.close()


async def test_leaving_the_queue_gives_back_what_was_just_given(home: Path) -> None:
    pool = Pool("io", "", settings_in(home, pools={}))
    pool.instances["one"] = Instance("one", open_channel(f"unix:{home}/one"), "one", ready=True, slots_total=1)
    async with pool.slot():
        waiters = [asyncio.create_task(_name_of_slot(pool)) for _ in range(3)]
        await asyncio.sleep(0)
        assert pool.waiting == 3
        waiters[0].cancel()
    # The first was cancelled in the same moment as the slot came free.
    assert await waiters[1] == "one"
    assert await waiters[2] == "one"
    assert (pool.running, pool.waiting, pool.instances["one"].running) == (0, 0, 0)
    await pool.close()


async def test_a_paused_pool_gives_no_slots_and_loses_no_patience(home: Path) -> None:
    pool = Pool("io", "", settings_in(home, pools={}, pool_wait_seconds=0.1))
    await pool.start()
    pool.instances["one"] = Instance("one", open_channel(f"unix:{home}/one"), "one", ready=True, slots_total=2)
    async with pool.slot() as running:
        pool.set_paused(True)
        waiting = asyncio.create_task(_name_of_slot(pool))
        pool.instances["one"].set_away("is away")
        await asyncio.sleep(0.4)
        assert not waiting.done(), "neither a slot, nor that there is none"
        pool.instances["one"].ready = True
        assert (running.running, pool.waiting) == (1, 1)
        pool.set_paused(False)
        assert await waiting == "one"
    await pool.close()


async def test_users_take_turns_for_the_slots_of_a_pool(home: Path) -> None:
    pool = Pool("io", "", settings_in(home, pools={}))
    pool.instances["one"] = Instance("one", open_channel(f"unix:{home}/one"), "one", ready=True, slots_total=2)
    order: list[str] = []

    async def work(user: str) -> None:
        async with pool.slot(user=user):
            order.append(user)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(work("ana"))
        await asyncio.sleep(0)
        assert order == ["ana", "ana"], "alone she has them all"
        for _ in range(5):
            group.create_task(work("ben"))
    assert order[2:12].count("ben") == 5, "then every other slot is his"
    assert order[12:] == ["ana"] * 13
    await pool.close()


async def test_an_unknown_pool_names_its_setting(home: Path) -> None:
    with pytest.raises(Unavailable, match="CRYOFLEET_POOL_ALIGNMENT"):
        Placement(settings_in(home, pools={})).pool("alignment")
