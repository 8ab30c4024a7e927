"""Inboxes over real gRPC: what comes into a watched folder or bucket is ingested, once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf.struct_pb2 import Struct
from prometheus_client import CollectorRegistry

from cryofleet.channels import open_channel
from cryofleet.cli import cli
from cryofleet.client import Client
from cryofleet.errors import Unavailable
from cryofleet.server import Server
from cryofleet.settings import S3Settings, Settings
from cryofleet.storage import FileStore, S3Store, Store, file_uri
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc
from orchestrator import submission
from orchestrator.inboxes import work
from orchestrator.service import service as orchestrator_service
from services.io.service import service as io_service
from tests.contract import test_access_runs as access
from tests.moto import client_of, s3_server
from tests.unit.orchestrator.fake import short_folder

INGEST = """
name: ingest
inputs:
  tomogram: {kind: file}
parameters:
  voxel_size_angstrom: {type: number, optional: true}
steps:
  - id: ingest
    op: io.Ingest
    with: {source_uri: "${tomogram}", voxel_size_angstrom: "${voxel_size_angstrom}"}
outputs:
  tomogram: ${ingest.tomogram_uri}
"""
State = pb.InboxItemState
certificates, guarded = access.certificates, access.site
ENDED = ("DONE", "SET_ASIDE")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Settings]:
    with s3_server("facility") as settings:
        yield settings


class Site:
    """An orchestrator and an io instance, which may read a folder and a bucket."""

    def __init__(self, home: Path, s3: S3Settings) -> None:
        self.home = home
        self.data = home / "data"
        self.data.mkdir()
        common: dict[str, Any] = {
            "home": home,
            "store": f"file://{home}/store",
            "read_only_roots": (file_uri(self.data), "s3://facility"),
            "s3": s3,
            "drain_seconds": 0.2,
            "memory_bytes": 2**30,
        }
        self.io = Settings(**common, address=f"unix:{home}/s/s.sock", instance="worker", slots=3)
        self.settings = Settings(
            **common,
            address=f"unix:{home}/o/o.sock",
            orchestrator=f"unix:{home}/o/o.sock",
            instance="orchestrator",
            pools={"io": self.io.address},
            database=f"sqlite:///{home}/orchestrator.sqlite",
            pool_wait_seconds=20,
        )
        self.stub: Any = None
        self.registry: CollectorRegistry | None = None

    async def add(self, name: str, uri: str, text: str = INGEST, **fields: Any) -> pb.Inbox:
        arguments = Struct()
        arguments.update(fields.pop("arguments", {}))
        request = pb.AddInboxRequest(
            name=name, uri=uri, pipeline_yaml=text, arguments=arguments, **{"settle_seconds": 0.2, **fields}
        )
        inbox: pb.Inbox = (await self.stub.AddInbox(request)).inbox
        return inbox

    async def items(self, name: str) -> dict[str, pb.InboxItem]:
        """By file name; the newest of each."""
        answer = await self.stub.GetInbox(pb.GetInboxRequest(name=name, limit=1000))
        return {item.uri.rpartition("/")[2]: item for item in reversed(answer.items)}

    async def states(self, name: str) -> dict[str, str]:
        return {file: state_of(item) for file, item in (await self.items(name)).items()}

    async def until(self, name: str, reached: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """The states of an inbox's items, once they are as wanted."""
        try:
            async with asyncio.timeout(20):
                while not reached(states := await self.states(name)):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            answer = await self.stub.GetInbox(pb.GetInboxRequest(name=name))
            raise AssertionError(f"not in time: {answer}") from None
        return states

    async def all_ended(self, name: str, count: int) -> dict[str, str]:
        return await self.until(name, lambda s: len(s) == count and set(s.values()) <= set(ENDED))

    async def runs(self) -> list[pb.Run]:
        """The oldest first."""
        return list(reversed((await self.stub.ListRuns(pb.ListRunsRequest(limit=1000))).runs))


