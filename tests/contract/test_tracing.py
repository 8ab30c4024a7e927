"""Traces: a real collector gets the spans of real processes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from cryofleet import tracing
from cryofleet.access.certificates import make_set
from cryofleet.channels import open_channel
from cryofleet.settings import Settings
from cryofleet.testing import InstanceProcess, instance_process, settings_for
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2, runtime_pb2_grpc
from tests.unit.orchestrator.fake import short_folder

TOKEN = "cryofleet_" + "t0k3n" * 8
STORE_SECRET = "hidden-key-of-the-store"
COLLECTOR_KEY = "key-for-the-collector"
PASSWORD = "pa55word-of-a-url"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

PIPELINE = """
name: traced
parameters:
  numbers: {type: list}
  seconds: {type: number, default: 0}
  fail: {type: text, default: ""}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}", seconds: "${seconds}"}
  - id: last
    op: runtime.SelfTest
    foreach: ${each.index}
    as: number
    with: {index: "${number}", fail_with: "${fail}"}
outputs:
  last: ${last.index}
"""


@dataclass
class Span:
    name: str
    service: str
    instance: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    status: Status
    message: SpanMessage

    @property
    def seconds(self) -> float:
        return float(self.message.end_time_unix_nano - self.message.start_time_unix_nano) / 1e9


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    spans: list[Span] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    resources: list[dict[str, Any]] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's name for it
        self.received.append(request.SerializeToString())
        self.keys |= {value for key, value in context.invocation_metadata() if key == "authorization"}
        for group in request.resource_spans:
            resource = {each.key: _value(each.value) for each in group.resource.attributes}
            self.resources.append(resource)
            for scope in group.scope_spans:
                self.spans += [
                    Span(
                        span.name,
                        resource["service.name"],
                        resource["service.instance.id"],
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        {each.key: _value(each.value) for each in span.attributes},
                        span.status,
                        span,
                    )
                    for span in scope.spans
                ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str, **attributes: Any) -> list[Span]:
        """In order of their beginning."""
        found = [s for s in self.spans if s.name == name and attributes.items() <= s.attributes.items()]
        return sorted(found, key=lambda span: span.message.start_time_unix_nano)

    def one(self, name: str, **attributes: Any) -> Span:
        found = self.named(name, **attributes)
        assert len(found) == 1, (name, attributes, [(s.name, s.attributes) for s in self.spans])
        return found[0]


@contextlib.contextmanager
def collecting(collector: Collector, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """The collector's endpoint; over TLS where it has credentials."""
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    if credentials is None:
        endpoint = f"http://localhost:{server.add_insecure_port('localhost:0')}"
    else:
        endpoint = f"https://localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    try:
        yield endpoint
    finally:
        server.stop(None).wait()


@dataclass
class Site:
    """A worker, and an orchestrator that can be killed and started again."""

    worker: InstanceProcess
    orchestrators: list[InstanceProcess]
    stub: Any
    start_another: Callable[[], Awaitable[InstanceProcess]]

    async def kill_orchestrator(self) -> None:
        """And start it anew, under its name."""
        self.orchestrators[-1].process.kill()
        await self.orchestrators[-1].wait()
        self.orchestrators.append(await self.start_another())

    async def stop(self) -> list[int]:
        """The exit codes of the last orchestrator and of the worker."""
        processes = (self.orchestrators[-1], self.worker)
        for process in processes:
            process.terminate()
        return [await process.wait() for process in processes]

    async def submit(self, metadata: tuple[tuple[str, str], ...] = (), **arguments: Any) -> str:
        given = Struct()
        given.update(arguments)
        request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=given)
        return str((await self.stub.SubmitRun(request, metadata=metadata, wait_for_ready=True)).run.id)

    async def ended(self, run_id: str, state: Any) -> None:
        async for response in self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=60, wait_for_ready=True):
            run = response.run
        assert run.state == state, run


@contextlib.asynccontextmanager
async def site(endpoint: str) -> AsyncIterator[Site]:
    home = short_folder()
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={COLLECTOR_KEY}",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "CRYOFLEET_S3_SECRET_KEY": STORE_SECRET,
        "CRYOFLEET_POOL_IO": f"unix:{home}/s/s.sock",
        "CRYOFLEET_DATABASE": f"sqlite:///{home}/orchestrator.sqlite",
        "CRYOFLEET_DRAIN_SECONDS": "0.2",
    }
    worker_settings = settings_for(home, address=f"unix:{home}/s/s.sock", instance="worker", slots=3)
    settings = Settings(
        home=home, store=worker_settings.store, address=f"unix:{home}/o/o.sock", instance="orchestrator-0"
    )
    try:
        async with contextlib.AsyncExitStack() as stack:

            async def start_orchestrator() -> InstanceProcess:
                return await stack.enter_async_context(instance_process("orchestrator", settings, variables))

            worker, first = await asyncio.gather(
                stack.enter_async_context(instance_process("cryofleet.server", worker_settings, variables)),
                start_orchestrator(),
            )
            channel = await stack.enter_async_context(open_channel(settings.address))
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            yield Site(worker, [first], stub, start_orchestrator)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def short(text: str, count: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:count]


