"""What the numbers of a particle table mean: its frame, and the conversion to and from Cryofleet's own.

Cryofleet's own frame: (x, y, z) in voxels, the centre of the first voxel is (0, 0, 0); shifts in voxels, added to the
position, in the tomogram's frame; rotations active, from the reference onto the particle. A `Frame` names how another
program's table differs. With p a position in Cryofleet's frame, a the voxel size, n the tomogram's size in voxels and X
what the table says,

    X = u (p + o)            for an origin with a fixed offset o
    X = u (p - c(n))         for origin "centre", c one of the centre rules
    u = 1 for unit "voxel", a for unit "angstrom"

and with handedness "left" the tomogram is mirrored along z before that: p_z -> n_z - 1 - p_z, t_z -> -t_z, R -> M R M
with M = diag(1, 1, -1). `docs/formats.md` states the frame of each format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument

Unit = Literal["voxel", "angstrom"]
Origin = Literal["first-voxel", "one", "corner", "imod", "centre"]
CentreRule = Literal["size/2", "floor(size/2)", "size/2-1", "(size-1)/2"]
Handedness = Literal["right", "left"]
ShiftRule = Literal["added", "subtracted"]
BinningRule = Literal["index", "edge"]
RotationRule = Literal["relion", "dynamo", "av3", "matrix", "quaternion"]
Shape = tuple[int, int, int]

UNITS: tuple[Unit, ...] = get_args(Unit)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
CENTRE_RULES: tuple[CentreRule, ...] = get_args(CentreRule)
HANDEDNESSES: tuple[Handedness, ...] = get_args(Handedness)
BINNING_RULES: tuple[BinningRule, ...] = get_args(BinningRule)

# What the centre of the first voxel is called.
_OFFSETS: dict[Origin, tuple[float, float, float]] = {
    "first-voxel": (0.0, 0.0, 0.0),
    "one": (1.0, 1.0, 1.0),
    "corner": (0.5, 0.5, 0.5),
    "imod": (0.5, 0.5, 0.0),
}
_CENTRES: dict[CentreRule, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "size/2": lambda size: size / 2,
    "floor(size/2)": lambda size: np.floor(size / 2),
    "size/2-1": lambda size: size / 2 - 1,
    "(size-1)/2": lambda size: (size - 1) / 2,
}


def tomogram_centre(shape: Shape, rule: CentreRule = "size/2") -> NDArray[np.float64]:
    """The point of a tomogram that centred coordinates count from, (x, y, z) in voxels, the first voxel's centre at 0.

    RELION 5 holds three rules, by name here:

    - ``size/2``: what RELION adds when it reads particles (``TomogramSet::loadTomogram``), hence what reconstruction
      and extraction see. Half a voxel beside the middle of the array for even sizes, and a half-integer for odd ones.
    - ``floor(size/2)``: its projection matrices, and EMAN2. The same for even sizes.
    - ``size/2-1``: its Python picker, in unbinned pixels.

    ``(size-1)/2`` is the middle of the array.

    RELION counts in pixels of the tilt series: a voxel i of a tomogram binned by b lies at b i, and the centre at
    b size/2, so that the rule "size/2" gives the same Å at every binning.
    """
    if rule not in _CENTRES:
        raise InvalidArgument(f"unknown rule of the tomogram's centre {rule!r}; known are {', '.join(CENTRE_RULES)}")
    return _CENTRES[rule](np.array(shape[::-1], dtype=np.float64))


def rebinned(positions: ArrayLike, factor: float, rule: BinningRule = "index") -> NDArray[np.float64]:
    """Positions in voxels that are `factor` times as large; a factor below 1 makes them finer.

    - ``index``: voxel i of the coarse array is voxel `factor` i of the fine one, as binning in Fourier space and
      RELION have it: p -> p / factor.
    - ``edge``: the arrays' corners coincide, as averaging blocks of voxels has it: p -> (p + 1/2) / factor - 1/2.
    """
    array = np.asarray(positions, np.float64)
    if rule == "index":
        return array / factor
    if rule == "edge":
        return (array + 0.5) / factor - 0.5
    raise InvalidArgument(f"unknown rule of binning {rule!r}; known are {', '.join(BINNING_RULES)}")


@dataclass(frozen=True)
class Frame:
    """The frame of one table; what is None is not known."""

    unit: Unit = "voxel"
    """Of positions."""
    origin: Origin = "first-voxel"
    """Where positions are 0; "one" calls the first voxel's centre (1, 1, 1), "imod" is a corner in x and y alone."""
    centre: CentreRule = "size/2"
    """Of the tomogram, for the origin "centre"."""
    voxel_size_angstrom: float | None = None
    """Of the voxels that positions count in, or that the tomogram's shape is counted in."""
    tomogram_shape: Shape | Mapping[str, Shape] | None = None
    """(z, y, x) in voxels, for all rows or by the tomogram's name."""
    binning: float | None = None
    """How many pixels of the unbinned data a voxel's side spans."""
    handedness: Handedness = "right"
    """Right is the tomogram as it is; left is its mirror image along z."""
    shift: ShiftRule = "added"
    """Whether the particle lies at position + shift, or at position - shift."""
    shift_unit: Unit = "voxel"
    rotation: RotationRule = "quaternion"
    """How the file writes rotations: a convention of `cryofleet.formats.euler`, a matrix or a quaternion."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("unit", self.unit, UNITS),
            ("origin", self.origin, ORIGINS),
            ("rule of the tomogram's centre", self.centre, CENTRE_RULES),
            ("handedness", self.handedness, HANDEDNESSES),
            ("unit of shifts", self.shift_unit, UNITS),
            ("rule of shifts", self.shift, get_args(ShiftRule)),
            ("rule of rotations", self.rotation, get_args(RotationRule)),
        ):
            if value not in known:
                raise InvalidArgument(f"unknown {what} {value!r}; known are {', '.join(known)}")
        for what, number in (("voxel size", self.voxel_size_angstrom), ("binning", self.binning)):
            if number is not None and not (np.isfinite(number) and number > 0):
                raise InvalidArgument(f"the {what} is {number}; it must be above 0")

    def voxels(self, positions: NDArray[np.float64], tomograms: Sequence[str], source: str) -> NDArray[np.float64]:
        """The table's positions (n, 3) in Cryofleet's frame; `tomograms` holds each row's, or one name for all."""
        placed = positions / self._scale(self.unit, source)
        placed = placed - self._offsets(len(positions), tomograms, source)
        return self._mirrored(placed, tomograms, source)

    def from_voxels(self, positions: NDArray[np.float64], tomograms: Sequence[str], source: str) -> NDArray[np.float64]:
        """The inverse of `voxels`."""
        placed = self._mirrored(positions, tomograms, source) + self._offsets(len(positions), tomograms, source)
        return placed * self._scale(self.unit, source)

    def voxel_shifts(self, shifts: NDArray[np.float64], source: str) -> NDArray[np.float64]:
        """The table's shifts (n, 3) in Cryofleet's frame: voxels to be added to the position."""
        return shifts * self._shift_signs() / self._scale(self.shift_unit, source)

    def from_voxel_shifts(self, shifts: NDArray[np.float64], source: str) -> NDArray[np.float64]:
        """The inverse of `voxel_shifts`."""
        # adding 0 turns the -0 of a subtracted shift into 0
        return shifts * self._shift_signs() * self._scale(self.shift_unit, source) + 0.0

    def rotations(self, rotations: Rotation) -> Rotation:
        """Rotations of the table's handedness in Cryofleet's, and back: a mirror is its own inverse."""
        if self.handedness == "right":
            return rotations
        return Rotation.from_quat(rotations.as_quat() * np.array([-1.0, -1.0, 1.0, 1.0]))

    def _scale(self, unit: Unit, source: str) -> float:
        if unit == "voxel":
            return 1.0
        if self.voxel_size_angstrom is None:
            raise FailedPrecondition(f"{source}: the voxel size is not known: give it with --voxel-size")
        return self.voxel_size_angstrom

    def _shift_signs(self) -> NDArray[np.float64]:
        sign = 1.0 if self.shift == "added" else -1.0
        return np.array([sign, sign, sign if self.handedness == "right" else -sign])

    def _offsets(self, count: int, tomograms: Sequence[str], source: str) -> NDArray[np.float64]:
        """What is added to voxels to get the table's, (3,) or (n, 3)."""
        if self.origin != "centre":
            return np.array(_OFFSETS[self.origin])
        return self._by_tomogram(lambda shape: -tomogram_centre(shape, self.centre), count, tomograms, source)

    def _mirrored(self, positions: NDArray[np.float64], tomograms: Sequence[str], source: str) -> NDArray[np.float64]:
        if self.handedness == "right":
            return positions
        mirrored = positions.copy()
        tops = self._by_tomogram(lambda shape: np.array([shape[0] - 1.0]), len(positions), tomograms, source)
        mirrored[:, 2] = tops[..., 0] - positions[:, 2]
        return mirrored

    def _by_tomogram(
        self,
        value: Callable[[Shape], NDArray[np.float64]],
        count: int,
        tomograms: Sequence[str],
        source: str,
    ) -> NDArray[np.float64]:
        shapes = self.tomogram_shape
        if shapes is None:
            raise FailedPrecondition(
                f"{source}: the tomogram's shape is needed, since "
                + ("positions count from its centre" if self.origin == "centre" else "it is mirrored")
                + ": give --tomogram FILE.mrc, --tomogram-shape Z,Y,X or --tomograms tomograms.star"
            )
        if isinstance(shapes, tuple):
            return value(shapes)
        values = {}
        for name in dict.fromkeys(tomograms):
            if name not in shapes:
                raise FailedPrecondition(f"{source}: the shape of tomogram {name!r} is not among those given")
            values[name] = value(shapes[name])
        if len(values) == 1:
            return next(iter(values.values()))
        return np.array([values[name] for name in tomograms]).reshape(count, -1)
