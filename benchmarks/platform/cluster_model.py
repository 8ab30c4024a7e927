"""A cluster that is only modelled: its instances take time for tasks, come, go and fail, and pools are scaled.

How long tasks take is measured: the longest of each operation in the manifests of runs of the demonstrations on two
cores without a GPU, per voxel, per particle or per task. Everything else is assumed, and said below.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from cryofleet.channels import REASON_BUSY, REASON_DRAINING, REASON_KEY
from cryofleet.operations import Operation, find_operation, operations, result_to_mapping
from cryofleet.v1 import common_pb2, runtime_pb2

MEGAVOXELS = 300.0
"""Of a tomogram: 1000 x 1000 x 300."""
PARTICLES = 2000
"""In a tomogram."""
SECONDS: dict[str, tuple[float, str]] = {
    "io.Ingest": (0.87 / 10.2, "megavoxel"),
    "io.Filter": (0.68 / 6.3, "megavoxel"),
    "picking.DifferenceOfGaussians": (4.06 / 6.3, "megavoxel"),
    "picking.Extract": (3.32 / 527, "particle"),
    "picking.MergeSubtomograms": (0.34, "task"),
    "learning.TrainAutoencoder": (283.8, "task"),
    "learning.Cluster": (2.19, "task"),
    "alignment.FamlStart": (0.10, "task"),
    "alignment.FamlExpect": (6.15 / 32, "particle"),
    "alignment.FamlMaximise": (0.27, "task"),
    "alignment.FamlFinish": (0.73, "task"),
    "io.Export": (0.15, "task"),
}
"""Measured, on the two cores of a CPU, and what it grows with."""
GPU_SPEED = 10.0
"""A GPU against two cores, for what can use one; assumed."""
SPREAD = 0.2
"""Of the logarithm of a task's time; assumed."""
TRANSIENT = 0.002
"""Share of the tasks whose first call fails with INTERNAL; assumed."""
BAD = 0.001
"""Share of the tomograms that no picker takes; assumed."""
HOURS_BETWEEN_LOSSES = {False: 200.0, True: 24.0}
"""Of an instance without and with a GPU, which is preempted; assumed."""
START_SECONDS = {False: 150.0, True: 300.0}
"""From the decision to scale up to a ready instance: a node comes, pulls the image, and the process loads; assumed."""
RESTART_SECONDS = 30.0
"""After a loss; assumed."""
HEARTBEAT_SECONDS = 30.0
"""A process sends one every 2 s; fewer are sent here, which the orchestrator takes as well."""


_aio: Any = grpc.aio


@dataclass(frozen=True)
class Scaling:
    """One ScaledObject of deploy/k8s, and its instances' slots."""

    pool: str
    gpu: bool
    kind: str
    """Which tasks it counts: all or gpu."""
    least: int
    most: int
    slots: int
    cooldown_seconds: float


SCALED = (
    Scaling("io", False, "all", 1, 5, 4, 300),
    Scaling("picking", False, "all", 1, 20, 4, 300),
    Scaling("alignment", False, "all", 1, 20, 4, 300),
    Scaling("learning", False, "all", 1, 10, 1, 300),
    Scaling("alignment", True, "gpu", 0, 8, 2, 600),
    Scaling("learning", True, "gpu", 0, 4, 1, 600),
)
POLLING_SECONDS = 15.0


class Clock:
    """The loop's."""

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()


@dataclass
class Counts:
    """What the cluster has seen."""

    begun: Counter[str] = field(default_factory=Counter)
    """Calls by the task's key."""
    done: Counter[str] = field(default_factory=Counter)
    """Answers by the task's key."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each task's answered call took."""
    failed: int = 0
    lost: int = 0
    losses: int = 0
    refused: int = 0
    added: Counter[str] = field(default_factory=Counter)
    slot_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """That instances were there, by pool."""
    busy_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class FakeInstance:
    """An instance of a service that only waits."""

    def __init__(self, cluster: Cluster, scaling: Scaling, number: int) -> None:
        self.cluster = cluster
        self.scaling = scaling
        self.name = f"{scaling.pool}{'-gpu' if scaling.gpu else ''}-{number}"
        self.address = f"sim:{self.name}"
        self.running = 0
        self.draining = False
        self.lost = asyncio.Event()
        self._since = Clock.now()

    @property
    def label(self) -> str:
        return self.scaling.pool + (" on GPUs" if self.scaling.gpu else "")

    def tally(self) -> None:
        """Counts the time since the last change."""
        now = Clock.now()
        counts = self.cluster.counts
        counts.slot_seconds[self.label] += (now - self._since) * self.scaling.slots
        counts.busy_seconds[self.label] += (now - self._since) * self.running
        self._since = now

    def capacity(self) -> runtime_pb2.GetCapacityResponse:
        return runtime_pb2.GetCapacityResponse(
            instance=self.name,
            slots_total=self.scaling.slots,
            slots_free=self.scaling.slots - self.running,
            devices=["cuda", "cpu"] if self.scaling.gpu else ["cpu"],
            draining=self.draining,
        )


