"""Sorting aligned subtomograms into classes, and which class each fits best.

Classification is the loop of Xu et al., J. Struct. Biol. 178 (2012) 152: all particles are aligned to the averages of
the classes, each to that which it fits best; their differences from the average of all are reduced to few numbers, with
what each particle does not show taken as missing (`dimension_reduction`); these are clustered (`clustering`); the
clusters are the next classes. It ends when the classes stay as they are. All poses are in one frame, that of the first
average.

No particle is ever compared to an average that contains it: its own term is subtracted from its class's sum and weight.
Nor does fine detail pass from one half set to the other: above `JOINED` it comes from the particle's own half of the
class.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.masks import soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group
from cryofleet.progress import Progress, no_progress, part
from services.alignment.align import (
    Aligner,
    Poses,
    Reader,
    References,
    Search,
    batch_size,
    check_particles,
    in_parallel,
    prepare_reference,
    standardise,
)
from services.alignment.band import Band, cycles_per_box
from services.alignment.clustering import Clusters, adjusted_rand_index, cluster
from services.alignment.dimension_reduction import features, neighbourhoods, significant, weighted_pca
from services.alignment.reconstruction import JOINED_ANGSTROM, JOINED_CYCLES, Contributions, divide, volume_of
from services.alignment.refinement import Refined

UNASSIGNED = -1
"""The label of particles in no class."""
LEAST_CYCLES = 5.0
"""Alignment never uses less than so many cycles per box."""

_Batch = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class ClassSums:
    """What the particles of each class add up to, at `poses`, half set by half set.

    `sums` (classes, 2, components) and `weights` are on the device; `counts` is (classes, 2). `labels` (particles,) say
    which class holds each particle, -1 none, and `halves` (particles,), 0 or 1, which half of it; these may be some of
    the particles only, which are then what the averages can be compared to.
    """

    band: Band
    sums: torch.Tensor
    weights: torch.Tensor
    counts: NDArray[np.int64]
    labels: NDArray[np.int64]
    halves: NDArray[np.int64]
    poses: Poses

    def averages(self) -> NDArray[np.float32]:
        """Averages (classes, n, n, n) of particles at mean 0 and deviation 1; an empty class's is 0."""
        counts = torch.from_numpy(self.counts.sum(axis=1)).to(self.sums.device)[:, None]
        components = divide(self.sums.sum(dim=1), self.weights.sum(dim=1), counts)
        return np.asarray(volume_of(self.band, components).cpu().numpy(), dtype=np.float32)

    def half_maps(self) -> NDArray[np.float32]:
        """Averages (classes, 2, n, n, n) of the half sets."""
        counts = torch.from_numpy(self.counts.ravel()).to(self.sums.device)[:, None]
        volumes = volume_of(self.band, divide(self.sums.flatten(0, 1), self.weights.flatten(0, 1), counts))
        n = self.band.box_size
        return np.asarray(volumes.view(-1, 2, n, n, n).cpu().numpy(), dtype=np.float32)

    def resolutions(self, voxel_size_angstrom: float) -> NDArray[np.float64]:
        """Where the FSC of each class's half maps falls below 0.143, in Å; the box where a half has no particle."""
        n = self.band.box_size
        mask = soft_sphere(n, 0.4 * n, usual_edge_voxels(n))
        return np.array(
            [resolution(*fsc(first, second, mask), voxel_size_angstrom) for first, second in self.half_maps()]
        )

    def without(
        self,
        band: Band,
        inner: torch.Tensor,
        k_joined: float,
        rows: NDArray[np.int64],
        own: tuple[torch.Tensor, torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.bool_]]]:
        """For each class, the average without each of the particles `rows` (batch, components), on `band`, whose place
        in the sums' is `inner`; and for which of them any particle is left in it. `own` are the particles' terms and
        weights.
        """
        joined = torch.from_numpy(band.radius <= k_joined).to(self.sums.device)
        half = self.halves[rows]
        for k in range(len(self.counts)):
            mine = self.labels[rows] == k
            held = torch.from_numpy(mine).to(self.sums.device)[:, None]
            terms, coverage = own[0] * held, own[1] * held
            sums, weights = self.sums[k][:, inner], self.weights[k][:, inner]
            total, count = self.counts[k].sum() - mine, self.counts[k][half] - mine
            every = divide(sums.sum(dim=0) - terms, weights.sum(dim=0) - coverage, self._column(total))
            alone = divide(sums[half] - terms, weights[half] - coverage, self._column(count))
            # A half with no particle left has nothing fine to offer, and the other half's must not be seen.
            yield torch.where(joined, every, alone), total > 0

    def _column(self, counts: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(counts)).to(self.sums.device)[:, None]


