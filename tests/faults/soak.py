"""`make soak`: the demo again and again, while 50 faults of all kinds strike at random.

SEED=... repeats one; FAULTS=... and MINUTES=... bound it. It ends with a table of what was done and what came of it,
and with exit code 1 where a result is wrong, a run never ended, or one stopped that could not be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from minio import Minio

from cryofleet.access.certificates import make_set
from cryofleet.channels import open_blocking_channel
from cryofleet.errors import Failure
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc
from tests.faults.certificates import free_port, issue, tls_variables
from tests.faults.garbage import KINDS, garbage_at
from tests.faults.site import Database, Site, database, running_site
from tests.faults.storage_proxy import BUCKET, StorageProxy, s3_behind_proxy
from tests.platform import SMALL_DISCOVERY, SMALL_SCENE

SERVICES = ("io", "picking", "alignment", "learning", "simulation")
ORCHESTRATORS = ("orchestrator-0", "orchestrator-1")
ENDED = {pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_PARTIAL, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED}
RUN_SECONDS = 240.0
"""A run that goes on for longer hangs."""
MOST_ATTEMPTS = 4
SPARE_SECONDS = 120.0
"""Kept of the whole time for the runs that go on when the last fault is over."""


@dataclass
class Injected:
    """A fault that was done."""

    number: int
    kind: str
    target: str
    at: float
    seconds: float = 0.0
    runs: set[str] = field(default_factory=set)
    problem: str = ""


@dataclass
class Ended:
    """What came of a run."""

    run_id: str
    state: str = "never ended"
    attempts: int = 1
    causes: list[str] = field(default_factory=list)
    right: bool = False


class Soak:
    """The site, the demo that runs on it, and its faults."""

    def __init__(
        self,
        site: Site,
        postgres: Database,
        proxy: StorageProxy,
        direct: Minio,
        certificates: Path,
        places: dict[str, str],
        began: float,
    ) -> None:
        self.site = site
        self._postgres = postgres
        self._proxy = proxy
        self._direct = direct
        self._certificates = certificates
        self._places = places
        self.running = ""
        self.ended: list[Ended] = []
        self.outputs: dict[str, dict[str, Any]] = {}
        self.over = threading.Event()
        self.damage: Injected | None = None
        """The fault that wants the next tomogram damaged."""
        self.began = began

    # The demo

    def ask(self, method: str, request: Any) -> Any:
        """Of whichever orchestrator answers. Raises what speaks against the question."""
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            for name in ORCHESTRATORS:
                with open_blocking_channel(self.site.address(name)) as channel:
                    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                    try:
                        return getattr(stub, method)(request, timeout=5)
                    except grpc.RpcError as error:
                        if _code(error) not in _AWAY or time.monotonic() > deadline:
                            raise
            time.sleep(0.2)

    def run(self, project: str, name: str, pipeline: str, **arguments: Any) -> Ended:
        """One run to its end, resumed where it stops."""
        given = Struct()
        given.update(arguments)
        ended = Ended(f"{project}-{name}")
        self.ended.append(ended)
        request = pb.SubmitRunRequest(project=project, pipeline=pipeline, arguments=given, run_id=ended.run_id)
        self.running = ended.run_id
        try:
            self.ask("SubmitRun", request)
        except grpc.RpcError as error:
            # It was sent twice, since the first answer was lost.
            if _code(error) is not grpc.StatusCode.ALREADY_EXISTS:
                raise
        self._see_to_its_end(ended)
        return ended

    def _see_to_its_end(self, ended: Ended) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            run = self.ask("GetRun", pb.GetRunRequest(run_id=ended.run_id)).run
            ended.attempts = run.attempt
            ended.state = pb.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()
            if run.state == pb.RUN_STATE_SUCCEEDED:
                self.outputs[ended.run_id] = MessageToDict(run.outputs)
                return
            if run.state in ENDED:
                cause = run.error or "; ".join(each.cause for each in run.set_aside)
                if len(ended.causes) < run.attempt:
                    ended.causes.append(cause)
                if run.attempt >= MOST_ATTEMPTS or "DATA_LOSS" in cause:
                    return
                self._resume(ended)
            time.sleep(0.1)

    def _resume(self, ended: Ended) -> None:
        try:
            self.ask("ResumeRun", pb.ResumeRunRequest(run_id=ended.run_id))
        except grpc.RpcError as error:
            # It was sent twice, and goes on already.
            if _code(error) is not grpc.StatusCode.FAILED_PRECONDITION:
                raise

    def demo(self, project: str) -> None:
        """The demo, in a project of its own."""
        scene = self.run(project, "scene", "simulate-tomogram", **SMALL_SCENE)
        if scene.state != "succeeded":
            return
        made = self.outputs[scene.run_id]
        if self.damage is not None:
            fault, self.damage = self.damage, None
            fault.runs.add(f"{project}-discover")
            self._flip_a_byte(made["tomogram"])
        found = self.run(
            project, "discover", "discover", tomogram=made["tomogram"], truth=made["truth"], **SMALL_DISCOVERY
        )
        if found.state == "failed" and "DATA_LOSS" in found.causes[-1]:
            # The damaged object was taken out of the store; the simulation makes it anew, of what it still has.
            self.run(project, "again", "simulate-tomogram", **SMALL_SCENE)
            self._resume(found)
            self._see_to_its_end(found)

    def _flip_a_byte(self, uri: str) -> None:
        key = uri.removeprefix(f"s3://{BUCKET}/")
        content = bytearray(self._direct.get_object(BUCKET, key).read())
        content[len(content) // 2] ^= 0x40
        self._direct.put_object(BUCKET, key, io.BytesIO(content), len(content))

    def contents(self, run_id: str) -> dict[str, Any]:
        """A run's outputs, the digests of objects in their place."""

        def content(value: Any) -> Any:
            if isinstance(value, list):
                return [content(each) for each in value]
            if isinstance(value, str) and value.startswith("s3://"):
                data = self._direct.get_object(BUCKET, value.removeprefix(f"s3://{BUCKET}/")).read()
                return hashlib.sha256(data).hexdigest()
            return value

        return {name: content(value) for name, value in self.outputs[run_id].items()}

    # Faults

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        self.site.suspend(name)
        try:
            yield
        finally:
            self.site.go_on(name)

    @contextmanager
    def braked(self, name: str) -> Iterator[None]:
        over = threading.Event()

        def brake() -> None:
            while not over.is_set():
                self.site.suspend(name)
                time.sleep(0.3)
                self.site.go_on(name)
                over.wait(0.1)

        brakes = threading.Thread(target=brake)
        brakes.start()
        try:
            yield
        finally:
            over.set()
            brakes.join()

    @contextmanager
    def killed(self, name: str) -> Iterator[None]:
        self.site.kill(name)
        try:
            yield
        finally:
            self.site.start(name)

    @contextmanager
    def short_of_memory(self, name: str) -> Iterator[None]:
        self.site.limit(name, resource.RLIMIT_AS, self.site.memory_bytes(name) + 2**20)
        try:
            yield
        finally:
            # As its supervisor, or the probes of its pod, would do.
            self.site.kill(name)
            self.site.start(name)

    @contextmanager
    def database_away(self, _: str) -> Iterator[None]:
        self._postgres.stop()
        try:
            yield
        finally:
            self._postgres.start()

    @contextmanager
    def storage(self, mode: str) -> Iterator[None]:
        self._proxy.become(mode)
        try:
            yield
        finally:
            self._proxy.become("open")

    @contextmanager
    def garbage(self, service: str, kind: str) -> Iterator[None]:
        with garbage_at(self._places[service], kind):
            yield

    @contextmanager
    def expired(self, _: str) -> Iterator[None]:
        issue(self._certificates, "io", -1)
        self.site.kill("io-9")
        self.start_tls(wait=False)
        try:
            yield
        finally:
            issue(self._certificates, "io", 1)

    def start_tls(self, wait: bool = True) -> None:
        """The instance that is reached over TCP."""
        self.site.start(
            "io-9", wait=wait, variables={"ADDRESS": self._places["tls"], **tls_variables(self._certificates, "io")}
        )

    @contextmanager
    def wrong_clock(self, name: str, hours: float) -> Iterator[None]:
        self.site.kill(name)
        self.site.start(name, clock=hours * 3600)
        try:
            yield
        finally:
            self.site.kill(name)
            self.site.start(name)

    def revive(self) -> None:
        """Start what has ended by itself, as a supervisor does: a process whose worker didn't stop, say."""
        for name in [*(f"{service}-{number}" for service in SERVICES for number in (0, 1)), *ORCHESTRATORS]:
            if not self.site.is_alive(name):
                print(f"{name} has ended by itself: {self.site.end_of_log(name)[-300:]}", flush=True)
                self.site.kill(name)
                self.site.start(name)

    def choose(self, chance: random.Random, kind: str) -> tuple[str, float, AbstractContextManager[None]]:
        """A fault of the kind: what it strikes, for how long, and itself."""
        service = f"{chance.choice(SERVICES)}-{chance.randint(0, 1)}"
        orchestrator = chance.choice(ORCHESTRATORS)
        short, long = chance.uniform(0, 3), chance.uniform(3, 10)
        match kind:
            case "service killed":
                return service, short, self.killed(service)
            case "service hung":
                return service, long, self.suspended(service)
            case "service slow":
                return service, long, self.braked(service)
            case "out of memory":
                return service, long, self.short_of_memory(service)
            case "garbage":
                pool, what = chance.choice(("picking", "simulation")), chance.choice(KINDS)
                return f"{pool}: {what}", long, self.garbage(pool, what)
            case "orchestrator killed":
                return orchestrator, short, self.killed(orchestrator)
            case "orchestrator killed, adopted":
                return orchestrator, 30.0, self.killed(orchestrator)
            case "orchestrator hung":
                return orchestrator, long, self.suspended(orchestrator)
            case "database restarted":
                return "PostgreSQL", short, self.database_away("")
            case "certificate expired":
                return "io-9", long, self.expired("")
            case "clock skewed":
                name, hours = chance.choice(("simulation-0", "io-1", orchestrator)), chance.choice((-9.0, 6.0))
                return f"{name} {hours:+.0f} h", long, self.wrong_clock(name, hours)
            case _:
                return "S3", long, self.storage(kind.removeprefix("storage "))

    def strike(self, seed: int, count: int, until: float) -> list[Injected]:
        """Faults, one after the other, until there were enough or the time is over."""
        chance = random.Random(seed)
        kinds = [kind for kind in KINDS_OF_FAULTS for _ in range(-(-count // len(KINDS_OF_FAULTS)))]
        rare = "orchestrator killed, adopted"
        chance.shuffle(kinds)
        kinds = [rare, *(kind for kind in kinds if kind != rare)][:count]
        chance.shuffle(kinds)
        faults = []
        for number, kind in enumerate(kinds, start=1):
            pause = chance.uniform(0.2, 3)
            if time.monotonic() + pause > until:
                break
            time.sleep(pause)
            fault = Injected(number, kind, "", time.monotonic() - self.began)
            faults.append(fault)
            if kind == "wrong digest":
                fault.target, self.damage = "the next tomogram", fault
                print(f"{fault.at:6.1f} s  {kind}: {fault.target}", flush=True)
                continue
            self.revive()
            fault.target, seconds, striking = self.choose(chance, kind)
            print(f"{fault.at:6.1f} s  {kind}: {fault.target}, {seconds:.1f} s", flush=True)
            try:
                with striking:
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        fault.runs.add(self.running)
                        time.sleep(0.1)
                fault.runs.add(self.running)
            except (AssertionError, Failure, OSError, grpc.RpcError) as error:
                fault.problem = f"{type(error).__name__}: {error}"[:300]
            fault.seconds = time.monotonic() - self.began - fault.at
        self.over.set()
        return faults


KINDS_OF_FAULTS = (
    "service killed",
    "service hung",
    "service slow",
    "out of memory",
    "garbage",
    "orchestrator killed",
    "orchestrator killed, adopted",
    "orchestrator hung",
    "database restarted",
    "storage refused",
    "storage slow",
    "storage full",
    "wrong digest",
    "certificate expired",
    "clock skewed",
)
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code


def judge(soak: Soak) -> None:
    """Compares every run with the undisturbed one of its kind, and looks for tasks that were recorded twice."""
    expected = {name: soak.contents(f"undisturbed-{name}") for name in ("scene", "discover")}
    for ended in soak.ended:
        if ended.state != "succeeded":
            continue
        kind = "discover" if ended.run_id.endswith("-discover") else "scene"
        tasks = soak.site.recorded(ended.run_id)
        ended.right = soak.contents(ended.run_id) == expected[kind] and len(set(tasks)) == len(tasks)


def tell(faults: list[Injected], ended: list[Ended]) -> bool:
    """Prints the tables; whether all is well."""
    by_id = {each.run_id: each for each in ended}
    print("\n  #   at s  for s  fault                          target                                  runs meanwhile")
    for fault in faults:
        runs = [by_id[run] for run in sorted(fault.runs) if run in by_id]
        came = "; ".join(
            f"{run.run_id} {'right' if run.right else run.state + ', WRONG'}"
            + (f" at attempt {run.attempts}" if run.attempts > 1 else "")
            for run in runs
        )
        print(
            f"{fault.number:3d} {fault.at:6.1f} {fault.seconds:6.1f}  {fault.kind:30s} {fault.target:39s} {came or '-'}"
            + (f"  PROBLEM: {fault.problem}" if fault.problem else "")
        )
    print()
    for run in ended:
        for attempt, cause in enumerate(run.causes, start=1):
            print(f"{run.run_id} stopped at attempt {attempt}: {cause[:400]}")
    right = sum(run.right for run in ended)
    counts = ", ".join(f"{kind} {number}" for kind, number in sorted(Counter(f.kind for f in faults).items()))
    print(f"\n{len(faults)} faults ({counts})")
    print(
        f"{len(ended)} runs: {right} right, {len(ended) - right} not; {sum(bool(r.causes) for r in ended)} were resumed"
    )
    silent = [run.run_id for run in ended if "" in run.causes]
    if silent:
        print(f"stopped without a cause: {', '.join(silent)}")
    return right == len(ended) and not silent and not any(fault.problem for fault in faults)


def main() -> int:
    """The exit code."""
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**31))
    count, minutes = int(os.environ.get("FAULTS") or 50), float(os.environ.get("MINUTES") or 15)
    print(f"seed {seed}: {count} faults, at most {minutes:g} minutes; SEED={seed} make soak repeats them", flush=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        certificates = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_set(certificates)
        proxy, storage, direct = stack.enter_context(s3_behind_proxy())
        postgres = stack.enter_context(database())
        places = {
            "tls": f"127.0.0.1:{free_port()}",
            "picking": f"unix:{certificates}/p.sock",
            "simulation": f"unix:{certificates}/s.sock",
        }
        site = stack.enter_context(
            running_site(
                dict.fromkeys(SERVICES, 2),
                orchestrators=2,
                pools={"io": places["tls"], "picking": places["picking"], "simulation": places["simulation"]},
                variables={
                    "DATABASE": postgres.url,
                    "POOL_WAIT_SECONDS": "60",
                    **storage,
                    **tls_variables(certificates, "orchestrator"),
                },
            )
        )
        soak = Soak(site, postgres, proxy, direct, certificates, places, began)
        soak.start_tls()
        soak.demo("undisturbed")
        print(f"{time.monotonic() - began:6.1f} s  the undisturbed run has ended", flush=True)
        faults: list[Injected] = []
        until = began + minutes * 60 - SPARE_SECONDS
        striker = threading.Thread(target=lambda: faults.extend(soak.strike(seed, count, until)))
        striker.start()
        number = 0
        while not soak.over.is_set():
            number += 1
            soak.demo(f"demo-{number}")
        striker.join()
        judge(soak)
        well = tell(faults, soak.ended)
    print(f"{'all is well' if well else 'NOT WELL'} after {time.monotonic() - began:.0f} s; seed {seed}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