class Cluster:
    """The instances by address, and what scales them."""

    def __init__(self, seed: int, losses: float = 1.0, particles: int = PARTICLES) -> None:
        """Instances are lost so many times as often as is assumed."""
        self.random = random.Random(seed)
        self.losses = losses
        self.seed = seed
        self.particles = particles
        self.counts = Counts()
        self.instances: dict[str, FakeInstance] = {}
        self.results: dict[str, dict[str, Any]] = {}
        """What was answered and not yet looked for, by the task's key."""
        self._numbers = iter(range(1_000_000))
        self._starting: Counter[Scaling] = Counter()
        self._wanted: dict[Scaling, list[tuple[float, int]]] = {scaling: [] for scaling in SCALED}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Pools have their least instances."""
        for scaling in SCALED:
            for _ in range(scaling.least):
                self._add(scaling)

    def addresses(self, pool: str) -> list[str]:
        """Those that a name server would tell."""
        return [i.address for i in self.instances.values() if i.scaling.pool == pool and not i.draining]

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _add(self, scaling: Scaling) -> None:
        instance = FakeInstance(self, scaling, next(self._numbers))
        self.instances[instance.address] = instance
        self.counts.added[instance.label] += 1
        self._spawn(self._live(instance))

    async def _live(self, instance: FakeInstance) -> None:
        """Until it is lost; another one then takes its place."""
        hours = self.random.expovariate(self.losses / HOURS_BETWEEN_LOSSES[instance.scaling.gpu])
        await asyncio.sleep(hours * 3600.0)
        if self.instances.get(instance.address) is not instance:
            return
        self.counts.losses += 1
        self._remove(instance)
        instance.lost.set()
        self._starting[instance.scaling] += 1
        await asyncio.sleep(START_SECONDS[True] if instance.scaling.gpu else RESTART_SECONDS)
        self._starting[instance.scaling] -= 1
        self._add(instance.scaling)

    def _remove(self, instance: FakeInstance) -> None:
        instance.tally()
        self.instances.pop(instance.address, None)

    async def _start(self, scaling: Scaling) -> None:
        self._starting[scaling] += 1
        await asyncio.sleep(START_SECONDS[scaling.gpu])
        self._starting[scaling] -= 1
        self._add(scaling)

    async def _drain(self, instance: FakeInstance) -> None:
        instance.draining = True
        while instance.running:
            await asyncio.sleep(1.0)
        if instance.address in self.instances:
            self._remove(instance)

    async def keep_scaling(self, left: Callable[[str], dict[str, int]]) -> None:
        """As KEDA and the horizontal autoscaler do: up at once, down to the most that the cooldown's time has seen."""
        while True:
            for scaling in SCALED:
                kinds = left(scaling.pool)
                waiting = kinds["gpu"] if scaling.kind == "gpu" else sum(kinds.values())
                wanted = min(scaling.most, max(scaling.least, math.ceil(waiting / scaling.slots)))
                now = Clock.now()
                window = [each for each in self._wanted[scaling] if now - each[0] < scaling.cooldown_seconds]
                window.append((now, wanted))
                self._wanted[scaling] = window
                there = [i for i in self.instances.values() if i.scaling is scaling and not i.draining]
                have = len(there) + self._starting[scaling]
                # At most four, or twice as many, each time.
                for _ in range(min(wanted - have, max(4, have))):
                    self._spawn(self._start(scaling))
                surplus = len(there) - max(count for _, count in window)
                for instance in there[::-1][: max(0, surplus)]:
                    self._spawn(self._drain(instance))
            await asyncio.sleep(POLLING_SECONDS)

    def tally(self) -> None:
        """Counts the time of all that are there."""
        for instance in self.instances.values():
            instance.tally()

    # Tasks

    def chance(self, *about: object) -> float:
        """The same number in [0, 1) for the same question, whatever was asked before."""
        digest = hashlib.sha256(repr((self.seed, *about)).encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    def seconds(self, operation: Operation, request: Any, gpu: bool) -> float:
        """How long the task takes there."""
        each, unit = SECONDS[operation.name]
        rows = request.rows.count if operation.name in ("picking.Extract", "alignment.FamlExpect") else 0
        amount = {"megavoxel": MEGAVOXELS, "particle": rows, "task": 1.0}[unit]
        normal = sum(self.chance("time", request.context.task_key, k) for k in range(12)) - 6.0
        speed = GPU_SPEED if gpu and operation.pool == "gpu" else 1.0
        return float(each * amount / speed * math.exp(SPREAD * normal))


class _Error(grpc.aio.AioRpcError):
    def __init__(self, status: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        empty = grpc.aio.Metadata(*metadata)
        super().__init__(status, empty, empty, details, None)


class FakeChannel:
    """To one instance; requests and answers are serialised as gRPC would."""

    def __init__(self, cluster: Cluster, address: str) -> None:
        self._cluster = cluster
        self._address = address

    async def close(self, _grace: float | None = None) -> None:
        """Nothing is open."""

    def _instance(self) -> FakeInstance:
        instance = self._cluster.instances.get(self._address)
        if instance is None:
            raise _Error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
        return instance

    def unary_unary(self, _path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        async def call(request: Any, **_options: Any) -> Any:
            request_serializer(request)
            return response_deserializer(self._instance().capacity().SerializeToString())

        return call

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, **_options: Any) -> Any:
            return _Call(self, path, request_serializer(request), response_deserializer)

        return call


class _Call:
    """A call of an operation."""

    def __init__(self, channel: FakeChannel, path: str, request: bytes, response: Any) -> None:
        self._channel = channel
        self._operation = _by_path()[path]
        self._request: Any = self._operation.request_class.FromString(request)
        self._response = response
        self._ends: float | None = None
        self._instance: FakeInstance | None = None
        self._over = False

    def done(self) -> bool:
        return self._over

    def cancel(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._instance is not None and not self._over:
            self._instance.tally()
            self._instance.running -= 1
        self._over = True

    async def read(self) -> Any:
        if self._over:
            return _aio.EOF
        try:
            return await self._read()
        except BaseException:
            self._end()
            raise

    async def _read(self) -> Any:
        cluster = self._channel._cluster
        key = self._request.context.task_key
        if self._instance is None:
            instance = self._channel._instance()
            if instance.draining or instance.running >= instance.scaling.slots:
                cluster.counts.refused += 1
                reason = "draining" if instance.draining else "busy"
                status = grpc.StatusCode.UNAVAILABLE if instance.draining else grpc.StatusCode.RESOURCE_EXHAUSTED
                why = REASON_DRAINING if instance.draining else REASON_BUSY
                raise _Error(status, reason, ((REASON_KEY, why),))
            instance.tally()
            instance.running += 1
            self._instance = instance
            cluster.counts.begun[key] += 1
            self._took = cluster.seconds(self._operation, self._request, instance.scaling.gpu)
            self._ends = Clock.now() + self._took
            return self._event(progress=common_pb2.Progress(fraction=0.0, phase="working"))
        assert self._ends is not None
        left = self._ends - Clock.now()
        try:
            async with asyncio.timeout(max(0.0, min(left, HEARTBEAT_SECONDS))):
                await self._instance.lost.wait()
        except TimeoutError:
            pass
        if self._instance.lost.is_set():
            cluster.counts.lost += 1
            raise _Error(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if Clock.now() < self._ends - 1e-6:
            return self._event(heartbeat=common_pb2.Heartbeat(seconds_since_progress=1.0))
        if cluster.counts.begun[key] == 1 and cluster.chance("transient", key) < TRANSIENT:
            cluster.counts.failed += 1
            raise _Error(grpc.StatusCode.INTERNAL, "a kernel failed")
        if self._operation.name == "picking.DifferenceOfGaussians" and cluster.chance("bad", key) < BAD:
            raise _Error(grpc.StatusCode.FAILED_PRECONDITION, "the tomogram has no contrast")
        cluster.counts.done[key] += 1
        cluster.counts.seconds[key] = self._took
        result = fake_result(self._operation, self._request, key, cluster.particles)
        cluster.results[key] = result_to_mapping(result)
        identity = hashlib.sha256(key.encode()).hexdigest()
        provenance = common_pb2.Provenance(
            task_key=key, seconds=self._took, manifest_uri=f"s3://site/store/default/{identity}/manifest.json"
        )
        event = self._event(result=result, provenance=provenance)
        self._end()
        return event

    def _event(self, **values: Any) -> Any:
        return self._response(self._operation.response_class(**values).SerializeToString())


_paths: dict[str, Operation] = {}


def _by_path() -> dict[str, Operation]:
    if not _paths:
        _paths.update({operation.full_name: find_operation(name) for name, operation in operations().items()})
    return _paths


_ROWS = re.compile(r"-rows-(\d+)")


def rows_of(uri: str) -> int:
    """Of a table that `fake_result` has named."""
    found = _ROWS.search(uri)
    return int(found.group(1)) if found else 0


def fake_result(operation: Operation, request: Any, key: str, particles: int) -> Any:
    """URIs as long as real ones; of particles they say how many rows there are."""
    rows = particles
    if hasattr(request, "rows") and request.rows.count:
        rows = request.rows.count
    elif hasattr(request, "subtomograms_uris"):
        rows = sum(rows_of(uri) for uri in request.subtomograms_uris)
    elif hasattr(request, "subtomograms_uri") and request.subtomograms_uri:
        rows = rows_of(request.subtomograms_uri)
    identity = hashlib.sha256(key.encode()).hexdigest()
    values: dict[str, Any] = {}
    for output in operation.outputs:
        if output.name == "count":
            values["count"] = rows
        elif output.is_artifact:
            uri = f"s3://site/store/default/{identity}/{output.name}-rows-{rows}"
            values[output.name] = [uri] * 3 if output.repeated else uri
    return operation.result_class(**values)
