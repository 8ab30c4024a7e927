"""The index of a project's models: ROOT/PROJECT/_models/KEY.json names the models of result KEY.

An entry is written just before its result's manifest, and deleted just before it. So a finished result with a model has
its entry, and an entry whose result has no manifest means nothing. To list models takes one listing of the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cryofleet.storage import Store

MODELS = "_models"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def model_folders(names: Iterable[str]) -> list[str]:
    """The folders of a result, by its objects' names, that are models: that hold weights and their config."""
    present = set(names)
    folders = [name.removesuffix(f"/{WEIGHTS_FILE}") for name in present if name.endswith(f"/{WEIGHTS_FILE}")]
    return sorted(folder for folder in folders if f"{folder}/{CONFIG_FILE}" in present)


def index_uri(result_uri: str) -> str:
    """The place of a result's entry, by the result's folder ROOT/PROJECT/KEY."""
    project, _, key = result_uri.rpartition("/")
    return f"{project}/{MODELS}/{key}.json"


def put_entry(store: Store, result_uri: str, names: Iterable[str], operation: str, created_at: str) -> None:
    """Put the models of a result, by its objects' names, into the index; nothing where there are none.

    The entry is JSON: operation, created_at, and the models' configs by their folders.
    """
    folders = model_folders(names)
    if not folders:
        return
    entry = {
        "operation": operation,
        "created_at": created_at,
        "models": {folder: _config(store.get(f"{result_uri}/{folder}/{CONFIG_FILE}")) for folder in folders},
    }
    store.put(index_uri(result_uri), json.dumps(entry, indent=1, ensure_ascii=False).encode())


def remove_entry(store: Store, result_uri: str) -> None:
    """Take a result's models out of the index."""
    store.delete(index_uri(result_uri))


def _config(text: bytes) -> dict[str, Any]:
    """A model's config; empty where it is none: the index serves to look at models, not to use them."""
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
