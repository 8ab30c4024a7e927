"""A particle table as a file holds it: the numbers in the file's own frame, and what that frame is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.euler import EulerConvention, from_euler
from cryofleet.formats.frames import BinningRule, Frame, Shape, rebinned
from cryofleet.particles import MAX_ROWS, POSITION, QUATERNION, SHIFT, Particles

OTHER_COLUMNS = ("id", "score", "diameter_angstrom", "class_id", "class_name", "half", "filament")
"""The columns of `cryofleet.particles` that no frame changes."""
_NUMBERED_CLASS = re.compile(r"class-(\d{1,9})")
_ORTHOGONAL_WITHIN = 1e-3


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """Particles in the frame of their file.

    Readers make one of what a file says; `particles` gives it in Cryofleet's frame. For writers, `in_frame` gives
    Cryofleet's particles in the frame of the file to be written.
    """

    frame: Frame
    positions: NDArray[np.float64]
    """(n, 3), (x, y, z) in the frame."""
    source: str
    """What errors call the file."""
    rotations: Rotation | None = None
    """n active rotations, reference onto particle, in the frame's handedness."""
    shifts: NDArray[np.float64] | None = None
    """(n, 3), (x, y, z) in the frame."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of `OTHER_COLUMNS`."""
    tomograms: Sequence[str] = ("",)
    """The tomogram's name of each row, or one for all."""
    found: tuple[str, ...] = ()
    """The file's own columns or fields."""
    not_carried: tuple[str, ...] = ()
    """Those of them that are not read."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def particles(self) -> Particles:
        """In Cryofleet's frame.

        Raises:
            FailedPrecondition: the voxel size, or the tomogram's shape where that is needed, is not known.
            InvalidArgument: a row holds what cannot be.
        """
        frame, source = self.frame, self.source
        if frame.voxel_size_angstrom is None:
            raise FailedPrecondition(f"{source}: the file does not say its voxel size: give it with --voxel-size")
        if len(self) > MAX_ROWS:
            raise InvalidArgument(f"{source} has {len(self)} rows; at most {MAX_ROWS} can be read")
        names = list(dict.fromkeys(self.tomograms))
        with np.errstate(over="ignore", invalid="ignore"):
            columns: dict[str, Any] = {"id": np.arange(len(self))}
            columns.update(zip(POSITION, frame.voxels(self.positions, self.tomograms, source).T, strict=True))
            if self.rotations is not None:
                quaternions = frame.rotations(self.rotations).as_quat().reshape(-1, 4)
                columns.update(zip(QUATERNION, quaternions.T, strict=True))
            if self.shifts is not None:
                columns.update(zip(SHIFT, frame.voxel_shifts(self.shifts, source).T, strict=True))
        columns.update(self.columns)
        if len(names) > 1:
            columns["tomogram"] = list(self.tomograms)
        shape: Shape | None = None
        if isinstance(frame.tomogram_shape, tuple):
            shape = frame.tomogram_shape
        elif frame.tomogram_shape is not None and len(names) == 1:
            shape = frame.tomogram_shape.get(names[0])
        name = names[0] if len(names) == 1 else ""
        return Particles(pd.DataFrame(columns), frame.voxel_size_angstrom, name, shape, source)

    @classmethod
    def in_frame(cls, particles: Particles, frame: Frame, *, holds_shifts: bool = True) -> ParticleTable:
        """Cryofleet's particles in a frame whose voxel size is theirs; shifts become part of the positions where the
        format has none."""
        source, table = particles.source, particles.table
        frame = replace(
            frame,
            voxel_size_angstrom=particles.voxel_size_angstrom,
            tomogram_shape=frame.tomogram_shape if frame.tomogram_shape is not None else particles.tomogram_shape,
        )
        tomograms: Sequence[str] = (particles.tomogram,)
        if "tomogram" in table:
            tomograms = table["tomogram"].tolist()
        positions, shifts = particles.positions(), None
        if "shift_x" in table:
            if holds_shifts:
                shifts = frame.from_voxel_shifts(particles.shifts(), source)
            else:
                positions = positions + particles.shifts()
        rotations = particles.rotations()
        return cls(
            frame,
            frame.from_voxels(positions, tomograms, source),
            source,
            None if rotations is None else frame.rotations(rotations),
            shifts,
            {name: table[name].to_numpy() for name in OTHER_COLUMNS if name in table},
            tomograms,
        )

    def with_frame(self, **changes: Any) -> ParticleTable:
        """The same numbers, taken to be in another frame: for what a file does not say."""
        return replace(self, frame=replace(self.frame, **changes))

    def tomogram_names(self) -> list[str]:
        """The distinct names, in order of appearance."""
        return list(dict.fromkeys(self.tomograms))

    def tomogram_column(self) -> NDArray[Any]:
        """The name of each row's tomogram."""
        if len(self.tomograms) == len(self):
            return np.array(self.tomograms, object)
        return np.full(len(self), self.tomograms[0], object)

    def of_one_tomogram(self) -> str:
        """The name of the only tomogram; InvalidArgument for a format that holds no more than one."""
        names = self.tomogram_names()
        if len(names) > 1:
            raise InvalidArgument(
                f"{self.source} has particles of {len(names)} tomograms and the format holds one: "
                f"choose one with --select-tomogram, for instance {names[0]!r}"
            )
        return names[0] if names else ""

    def shifts_or_zero(self) -> NDArray[np.float64]:
        return np.zeros((len(self), 3)) if self.shifts is None else self.shifts

    def column(self, name: str, default: float) -> NDArray[Any]:
        return self.columns[name] if name in self.columns else np.full(len(self), default)

    def class_numbers(self) -> NDArray[np.int64]:
        """Classes counted from 1, 0 for none, as files count them; classes that have only names in the names' order."""
        if "class_id" in self.columns:
            return np.asarray(self.columns["class_id"], np.int64) + 1
        if "class_name" in self.columns:
            _, numbers = np.unique(self.columns["class_name"].astype(str), return_inverse=True)
            return np.asarray(numbers, np.int64).reshape(-1) + 1
        return np.ones(len(self), np.int64)

    def class_names(self, default: str) -> list[str]:
        """Classes by name; those that have only numbers as class-3, say."""
        if "class_name" in self.columns:
            return [str(name) or default for name in self.columns["class_name"].tolist()]
        if "class_id" in self.columns:
            return [f"class-{number + 1}" for number in self.columns["class_id"].tolist()]
        return [default] * len(self)

    def renumbered(self) -> tuple[str, ...]:
        """What a writer that knows numbers alone has to say of names that it turned into them."""
        if "class_name" not in self.columns or "class_id" in self.columns:
            return ()
        names = sorted(set(self.columns["class_name"].tolist()))
        return (_mapping("class names became numbers", names),)


