"""The tables of a STAR file, as RELION, Warp and the starfile library write them.

The grammar read is what those programs share: ``data_NAME`` blocks, each one table, either a ``loop_`` of columns with
a row a line or a list of ``_label value`` pairs (a table of one row); comments from ``#``; values of several words in
single or double quotes. Blocks of several loops, and values over several lines, which none of them writes, are refused.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

_LONG_LOOP_BYTES = 1 << 16
_PIECE_CHARACTERS = 1 << 20
_PLAIN = bytes([9, 10, 13, *range(32, 127)])


class _Texts(Sequence[str]):
    """A long column's values, kept as one block of text."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self.values[index].to_pylist())
        return str(self.values[index].as_py())

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values.to_pylist())


@dataclass(frozen=True)
class StarTable:
    """One table; every reading method names the file, table, column and row of what it can't read.

    Rows are counted from 1 in messages, as an editor's user counts them.
    """

    file: str
    name: str
    columns: Mapping[str, Sequence[str]]
    """The values as they stand, by the label without its underscore; all of one length."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def where(self, column: str, row: int | None = None) -> str:
        """How messages call a place in this table; `row` counts from 0."""
        place = f"{self.file}: table {self.name}, column {column}"
        return place if row is None else f"{place}, row {row + 1}"

    def texts(self, column: str) -> Sequence[str]:
        """The values of a column. Raises InvalidArgument where there is none of that name."""
        if column not in self.columns:
            raise InvalidArgument(f"{self.file}: table {self.name} has no column {column}")
        return self.columns[column]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column of finite numbers. Raises InvalidArgument naming the row that holds none."""
        texts = self.texts(column)
        try:
            values: NDArray[np.float64]
            if isinstance(texts, _Texts):
                values = pc.cast(texts.values, pa.float64()).to_numpy()
            else:
                values = np.array(texts, np.float64)
        except (ValueError, pa.ArrowException):
            values = np.array([_number(text) for text in texts])
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            row = int(bad[0])
            raise InvalidArgument(f"{self.where(column, row)}: {texts[row][:40]!r} is not a finite number")
        return values

    def integers(self, column: str) -> NDArray[np.int64]:
        """A column of whole numbers."""
        values = self.numbers(column)
        bad = np.flatnonzero((values != np.rint(values)) | (np.abs(values) > 2**53))
        if bad.size:
            row = int(bad[0])
            raise InvalidArgument(f"{self.where(column, row)}: {self.texts(column)[row][:40]!r} is not a whole number")
        return values.astype(np.int64)

    def vectors(self, column: str, length: int | None = None) -> list[NDArray[np.float64]]:
        """A column of bracketed lists, [a,b,..]; of `length` numbers each where that is given."""
        vectors = []
        for row, text in enumerate(self.texts(column)):
            inner = text[1:-1] if text.startswith("[") and text.endswith("]") else None
            values = np.array([_number(part) for part in inner.split(",")] if inner else [], np.float64)
            if not inner or not np.isfinite(values).all():
                raise InvalidArgument(f"{self.where(column, row)}: {text[:40]!r} is not a list of numbers like [1,0,0]")
            if length is not None and len(values) != length:
                raise InvalidArgument(f"{self.where(column, row)}: {len(values)} numbers, {length} were expected")
            vectors.append(values)
        return vectors


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_star(data: bytes, file: str) -> dict[str, StarTable]:
    """The tables of a STAR file's bytes by name, without the ``data_``; `file` is what errors call the file.

    Raises InvalidArgument, with the line, for anything that is not a STAR file or whose rows and labels don't match.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file}: not a STAR file: byte {error.start} is not text") from None
    tables: dict[str, StarTable] = {}
    reader: _Block | None = None
    position = number = 0
    while position < len(text):
        if reader is not None and reader.awaits_rows() and (block := _long_loop(text, position, reader)):
            # the newlines are counted as splitlines() would: what else breaks a line is not in such a block
            body, position = block
            number += body.count("\n")
            continue
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        for line in text[position:end].splitlines() or [""]:
            number += 1
            words = _words(line, f"{file}, line {number}")
            if not words:
                continue
            if words[0].startswith("data_"):
                name = words[0].removeprefix("data_")
                if name in tables:
                    raise InvalidArgument(f"{file}, line {number}: a second table {name!r}; names must differ")
                reader = _Block()
                tables[name] = StarTable(file, name, reader.columns)
            elif reader is None:
                raise InvalidArgument(
                    f"{file}, line {number}: not a STAR file: {line[:40]!r} stands before any data_ block"
                )
            else:
                reader.read(words, f"{file}, line {number}")
        position = end + 1
    if not tables:
        raise InvalidArgument(f"{file}: not a STAR file: it has no data_ block")
    return tables


def _long_loop(text: str, position: int, block: _Block) -> tuple[str, int] | None:
    """Takes the rows of a long loop at once, as far as they are plain; what they were, and where the text goes on.

    None where they are few, or anything in them needs looking at line by line: quotes, comments, a row of another
    length. A body that is not taken is read so, which names the line.
    """
    first = text[position : text.find("\n", position)].split()
    if len(first) != len(block.columns) or first[0].startswith(("_", "loop_", "data_")):
        return None
    end = text.find("\ndata_", position)
    end = len(text) if end < 0 else end + 1
    # the comment before the next block, and what is after the last one
    while (last := text.rfind("\n", position, end - 1) + 1) > position and re.match(r"\s*(#|$)", text[last:end]):
        end = last
    body = text[position:end]
    if len(body) < _LONG_LOOP_BYTES or not body.isascii() or body.encode().translate(None, _PLAIN):
        return None
    if any(character in body for character in "'\"#") or "\n_" in body or "\nloop_" in body:
        return None
    if " " in body or "\t\t" in body or "\n\t" in body or "\t\n" in body:
        body_rows = _set_apart_by_tabs(body)
    else:
        body_rows = body.encode()
    names = [str(number) for number in range(len(block.columns))]
    try:
        # a row of another length is an error here, which is named by whoever reads line by line
        table = pa_csv.read_csv(
            pa.BufferReader(body_rows),
            pa_csv.ReadOptions(use_threads=False, column_names=names),
            pa_csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, ignore_empty_lines=True),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowException:
        return None
    for label, name in zip(list(block.columns), names, strict=True):
        block.take(label, _Texts(table[name]))
    return body, end


def _set_apart_by_tabs(body: str) -> bytes:
    """Rows whose values have one tab between them, whatever white space they had."""
    pieces, start = [], 0
    while start < len(body):
        end = body.find("\n", start + _PIECE_CHARACTERS) + 1 or len(body)
        rows = ("\t".join(line.split()) for line in body[start:end].splitlines())
        pieces.append("\n".join(rows).encode())
        start = end
    return b"\n".join(pieces)


def _words(line: str, where: str) -> list[str]:
    """The words of a line, comments left out; quotes hold several together."""
    if "'" not in line and '"' not in line:
        words = line.split()
        for index, word in enumerate(words):
            if word.startswith("#"):
                return words[:index]
        return words
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.escape = True, ""
    try:
        return list(lexer)
    except ValueError:
        raise InvalidArgument(f"{where}: a quote is opened and not closed") from None


class _Block:
    """Collects one data_ block line by line."""

    def __init__(self) -> None:
        self.columns: dict[str, Sequence[str]] = {}
        self._lists: list[list[str]] = []
        self._loop = False

    def awaits_rows(self) -> bool:
        """Whether the next line may be the first row of a loop."""
        return self._loop and bool(self.columns) and not any(self.columns.values())

    def take(self, label: str, values: Sequence[str]) -> None:
        """A whole column at once."""
        self.columns[label] = values

    def read(self, words: list[str], where: str) -> None:
        if words[0] == "loop_":
            if self.columns:
                raise InvalidArgument(f"{where}: a block with two loops, or a loop after single values, is not read")
            self._loop = True
        elif words[0].startswith("_") and (not self._loop or not any(self._lists)):
            self._label(words, where)
        elif not self._loop:
            raise InvalidArgument(f"{where}: {words[0][:40]!r} is neither a _label nor loop_")
        elif any(isinstance(values, _Texts) for values in self.columns.values()):
            raise InvalidArgument(f"{where}: {words[0][:40]!r} stands after the rows of a loop")
        elif len(words) != len(self._lists):
            raise InvalidArgument(f"{where}: a row of {len(words)} values under {len(self._lists)} labels")
        else:
            for values, word in zip(self._lists, words, strict=True):
                values.append(word)

    def _label(self, words: list[str], where: str) -> None:
        label = words[0].removeprefix("_")
        if label in self.columns:
            raise InvalidArgument(f"{where}: a second column {label}")
        if len(words) != (1 if self._loop else 2):
            what = "a label stands alone" if self._loop else "a label and one value"
            raise InvalidArgument(f"{where}: {what} on its line; it has {len(words)} words")
        values = words[1:]
        self.columns[label] = values
        self._lists.append(values)
