"""Access to the orchestrator over TCP with TLS: whose runs are whose, and what a user's tools do with a token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from cryofleet.access.certificates import make_set
from cryofleet.access.roles import Role
from cryofleet.access.tokens import new_entry
from cryofleet.artifacts import manifest_for
from cryofleet.channels import open_channel
from cryofleet.client import Client
from cryofleet.errors import FailedPrecondition, Failure, NotFound, PermissionDenied, Unauthenticated
from cryofleet.provenance import trace
from cryofleet.server import Server
from cryofleet.settings import Settings, TlsFiles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2, runtime_pb2_grpc
from orchestrator.service import service as orchestrator_service
from services.io.service import service as io_service
from tests.unit.orchestrator.fake import short_folder

Code = grpc.StatusCode

WAITING = """
name: waiting
parameters:
  seconds: {type: number, default: 0}
  uri: {type: text, default: ""}
steps:
  - id: one
    op: runtime.SelfTest
    with: {seconds: "${seconds}"}
outputs:
  index: ${one.index}
"""
STEALING = """
name: stealing
steps:
  - id: one
    op: io.Ingest
    with: {source_uri: "URI"}
outputs:
  tomogram: ${one.tomogram_uri}
"""


class Site:
    """An orchestrator and an io instance that it calls by its certificate."""

    def __init__(self, home: Path, certificates: Path) -> None:
        self.home = home
        self.certificates = certificates
        self.tokens_file = home / "tokens"
        self.tokens_file.touch()
        self.tokens = {
            user: self._add(user, role, projects)
            for user, role, projects in (
                ("vera", Role.VIEWER, ["apo"]),
                ("ana", Role.OPERATOR, ["apo", "default"]),
                ("ben", Role.OPERATOR, ["ribo"]),
                ("rita", Role.ADMIN, ["*"]),
            )
        }
        self.audit_file = home / "audit.log"
        self.instance = Settings(
            home=home,
            store=f"file://{home}/store",
            address="localhost:0",
            instance="worker",
            slots=3,
            memory_bytes=2**30,
            tls=self.tls("io"),
            tokens=self.tokens_file,
            audit=str(self.audit_file),
            drain_seconds=0.2,
        )
        self.store = Store(self.instance.store)

    def orchestrator(self, io_address: str) -> Settings:
        return replace(
            self.instance,
            instance="orchestrator",
            tls=self.tls("orchestrator"),
            pools={"io": io_address},
            database=f"sqlite:///{self.home}/orchestrator.sqlite",
            pool_wait_seconds=20,
            max_runs_per_user=2,
        )

    def _add(self, user: str, role: Role, projects: list[str]) -> str:
        token, entry = new_entry(user, role, projects)
        with self.tokens_file.open("a") as file:
            file.write(entry.to_line() + "\n")
        return token

    def tls(self, name: str) -> TlsFiles:
        own = self.certificates / name
        return TlsFiles(own / "tls.crt", own / "tls.key", own / "ca.crt")

    def channel(self, user: str = "", certificate: str = "client") -> grpc.aio.Channel:
        token = self.tokens[user] if user else ""
        return open_channel(self.address, self.tls(certificate), token=(lambda: token) if token else None)

    def client(self, user: str, project: str = "apo") -> Client:
        settings = replace(
            self.instance,
            tls=self.tls("client"),
            orchestrator=self.address,
            pools={"io": self.io_address},
            token=self.tokens[user] if user else "",
        )
        return Client(settings, project=project)

    def audited(self, **wanted: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.audit_file.read_text().splitlines()]
        return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]

    address = ""
    io_address = ""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_set(folder)
    return folder


@pytest.fixture
async def site(certificates: Path) -> AsyncIterator[Site]:
    home = short_folder()
    made = Site(home, certificates)
    instance = Server(io_service, made.instance)
    await instance.start()
    made.io_address = instance.address
    server = Server(orchestrator_service, made.orchestrator(instance.address))
    await server.start()
    made.address = server.address
    try:
        yield made
    finally:
        await server.stop()
        await instance.stop()
        shutil.rmtree(home, ignore_errors=True)


def stub_of(channel: grpc.aio.Channel) -> Any:
    return orchestrator_pb2_grpc.OrchestratorServiceStub(channel)


def submission(project: str = "apo", text: str = WAITING, run_id: str = "", **arguments: Any) -> pb.SubmitRunRequest:
    given = Struct()
    given.update(arguments)
    return pb.SubmitRunRequest(pipeline_yaml=text, project=project, run_id=run_id, arguments=given)


async def ended(stub: Any, run_id: str) -> pb.Run:
    run = pb.Run()
    async for response in stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=60):
        run = response.run
    return run


@contextlib.contextmanager
def refused(status: grpc.StatusCode, words: str = "") -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is status, caught.value.details()
    assert words in (caught.value.details() or "")


async def test_a_run_from_its_submission_to_its_audit(site: Site) -> None:
    async with site.channel("ana") as channel, site.channel("vera") as looking:
        stub = stub_of(channel)
        run = (await stub.SubmitRun(submission(run_id="first"))).run
        assert run.owner == "ana"
        assert (await ended(stub_of(looking), "first")).state == pb.RUN_STATE_SUCCEEDED
        (listed,) = (await stub_of(looking).ListRuns(pb.ListRunsRequest())).runs
        assert (listed.id, listed.owner) == ("first", "ana")
    (submitted,) = site.audited(method="cryofleet.v1.OrchestratorService/SubmitRun")
    assert (submitted["user"], submitted["run_id"], submitted["project"]) == ("ana", "first", "apo")
    # The task ran as the platform's, for the run that ana was allowed to start.
    (task,) = site.audited(method="cryofleet.v1.RuntimeService/SelfTest")
    assert (task["user"], task["role"], task["authenticated"]) == ("orchestrator", "platform", "certificate")
    assert (task["run_id"], task["project"], task["task_key"]) == ("first", "apo", "first:1/one")
    (watched,) = site.audited(method="cryofleet.v1.OrchestratorService/WatchRun")
    assert (watched["user"], watched["run_id"], watched["project"]) == ("vera", "first", "apo")


async def test_who_may_not(site: Site) -> None:
    async with site.channel() as channel:
        with refused(Code.UNAUTHENTICATED, "a token is needed"):
            await stub_of(channel).SubmitRun(submission())
    async with site.channel(certificate="picking") as channel:
        with refused(Code.PERMISSION_DENIED, "takes a user's token"):
            await stub_of(channel).SubmitRun(submission())
        with refused(Code.PERMISSION_DENIED, "takes a user's token"):
            await stub_of(channel).ListRuns(pb.ListRunsRequest())
        assert [pool.name for pool in (await stub_of(channel).GetPools(pb.GetPoolsRequest())).pools] == ["io"]
    async with site.channel("vera") as channel:
        stub = stub_of(channel)
        for call in (
            stub.SubmitRun(submission()),
            stub.EstimateRun(pb.EstimateRunRequest(pipeline_yaml=WAITING, project="apo")),
            stub.CancelRun(pb.CancelRunRequest(run_id="x")),
            stub.PinArtifact(pb.PinArtifactRequest(uri=f"{site.store.root}/apo/x")),
        ):
            with refused(Code.PERMISSION_DENIED, "takes the role operator; vera is viewer"):
                await call
    async with site.channel("ana") as channel:
        with refused(Code.PERMISSION_DENIED, "takes the role admin; ana is operator"):
            await stub_of(channel).CollectGarbage(pb.CollectGarbageRequest(project="apo"))
    async with site.channel("rita") as channel:
        assert not (await stub_of(channel).CollectGarbage(pb.CollectGarbageRequest())).results
    assert len(site.audited(status="PERMISSION_DENIED")) == 7
    assert len(site.audited(status="UNAUTHENTICATED")) == 1


def requests_with_a_run() -> list[str]:
    """Methods of the orchestrator that take a run's id."""
    service = pb.DESCRIPTOR.services_by_name["OrchestratorService"]
    return [m.name for m in service.methods if "run_id" in m.input_type.fields_by_name and m.name != "SubmitRun"]


