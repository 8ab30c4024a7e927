"""What a storage URI may be."""

from __future__ import annotations

import functools
import os
import re

from cryofleet.errors import InvalidArgument, PermissionDenied

UNFINISHED = ".cryofleet-unfinished-"
"""What the names of unfinished files begin with; no object's does."""

_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def file_uri(path: str | os.PathLike[str]) -> str:
    """The URI of a local path: made absolute, its characters as they are."""
    return "file://" + os.path.abspath(path)


@functools.lru_cache(maxsize=4096)
def checked_uri(uri: str) -> str:
    """The URI without a trailing slash. Raises PermissionDenied where it could mean anything but what it says."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("file", "s3"):
        raise InvalidArgument(f"{uri!r} is no storage URI; it must begin with file:/// or s3://")
    if _CONTROL.search(uri):
        raise PermissionDenied(f"{uri!r} holds control characters")
    if _ENCODED.search(uri):
        raise PermissionDenied(f"{uri!r} is percent-encoded; URIs of the store are literal")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise PermissionDenied(f"{uri!r} is not valid Unicode") from None
    if rest.endswith("/") and rest != "/":
        rest = rest[:-1]
    if scheme == "file" and not rest.startswith("/"):
        raise PermissionDenied(f"{uri!r} names a host; a file URI must begin with file:///")
    names = rest.removeprefix("/").split("/") if scheme == "file" else rest.split("/")
    if scheme == "s3" and not _BUCKET.fullmatch(names[0]):
        raise InvalidArgument(f"{uri!r} names no valid bucket")
    if rest != "/" and any(name in ("", ".", "..") for name in names):
        raise PermissionDenied(f"{uri!r} holds an empty name, '.' or '..'")
    if any(name.startswith(UNFINISHED) for name in names):
        raise PermissionDenied(f"{uri!r} has a name that is kept for unfinished files")
    return f"{scheme}://{rest}"


def is_below(uri: str, root: str) -> bool:
    """Whether a checked URI is `root` or lies under it."""
    return uri == root or uri.startswith(root.rstrip("/") + "/")
