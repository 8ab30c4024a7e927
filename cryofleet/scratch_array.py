"""Arrays that are larger than memory, in files of the scratch folder."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cryofleet.errors import ResourceExhausted

ScalarT = TypeVar("ScalarT", bound=np.generic)


def reserved_array(path: Path, shape: tuple[int, ...], dtype: type[ScalarT]) -> np.memmap[Any, np.dtype[ScalarT]]:
    """A new file mapped as an array of zeros, its disk space claimed at once.

    Mapped without that, a file that finds the disk full later kills the process with SIGBUS. The shape must not be
    empty. Raises ResourceExhausted, naming the folder and the bytes.
    """
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                file.truncate(size_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        path.unlink(missing_ok=True)
        raise ResourceExhausted(f"{path.parent} has no room for a temporary file of {size_bytes} bytes") from error
    return np.memmap(path, dtype, "r+", shape=shape)
