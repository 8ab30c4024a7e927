"""One platform for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.platform import SMALL_SCENE, Platform, running_platform


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    with running_platform() as running:
        yield running


@pytest.fixture(scope="session")
def scene(platform: Platform) -> dict[str, Any]:
    """Outputs of a small simulated tomogram: tomogram, truth."""
    with platform.client() as client:
        return client.run("simulate-tomogram", **SMALL_SCENE).wait().outputs
