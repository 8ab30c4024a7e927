"""Logs as JSON, one object a line, each with the run and task it belongs to."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from cryofleet import tracing

_context: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("cryofleet_log_context", default=None)

# What every LogRecord has; anything else was given by `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Adds fields (run_id, task_key, operation, …) to every line logged inside; empty ones are left out.

    The fields live in a context variable: copy the context (`contextvars.copy_context().run`) to carry
    them into a worker thread.
    """
    before = _context.get()
    bind_log_context(**fields)
    try:
        yield
    finally:
        _context.set(before)


def bind_log_context(**fields: str) -> None:
    """The same for all that the current asyncio task, or thread, still does."""
    _context.set({**(_context.get() or {}), **{name: value for name, value in fields.items() if value}})


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; tracebacks are one field of it."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._fixed = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        return json.dumps(self.fields(record), default=str, ensure_ascii=False)

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """What the line says."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            **self._fixed,
            **(_context.get() or {}),
            **({"trace_id": trace_id} if (trace_id := tracing.trace_id()) else {}),
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return line


def configure_logs(service: str, instance: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (standard error where left out) as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service, instance))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
