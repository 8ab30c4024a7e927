"""How large volumes and files may be."""

from __future__ import annotations

from cryofleet.server.failures import TooLarge

_HEADER_BYTES = 2**20
"""What a file may have besides its voxels."""


def check_volume_bytes(what: str, size_bytes: int, most_bytes: int) -> None:
    """Raises TooLarge for a volume of more bytes, as float32, than are taken; 0 is no limit."""
    if most_bytes and size_bytes > most_bytes:
        raise TooLarge(f"{what} has {size_bytes} bytes of voxels; {most_bytes} are taken (CRYOFLEET_MAX_VOLUME_BYTES)")


def check_file_bytes(what: str, size_bytes: int, most_bytes: int) -> None:
    """The same for a file that may hold a volume, with its header."""
    if most_bytes and size_bytes > most_bytes + _HEADER_BYTES:
        raise TooLarge(f"{what} has {size_bytes} bytes; volumes of {most_bytes} are taken (CRYOFLEET_MAX_VOLUME_BYTES)")
