"""A small service that does what a test tells it, and an engine that uses it, both on the test's own event loop."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from cryofleet.artifacts import ResultWriter
from cryofleet.channels import REASON_BUSY, REASON_KEY
from cryofleet.operations import find_operation, parameters_of, result_to_mapping
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2, orchestrator_pb2, runtime_pb2, runtime_pb2_grpc
from orchestrator.cache import ResultCache
from orchestrator.engine import Engine
from orchestrator.pipeline_reading import load
from orchestrator.run_message import ENDED, run_message
from orchestrator.runs import RunRow

Behaviour = Callable[[runtime_pb2.SelfTestRequest, Any], Awaitable[None]]


class FakeService(runtime_pb2_grpc.RuntimeServiceServicer):
    """Answers SelfTest within its slots. `behave` may wait, or abort the call; with a store it keeps results."""

    def __init__(self, name: str, slots: int = 4, store: Store | None = None) -> None:
        self.name = name
        self.slots = slots
        self.draining = False
        self.log: list[runtime_pb2.LogLine] = []
        """What it says it has logged."""
        self.hangs = False
        """Whether it never says that."""
        self.answers_for = ""
        """A task key to answer with instead of the right one."""
        self.behave: Behaviour | None = None
        self.calls: list[str] = []
        """Task keys of the calls that were let in, in order."""
        self.done: list[str] = []
        self.cancelled: list[str] = []
        self.refused = 0
        self.running = 0
        self.peak = 0
        self._store = store
        self._cache = ResultCache(store) if store is not None else None
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> None:
        self._server = grpc.aio.server()
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        await self._server.start()

    async def kill(self) -> None:
        """Ends like a killed process: calls break off."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def GetCapacity(  # noqa: N802
        self, request: runtime_pb2.GetCapacityRequest, context: Any
    ) -> runtime_pb2.GetCapacityResponse:
        return runtime_pb2.GetCapacityResponse(
            instance=self.name,
            slots_total=self.slots,
            slots_free=self.slots - self.running,
            devices=["cpu"],
            draining=self.draining,
        )

    async def GetLog(  # noqa: N802
        self, request: runtime_pb2.GetLogRequest, context: Any
    ) -> runtime_pb2.GetLogResponse:
        if self.hangs:
            await asyncio.Event().wait()
        found = [line for line in self.log if request.task_key in ("", line.task_key)]
        return runtime_pb2.GetLogResponse(lines=found)

    async def Estimate(  # noqa: N802
        self, request: runtime_pb2.EstimateRequest, context: Any
    ) -> runtime_pb2.EstimateResponse:
        return runtime_pb2.EstimateResponse(memory_bytes=1000, slots=1)

    async def SelfTest(  # noqa: N802
        self, request: runtime_pb2.SelfTestRequest, context: Any
    ) -> AsyncIterator[runtime_pb2.SelfTestResponse]:
        key = request.context.task_key
        if self.running >= self.slots:
            self.refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all slots are taken", ((REASON_KEY, REASON_BUSY),))
        self.calls.append(key)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            yield runtime_pb2.SelfTestResponse(progress=common_pb2.Progress(fraction=0.5, phase="testing"))
            if self.behave is not None:
                await self.behave(request, context)
            await asyncio.sleep(request.seconds)
            result = runtime_pb2.SelfTestResult(
                index=request.index,
                first_row=request.rows.first,
                instance=self.name,
                next_index=request.index + 1,
                counted=request.index + 1 >= request.count_to,
            )
            manifest = self._keep(request, result)
            self.done.append(key)
            yield runtime_pb2.SelfTestResponse(
                result=result,
                provenance=common_pb2.Provenance(task_key=self.answers_for or key, seconds=0.25, manifest_uri=manifest),
            )
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        finally:
            self.running -= 1

    def _keep(self, request: runtime_pb2.SelfTestRequest, result: runtime_pb2.SelfTestResult) -> str:
        if self._store is None or self._cache is None:
            return ""
        operation = find_operation("runtime.SelfTest")
        project = request.context.project
        key = self._cache.key(operation, request, project)
        writer = ResultWriter(self._store, project, key)
        manifest = writer.commit(
            operation=operation.name,
            version=operation.version,
            parameters=parameters_of(request),
            inputs={},
            result=result_to_mapping(result),
            seconds=0.25,
        )
        return manifest.manifest_uri


def short_folder() -> Path:
    """A temporary folder whose name leaves room for a socket's."""
    return Path(tempfile.mkdtemp(prefix="cf-"))


def settings_in(
    home: Path, *, pools: dict[str, str], pool_wait_seconds: float = 20.0, instance: str = "one"
) -> Settings:
    return Settings(
        home=home,
        store=f"file://{home}/store",
        instance=instance,
        pools=pools,
        database=f"sqlite:///{home}/orchestrator.sqlite",
        pool_wait_seconds=pool_wait_seconds,
    )


class Platform:
    """An engine with one fake service, and what a test asks of them."""

    def __init__(self, home: Path, slots: int) -> None:
        self.home = home
        self.store = Store(f"file://{home}/store")
        self.service = FakeService("fake", slots, self.store)
        self.address = f"unix:{home}/fake.sock"
        self.settings = settings_in(home, pools={"io": self.address})
        self.engine = Engine(self.settings, self.store)

    async def submit(self, text: str, run_id: str = "run", owner: str = "", **arguments: Any) -> None:
        pipeline = load(text, "test.yaml")
        values = {name: value for name, value in pipeline.bind(arguments).items() if value is not None}
        row = RunRow(run_id, "default", pipeline.name, "test.yaml", text, values, time.time(), owner)
        assert await self.engine.in_thread(self.engine.runs.create, row)
        await self.engine.start_attempt(run_id, 1)

    async def next_attempt(self, run_id: str = "run") -> None:
        last = self.engine.runs.attempt(run_id).attempt
        assert self.engine.runs.next_attempt(run_id, last)
        await self.engine.start_attempt(run_id, last + 1)

    def run(self, run_id: str = "run") -> orchestrator_pb2.Run:
        runs = self.engine.runs
        row, attempt = runs.run(run_id), runs.attempt(run_id)
        units = runs.units(run_id, attempt.attempt)
        return run_message(row, attempt, load(row.definition, row.source), units)

    async def ended(self, run_id: str = "run", seconds: float = 30.0) -> orchestrator_pb2.Run:
        """The run, once it has ended."""
        async with asyncio.timeout(seconds):
            while (run := self.run(run_id)).state not in ENDED:
                await self.engine.wait_for_change(run_id, 0.1)
        return run

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    async def restart_stopped(self) -> None:
        """Starts another engine of the same name."""
        self.engine = Engine(self.settings, self.store)
        await self.engine.start()


@asynccontextmanager
async def running_platform(slots: int = 4) -> AsyncIterator[Platform]:
    """A platform, up; removed at the end."""
    home = short_folder()
    platform = Platform(home, slots)
    try:
        await platform.service.start(platform.address)
        await platform.engine.start()
        yield platform
    finally:
        await platform.engine.stop()
        await platform.service.kill()
        shutil.rmtree(home, ignore_errors=True)
