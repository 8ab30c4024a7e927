"""Sums of classes on their way from process to process: what some rows of a table of particles add, and all of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import point_group
from services.alignment.align import Poses
from services.alignment.array_files import Arrays
from services.alignment.classify import ClassSums, sums_band


@dataclass(frozen=True)
class About:
    """What the sums are of: boxes, the point group of the averages, the digest `made_of` of all that they are made of
    (subtomograms, the table of particles, what imaging left), and which rows `first` to `first` + `count` of the
    table's `rows` are in them.
    """

    box_size: int
    voxel_size_angstrom: float
    contrast: str
    symmetry: str
    made_of: str
    rows: int
    first: int
    count: int

    def is_of_same(self, other: "About") -> bool:
        """Whether both are sums over rows of one table, made alike."""
        return replace(self, first=0, count=0) == replace(other, first=0, count=0)


@dataclass(frozen=True, eq=False)
class StoredSums:
    """`sums` complex64 and `weights` float32 (classes, 2, components) of the half sets, `counts` (classes, 2)."""

    about: About
    sums: NDArray[np.complex64]
    weights: NDArray[np.float32]
    counts: NDArray[np.int64]

    @staticmethod
    def of(sums: ClassSums, about: About) -> "StoredSums":
        return StoredSums(about, sums.sums.cpu().numpy(), sums.weights.cpu().numpy(), sums.counts)

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        about = json.dumps(asdict(self.about), sort_keys=True).encode()
        return {
            "about": np.frombuffer(about, np.uint8),
            "sums": self.sums,
            "weights": self.weights,
            "counts": self.counts,
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any], source: str) -> "StoredSums":
        """What `to_arrays` gave. Raises InvalidArgument, which names `source`, where it is something else."""
        try:
            about = About(**json.loads(arrays["about"].astype(np.uint8).tobytes()))
            kinds = {"box_size": int, "voxel_size_angstrom": float, "rows": int, "first": int, "count": int}
            for name, value in asdict(about).items():
                if not isinstance(value, kinds.get(name, str)):
                    raise ValueError(f"{name} is {value!r}")
            if not (8 <= about.box_size <= 4096 and about.voxel_size_angstrom > 0):
                raise ValueError(f"boxes of {about.box_size} voxels of {about.voxel_size_angstrom:g} Å")
            if about.contrast not in ("dark", "light"):
                raise ValueError(f"contrast is {about.contrast!r}")
            point_group(about.symmetry)
            stored = StoredSums(
                about,
                np.array(arrays["sums"], dtype=np.complex64),
                np.array(arrays["weights"], dtype=np.float32),
                np.array(arrays["counts"], dtype=np.int64),
            )
            shape = (len(stored.counts), 2, len(sums_band(about.box_size, "cpu")))
            for name, array, wanted in (
                ("sums", stored.sums, shape),
                ("weights", stored.weights, shape),
                ("counts", stored.counts, shape[:2]),
            ):
                if array.shape != wanted:
                    raise ValueError(f"{name} is {array.shape}, not {wanted}")
                if not np.isfinite(array).all():
                    raise ValueError(f"{name} holds values that are not finite")
        except (KeyError, TypeError, ValueError, IndexError, InvalidArgument) as error:
            raise InvalidArgument(f"{source} holds no sums of classes: {error}") from None
        return stored

    def class_sums(self, labels: NDArray[np.int64], halves: NDArray[np.int64], poses: Poses, device: str) -> ClassSums:
        """The sums as some of their particles, in classes `labels` and half sets `halves`, are compared to them."""
        band = sums_band(self.about.box_size, device)
        sums, weights = (torch.from_numpy(array).to(device) for array in (self.sums, self.weights))
        return ClassSums(band, sums, weights, self.counts, labels, halves, poses)

    def whole(self) -> ClassSums:
        """The sums without their particles, for averages."""
        nobody = np.zeros(0, dtype=np.int64)
        return self.class_sums(nobody, nobody, Poses(Rotation.identity(0), np.zeros((0, 3)), np.zeros(0)), "cpu")


def add_up(parts: Iterable[tuple[StoredSums, str]]) -> StoredSums:
    """The sums of all rows from those of some rows each, in order, with the names that errors give them.

    Raises InvalidArgument where they are of different tables, or rows are missing.
    """
    numbered = iter(parts)
    first, name = next(numbered)
    if first.about.first != 0:
        raise InvalidArgument(
            f"{name} begins with row {first.about.first}: the first of the sums must begin with row 0"
        )
    sums, weights = first.sums.astype(np.complex128), first.weights.astype(np.float64)
    counts, end, last = first.counts.copy(), first.about.count, name
    for part, source in numbered:
        if not part.about.is_of_same(first.about) or part.counts.shape != counts.shape:
            raise InvalidArgument(f"{source} and {name} are not sums of one table of particles, made alike")
        if part.about.first != end:
            raise InvalidArgument(f"{source} begins with row {part.about.first}: row {end} must follow {last}")
        sums += part.sums
        weights += part.weights
        counts += part.counts
        end, last = end + part.about.count, source
    if end != first.about.rows:
        raise InvalidArgument(f"{last} ends with row {end - 1}, but there are {first.about.rows} particles")
    return StoredSums(replace(first.about, count=end), sums.astype(np.complex64), weights.astype(np.float32), counts)
