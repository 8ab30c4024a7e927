"""The platform on one machine: every service and the orchestrator as supervised processes.

`python -m cryofleet.local` is the supervisor. It starts one process for each service, restarts what
ends, and stops all of them on SIGTERM. Sockets, logs, store and database lie under CRYOFLEET_HOME.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cryofleet.channels import failure_from_rpc, open_blocking_channel
from cryofleet.errors import FailedPrecondition, Internal, Unavailable
from cryofleet.settings import PAGE_OFF, SERVICES, Settings, available_cores
from cryofleet.v1 import orchestrator_pb2, orchestrator_pb2_grpc, viewer_pb2, viewer_pb2_grpc

_LONGEST_SOCKET_PATH = 107  # sun_path of sockaddr_un, less its final NUL
_RESTART_SECONDS = (0.2, 1.0, 5.0, 15.0)
_STABLE_SECONDS = 30.0
_STOP_MARGIN_SECONDS = 15.0
# One slot with all cores suits a training or a simulation; short tasks go side by side.
_ALL_CORES = ("learning", "simulation")
_PR_SET_PDEATHSIG = 1
_DETACH = "--detach"
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Processes run in the platform's home; code that lies there is none of theirs."""
_LAUNCH_SECONDS = 10.0
"""A supervisor that was launched has its lock within this time."""


@dataclass(frozen=True)
class Member:
    """One process of the local platform."""

    name: str
    module: str
    socket: Path
    defaults: Mapping[str, str]
    """Settings that the platform's own environment may override."""
    environment: Mapping[str, str]
    """Settings that make this process what it is."""

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"


