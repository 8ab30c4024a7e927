"""What can fail fails in the middle of a run of the demo: the run ends right, or stops with the cause.

Each test's result is compared with an undisturbed run's, object by object. docs/faults.md lists which test holds what;
`make soak` has all faults at random, and the whole demo.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cryofleet.access.certificates import make_set
from cryofleet.channels import open_blocking_channel
from cryofleet.client import RunFailed, RunHandle
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc
from tests.faults.certificates import free_port, issue, tls_variables
from tests.faults.garbage import KINDS, garbage_at
from tests.faults.site import Database, Site, database, running_site
from tests.platform import SMALL_SCENE
from tests.unit.orchestrator.fake import short_folder

BOTH = ("simulation-0", "simulation-1")
POOL_WAIT_SECONDS = 20
ADOPTION_SECONDS = 30.0


@dataclass
class Places:
    """Addresses in the pool of simulations where nobody is at first."""

    garbage: list[str]
    """One for each kind of it: who answers so three times is set aside."""
    tls: str
    certificates: Path


@pytest.fixture(scope="module")
def postgres() -> Iterator[Database]:
    with database() as running:
        yield running


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    certificates = tmp_path_factory.mktemp("certificates")
    make_set(certificates)
    folder = short_folder()
    garbage = [f"unix:{folder}/{number}.sock" for number in range(len(KINDS))]
    return Places(garbage, f"127.0.0.1:{free_port()}", certificates)


@pytest.fixture(scope="module")
def site(postgres: Database, places: Places) -> Iterator[Site]:
    with running_site(
        {"io": 1, "simulation": 2},
        orchestrators=2,
        pools={"simulation": ",".join([*places.garbage, places.tls])},
        variables={
            "DATABASE": postgres.url,
            "POOL_WAIT_SECONDS": str(POOL_WAIT_SECONDS),
            **tls_variables(places.certificates, "orchestrator"),
        },
    ) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, str]:
    """Objects of an undisturbed run, with their digests."""
    return kept_of(site, begin(site, "undisturbed").wait())


def begin(site: Site, project: str, orchestrator: str = "orchestrator-0", **changed: Any) -> RunHandle:
    """A run of the demo's simulation in a project of its own."""
    client = site.client(orchestrator).in_project(project)
    return client.run("simulate-tomogram", **{**SMALL_SCENE, **changed})


def kept_of(site: Site, run: RunHandle) -> dict[str, str]:
    assert run.state == "succeeded"
    return site.kept(run.record.project)


def assert_right(site: Site, run: RunHandle, undisturbed: dict[str, str], attempt: int = 1) -> None:
    """Nothing is lost, nothing is there twice, and all is as it should be."""
    assert (run.state, run.record.attempt) == ("succeeded", attempt)
    assert site.kept(run.record.project) == undisturbed
    recorded = [task for task in site.recorded(run.id) if task.startswith(f"{run.id}:{attempt}/")]
    assert recorded == [f"{run.id}:{attempt}/{step}" for step in ("image", "reconstruct", "scene")], (
        "each task has one record"
    )
    assert all(step.tasks_done == step.tasks_total == 1 for step in run.record.steps)


ONCE = ["simulation.Reconstruct", "simulation.SimulateScene", "simulation.SimulateTiltSeries"]


def ready(site: Site) -> set[str]:
    """Instances of the simulation that the orchestrator has as ready."""
    (pool,) = [pool for pool in site.client().pools() if pool.name == "simulation"]
    return {instance.instance for instance in pool.instances if instance.ready}


def wait_until_ready(site: Site, *names: str) -> None:
    deadline = time.monotonic() + 30
    while not set(names) <= ready(site):
        assert time.monotonic() < deadline, f"of {names} only {ready(site)} are ready"
        time.sleep(0.1)


