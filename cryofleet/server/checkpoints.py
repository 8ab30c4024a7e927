"""State that a long operation leaves behind, so that its next attempt goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping

from cryofleet.errors import NotFound
from cryofleet.storage import Store

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint of one result, under ROOT/PROJECT/_work/KEY/.

    Each is a folder of its own; a pointer, written last and replaced in one piece, says which counts.
    """

    def __init__(self, store: Store, project: str, key: str) -> None:
        self._store = store
        self._folder = f"{store.root}/{project}/_work/{key}"
        self._pointer = f"{self._folder}/checkpoint.json"
        self._used = False

    def load(self) -> dict[str, bytes] | None:
        """The files of the last checkpoint; None where there is none or it is damaged (which is logged)."""
        self._used = True
        try:
            pointer = json.loads(self._store.get(self._pointer))
            files = {}
            for name, digest in pointer["files"].items():
                data = self._store.get(f"{self._folder}/{pointer['generation']}/{name}")
                if hashlib.sha256(data).hexdigest() != digest:
                    logger.warning("checkpoint file %s is damaged; starting afresh", name)
                    return None
                files[name] = data
        except NotFound:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged; starting afresh", self._pointer)
            return None
        logger.info("going on from a checkpoint", extra={"checkpoint": self._pointer})
        return files

    def save(self, files: Mapping[str, bytes]) -> None:
        """Makes `files` the checkpoint, all of them or none."""
        self._used = True
        generation = uuid.uuid4().hex
        for name, data in files.items():
            self._store.put(f"{self._folder}/{generation}/{name}", data)
        pointer = {
            "generation": generation,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        self._store.put(self._pointer, json.dumps(pointer).encode())
        self._remove_all_but({self._pointer, *(f"{self._folder}/{generation}/{name}" for name in files)})

    def remove(self) -> None:
        """Removes the checkpoint of a result that is whole; nothing where the operation keeps none."""
        if self._used:
            self._remove_all_but(set())

    def _remove_all_but(self, kept: set[str]) -> None:
        for found in list(self._store.list(self._folder)):
            if found.uri not in kept:
                self._store.delete(found.uri)
