"""What a container's health check runs, against a real server: over a socket, and over TCP with mutual TLS."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cryofleet.access.certificates import make_set
from cryofleet.errors import FailedPrecondition, Unavailable
from cryofleet.health import check
from cryofleet.server import Server
from cryofleet.server.runtime_service import service
from cryofleet.settings import Settings, TlsFiles
from cryofleet.testing import settings_for


async def healthy(settings: Settings) -> None:
    await asyncio.to_thread(check, settings)


async def test_over_a_socket_until_the_instance_drains(tmp_path: Path) -> None:
    settings = replace(settings_for(tmp_path), address=f"unix:{tmp_path}/run/s.sock")
    with pytest.raises(Unavailable):
        await healthy(settings)
    server = Server(service, settings)
    await server.start()
    try:
        await healthy(settings)
        await server.drain()
        with pytest.raises(Unavailable, match="NOT_SERVING"):
            await healthy(settings)
    finally:
        await server.stop()


async def test_on_all_interfaces_with_a_certificate_that_bears_another_name(tmp_path: Path) -> None:
    make_set(tmp_path / "certificates")
    own = tmp_path / "certificates" / "picking"
    tls = TlsFiles(own / "tls.crt", own / "tls.key", own / "ca.crt")
    server = Server(service, replace(settings_for(tmp_path), address="0.0.0.0:0", tls=tls))
    await server.start()
    try:
        assert server.address.startswith("0.0.0.0:")
        await healthy(replace(server.settings, address=server.address))
        # Whoever has no certificate of the authority learns nothing.
        make_set(tmp_path / "strangers")
        strangers = tmp_path / "strangers" / "picking"
        foreign = TlsFiles(strangers / "tls.crt", strangers / "tls.key", own / "ca.crt")
        with pytest.raises(Unavailable):
            await healthy(replace(server.settings, address=server.address, tls=foreign))
    finally:
        await server.stop()


def test_without_an_address() -> None:
    with pytest.raises(FailedPrecondition, match="CRYOFLEET_ADDRESS"):
        check(Settings.from_environment({}))


def test_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cryofleet.health"],
        env={"CRYOFLEET_ADDRESS": f"unix:{tmp_path}/none.sock"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "none.sock" in done.stderr
    assert "Traceback" not in done.stderr
