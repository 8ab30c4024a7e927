"""The io service: turns requests into calls of the methods, and what they give into artifacts; files up and down."""

# Importing them registers their operations.
from services.io.service import (  # noqa: F401
    contrast,
    cut,
    estimates,
    export,
    files,
    filters,
    geometry,
    ingest,
    look,
    meshes,
    report,
)
from services.io.service.registry import service

__all__ = ["service"]