def members(settings: Settings) -> list[Member]:
    """The processes that make up the platform on this machine."""
    cores = available_cores()
    found = []
    viewer = ("viewer",) if settings.page != PAGE_OFF and find_spec("panel") is not None else ()
    for number, name in enumerate((*SERVICES, "orchestrator", *viewer)):
        threads = cores if name in _ALL_CORES else 1
        socket = settings.run_folder / f"{name}.sock"
        defaults = {
            "CRYOFLEET_SLOTS": str(max(1, cores // threads)),
            "CRYOFLEET_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
        }
        environment = {
            "CRYOFLEET_HOME": str(settings.home),
            "CRYOFLEET_ADDRESS": f"unix:{socket}",
            "CRYOFLEET_INSTANCE": name,
            "CRYOFLEET_PAGE": settings.page,
            "CRYOFLEET_METRICS_PORT": str(settings.metrics_port + number if settings.metrics_port else 0),
            "CRYOFLEET_HEALTH_PORT": str(settings.health_port + number if settings.health_port else 0),
        }
        module = "orchestrator" if name == "orchestrator" else f"services.{name}"
        found.append(Member(name, module, socket, defaults, environment))
    return found


def code_stamp() -> str:
    """Changes whenever the code that the platform runs does, or its place."""
    stamp = hashlib.sha256()
    for package in ("cryofleet", "services", "orchestrator"):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".yaml", ".html", ".js", ".css"):
                    status = path.stat()
                    stamp.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def is_up(settings: Settings) -> bool:
    """Whether a supervisor holds this home."""
    try:
        with _lock(settings):
            return False
    except BlockingIOError:
        return True


@contextmanager
def _lock(settings: Settings) -> Iterator[None]:
    """Held by the supervisor for its whole life; raises BlockingIOError where another one has it."""
    settings.run_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (settings.run_folder / "supervisor.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _state(settings: Settings) -> dict[str, Any]:
    """What the supervisor wrote last: its processes and the code that they run."""
    try:
        return dict(json.loads((settings.run_folder / "platform.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def process_ids(settings: Settings) -> dict[str, int]:
    """Process ids by member, and the supervisor's."""
    return dict(_state(settings).get("processes", {}))


def start(settings: Settings, wait_seconds: float = 180.0) -> None:
    """Start the platform in the background and wait until every process answers, and the orchestrator knows it.

    A platform that runs other code than this, an older checkout's, is started anew; its runs go on.

    Raises FailedPrecondition where the services' code is not installed, Internal where a process does not come up.
    """
    missing = [m.module for m in members(settings) if find_spec(m.module.split(".")[0]) is None]
    if missing:
        raise FailedPrecondition(
            "only the client is installed here: set CRYOFLEET_ORCHESTRATOR to a platform's address, or install "
            "the services from the repository (make setup)"
        )
    longest = max(len(str(member.socket)) for member in members(settings))
    if longest > _LONGEST_SOCKET_PATH:
        raise FailedPrecondition(
            f"CRYOFLEET_HOME {settings.home} is too long for Unix sockets by {longest - _LONGEST_SOCKET_PATH} "
            "characters; choose a shorter folder"
        )
    if is_up(settings) and _state(settings).get("code", code_stamp()) != code_stamp():
        stop(settings)
    deadline = time.monotonic() + wait_seconds
    launched = -_LAUNCH_SECONDS
    waiting = members(settings)
    has_waited = False
    while waiting:
        # Also where one is just stopping: it is started when that has ended.
        if not is_up(settings) and time.monotonic() - launched > _LAUNCH_SECONDS:
            _launch_supervisor(settings)
            launched = time.monotonic()
        waiting = [member for member in waiting if not is_serving(member.address, settings)]
        has_waited |= bool(waiting)
        if not waiting and has_waited:
            # Otherwise the first tasks, and `cryofleet status`, would find services missing that are there.
            waiting = _unknown_to_orchestrator(settings)
        if waiting and time.monotonic() > deadline:
            names = ", ".join(member.name for member in waiting)
            raise Internal(f"{names} did not come up within {wait_seconds:.0f} s; see {settings.log_folder}")
        time.sleep(0.1 if waiting else 0)


def _launch_supervisor(settings: Settings) -> None:
    settings.log_folder.mkdir(parents=True, exist_ok=True)
    with (settings.log_folder / "supervisor.log").open("ab") as log:
        subprocess.run(
            [sys.executable, "-m", "cryofleet.local", _DETACH],
            env={**os.environ, **_SAFE_PATH, "CRYOFLEET_HOME": str(settings.home)},
            cwd=settings.home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )


def page_url(settings: Settings) -> str:
    """Where the platform's page is; it signs whoever opens it in. Empty where it has none.

    Raises Unavailable where the viewer does not answer.
    """
    viewer = next((member for member in members(settings) if member.name == "viewer"), None)
    if viewer is None:
        return ""
    with open_blocking_channel(viewer.address, settings.tls) as channel:
        try:
            stub = viewer_pb2_grpc.ViewerServiceStub(channel)
            return stub.GetPage(viewer_pb2.GetPageRequest(), timeout=10).url
        except grpc.RpcError as error:
            raise failure_from_rpc(error) from None


def is_serving(address: str, settings: Settings) -> bool:
    """Whether the instance at `address` answers its health check with SERVING."""
    with open_blocking_channel(address, settings.tls) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _unknown_to_orchestrator(settings: Settings) -> list[Member]:
    """Members among the orchestrator's instances that have not answered it yet."""
    by_address = {member.address: member for member in members(settings)}
    orchestrator = next(member for member in by_address.values() if member.name == "orchestrator")
    with open_blocking_channel(orchestrator.address, settings.tls) as channel:
        try:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            pools = stub.GetPools(orchestrator_pb2.GetPoolsRequest(), timeout=15).pools
        except grpc.RpcError:
            return [orchestrator]
    instances = [instance for pool in pools for instance in pool.instances if not instance.ready]
    return [by_address[instance.address] for instance in instances if instance.address in by_address]


def stop(settings: Settings) -> bool:
    """Stop the platform and wait until all its processes have ended. False where none was up.

    Raises Unavailable where the supervisor does not end.
    """
    if not is_up(settings):
        return False
    supervisor = process_ids(settings).get("supervisor")
    if supervisor is None:
        raise Unavailable(f"the supervisor of {settings.home} is starting; try again")
    os.kill(supervisor, signal.SIGTERM)
    deadline = time.monotonic() + settings.drain_seconds + 2 * _STOP_MARGIN_SECONDS
    while is_up(settings):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"the supervisor (process {supervisor}) does not end; its log is in {settings.log_folder}"
            )
        time.sleep(0.05)
    return True


@dataclass
class _Child:
    """A member's running process, and when it may be started again."""

    member: Member
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    log: Path = field(default_factory=Path)


class Supervisor:
    """Starts the members, restarts those that end, and stops all on request."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._code = code_stamp()
        self._children = [
            _Child(member, log=settings.log_folder / f"{member.name}.log") for member in members(settings)
        ]
        self._stopping = False

    def run(self) -> None:
        """Supervise until `stop` is called."""
        self._settings.log_folder.mkdir(parents=True, exist_ok=True)
        while not self._stopping:
            changed = [child for child in self._children if self._look_after(child)]
            if changed:
                self._write_process_ids()
            time.sleep(0.1)
        self._stop_all()

    def stop(self) -> None:
        self._stopping = True

    def _look_after(self, child: _Child) -> bool:
        """Start `child` if it is not running and its time has come; true where its process changed."""
        now = time.monotonic()
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return False
            lasted = now - child.started
            child.failures = 0 if lasted > _STABLE_SECONDS else child.failures + 1
            pause = _RESTART_SECONDS[min(child.failures, len(_RESTART_SECONDS)) - 1] if child.failures else 0.0
            child.start_at = now + pause
            child.process = None
            _say(f"{child.member.name} ended with {code} after {lasted:.1f} s; starting it again in {pause:g} s")
        if now < child.start_at:
            return False
        with child.log.open("ab") as log:
            child.process = subprocess.Popen(
                [sys.executable, "-m", child.member.module],
                env={**child.member.defaults, **os.environ, **_SAFE_PATH, **child.member.environment},
                cwd=self._settings.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,
            )
        child.started = now
        return True

    def _write_process_ids(self) -> None:
        running = {child.member.name: child.process.pid for child in self._children if child.process is not None}
        path = self._settings.run_folder / "platform.json"
        temporary = path.with_suffix(".new")
        state = {"code": self._code, "processes": {"supervisor": os.getpid(), **running}}
        temporary.write_text(json.dumps(state))
        temporary.replace(path)

    def _stop_all(self) -> None:
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + _STOP_MARGIN_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"process {process.pid} does not end; killing it")
                process.kill()
                process.wait()
        (self._settings.run_folder / "platform.json").unlink(missing_ok=True)


def _end_with_parent() -> None:
    """Have the kernel end this process when the supervisor dies, so that none is left behind unsupervised."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(message: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Supervise this home's platform until SIGTERM or SIGINT; with --detach, in the background."""
    if _DETACH in sys.argv[1:]:
        if os.fork():
            return
        os.setsid()
    settings = Settings.from_environment()
    try:
        with _lock(settings):
            supervisor = Supervisor(settings)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: supervisor.stop())
            supervisor.run()
    except BlockingIOError:
        _say(f"the platform of {settings.home} is up already")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
