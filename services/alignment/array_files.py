"""Several arrays in one file, which may come from anywhere: NumPy's .npz, uncompressed, read without trusting it."""

import io
import math
import tokenize
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

Arrays = dict[str, NDArray[Any]]

_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    NotImplementedError,  # what zipfile raises for a compression that it does not know
    RuntimeError,
    zipfile.BadZipFile,
    tokenize.TokenError,
)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as one file; the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, source: str) -> Arrays:
    """The arrays of a file by name; errors call it `source`.

    No code runs, and no more memory is taken than the file is long: what is compressed, claims more values than it has,
    or holds objects raises InvalidArgument.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist()}
    except _UNREADABLE as error:
        raise InvalidArgument(f"{source} is no file of arrays: {str(error).partition(chr(10))[0]}") from None


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{info.filename} is of an unknown version {version}")
        shape, fortran, dtype = _HEADERS[version](file)
        if dtype.kind not in "biufc":
            raise ValueError(f"{info.filename} holds {dtype}, not numbers")
        values = file.read()
    if math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"{info.filename} says it is {shape}, but has {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")