async def test_a_run_of_others_is_not_there(site: Site) -> None:
    async with site.channel("ben") as channel:
        await stub_of(channel).SubmitRun(submission("ribo", run_id="theirs", seconds=0.3))
    methods = requests_with_a_run()
    assert {"GetRun", "WatchRun", "CancelRun", "ResumeRun", "RetryRun", "ForgetRun"} <= set(methods)
    async with site.channel("ana") as channel:
        stub = stub_of(channel)
        for method in methods:
            said = []
            for run_id in ("theirs", "nobodys"):
                call = getattr(stub, method)(getattr(pb, f"{method}Request")(run_id=run_id), timeout=20)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    [each async for each in call] if hasattr(call, "__aiter__") else await call
                said.append((caught.value.code(), (caught.value.details() or "").replace(run_id, "RUN")))
            assert said[0] == said[1] == (Code.NOT_FOUND, "there is no run 'RUN'"), method
        assert not (await stub.ListRuns(pb.ListRunsRequest())).runs
        with refused(Code.PERMISSION_DENIED, "project 'ribo'"):
            await stub.ListRuns(pb.ListRunsRequest(project="ribo"))
    async with site.channel("ben") as channel:
        run = await ended(stub_of(channel), "theirs")
        assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), "nobody has cancelled it"
    async with site.channel("rita") as channel:
        assert [each.id for each in (await stub_of(channel).ListRuns(pb.ListRunsRequest())).runs] == ["theirs"]