@dataclass(frozen=True)
class Assignment:
    """The class that each particle fits best, its pose in that class's frame, with the score, and its scores in all
    (particles, classes); -inf in a class that holds no other particle.
    """

    labels: NDArray[np.int64]
    poses: Poses
    scores: NDArray[np.float64]


def _batches(read: Reader, count: int, size: int, names: NDArray[np.int64], box_size: int) -> Iterator[_Batch]:
    """Row numbers and standardised boxes."""
    for first in range(0, count, size):
        rows = np.arange(first, min(first + size, count))
        boxes = read(first, len(rows))
        check_particles(boxes, names[rows], box_size)
        yield rows, standardise(boxes)


def _check_labels(labels: NDArray[np.int64], classes: int, count: int) -> None:
    if labels.shape != (count,):
        raise InvalidArgument(f"there are labels of {labels.shape} particles, but {count} particles")
    if count and not -1 <= labels.min() <= labels.max() < classes:
        raise InvalidArgument(
            f"labels run from {labels.min()} to {labels.max()}: must be from 0 to {classes - 1}, or -1 for no class"
        )


def sums_band(box_size: int, device: str) -> Band:
    """The components that sums of classes have."""
    return Band(box_size, 1.0, box_size / 2 - 0.5, None, device)


def class_sums(
    read: Reader,
    count: int,
    poses: Poses,
    labels: NDArray[np.int64],
    classes: int,
    search: Search,
    *,
    halves: NDArray[np.int64] | None = None,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> ClassSums:
    """Add up the particles of each class at their poses.

    `labels` (count,) run from 0 to `classes` - 1; particles labelled -1 are left out. `halves` (count,), 0 or 1, are
    the half sets; rows in turn where left out. Raises InvalidArgument for labels, poses or particles that can't be
    used.
    """
    search.check()
    _check_labels(labels, classes, count)
    if len(poses.shifts) != count:
        raise InvalidArgument(f"there are poses of {len(poses.shifts)} particles, but {count} particles")
    n = search.box_size
    band = sums_band(n, device)
    contributions = Contributions(band, search.transfer, point_group(search.symmetry), device)
    half = np.arange(count) % 2 if halves is None else halves.astype(np.int64)
    sums = torch.zeros((classes * 2, len(band)), dtype=torch.complex128, device=device)
    weights = torch.zeros((classes * 2, len(band)), dtype=torch.float64, device=device)
    ids = np.arange(count) if names is None else names

    def work(batch: _Batch) -> tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]:
        rows, boxes = batch
        return rows, *contributions.of(torch.from_numpy(boxes).to(device), *poses.tensors(rows, device))

    def done(result: tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]) -> None:
        rows, terms, coverage = result
        for i, row in enumerate(rows):
            if labels[row] != UNASSIGNED:
                place = int(labels[row] * 2 + half[row])
                sums[place] += terms[i]
                weights[place] += coverage[i]
        progress(float(rows[-1] + 1) / count, "averaging", particles=float(rows[-1] + 1))

    size = batch_size(n, n / 2, device, 2)
    in_parallel(_batches(read, count, size, ids, n), work, threads if device == "cpu" else 1, done)
    kept = labels != UNASSIGNED
    counts = np.bincount(labels[kept] * 2 + half[kept], minlength=classes * 2).reshape(classes, 2)
    shape = (classes, 2, len(band))
    return ClassSums(
        band, sums.to(torch.complex64).view(shape), weights.float().view(shape), counts, labels, half, poses
    )


