"""The simulation service: turns requests into calls of the methods, and what they give into artifacts."""

# Importing them registers their operations.
from services.simulation.service import specimens, subtomograms, tilt_images, tilt_series, tomograms  # noqa: F401
from services.simulation.service.registry import service

__all__ = ["service"]
