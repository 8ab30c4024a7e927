"""The bytes of files that anybody may have written: sizes are checked before anything is read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument, NotFound, ResourceExhausted

MAX_TEXT_BYTES = 2 << 30
"""Of STAR files, tables of numbers, XML and NDJSON."""
MAX_JSON_BYTES = 256 << 20
"""Of one JSON document, which takes some twenty times as much when read."""
MAX_BINARY_BYTES = 8 << 30


def check_file(path: Path, source: str, limit: int) -> None:
    """Raises NotFound where there is no file, ResourceExhausted where it is over the limit, InvalidArgument for a
    folder or a pipe."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise NotFound(f"{source}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{source}: can't be read: {error}") from None
    if not path.is_file():
        raise InvalidArgument(f"{source} is no regular file")
    if size > limit:
        raise ResourceExhausted(f"{source} is larger than the {limit >> 20} MiB that are read of such a file")


def read_file(path: Path, source: str, limit: int) -> bytes:
    """A file's bytes, checked first by `check_file`."""
    check_file(path, source, limit)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{source}: can't be read: {error.strerror}") from None


def text_of(data: bytes, source: str) -> str:
    """UTF-8 text, without the mark that some programs put first."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{source}: byte {error.start} is not text") from None


def parse_json(text: str, source: str) -> Any:
    """One JSON document; numbers that are none (NaN, Infinity) and endless nesting are refused."""

    def refuse(constant: str) -> NoReturn:
        raise InvalidArgument(f"{source}: holds {constant}, which is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{source}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InvalidArgument(f"{source}: nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(f"{source}: not JSON: {str(error)[:120]}") from None


def number_rows(data: bytes, source: str) -> NDArray[np.float64]:
    """(rows, columns) of numbers set apart by white space.

    Raises InvalidArgument, with the row, for anything else.
    """
    text = text_of(data, source)
    first = next((words for line in text.splitlines() if (words := line.split())), [])
    if not first:
        return np.zeros((0, 0))
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=r"\s+",
            header=None,
            # one more than there should be shows a row that is too long
            names=list(range(len(first) + 1)),
            index_col=False,
            dtype=np.float64,
            na_values=[],
            keep_default_na=False,
        )
        values = frame.to_numpy(np.float64)
        if np.isnan(values[:, :-1]).any() or not np.isnan(values[:, -1]).all():
            raise ValueError
        return np.ascontiguousarray(values[:, :-1])
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning, OverflowError):
        pass
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != len(first):
            raise InvalidArgument(f"{source}, line {number}: {len(words)} values in a row, {len(first)} in the first")
        rows.append([_number_of(word, f"{source}, line {number}") for word in words])
    return np.array(rows, np.float64)


def _number_of(word: str, where: str) -> float:
    try:
        return float(word)
    except ValueError:
        pass
    try:
        # MATLAB writes a complex number where rounding made one of a real one
        return complex(word.replace("i", "j")).real
    except ValueError:
        raise InvalidArgument(f"{where}: {word[:40]!r} is not a number") from None


def number(value: Any, what: str, source: str) -> float:
    """A number of a JSON document."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{source}: {what} is {str(value)[:40]!r}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgument(f"{source}: {what} is beyond all numbers") from None
