"""What is averaged and how, and the state between two iterations of it, as it passes from one process to the next."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import soft_cylinder, soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group
from services.alignment.align import Poses, Search, check_mask, check_transfer
from services.alignment.array_files import Arrays
from services.alignment.band import Band
from services.alignment.helical import LONGEST_LAG, Cylinder, HelicalSymmetry
from services.alignment.reconstruction import JOINED_ANGSTROM, JOINED_CYCLES
from services.alignment.rejection import Rejection

START_CYCLES = 5.0
"""The first low-pass in cycles per box: about a third of a particle that fills two thirds of its box."""

MaskKind = Literal["sphere", "cylinder", "given", "auto"]
_NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Mask:
    """What counts of the references, and of the half maps for their FSC.

    A `sphere` or a `cylinder` along z, of `radius_angstrom` and, the latter, `height_angstrom` (the box where left
    out), with a soft edge beyond; a `given` soft mask; or `auto`, made from each iteration's average (`auto_mask`), and
    the sphere while no particle stands out of it. Without a radius the sphere is the largest that can be turned in the
    box, for the references, and 0.8 of the box's diameter, for the FSC.
    """

    kind: MaskKind = "sphere"
    radius_angstrom: float | None = None
    height_angstrom: float | None = None

    def check(self, box_angstrom: float) -> None:
        """Raise InvalidArgument where a value can't work."""
        if self.kind not in ("sphere", "cylinder", "given", "auto"):
            raise InvalidArgument(f"mask {self.kind!r}: must be sphere, cylinder, given or auto")
        if self.kind == "cylinder" and self.radius_angstrom is None:
            raise InvalidArgument("the mask is a cylinder: give its radius_angstrom")
        if self.kind in ("given", "auto") and (self.radius_angstrom or self.height_angstrom):
            raise InvalidArgument(f"the mask is {self.kind}: it takes neither radius nor height")
        if self.kind == "sphere" and self.height_angstrom is not None:
            raise InvalidArgument("the mask is a sphere, which has no height: give a radius, or a cylinder")
        for name, value in (("radius", self.radius_angstrom), ("height", self.height_angstrom)):
            if value is not None and not 0 < value <= box_angstrom:
                raise InvalidArgument(
                    f"mask {name}_angstrom {value:g}: must be positive and at most the box, {box_angstrom:g} Å"
                )

    def volume(self, box_size: int, voxel_size_angstrom: float) -> NDArray[np.float32]:
        """The mask `[z, y, x]` of a sphere or cylinder that has a radius; empty where it has none."""
        if self.radius_angstrom is None:
            return _NOTHING
        edge = usual_edge_voxels(box_size)
        radius = self.radius_angstrom / voxel_size_angstrom
        if self.kind == "sphere":
            return soft_sphere(box_size, radius, edge)
        height = box_size if self.height_angstrom is None else self.height_angstrom / voxel_size_angstrom
        return soft_cylinder(box_size, radius, height / 2, edge)


