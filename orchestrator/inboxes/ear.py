"""What a bucket tells of new objects, where its server does: gathered until somebody takes it."""

from __future__ import annotations

import logging
import threading

from cryofleet.errors import Failure
from cryofleet.storage import Store

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 10.0


class Ear:
    """Listens in a thread of its own."""

    def __init__(self, store: Store, uri: str) -> None:
        """`uri` is a prefix in a bucket."""
        self._store = store
        self._uri = uri
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.hears = False
        """Whether the server tells; what was made before it began to is not told."""
        threading.Thread(target=self._listen, name="inbox-ear", daemon=True).start()

    def take(self) -> set[str]:
        """URIs that were told since the last time."""
        with self._lock:
            told, self._told = self._told, set()
        return told

    def stop(self) -> None:
        """Listens no more, once the server has said its next word."""
        self._stopped.set()

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                heard = self._store.listen(self._uri)
                if heard is None:
                    return
                self.hears = True
                for uris in heard:
                    with self._lock:
                        self._told.update(uris)
                    if self._stopped.is_set():
                        return
            except Failure as failure:
                logger.warning("%s is not heard: %s", self._uri, failure)
            finally:
                self.hears = False
            self._stopped.wait(_AGAIN_SECONDS)
