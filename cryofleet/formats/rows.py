"""The rows of a text table, written fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

Column = tuple[str, NDArray[Any]]
"""A format of one value, as ``%.6f``, and the values."""

_ROWS_AT_ONCE = 50_000


def encode_rows(columns: Sequence[Column], separator: str, start_of_line: str = "") -> Iterator[bytes]:
    """Rows in pieces, a line each; columns are of one length. `start_of_line` is a format without values."""
    line = start_of_line + separator.join(form for form, _ in columns) + "\n"
    count = len(columns[0][1])
    for start in range(0, count, _ROWS_AT_ONCE):
        values = [column[start : start + _ROWS_AT_ONCE].tolist() for _, column in columns]
        yield "".join(line % fields for fields in zip(*values, strict=True)).encode()


def literal(text: str) -> str:
    """A text as it must stand in a format to be printed as it is."""
    return text.replace("%", "%%")
