"""Temporary folders that do not outlive the process, nor pile up when one is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from cryofleet.errors import FailedPrecondition
from cryofleet.space import SMALL_BYTES, check_free

_PREFIX = "instance-"
_LOCK = "lock"


class Scratch:
    """One process's folder for temporary files.

    Each such folder holds a lock for as long as its process lives; folders whose lock is free were left
    by killed processes and are removed when the next one starts.
    """

    def __init__(self, base: Path | None = None, reserve_bytes: int = 0) -> None:
        """`base` is the folder to work in; one of this user's under the system's temporary folder where left out;
        so much of its disk is kept free.

        Raises FailedPrecondition where that folder isn't this user's alone.
        """
        self._reserve_bytes = reserve_bytes
        self._base = base or Path(tempfile.gettempdir()) / f"cryofleet-{os.getuid()}"
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._base.lstat()
        if base is None and (status.st_uid != os.getuid() or status.st_mode & 0o077 or self._base.is_symlink()):
            raise FailedPrecondition(f"{self._base} must be a folder that only its owner, uid {os.getuid()}, may enter")
        self._remove_leftovers()
        # Locked before it gets the name under which another process would look at it.
        made = Path(tempfile.mkdtemp(prefix="new-", dir=self._base))
        self._lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = made.rename(self._base / made.name.replace("new-", _PREFIX, 1))

    def _remove_leftovers(self) -> None:
        for folder in self._base.glob(f"{_PREFIX}*"):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # another process has just removed it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)

    def new_folder(self) -> Path:
        """An empty folder. Raises ResourceExhausted where its disk is full but for the reserve."""
        check_free(self.folder, SMALL_BYTES, self._reserve_bytes)
        return Path(tempfile.mkdtemp(dir=self.folder))

    def close(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
