"""Particles: one row each, in Parquet. This module owns their schema."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import DataLoss, InvalidArgument

POSITION = ("x", "y", "z")
QUATERNION = ("qx", "qy", "qz", "qw")
SHIFT = ("shift_x", "shift_y", "shift_z")

COLUMNS: Mapping[str, str] = {
    "id": "int64",
    "x": "float64",
    "y": "float64",
    "z": "float64",
    "qx": "float64",
    "qy": "float64",
    "qz": "float64",
    "qw": "float64",
    "shift_x": "float64",
    "shift_y": "float64",
    "shift_z": "float64",
    "score": "float64",
    # What a particle measures across, where it was found by its size.
    "diameter_angstrom": "float64",
    "class_id": "int32",
    "class_name": "str",
    "half": "int32",
    # Which filament a subunit belongs to; -1 for what belongs to none.
    "filament": "int32",
    # The tomogram of each row, in a table that has rows of several.
    "tomogram": "str",
    # Who added or moved it by hand; empty where nobody did.
    "editor": "str",
}
"""All columns that there are, in the order they are kept in, and their types."""

REQUIRED = ("id", *POSITION)
_GROUPS = (POSITION, QUATERNION, SHIFT)
_FINITE = (*POSITION, *QUATERNION, *SHIFT)
_METADATA_KEY = b"cryofleet"
_ARROW_TYPES = {"int64": pa.int64(), "int32": pa.int32(), "float64": pa.float64(), "str": pa.string()}
_ROW_GROUP = 131072
# What Arrow raises for bytes that are no Parquet, names that are no UTF-8 among them.
_UNREADABLE = (pa.ArrowException, OSError, ValueError)
MAX_ROWS = 100_000_000
"""Tables that claim more rows are refused before anything is read."""


class Bytes(Protocol):
    """What a table can be read from, besides bytes: an artifact's Blob."""

    size_bytes: int

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`."""


@dataclass(frozen=True, eq=False)
class Particles:
    """Particles of a tomogram: positions and, as far as they are known, orientations, scores and classes.

    Positions and shifts are in voxels of the tomogram, whose side `voxel_size_angstrom` is. The quaternion is of the
    active rotation that takes the reference onto the particle. The table is checked when it is made: InvalidArgument
    names what is wrong with it and the row. Treat it as immutable; the methods give new ones.
    """

    table: pd.DataFrame
    voxel_size_angstrom: float
    tomogram: str = ""
    """The tomogram's name; empty where the rows are of several."""
    tomogram_shape: tuple[int, int, int] | None = None
    """(z, y, x) in voxels."""
    source: str = field(default="particles", compare=False, repr=False)
    """What errors call this table: its URI where it has one."""

    def __post_init__(self) -> None:
        size = self.voxel_size_angstrom
        if (
            isinstance(size, bool)
            or not isinstance(size, (int, float, np.integer, np.floating))
            or not (math.isfinite(size) and size > 0)
        ):
            raise InvalidArgument(f"{self.source}: voxel_size_angstrom is {size!r}; it must be above 0")
        object.__setattr__(self, "voxel_size_angstrom", float(size))
        if self.tomogram_shape is not None:
            shape = tuple(int(side) for side in self.tomogram_shape)
            if len(shape) != 3 or min(shape) < 1:
                raise InvalidArgument(f"{self.source}: tomogram_shape is {shape}; it must be (z, y, x), each above 0")
            object.__setattr__(self, "tomogram_shape", shape)
        object.__setattr__(self, "table", _checked(self.table, self.source))

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def from_positions(
        cls,
        positions: ArrayLike,
        voxel_size_angstrom: float,
        tomogram: str = "",
        tomogram_shape: tuple[int, int, int] | None = None,
        rotations: Rotation | None = None,
        **columns: ArrayLike,
    ) -> Particles:
        """Particles at (n, 3) positions (x, y, z), numbered from 0 where no `id` is given."""
        array = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
        values: dict[str, Any] = {"id": np.arange(len(array))}
        values.update(zip(POSITION, array.T, strict=True))
        if rotations is not None:
            values.update(zip(QUATERNION, rotations.as_quat().reshape(-1, 4).T, strict=True))
        values.update(columns)
        _check_lengths(values, len(array), "particles")
        return cls(pd.DataFrame(values), voxel_size_angstrom, tomogram, tomogram_shape)

    def positions(self) -> NDArray[np.float64]:
        """(n, 3), (x, y, z) in voxels of the tomogram."""
        return self._array(POSITION)

    def rotations(self) -> Rotation | None:
        """The active rotations from the reference onto the particles; None where they are not known."""
        if "qx" not in self.table:
            return None
        return Rotation.from_quat(self._array(QUATERNION)) if len(self) else Rotation.identity(0)

    def shifts(self) -> NDArray[np.float64]:
        """(n, 3), (x, y, z) in voxels of the tomogram; zero where they are not known."""
        return self._array(SHIFT) if "shift_x" in self.table else np.zeros((len(self), 3))

    def with_columns(self, **columns: ArrayLike) -> Particles:
        """The same particles with these columns added or replaced, each an array of n or one value for all."""
        values = {name: np.asarray(value) for name, value in columns.items()}
        _check_lengths({name: value for name, value in values.items() if value.ndim}, len(self), self.source)
        return replace(self, table=self.table.assign(**values))

    def with_rotations(self, rotations: Rotation) -> Particles:
        """The same particles with these n rotations."""
        return self.with_columns(**dict(zip(QUATERNION, rotations.as_quat().reshape(-1, 4).T, strict=True)))

    def without_columns(self, *names: str) -> Particles:
        """The same particles without these columns, as far as there are any."""
        return replace(self, table=self.table.drop(columns=list(names), errors="ignore"))

    def select(self, mask_or_index: ArrayLike | slice) -> Particles:
        """The rows of a boolean mask, of integer indices in their order, or of a slice."""
        chosen = mask_or_index if isinstance(mask_or_index, slice) else np.asarray(mask_or_index)
        if isinstance(chosen, np.ndarray):
            if chosen.dtype == np.bool_ and chosen.shape != (len(self),):
                raise InvalidArgument(f"{self.source}: a mask of shape {chosen.shape} for {len(self)} rows")
            if chosen.size == 0:
                chosen = chosen.astype(np.int64)
        try:
            return replace(self, table=self.table.iloc[chosen])
        except IndexError:
            raise InvalidArgument(f"{self.source} has {len(self)} rows; one after the last was asked for") from None

    @staticmethod
    def concat(parts: Sequence[Particles]) -> Particles:
        """The rows of all parts, in order.

        Columns that not all parts have are left out. Ids are kept if they are distinct, and numbered anew from 0 if
        not. Rows of different tomograms get the column `tomogram`. Raises InvalidArgument where voxel sizes differ.
        """
        if not parts:
            raise InvalidArgument("no tables of particles to put together")
        first = parts[0]
        for part in parts[1:]:
            if not math.isclose(part.voxel_size_angstrom, first.voxel_size_angstrom, rel_tol=1e-6):
                raise InvalidArgument(
                    f"{part.source} has voxels of {part.voxel_size_angstrom} Å and {first.source} of "
                    f"{first.voxel_size_angstrom} Å; they must have the same"
                )
        one = all(part.tomogram == first.tomogram for part in parts)
        tables = [
            part.table if one or "tomogram" in part.table else part.table.assign(tomogram=part.tomogram)
            for part in parts
        ]
        common = [name for name in COLUMNS if all(name in table for table in tables)]
        table = pd.concat([table[common] for table in tables], ignore_index=True)
        if table["id"].duplicated().any():
            table["id"] = np.arange(len(table))
        shape = first.tomogram_shape if one and all(p.tomogram_shape == first.tomogram_shape for p in parts) else None
        return Particles(table, first.voxel_size_angstrom, first.tomogram if one else "", shape)

    def to_parquet(self) -> bytes:
        """The same bytes for the same particles."""
        names = [name for name in COLUMNS if name in self.table]
        about = {
            "tomogram": self.tomogram,
            "tomogram_shape": self.tomogram_shape,
            "voxel_size_angstrom": self.voxel_size_angstrom,
        }
        schema = pa.schema(
            [pa.field(name, _ARROW_TYPES[COLUMNS[name]], nullable=False) for name in names],
            metadata={_METADATA_KEY: json.dumps(about, sort_keys=True).encode()},
        )
        columns = []
        for name in names:
            if COLUMNS[name] == "str":
                columns.append(pa.array(self.table[name], pa.string()))
            else:
                columns.append(pa.array(self.table[name].to_numpy()))
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_arrays(columns, schema=schema),
            sink,
            row_group_size=_ROW_GROUP,
            # half the time of zstd for a tenth more bytes: coordinates hardly compress
            compression="snappy",
            use_dictionary=[name for name in names if COLUMNS[name] in ("str", "int32")],
            write_statistics=False,
        )
        return cast(bytes, sink.getvalue().to_pybytes())

    @classmethod
    def from_parquet(cls, data: bytes | Bytes, source: str = "particles") -> Particles:
        """Read and check a table; errors name `source`.

        Raises InvalidArgument for a table that does not follow the schema and DataLoss for one that can't be decoded.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(data) if isinstance(data, bytes) else _open(data))
        except _UNREADABLE as error:
            raise InvalidArgument(_no_parquet(source, error)) from error
        if file.metadata.num_rows > MAX_ROWS:
            raise InvalidArgument(
                f"{source} says that it has {file.metadata.num_rows} rows; at most {MAX_ROWS} can be read"
            )
        schema = file.schema_arrow
        about = _about(schema.metadata, source)
        for name in schema.names:
            if name not in COLUMNS:
                raise InvalidArgument(f"{source} has a column {name!r}; it may have {', '.join(COLUMNS)}")
            if not schema.field(name).type.equals(_ARROW_TYPES[COLUMNS[name]]):
                kind = schema.field(name).type
                raise InvalidArgument(f"{source}: column {name!r} is of type {kind}; it must be {COLUMNS[name]}")
        for name in REQUIRED:
            if name not in schema.names:
                raise InvalidArgument(f"{source} has no column {name!r}; {', '.join(REQUIRED)} are needed")
        try:
            table = file.read(use_threads=False)
            table.validate(full=True)
        except _UNREADABLE as error:
            raise DataLoss(f"{source} can't be decoded: {_line(error)}") from error
        values: dict[str, Any] = {}
        for name in schema.names:
            if table[name].null_count:
                row = table[name].is_null().to_pylist().index(True)
                raise InvalidArgument(f"{source}: column {name!r} has no value in row {row}")
            if COLUMNS[name] == "str":
                values[name] = table[name].to_pandas()
            else:
                values[name] = table[name].to_numpy()
        return cls(pd.DataFrame(values, copy=False), about[0], about[1], about[2], source)

    def _array(self, names: Sequence[str]) -> NDArray[np.float64]:
        return np.ascontiguousarray(self.table[list(names)].to_numpy(dtype=np.float64))


def _no_parquet(source: str, error: Exception) -> str:
    return (
        f"{source} is no Parquet table: {_line(error)}. Tables of other programs become one by: "
        "cryofleet convert FILE particles.parquet"
    )


def row_count(data: bytes | Bytes, source: str = "particles") -> int:
    """The number of rows, from the file's last bytes. Raises InvalidArgument where it is no Parquet."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(data) if isinstance(data, bytes) else _open(data))
    except _UNREADABLE as error:
        raise InvalidArgument(_no_parquet(source, error)) from error
    return int(metadata.num_rows)


class _BlobFile(io.RawIOBase):
    """A Blob as the file that Parquet reads."""

    def __init__(self, blob: Bytes) -> None:
        self._blob = blob
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        length = None if size is None or size < 0 else size
        data = self._blob.read(self._position, length)
        self._position += len(data)
        return data


def _open(blob: Bytes) -> Any:
    return pa.PythonFile(_BlobFile(blob), mode="r")


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _about(metadata: Mapping[bytes, bytes] | None, source: str) -> tuple[float, str, tuple[int, int, int] | None]:
    """Voxel size, tomogram's name and shape from the schema's metadata."""
    wrong = InvalidArgument(
        f"{source} does not say its voxel size and tomogram in the metadata {_METADATA_KEY.decode()!r}"
    )
    try:
        content = json.loads((metadata or {})[_METADATA_KEY])
        name, shape = content["tomogram"], content["tomogram_shape"]
        size = content["voxel_size_angstrom"] + 0.0
    except (KeyError, ValueError, TypeError, OverflowError):
        raise wrong from None
    if not isinstance(name, str):
        raise wrong
    if shape is None:
        return size, name, None
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int for side in shape):
        raise wrong
    return size, name, (shape[0], shape[1], shape[2])


def _check_lengths(values: Mapping[str, ArrayLike], count: int, source: str) -> None:
    for name, value in values.items():
        if np.shape(value) != (count,):
            raise InvalidArgument(f"{source}: column {name!r} has shape {np.shape(value)}; it must be ({count},)")


def _checked(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table with its columns in order and of the schema's types."""
    for name in table.columns:
        if name not in COLUMNS:
            raise InvalidArgument(f"{source} has a column {name!r}; it may have {', '.join(COLUMNS)}")
    for name in REQUIRED:
        if name not in table:
            raise InvalidArgument(f"{source} has no column {name!r}; {', '.join(REQUIRED)} are needed")
    for group in _GROUPS:
        missing = [name for name in group if name not in table]
        if missing and len(missing) < len(group):
            raise InvalidArgument(f"{source} has no column {missing[0]!r}; {', '.join(group)} belong together")
    columns = {name: _converted(table[name], name, source) for name in COLUMNS if name in table}
    for name in _FINITE:
        if name in columns:
            _refuse(~np.isfinite(np.asarray(columns[name])), columns, name, "must be a finite number", source)
    if "qx" in columns:
        with np.errstate(over="ignore"):
            norm = np.sqrt(sum(np.asarray(columns[name]) ** 2 for name in QUATERNION))
        _refuse(np.abs(norm - 1) > 1e-3, columns, "qw", "belongs to a quaternion that is not of length 1", source)
    ids = pd.Series(columns["id"])
    if not ids.is_unique:
        row = int(np.argmax(ids.duplicated().to_numpy()))
        raise InvalidArgument(f"{source}: id {ids.iloc[row]} in row {row} is there before; ids must be distinct")
    return pd.DataFrame(columns)


def _refuse(bad: NDArray[np.bool_], columns: Mapping[str, Any], name: str, rule: str, source: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        found, number = columns[name][row], columns["id"][row]
        raise InvalidArgument(f"{source}: {name} in row {row} (id {number}) is {found}; it {rule}")


def _converted(column: pd.Series[Any], name: str, source: str) -> Any:
    """The column's values in the schema's type, where nothing is lost by that."""
    kind = COLUMNS[name]
    if kind == "str":
        if not (isinstance(column.dtype, pd.StringDtype) and not column.isna().any()):
            for row, value in enumerate(column.to_numpy(dtype=object)):
                if not isinstance(value, str):
                    raise InvalidArgument(f"{source}: {name} in row {row} is {value!r}; it must be text")
        return column.astype("str").reset_index(drop=True)
    array = column.to_numpy()
    accepted = "iu" if kind.startswith("int") else "fiu"
    if array.size == 0:
        return array.astype(kind)
    if array.dtype.kind not in accepted:
        raise InvalidArgument(f"{source}: column {name!r} is of type {column.dtype}; it must be {kind}")
    if array.dtype == kind:
        return array
    if kind.startswith("int"):
        limits = np.iinfo(kind)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidArgument(f"{source}: column {name!r} has values outside {kind}")
    return array.astype(kind)