@pytest.fixture(scope="module")
def story() -> tuple[Collector, str, Site]:
    """A run whose orchestrator is killed in the middle, that then fails, and is resumed and fails again."""
    collector = Collector()
    built: list[Site] = []

    async def tell(endpoint: str) -> str:
        async with site(endpoint) as running:
            built.append(running)
            fail = f"{TOKEN} {STORE_SECRET} s3://user:{PASSWORD}@host"
            # The token of a caller is metadata, as the traceparent is.
            given = (("authorization", f"Bearer {TOKEN}"), ("traceparent", CALLER))
            run_id = await running.submit(given, numbers=[1, 2], seconds=1.5, fail=fail)
            async with open_channel(running.worker.address) as channel:
                worker: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
                while len((await worker.GetCapacity(runtime_pb2.GetCapacityRequest())).running) < 2:
                    await asyncio.sleep(0.05)
            await running.kill_orchestrator()
            await running.ended(run_id, pb.RUN_STATE_FAILED)
            await running.stub.ResumeRun(pb.ResumeRunRequest(run_id=run_id))
            await running.ended(run_id, pb.RUN_STATE_FAILED)
            assert await running.stop() == [0, 0]
        return run_id

    with collecting(collector) as endpoint:
        run_id = asyncio.run(tell(endpoint))
    return collector, run_id, built[0]


def test_a_run_is_one_trace_over_processes_crashes_and_attempts(story: tuple[Collector, str, Site]) -> None:
    collector, run_id, running = story
    assert len(running.orchestrators) == 2, "it was killed"
    trace = short(f"cryofleet run {run_id}", 32)
    within = [span for span in collector.spans if span.trace == trace]
    assert {span.service for span in within} == {"cryofleet-orchestrator", "cryofleet-runtime"}
    assert {span.instance for span in within} == {"orchestrator-0", "worker"}
    assert {resource["deployment.environment"] for resource in collector.resources} == {"test"}
    # Of what belongs to the run only the clients' calls are in traces of their own.
    others = {span.name for span in collector.spans if span.trace != trace and span.attributes.get("run_id") == run_id}
    assert others <= {f"cryofleet.v1.OrchestratorService/{name}Run" for name in ("Submit", "Watch", "Resume")}
    ids = [span.id for span in within]
    assert len(ids) == len(set(ids)), "nothing is there twice"


def test_spans_hang_together_from_the_run_to_the_computation(story: tuple[Collector, str, Site]) -> None:
    collector, run_id, _ = story
    first, second = collector.named("run traced")
    assert (first.parent, second.parent) == ("", first.id)
    assert first.id == short(f"cryofleet part {run_id}:1", 16)
    assert [span.attributes["attempt"] for span in (first, second)] == [1, 2]
    step = collector.one("each", attempt=1)
    assert step.parent == first.id
    for index in range(2):
        key = f"{run_id}:1/each[{index}]"
        task = collector.one(f"each[{index}]", attempt=1)
        assert task.parent == step.id
        assert task.attributes["task_key"] == key
        assert (task.attributes["run_id"], task.attributes["operation"]) == (run_id, "runtime.SelfTest")
        assert (task.attributes["status"], task.attributes["instance"]) == ("OK", "worker")
        # The one that the killed orchestrator had begun was never written.
        call = collector.one("runtime.SelfTest", task_key=key)
        assert (call.parent, call.attributes["try_number"]) == (task.id, 1)
        assert call.message.kind == SpanMessage.SPAN_KIND_CLIENT
        served = collector.one("cryofleet.v1.RuntimeService/SelfTest", task_key=key, status="OK")
        assert (served.parent, served.service, served.message.kind) == (
            call.id,
            "cryofleet-runtime",
            SpanMessage.SPAN_KIND_SERVER,
        )
        assert served.attributes["cached"] is False
        computation = next(s for s in collector.named("computation") if s.parent == served.id)
        inside = sorted(
            (s for s in collector.spans if s.parent == computation.id), key=lambda s: s.message.start_time_unix_nano
        )
        assert [s.name for s in inside] == ["identify", "look up", "admission", "compute", "commit"]
        assert inside[3].seconds >= 1.5, "what the operation was told to take"
        assert sum(s.seconds for s in inside) <= computation.seconds <= served.seconds <= call.seconds
        # In the second attempt its result is found, and nobody is called.
        again = collector.one(f"each[{index}]", attempt=2)
        assert (again.attributes["cached"], again.attributes["tries"]) == (True, 0)
        assert not [s for s in collector.spans if s.parent == again.id]


