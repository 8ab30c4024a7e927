"""Particle tables of the platform, as large as a page may hold."""

from __future__ import annotations

from cryofleet.client import Client
from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles

MOST_BYTES = 64 << 20


def read_particles(client: Client, uri: str) -> Particles:
    """A table by its URI. Raises InvalidArgument where it has more than 64 MiB, before more of it is fetched."""
    data = bytearray()
    for chunk in client.download_chunks(uri):
        data += chunk
        if len(data) > MOST_BYTES:
            raise InvalidArgument(
                f"{uri} has more than {MOST_BYTES >> 20} MiB: the page shows no tables as large as that"
            )
    return Particles.from_parquet(bytes(data), uri)