def _mapping(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(f"{name} is {number}" for number, name in enumerate(names[:20], start=1))
    return f"{what}: {shown}{', ...' if len(names) > 20 else ''}"


def tomogram_numbers(table: ParticleTable) -> tuple[NDArray[np.int64], dict[int, str], tuple[str, ...]]:
    """Numbers for formats that name tomograms by them: for each row, the names by number, and what to warn of.

    Names that are all numbers keep them, others are counted from 1 in order of appearance.
    """
    names = table.tomogram_names()
    warnings: tuple[str, ...] = ()
    if names and all(name.isascii() and name.isdigit() and len(name) < 9 and str(int(name)) == name for name in names):
        numbers = {name: int(name) for name in names}
    else:
        numbers = {name: number for number, name in enumerate(names, start=1)}
        if names != [""]:
            warnings = (_mapping("tomograms became numbers", names),)
    rows = np.array([numbers[name] for name in table.tomogram_column().tolist()], np.int64)
    return rows, {number: name for name, number in numbers.items()}, warnings


def whole_numbers(values: ArrayLike, what: str, source: str) -> NDArray[np.int64]:
    """Whole numbers; InvalidArgument names the row that holds none."""
    array = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):
        bad = ~(np.isfinite(array) & (array == np.rint(array)) & (np.abs(array) <= 2**53))
    if bad.any():
        row = int(np.argmax(bad))
        raise InvalidArgument(f"{source}: {what} in row {row + 1} is {array[row]}; it must be a whole number")
    return array.astype(np.int64)