def state_of(item: pb.InboxItem) -> str:
    return State.Name(item.state).removeprefix("INBOX_ITEM_STATE_")


@pytest.fixture
async def site(s3: S3Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(work, "ROUND_SECONDS", 0.05)
    home = short_folder()
    made = Site(home, s3)
    servers = [Server(io_service, made.io), Server(orchestrator_service, made.settings)]
    try:
        for server in servers:
            await server.start()
        async with open_channel(made.settings.address) as channel:
            made.stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            made.registry = servers[1].instance.metrics.registry
            yield made
    finally:
        for server in reversed(servers):
            await server.stop()
        shutil.rmtree(home, ignore_errors=True)


def tomogram(path: Path, seed: int = 0, voxel_size_angstrom: float = 10.0) -> bytes:
    """Writes one, beside the inboxes, and returns its bytes."""
    volume = np.random.default_rng(seed).normal(size=(8, 16, 16)).astype(np.float32)
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(volume)
        file.voxel_size = voxel_size_angstrom
    return path.read_bytes()


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


async def test_each_file_is_taken_up_once_and_only_when_it_is_whole(site: Site) -> None:
    folder = site.data / "night"
    folder.mkdir()
    whole = tomogram(site.home / "t.mrc")
    inbox = await site.add("night", file_uri(folder))
    assert (inbox.state, inbox.at_once, inbox.input) == (pb.INBOX_STATE_ACTIVE, 2, "tomogram")
    growing = folder / "growing.mrc"
    growing.write_bytes(whole[:500])
    (folder / "copied.mrc.part").write_bytes(whole)
    (folder / "garbage.mrc").write_bytes(b"no tomogram at all " * 100)
    (folder / "unknown.mrc").write_bytes(tomogram(site.home / "t.mrc", 1, voxel_size_angstrom=0.0))
    for seed in range(2, 5):
        (folder / f"good-{seed}.mrc").write_bytes(tomogram(site.home / "t.mrc", seed))
    written = 500
    while written < len(whole) - 4:  # one voxel is still missing, however long the others take
        written = min(written + 1000, len(whole) - 4)
        with growing.open("ab") as file:
            file.write(whole[file.tell() : written])
        await asyncio.sleep(0.02)
        assert (await site.items("night")).get("growing.mrc", pb.InboxItem()).run_id == ""
    others = await site.until("night", lambda s: len(s) == 6 and sum(state in ENDED for state in s.values()) == 5)
    items = await site.items("night")
    assert others["growing.mrc"] == "ARRIVING"
    assert items["growing.mrc"].run_id == ""
    assert {file for file, state in others.items() if state == "DONE"} == {f"good-{seed}.mrc" for seed in range(2, 5)}
    assert "text that begins 'no tomogram at all" in items["garbage.mrc"].cause
    assert items["garbage.mrc"].run_id == ""
    assert "the file does not say its voxel size" in items["unknown.mrc"].cause
    with growing.open("ab") as file:
        file.write(whole[-4:])
    assert (await site.all_ended("night", 6))["growing.mrc"] == "DONE"

    runs = await site.runs()
    items = await site.items("night")
    assert {run.id for run in runs} == {item.run_id for item in items.values() if item.run_id}
    assert len(runs) == 5, "one each, none for the garbage"
    (run,) = (run for run in runs if run.id == items["growing.mrc"].run_id)
    assert run.arguments["tomogram"] == file_uri(growing)
    assert (run.attempt, run.pipeline, run.owner) == (1, "ingest", inbox.owner)
    stored = Store(site.settings.store)
    assert stored.exists(str(run.outputs["tomogram"]))
    # Nothing is done twice, and a file that is replaced is new.
    growing.write_bytes(tomogram(site.home / "t.mrc", 9))
    await site.until("night", lambda s: s["growing.mrc"] != "DONE")
    await site.all_ended("night", 6)
    assert len(await site.runs()) == 6
    counts = (await site.stub.ListInboxes(pb.ListInboxesRequest())).inboxes[0].items
    assert (counts.done, counts.set_aside, counts.started, counts.waiting, counts.arriving) == (5, 2, 0, 0, 0)
    assert site.registry is not None
    async with asyncio.timeout(10):
        while site.registry.get_sample_value("cryofleet_inbox_items", {"state": "done"}) != 5.0:
            await asyncio.sleep(0.02)


async def test_in_order_and_so_many_at_a_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site.data / "order"
    folder.mkdir()
    most = 0
    usual = work.Inboxes._begin_run

    async def watched(self: Any, inbox: Any, item: Any) -> None:
        nonlocal most
        most = max(most, len(self._engine.inboxes.items(inbox, ("starting", "started"))))
        await usual(self, inbox, item)

    monkeypatch.setattr(work.Inboxes, "_begin_run", watched)
    for name in ("c", "a", "d", "b"):
        (folder / f"{name}.mrc").write_bytes(tomogram(site.home / "t.mrc", ord(name)))
    await site.add("order", file_uri(folder), at_once=1, settle_seconds=0.1)
    await site.all_ended("order", 4)
    started = [str(run.arguments["tomogram"]).rpartition("/")[2] for run in await site.runs()]
    assert started == ["a.mrc", "b.mrc", "c.mrc", "d.mrc"]
    assert most == 1


async def test_pausing_retrying_and_removing(site: Site) -> None:
    folder = site.data / "night"
    folder.mkdir()
    (folder / "old.mrc").write_bytes(tomogram(site.home / "t.mrc"))
    await site.add("night", file_uri(folder), new_only=True)
    paused = (await site.stub.PauseInbox(pb.PauseInboxRequest(name="night"))).inbox
    assert paused.state == pb.INBOX_STATE_PAUSED
    (folder / "a.mrc").write_bytes(tomogram(site.home / "t.mrc", 1, voxel_size_angstrom=0.0))
    (folder / "garbage.mrc").write_bytes(b"x" * 2000)
    states = await site.until("night", lambda s: s.get("a.mrc") == "WAITING" and s.get("garbage.mrc") == "SET_ASIDE")
    assert states["old.mrc"] == "SKIPPED"
    await asyncio.sleep(3 * work.ROUND_SECONDS)
    assert await site.runs() == []
    await site.stub.ResumeInbox(pb.ResumeInboxRequest(name="night"))
    await site.until("night", lambda s: s["a.mrc"] == "SET_ASIDE")
    (run,) = await site.runs()
    assert run.state == pb.RUN_STATE_FAILED
    item = (await site.items("night"))["a.mrc"]
    retry = pb.RetryInboxRequest(name="night", numbers=[item.number])
    assert (await site.stub.RetryInbox(retry)).retried == 1
    async with asyncio.timeout(20):
        while (run := (await site.runs())[0]).attempt != 2 or run.state != pb.RUN_STATE_FAILED:
            await asyncio.sleep(0.02)
    await site.until("night", lambda s: s["a.mrc"] == "SET_ASIDE")
    assert len(await site.runs()) == 1, "the run goes on as its second attempt"
    status, message = await refused(site.stub.RetryInbox(pb.RetryInboxRequest(name="night", numbers=[99])))
    assert (status, message) == ("NOT_FOUND", "inbox night has set aside no item 99")
    # Of the garbage nothing was started; it is looked at again.
    (folder / "garbage.mrc").write_bytes(tomogram(site.home / "t.mrc", 5))
    await site.until("night", lambda s: s["garbage.mrc"] == "DONE")

    await site.stub.RemoveInbox(pb.RemoveInboxRequest(name="night"))
    assert (await refused(site.stub.GetInbox(pb.GetInboxRequest(name="night"))))[0] == "NOT_FOUND"
    (folder / "late.mrc").write_bytes(tomogram(site.home / "t.mrc", 6))
    await asyncio.sleep(6 * work.ROUND_SECONDS)
    assert len(await site.runs()) == 2
    assert not (await site.stub.ListInboxes(pb.ListInboxesRequest())).inboxes


async def test_a_storage_that_is_away_is_said_and_what_had_come_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site.data / "night"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mrc").write_bytes(tomogram(site.home / "t.mrc", ord(name)))
    await site.add("night", file_uri(folder), settle_seconds=1.0)
    await site.stub.PauseInbox(pb.PauseInboxRequest(name="night"))
    await site.until("night", lambda s: [*s.values()] == ["WAITING"] * 2)
    usual, away = FileStore.list, True

    def listing(self: FileStore, prefix_uri: str) -> Any:
        if away and prefix_uri == file_uri(folder):
            raise Unavailable("the storage is away")
        return usual(self, prefix_uri)

    async def problem() -> str:
        return str((await site.stub.GetInbox(pb.GetInboxRequest(name="night"))).inbox.problem)

    monkeypatch.setattr(FileStore, "list", listing)
    async with asyncio.timeout(20):
        while await problem() != "the storage is away":
            await asyncio.sleep(0.02)
    await site.stub.ResumeInbox(pb.ResumeInboxRequest(name="night"))
    await site.all_ended("night", 2)
    for _ in range(10):
        assert await problem() == "the storage is away", "until it is back"
        await asyncio.sleep(0.02)
    away = False
    async with asyncio.timeout(20):
        while await problem():
            await asyncio.sleep(0.02)


async def test_what_keeps_an_inbox_from_going_on_is_said_and_passes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site.data / "night"
    folder.mkdir()

    def away(self: Any, project: str) -> None:
        raise Unavailable("the storage is away")

    async def problem() -> str:
        return str((await site.stub.GetInbox(pb.GetInboxRequest(name="night"))).inbox.problem)

    with monkeypatch.context() as patch:
        patch.setattr("cryofleet.server.quotas.Quotas.check", away)
        await site.add("night", file_uri(folder))
        (folder / "a.mrc").write_bytes(tomogram(site.home / "t.mrc"))
        async with asyncio.timeout(20):
            while await problem() != "the storage is away":
                await asyncio.sleep(0.02)
        assert await site.states("night") == {"a.mrc": "STARTED"}
        assert await site.runs() == []
    await site.until("night", lambda s: s["a.mrc"] == "DONE")
    async with asyncio.timeout(20):
        while await problem():
            await asyncio.sleep(0.02)
    assert len(await site.runs()) == 1


@pytest.mark.parametrize("after", [False, True], ids=["before the start", "after it"])
async def test_a_start_that_is_cut_off_is_made_up_for_once(
    site: Site, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    folder = site.data / "night"
    folder.mkdir()
    cut_off: set[str] = set()
    usual = submission.start

    async def cut(engine: Any, run: Any) -> None:
        if run.run_id in cut_off:
            await usual(engine, run)
            return
        cut_off.add(run.run_id)
        if after:
            await usual(engine, run)
        raise RuntimeError("as if the process had ended here")

    monkeypatch.setattr(submission, "start", cut)
    for seed in range(3):
        (folder / f"{seed}.mrc").write_bytes(tomogram(site.home / "t.mrc", seed))
    await site.add("night", file_uri(folder))
    assert set((await site.all_ended("night", 3)).values()) == {"DONE"}
    runs = await site.runs()
    assert {run.id for run in runs} == cut_off
    assert [run.attempt for run in runs] == [1, 1, 1]


async def test_inboxes_that_cannot_be_are_refused(site: Site) -> None:
    folder = site.data / "night"
    folder.mkdir()
    (folder / "a.mrc").write_bytes(b"x")
    uri = file_uri(folder)
    status, message = await refused(site.add("night", "file:///etc"))
    assert status == "PERMISSION_DENIED"
    assert "file:///etc is outside the roots" in message
    assert "add file:///etc to CRYOFLEET_READ_ONLY_ROOTS" in message
    status, message = await refused(site.add("night", f"{site.settings.store}/other/in"))
    assert (status, "is not of project default" in message) == ("PERMISSION_DENIED", True)
    status, message = await refused(site.add("night", f"{site.settings.store}/default"))
    assert (status, "where results are kept" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(site.add("night", f"{uri}/a.mrc"))
    assert (status, "is a file" in message) == ("INVALID_ARGUMENT", True)
    assert (await refused(site.add("night", "s3://elsewhere/in")))[0] == "PERMISSION_DENIED"
    status, message = await refused(site.add("night", uri, arguments={"voxel_size": 10}))
    assert (status, "did you mean 'voxel_size_angstrom'" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(site.add("night", uri, arguments={"tomogram": uri}))
    assert (status, "is what the inbox gives each run" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(site.add("night", uri, input="voxel_size_angstrom"))
    assert (status, "has no input 'voxel_size_angstrom'; it has tomogram" in message) == ("INVALID_ARGUMENT", True)
    two = INGEST.replace("  tomogram: {kind: file}", "  one: {kind: file}\n  two: {kind: file}")
    two = two.replace("${tomogram}", "${one}")
    status, message = await refused(site.add("night", uri, two))
    assert (status, "with --input: one, two" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(site.add("night", uri, two, input="one", arguments={"two": f"{uri}/none"}))
    assert (status, "input two" in message and "does not exist" in message) == ("NOT_FOUND", True)
    for fields in ({"at_once": 0}, {"settle_seconds": -1.0}, {"patterns": [""]}, {"ready_suffix": "a/b"}):
        assert (await refused(site.add("night", uri, **fields)))[0] == "INVALID_ARGUMENT"
    assert (await refused(site.add("Night!", uri)))[0] == "INVALID_ARGUMENT"
    await site.add("night", uri)
    status, message = await refused(site.add("night", uri))
    assert (status, "has an inbox 'night'" in message) == ("ALREADY_EXISTS", True)
    for method in ("PauseInbox", "ResumeInbox", "RemoveInbox", "RetryInbox", "GetInbox"):
        call = getattr(site.stub, method)(getattr(pb, f"{method}Request")(name="none"))
        assert await refused(call) == ("NOT_FOUND", "project default has no inbox 'none'")


async def test_a_bucket_is_listed_where_its_server_tells_of_nothing(site: Site, s3: S3Settings) -> None:
    client = client_of(s3)
    assert S3Store(s3).listen("s3://facility/in") is None
    inbox = await site.add("bucket", "s3://facility/in", settle_seconds=None)
    assert inbox.settle_seconds == 0.0
    tomogram(site.home / "t.mrc")
    for key in ("in/TS_1/a.mrc", "in/b.mrc", "inner/c.mrc"):
        client.fput_object("facility", key, str(site.home / "t.mrc"))
    (site.home / "half.mrc").write_bytes((site.home / "t.mrc").read_bytes()[:-7])
    client.fput_object("facility", "in/half.mrc", str(site.home / "half.mrc"))
    states = await site.until("bucket", lambda s: [*s.values()].count("DONE") == 2 and len(s) == 3)
    assert states == {"a.mrc": "DONE", "b.mrc": "DONE", "half.mrc": "ARRIVING"}
    client.fput_object("facility", "in/half.mrc", str(site.home / "t.mrc"))
    await site.all_ended("bucket", 3)
    assert len(await site.runs()) == 3


EVENT = (
    b'{"EventName":"s3:ObjectCreated:Put","Records":[{"s3":{"bucket":{"name":"facility"},"object":{"key":"%b"}}}]}\n'
)


@contextlib.contextmanager
def telling_server(*pieces: bytes) -> Iterator[S3Settings]:
    """Answers each request with a stream of events in these pieces, and ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            # Who is told nonsense goes away.
            with connection, contextlib.suppress(ConnectionError):
                requests.append(connection.recv(65536))
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for piece in pieces:
                    connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                connection.sendall(b"0\r\n\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield S3Settings(endpoint=f"127.0.0.1:{port}", access_key="a", secret_key="b", secure=False)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        assert b"events=s3%3AObjectCreated%3A%2A" in requests[0]
        assert b"prefix=in%2F" in requests[0]


def test_a_bucket_tells_of_new_objects() -> None:
    event = EVENT % b"in/TS+1/%C3%A9.mrc"
    pieces = (
        b"   ",
        event[:30],
        event[30:] + EVENT % b"in/b.mrc" + EVENT % b"elsewhere/c.mrc" + EVENT % b"in/../d.mrc",
        b'{"Records":null}\n{"Records":[{}]}\nnonsense\n',
    )
    with telling_server(*pieces) as settings:
        heard = S3Store(settings).listen("s3://facility/in")
        assert heard is not None
        told = list(heard)
    assert [uri for uris in told for uri in uris] == ["s3://facility/in/TS 1/é.mrc", "s3://facility/in/b.mrc"]
    assert () in told, "so that whoever listens comes to know that there is nothing"
    with telling_server(b"x" * 700_000, b"x" * 700_000) as settings:
        heard = S3Store(settings).listen("s3://facility/in")
        assert heard is not None
        with pytest.raises(Unavailable, match="an event without an end"):
            list(heard)


async def test_what_a_bucket_tells_is_taken_up_without_a_listing(
    site: Site, s3: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(s3)
    events: list[str] = []
    listings = 0
    usual = S3Store.list

    def counted(self: S3Store, prefix_uri: str) -> Any:
        nonlocal listings
        listings += prefix_uri == "s3://facility/told"
        return usual(self, prefix_uri)

    def listen(self: S3Store, prefix_uri: str) -> Iterator[tuple[str, ...]]:
        assert prefix_uri == "s3://facility/told"
        while not stopped.wait(0.02):
            yield tuple(events.pop() for _ in range(len(events)))
            heard.set()

    stopped, heard = threading.Event(), threading.Event()
    monkeypatch.setattr(S3Store, "list", counted)
    monkeypatch.setattr(S3Store, "listen", listen)
    tomogram(site.home / "t.mrc")
    try:
        await site.add("told", "s3://facility/told")
        assert await asyncio.to_thread(heard.wait, 20)
        # What was there before it was heard is found by a listing, the last one for a minute.
        client.fput_object("facility", "told/first.mrc", str(site.home / "t.mrc"))
        events.append("s3://facility/told/first.mrc")
        await site.all_ended("told", 1)
        before = listings
        client.fput_object("facility", "told/a.mrc", str(site.home / "t.mrc"))
        await asyncio.sleep(4 * work.ROUND_SECONDS)
        assert list(await site.states("told")) == ["first.mrc"]
        events += ["s3://facility/told/a.mrc", "s3://facility/told/gone.mrc"]
        assert await site.all_ended("told", 2) == {"first.mrc": "DONE", "a.mrc": "DONE"}
        assert listings == before
    finally:
        stopped.set()


async def test_whose_inboxes_are_whose(guarded: access.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ROUND_SECONDS", 0.05)
    folder = f"{guarded.store.root}/apo/incoming"
    add = pb.AddInboxRequest(project="apo", name="in", uri=folder, pipeline_yaml=INGEST, settle_seconds=0.1)
    users = ("vera", "ana", "ben", "rita")
    async with contextlib.AsyncExitStack() as stack:
        vera, ana, ben, rita = [
            access.stub_of(await stack.enter_async_context(guarded.channel(user))) for user in users
        ]
        status, message = await refused(vera.AddInbox(add))
        assert (status, "takes the role operator; vera is viewer" in message) == ("PERMISSION_DENIED", True)
        assert (await ana.AddInbox(add)).inbox.owner == "ana"
        # Others' inboxes tell nothing, and others' files can't be watched.
        requests = {
            name: getattr(pb, f"{name}InboxRequest")(project="apo", name="in")
            for name in ("Get", "Pause", "Remove", "Retry")
        }
        for name, request in requests.items():
            status, message = await refused(getattr(ben, f"{name}Inbox")(request))
            assert (status, message) == ("PERMISSION_DENIED", "ben has no access to project 'apo'")
            if name != "Get":
                assert (await refused(getattr(vera, f"{name}Inbox")(request)))[0] == "PERMISSION_DENIED"
        theirs = pb.AddInboxRequest(project="ribo", name="theirs", uri=folder, pipeline_yaml=INGEST)
        assert (await refused(ben.AddInbox(theirs)))[0] == "PERMISSION_DENIED"
        assert not (await ben.ListInboxes(pb.ListInboxesRequest())).inboxes
        for stub in (vera, rita):
            assert [each.name for each in (await stub.ListInboxes(pb.ListInboxesRequest())).inboxes] == ["in"]

        # Its runs are its owner's, and count with the others that she has.
        for run_id in ("one", "two"):
            await ana.SubmitRun(access.submission(run_id=run_id, seconds=30))
        guarded.store.put(f"{folder}/a.mrc", tomogram(guarded.home / "t.mrc"))
        get = pb.GetInboxRequest(project="apo", name="in")
        async with asyncio.timeout(20):
            while not (problem := (await vera.GetInbox(get)).inbox.problem):
                await asyncio.sleep(0.02)
        assert problem.startswith("ana has 2 runs going on, and may have 2")
        await ana.CancelRun(pb.CancelRunRequest(run_id="one"))
        async with asyncio.timeout(20):
            while state_of((answer := await vera.GetInbox(get)).items[0]) != "DONE":
                await asyncio.sleep(0.02)
        run = (await vera.GetRun(pb.GetRunRequest(run_id=answer.items[0].run_id))).run
        assert (run.owner, run.project) == ("ana", "apo")
        await ana.CancelRun(pb.CancelRunRequest(run_id="two"))
    (audited,) = guarded.audited(method="cryofleet.v1.OrchestratorService/AddInbox", user="ana")
    assert audited["project"] == "apo"


async def test_the_command_line(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Settings, "from_environment", lambda *_: site.settings)
    monkeypatch.setattr(Client, "_is_own", lambda *_: False)
    folder = site.data / "Krios 1"
    folder.mkdir()
    (tmp_path / "ingest.yaml").write_text(INGEST)

    def invoke(*words: str) -> str:
        result = CliRunner().invoke(cli, ["inbox", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    async def command(*words: str) -> str:
        return await asyncio.to_thread(invoke, *words)

    pipeline = ("--pipeline", str(tmp_path / "ingest.yaml"))
    said = await command("add", str(folder), *pipeline, "--set", "voxel_size_angstrom=10.05", "--settle-seconds", "0.1")
    assert said == f"inbox krios-1 watches {file_uri(folder)} for ingest; see: cryofleet inbox show krios-1\n"
    (folder / "a.mrc").write_bytes(tomogram(site.home / "t.mrc"))
    (folder / "b.mrc").write_bytes(b"nothing " * 200)
    await site.all_ended("krios-1", 2)
    assert (await command("list")).split("\t") == [
        "krios-1", "active", "ingest", "0", "0", "0", "1", "1", file_uri(folder), "\n",
    ]  # fmt: skip
    shown = (await command("show", "krios-1")).splitlines()
    rows = [line.split("\t") for line in shown if "\t" in line]
    assert [(row[0], row[1], row[4]) for row in rows] == [("2", "set-aside", "b.mrc"), ("1", "done", "a.mrc")]
    assert "text that begins 'nothing" in rows[0][6]
    assert (await command("show", "krios-1", "--state", "done")).count("\t") == 6
    (run,) = await site.runs()
    assert run.arguments["voxel_size_angstrom"] == 10.05
    assert await command("pause", "krios-1") == "inbox krios-1 is paused\n"
    assert await command("retry", "krios-1", "2") == "inbox krios-1 tries 1 items once more\n"
    assert json.loads(await command("resume", "krios-1", "--json"))["state"] == "INBOX_STATE_ACTIVE"
    assert await command("remove", "krios-1") == "inbox krios-1 is removed\n"
    assert await command("list") == ""