@dataclass(frozen=True)
class Helix:
    """A helix that is imposed on every reference and the final map, its axis along z.

    With `refined`, rise and twist are looked for anew in each iteration's average, near where they were. Nothing beyond
    `outer_radius_angstrom` belongs to the filament; where left out, all that the box holds does.
    """

    symmetry: HelicalSymmetry
    refined: bool = True
    outer_radius_angstrom: float | None = None

    def check(self, box_size: int, voxel_size_angstrom: float) -> None:
        """Raise InvalidArgument where the box does not hold it."""
        if self.outer_radius_angstrom is not None and not self.outer_radius_angstrom > 0:
            raise InvalidArgument(f"outer_radius_angstrom {self.outer_radius_angstrom:g}: must be positive")
        first, last = self.cylinder(box_size, voxel_size_angstrom).slices(box_size)
        # What is refined has to be seen at twice its rise, and a tenth more.
        length = math.floor(LONGEST_LAG * (last - first + 1)) - 2
        most = (length / 2.2 if self.refined else last - first - 1) * voxel_size_angstrom
        if self.symmetry.rise_angstrom > most:
            raise InvalidArgument(
                f"rise_angstrom {self.symmetry.rise_angstrom:g}: in boxes of {box_size} voxels at most {most:.4g} Å "
                + ("can be refined; a longer one can be imposed as it is" if self.refined else "can be imposed")
            )

    def cylinder(self, box_size: int, voxel_size_angstrom: float) -> Cylinder:
        """The filament in a box, which may be a coarser sampling of the particles' own."""
        largest = (box_size // 2 - 2) * voxel_size_angstrom
        radius = self.outer_radius_angstrom
        return Cylinder(outer_radius_angstrom=largest if radius is None else min(radius, largest))


@dataclass(frozen=True)
class Options:
    """What an average may have beside a search: the first low-pass, a mask, a helix, rules of rejection, and a
    sharpening of the final map, by a given B factor (negative) or one fitted from a resolution (Å) on.
    """

    start_low_pass_angstrom: float | None = None
    mask: Mask = field(default_factory=Mask)
    helix: Helix | None = None
    rejection: Rejection = field(default_factory=Rejection)
    b_factor_angstrom2: float | None = None
    sharpen_from_angstrom: float | None = None


@dataclass(frozen=True)
class Job:
    """One averaging: `search` says what is compared, `sign` is -1 where protein is dark."""

    search: Search
    symmetry: str = "C1"
    sign: float = 1.0
    seed: int = 0
    options: Options = field(default_factory=Options)

    def check(self) -> None:
        """Raise InvalidArgument where a value can't work."""
        self.search.check()
        point_group(self.symmetry)
        options = self.options
        options.mask.check(self.box_angstrom)
        options.rejection.check()
        start = options.start_low_pass_angstrom
        if start is not None and not 0 < start <= self.box_angstrom / 2:
            raise InvalidArgument(
                f"start_low_pass_angstrom {start:g}: must be positive and at most half the box, "
                f"{self.box_angstrom / 2:g} Å"
            )
        if options.b_factor_angstrom2 is not None and options.sharpen_from_angstrom is not None:
            raise InvalidArgument("give b_factor_angstrom2 or sharpen_from_angstrom, not both")
        if options.helix is not None:
            if self.symmetry.upper() != "C1":
                raise InvalidArgument(
                    f"symmetry {self.symmetry} and a helix: give the helix's rotational symmetry as its order, and C1"
                )
            n = self.search.box_size
            if n < 16:
                raise InvalidArgument(f"boxes of {n} voxels are too small for a helix: at least 16 are needed")
            options.helix.check(n, self.search.voxel_size_angstrom)

    @property
    def box_angstrom(self) -> float:
        return self.search.box_size * self.search.voxel_size_angstrom

    @property
    def k_start(self) -> float:
        """The first low-pass in cycles per box."""
        limit, least = self.search.k_max, self.search.k_min
        if self.options.start_low_pass_angstrom is not None:
            return min(max(self.box_angstrom / self.options.start_low_pass_angstrom, least + 1), limit)
        return min(max(START_CYCLES, least + 2), limit)

    @property
    def k_joined(self) -> float:
        """Up to here, in cycles per box, the halves are aligned to the average of all."""
        return max(self.box_angstrom / JOINED_ANGSTROM, JOINED_CYCLES)

    def band(self, device: str = "cpu") -> Band:
        """The components that averages are made of."""
        n = self.search.box_size
        return Band(n, 1.0, n / 2 - 0.5, None, device)

    def to_array(self) -> NDArray[np.uint8]:
        """As JSON; the transfer function is not in it."""
        values = asdict(replace(self, search=replace(self.search, transfer=None)))
        del values["search"]["transfer"]
        return np.frombuffer(json.dumps(values, sort_keys=True).encode(), np.uint8)

    @staticmethod
    def from_array(array: NDArray[Any]) -> "Job":
        """What `to_array` gave. Raises ValueError, TypeError or KeyError where it is something else."""
        values = json.loads(array.astype(np.uint8).tobytes())
        options: dict[str, Any] = values.pop("options")
        helix = options.pop("helix")
        if helix is not None:
            helix = Helix(**{**helix, "symmetry": HelicalSymmetry(**helix["symmetry"])})
        kept: dict[str, Any] = {"mask": Mask(**options.pop("mask")), "rejection": Rejection(**options.pop("rejection"))}
        return Job(
            **{**values, "search": Search(**values.pop("search"))}, options=Options(**options, **kept, helix=helix)
        )


@dataclass(frozen=True)
class Iteration:
    """What one iteration reached: scores of the particles, resolution of the halves after it, what was compared; how
    many were left out of it; rise and twist after it. NaN where a figure does not apply.
    """

    mean_score: float
    resolution_angstrom: float
    low_pass_angstrom: float
    rejected: float = math.nan
    rise_angstrom: float = math.nan
    twist_degrees: float = math.nan

    def table(self) -> dict[str, float]:
        """The figures that apply."""
        values = {name: value for name, value in asdict(self).items() if not math.isnan(value)}
        return values | ({"rejected": int(self.rejected)} if "rejected" in values else {})


@dataclass(frozen=True, eq=False)
class Model:
    """Everything that a next iteration starts from, of N particles in boxes of n voxels with C components.

    `halves` (N,) are 1 or 2. `quaternions` (N, 4) and `shifts` (N, 3) are the poses at which `sums` and `weights`
    (2, C) were made; the averages then are turned and moved by `turn` (4,) and `move` (3,), so that a pose (R, t)
    becomes (R turn, t + R move): sums and poses always fit each other to the bit. `left_out` (N,) are the codes of
    particles that are not in the sums, `leaving` of those that are not to be in the next. `reference` `[z, y, x]` is
    what the first expectation aligns to, empty where it keeps the poses, and later. `mask` is empty where it is the
    plain sphere, `transfer` where nothing is missing, `helix` (rise, twist) where there is none.
    """

    job: Job
    halves: NDArray[np.int32]
    quaternions: NDArray[np.float64]
    shifts: NDArray[np.float64]
    scores: NDArray[np.float64]
    signals: NDArray[np.float64]
    left_out: NDArray[np.int8]
    leaving: NDArray[np.int8]
    transfer: NDArray[np.float32]
    reference: NDArray[np.float32]
    mask: NDArray[np.float32]
    sums: NDArray[np.complex64]
    weights: NDArray[np.float32]
    turn: NDArray[np.float64] = field(default_factory=lambda: np.array([0.0, 0.0, 0.0, 1.0]))
    move: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    helix: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    iteration: int = -1
    k_max: float = 0.0
    converged: bool = False
    history: tuple[Iteration, ...] = ()

    def __len__(self) -> int:
        return len(self.halves)

    @property
    def search(self) -> Search:
        """The job's, with the transfer function."""
        return replace(self.job.search, transfer=self.transfer if self.transfer.size else None)

    @property
    def turned(self) -> bool:
        """Whether the averages are turned."""
        return bool(abs(self.turn[3]) < 1)

    @property
    def symmetry(self) -> HelicalSymmetry | None:
        """The helix as it is known by now."""
        given = self.job.options.helix
        if given is None:
            return None
        return HelicalSymmetry(float(self.helix[0]), float(self.helix[1]), given.symmetry.order)

    def poses(self) -> Poses:
        """The particles' poses in the averages' frame, N of them."""
        rotations = Rotation.from_quat(self.quaternions)
        return Poses(rotations * Rotation.from_quat(self.turn), self.shifts + rotations.apply(self.move), self.scores)

    def counts(self) -> tuple[int, int]:
        """How many particles of each half are in the sums."""
        kept = self.left_out == 0
        return int((kept & (self.halves == 1)).sum()), int((kept & (self.halves == 2)).sum())

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _SHAPES}
        history = [list(asdict(h).values()) for h in self.history]
        return {
            **kept,
            "job": self.job.to_array(),
            "scalars": np.array([self.iteration, self.k_max, self.converged], np.float64),
            "history": np.array(history, np.float64).reshape(len(history), len(fields(Iteration))),
        }

    @staticmethod
    def from_arrays(arrays: Arrays, source: str = "the model") -> "Model":
        """What `to_arrays` gave. Raises InvalidArgument, naming `source`, for anything else."""
        wrong = InvalidArgument(f"{source} is no model of an averaging")
        if set(arrays) != {*_SHAPES, "job", "scalars", "history"}:
            raise wrong
        try:
            job = Job.from_array(arrays["job"])
            job.check()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise wrong from None
        count, n = len(np.atleast_1d(arrays["halves"])), job.search.box_size
        # A box as large as is claimed has some n^3 / 4 components; only then are its tables made.
        if not isinstance(n, int) or (arrays["sums"].size and n**3 > 8 * arrays["sums"].size):
            raise wrong
        components = len(job.band()) if arrays["sums"].size else 0
        sizes = {"N": count, "n": n, "h": n // 2 + 1, "C": components, "2": 2, "3": 3, "4": 4}
        kept: dict[str, Any] = {}
        for name, (shape, kind, may_be_empty) in _SHAPES.items():
            array = arrays[name]
            expected = tuple(sizes[letter] for letter in shape)
            if array.shape != expected and not (may_be_empty and array.size == 0):
                raise InvalidArgument(f"{source}: {name} is {array.shape}, expected {expected}")
            if not np.isfinite(array).all():
                raise InvalidArgument(f"{source}: {name} holds values that are not finite")
            kept[name] = array.astype(kind)
        scalars, history = arrays["scalars"], arrays["history"]
        if scalars.shape != (3,) or not np.isfinite(scalars).all() or history.ndim != 2:
            raise wrong
        if history.shape[1] != len(fields(Iteration)) or count < 2:
            raise wrong
        model = Model(
            job=job,
            **kept,
            iteration=int(scalars[0]),
            k_max=float(scalars[1]),
            converged=bool(scalars[2]),
            history=tuple(Iteration(*row) for row in history.astype(float).tolist()),
        )
        model.check(source)
        return model

    def check(self, source: str) -> None:
        """Raise InvalidArgument where values can't be those of a model."""
        lengths = np.linalg.norm(self.quaternions, axis=1)
        if not (np.isin(self.halves, (1, 2)).all() and (np.abs(lengths - 1) < 1e-3).all()):
            raise InvalidArgument(f"{source}: halves must be 1 or 2, and quaternions of length 1")
        if abs(float(np.linalg.norm(self.turn)) - 1) > 1e-3 or not self.job.search.k_min < self.k_max <= (
            self.job.search.box_size / 2
        ):
            raise InvalidArgument(f"{source}: its turn or its low-pass is none")
        if (self.iteration >= 0) != (self.sums.shape[1] > 0) or self.sums.shape != self.weights.shape:
            raise InvalidArgument(f"{source}: iteration {self.iteration} does not fit its sums {self.sums.shape}")
        if (self.helix.size == 2) != (self.job.options.helix is not None):
            raise InvalidArgument(f"{source}: its helix is {self.helix.shape}")
        if self.mask.size:
            check_mask(self.mask, self.job.search.box_size)
        if self.transfer.size:
            check_transfer(self.transfer, self.job.search.box_size)
        # Raises where the helix is none.
        self.symmetry  # noqa: B018


_SHAPES: dict[str, tuple[str, type, bool]] = {
    "halves": ("N", np.int32, False),
    "quaternions": ("N4", np.float64, False),
    "shifts": ("N3", np.float64, False),
    "scores": ("N", np.float64, False),
    "signals": ("N", np.float64, False),
    "left_out": ("N", np.int8, False),
    "leaving": ("N", np.int8, False),
    "transfer": ("nnh", np.float32, True),
    "reference": ("nnn", np.float32, True),
    "mask": ("nnn", np.float32, True),
    "sums": ("2C", np.complex64, True),
    "weights": ("2C", np.float32, True),
    "turn": ("4", np.float64, False),
    "move": ("3", np.float64, False),
    "helix": ("2", np.float64, True),
}
"""Arrays of a model: their axes, their type, and whether they may be empty."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What an expectation over consecutive particles from row `first` tells the next model: their poses (`quaternions`,
    `shifts`, `scores`, `signals`), and their sums at these poses, `sums` complex128 and `weights` float64 (2, C).
    """

    first: int
    quaternions: NDArray[np.float64]
    shifts: NDArray[np.float64]
    scores: NDArray[np.float64]
    signals: NDArray[np.float64]
    sums: NDArray[np.complex128]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_arrays(arrays: Arrays, components: int, source: str = "the statistics") -> "Statistics":
        """What `to_arrays` gave. Raises InvalidArgument, naming `source`, for anything else."""
        if set(arrays) != {f.name for f in fields(Statistics)} or arrays["first"].shape != ():
            raise InvalidArgument(f"{source} has no statistics of an averaging")
        count = arrays["scores"].size
        expected = {"quaternions": (count, 4), "shifts": (count, 3), "scores": (count,), "signals": (count,)}
        expected |= {"sums": (2, components), "weights": (2, components)}
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise InvalidArgument(f"{source}: {name} is {arrays[name].shape}, expected {shape}")
            if not np.isfinite(arrays[name]).all():
                raise InvalidArgument(f"{source}: {name} holds values that are not finite")
        kept = {name: arrays[name].astype(np.complex128 if name == "sums" else np.float64) for name in expected}
        return Statistics(int(arrays["first"]), **kept)  # type: ignore[arg-type]
