"""The latest lines of this process's log about each run, kept in memory for those who ask for them.

All of it is bounded: a line's length, a run's lines, what all runs together take. Nothing here waits for anything, so
logging costs a computation no more than a line of text does.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryofleet.access.audit import EVENT as AUDIT
from cryofleet.logs import JsonFormatter
from cryofleet.redaction import Redaction
from cryofleet.v1 import runtime_pb2

MOST_LINES = 2000
"""Of a run; of more the oldest are dropped, as where they are more bytes than this:"""
MOST_BYTES_OF_A_RUN = 2**20
MOST_BYTES = 16 * 2**20
"""Of all runs; the run that was least recently written about is dropped first."""
LONGEST = 8000
"""Characters of a message."""
DEFAULT_LIMIT = 1000
"""Lines that are read where nobody says how many."""
_LONGEST_FIELD = 500
_BYTES_OF_A_LINE = 50
"""What Python takes for bytes beside what they hold, roughly."""
_OWN_FIELDS = ("time", "level", "service", "instance", "operation", "task_key", "message", "traceback")
_KEY_FIELDS = ("project", "run_id")


@dataclass
class _Lines:
    """Of one run."""

    lines: deque[bytes] = field(default_factory=deque)
    """Serialised: as messages they take several times as much."""
    size_bytes: int = 0
    cut: bool = False

    def drop_first(self) -> int:
        """The bytes that this sets free."""
        size = _size(self.lines.popleft())
        self.size_bytes -= size
        self.cut = True
        return size


class RecentLog(logging.Handler):
    """Keeps lines that belong to a run, by project and run; the project is empty where a line has none."""

    def __init__(self, service: str, instance: str, environment: Mapping[str, str] | None = None) -> None:
        """What `environment`, that of the process where left out, keeps secret is in no line."""
        super().__init__()
        self._json = JsonFormatter(service, instance)
        self._redaction = Redaction(os.environ if environment is None else environment)
        self._runs: OrderedDict[tuple[str, str], _Lines] = OrderedDict()
        self._size_bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the line; logging has the lock."""
        try:
            fields = self._json.fields(record)
            # The audit is not for those who see the run, but for those who watch over them.
            if fields.get("run_id") and fields.get("event") != AUDIT:
                key = (str(fields.get("project", "")), str(fields["run_id"]))
                self._keep(key, self._line(record, fields).SerializeToString())
        except Exception:
            self.handleError(record)

    def read(
        self, project: str, run_id: str, task_key: str = "", limit: int = DEFAULT_LIMIT
    ) -> tuple[list[runtime_pb2.LogLine], bool]:
        """The newest lines about a run, or one of its tasks, in order of time; and whether there were older ones."""
        self.acquire()
        try:
            run = self._runs.get((project, run_id), _Lines())
            serialised, cut = list(run.lines), run.cut
        finally:
            self.release()
        lines = [runtime_pb2.LogLine.FromString(line) for line in serialised]
        if task_key:
            lines = [line for line in lines if line.task_key == task_key]
        # Threads that log at the same time do not wait for each other in order.
        lines.sort(key=lambda line: line.time.ToNanoseconds())
        return lines[-limit:], cut or len(lines) > limit

    def _line(self, record: logging.LogRecord, fields: Mapping[str, object]) -> runtime_pb2.LogLine:
        line = runtime_pb2.LogLine(
            level=record.levelname,
            service=str(fields["service"]),
            instance=str(fields["instance"]),
            operation=self._shown(fields.get("operation", ""), _LONGEST_FIELD),
            task_key=self._shown(fields.get("task_key", ""), _LONGEST_FIELD),
            message=self._shown(fields["message"]),
            fields={
                self._shown(name, _LONGEST_FIELD): self._shown(value, _LONGEST_FIELD)
                for name, value in fields.items()
                if name not in (*_OWN_FIELDS, *_KEY_FIELDS)
            },
        )
        # As the log's own line has it, so that the two are known for the same.
        line.time.FromMilliseconds(int(record.created) * 1000 + int(record.msecs))
        return line

    def _shown(self, value: object, longest: int = 0) -> str:
        """The value's first so many characters, without secrets."""
        longest = longest or LONGEST
        # Names of files may hold any bytes.
        text = str(value).encode(errors="replace").decode()
        searched = self._redaction.hide(text[: 2 * LONGEST])
        # What is not searched may have the other half of a secret, whose first half nobody recognises.
        safe = len(searched) if len(text) <= 2 * LONGEST else max(0, len(searched) - LONGEST)
        kept = min(longest, safe)
        return searched if kept == len(searched) else searched[:kept] + "…"

    def _keep(self, key: tuple[str, str], line: bytes) -> None:
        run = self._runs.setdefault(key, _Lines())
        self._runs.move_to_end(key)
        run.lines.append(line)
        run.size_bytes += _size(line)
        self._size_bytes += _size(line)
        while len(run.lines) > MOST_LINES or run.size_bytes > MOST_BYTES_OF_A_RUN:
            self._size_bytes -= run.drop_first()
        while self._size_bytes > MOST_BYTES:
            _, oldest = self._runs.popitem(last=False)
            self._size_bytes -= oldest.size_bytes


def _size(line: bytes) -> int:
    return len(line) + _BYTES_OF_A_LINE