async def test_what_others_run_is_seen_without_whose_it_is(site: Site) -> None:
    async with site.channel("ben") as channel:
        await stub_of(channel).SubmitRun(submission("ribo", run_id="theirs", seconds=20))
        running: Any = ()
        async with asyncio.timeout(20):
            while not running:
                await asyncio.sleep(0.1)
                running = (await stub_of(channel).GetPools(pb.GetPoolsRequest())).pools[0].instances[0].running
        seen = {"ben": running[0]}
        async with site.channel("ana") as other:
            seen["ana"] = (await stub_of(other).GetPools(pb.GetPoolsRequest())).pools[0].instances[0].running[0]
        async with open_channel(site.io_address, site.tls("client"), token=lambda: site.tokens["ana"]) as io:
            capacity = await runtime_pb2_grpc.RuntimeServiceStub(io).GetCapacity(runtime_pb2.GetCapacityRequest())
            seen["ana, of io"] = capacity.running[0]
        await stub_of(channel).CancelRun(pb.CancelRunRequest(run_id="theirs"))
    assert (seen["ben"].run_id, seen["ben"].project, seen["ben"].phase) == ("theirs", "ribo", "waiting")
    for who in ("ana", "ana, of io"):
        assert seen[who].operation == "runtime.SelfTest"
        assert (seen[who].run_id, seen[who].project, seen[who].phase) == ("", "", ""), who


async def test_the_log_of_a_run_is_for_those_of_its_project(site: Site) -> None:
    text = WAITING.replace("{seconds:", "{fail_with: INVALID_ARGUMENT, seconds:")
    async with site.channel("ana") as channel, site.channel("vera") as looking:
        await stub_of(channel).SubmitRun(submission(text=text, run_id="failing"))
        assert (await ended(stub_of(looking), "failing")).state == pb.RUN_STATE_FAILED
        log = await stub_of(looking).ReadLog(pb.ReadLogRequest(run_id="failing"))
    assert not log.unread
    assert {line.instance for line in log.lines} == {"worker", "orchestrator"}
    said = {line.message for line in log.lines}
    assert "INVALID_ARGUMENT: failed with INVALID_ARGUMENT, as asked for" in said
    assert "the task failed: INVALID_ARGUMENT: failed with INVALID_ARGUMENT, as asked for" in said
    async with open_channel(site.io_address, site.tls("client"), token=lambda: site.tokens["ben"]) as io:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(io)
        with refused(Code.PERMISSION_DENIED, "project 'apo'"):
            await stub.GetLog(runtime_pb2.GetLogRequest(run_id="failing", project="apo"))
        assert not (await stub.GetLog(runtime_pb2.GetLogRequest(run_id="failing", project="ribo"))).lines
        # What somebody logs under the id of a run of others is not in its log.
        with pytest.raises(grpc.aio.AioRpcError):
            await call_operation(io, runtime_pb2.SelfTestRequest(fail_with="ABORTED"), run_id="failing", project="ribo")
        assert (await stub.GetLog(runtime_pb2.GetLogRequest(run_id="failing", project="ribo"))).lines
    again = await asyncio.to_thread(site.client("vera").log, "failing")
    assert {line.message for line in again.lines} == said


