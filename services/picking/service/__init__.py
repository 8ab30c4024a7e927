"""The picking service: turns requests into calls of the methods, and what they give into artifacts."""

# Importing them registers their operations.
from services.picking.service import (  # noqa: F401
    evaluation,
    particles,
    peaks,
    refinement,
    subtomograms,
    template_free,
    template_matching,
)
from services.picking.service.registry import service

__all__ = ["service"]
