"""The audit log: who called what, for which project and run, and what came of it. One JSON object a line.

It holds names, never what was sent: no tokens, no request, no messages of methods, which may quote it.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryofleet.access.caller import Caller
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import AUDIT_LOG, AUDIT_OFF

logger = logging.getLogger(__name__)
_stream = logging.getLogger("cryofleet.audit")

EVENT = "audit"
"""What an entry has for its `event`, by which it is known among other lines of a log."""
_LONGEST = 300


@dataclass
class Entry:
    """One call, as far as it is known yet."""

    method: str
    """As gRPC calls it: /PACKAGE.SERVICE/METHOD."""
    peer: str = ""
    """The address that it came from."""
    certificate: str = ""
    """The first name in the caller's certificate."""
    caller: Caller | None = None
    """None where the call was refused before it was known."""
    project: str = ""
    run_id: str = ""
    task_key: str = ""
    audited: bool = True
    """Whether it is recorded where it was not refused."""
    refused: str = ""
    """Why access was denied."""
    started: float = field(default_factory=time.perf_counter)
    recorded: bool = False

    def fields(self, status: str) -> dict[str, object]:
        """What is recorded; empty values are left out."""
        caller = self.caller
        found: dict[str, object] = {
            "event": EVENT,
            "user": caller.user if caller else "",
            "role": caller.role_word if caller else "",
            "authenticated": caller.authenticated if caller else "none",
            "peer": self.peer,
            "certificate": self.certificate,
            "method": self.method.removeprefix("/"),
            "project": self.project,
            "run_id": self.run_id,
            "task_key": self.task_key,
            "status": status,
            "refused": self.refused[:_LONGEST],
            "seconds": round(time.perf_counter() - self.started, 4),
        }
        return {name: value for name, value in found.items() if value != ""}


_entry: contextvars.ContextVar[Entry | None] = contextvars.ContextVar("cryofleet_audit_entry", default=None)


def begin(entry: Entry) -> None:
    """Makes `entry` that of the call that is being answered."""
    _entry.set(entry)


def current_entry() -> Entry | None:
    """Of the call that is being answered."""
    return _entry.get()


def note(*, project: str = "", run_id: str = "") -> None:
    """Adds to the call's entry what its request alone does not say."""
    entry = _entry.get()
    if entry is not None:
        entry.project = project or entry.project
        entry.run_id = run_id or entry.run_id


class AuditLog:
    """Writes entries to a file, or among the logs of the process."""

    def __init__(self, where: str, service: str, instance: str) -> None:
        """`where` is off, log, or the path of a file, which several processes of a machine may share.

        Raises FailedPrecondition where the file can't be written.
        """
        self._path = None if where in (AUDIT_OFF, AUDIT_LOG) else Path(where)
        self._on = where != AUDIT_OFF
        self._fixed = {"service": service, "instance": instance}
        if self._path is not None:
            try:
                self._append(self._path, b"")
            except OSError as error:
                raise FailedPrecondition(f"cannot write the audit log {where}: {error.strerror}") from None
        # Whatever the level of the other logs is.
        _stream.setLevel(logging.INFO)

    def write(self, entry: Entry, status: str) -> None:
        """Records a call that has ended; once, however often it is asked to."""
        if entry.recorded or not self._on or not (entry.audited or entry.refused):
            return
        entry.recorded = True
        fields = entry.fields(status)
        if self._path is None:
            _stream.info("%s: %s", status, fields["method"], extra=fields)
            return
        seconds = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line = {"time": f"{stamp}.{int(seconds % 1 * 1000):03d}Z", **self._fixed, **fields}
        try:
            self._append(self._path, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            # Not lost: it stands among the other logs.
            logger.error("cannot write the audit log %s: %s", self._path, error.strerror, extra=fields)

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        # Opened each time, so that the file may be rotated; written at once, so that lines of several processes stay
        # whole.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
