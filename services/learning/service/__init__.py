"""The learning service: turns requests into calls of the methods, and what they give into artifacts."""

# ruff: noqa: F401  Importing a module registers its operations.
from services.learning.service import (
    annotation,
    autoencoder,
    classification,
    clusters,
    conformation,
    dual_training,
    dual_use,
    mapping,
    prediction,
    segmentation,
    tomogram_segmentation,
)
from services.learning.service.registry import service

__all__ = ["service"]
