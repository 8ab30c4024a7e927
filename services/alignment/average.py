"""Iterative alignment and averaging of subtomograms, with or without a first reference.

Each iteration aligns every particle to the average of the others, never one that contains it: its own term is
subtracted from the sum and the weight, exactly, before the division. Otherwise a particle fits best where it was, to
its own noise.

The particles are split into two halves for good. Below 1/50 Å both are aligned to the common average, which keeps the
halves in one frame and makes the start from few particles possible (in boxes smaller than 200 Å: below four cycles
per box); finer detail comes from a particle's own half only, so the Fourier shell correlation of the halves stays
honest there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.masks import centred_coordinates, soft_sphere
from cryofleet.numerics.rotations import point_group
from cryofleet.progress import Progress, no_progress, part
from services.alignment.align import (
    Aligner,
    Poses,
    Reader,
    Search,
    batch_size,
    check_particles,
    gather,
    in_parallel,
    prepare_reference,
    standardise,
)
from services.alignment.band import Band, cycles_per_box
from services.alignment.reconstruction import Contributions, HalfSums, divide, volume_of
from services.alignment.refinement import Refined
from services.alignment.symmetry_axes import find_axes

JOINED_ANGSTROM = 50.0
JOINED_CYCLES = 4.0
"""Coarser than this (Å), or than so many cycles per box, both halves are aligned to the average of all."""
START_CYCLES = 5.0
"""The first low-pass in cycles per box: about a third of a particle that fills two thirds of its box."""
LARGEST_RISE_CYCLES = 2.5
"""The low-pass rises by at most this much per iteration."""
SEEDS = 4
"""Particles that are tried as a first reference where there is none."""
SEED_PARTICLES = 32
"""So many particles are aligned to each seed to judge it."""
FSC_THRESHOLD = 0.143


_Batch = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class Iteration:
    """What one iteration reached: scores of the particles, resolution of the halves after it, and what was compared."""

    mean_score: float
    resolution_angstrom: float
    low_pass_angstrom: float


@dataclass(frozen=True)
class State:
    """Everything that a next iteration starts from; `to_arrays` and `from_arrays` keep it between processes."""

    iteration: int
    quaternions: NDArray[np.float64]
    shifts: NDArray[np.float64]
    scores: NDArray[np.float64]
    low_pass_cycles: float
    history: tuple[Iteration, ...]

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The state as plain arrays."""
        history = [[h.mean_score, h.resolution_angstrom, h.low_pass_angstrom] for h in self.history]
        return {
            "quaternions": self.quaternions,
            "shifts": self.shifts,
            "scores": self.scores,
            "history": np.array(history, dtype=np.float64).reshape(-1, 3),
            "iteration": np.array([self.iteration, self.low_pass_cycles], dtype=np.float64),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, NDArray[np.float64]]) -> "State":
        """The state that `to_arrays` gave."""
        history = tuple(Iteration(*(float(v) for v in row)) for row in arrays["history"])
        iteration, cycles = arrays["iteration"]
        return State(int(iteration), arrays["quaternions"], arrays["shifts"], arrays["scores"], float(cycles), history)


@dataclass(frozen=True)
class Averaged:
    """The result: volumes `[z, y, x]` with protein of the particles' sign, poses, half set (1 or 2) of each particle,
    and the Fourier shell correlation of the halves within a soft sphere and without a mask (shells in 1/Å).
    """

    average: NDArray[np.float32]
    half_maps: tuple[NDArray[np.float32], NDArray[np.float32]]
    poses: Poses
    halves: NDArray[np.int32]
    frequency_per_angstrom: NDArray[np.float64]
    fsc: NDArray[np.float64]
    fsc_unmasked: NDArray[np.float64]
    resolution_angstrom: float
    joined_angstrom: float
    iterations: tuple[Iteration, ...]

    def table(self) -> dict[str, object]:
        """Curve and history as the JSON table that the service stores."""
        return {
            "frequency_per_angstrom": self.frequency_per_angstrom.tolist(),
            "fsc": self.fsc.tolist(),
            "fsc_unmasked": self.fsc_unmasked.tolist(),
            "mask": "soft sphere of 0.8 of the box's diameter",
            "threshold": FSC_THRESHOLD,
            "halves_joined_below_angstrom": self.joined_angstrom,
            "resolution_angstrom": self.resolution_angstrom,
            "iterations": [asdict(i) for i in self.iterations],
        }


