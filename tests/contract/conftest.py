"""Fixtures that the contract tests share: settings and a store under the test's own folder, and a channel to a service.

A test file that needs other settings defines its own, and the store and the channel follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cryofleet.server import Service
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.testing import running_server, settings_for


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store.open(settings)


def channel_to(service: Service) -> Any:
    """The fixture `channel` of a test file: to a server of the service."""

    @pytest.fixture
    async def channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
        async with running_server(service, settings) as opened:
            yield opened

    return channel
