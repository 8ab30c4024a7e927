"""Tables of the platform, as large as a page may hold."""

from __future__ import annotations

import json
from typing import Any

from cryofleet.client import Client
from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles

MOST_BYTES = 64 << 20


def read_particles(client: Client, uri: str) -> Particles:
    """A table by its URI. Raises InvalidArgument where it has more than 64 MiB, before more of it is fetched."""
    return Particles.from_parquet(_read(client, uri), uri)


def read_json(client: Client, uri: str) -> dict[str, Any]:
    """A table of figures by its URI. Raises InvalidArgument where it has more than 64 MiB or is none."""
    try:
        table = json.loads(_read(client, uri))
    except ValueError as error:
        raise InvalidArgument(f"{uri} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise InvalidArgument(f"{uri} is no table: it must be a JSON object")
    return table


def _read(client: Client, uri: str) -> bytes:
    data = bytearray()
    for chunk in client.download_chunks(uri):
        data += chunk
        if len(data) > MOST_BYTES:
            raise InvalidArgument(
                f"{uri} has more than {MOST_BYTES >> 20} MiB: the page shows no tables as large as that"
            )
    return bytes(data)