class _Averaging:
    """One run; `average` is its face."""

    def __init__(
        self,
        read: Reader,
        count: int,
        search: Search,
        symmetry: str,
        protein_sign: float,
        seed: int,
        names: NDArray[np.int64],
        device: str,
        threads: int,
    ) -> None:
        self.search = search
        self.count = count
        self.names = names
        self.device = device
        self.threads = threads if device == "cpu" else 1
        self.sign = protein_sign
        self._read = read
        self._rng = np.random.default_rng(seed)
        order = self._rng.permutation(count)
        self.halves = np.empty(count, dtype=np.int32)
        self.halves[order[: (count + 1) // 2]] = 1
        self.halves[order[(count + 1) // 2 :]] = 2
        self.symmetry = symmetry
        n = search.box_size
        self.band = Band(n, 1.0, n / 2 - 0.5, None, device)
        self.impose(symmetry)
        self.k_limit = search.k_max
        self.k_start = min(max(START_CYCLES, search.k_min + 2), self.k_limit)
        self.k_joined = max(n * search.voxel_size_angstrom / JOINED_ANGSTROM, JOINED_CYCLES)
        self._mask = soft_sphere(n, 0.4 * n, max(2.0, n / 16))

    def impose(self, symmetry: str) -> None:
        """Symmetrise the averages from here on."""
        self.group = point_group(symmetry)
        self.contributions = Contributions(self.band, self.search.transfer, self.group, self.device)

    # Particles

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[_Batch]:
        """Row numbers and standardised boxes, protein positive, batch by batch."""
        every = np.arange(self.count) if rows is None else np.asarray(rows, dtype=np.int64)
        size = batch_size(self.search.box_size, self.search.k_max, self.device, self.count)
        for first in range(0, len(every), size):
            chosen = every[first : first + size]
            if rows is None:
                boxes = self._read(int(chosen[0]), len(chosen))
            else:
                boxes = np.concatenate([self._read(int(i), 1) for i in chosen])
            check_particles(boxes, self.names[chosen], self.search.box_size)
            yield chosen, standardise(boxes) * np.float32(self.sign)

    def tensor(self, boxes: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(boxes).to(self.device)

    def poses_of(self, state: State, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        quaternions = torch.from_numpy(state.quaternions[rows]).float().to(self.device)
        return quaternions, torch.from_numpy(state.shifts[rows]).float().to(self.device)

    # Maximisation

    def accumulate(self, state: State, progress: Progress, rows: Sequence[int] | None = None) -> HalfSums:
        """Sum the particles at their poses, half by half."""
        sums = torch.zeros((2, len(self.band)), dtype=torch.complex128, device=self.device)
        weights = torch.zeros((2, len(self.band)), dtype=torch.float64, device=self.device)
        counts = [0, 0]
        finished = 0
        total = self.count if rows is None else len(rows)

        def work(batch: _Batch) -> tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]:
            chosen, boxes = batch
            terms, coverage = self.contributions.of(self.tensor(boxes), *self.poses_of(state, chosen))
            return chosen, terms, coverage

        def done(result: tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]) -> None:
            nonlocal finished
            chosen, terms, coverage = result
            for half in (0, 1):
                mine = torch.from_numpy(self.halves[chosen] == half + 1).to(self.device)
                sums[half] += terms[mine].sum(dim=0)
                weights[half] += coverage[mine].sum(dim=0)
                counts[half] += int(mine.sum())
            finished += len(chosen)
            progress(finished / total, "averaging", particles=finished)

        in_parallel(self.batches(rows), work, self.threads, done)
        return HalfSums(sums.to(torch.complex64), weights.float(), (counts[0], counts[1]))

    def halves_of(self, sums: HalfSums) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The two half maps."""
        counts = torch.tensor(sums.counts, device=self.device)[:, None]
        volumes = volume_of(self.band, divide(sums.sums, sums.weights, counts)).cpu().numpy()
        return volumes[0], volumes[1]

    def centre(self, sums: HalfSums, state: State) -> tuple[HalfSums, State]:
        """Move the average's mass to the box's centre, and all shifts with it, so that the particle can't drift out."""
        below = self.band.radius <= self.k_start
        total = divide(sums.sums.sum(dim=0), sums.weights.sum(dim=0), sum(sums.counts)) * torch.from_numpy(below).to(
            self.device
        )
        volume = volume_of(self.band, total[None])[0].cpu().numpy() * self._mask
        mass = np.maximum(volume - 0.25 * volume.max(), 0.0).astype(np.float64)
        r = centred_coordinates(self.search.box_size).astype(np.float64)
        centre = np.array([(mass.sum(axis=axes) * r).sum() for axes in ((0, 1), (0, 2), (1, 2))]) / max(
            mass.sum(), 1e-30
        )
        # What the symmetry maps elsewhere can't move; rounding apart, it has not.
        centre = self.group.apply(centre).mean(axis=0)
        shifts = state.shifts + Rotation.from_quat(state.quaternions).apply(centre)
        return sums.moved(self.band, centre), replace(state, shifts=shifts)

    def curve(self, sums: HalfSums) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
        """Frequencies in 1/Å, masked and unmasked FSC of the halves, and the resolution by the masked one."""
        first, second = self.halves_of(sums)
        frequency, masked = fsc(first, second, self._mask)
        _, unmasked = fsc(first, second)
        voxel = self.search.voxel_size_angstrom
        return frequency / voxel, masked, unmasked, resolution(frequency, masked, voxel, FSC_THRESHOLD)

    # Expectation

    def without(
        self, band: Band, sums: HalfSums, rows: NDArray[np.int64], terms: torch.Tensor, coverage: torch.Tensor
    ) -> torch.Tensor:
        """The averages without each of the given particles (batch, components): what each may be compared to."""
        half = torch.from_numpy(self.halves[rows].astype(np.int64) - 1).to(self.device)
        joined = torch.from_numpy(band.radius <= self.k_joined).to(self.device)
        counts = torch.tensor(sums.counts, device=self.device)
        own = divide(sums.sums[half] - terms, sums.weights[half] - coverage, counts[half][:, None] - 1)
        total = sum(sums.counts)
        every = divide(sums.sums.sum(dim=0) - terms, sums.weights.sum(dim=0) - coverage, total - 1)
        return torch.where(joined, every, own)

    def _narrowed(self, k_max: float) -> Aligner:
        low_pass = self.search.box_size * self.search.voxel_size_angstrom / k_max
        return Aligner(replace(self.search, low_pass_angstrom=low_pass), self.device)

    def align(
        self, sums: HalfSums, state: State, k_max: float, progress: Progress, rows: Sequence[int] | None = None
    ) -> Poses:
        """Align every particle to the average of the others; `sums` are of the same particles at the poses of
        `state`.
        """
        aligner = self._narrowed(k_max)
        n = self.search.box_size
        # A little more than what is compared, for the interpolation at the band's edge.
        reach = min(k_max + 1.5, self.band.k_max)
        inner = Band(n, 1.0, reach, None, self.device)
        place = torch.from_numpy(np.flatnonzero(self.band.radius <= reach + 1e-6)).to(self.device)
        inner_sums = HalfSums(sums.sums[:, place], sums.weights[:, place], sums.counts)
        m = min(n, 2 * math.ceil(reach + 1) + 2)
        edge = max(1.0, m / 16)
        mask = torch.from_numpy(soft_sphere(m, m / 2 - edge, edge)).to(self.device)
        contributions = Contributions(inner, self.search.transfer, self.group, self.device)

        def work(batch: _Batch) -> Refined:
            chosen, boxes = batch
            particles = self.tensor(boxes)
            terms, coverage = contributions.of(particles, *self.poses_of(state, chosen))
            components = self.without(inner, inner_sums, chosen, terms, coverage)
            references = aligner.references(volume_of(inner, components, m) * mask)
            return aligner.align(particles, references)

        return self._collect(work, progress, rows)

    def align_to(
        self, volume: NDArray[np.float32], k_max: float, progress: Progress, rows: Sequence[int] | None = None
    ) -> Poses:
        """Align particles to one given volume, prepared and with protein positive."""
        aligner = self._narrowed(k_max)
        references = aligner.references(self.tensor(volume)[None])

        def work(batch: _Batch) -> Refined:
            return aligner.align(self.tensor(batch[1]), references)

        return self._collect(work, progress, rows)

    def _collect(
        self,
        work: Callable[[_Batch], Refined],
        progress: Progress,
        rows: Sequence[int] | None,
    ) -> Poses:
        results: list[Refined] = []
        finished = 0
        total = self.count if rows is None else len(rows)

        def done(result: Refined) -> None:
            nonlocal finished
            results.append(result)
            finished += len(result.scores)
            progress(finished / total, "aligning", particles=finished)

        in_parallel(self.batches(rows), work, self.threads, done)
        return gather(results)

    # The start

    def first_poses(self, progress: Progress) -> State:
        """Poses to begin with where there are none: those found against the best of a few single particles.

        An average at random orientations is a round blob, which iterations leave slowly or never. One particle has the
        structure, if with noise and a wedge of its own. Each seed is judged by how well a subset of the particles then
        agrees with its own average, each left out of it in turn.
        """
        seeds = self._rng.permutation(self.count)[:SEEDS]
        subset = np.sort(self._rng.permutation(self.count)[:SEED_PARTICLES]).tolist()
        best: tuple[float, NDArray[np.float32]] | None = None
        self.impose("C1")
        for i, seed in enumerate(seeds):
            report = part(progress, 0.8 * i / len(seeds), 0.8 * (i + 1) / len(seeds))
            _, boxes = next(self.batches([int(seed)]))
            poses = self.align_to(prepare_reference(boxes[0]), self.k_start, part(report, 0, 0.4), subset)
            state = self.state_from(poses, subset)
            sums = self.accumulate(state, part(report, 0.4, 0.5), subset)
            poses = self.align(sums, state, self.k_start, part(report, 0.5, 0.9), subset)
            score = float(poses.scores.mean())
            if best is None or score > best[0]:
                state = self.state_from(poses, subset)
                sums, _ = self.centre(self.accumulate(state, part(report, 0.9, 1.0), subset), state)
                best = score, self.joint(sums)
        assert best is not None
        volume = prepare_reference(best[1])
        frame = Rotation.identity()
        self.impose(self.symmetry)
        if len(self.group) > 1:
            # A particle lies in its box anyhow; the axes of its symmetry are found before it is imposed.
            frame = find_axes(volume, self.k_start, self.group, self.device)
        poses = self.align_to(volume, self.k_start, part(progress, 0.8, 1.0))
        return self.state_from(replace(poses, rotations=poses.rotations * frame), None)

    def joint(self, sums: HalfSums) -> NDArray[np.float32]:
        """The average of all particles."""
        total = divide(sums.sums.sum(dim=0), sums.weights.sum(dim=0), sum(sums.counts))
        return volume_of(self.band, total[None])[0].cpu().numpy()

    def state_from(self, poses: Poses, rows: Sequence[int] | None) -> State:
        """A state at iteration 0 with these poses for `rows`, and no others."""
        where = np.arange(self.count) if rows is None else np.asarray(rows)
        quaternions = np.zeros((self.count, 4))
        quaternions[:, 3] = 1.0
        shifts, scores = np.zeros((self.count, 3)), np.zeros(self.count)
        quaternions[where], shifts[where], scores[where] = poses.rotations.as_quat(), poses.shifts, poses.scores
        return State(0, quaternions, shifts, scores, self.k_start, ())

    # All of it

    def begin(self, start: Poses | None, reference: NDArray[np.float32] | None, progress: Progress) -> State:
        """The state before the first iteration that aligns to the particles' own average."""
        if reference is not None:
            volume = prepare_reference(reference * np.float32(self.sign))
            return self.state_from(self.align_to(volume, self.k_start, progress), None)
        if start is not None:
            return self.state_from(start, None)
        return self.first_poses(progress)

    def next_cycles(self, state: State, resolution_angstrom: float) -> float:
        """The low-pass of the next iteration in cycles per box: what the halves agree on, rising gently."""
        box = self.search.box_size
        reached = cycles_per_box(box, self.search.voxel_size_angstrom, resolution_angstrom)
        if state.iteration == 0:
            return self.k_start
        return min(max(reached, self.k_start), state.low_pass_cycles + LARGEST_RISE_CYCLES, self.k_limit)

    def run(self, state: State, iterations: int, progress: Progress, checkpoint: Callable[[State], None]) -> Averaged:
        """Iterate from `state` on."""
        box = self.search.box_size * self.search.voxel_size_angstrom
        first = state.iteration
        steps = iterations - first + 0.2
        while True:
            report = part(progress, (state.iteration - first) / steps, min(1.0, (state.iteration - first + 1) / steps))
            # From the poses alone, so that a resumed run goes through the very same numbers.
            sums, state = self.centre(self.accumulate(state, part(report, 0.0, 0.15)), state)
            frequency, masked, unmasked, reached = self.curve(sums)
            if state.history:
                done = replace(state.history[-1], resolution_angstrom=reached)
                state = replace(state, history=(*state.history[:-1], done))
            if state.iteration >= iterations:
                break
            k_max = self.next_cycles(state, reached)
            poses = self.align(sums, state, k_max, part(report, 0.15, 1.0))
            latest = Iteration(float(poses.scores.mean()), math.nan, box / k_max)
            state = State(
                state.iteration + 1,
                poses.rotations.as_quat(),
                poses.shifts,
                poses.scores,
                k_max,
                (*state.history, latest),
            )
            checkpoint(state)
        halves = self.halves_of(sums)
        average = low_pass(self.joint(sums), reached, self.search.voxel_size_angstrom)
        sign = np.float32(self.sign)
        return Averaged(
            average * sign,
            (halves[0] * sign, halves[1] * sign),
            Poses(Rotation.from_quat(state.quaternions), state.shifts, state.scores),
            self.halves,
            frequency,
            masked,
            unmasked,
            reached,
            box / self.k_joined,
            state.history,
        )


def _ignore(state: State) -> None:
    """For runs whose states nobody keeps."""


def average(
    read: Reader,
    count: int,
    search: Search,
    *,
    iterations: int = 6,
    symmetry: str = "C1",
    contrast: str = "light",
    start: Poses | None = None,
    reference: NDArray[np.float32] | None = None,
    seed: int = 0,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
    checkpoint: Callable[[State], None] = _ignore,
    resume: State | None = None,
) -> Averaged:
    """Align and average `count` particles `iterations` times.

    `read(first, count)` gives boxes of `search.box_size` with protein of the sign that `contrast` says (dark or
    light); the averages have it too. The first average is made at the poses of `start`, or at those found against
    `reference` (of the particles' contrast, its symmetry axes along the frame's), or, with neither, at those found
    against the best of a few single particles. The low-pass begins at five cycles per box and follows the halves' FSC
    up to `search`'s.

    `checkpoint` is called with the state after the start and after each iteration; a run that is given one of them as
    `resume` ends with the same result. The same seed gives the same result on the same device, whatever `threads`.

    Raises InvalidArgument for fewer than two particles, a particle or reference that is constant, not finite or of
    another box, a point group that is none, or a search that can't work.
    """
    search.check()
    if count < 2:
        raise InvalidArgument(f"averaging needs at least 2 particles, one for each half set, and got {count}")
    if iterations < 1:
        raise InvalidArgument(f"iterations {iterations}: must be at least 1")
    if contrast not in ("dark", "light"):
        raise InvalidArgument(f"contrast {contrast!r}: must be dark or light")
    if reference is not None and reference.shape != (search.box_size,) * 3:
        raise InvalidArgument(
            f"the reference is {reference.shape}, the particles are boxes of {search.box_size} voxels"
        )
    if start is not None and len(start.shifts) != count:
        raise InvalidArgument(f"there are starting poses of {len(start.shifts)} particles, but {count} particles")
    if resume is not None and len(resume.shifts) != count:
        raise InvalidArgument(f"the checkpoint is of {len(resume.shifts)} particles, not of {count}")
    ids = np.arange(count) if names is None else names
    sign = -1.0 if contrast == "dark" else 1.0
    averaging = _Averaging(read, count, search, symmetry, sign, seed, ids, device, threads)
    if resume is not None:
        return averaging.run(resume, iterations, progress, checkpoint)
    seedless = start is not None and reference is None
    share = 0.0 if seedless else 0.3 if reference is None else 0.1
    state = averaging.begin(start, reference, part(progress, 0.0, share))
    checkpoint(state)
    return averaging.run(state, iterations, part(progress, share, 1.0), checkpoint)
