"""A whole local platform of its own for a test: real processes, its own home, store and database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryofleet import local
from cryofleet.client import Client
from cryofleet.settings import Settings

SMALL_SCENE: dict[str, Any] = {
    "size_x": 112,
    "size_y": 112,
    "size_z": 48,
    "voxel_size_angstrom": 15.0,
    "structures": [{"name": "double-ring", "count": 10}, {"name": "two-subunit-globule", "count": 8}],
    "snr": 0.5,
    "seed": 7,
}
"""Arguments of `simulate-tomogram` for a scene that a test can analyse in seconds."""

SMALL_DISCOVERY: dict[str, Any] = {
    "particle_diameter_angstrom": 200,
    "box_size_voxels": 16,
    "autoencoder_binning": 1,
    "max_epochs": 3,
    "clusters": 2,
    "averages": 2,
    "iterations": 2,
    "shard_size": 8,
}
"""Arguments of `discover` that suit SMALL_SCENE."""


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    settings: Settings
    environment: Mapping[str, str]

    def client(self) -> Client:
        return Client(self.settings, start=False)

    def command(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the command line against this platform."""
        return subprocess.run(
            [sys.executable, "-m", "cryofleet", *words],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def json(self, *words: str) -> Any:
        """A command's JSON output; its exit code must be 0."""
        done = self.command(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def process_id(self, name: str) -> int:
        return local.process_ids(self.settings)[name]


@contextmanager
def platform_home(**variables: str) -> Iterator[Platform]:
    """A new home in which no platform is up yet; what is up at the end is stopped, and the home removed.

    `variables` are further CRYOFLEET_ settings, as SLOTS="2".
    """
    # Not pytest's own folders: their paths are too long for Unix sockets.
    home = Path(tempfile.mkdtemp(prefix="cryofleet-"))
    for package in ("cryofleet", "orchestrator", "services"):
        # A user may keep a clone of the project there: it must not be run in place of what is installed.
        (home / package).mkdir()
        (home / package / "__init__.py").write_text(f"raise SystemExit('{package} was taken from the home')\n")
    names = {f"CRYOFLEET_{name}": value for name, value in variables.items()}
    # The platform gives each service the threads it should have, where its environment says nothing else.
    kept = {n: value for n, value in os.environ.items() if not n.startswith("CRYOFLEET_") and n != "OMP_NUM_THREADS"}
    environment = {
        **kept,
        "CRYOFLEET_HOME": str(home),
        "CRYOFLEET_DRAIN_SECONDS": "5",
        "CRYOFLEET_PAGE": "off",
        **names,
    }
    settings = Settings.from_environment(environment)
    try:
        yield Platform(settings, environment)
    finally:
        local.stop(settings)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def running_platform(**variables: str) -> Iterator[Platform]:
    """A platform in a new home, which is stopped and removed at the end; `variables` as for `platform_home`."""
    with platform_home(**variables) as platform:
        before = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(platform.environment)
            local.start(platform.settings, wait_seconds=240)
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield platform
