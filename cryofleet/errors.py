"""The errors that users see. Each owns the gRPC status that it travels under."""

from __future__ import annotations

from typing import ClassVar


class Failure(Exception):
    """An error with one clear line: what is wrong, where, and what would be right.

    `status` is the name of a gRPC status code. It is a name, not the code itself, so that
    numerical code can raise these errors without gRPC.
    """

    status: ClassVar[str] = "INTERNAL"

    @property
    def message(self) -> str:
        return str(self)


class InvalidArgument(Failure):
    """A parameter or file that can never work; the message names it."""

    status = "INVALID_ARGUMENT"


class NotFound(Failure):
    """A URI, run or pipeline that does not exist."""

    status = "NOT_FOUND"


class AlreadyExists(Failure):
    """A name that is taken by something else."""

    status = "ALREADY_EXISTS"


class FailedPrecondition(Failure):
    """An input in a state that the operation cannot work on: no voxel size, say."""

    status = "FAILED_PRECONDITION"


class PermissionDenied(Failure):
    """A URI outside the configured roots or of another project."""

    status = "PERMISSION_DENIED"


class Unauthenticated(Failure):
    """A caller who did not say who they are, or whose token is not taken."""

    status = "UNAUTHENTICATED"


class ResourceExhausted(Failure):
    """No slot, memory or disk space at present; come back later."""

    status = "RESOURCE_EXHAUSTED"


class Unavailable(Failure):
    """The other side is away or draining; another instance, or later, will do."""

    status = "UNAVAILABLE"


class DataLoss(Failure):
    """Stored bytes are not the bytes that were written."""

    status = "DATA_LOSS"


class DeadlineExceeded(Failure):
    """The caller's time is over."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(Failure):
    """The caller no longer wants the result."""

    status = "CANCELLED"


class Internal(Failure):
    """A defect of ours."""

    status = "INTERNAL"


def _subclasses(base: type[Failure]) -> list[type[Failure]]:
    return [found for child in base.__subclasses__() for found in (child, *_subclasses(child))]


def failure_from_status(status: str, message: str) -> Failure:
    """The error that owns `status`, for rebuilding on the client what the server raised."""
    for kind in _subclasses(Failure):
        if kind.status == status and kind.__module__ == __name__:
            return kind(message)
    return Internal(message)
