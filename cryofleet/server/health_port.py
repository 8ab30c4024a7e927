"""The health service alone on a port of its own.

A kubelet's gRPC probes know neither TLS nor certificates. They learn from here whether the instance is serving; every
other method is on the address with mutual TLS, and on this port there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from cryofleet.errors import FailedPrecondition

_STOP_SECONDS = 0.5


@contextlib.asynccontextmanager
async def health_port(servicer: Any, port: int) -> AsyncIterator[None]:
    """Serves the health servicer on `port` of all interfaces while the block lasts.

    Raises FailedPrecondition where the port can't be opened.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4096)])
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(f"[::]:{port}")
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot open the health port {port}: {error}") from error
    await server.start()
    try:
        yield
    finally:
        await server.stop(_STOP_SECONDS)