async def test_a_run_in_what_others_have(site: Site) -> None:
    theirs = f"{site.store.root}/ribo/files/t.mrc"
    site.store.put(theirs, b"secret")
    async with site.channel("ana") as channel:
        stub = stub_of(channel)
        with refused(Code.PERMISSION_DENIED, "project 'ribo'"):
            await stub.SubmitRun(submission("ribo"))
        for uri in (theirs, f"{site.store.root}/ribo/none", "file:///etc/passwd", f"{site.store.root}/apo/../ribo/t"):
            with refused(Code.PERMISSION_DENIED):
                await stub.SubmitRun(submission(uri=uri))
            with refused(Code.PERMISSION_DENIED):
                await stub.EstimateRun(
                    pb.EstimateRunRequest(pipeline_yaml=WAITING, arguments=submission(uri=uri).arguments)
                )
            with refused(Code.PERMISSION_DENIED):
                await stub.PinArtifact(pb.PinArtifactRequest(uri=uri))
        # A pipeline's own text is not searched: what it names is refused where it would be read.
        for uri in (theirs, "file:///etc/passwd"):
            run = (await stub.SubmitRun(submission(text=STEALING.replace("URI", uri)))).run
            run = await ended(stub, run.id)
            assert run.state == pb.RUN_STATE_FAILED
            assert uri in run.error
            assert "secret" not in run.error
            assert run.steps[0].state == pb.STEP_STATE_FAILED
    assert site.store.get(theirs) == b"secret"


async def test_how_many_runs_a_user_may_have_going_on(site: Site) -> None:
    async with site.channel("ana") as channel, site.channel("ben") as other:
        stub = stub_of(channel)
        runs = [(await stub.SubmitRun(submission(run_id=name, seconds=20))).run for name in ("a", "b")]
        with refused(Code.RESOURCE_EXHAUSTED, "ana has 2 runs going on, and may have 2"):
            await stub.SubmitRun(submission(run_id="c", seconds=0))
        with refused(Code.RESOURCE_EXHAUSTED):
            await stub.SubmitRun(submission("default", run_id="c"))
        await stub.SubmitRun(submission(run_id="a", seconds=20))  # is there already
        await stub_of(other).SubmitRun(submission("ribo", run_id="d"))
        await stub.CancelRun(pb.CancelRunRequest(run_id="a"))
        await stub.SubmitRun(submission(run_id="c", seconds=20))
        with refused(Code.RESOURCE_EXHAUSTED):
            await stub.ResumeRun(pb.ResumeRunRequest(run_id="a"))
        for name in ("b", "c"):
            await stub.CancelRun(pb.CancelRunRequest(run_id=name))
        assert (await stub.ResumeRun(pb.ResumeRunRequest(run_id="a"))).run.attempt == 2
        await stub.CancelRun(pb.CancelRunRequest(run_id="a"))
    assert len(runs) == 2


