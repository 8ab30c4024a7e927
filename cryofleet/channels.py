"""Opening channels to instances: Unix sockets, or TCP with mutual TLS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from cryofleet import tracing
from cryofleet.errors import FailedPrecondition, Failure, failure_from_status
from cryofleet.settings import TlsFiles

if TYPE_CHECKING:
    from cryofleet.access.client_token import TokenSource

MESSAGE_LIMIT_BYTES = 16 * 2**20
"""Largest message either side takes."""
TRANSPORT_LIMIT_BYTES = 2 * MESSAGE_LIMIT_BYTES
"""What gRPC itself refuses, without a word to the server's code; what is smaller than that is refused by name."""

REASON_KEY = "cryofleet-reason"
"""Trailing metadata that says why a call was refused or failed: one of the words below."""
REASON_BUSY = "busy"
"""RESOURCE_EXHAUSTED since all slots or the memory are taken at present: the call was not tried."""
REASON_NEVER_FITS = "never-fits"
"""FAILED_PRECONDITION since the call needs more than the whole instance has."""
REASON_MEMORY = "memory"
"""RESOURCE_EXHAUSTED since the operation ran out of memory."""
REASON_TOO_LARGE = "too-large"
"""RESOURCE_EXHAUSTED since something is larger than the settings allow: no instance and no time will do."""
REASON_DRAINING = "draining"
"""UNAVAILABLE since the instance is stopping; another one will do."""

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    # A peer that vanished without closing its connection is noticed within 40 s, even in a silent stream.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Instances restart within seconds; the default back-off of up to two minutes would outlast them.
    ("grpc.initial_reconnect_backoff_ms", 200),
)
# A socket that nobody listens on refuses at once and disturbs nobody, so it may be tried often.
_LONGEST_BACKOFF_MS = {"unix": 500, "tcp": 5_000}


def is_unix(address: str) -> bool:
    """Whether the address is a Unix socket's: unix:/path."""
    return address.startswith("unix:")


class _TokenPlugin(grpc.AuthMetadataPlugin):
    """Adds the token to a call. gRPC asks for it once the server's certificate has proved good, and never in plain."""

    def __init__(self, token: TokenSource) -> None:
        self._token = token

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            callback((("authorization", f"Bearer {self._token()}"),), None)
        except Failure as failure:
            callback((), failure)


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _CarryTrace(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs alone
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Sends the current span's traceparent along with every call; nothing where there is none."""

    def _carry(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        carried = tracing.metadata()
        if carried:
            details = _Details(
                details.method,
                details.timeout,
                (*(details.metadata or ()), *carried),
                details.credentials,
                details.wait_for_ready,
                details.compression,
            )
        return continuation(details, request)

    intercept_unary_unary: Any = _carry
    intercept_unary_stream: Any = _carry
    intercept_stream_unary: Any = _carry
    intercept_stream_stream: Any = _carry


def read_file(path: Path) -> bytes:
    """A file of the settings. Raises FailedPrecondition where it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{path}: {error.strerror}") from None


def version_of(tls: TlsFiles) -> tuple[tuple[int, int], ...]:
    """Differs after any of the files was renewed. Raises FailedPrecondition where one can't be read."""
    try:
        found = [path.stat() for path in (tls.key, tls.certificate, tls.authority)]
    except OSError as error:
        raise FailedPrecondition(f"{error.filename}: {error.strerror}") from None
    return tuple((status.st_ino, status.st_mtime_ns) for status in found)


def _credentials(tls: TlsFiles, token: TokenSource | None) -> grpc.ChannelCredentials:
    credentials = grpc.ssl_channel_credentials(
        root_certificates=read_file(tls.authority),
        private_key=read_file(tls.key),
        certificate_chain=read_file(tls.certificate),
    )
    if token is None:
        return credentials
    return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_TokenPlugin(token)))


def _target(
    address: str, tls: TlsFiles | None, server_name: str | None, token: TokenSource | None
) -> tuple[str, list[tuple[str, str | int]], grpc.ChannelCredentials | None]:
    options = list(_OPTIONS)
    if is_unix(address):
        # Otherwise the socket's path would be the HTTP/2 authority, which some peers refuse.
        options.append(("grpc.default_authority", "localhost"))
        options.append(("grpc.max_reconnect_backoff_ms", _LONGEST_BACKOFF_MS["unix"]))
        return address, options, None
    if tls is None:
        raise FailedPrecondition(
            f"{address} is reached over TCP, which needs mutual TLS: set CRYOFLEET_TLS_CERTIFICATE, CRYOFLEET_TLS_KEY "
            "and CRYOFLEET_TLS_AUTHORITY, or use a Unix socket (unix:/path)"
        )
    options.append(("grpc.max_reconnect_backoff_ms", _LONGEST_BACKOFF_MS["tcp"]))
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return address, options, _credentials(tls, token)


def open_channel(
    address: str, tls: TlsFiles | None = None, server_name: str | None = None, token: TokenSource | None = None
) -> grpc.aio.Channel:
    """A channel for asyncio to `address`: unix:/path, host:port or dns:///name:port.

    `server_name` is the name that the server's certificate must bear where it isn't the one in the
    address: an instance that is reached by its IP bears its service's name. `token` gives a client's bearer token
    (`cryofleet.access.client_token`); over a Unix socket none is sent.

    Raises FailedPrecondition where a TCP address is given without TLS files.
    """
    target, options, credentials = _target(address, tls, server_name, token)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def open_blocking_channel(
    address: str, tls: TlsFiles | None = None, server_name: str | None = None, token: TokenSource | None = None
) -> grpc.Channel:
    """The same for code without an event loop."""
    target, options, credentials = _target(address, tls, server_name, token)
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    return grpc.intercept_channel(channel, _CarryTrace())


def failure_from_rpc(error: grpc.RpcError) -> Failure:
    """The failure that the other side raised."""
    code = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else None
    return failure_from_status(code.name if code else "INTERNAL", details or str(error))


def reason_of(error: grpc.RpcError) -> str:
    """The word under `cryofleet-reason` in the call's trailing metadata; empty where there is none."""
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return next((str(value) for key, value in metadata or () if key == REASON_KEY), "")
