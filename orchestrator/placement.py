"""Where tasks run: the instances of each pool, their slots, and who waits for one.

gRPC's own balancing sees neither new instances nor slots, so each instance has a channel of its own; `GetCapacity`
tells its slots, and a task goes to the instance with the largest share of them free. An instance that is set aside gets
none; a pool that is paused gives none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import grpc

from cryofleet import tracing
from cryofleet.channels import open_channel, version_of
from cryofleet.errors import Failure, Unavailable
from cryofleet.settings import Settings
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc
from orchestrator.fair_share import FairShare
from orchestrator.set_aside import SetAside

logger = logging.getLogger(__name__)

RESOLVE_SECONDS = 5.0
"""How often the names of pools are resolved anew."""
POLL_SECONDS = 1.0
"""How often instances are asked for their capacity."""
_POLL_TIMEOUT_SECONDS = 3.0
_AWAY_SECONDS = 0.1
_BUSY_SECONDS = (0.05, 2.0)
_LONGEST_CALL_SECONDS = 86400.0


@dataclass
class Instance:
    """One instance of a service, as far as this orchestrator knows it."""

    address: str
    channel: grpc.aio.Channel
    name: str = ""
    ready: bool = False
    slots_total: int = 0
    running: int = 0
    """Tasks that this orchestrator has there."""
    most_running: int = 0
    """The most of them since the instance was last asked for its capacity."""
    others: int = 0
    """Slots that others have taken, as last reported."""
    devices: tuple[str, ...] = ()
    memory_total_bytes: int = 0
    memory_free_bytes: int = 0
    operations: tuple[runtime_pb2.RunningOperation, ...] = ()
    """What it works on for whomever, as last reported."""
    version: str = ""
    error: str = ""
    busy_until: float = 0.0
    refusals: int = 0
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)
    server_name: str | None = None
    """The name in its certificate, where that is not in its address."""

    @property
    def free(self) -> int:
        return self.slots_total - self.running - self.others if self.ready else 0

    def take(self) -> None:
        """One more task."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)

    def set_away(self, error: str) -> None:
        """The instance did not answer, or is stopping; its next good answer makes it ready again."""
        self.ready = False
        self.error = error


@dataclass(eq=False)
class _Waiter:
    instance: asyncio.Future[Instance]
    avoid: frozenset[str]
    gpu: bool
    user: str
    since: float


