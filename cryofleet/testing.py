"""Running services in tests: one operation in this process, a server on a socket, an instance as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from cryofleet.artifacts import Manifest
from cryofleet.channels import open_channel
from cryofleet.operations import Operation, operations
from cryofleet.progress import Progress, no_progress
from cryofleet.server import Reader, Server, Service
from cryofleet.server.computation import compute, identify, look_up, result_of
from cryofleet.server.validation import validate
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2

ResultT = TypeVar("ResultT", bound=Message)


def file_store(folder: Path, read_only_roots: tuple[str, ...] = ()) -> Store:
    """A store under `folder`."""
    return Store(f"file://{folder}", read_only_roots)


def _operation_of(request: Message) -> Operation:
    for operation in operations().values():
        if operation.request_class is type(request):
            return operation
    raise LookupError(f"{request.DESCRIPTOR.full_name} is no operation's request")


def run_operation(
    service: Service,
    request: Message,
    store: Store,
    *,
    progress: Progress = no_progress,
    device: str = "cpu",
    threads: int = 1,
) -> Any:
    """Runs an operation of `service` in this thread, without gRPC and without slots; its result message.

    Validation, defaults, identity, the look into the store, needs and commit are those of a server.
    """
    result, _ = run_operation_with_manifest(service, request, store, progress=progress, device=device, threads=threads)
    return result


def run_operation_with_manifest(
    service: Service,
    request: Message,
    store: Store,
    *,
    progress: Progress = no_progress,
    device: str = "cpu",
    threads: int = 1,
) -> tuple[Any, Manifest]:
    """As `run_operation`, with the manifest of the result."""
    method = service.methods[_operation_of(request).method]
    validate(request)
    question = identify(method, request, store)
    manifest = look_up(question)
    if manifest is None:
        with tempfile.TemporaryDirectory(prefix="cryofleet-test-") as base:

            def new_scratch() -> Path:
                return Path(tempfile.mkdtemp(dir=base))

            with Reader(question.store, question.project, new_scratch) as reader:
                method.needs(question.request, reader)
            manifest = compute(
                question,
                progress=progress,
                device=device,
                threads=threads,
                instance="test",
                software="cryofleet test",
                new_scratch=new_scratch,
            )
    return result_of(question, manifest), manifest


def settings_for(folder: Path, **changes: Any) -> Settings:
    """Settings of a test instance whose store, socket and scratch lie under `folder`."""
    settings = Settings(
        home=folder,
        store=f"file://{folder}/store",
        address=f"unix:{folder}/run/s.sock",
        instance="test",
        slots=2,
        memory_bytes=2**30,
        scratch=folder / "scratch",
        drain_seconds=1.0,
    )
    return replace(settings, **changes)


@contextlib.asynccontextmanager
async def running_server(service: Service, settings: Settings | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A server of `service` in this process, and a channel to it; on a socket in a temporary folder where no
    settings are given."""
    with tempfile.TemporaryDirectory(prefix="cryofleet-") as folder:
        server = Server(service, settings or settings_for(Path(folder)))
        await server.start()
        try:
            async with open_channel(server.address, server.settings.tls, "localhost") as channel:
                yield channel
        finally:
            await server.stop()


@dataclass
class Reply:
    """The events of one call."""

    result: Any
    provenance: common_pb2.Provenance
    progress: list[common_pb2.Progress] = field(default_factory=list)
    heartbeats: list[float] = field(default_factory=list)
    """Seconds since the method last progressed, of each heartbeat."""


async def call_operation(
    channel: grpc.aio.Channel, request: Message, *, timeout: float = 60.0, **context: Any
) -> Reply:
    """Calls the operation that `request` belongs to; `context` are fields of its context.

    Raises grpc.aio.AioRpcError.
    """
    operation = _operation_of(request)
    if context:
        request = type(request).FromString(request.SerializeToString())
        cast(Any, request).context.MergeFrom(common_pb2.Context(**context))
    call = channel.unary_stream(
        operation.full_name,
        request_serializer=operation.request_class.SerializeToString,
        response_deserializer=operation.response_class.FromString,
    )(request, timeout=timeout)
    progress, heartbeats, reply = [], [], None
    async for event in call:
        kind = event.WhichOneof("event")
        if kind == "progress":
            progress.append(event.progress)
        elif kind == "heartbeat":
            heartbeats.append(event.heartbeat.seconds_since_progress)
        else:
            assert reply is None, "more than one result"
            reply = Reply(event.result, event.provenance, progress, heartbeats)
    assert reply is not None, "the stream ended without a result"
    return reply


@dataclass
class InstanceProcess:
    """An instance that runs as a process of its own."""

    process: asyncio.subprocess.Process
    address: str
    lines: list[dict[str, Any]]
    """Its log so far."""

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.process.terminate()

    async def wait(self, timeout: float = 30.0) -> int:
        """The exit code."""
        return await asyncio.wait_for(self.process.wait(), timeout)


@contextlib.asynccontextmanager
async def instance_process(
    module: str, settings: Settings, environment: Mapping[str, str] | None = None, wait_seconds: float = 60.0
) -> AsyncIterator[InstanceProcess]:
    """`python -m MODULE` as a process with these settings, once it says that it serves; killed at the end."""
    variables = {
        **os.environ,
        "CRYOFLEET_HOME": str(settings.home),
        "CRYOFLEET_STORE": settings.store,
        "CRYOFLEET_READ_ONLY_ROOTS": " ".join(settings.read_only_roots),
        "CRYOFLEET_ADDRESS": settings.address,
        "CRYOFLEET_INSTANCE": settings.instance,
        "CRYOFLEET_SLOTS": str(settings.slots),
        "CRYOFLEET_THREADS": str(settings.threads),
        "CRYOFLEET_MEMORY_BYTES": str(settings.memory_bytes),
        "CRYOFLEET_SCRATCH": str(settings.scratch or ""),
        "CRYOFLEET_DRAIN_SECONDS": str(settings.drain_seconds),
        "CRYOFLEET_METRICS_PORT": str(settings.metrics_port),
        **(environment or {}),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, env=variables, stderr=asyncio.subprocess.PIPE, limit=2**22
    )
    assert process.stderr is not None
    instance = InstanceProcess(process, settings.address, [])
    serving = asyncio.Event()

    async def read_log(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            try:
                instance.lines.append(json.loads(line))
            except ValueError:
                instance.lines.append({"message": line.decode(errors="replace").rstrip()})
            if instance.lines[-1]["message"] == "serving":
                serving.set()
        serving.set()  # it has ended; nobody need wait any longer

    reading = asyncio.create_task(read_log(process.stderr))
    try:
        await asyncio.wait_for(serving.wait(), wait_seconds)
        yield instance
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading
