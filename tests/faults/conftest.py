"""What an undisturbed run gives, for the disturbed ones to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def undisturbed() -> Undisturbed:
    with running_platform() as platform, platform.client() as client:
        scene = client.run("simulate-tomogram", **SMALL_SCENE).wait().outputs
        bare = Undisturbed(scene["tomogram"].read(), scene["truth"].read(), {})
        run = client.run("discover", **discover_arguments(platform, bare)).wait()
        return Undisturbed(bare.tomogram, bare.truth, contents(run.outputs))
