"""The commands of docs/deploy.md that set up one server: its units, certificates and tokens, and a user's first run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryofleet.settings import SERVICES
from tests.conftest import REPOSITORY
from tests.e2e.test_security_page import free_port

# What the commands of an administrator are here: nobody else's folders are touched, and no user is made.
STANDING_IN = {
    "sudo": 'exec "$@"',
    "useradd": "exit 0",
    "chown": "exit 0",
    "git": "exit 0",  # /opt/cryofleet is there already
    "python3.11": "exit 0",  # and so is its environment
    "hostname": "echo localhost",
    "install": 'exec {python} -c \'import os, sys; a = sys.argv[1:]; i = a.index("-g") if "-g" in a else len(a); '
    'os.execv("/usr/bin/install", ["install", *a[:i], *a[i + 2 :]])\' "$@"',
    "systemctl": 'exec {python} {repository}/tests/e2e/systemctl.py {folder}/units {folder}/var "$@"',
}
WITHIN = 'within() { for _ in $(seq 60); do "$@" && return; sleep 0.5; done; return 1; }\nset -eu\n'


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cf-"))
    yield made
    if (made / "pids").exists():
        for pid in (made / "pids").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)
    shutil.rmtree(made)


def test_one_server(folder: Path) -> None:
    page = (REPOSITORY / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page.partition("## One server")[2].partition("## Kubernetes")[0], re.DOTALL)
    assert len(blocks) == 4
    site_env = folder / "etc" / "site.env"
    # As the page says, what the machine has; and no more in a test.
    blocks.insert(1, f"sed -i 's/^\\(CRYOFLEET_THREADS\\|OMP_NUM_THREADS\\)=4/\\1=1/' {site_env}\n")
    script = WITHIN + "".join(blocks).replace(
        "\n/opt/cryofleet/.venv/bin/cryofleet status", "\nwithin cryofleet status"
    )
    moved = {
        "/opt/cryofleet": folder / "opt",
        "/etc/cryofleet": folder / "etc",
        "/etc/systemd/system": folder / "units",
        "/var/lib/cryofleet": folder / "var",
        "50060": free_port(),
        "50061": free_port(),
    }
    copy = folder / "copy"
    shutil.copytree(REPOSITORY / "deploy", copy / "deploy")
    for path in (copy / "deploy" / "systemd").iterdir():
        text = path.read_text()
        for there, here in moved.items():
            text = text.replace(there, str(here))
        path.write_text(text)
    for there, here in moved.items():
        script = script.replace(there, str(here))
    bin_folder = folder / "opt" / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (folder / "units").mkdir()
    commands = folder / "bin"
    commands.mkdir()
    installed = folder / "pip.txt"
    for path, command in {
        **{commands / name: command for name, command in STANDING_IN.items()},
        bin_folder / "pip": f'echo "$@" > {installed}',
        # Links would leave their environment behind.
        **{bin_folder / name: f'exec {Path(sys.executable).parent / name} "$@"' for name in ("python", "cryofleet")},
    }.items():
        command = command.replace("{python}", sys.executable).replace("{folder}", str(folder))
        path.write_text(f"#!/bin/sh\n{command.replace('{repository}', str(REPOSITORY))}\n")
        path.chmod(0o700)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CRYOFLEET_")}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=copy,
        env={
            **kept,
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    logs = {path.stem: path.read_text() for path in folder.glob("*.log")}
    assert done.returncode == 0, "\n".join([done.stderr[-2000:], *(log[-1000:] for log in logs.values())])
    assert (copy / "first-run" / "tomogram.mrc").stat().st_size > 96 * 96 * 48 * 4
    assert {name.removeprefix("cryofleet@").removesuffix(".service") for name in logs} == {
        *SERVICES,
        "cryofleet-orchestrator",
    }
    assert "[io,picking,alignment,learning,simulation,orchestrator]" in installed.read_text()
    assert (folder / "var").stat().st_mode & 0o077 == 0
    for name in ("my.token", "client-certs/tls.key"):
        assert (copy / name).stat().st_mode & 0o077 == 0
    token = (copy / "my.token").read_text().strip()
    assert token not in done.stderr + done.stdout + "".join(logs.values())
    assert '"event": "audit"' in logs["cryofleet-orchestrator.service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_units_are_ones_that_systemd_takes(tmp_path: Path) -> None:
    units = REPOSITORY / "deploy" / "systemd"
    for path in units.iterdir():
        # The one complaint would be that nothing is installed in /opt.
        text = path.read_text().replace("/opt/cryofleet/.venv/bin/python", sys.executable)
        (tmp_path / path.name.replace("@", "@io")).write_text(text)
        (tmp_path / path.name).write_text(text)
    names = [path.name for path in tmp_path.glob("*.service") if "@.s" not in path.name]
    command = ["systemd-analyze", "verify", "cryofleet.target", *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in done.stderr.splitlines() if "cryofleet" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr
