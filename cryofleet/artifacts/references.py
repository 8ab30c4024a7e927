"""References to artifacts that outlive a move of the store: store:/PROJECT/KEY/NAME."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryofleet.storage import Store

_REFERENCE = "store:/"


def contract(store: Store, uri: str) -> str:
    """A URI under the store's root as store:/PROJECT/KEY/NAME; others as they are."""
    return _REFERENCE + uri[len(store.root) + 1 :] if uri.startswith(store.root + "/") else uri


def expand(store: Store, reference: str) -> str:
    """The URI of a store:/ reference; others as they are."""
    return f"{store.root}/{reference[len(_REFERENCE) :]}" if reference.startswith(_REFERENCE) else reference


def contract_all(store: Store, value: Any) -> Any:
    """`contract` for every string in a JSON value."""
    return _map_strings(value, lambda text: contract(store, text))


def expand_all(store: Store, value: Any) -> Any:
    """`expand` for every string in a JSON value."""
    return _map_strings(value, lambda text: expand(store, text))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
