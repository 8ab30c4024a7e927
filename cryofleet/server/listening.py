"""Opening the address that a server listens on: a private Unix socket, or TCP with mutual TLS."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc

from cryofleet.channels import is_unix
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.server.tls import server_credentials
from cryofleet.settings import TlsFiles

_LONGEST_SOCKET_PATH = 107  # sun_path of sockaddr_un, less its final NUL


def listen(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> str:
    """Makes `server` listen on `address`; the address that was bound, its port filled in.

    Raises FailedPrecondition where it would be open to others: a socket in a folder that others may
    enter, TCP without mutual TLS.
    """
    if is_unix(address):
        _prepare_socket(Path(address.removeprefix("unix:").removeprefix("//")))
        _bind(server.add_insecure_port, address)
        return address
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise InvalidArgument(f"address is {address!r}; it must be unix:/path or host:port (CRYOFLEET_ADDRESS)")
    if tls is None:
        raise FailedPrecondition(
            f"refusing to listen on {address} without authentication: TCP needs mutual TLS; set "
            "CRYOFLEET_TLS_CERTIFICATE, CRYOFLEET_TLS_KEY and CRYOFLEET_TLS_AUTHORITY, or listen on unix:/path"
        )
    credentials = server_credentials(tls)
    bound = _bind(lambda where: server.add_secure_port(where, credentials), address)
    return f"{host}:{bound}"


def _bind(add_port: object, address: str) -> int:
    try:
        port: int = add_port(address)  # type: ignore[operator]
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise FailedPrecondition(f"cannot listen on {address}")
    return port


def _prepare_socket(path: Path) -> None:
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise FailedPrecondition(f"{path} is too long for a socket; at most {_LONGEST_SOCKET_PATH} bytes are possible")
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise FailedPrecondition(
            f"refusing to listen in {folder}: it must be a folder of this user that nobody else may enter (mode 0700)"
        )
    if not path.exists():
        return
    if not path.is_socket():
        raise FailedPrecondition(f"cannot listen on {path}: it is a file")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # left behind by a server that was killed
            return
    raise FailedPrecondition(f"another server is listening on {path}")
