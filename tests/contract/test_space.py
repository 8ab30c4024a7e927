"""Disks that are nearly full, projects that have all they may have, and results that nobody keeps any longer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from cryofleet.artifacts.digests import digest_of
from cryofleet.channels import open_channel
from cryofleet.server import Server
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import io_pb2, io_pb2_grpc, orchestrator_pb2_grpc, runtime_pb2
from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator import housekeeping
from orchestrator.service import service as orchestrator_service
from services.io.service import service as io_service
from tests.unit.orchestrator.fake import short_folder

MORE_THAN_ANY_DISK = 2**62
MEBIBYTE = 2**20
RUN = """
name: once
parameters:
  index: {type: integer, default: 1}
steps:
  - id: only
    op: runtime.SelfTest
    with: {index: "${index}"}
"""


@dataclass
class Site:
    """An orchestrator and an instance of io."""

    settings: Settings
    io: Any
    orchestrator: Any
    """Their stubs; the types are for blocking channels."""
    channel: grpc.aio.Channel
    """To io."""
    store: Store

    @property
    def rules(self) -> Path:
        assert self.settings.project_rules is not None
        return self.settings.project_rules

    async def upload(self, content: bytes) -> str:
        header = io_pb2.UploadHeader(name="file.bin", size_bytes=len(content), digest=digest_of(content))
        parts = [io_pb2.UploadRequest(header=header)]
        await self.io.Upload(iter(parts))  # as the client does: what is refused is refused before its bytes are sent
        parts += [io_pb2.UploadRequest(chunk=content[i : i + MEBIBYTE]) for i in range(0, len(content), MEBIBYTE)]
        return str((await self.io.Upload(iter(parts))).uri)

    async def submit(self, index: int) -> pb.Run:
        given = Struct()
        given.update({"index": index})
        request = pb.SubmitRunRequest(pipeline_yaml=RUN, arguments=given, run_id=f"run-{index}")
        run: pb.Run = (await self.orchestrator.SubmitRun(request)).run
        return run

    async def done(self, index: int) -> pb.Run:
        """A run that has succeeded."""
        run = await self.submit(index)
        async for response in self.orchestrator.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
            run = response.run
        assert run.state == pb.RUN_STATE_SUCCEEDED
        return run

    def stored(self) -> set[str]:
        return {found.uri for found in self.store.list(self.store.root)}


@contextlib.asynccontextmanager
async def site(home: Path, **changes: Any) -> AsyncIterator[Site]:
    rules = home / "projects.yaml"
    rules.touch()
    settings = Settings(
        home=home,
        store=f"file://{home}/store",
        address=f"unix:{home}/o/o.sock",
        instance="orchestrator",
        pools={"io": f"unix:{home}/i/i.sock"},
        database=f"sqlite:///{home}/orchestrator.sqlite",
        drain_seconds=0.2,
        pool_wait_seconds=0.5,
        memory_bytes=2**30,
        slots=2,
        project_rules=rules,
    )
    settings = replace(settings, **changes)
    io = replace(settings, address=settings.pools["io"], instance="io")
    servers = [Server(io_service, io), Server(orchestrator_service, settings)]
    try:
        for server in servers:
            await server.start()
        async with open_channel(settings.address) as channel, open_channel(io.address) as direct:
            yield Site(
                settings,
                io_pb2_grpc.IoServiceStub(direct),
                orchestrator_pb2_grpc.OrchestratorServiceStub(channel),
                direct,
                Store(settings.store),
            )
    finally:
        for server in reversed(servers):
            await server.stop()


@pytest.fixture
def home() -> Iterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


async def refused(call: Any) -> tuple[str, str]:
    """Status and message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