def wait_for_log(site: Site, text: str, pattern: str = "*", seconds: float = 40.0) -> dict[str, Any]:
    """The first line that has the text."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for line in site.log_lines(pattern):
            if text in str(line):
                return line
        time.sleep(0.1)
    raise AssertionError(f"nobody said {text!r}")


@pytest.fixture(autouse=True)
def whole(site: Site) -> Iterator[None]:
    """Each test finds all instances at work."""
    yield
    for name in (*BOTH, "io-0", "orchestrator-0", "orchestrator-1"):
        if not site.is_alive(name):
            site.kill(name)
            site.start(name)
    wait_until_ready(site, *BOTH)


def test_a_service_is_killed(site: Site, undisturbed: dict[str, str]) -> None:
    run = begin(site, "killed")
    site.kill(site.wait_until_working("simulation"))
    assert_right(site, run.wait(), undisturbed)
    assert site.computed(run) == ONCE


def test_a_service_hangs(site: Site, undisturbed: dict[str, str]) -> None:
    run = begin(site, "hung")
    hung = site.wait_until_working("simulation")
    site.suspend(hung)
    try:
        run.wait()
        assert hung not in ready(site)
    finally:
        site.go_on(hung)
    assert_right(site, run, undisturbed)
    wait_until_ready(site, hung)
    time.sleep(1.0)  # what it had is over by then
    assert site.kept("hung") == undisturbed, "what it went on with has changed nothing"
    assert not site.working("simulation"), "it has dropped what nobody waits for"


@pytest.mark.long
def test_services_are_slow(site: Site, undisturbed: dict[str, str]) -> None:
    run = begin(site, "slow")
    over = threading.Event()

    def brake() -> None:
        while not over.is_set():
            for name in BOTH:
                site.suspend(name)
            time.sleep(0.3)
            for name in BOTH:
                site.go_on(name)
            over.wait(0.1)

    brakes = threading.Thread(target=brake)
    brakes.start()
    try:
        run.wait()
    finally:
        over.set()
        brakes.join()
    assert_right(site, run, undisturbed)
    assert site.computed(run) == ONCE, "slow is not broken: nothing was given to another one"


def test_more_memory_is_asked_for_than_there_is(site: Site, undisturbed: dict[str, str]) -> None:
    for name in BOTH:
        site.kill(name)
    site.start(*BOTH, variables={"MEMORY_BYTES": "1000000"})
    wait_until_ready(site, *BOTH)
    run = begin(site, "large")
    with pytest.raises(RunFailed, match=r"step scene failed: .*needs .* of memory; this instance has 1.0 MiB"):
        run.wait()
    for name in BOTH:
        site.kill(name)
    site.start(*BOTH)
    assert_right(site, run.resume().wait(), undisturbed, attempt=2)


def test_a_service_runs_out_of_memory(site: Site, undisturbed: dict[str, str]) -> None:
    """In the middle: its allocations fail, or the process ends."""
    run = begin(site, "memory")
    short = site.wait_until_working("simulation")
    site.limit(short, resource.RLIMIT_AS, site.memory_bytes(short))
    try:
        assert_right(site, run.wait(), undisturbed)
    finally:
        site.kill(short)


def test_all_services_run_out_of_memory(site: Site, undisturbed: dict[str, str]) -> None:
    for name in BOTH:
        site.limit(name, resource.RLIMIT_AS, site.memory_bytes(name) + 2**25)
    run = begin(site, "no-memory", size_x=512, size_y=512, size_z=192)
    with pytest.raises(RunFailed, match=r"step scene failed: RESOURCE_EXHAUSTED: .*ran out of memory"):
        run.wait()
    for name in BOTH:
        site.kill(name)
    site.start(*BOTH)
    assert_right(site, begin(site, "no-memory").wait(), undisturbed)


@contextlib.contextmanager
def busy(site: Site, *names: str) -> Iterator[None]:
    """Instances whose only slot is taken."""
    with contextlib.ExitStack() as stack:
        for index, name in enumerate(names):
            channel = stack.enter_context(open_blocking_channel(site.address(name)))
            request = runtime_pb2.SelfTestRequest(index=time.time_ns() % 10**9 + index, seconds=60)
            call = runtime_pb2_grpc.RuntimeServiceStub(channel).SelfTest(request)
            stack.callback(call.cancel)
            while name not in site.working(name.rpartition("-")[0]):
                time.sleep(0.05)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_returns_garbage(site: Site, places: Places, undisturbed: dict[str, str], kind: str) -> None:
    with busy(site, *BOTH), garbage_at(places.garbage[KINDS.index(kind)], kind) as asked:
        wait_until_ready(site, "garbage")
        run = begin(site, f"garbage-{KINDS.index(kind)}")
        deadline = time.monotonic() + 30
        while not asked:
            assert time.monotonic() < deadline, "it was never asked"
            time.sleep(0.02)
    assert_right(site, run.wait(), undisturbed)
    assert asked[0] == f"{run.id}:1/scene"


def test_the_database_is_restarted(site: Site, postgres: Database, undisturbed: dict[str, str]) -> None:
    run = begin(site, "database")
    site.wait_until_working("simulation")
    postgres.stop()
    time.sleep(3)
    postgres.start()
    assert_right(site, run.wait(), undisturbed)
    assert site.computed(run) == ONCE


@pytest.mark.parametrize(
    ("victim", "heir"),
    [
        ("orchestrator-0", "orchestrator-1"),
        pytest.param("orchestrator-1", "orchestrator-0", marks=pytest.mark.long),
    ],
)
def test_one_of_two_orchestrators_is_killed(
    site: Site, undisturbed: dict[str, str], victim: str, heir: str, record_property: Any
) -> None:
    run = begin(site, f"heir-of-{victim}", victim)
    site.wait_until_working("simulation")
    site.kill(victim)
    killed = time.time()
    run = site.client(heir).get(run.id).wait()
    said = wait_for_log(site, f"orchestrator {victim} is gone", heir)
    adopted = datetime.fromisoformat(said["time"]).timestamp() - killed
    print(f"{heir} adopted the runs of {victim} after {adopted:.1f} s")
    record_property("adoption_seconds", round(adopted, 1))
    assert adopted < ADOPTION_SECONDS
    assert_right(site, run, undisturbed)


@pytest.mark.long
def test_the_disk_is_full(site: Site, undisturbed: dict[str, str]) -> None:
    """Of the store, on a file system of its own. First for longer than a task waits, then not."""
    if not site.can_mount:
        pytest.skip("file systems of one's own take root; the limit on a file's size below is for all")
    for project, enlarge_at in (("full", "the end"), ("full-for-a-while", "once")):
        folder = Path(site.settings.store.removeprefix("file://")) / project
        folder.mkdir()
        site.mount(folder, "-o", "size=1m")
        run = begin(site, project)
        if enlarge_at == "once":
            wait_for_log(site, f"{project}/", "simulation-*")
            site.mount(folder, "-o", "remount,size=64m")
        else:
            with pytest.raises(RunFailed, match=r"step scene failed: RESOURCE_EXHAUSTED: .*No space left on device"):
                run.wait()
            site.mount(folder, "-o", "remount,size=64m")
            run.resume()
        run.wait()
        assert (run.state, run.record.attempt) == ("succeeded", 1 if enlarge_at == "once" else 2)
        outputs = {name: value.read() for name, value in run.outputs.items() if hasattr(value, "read")}
        expected = site.client().in_project("undisturbed").runs()[0]
        reference = RunHandle(site.client(), expected).outputs
        assert outputs == {name: value.read() for name, value in reference.items() if hasattr(value, "read")}


def test_files_may_not_grow(site: Site, undisturbed: dict[str, str]) -> None:
    for name in BOTH:
        site.limit(name, resource.RLIMIT_FSIZE, 2**18)
    run = begin(site, "small-files")
    wait_for_log(site, "File too large", "simulation-*")
    for name in BOTH:
        site.limit(name, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    assert_right(site, run.wait(), undisturbed)


@pytest.mark.long
def test_a_certificate_has_expired(site: Site, places: Places, undisturbed: dict[str, str]) -> None:
    tls = {"ADDRESS": places.tls, **tls_variables(places.certificates, "simulation")}
    for name in BOTH:
        site.kill(name)
    site.start("simulation-9", variables=tls)
    wait_until_ready(site, "simulation-9")
    run = begin(site, "certificate")
    wait_for_log(site, f"{run.id}:1/scene", "simulation-9")
    issue(places.certificates, "simulation", -1)
    site.kill("simulation-9")
    site.start("simulation-9", wait=False, variables=tls)
    with pytest.raises(RunFailed, match="certificate"):
        run.wait()
    issue(places.certificates, "simulation", 1)
    assert_right(site, run.resume().wait(), undisturbed, attempt=2)
    site.kill("simulation-9")


@pytest.mark.long
def test_clocks_are_wrong(site: Site, undisturbed: dict[str, str]) -> None:
    """By hours, each in another direction: those of a service and of an orchestrator."""
    for name in (*BOTH, "orchestrator-1"):
        site.kill(name)
    site.start("simulation-0", clock=6 * 3600)
    site.start("orchestrator-1", clock=-9 * 3600)
    wait_until_ready(site, "simulation-0")
    gone = [line for line in site.log_lines("orchestrator-*") if "is gone" in line["message"]]
    for orchestrator in ("orchestrator-0", "orchestrator-1"):
        run = begin(site, f"clock-{orchestrator}", orchestrator)
        assert_right(site, run.wait(), undisturbed)
        assert site.computed(run) == ONCE
    time.sleep(4)  # both have looked for orchestrators that are gone
    assert gone == [line for line in site.log_lines("orchestrator-*") if "is gone" in line["message"]]
    for name in ("simulation-0", "orchestrator-1"):
        site.kill(name)