def test_a_call_that_was_cut_off_is_there_and_cancelled(story: tuple[Collector, str, Site]) -> None:
    collector, run_id, _ = story
    trace = short(f"cryofleet run {run_id}", 32)
    for index in range(2):
        cut = collector.one(
            "cryofleet.v1.RuntimeService/SelfTest", task_key=f"{run_id}:1/each[{index}]", status="CANCELLED"
        )
        assert cut.trace == trace


def test_failures_are_errors_without_secrets(story: tuple[Collector, str, Site]) -> None:
    collector, run_id, _ = story
    for attempt in (1, 2):
        key = f"{run_id}:{attempt}/last[1]"
        calls = [collector.one("runtime.SelfTest", task_key=key), collector.one("last[1]", attempt=attempt)]
        calls.append(collector.one("cryofleet.v1.RuntimeService/SelfTest", task_key=key))
        calls.append(collector.one("last", attempt=attempt))
        for span in calls:
            assert span.status.code == Status.STATUS_CODE_ERROR
            assert span.status.message.startswith("INVALID_ARGUMENT: ")
            assert "it must be the name of a gRPC status" in span.status.message
            assert "(hidden)" in span.status.message
        whole = collector.one("run traced", attempt=attempt)
        assert (whole.status.code, whole.attributes["status"]) == (Status.STATUS_CODE_ERROR, "failed")
    assert collector.one("each", attempt=1).status.code == Status.STATUS_CODE_UNSET
    assert collector.keys == {COLLECTOR_KEY}
    for secret in (TOKEN, STORE_SECRET, PASSWORD, COLLECTOR_KEY):
        assert not any(secret.encode() in request for request in collector.received)


def test_submitting_is_linked_with_the_callers_own_trace(story: tuple[Collector, str, Site]) -> None:
    collector, run_id, _ = story
    call = collector.one("cryofleet.v1.OrchestratorService/SubmitRun")
    _, trace, span, _ = CALLER.split("-")
    assert (call.trace, call.parent, call.attributes["run_id"]) == (trace, span, run_id)
    submitted = collector.one("submit")
    assert submitted.parent == collector.named("run traced")[0].id
    assert [link.span_id.hex() for link in submitted.message.links] == [call.id]
    resumed = collector.one("resume")
    assert resumed.parent == collector.named("run traced")[1].id
    # What an orchestrator asks its instances once a second is no news.
    assert not [s for s in collector.spans if "GetCapacity" in s.name]


def test_log_lines_carry_the_trace(story: tuple[Collector, str, Site]) -> None:
    _, run_id, running = story
    trace = short(f"cryofleet run {run_id}", 32)
    logged = [line for line in running.worker.lines if line.get("run_id") == run_id]
    assert logged
    assert {line.get("trace_id") for line in logged} == {trace}
    told = [
        line
        for process in running.orchestrators
        for line in process.lines
        if line.get("run_id") == run_id and line["message"].startswith("attempt")
    ]
    assert len(told) >= 4
    assert {line["trace_id"] for line in told} == {trace}
    assert not any("trace_id" in line for line in running.worker.lines if line["message"] == "serving")