def reassign(
    read: Reader,
    count: int,
    averages: NDArray[np.float32] | ClassSums,
    search: Search,
    *,
    start: Poses | None = None,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Assignment:
    """Align each of `count` particles to every average, and take the class in which its constrained correlation is
    best.

    `averages` is (classes, n, n, n), with protein of the particles' sign; or the sums that these very particles, alone
    or with others, made, and then each is compared to averages that it is no part of. `start` are poses that
    `search.max_angle_degrees` and `max_shift_voxels` are counted from.

    Raises InvalidArgument for averages of another box, of which none, or of which one is empty (of `ClassSums`, all),
    or for a particle that can't be used.
    """
    search.check()
    n = search.box_size
    aligner = Aligner(search, device)
    if isinstance(averages, ClassSums):
        compared: _Compared = _LeaveOneOut(averages, search, aligner)
        classes = len(averages.counts)
        if len(averages.labels) != count:
            raise InvalidArgument(f"the averages were made of {len(averages.labels)} particles, not of {count}")
        if averages.counts.sum() < 2:
            raise InvalidArgument("no class holds two particles: there is nothing to compare a particle to")
    else:
        if averages.ndim != 4 or averages.shape[1:] != (n, n, n) or len(averages) == 0:
            raise InvalidArgument(f"the averages are {averages.shape}: one or more boxes of {n} voxels are expected")
        compared = _Given(averages, aligner)
        classes = len(averages)
    if start is not None and len(start.shifts) != count:
        raise InvalidArgument(f"there are starting poses of {len(start.shifts)} particles, but {count} particles")
    ids = np.arange(count) if names is None else names
    scores = np.full((count, classes), -np.inf)
    quaternions, shifts = np.zeros((count, 4)), np.zeros((count, 3))
    quaternions[:, 3] = 1.0

    def work(batch: _Batch) -> tuple[NDArray[np.int64], list[tuple[Refined, NDArray[np.bool_]]]]:
        rows, boxes = batch
        particles = torch.from_numpy(boxes).to(device)
        near = None if start is None else start.tensors(rows, device)
        return rows, [(aligner.align(particles, r, near), there) for r, there in compared.references(rows, particles)]

    def done(result: tuple[NDArray[np.int64], list[tuple[Refined, NDArray[np.bool_]]]]) -> None:
        rows, found = result
        for k, (refined, there) in enumerate(found):
            score = np.where(there, refined.scores.cpu().double().numpy(), -np.inf)
            better = rows[score > scores[rows].max(axis=1)]
            quaternions[better] = refined.quaternions.cpu().double().numpy()[better - rows[0]]
            shifts[better] = refined.shifts.cpu().double().numpy()[better - rows[0]]
            scores[rows, k] = score
        progress(float(rows[-1] + 1) / count, "aligning", particles=float(rows[-1] + 1))

    size = batch_size(n, search.k_max, device, 1 if isinstance(compared, _Given) else 2)
    in_parallel(_batches(read, count, size, ids, n), work, threads if device == "cpu" else 1, done)
    labels = scores.argmax(axis=1)
    return Assignment(labels, Poses(Rotation.from_quat(quaternions), shifts, scores.max(axis=1)), scores)


class _Compared(Protocol):
    """What particles are compared to: for each class references, and for which of the particles they hold anything."""

    def references(
        self, rows: NDArray[np.int64], particles: torch.Tensor
    ) -> Iterator[tuple[References, NDArray[np.bool_]]]: ...


class _Given:
    """Averages that no particle compared is part of."""

    def __init__(self, averages: NDArray[np.float32], aligner: Aligner) -> None:
        self._references = [
            aligner.references(torch.from_numpy(prepare_reference(average)[None]).to(aligner.device))
            for average in averages
        ]

    def references(
        self, rows: NDArray[np.int64], particles: torch.Tensor
    ) -> Iterator[tuple[References, NDArray[np.bool_]]]:
        for references in self._references:
            yield references, np.ones(len(rows), dtype=np.bool_)


class _LeaveOneOut:
    """Averages of the particles themselves, each made without the particle that is compared to it."""

    def __init__(self, sums: ClassSums, search: Search, aligner: Aligner) -> None:
        n = search.box_size
        device = aligner.device
        # A little more than what is compared, for the interpolation at the band's edge.
        reach = min(search.k_max + 1.5, sums.band.k_max)
        self._band = Band(n, 1.0, reach, None, device)
        self._inner = torch.from_numpy(np.flatnonzero(sums.band.radius <= reach + 1e-6)).to(device)
        self._contributions = Contributions(self._band, search.transfer, point_group(search.symmetry), device)
        self._side = min(n, 2 * math.ceil(reach + 1) + 2)
        edge = max(1.0, self._side / 16)
        self._mask = torch.from_numpy(soft_sphere(self._side, self._side / 2 - edge, edge)).to(device)
        self._joined = max(n * search.voxel_size_angstrom / JOINED_ANGSTROM, JOINED_CYCLES)
        self._sums = sums
        self._aligner = aligner

    def references(
        self, rows: NDArray[np.int64], particles: torch.Tensor
    ) -> Iterator[tuple[References, NDArray[np.bool_]]]:
        own = self._contributions.of(particles, *self._sums.poses.tensors(rows, self._aligner.device))
        for components, there in self._sums.without(self._band, self._inner, self._joined, rows, own):
            volumes = volume_of(self._band, components, self._side) * self._mask
            yield self._aligner.references(volumes), there


# The loop


@dataclass(frozen=True)
class Round:
    """One round: particles per class, how many are in none because theirs was too small, how the number of classes was
    found (`Clusters.table`), how many components vary by more than noise, the adjusted Rand index with the round before
    (-1 in the first), and the mean score of the alignment, over all and by class.
    """

    sizes: tuple[int, ...]
    unassigned: int
    criterion: dict[str, object]
    components: int
    agreement: float
    mean_score: float
    class_scores: tuple[float, ...]


@dataclass(frozen=True)
class State:
    """Everything that a next round starts from; `to_arrays` and `from_arrays` keep it between processes."""

    labels: NDArray[np.int64]
    poses: Poses
    rounds: tuple[Round, ...] = ()

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The state as plain arrays."""
        rounds = json.dumps([asdict(r) for r in self.rounds]).encode()
        return {
            "labels": self.labels,
            "quaternions": np.atleast_2d(self.poses.rotations.as_quat()),
            "shifts": self.poses.shifts,
            "scores": self.poses.scores,
            "rounds": np.frombuffer(rounds, dtype=np.uint8),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, NDArray[np.generic]]) -> "State":
        """The state that `to_arrays` gave."""
        rounds = [
            Round(**{**r, "sizes": tuple(r["sizes"]), "class_scores": tuple(r["class_scores"])})
            for r in json.loads(arrays["rounds"].tobytes())
        ]
        poses = Poses(
            Rotation.from_quat(arrays["quaternions"].astype(np.float64)),
            arrays["shifts"].astype(np.float64),
            arrays["scores"].astype(np.float64),
        )
        return State(arrays["labels"].astype(np.int64), poses, tuple(rounds))


class Machinery(Protocol):
    """What the loop stands on. `classes` is at least 1; labels run from 0, -1 for particles in no class."""

    def align(self, poses: Poses, labels: NDArray[np.int64], classes: int, progress: Progress) -> Poses:
        """New poses of all particles, each in the class that it fits best, all in the frame of the old ones."""

    def reduce(self, poses: Poses, progress: Progress) -> tuple[NDArray[np.float32], int]:
        """Scores (particles, components) of the particles' differences, and how many components are significant."""


def iterate(
    machinery: Machinery,
    state: State,
    *,
    classes: int | None = None,
    largest: int = 8,
    iterations: int = 5,
    stable: float = 0.98,
    least: int = 5,
    seed: int = 0,
    progress: Progress = no_progress,
    checkpoint: Callable[[State], None] = lambda state: None,
) -> State:
    """The loop: poses, differences, clusters, until two rounds agree to an adjusted Rand index of `stable`, or for
    `iterations` rounds.

    The poses of the first state are used as they are. Clusters of fewer than `least` particles are no class: their
    particles are labelled -1 in this round, and stand again for the next; where no cluster is large enough, all
    particles are one class. With `classes` left out, their number is found anew in each round, from 1 to `largest`.
    """
    count = len(state.labels)
    while len(state.rounds) < iterations and not (state.rounds and state.rounds[-1].agreement >= stable):
        number = len(state.rounds)
        report = part(progress, number / iterations, (number + 1) / iterations)
        poses = state.poses
        if number > 0:
            poses = machinery.align(poses, state.labels, max(1, int(state.labels.max()) + 1), part(report, 0, 0.7))
        scores, components = machinery.reduce(poses, part(report, 0.7 if number > 0 else 0.0, 1.0))
        clusters = _clusters(scores, components, classes, largest, seed)
        labels = clusters.labels.copy()
        labels[clusters.sizes[labels] < least] = UNASSIGNED
        if (labels == UNASSIGNED).all():
            labels = np.zeros(count, dtype=np.int64)
        sizes = np.bincount(labels[labels != UNASSIGNED])
        done = Round(
            tuple(sizes.tolist()),
            int((labels == UNASSIGNED).sum()),
            clusters.table(),
            components,
            adjusted_rand_index(labels, state.labels) if number > 0 else -1.0,
            float(poses.scores.mean()),
            tuple(float(poses.scores[labels == k].mean()) for k in range(len(sizes))),
        )
        state = State(labels, poses, (*state.rounds, done))
        checkpoint(state)
    progress(1.0, "classifying")
    return state


def _clusters(scores: NDArray[np.float32], components: int, classes: int | None, largest: int, seed: int) -> Clusters:
    """Clusters of the significant components; one, where there is no such component and no number was asked for."""
    if classes is None and components == 0:
        return cluster(scores[:, :1], 1)
    return cluster(scores[:, : max(components, 1)], classes, largest=largest, seed=seed)


@dataclass(frozen=True)
class Classified:
    """The result: `labels` (particles,) from 0 by falling size, -1 for none; `poses`; `averages` (classes, n, n, n) and
    `half_maps` (classes, 2, n, n, n), unfiltered, of particles at mean 0 and deviation 1; `resolutions_angstrom`
    (classes,); and the rounds.
    """

    labels: NDArray[np.int64]
    poses: Poses
    averages: NDArray[np.float32]
    half_maps: NDArray[np.float32]
    halves: NDArray[np.int64]
    resolutions_angstrom: NDArray[np.float64]
    rounds: tuple[Round, ...]

    def table(self) -> dict[str, object]:
        """As the JSON table that the service stores."""
        return {
            "resolution_angstrom": self.resolutions_angstrom.tolist(),
            "rounds": [asdict(r) for r in self.rounds],
        }


@dataclass(frozen=True)
class _Particles:
    """The particles themselves, as the loop's machinery."""

    read: Reader
    count: int
    search: Search
    halves: NDArray[np.int64]
    names: NDArray[np.int64]
    components: int
    feature_cycles: float
    mask: NDArray[np.float32] | None
    scratch: Path | None
    seed: int
    device: str
    threads: int

    def sums(self, poses: Poses, labels: NDArray[np.int64], classes: int, progress: Progress) -> ClassSums:
        return class_sums(
            self.read,
            self.count,
            poses,
            labels,
            classes,
            self.search,
            halves=self.halves,
            names=self.names,
            device=self.device,
            threads=self.threads,
            progress=progress,
        )

    def align(self, poses: Poses, labels: NDArray[np.int64], classes: int, progress: Progress) -> Poses:
        sums = self.sums(poses, labels, classes, part(progress, 0, 0.1))
        # No finer than what the best class shows.
        n, voxel = self.search.box_size, self.search.voxel_size_angstrom
        reached = cycles_per_box(n, voxel, float(sums.resolutions(voxel).min()))
        k_max = min(max(reached, LEAST_CYCLES, self.search.k_min + 2), self.search.k_max)
        assigned = reassign(
            self.read,
            self.count,
            sums,
            replace(self.search, low_pass_angstrom=n * voxel / k_max),
            start=poses if self.search.max_angle_degrees is not None else None,
            names=self.names,
            device=self.device,
            threads=self.threads,
            progress=part(progress, 0.1, 1.0),
        )
        return assigned.poses

    def reduce(self, poses: Poses, progress: Progress) -> tuple[NDArray[np.float32], int]:
        everyone = np.zeros(self.count, dtype=np.int64)
        average = self.sums(poses, everyone, 1, part(progress, 0, 0.3)).averages()[0]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            differences = features(
                self.read,
                self.count,
                poses,
                average,
                self.search.transfer,
                k_min=self.search.k_min,
                k_max=min(self.feature_cycles, self.search.k_max),
                mask=self.mask,
                scratch=None if self.scratch is None else Path(folder),
                names=self.names,
                device=self.device,
                threads=self.threads,
                progress=part(progress, 0.3, 0.6),
            )
            values, weights = differences.values, differences.weights
            wanted = max(1, min(self.components, self.count // 4))
            pca = weighted_pca(values, weights, wanted, seed=self.seed, progress=part(progress, 0.6, 0.8))
            found, _ = significant(
                values,
                weights,
                pca,
                neighbourhoods(differences.points),
                seed=self.seed,
                progress=part(progress, 0.8, 1.0),
            )
        return pca.scores, found


def classify(
    read: Reader,
    count: int,
    start: Poses,
    search: Search,
    *,
    classes: int | None = None,
    largest: int = 8,
    iterations: int = 5,
    stable: float = 0.98,
    least: int = 5,
    components: int = 6,
    feature_cycles: float = 8.0,
    mask: NDArray[np.float32] | None = None,
    scratch: Path | None = None,
    halves: NDArray[np.int64] | None = None,
    seed: int = 0,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
    checkpoint: Callable[[State], None] = lambda state: None,
    resume: State | None = None,
) -> Classified:
    """Sort `count` particles, aligned to one average, into `classes` classes, or as many as there is evidence for.

    `start` are the poses of that alignment. Differences are looked for within `mask` (n, n, n), in the average's frame,
    up to `feature_cycles` cycles per box; `components` principal components at most describe them. For the rest see
    `iterate`. `halves` (count,), 0 or 1, are the half sets that `start` was found with, rows in turn where left out.
    Features are kept in a folder made in `scratch` where one is given, else in memory (`features_bytes`).

    `checkpoint` is called with the state after each round; a run that is given one of them as `resume` ends with the
    same result. The same seed gives the same result on the same device.

    Raises InvalidArgument for fewer than 8 particles, numbers that can't work, or a particle that can't be used.
    """
    search.check()
    if count < 8:
        raise InvalidArgument(f"classification needs at least 8 particles and got {count}")
    if len(start.shifts) != count:
        raise InvalidArgument(f"there are starting poses of {len(start.shifts)} particles, but {count} particles")
    for name, value in (("largest", largest), ("iterations", iterations), ("least", least), ("components", components)):
        if value < 1:
            raise InvalidArgument(f"{name} {value}: must be at least 1")
    if classes is not None and not 1 <= classes <= count:
        raise InvalidArgument(f"classes {classes}: must be 1 to {count}, the number of particles")
    if resume is not None and len(resume.labels) != count:
        raise InvalidArgument(f"the checkpoint is of {len(resume.labels)} particles, not of {count}")
    machinery = _Particles(
        read,
        count,
        search,
        np.arange(count) % 2 if halves is None else halves.astype(np.int64),
        np.arange(count) if names is None else names,
        components,
        feature_cycles,
        mask,
        scratch,
        seed,
        device,
        threads,
    )
    first = State(np.zeros(count, dtype=np.int64), start)
    state = iterate(
        machinery,
        first if resume is None else resume,
        classes=classes,
        largest=largest,
        iterations=iterations,
        stable=stable,
        least=least,
        seed=seed,
        progress=part(progress, 0.0, 0.95),
        checkpoint=checkpoint,
    )
    sums = machinery.sums(state.poses, state.labels, int(state.labels.max()) + 1, part(progress, 0.95, 1.0))
    return Classified(
        state.labels,
        state.poses,
        sums.averages(),
        sums.half_maps(),
        machinery.halves,
        sums.resolutions(search.voxel_size_angstrom),
        state.rounds,
    )
