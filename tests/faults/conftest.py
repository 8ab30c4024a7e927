"""One platform for all faults, and what an undisturbed run gives, for the disturbed ones to be compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cryofleet.client import RunHandle
from tests.platform import SMALL_DISCOVERY, SMALL_SCENE, Platform, running_platform


@dataclass(frozen=True)
class Undisturbed:
    """The bytes of the scene and of all that `discover` made of it."""

    tomogram: bytes
    truth: bytes
    outputs: dict[str, Any]


def contents(outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs by content, so that those of two stores can be compared."""
    found: dict[str, Any] = {}
    for name, value in outputs.items():
        items = value if isinstance(value, list) else [value]
        found[name] = [item.read() if hasattr(item, "read") else item for item in items]
    return found


def discover_arguments(platform: Platform, undisturbed: Undisturbed) -> dict[str, Any]:
    """The same scene in another platform's store, ready for `discover`."""
    folder = platform.settings.home
    (folder / "tomogram.mrc").write_bytes(undisturbed.tomogram)
    (folder / "truth.parquet").write_bytes(undisturbed.truth)
    return {"tomogram": folder / "tomogram.mrc", "truth": folder / "truth.parquet", **SMALL_DISCOVERY}


def computed(platform: Platform, run: RunHandle) -> list[tuple[str, str]]:
    """Operation and key of each result that the run computed, as the services logged it; of one service, in order."""
    results = []
    for path in platform.settings.log_folder.glob("*.log"):
        for line in path.read_text().splitlines():
            # The last line may just be being written, or its process was killed meanwhile.
            if line.startswith("{") and line.endswith("}"):
                entry = json.loads(line)
                if entry.get("message") == "computed" and entry.get("run_id") == run.id:
                    results.append((entry["operation"], entry["key"]))
    return results


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    """What is killed is started again; each test has a project of its own, which finds no results of another."""
    with running_platform() as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(platform: Platform) -> Undisturbed:
    with platform.client() as shared:
        client = shared.in_project("undisturbed")
        scene = client.run("simulate-tomogram", **SMALL_SCENE).wait().outputs
        bare = Undisturbed(scene["tomogram"].read(), scene["truth"].read(), {})
        run = client.run("discover", **discover_arguments(platform, bare)).wait()
        return Undisturbed(bare.tomogram, bare.truth, contents(run.outputs))
