"""Starting, draining and stopping a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cryofleet import tracing
from cryofleet.access.audit import AuditLog
from cryofleet.access.authentication import Authenticator
from cryofleet.channels import MESSAGE_LIMIT_BYTES, TRANSPORT_LIMIT_BYTES, is_unix
from cryofleet.errors import Failure
from cryofleet.logs import configure_logs
from cryofleet.server import runtime_service
from cryofleet.server.access import AccessInterceptor
from cryofleet.server.calls import BorderInterceptor, Calls
from cryofleet.server.execution import STOP_SECONDS, Executions
from cryofleet.server.failures import Draining
from cryofleet.server.health_port import health_port
from cryofleet.server.instance import Instance
from cryofleet.server.listening import listen
from cryofleet.server.service import Service
from cryofleet.server.tracing import TracingInterceptor
from cryofleet.server.validation import ValidationInterceptor
from cryofleet.settings import AUDIT_LOG, AUDIT_OFF, Settings
from cryofleet.storage import Store

logger = logging.getLogger(__name__)

EXIT_NOT_STARTED = 1
"""Exit code of a server that could not start."""
EXIT_NO_MEMORY = 71
"""Exit code of a process that had no memory left for a thread."""

MAX_CONNECTION_AGE_SECONDS = 30.0
"""After this a connection takes no new calls, so that clients spread over new instances; calls on it go on."""

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_WITHOUT_LIMIT = 2**31 - 1  # what gRPC takes for infinity


def _server_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
        ("grpc.max_connection_age_ms", int(MAX_CONNECTION_AGE_SECONDS * 1000)),
        ("grpc.max_connection_age_grace_ms", _WITHOUT_LIMIT),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients ping every 30 s (cryofleet.channels), in silent streams too.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]


def _reflection_handlers(names: list[str]) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
    """Reflection under its two names: current tools ask for v1 first, whose messages are the same bytes as v1alpha's.

    v1 is not in the list of services that it answers with, for its own description is not there to be asked for.
    """
    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # the stubs know no asyncio
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
        for service in (_REFLECTION_V1, reflection.SERVICE_NAME)
    )


class Server:
    """A service, with the runtime, health and reflection services beside it, on one address."""

    def __init__(self, service: Service, settings: Settings, store: Store | None = None) -> None:
        """`store` is the one of the settings where left out."""
        services = [service] if service is runtime_service.service else [service, runtime_service.service]
        self.instance = Instance(services, settings, store or Store.open(settings))
        self.settings = settings
        self.address = settings.address
        self._service = service
        self._lifespan = contextlib.AsyncExitStack()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs know no asyncio
        self._stopped = False

    async def start(self) -> None:
        """Returns once calls are answered. Raises a Failure where the address cannot or may not be opened."""
        instance = self.instance
        logging.getLogger().addHandler(instance.recent_log)
        self._lifespan.callback(logging.getLogger().removeHandler, instance.recent_log)
        try:
            self._executions = Executions(instance, self._on_hung)
            self._calls = Calls(instance, self._executions)
            private = is_unix(self.settings.address)
            audit = AuditLog(
                self.settings.audit or (AUDIT_OFF if private else AUDIT_LOG), instance.service_name, instance.name
            )
            self._server = grpc.aio.server(
                interceptors=[
                    *([TracingInterceptor(instance)] if tracing.is_on() else []),
                    BorderInterceptor(instance, audit),
                    AccessInterceptor(Authenticator(self.settings, private), instance.store),
                    ValidationInterceptor(),
                ],
                options=_server_options(),
            )
            names = [service.descriptor.full_name for service in instance.services]
            self._server.add_generic_rpc_handlers(tuple(self._calls.handler(service) for service in instance.services))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            self._server.add_generic_rpc_handlers(
                _reflection_handlers([*names, health.SERVICE_NAME, reflection.SERVICE_NAME])
            )
            self.address = listen(self._server, self.settings.address, self.settings.tls)
            instance.devices()  # loads torch, where operations use it, before the first call instead of in it
            if self._service.lifespan is not None:
                await self._lifespan.enter_async_context(self._service.lifespan(instance))
            if self.settings.metrics_port:
                self._lifespan.callback(instance.metrics.serve(self.settings.metrics_host, self.settings.metrics_port))
            if self.settings.health_port:
                await self._lifespan.enter_async_context(health_port(self._health, self.settings.health_port))
            await self._server.start()
        except BaseException:
            await self._lifespan.aclose()
            instance.close()
            raise
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving", extra={"address": self.address, "slots": instance.admission.slots_total})

    def _on_hung(self) -> None:
        self._leaving = asyncio.ensure_future(self._health.enter_graceful_shutdown())

    async def drain(self) -> None:
        """Takes no new calls, lets running ones go on for the settings' `drain_seconds`, then tells them to stop."""
        self.instance.draining = True
        await self._health.enter_graceful_shutdown()
        logger.info("draining", extra={"calls": self._calls.count})
        await self._idle_within(self.settings.drain_seconds)
        if self._busy():
            logger.warning("stopping calls that outlast the time for draining", extra={"calls": self._calls.count})
            self._executions.stop_all(Draining(f"instance {self.instance.name} is stopping"))
            # A worker that does not stop ends the process meanwhile.
            await self._idle_within(STOP_SECONDS + 1.0)

    def _busy(self) -> bool:
        return bool(self._calls.count or self._executions.count)

    async def _idle_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._busy() and loop.time() < end:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Ends all calls and closes the address; what still computes is told to stop."""
        if self._stopped:
            return
        self._stopped = True
        self.instance.draining = True
        self._executions.stop_all(Draining(f"instance {self.instance.name} is stopping"))
        await self._server.stop(0.5)
        await self._idle_within(STOP_SECONDS + 1.0)
        await self._lifespan.aclose()
        self._executions.close()
        self.instance.close()
        if is_unix(self.address):
            Path(self.address.removeprefix("unix:").removeprefix("//")).unlink(missing_ok=True)
        logger.info("stopped")


async def _run(service: Service, settings: Settings) -> None:
    server = Server(service, settings)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await server.start()
    await told.wait()
    await server.drain()
    await server.stop()


def _end_where_a_thread_died(unraised: sys.UnraisableHookArgs) -> None:
    """Ends the process where a new thread found no memory: who started it would wait for it for ever, the loop too."""
    sys.__unraisablehook__(unraised)
    if issubclass(unraised.exc_type, MemoryError) and "thread" in (unraised.err_msg or ""):
        os._exit(EXIT_NO_MEMORY)


def main(service: Service, settings: Settings | None = None) -> None:
    """Runs an instance of `service` until SIGTERM; its settings are the environment's where left out.

    Exit codes: 0 after a drain, 1 where it could not start, 70 where a worker did not stop, 71 where there was no
    memory for a thread.
    """
    try:
        settings = settings or Settings.from_environment()
        if not settings.address:
            settings = replace(settings, address=f"unix:{settings.run_folder}/{service.name}.sock")
        configure_logs(service.name, settings.instance, settings.log_level)
        tracing.start(service.name, settings.instance)
        # For libraries that are loaded later; those that are there already got it from whoever started us.
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
        sys.unraisablehook = _end_where_a_thread_died
        asyncio.run(_run(service, settings))
    except Failure as failure:
        logger.critical("not started: %s", failure.message)
        sys.exit(EXIT_NOT_STARTED)
    finally:
        tracing.stop()
