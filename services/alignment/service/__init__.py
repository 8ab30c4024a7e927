"""The alignment service: turns requests into calls of the methods, and what they give into artifacts."""

# Importing them registers their operations.
from services.alignment.service import align, average, class_averages, classes, faml, maps, masks, symmetry  # noqa: F401
from services.alignment.service.registry import service

__all__ = ["service"]
