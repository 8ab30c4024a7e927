"""The same main job with the store on an S3 server, over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.moto import s3_server
from tests.platform import SMALL_DISCOVERY, SMALL_SCENE, running_platform

BUCKET = "tomograms"


@pytest.fixture
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with s3_server(BUCKET) as settings:
        yield settings.endpoint


def test_discover_on_s3(endpoint: str) -> None:
    settings = {
        "STORE": f"s3://{BUCKET}/cryofleet",
        "S3_ENDPOINT": endpoint,
        "S3_ACCESS_KEY": "key",
        "S3_SECRET_KEY": "secret",
        "S3_SECURE": "false",
    }
    with running_platform(**settings) as platform, platform.client() as client:
        scene = client.run("simulate-tomogram", **SMALL_SCENE).wait().outputs
        run = client.run("discover", tomogram=scene["tomogram"], truth=scene["truth"], **SMALL_DISCOVERY).wait()
        assert run.state == "succeeded"
        assert run.outputs["report"].uri.startswith(f"s3://{BUCKET}/cryofleet/default/")
        assert len(run.outputs["particles"].to_dataframe()) == run.outputs["picks"] > 0
        again = client.run("discover", tomogram=scene["tomogram"], truth=scene["truth"], **SMALL_DISCOVERY).wait()
        assert all(step.tasks_cached == step.tasks_total for step in again.record.steps)
        # Only sockets, logs and the database are on this machine's disk.
        assert not (platform.settings.home / "store").exists()
