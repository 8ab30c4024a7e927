"""References to artifacts that outlive a move of the store: store:/PROJECT/KEY/NAME."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryofleet.storage import Store

_REFERENCE = "store:/"


def contract(store: Store, uri: str) -> str:
    """A URI under the store's root as store:/PROJECT/KEY/NAME; others as they are."""
    return _REFERENCE + uri[len(store.root) + 1 :] if uri.startswith(store.root + "/") else uri


def expand(store: Store, reference: str, source: str) -> str:
    """The URI of a store:/ reference; others as they are.

    `source` is the URI of the object that holds the reference, which means that object's own root: in a read-only root
    lies another platform's store. Raises PermissionDenied where `source` is outside the roots.
    """
    if not reference.startswith(_REFERENCE):
        return reference
    return f"{store.root_of(source)}/{reference[len(_REFERENCE) :]}"


def contract_all(store: Store, value: Any) -> Any:
    """`contract` for every string in a JSON value."""
    return _map_strings(value, lambda text: contract(store, text))


def expand_all(store: Store, value: Any, source: str) -> Any:
    """`expand` for every string in a JSON value."""
    return _map_strings(value, lambda text: expand(store, text, source))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