async def test_a_collector_that_is_away_changes_nothing() -> None:
    """It takes connections and never answers, which is worse than to refuse them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with site(f"http://127.0.0.1:{silent.getsockname()[1]}") as running:
            started = time.monotonic()
            run_id = await running.submit(numbers=list(range(20)), seconds=0)
            await running.ended(run_id, pb.RUN_STATE_SUCCEEDED)
            assert time.monotonic() - started < 40
            ending = time.monotonic()
            assert await running.stop() == [0, 0]
            assert time.monotonic() - ending < 25, "the last spans are waited for, but not for long"
            for process in (running.orchestrators[0], running.worker):
                complaints = [line for line in process.lines if line["logger"] == "cryofleet.tracing"]
                assert len(complaints) <= 1
                assert not any(line["logger"].startswith("opentelemetry") for line in process.lines)


def test_nothing_is_loaded_without_a_collector(tmp_path: Path) -> None:
    script = (
        "import sys, cryofleet.client, cryofleet.server; from cryofleet import tracing;"
        "tracing.start('io', 'a')\n"
        "with tracing.span('one'): tracing.note(a=1); assert tracing.metadata() == () and tracing.trace_id() == ''\n"
        "print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


async def test_a_client_sends_its_own_trace_along() -> None:
    """A program that has OpenTelemetry set up for itself, and uses our client."""
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    from cryofleet.channels import open_blocking_channel

    seen: list[Any] = []

    class Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
        def service(self, details: Any) -> Any:
            seen.append(dict(details.invocation_metadata).get("traceparent"))
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    folder = short_folder()
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"unix:{folder}/s.sock")
    server.start()
    try:
        with open_blocking_channel(f"unix:{folder}/s.sock") as channel:
            call = channel.unary_unary("/a/B", request_serializer=bytes, response_deserializer=bytes)
            call(runtime_pb2.GetCapacityRequest().SerializeToString(), timeout=10)
            parent = SpanContext(10, 11, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            with trace.use_span(NonRecordingSpan(parent)):
                call(b"", timeout=10)
        assert seen == [None, f"00-{10:032x}-{11:016x}-01"]
    finally:
        server.stop(None).wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def tracing_here(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[None]:
    """Traces of this process; at the end all have been exported."""
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    tracing.start("io", "io-0")
    try:
        yield
    finally:
        tracing.stop()


def test_the_standard_variables_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    with (
        collecting(collector) as endpoint,
        tracing_here(
            monkeypatch,
            EXPORTER_OTLP_TRACES_ENDPOINT=endpoint,
            EXPORTER_OTLP_TRACES_HEADERS=f"authorization={COLLECTOR_KEY}",
            SERVICE_NAME="the-sites-name",
            RESOURCE_ATTRIBUTES="service.namespace=cryo,service.version=mine",
        ),
        tracing.span("one"),
    ):
        pass
    assert (collector.one("one").service, collector.one("one").instance) == ("the-sites-name", "io-0")
    assert collector.resources[0]["service.namespace"] == "cryo"
    assert collector.resources[0]["service.version"] == "mine"
    assert collector.keys == {COLLECTOR_KEY}


def test_a_run_is_sampled_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    with (
        collecting(collector) as endpoint,
        tracing_here(
            monkeypatch,
            EXPORTER_OTLP_ENDPOINT=endpoint,
            TRACES_SAMPLER="parentbased_traceidratio",
            TRACES_SAMPLER_ARG="0.5",
        ),
    ):
        for number in range(40):
            run, step = (
                tracing.Identity.of(f"run-{number}", part) for part in (f"run-{number}:1", f"run-{number}:1/a")
            )
            tracing.write("run", run, None, 1.0, 2.0)
            tracing.write("step", step, run, 1.0, 2.0)
            with tracing.inside(step), tracing.span("call"):
                pass
    traces = Counter(span.trace for span in collector.spans)
    # As the sampler is specified: the lower half of the trace's id is below the ratio.
    ids = [short(f"cryofleet run run-{number}", 32) for number in range(40)]
    assert traces == {trace: 3 for trace in ids if int(trace[16:], 16) < 2**63}
    assert 8 <= len(traces) <= 32


def test_spans_go_out_over_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_set(tmp_path)
    folder = tmp_path / "io"
    collector = Collector()
    credentials = grpc.ssl_server_credentials([((folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())])
    with (
        collecting(collector, credentials) as endpoint,
        tracing_here(monkeypatch, EXPORTER_OTLP_ENDPOINT=endpoint, EXPORTER_OTLP_CERTIFICATE=str(folder / "ca.crt")),
        tracing.span("one"),
    ):
        pass
    assert collector.one("one")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "not over http/protobuf"),
        ({"EXPORTER_OTLP_COMPRESSION": "lzma"}, "lzma"),
        ({"SDK_DISABLED": "true"}, ""),
        ({"TRACES_EXPORTER": "none"}, ""),
    ],
)
def test_settings_that_can_not_be_followed_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: dict[str, str], said: str
) -> None:
    with tracing_here(monkeypatch, EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", **variables):
        assert not tracing.is_on()
        with tracing.span("one"):
            tracing.note(cached=True)
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_a_process_ends_in_time_where_its_collector_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "STOP_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with tracing_here(
            monkeypatch, EXPORTER_OTLP_ENDPOINT=endpoint, BSP_MAX_QUEUE_SIZE="64", BSP_MAX_EXPORT_BATCH_SIZE="8"
        ):
            for _ in range(500):
                with tracing.span("one"):
                    pass
            started = time.monotonic()
        assert time.monotonic() - started < 8
    assert len([record for record in caplog.records if "traces" in record.getMessage()]) <= 1
