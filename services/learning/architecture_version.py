"""Whether a model's config is of the network, and the version of it, that is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryofleet.errors import FailedPrecondition


def check_architecture(settings: Mapping[str, Any], name: str, version: int) -> None:
    """FailedPrecondition where a config names another architecture, or another version of it."""
    if settings.get("architecture") != name:
        raise FailedPrecondition(f"the model's architecture is {settings.get('architecture')!r}, {name!r} is needed")
    if settings.get("architecture_version") != version:
        raise FailedPrecondition(
            f"the model is {name} version {settings.get('architecture_version')!r}; version {version} is needed: "
            "train it again"
        )
