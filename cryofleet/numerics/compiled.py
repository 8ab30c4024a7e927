"""Loops compiled to machine code for the CPU."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function of arrays and scalars with Numba on its first call; it runs without Python's lock.

    The machine code is kept between processes where Numba finds a folder that it may write to (`NUMBA_CACHE_DIR`
    names one); elsewhere, each process compiles anew. Sums may be reordered to use vector instructions, in the same
    way on each call.
    """
    try:
        return cast(_Function, numba.njit(function, cache=True, nogil=True, fastmath=True))
    except RuntimeError:  # no folder for the cache: a read-only file system
        return cast(_Function, numba.njit(function, nogil=True, fastmath=True))