async def test_a_users_tools_with_a_token(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("1234")
    pipeline = tmp_path / "waiting.yaml"
    pipeline.write_text(WAITING)

    def work() -> str:
        with site.client("ana") as client:
            uri = client.upload(path)
            assert client.artifact(uri).read() == b"1234"
            handle = client.run(pipeline).wait()
            assert handle.record.owner == "ana"
            assert [each.id for each in client.runs()] == [handle.id]
            assert client.call("runtime.SelfTest", index=7)["index"] == 7
            assert trace(client, uri).operation == "io.Upload"
            with pytest.raises(PermissionDenied):
                client.in_project("ribo").upload(path)
        return uri

    uri = await asyncio.to_thread(work)

    def others() -> None:
        with site.client("ben", "ribo") as client:
            with pytest.raises(PermissionDenied):
                client.artifact(uri).read()
            with pytest.raises(PermissionDenied):
                trace(client, uri)
            with pytest.raises(NotFound):
                client.get("first")
        with site.client("") as client, pytest.raises(Unauthenticated, match="CRYOFLEET_TOKEN"):
            client.runs()
        settings = replace(site.client("").settings, token_file=tmp_path / "token")
        (tmp_path / "token").write_text(site.tokens["vera"])
        (tmp_path / "token").chmod(0o644)
        with pytest.raises(FailedPrecondition, match="chmod 600"):
            Client(settings, project="apo").runs()
        (tmp_path / "token").chmod(0o600)
        with Client(settings, project="apo") as client:
            assert len(client.runs()) == 1
            with pytest.raises(PermissionDenied, match="takes the role operator"):
                client.upload(path)
            # A token that can't be had any more is not an empty one.
            (tmp_path / "token").unlink()
            with pytest.raises(Failure, match="cannot read the token"):
                client.runs()

    await asyncio.to_thread(others)
    # The user's name is in the record of runs and in the audit, not in results, which belong to the project.
    manifest = manifest_for(site.store, uri)
    assert manifest is not None
    assert "ana" not in manifest.to_json().replace("manifest", "")


async def test_certificates_are_renewed_under_a_running_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.placement.RESOLVE_SECONDS", 0.1)
    make_set(tmp_path / "set")
    home = short_folder()
    site = Site(home, tmp_path / "set")
    instance = Server(io_service, site.instance)
    await instance.start()
    site.io_address = instance.address
    server = Server(orchestrator_service, site.orchestrator(instance.address))
    await server.start()
    site.address = server.address
    try:
        async with site.channel("ana") as channel:
            stub = stub_of(channel)
            before = (await stub.SubmitRun(submission(run_id="before", seconds=2))).run
            while not (await stub.GetRun(pb.GetRunRequest(run_id="before"))).run.steps[0].fraction:
                await asyncio.sleep(0.05)
            make_set(tmp_path / "set", replace=True)
            await asyncio.sleep(1.0)
            # A call that was going on over the old channel goes on.
            run = await ended(stub, before.id)
            assert (run.state, run.steps[0].tasks_set_aside) == (pb.RUN_STATE_SUCCEEDED, 0)
        # An instance that starts now knows no other authority than the new one.
        await instance.stop()
        instance = Server(io_service, replace(site.instance, address=site.io_address))
        await instance.start()
        async with site.channel("ana") as channel:
            stub = stub_of(channel)
            run = (await stub.SubmitRun(submission(run_id="after", seconds=0.01))).run
            assert (await ended(stub, "after")).state == pb.RUN_STATE_SUCCEEDED
    finally:
        await server.stop()
        await instance.stop()
        shutil.rmtree(home, ignore_errors=True)


async def test_an_instance_that_takes_no_tokens_is_for_the_orchestrator_alone(site: Site) -> None:
    server = Server(io_service, replace(site.instance, tokens=None, instance="closed"))
    await server.start()
    try:
        async with open_channel(server.address, site.tls("client"), token=lambda: site.tokens["rita"]) as channel:
            with refused(Code.UNAUTHENTICATED):
                await runtime_pb2_grpc.RuntimeServiceStub(channel).GetCapacity(runtime_pb2.GetCapacityRequest())
        async with open_channel(server.address, site.tls("orchestrator")) as channel:
            stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
            assert (await stub.GetCapacity(runtime_pb2.GetCapacityRequest())).instance == "closed"
    finally:
        await server.stop()
