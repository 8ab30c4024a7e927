"""What a caller is told of an exception: a Failure of one line. Tracebacks stay in the log."""

from __future__ import annotations

import errno
import logging
import uuid

from cryofleet.channels import REASON_BUSY, REASON_DRAINING, REASON_MEMORY, REASON_NEVER_FITS, REASON_TOO_LARGE
from cryofleet.errors import Failure, Internal, ResourceExhausted, Unavailable
from cryofleet.server.admission import Busy, NeverFits

logger = logging.getLogger(__name__)

# Status details travel in HTTP/2 headers, percent-encoded, of which gRPC takes 8 KiB.
_LONGEST_MESSAGE = 1500


class OutOfMemory(ResourceExhausted):
    """The operation took more memory than there is."""


class TooLarge(ResourceExhausted):
    """A message or a volume that is larger than the settings allow."""


class Draining(Unavailable):
    """The instance is stopping."""


_REASONS: tuple[tuple[type[Failure], str], ...] = (
    (Busy, REASON_BUSY),
    (NeverFits, REASON_NEVER_FITS),
    (OutOfMemory, REASON_MEMORY),
    (TooLarge, REASON_TOO_LARGE),
    (Draining, REASON_DRAINING),
)


def reason_for(failure: Failure) -> str:
    """The word for `cryofleet-reason` in the trailing metadata; empty for failures whose status says enough."""
    return next((reason for kind, reason in _REASONS if isinstance(failure, kind)), "")


def one_line(failure: Failure) -> str:
    """The message as it may travel: one line, not endless."""
    line = " ".join(failure.message.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…"


def failure_of(error: BaseException, instance: str) -> Failure:
    """The failure to report for `error`; what nobody foresaw is logged here, under an id that the caller is told."""
    if isinstance(error, Failure):
        return error
    # torch's own error for a full GPU is no MemoryError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        logger.error("out of memory", exc_info=error)
        return OutOfMemory(f"instance {instance} ran out of memory: {error}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        logger.error("no disk space", exc_info=error)
        return ResourceExhausted(f"instance {instance} has no disk space left: {error.strerror}")
    error_id = uuid.uuid4().hex[:12]
    logger.error("internal error", exc_info=error, extra={"error_id": error_id})
    return Internal(f"internal error, see the log of {instance} (id {error_id})")
