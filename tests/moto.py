"""A server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minio import Minio
from moto.server import ThreadedMotoServer

from cryofleet.settings import S3Settings


@contextmanager
def s3_server(bucket: str) -> Iterator[S3Settings]:
    """Its settings; it has an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = S3Settings(endpoint=f"{host}:{port}", access_key="key", secret_key="secret", secure=False)
        client_of(settings).make_bucket(bucket)
        yield settings
    finally:
        server.stop()


def client_of(settings: S3Settings) -> Any:
    """A client of its own, beside the store's."""
    return Minio(
        settings.endpoint,
        access_key=settings.access_key,
        secret_key=settings.secret_key,
        secure=False,
        region=settings.region,
    )
