"""What `doctor` says of pools, with instances that listen on sockets of the test's own."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cryofleet import doctor
from cryofleet.channels import open_blocking_channel
from cryofleet.doctor import Finding
from tests.unit.orchestrator.fake import FakeService, settings_in, short_folder


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    services = [FakeService(name) for name in ("first", "second")]
    for service in services:
        await service.start(f"unix:{folder}/{service.name}.sock")
    yield folder
    for service in services:
        await service.kill()
    shutil.rmtree(folder, ignore_errors=True)


async def findings(home: Path, pool: str) -> list[Finding]:
    """Those of the pool `io`."""
    settings = replace(settings_in(home, pools={"io": pool}), orchestrator=f"unix:{home}/first.sock")
    found = await asyncio.to_thread(doctor._check_instances, settings)
    assert [each.check for each in found][-1] == "service orchestrator"
    return found[:-1]


async def test_each_of_several_addresses_is_asked(home: Path) -> None:
    first, second, away = await findings(home, f"unix:{home}/first.sock, unix:{home}/second.sock,unix:{home}/none.sock")
    assert first.found.startswith("first ")
    assert second.found.startswith("second ")
    assert (away.ok, f"{home}/none.sock" in away.found) == (False, True)


async def test_each_address_of_a_name_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("picking.cryofleet.svc", 7000)
        four, six = (socket.AF_INET, "10.0.0.1"), (socket.AF_INET6, "fd00::2")
        return [(family, socket.SOCK_STREAM, 6, "", (ip, port)) for family, ip in (four, six, four)]

    asked = []

    def channel(address: str, tls: Any, server_name: str | None = None, token: Any = None) -> grpc.Channel:
        if address.startswith("unix:"):
            return open_blocking_channel(address)
        asked.append((address, server_name))
        return open_blocking_channel(f"unix:{home}/{'first' if '10.0' in address else 'second'}.sock")

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(doctor, "open_blocking_channel", channel)
    found = await findings(home, "dns:///picking.cryofleet.svc:7000")
    assert [each.found.split()[0] for each in found] == ["first", "second"]
    name = "picking.cryofleet.svc"
    assert asked == [("10.0.0.1:7000", name), ("[fd00::2]:7000", name)], "each once, by the name in its certificate"


async def test_a_name_without_addresses(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    for pool, word in (("dns:///gone:7000", "not known"), ("dns:///gone", "invalid literal"), (" , ", "no address")):
        (found,) = await findings(home, pool)
        assert (found.ok, word in found.found, "CRYOFLEET_POOL_IO" in found.advice) == (False, True, True)
