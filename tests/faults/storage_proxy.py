"""An S3 server, and a proxy before it that refuses connections, is slow, or says that the disk is full."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minio import Minio
from moto.server import ThreadedMotoServer

BUCKET = "tomograms"
_FULL = b"""<?xml version="1.0"?>
<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive threshold</Message>\
</Error>"""
_SLOW_SECONDS = 0.03


class StorageProxy:
    """TCP, and as much of HTTP as it takes to refuse what is written."""

    def __init__(self, host: str, port: int) -> None:
        self._behind = (host, port)
        self._mode = "open"
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self._listen()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def become(self, mode: str) -> None:
        """`open`, `refused`, `slow` or `full`; connections that are there break off."""
        self._mode = mode
        if mode == "refused" and self._listener is not None:
            # A thread that waits in accept would keep the listener open.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        elif mode != "refused" and self._listener is None:
            self._listen()
        with self._lock:
            connections, self._connections = self._connections, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.become("refused")

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._behind)
            except OSError:
                return
            with self._lock:
                self._connections |= {client, server}
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, requests: bool) -> None:
        with source, target, contextlib.suppress(OSError):
            while piece := source.recv(2**16):
                if self._mode == "slow":
                    time.sleep(_SLOW_SECONDS)
                if requests and self._mode == "full" and piece.startswith((b"PUT ", b"POST ")):
                    self._refuse(source, piece)
                    break
                target.sendall(piece)
            for side in (source, target):
                side.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._connections -= {source, target}

    @staticmethod
    def _refuse(client: socket.socket, request: bytes) -> None:
        while b"\r\n\r\n" not in request:
            request += client.recv(2**16)
        header, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", header)
        missing = int(length[1]) - len(body) if length else 0
        while missing > 0:
            missing -= len(client.recv(2**16))
        answer = f"HTTP/1.1 507 Insufficient Storage\r\nContent-Type: application/xml\r\nContent-Length: {len(_FULL)}"
        client.sendall(answer.encode() + b"\r\nConnection: close\r\n\r\n" + _FULL)


@contextmanager
def s3_behind_proxy() -> Iterator[tuple[StorageProxy, dict[str, str], Minio]]:
    """The proxy, the settings of a platform that uses it, and a client that goes round it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    direct = Minio(f"{host}:{port}", "key", "secret", secure=False, region="us-east-1")
    direct.make_bucket(BUCKET)
    proxy = StorageProxy(host, port)
    settings = {
        "STORE": f"s3://{BUCKET}/cryofleet",
        "S3_ENDPOINT": proxy.endpoint,
        "S3_ACCESS_KEY": "key",
        "S3_SECRET_KEY": "secret",
        "S3_SECURE": "false",
    }
    try:
        yield proxy, settings, direct
    finally:
        proxy.close()
        server.stop()