def finite_numbers(values: ArrayLike, what: str, source: str) -> NDArray[np.float64]:
    """Finite numbers; InvalidArgument names the row that holds none."""
    array = np.asarray(values, np.float64)
    bad = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if bad.any():
        raise InvalidArgument(f"{source}: {what} in row {int(np.argmax(bad)) + 1} is not a finite number")
    return array


def class_ids(numbers: ArrayLike, source: str) -> NDArray[np.int64]:
    """Cryofleet's classes, from 0 with -1 for none, of classes that a file counts from 1 with 0 for none."""
    return whole_numbers(numbers, "the class", source) - 1


def classes_of_names(names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The columns of classes that a file names; names like class-3 are numbers."""
    if not any(names):
        return {}
    numbered = {name: _NUMBERED_CLASS.fullmatch(name) for name in set(names)}
    if all(numbered.values()):
        numbers = {name: int(match[1]) - 1 for name, match in numbered.items() if match}
        return {"class_id": np.array([numbers[name] for name in names], np.int64)}
    return {"class_name": np.array(names, object)}


def distinct_ids(values: ArrayLike, what: str, source: str) -> dict[str, NDArray[Any]]:
    """The column of ids where the file's numbers are distinct, and none where they are not."""
    numbers = whole_numbers(values, what, source)
    return {"id": numbers} if pd.Index(numbers).is_unique else {}


def rotations_of_angles(angles: NDArray[np.float64], convention: EulerConvention, source: str) -> Rotation:
    """Rotations of Euler angles, (n, 3) in the convention's order; InvalidArgument names the file and row."""
    finite_numbers(angles, "an angle", source)
    return from_euler(angles, convention) if len(angles) else Rotation.identity(0)


def rotations_of_matrices(matrices: ArrayLike, source: str) -> Rotation:
    """Rotations of (n, 3, 3) matrices; InvalidArgument where one is no rotation."""
    array = np.asarray(matrices, np.float64).reshape(-1, 3, 3)
    with np.errstate(all="ignore"):
        apart = np.abs(array @ array.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2), initial=0.0)
        bad = ~((apart < _ORTHOGONAL_WITHIN) & (np.linalg.det(array) > 0))
    if bad.any():
        raise InvalidArgument(f"{source}: the matrix of point {int(np.argmax(bad)) + 1} is not a rotation")
    return Rotation.from_matrix(array) if len(array) else Rotation.identity(0)


def halves(values: ArrayLike, names: Mapping[Any, int], source: str) -> NDArray[np.int64]:
    """Half sets 1 and 2 by what the file calls them."""
    codes, found = pd.factorize(np.asarray(values))
    for code, value in enumerate(found.tolist()):
        if value not in names:
            known, row = " or ".join(str(name) for name in names), int(np.argmax(codes == code)) + 1
            raise InvalidArgument(f"{source}: the half set in row {row} is {str(value)[:40]!r}; expected {known}")
    return np.array([names[value] for value in found.tolist()], np.int64)[codes]


def scaled_shape(shape: Shape, factor: float) -> Shape | None:
    """A shape in voxels `factor` times as many along each side; None where that is not whole."""
    sides = np.array(shape) * factor
    # voxel sizes are written with some five digits
    if not np.allclose(sides, np.rint(sides), rtol=1e-5, atol=1e-3) or np.rint(sides).min() < 1:
        return None
    z, y, x = np.rint(sides).astype(int).tolist()
    return z, y, x


def rescaled(particles: Particles, voxel_size_angstrom: float, rule: BinningRule = "index") -> Particles:
    """The same places in voxels of another size. The tomogram's shape is kept where it comes out whole."""
    factor = voxel_size_angstrom / particles.voxel_size_angstrom
    columns: dict[str, Any] = dict(zip(POSITION, rebinned(particles.positions(), factor, rule).T, strict=True))
    if "shift_x" in particles.table:
        columns.update(zip(SHIFT, (particles.shifts() / factor).T, strict=True))
    shape = None if particles.tomogram_shape is None else scaled_shape(particles.tomogram_shape, 1 / factor)
    return replace(particles.with_columns(**columns), voxel_size_angstrom=voxel_size_angstrom, tomogram_shape=shape)
