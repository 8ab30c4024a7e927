"""Room on disks. A reserve of each is never used, so that what must be written still can be: manifests, marks, the
record of runs, logs.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import IO, Any

from cryofleet.errors import ResourceExhausted

SMALL_BYTES = 2**20
"""Writes of at most so many bytes may use the reserve: without them nothing could be deleted either."""


def free_bytes(folder: Path) -> int:
    """What this user may still write on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_free(folder: Path, size_bytes: int, reserve_bytes: int) -> None:
    """Raises ResourceExhausted, before anything is written, where so many bytes would use the reserve.

    Without a reserve nothing is looked up: the disk itself says when it is full.
    """
    if not reserve_bytes:
        return
    free = free_bytes(folder)
    if free - size_bytes < reserve_bytes:
        raise ResourceExhausted(
            f"{folder} has {free} bytes free: {size_bytes} more would leave less than the {reserve_bytes} that are "
            "kept free (CRYOFLEET_RESERVE_BYTES); free some with: cryofleet gc --delete"
        )


def claim(file: IO[Any], size_bytes: int, folder: Path) -> None:
    """Claims the disk space of a new temporary file in `folder`, at once. Raises ResourceExhausted."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        else:
            file.truncate(size_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ResourceExhausted(f"{folder} has no room for a temporary file of {size_bytes} bytes") from error
