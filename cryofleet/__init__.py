"""Cryofleet: from cryo-electron tomograms to identified, averaged structures."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryofleet.client import Client as Client

try:
    __version__ = version("cryofleet")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"


def __getattr__(name: str) -> object:
    # The services import this package too, and need not load the client.
    if name == "Client":
        from cryofleet.client import Client

        return Client
    raise AttributeError(f"module 'cryofleet' has no attribute {name!r}")