class Pool:
    """The instances of one service."""

    def __init__(self, name: str, addresses: str, settings: Settings) -> None:
        """`addresses` are unix:/path or host:port, separated by commas, or dns:///name:port."""
        self.name = name
        self.instances: dict[str, Instance] = {}
        self.running = 0
        self.set_aside = SetAside(name, self._others_work)
        self.paused = False
        """Set by `set_paused`."""
        self._addresses = [address.strip() for address in addresses.split(",") if address.strip()]
        self._settings = settings
        self._waiters: FairShare[_Waiter] = FairShare()
        self._last_ready = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._resolution_error = ""
        self._tls_version = version_of(settings.tls) if settings.tls is not None else None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @property
    def slots(self) -> int:
        """Slots of all ready instances."""
        return sum(instance.slots_total for instance in self.instances.values() if instance.ready)

    def room(self) -> tuple[bool, bool, int]:
        """How much of it there is, for comparing pools."""
        return self.slots > 0, not self.paused, self.slots - self.running - self.waiting

    async def start(self) -> None:
        """Finds the instances and keeps watching them."""
        await self._resolve()
        self._tasks = [asyncio.create_task(self._keep_resolving()), asyncio.create_task(self._keep_patience())]

    async def close(self) -> None:
        """Stops watching and closes the channels."""
        watchers = (i.watcher for i in self.instances.values() if i.watcher is not None)
        tasks = [*self._tasks, *watchers, *self._closing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for waiter in self._waiters:
            waiter.instance.cancel()
        for instance in self.instances.values():
            await instance.channel.close(None)

    @contextlib.asynccontextmanager
    async def slot(
        self, avoid: frozenset[str] = frozenset(), gpu: bool = False, user: str = ""
    ) -> AsyncIterator[Instance]:
        """A slot of the least loaded instance; waits for one, in turn with other users.

        Instances whose address is in `avoid` are taken only where no other is ready. `gpu` prefers instances with one.

        Raises Unavailable where the pool has had no ready instance for the settings' time.
        """
        instance = await self._acquire(avoid, gpu, user)
        self.running += 1
        try:
            yield instance
        finally:
            self.running -= 1
            self._give_back(instance, user)

    def set_paused(self, paused: bool) -> None:
        """While paused, the pool gives no slots; those who wait for one wait on."""
        self.paused = paused
        self._last_ready = time.monotonic()
        self._serve()

    async def _acquire(self, avoid: frozenset[str], gpu: bool, user: str) -> Instance:
        instance = None if self._waiters else self._choose(avoid, gpu)
        if instance is not None:
            self._take(instance, user)
            return instance
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoid, gpu, user, time.monotonic())
        self._waiters.add(waiter)
        self._serve()
        try:
            with tracing.span("wait for a slot", pool=self.name):
                return await waiter.instance
        except asyncio.CancelledError:
            self._waiters.remove(waiter)
            if waiter.instance.done() and not waiter.instance.cancelled() and waiter.instance.exception() is None:
                self._give_back(waiter.instance.result(), user)
            raise

    def _take(self, instance: Instance, user: str) -> None:
        instance.take()
        self._waiters.take(user)

    def _give_back(self, instance: Instance, user: str) -> None:
        instance.running -= 1
        self._waiters.give_back(user)
        self._serve()

    def _choose(self, avoid: frozenset[str], gpu: bool) -> Instance | None:
        if self.paused:
            return None
        now = time.monotonic()
        usable = self._usable()
        fresh = [instance for instance in usable if instance.address not in avoid] or usable
        free = [instance for instance in fresh if instance.free > 0 and instance.busy_until <= now]
        if not free:
            return None
        random.shuffle(free)

        def fitness(instance: Instance) -> tuple[bool, bool, float]:
            # A trial first, so that its end is not long in coming.
            on_trial = self.set_aside.on_trial(instance.address)
            return gpu and "cuda" in instance.devices, on_trial, instance.free / max(1, instance.slots_total)

        return max(free, key=fitness)

    def _usable(self) -> list[Instance]:
        """Those that are ready and not set aside; those on trial, and where there is no other one all that are ready,
        while they have no task.
        """
        ready = [instance for instance in self.instances.values() if instance.ready]
        working = [instance for instance in ready if self.set_aside.works(instance.address)]
        idle = [instance for instance in ready if instance.running == 0]
        if not working:
            return idle
        return working + [instance for instance in idle if self.set_aside.on_trial(instance.address)]

    def _others_work(self, address: str) -> bool:
        return any(
            i.ready and i.address != address and self.set_aside.works(i.address) for i in self.instances.values()
        )

    def has_other(self, avoid: set[str]) -> bool:
        """Whether an instance takes work that is not among these addresses."""
        return any(instance.address not in avoid for instance in self._usable())

    def _serve(self) -> None:
        """Gives free slots to those who wait, in turn."""

        def give(waiter: _Waiter) -> bool | None:
            if waiter.instance.done():
                # Cancelled in this moment; it leaves by itself.
                return False
            instance = self._choose(waiter.avoid, waiter.gpu)
            if instance is None:
                # Where one who takes any instance gets none, nobody can be served.
                return False if waiter.avoid else None
            self._take(instance, waiter.user)
            waiter.instance.set_result(instance)
            return True

        self._waiters.serve(give)

    def refused(self, instance: Instance) -> None:
        """The instance was full after all: others use it too. It is left alone for a moment."""
        shortest, longest = _BUSY_SECONDS
        pause = min(longest, shortest * 2**instance.refusals) * random.uniform(0.5, 1.5)
        instance.refusals += 1
        instance.busy_until = time.monotonic() + pause
        asyncio.get_running_loop().call_later(pause, self._serve)

    # Instances come and go

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_SECONDS)
            await self._resolve()
            self._renew_channels()

    def _renew_channels(self) -> None:
        """Opens the channels anew where the certificate was renewed: each shows the one that it was opened with."""
        tls = self._settings.tls
        try:
            if tls is None or (version := version_of(tls)) == self._tls_version:
                return
            channels = {i.address: open_channel(i.address, tls, i.server_name) for i in self.instances.values()}
        except Failure as failure:
            logger.error("pool %s goes on with the certificate that was read before: %s", self.name, failure)
            return
        self._tls_version = version
        for address, channel in channels.items():
            instance = self.instances[address]
            old, instance.channel = instance.channel, channel
            if instance.watcher is not None:
                instance.watcher.cancel()
            instance.watcher = asyncio.create_task(self._watch(instance))
            # What was begun there ends there.
            closing = asyncio.create_task(old.close(_LONGEST_CALL_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _resolve(self) -> None:
        found: dict[str, str | None] = {}
        complete = True
        for address in self._addresses:
            if not address.startswith("dns:///"):
                found[address] = None
                continue
            host, _, port = address.removeprefix("dns:///").rpartition(":")
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                # A name without addresses is a pool at zero, and a name server that is away changes nothing either:
                # whether the instances known so far still live is seen from their answers.
                self._resolution_error = f"{host}: {error.strerror}"
                complete = False
                continue
            self._resolution_error = ""
            for family, *_, sockaddr in answers:
                ip = str(sockaddr[0])
                found[f"[{ip}]:{port}" if family is socket.AF_INET6 else f"{ip}:{port}"] = host
        for address, server_name in found.items():
            if address not in self.instances:
                try:
                    channel = open_channel(address, self._settings.tls, server_name)
                except Failure as failure:
                    if str(failure) != self._resolution_error:
                        logger.error("pool %s: %s", self.name, failure)
                    self._resolution_error = str(failure)
                    continue
                instance = Instance(address, channel, server_name=server_name)
                self.instances[address] = instance
                instance.watcher = asyncio.create_task(self._watch(instance))
        for address, instance in list(self.instances.items()):
            gone = address not in found and (complete or not instance.ready)
            if gone and instance.running == 0:
                del self.instances[address]
                self.set_aside.forget(address)
                if instance.watcher is not None:
                    instance.watcher.cancel()
                await instance.channel.close(None)

    async def _watch(self, instance: Instance) -> None:
        stub = runtime_pb2_grpc.RuntimeServiceStub(instance.channel)
        while True:
            instance.most_running = instance.running
            try:
                answer = await stub.GetCapacity(
                    runtime_pb2.GetCapacityRequest(), timeout=_POLL_TIMEOUT_SECONDS, wait_for_ready=not instance.ready
                )
            except grpc.aio.AioRpcError as error:
                instance.set_away(f"{error.code().name}: {error.details()}")
                await asyncio.sleep(_AWAY_SECONDS)
                continue
            except grpc.aio.UsageError:
                return
            self._heard(instance, answer)
            await asyncio.sleep(POLL_SECONDS)

    def _heard(self, instance: Instance, answer: runtime_pb2.GetCapacityResponse) -> None:
        instance.name = answer.instance
        instance.version = answer.version
        instance.devices = tuple(answer.devices)
        instance.memory_total_bytes, instance.memory_free_bytes = answer.memory_total_bytes, answer.memory_free_bytes
        instance.operations = tuple(answer.running)
        instance.slots_total = answer.slots_total
        # While the answer was under way tasks of our own came and went; to count the most of them errs on the side of
        # sending one too many, which the instance then refuses.
        instance.others = max(0, answer.slots_total - answer.slots_free - instance.most_running)
        instance.ready = not answer.draining
        instance.error = "is stopping" if answer.draining else ""
        instance.refusals = 0
        if instance.ready:
            self._last_ready = time.monotonic()
            self._serve()

    async def _keep_patience(self) -> None:
        """Tells those who have waited too long for any instance at all."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.pool_wait_seconds / 4 + 0.01))
            if self.paused or any(instance.ready for instance in self.instances.values()):
                self._last_ready = time.monotonic()
                continue
            now = time.monotonic()
            for waiter in list(self._waiters):
                waited = now - max(waiter.since, self._last_ready)
                if waited >= self._settings.pool_wait_seconds and not waiter.instance.done():
                    waiter.instance.set_exception(Unavailable(self._why_nothing(waited)))
                    self._waiters.remove(waiter)

    def _why_nothing(self, waited: float) -> str:
        told = "; ".join(f"{i.address}: {i.error}" for i in self.instances.values() if i.error)
        reason = told or self._resolution_error or "it has no instances"
        return f"pool {self.name} ({', '.join(self._addresses)}) has had no ready instance for {waited:.0f} s: {reason}"


class Placement:
    """All pools by their service's name."""

    def __init__(self, settings: Settings) -> None:
        self.pools: Mapping[str, Pool] = {
            name: Pool(name, addresses, settings) for name, addresses in settings.pools.items()
        }

    async def start(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self.pools.values()))

    async def close(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))

    def pool(self, service: str) -> Pool:
        """The pool that runs a service's operations. `runtime`, which every instance answers, runs where there is room.

        Raises Unavailable where no such pool is configured.
        """
        if service == "runtime" and self.pools:
            return max(self.pools.values(), key=Pool.room)
        if service not in self.pools:
            raise Unavailable(f"there is no pool {service!r}: set CRYOFLEET_POOL_{service.upper()}")
        return self.pools[service]
