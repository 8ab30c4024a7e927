"""The store is an S3 server that is cut off, slow or full in the middle of a run of the demo's simulation."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cryofleet.client import RunFailed, RunHandle
from tests.faults.site import Site, running_site
from tests.faults.storage_proxy import StorageProxy, s3_behind_proxy
from tests.platform import SMALL_SCENE

POOL_WAIT_SECONDS = 8
TASKS = ("image", "reconstruct", "scene")


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[StorageProxy, dict[str, str]]]:
    with s3_behind_proxy() as (proxy, settings, _):
        yield proxy, settings


@pytest.fixture(scope="module")
def site(storage: tuple[StorageProxy, dict[str, str]]) -> Iterator[Site]:
    with running_site(
        {"io": 1, "simulation": 1}, variables={"POOL_WAIT_SECONDS": str(POOL_WAIT_SECONDS), **storage[1]}
    ) as running:
        yield running


@pytest.fixture
def proxy(storage: tuple[StorageProxy, dict[str, str]]) -> Iterator[StorageProxy]:
    yield storage[0]
    storage[0].become("open")


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, str]:
    begin(site, "undisturbed").wait()
    return site.kept("undisturbed")


def begin(site: Site, project: str) -> RunHandle:
    return site.client().in_project(project).run("simulate-tomogram", **SMALL_SCENE)


def assert_right(site: Site, run: RunHandle, undisturbed: dict[str, str], attempt: int) -> None:
    assert (run.state, run.record.attempt) == ("succeeded", attempt)
    assert site.kept(run.record.project) == undisturbed
    recorded = [task for task in site.recorded(run.id) if task.startswith(f"{run.id}:{attempt}/")]
    assert recorded == [f"{run.id}:{attempt}/{task}" for task in TASKS]


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "cause"),
    [("refused", r"step \w+ failed: UNAVAILABLE: .*"), ("full", r"step \w+ failed: RESOURCE_EXHAUSTED: .*StorageFull")],
)
def test_the_store_takes_nothing(
    site: Site, proxy: StorageProxy, undisturbed: dict[str, str], mode: str, cause: str
) -> None:
    """For longer than a task waits: the run stops with the cause, and goes on when it is told to."""
    run = begin(site, mode)
    site.wait_until_working("simulation")
    proxy.become(mode)
    with pytest.raises(RunFailed, match=cause):
        run.wait()
    proxy.become("open")
    assert_right(site, run.resume().wait(), undisturbed, attempt=2)


@pytest.mark.parametrize(
    "mode", ["refused", pytest.param("full", marks=pytest.mark.long), pytest.param("slow", marks=pytest.mark.long)]
)
def test_the_store_is_away_for_a_while(site: Site, proxy: StorageProxy, undisturbed: dict[str, str], mode: str) -> None:
    run = begin(site, f"{mode}-for-a-while")
    site.wait_until_working("simulation")
    proxy.become(mode)
    time.sleep(3)
    if mode != "slow":
        proxy.become("open")
    run.wait()
    proxy.become("open")
    assert_right(site, run, undisturbed, attempt=1)
