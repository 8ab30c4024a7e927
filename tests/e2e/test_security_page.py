"""The commands of docs/security.md: a platform over TCP, of real processes, and a user's command line."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TRY = """
within() {{ for _ in $(seq 120); do "$@" && return; sleep 0.5; done; return 1; }}
trap 'kill $(jobs -p); wait' EXIT
within {client} > runs 2> answers || cat answers >&2
echo hello > hello.txt
uri=$({environment} cryofleet put hello.txt)
{environment} cryofleet get "$uri" back.txt
{environment} cryofleet ls --project other 2> other; echo $? >> other
{environment} cryofleet gc 2> gc; echo $? >> gc
env -u CRYOFLEET_TOKEN_FILE {stranger} 2> stranger; echo $? >> stranger
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cryofleet-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_pages_platform_over_tcp(folder: Path) -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    commands = page.partition("## A platform over TCP")[2].partition("```sh\n")[2].partition("```")[0]
    for port in ("50060", "50061"):
        assert port in commands
        commands = commands.replace(port, str(free_port()))
    setup, _, client = commands.replace("\\\n", " ").rpartition("\n\n")
    client = " ".join(client.split())
    environment = client.removesuffix(" cryofleet runs")
    stranger = re.sub(r"env|CRYOFLEET_TOKEN_FILE=\S+", "", client, count=2)
    script = setup + TRY.format(client=client, environment=environment, stranger=stranger.strip())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CRYOFLEET_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (folder / "back.txt").read_text() == "hello\n", done.stderr
    assert (folder / "other").read_text() == "error: ana has no access to project 'other'\n6\n"
    assert (folder / "gc").read_text().endswith("takes the role admin; ana is operator\n6\n")
    assert "a token is needed" in (folder / "stranger").read_text()
    assert (folder / "ana.token").stat().st_mode & 0o077 == 0
    token = (folder / "ana.token").read_text().strip()
    assert '"event": "audit"' in done.stderr
    assert token not in done.stderr + done.stdout