async def test_a_disk_that_is_nearly_full_takes_nothing_large(home: Path) -> None:
    question = runtime_pb2.SelfTestRequest(index=1)
    async with site(home) as plenty:
        answer = await call_operation(plenty.channel, question)
        await plenty.done(7)
    async with site(home, reserve_bytes=MORE_THAN_ANY_DISK) as full:
        before = full.stored()
        status, message = await refused(call_operation(full.channel, runtime_pb2.SelfTestRequest(index=2)))
        assert status == "RESOURCE_EXHAUSTED"
        assert "CRYOFLEET_RESERVE_BYTES" in message
        assert "cryofleet gc --delete" in message
        status, message = await refused(full.upload(bytes(2 * MEBIBYTE)))
        assert (status, str(2 * MEBIBYTE) in message) == ("RESOURCE_EXHAUSTED", True)
        assert (await refused(full.submit(8)))[0] == "RESOURCE_EXHAUSTED"
        assert full.stored() == before, "nothing was begun"
        # What is there is still read, deleted, and counted.
        assert (await call_operation(full.channel, question)).result == answer.result
        await full.orchestrator.CollectGarbage(pb.CollectGarbageRequest(delete=True))
        usage = await full.orchestrator.GetUsage(pb.GetUsageRequest())
        assert usage.reserve_bytes == MORE_THAN_ANY_DISK
        assert 0 < usage.free_bytes < MORE_THAN_ANY_DISK


async def test_a_project_that_has_all_it_may_have_gets_no_more(home: Path) -> None:
    async with site(home) as place:
        place.rules.write_text("default: {quota_gib: 0.01}\n")  # some 10 MiB
        await place.upload(bytes(4 * MEBIBYTE))
        await place.upload(b"1" * 4 * MEBIBYTE)
        status, message = await refused(place.upload(b"2" * 4 * MEBIBYTE))
        assert status == "RESOURCE_EXHAUSTED"
        assert "project default has" in message
        assert f"of the {round(0.01 * 2**30)} that it may have, and {4 * MEBIBYTE} more were to come" in message
        # Small things fit.
        await place.done(1)
        usage = (await place.orchestrator.GetUsage(pb.GetUsageRequest(project="default"))).projects[0]
        assert 8 * MEBIBYTE < usage.size_bytes < 9 * MEBIBYTE
        assert (usage.project, usage.quota_bytes) == ("default", round(0.01 * 2**30))
        assert usage.objects == len(place.stored())
        # Nothing at all once it is above: not a run, not a task.
        place.rules.write_text("default: {quota_gib: 0.005}\n")
        assert (await refused(place.submit(2)))[0] == "RESOURCE_EXHAUSTED"
        assert (await refused(call_operation(place.channel, runtime_pb2.SelfTestRequest(index=3))))[0] == (
            "RESOURCE_EXHAUSTED"
        )
        other = runtime_pb2.SelfTestRequest(index=3)
        other.context.project = "other"
        await call_operation(place.channel, other)
        place.rules.write_text("default: {quota_gib: 1}\n")
        await place.upload(b"2" * 4 * MEBIBYTE)
        await place.done(2)


async def test_runs_are_kept_for_as_long_as_the_rules_say(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.garbage.RECORD_SECONDS", 0.0)
    monkeypatch.setattr(housekeeping, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.1)
    async with site(home) as place:
        folders: list[Path] = []
        for index in (1, 2, 3):
            await place.done(index)
            folders += set((home / "store" / "default").glob("*")) - set(folders)
        upload = Path((await place.upload(b"of no run")).removeprefix("file://"))
        pinned = f"file://{folders[1]}/manifest.json"
        await place.orchestrator.PinArtifact(pb.PinArtifactRequest(uri=pinned))
        days_ago = time.time() - 31 * 86400
        for folder in (*folders[:2], upload.parent):
            for path in folder.iterdir():
                os.utime(path, (days_ago, days_ago))
        with contextlib.closing(sqlite3.connect(home / "orchestrator.sqlite")) as database, database:
            for table, column in (("attempts", "finished_at"), ("runs", "created_at")):
                database.execute(f"UPDATE cryofleet_{table} SET {column} = ? WHERE run_id != 'run-3'", (days_ago,))
        place.rules.write_text("default: {keep_days: 30}\n")
        deadline = time.monotonic() + 30
        while [run.id for run in (await place.orchestrator.ListRuns(pb.ListRunsRequest())).runs] != ["run-3"]:
            assert time.monotonic() < deadline, "the old runs are still there"
            await asyncio.sleep(0.05)
        while folders[0].exists() or upload.exists():
            assert time.monotonic() < deadline, "what only they needed is still there"
            await asyncio.sleep(0.05)
        assert [folder.exists() for folder in folders] == [False, True, True], "one is pinned, one is young"
