"""Aligning subtomograms to a reference: candidates by rotational matching, their shifts, then local refinement."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import radius_grid, soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group, rotation_grid
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.progress import Progress, no_progress
from services.alignment.band import Band, cycles_per_box, rotation_matrices
from services.alignment.refinement import Refined, refine
from services.alignment.reliability import band_cycles, particle_sphere, weights
from services.alignment.rotational_matching import MagnitudeModel, RotationalMatcher
from services.alignment.translation import ShiftSearch

SEARCH_CYCLES = 9.0
"""The global search never uses detail finer than this many cycles per box: its grid of 5 degrees could not follow it.
"""
REFINED_COARSELY = 6
REFINED_FINELY = 2
"""Of the candidates, so many are refined within the band of the search, and so many of those in the full band."""
COARSE_STEPS, FINE_STEPS = 4, 3
"""By so many steps each; more change a pose by less than its error, with noise or without."""

EXHAUSTED_AT_ONCE = 512
"""Of an exhaustive search's rotations, so many are compared together."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Poses:
    """Orientations of particles: `rotations` take the reference onto each, `shifts` (n, 3) are (x, y, z) in voxels,
    applied after the rotation; `scores` (n,) are the constrained correlations, -1 to 1.
    """

    rotations: Rotation
    shifts: NDArray[np.float64]
    scores: NDArray[np.float64]

    def tensors(self, rows: NDArray[np.int64], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Quaternions (rows, 4) and shifts (rows, 3) of some of them."""
        quaternions = torch.from_numpy(np.atleast_2d(self.rotations.as_quat())[rows]).float().to(device)
        return quaternions, torch.from_numpy(self.shifts[rows]).float().to(device)


@dataclass(frozen=True)
class Search:
    """What is compared, and how widely it is looked.

    Resolutions in Å; `None` stands for the coarsest or finest sensible: the box, and twice the Nyquist limit (four
    voxels), but what the reference is found to tell in `align`. `transfer` is what imaging left of each component, on
    the half grid (n, n, n // 2 + 1) of `rfftn`: a wedge mask, or CTF and dose (`cryofleet.numerics.transfer`); None
    where nothing is missing. `reference_transfer` is that of the reference, where it is itself a subtomogram or an
    average that lacks components. `symmetry` is the reference's point group, its main axis along z: of rotations that
    look alike only one is a candidate. With `exhaustive_step_degrees` every rotation of a uniform grid is tried in
    place of the matching's candidates, as a slow check on them. `max_angle_degrees` and `max_shift_voxels` are counted
    from the pose that a particle starts from where it has one.
    """

    box_size: int
    voxel_size_angstrom: float
    transfer: NDArray[np.float32] | None = field(default=None, compare=False)
    low_pass_angstrom: float | None = None
    high_pass_angstrom: float | None = None
    max_candidates: int = 50
    max_shift_voxels: float | None = None
    max_angle_degrees: float | None = None
    symmetry: str = "C1"
    reference_transfer: NDArray[np.float32] | None = field(default=None, compare=False)
    exhaustive_step_degrees: float | None = None

    def check(self) -> None:
        """Raise InvalidArgument where a value can't work."""
        if self.box_size < 8:
            raise InvalidArgument(f"boxes of {self.box_size} voxels are too small to align: at least 8 are needed")
        if not self.voxel_size_angstrom > 0:
            raise InvalidArgument(f"voxel_size_angstrom {self.voxel_size_angstrom:g}: must be positive")
        for transfer in (self.transfer, self.reference_transfer):
            if transfer is not None:
                check_transfer(transfer, self.box_size)
        point_group(self.symmetry)
        if self.low_pass_angstrom is not None and self.k_max < 2:
            limit = self.box_size * self.voxel_size_angstrom / 2
            raise InvalidArgument(
                f"low_pass_angstrom {self.low_pass_angstrom:g}: leaves nothing to compare in a box of {2 * limit:g} Å; "
                f"at most {limit:g} is possible"
            )
        if self.k_min >= self.k_max:
            raise InvalidArgument(
                f"high_pass_angstrom {self.high_pass_angstrom or 0:g}: must be larger than the low-pass, "
                f"{self.box_size * self.voxel_size_angstrom / self.k_max:g} Å"
            )
        if self.max_candidates < 1:
            raise InvalidArgument(f"max_candidates {self.max_candidates}: must be at least 1")
        if self.max_angle_degrees is not None and not self.max_angle_degrees >= 0:
            raise InvalidArgument(f"max_angle_degrees {self.max_angle_degrees:g}: must not be negative")

    @property
    def k_max(self) -> float:
        """Low-pass in cycles per box."""
        return cycles_per_box(
            self.box_size, self.voxel_size_angstrom, self.low_pass_angstrom or 4 * self.voxel_size_angstrom
        )

    @property
    def k_min(self) -> float:
        """High-pass in cycles per box; at least one."""
        if self.high_pass_angstrom is None:
            return 1.0
        return max(1.0, self.box_size * self.voxel_size_angstrom / self.high_pass_angstrom)

    @property
    def shift_limit(self) -> float:
        """`max_shift_voxels`, a quarter of the box where it is left out."""
        limit = self.box_size / 4 if self.max_shift_voxels is None else self.max_shift_voxels
        return min(limit, self.box_size / 2)


@dataclass(frozen=True)
class References:
    """A batch of references, ready to be compared: one for all particles of a batch, or one for each."""

    coarse: SpectrumTable
    fine: SpectrumTable
    magnitudes: MagnitudeModel


def check_transfer(transfer: NDArray[np.float32], box_size: int) -> None:
    """Raise InvalidArgument unless a transfer function fits the box, is finite, and leaves something to compare."""
    expected = (box_size, box_size, box_size // 2 + 1)
    if transfer.shape != expected:
        raise InvalidArgument(
            f"the wedge mask or transfer function is {transfer.shape} on the half grid: "
            f"boxes of {box_size} voxels need {expected}"
        )
    if not np.isfinite(transfer).all():
        raise InvalidArgument("the wedge mask or transfer function holds values that are not finite (NaN or infinity)")
    if not transfer.ravel()[1:].any():
        raise InvalidArgument("the wedge mask or transfer function is zero everywhere: nothing was imaged")


class Aligner:
    """All tables of one search on one device; cheap to keep, safe to share between threads.

    `deviation` is the noise's by shell, as `Band` has it; `reach_voxels` how far from its centre the reference gets.
    """

    def __init__(
        self,
        search: Search,
        device: str = "cpu",
        deviation: NDArray[np.float64] | None = None,
        reach_voxels: float | None = None,
    ) -> None:
        search.check()
        self.search = search
        self.device = device
        n = search.box_size
        k_coarse = min(search.k_max, max(SEARCH_CYCLES, search.k_min + 2))
        self.fine = Band(n, search.k_min, search.k_max, search.transfer, device, deviation)
        self.coarse = Band(n, search.k_min, k_coarse, search.transfer, device, deviation)
        group = torch.from_numpy(np.atleast_2d(point_group(search.symmetry).as_quat())).float().to(device)
        self._matcher = RotationalMatcher(self.coarse, group, search.reference_transfer)
        self._shifts = ShiftSearch(self.coarse, search.shift_limit)
        self._every: torch.Tensor | None = None
        if search.exhaustive_step_degrees is not None:
            every = rotation_grid(search.exhaustive_step_degrees, search.symmetry).as_quat()
            self._every = torch.from_numpy(every).float().to(device)
        edge = usual_edge_voxels(n)
        seen = n / 2 - edge if reach_voxels is None else min(n / 2 - edge, reach_voxels + search.shift_limit)
        mask = soft_sphere(n, seen, edge)
        self._mask = torch.from_numpy(mask).to(device)

    def references(self, volumes: torch.Tensor) -> References:
        """Prepare references (batch, m, m, m); m may be smaller than the box if it still holds the band."""
        k_coarse = max(self._matcher.reach, self.coarse.k_max)
        coarse = SpectrumTable(volumes, k_coarse)
        fine = (
            coarse
            if self.fine.k_max <= k_coarse
            else SpectrumTable(volumes, self.fine.k_max, oversampling(self.fine.k_max))
        )
        return References(coarse, fine, self._matcher.model(coarse))

    def candidates(
        self, particles: torch.Tensor, references: References, near: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate rotations (batch, candidates, 4) of particles (batch, n, n, n), and which of them are real ones.

        Where rotations `near` (batch, 4) are given, only those within `max_angle_degrees` of them, and themselves.
        """
        # The mask keeps the noise in the box's corners out of the magnitudes.
        magnitudes = self.coarse.of(centred_rfft(particles * self._mask)).abs()
        limit = self.search.max_angle_degrees
        around = None if near is None or limit is None else (near, limit)
        return self._matcher.candidates(magnitudes, references.magnitudes, self.search.max_candidates, around)

    def shifts(
        self, spectra: torch.Tensor, references: References, quaternions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best shift (batch, candidates, 3) for each rotation (batch, candidates, 4) within the coarse band, and
        the correlation there."""
        return self._best_shifts(self.coarse.of(spectra), references, quaternions)

    def _best_shifts(
        self, coarse: torch.Tensor, references: References, quaternions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, count = quaternions.shape[:2]
        models = self.coarse.imaged(references.coarse.rotated(self.coarse.points, rotation_matrices(quaternions)))
        shifts, overlaps = self._shifts.best((coarse[:, None] * models.conj()).flatten(0, 1))
        scores = overlaps.view(batch, count) * models.abs().square().sum(-1).clamp(min=1e-30).rsqrt()
        return shifts.view(batch, count, 3), scores

    def align(
        self, particles: torch.Tensor, references: References, start: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Refined:
        """The best pose of each particle (batch, n, n, n), searched over all rotations, or around `start`: quaternions
        (batch, 4) and shifts (batch, 3).
        """
        limit = self.search.max_angle_degrees
        near = None if start is None else start[0]
        around = None if near is None or limit is None else (near, limit)
        spectra = centred_rfft(particles)
        coarse, fine = self.coarse.of(spectra), self.fine.of(spectra)
        if start is not None:
            coarse, fine = self.coarse.moved(coarse, -start[1]), self.fine.moved(fine, -start[1])
        if self._every is None:
            quaternions, found = self.candidates(particles, references, near)
        else:
            quaternions, found = self._exhausted(self._every, coarse, references, around)
        result = self._align(coarse, fine, references, quaternions, found, around)
        if start is None:
            return result
        return Refined(result.quaternions, result.shifts + start[1], result.scores)

    def _exhausted(
        self,
        every: torch.Tensor,
        coarse: torch.Tensor,
        references: References,
        around: tuple[torch.Tensor, float] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of all rotations of a grid, each with its best shift: what `candidates` gives."""
        batch = len(coarse)
        scores = torch.cat(
            [
                self._best_shifts(coarse, references, part.expand(batch, -1, -1))[1]
                for part in torch.split(every, max(1, EXHAUSTED_AT_ONCE // batch))
            ],
            dim=1,
        )
        if around is not None:
            near, degrees = around
            close = (near @ every.T).abs() >= math.cos(math.radians(min(degrees, 180.0)) / 2)
            scores = torch.where(close, scores, -torch.inf)
        best = torch.topk(scores, min(self.search.max_candidates, len(every)), dim=1)
        return every[best.indices], best.values > -torch.inf

    def _align(
        self,
        coarse: torch.Tensor,
        fine: torch.Tensor,
        references: References,
        quaternions: torch.Tensor,
        found: torch.Tensor,
        around: tuple[torch.Tensor, float] | None = None,
    ) -> Refined:
        shifts, scores = self._best_shifts(coarse, references, quaternions)
        scores = torch.where(found, scores, -torch.inf)
        top = torch.topk(scores, min(REFINED_COARSELY, found.shape[1]), dim=1).indices[..., None]
        quaternions = torch.take_along_dim(quaternions, top, dim=1)
        shifts = torch.take_along_dim(shifts, top, dim=1)
        found = torch.take_along_dim(found, top[..., 0], dim=1)
        limit = self.search.shift_limit
        result = refine(self.coarse, coarse, references.coarse, quaternions, shifts, limit, COARSE_STEPS, around)
        return self._finish(fine, references, result, found, around)

    def _finish(
        self,
        fine: torch.Tensor,
        references: References,
        poses: Refined,
        found: torch.Tensor,
        around: tuple[torch.Tensor, float] | None,
    ) -> Refined:
        scores = torch.where(found, poses.scores, -torch.inf)
        top = torch.topk(scores, min(REFINED_FINELY, scores.shape[1]), dim=1).indices[..., None]
        result = refine(
            self.fine,
            fine,
            references.fine,
            torch.take_along_dim(poses.quaternions, top, dim=1),
            torch.take_along_dim(poses.shifts, top, dim=1),
            self.search.shift_limit,
            FINE_STEPS,
            around,
        )
        best = result.scores.argmax(dim=1)[:, None]
        return Refined(
            torch.take_along_dim(result.quaternions, best[..., None], dim=1)[:, 0],
            torch.take_along_dim(result.shifts, best[..., None], dim=1)[:, 0],
            torch.take_along_dim(result.scores, best, dim=1)[:, 0],
        )


def prepare_reference(reference: NDArray[np.float32], mask: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """A reference with its surroundings at zero: the mean beyond the mask removed, and multiplied by it.

    Without a mask of its own, the sphere that the box holds. Raises InvalidArgument where the reference is no cube, not
    finite, or constant, or where the mask does not fit.
    """
    if reference.ndim != 3 or len(set(reference.shape)) != 1:
        raise InvalidArgument(f"the reference is {reference.shape}: it must be a cube")
    if not np.isfinite(reference).all():
        raise InvalidArgument("the reference holds values that are not finite (NaN or infinity)")
    if float(np.ptp(reference)) == 0:
        raise InvalidArgument("the reference is constant: there is nothing to align to")
    n = reference.shape[0]
    outside = radius_grid(n) >= n / 2
    edge = usual_edge_voxels(n)
    if mask is None:
        mask = soft_sphere(n, n / 2 - edge, edge)
    else:
        check_mask(mask, n)
        outside |= mask <= 0
    level = reference[outside].mean()
    return np.asarray((reference - level) * mask, dtype=np.float32)


def check_mask(mask: NDArray[np.float32], box_size: int) -> None:
    """Raise InvalidArgument unless a mask has the box's shape, lies in 0 to 1, and is not empty."""
    if mask.shape != (box_size,) * 3:
        raise InvalidArgument(f"the mask is {mask.shape}, the particles are boxes of {box_size} voxels")
    if not (np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1 + 1e-6):
        raise InvalidArgument("the mask holds values outside 0 to 1")
    if not mask.any():
        raise InvalidArgument("the mask is zero everywhere")


def check_particles(particles: NDArray[np.float32], names: NDArray[np.int64], box_size: int) -> None:
    """Raise InvalidArgument naming the first particle that can't be aligned: wrong box, not finite, or constant."""
    if particles.shape[1:] != (box_size,) * 3:
        raise InvalidArgument(
            f"particle {names[0] if len(names) else 0} is a box of {particles.shape[1:]} voxels: "
            f"{box_size} along each axis are expected"
        )
    flat = particles.reshape(len(particles), -1)
    low, high = flat.min(axis=1), flat.max(axis=1)
    for i in np.flatnonzero(~np.isfinite(low) | ~np.isfinite(high)):
        raise InvalidArgument(f"particle {names[i]} holds values that are not finite (NaN or infinity): leave it out")
    for i in np.flatnonzero(low == high):
        raise InvalidArgument(f"particle {names[i]} is constant ({low[i]:g} everywhere): leave it out")


def standardise(particles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each box (batch, n, n, n) with mean 0 and deviation 1, so that all count the same."""
    mean = particles.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
    deviation = particles.std(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
    return np.asarray((particles - mean) / deviation, dtype=np.float32)


def oversampling(k_max: float) -> int:
    """Of the table for the final refinement: fourfold, less where that would outgrow the caches by far."""
    return 4 if k_max <= 16 else 3


def batch_size(box_size: int, k_max: float, device: str, references: int = 1) -> int:
    """Particles per batch: on a CPU what stays near the caches, on a GPU what fills it; few where each has a big
    reference of its own.
    """
    largest = 64 if device != "cpu" else 4 if box_size <= 64 else 2
    if references == 1:
        return largest
    room = (64 << 20) if device == "cpu" else (4 << 30)
    return max(1, min(largest, room // SpectrumTable.bytes_for(k_max, oversampling(k_max))))


def _one_thread() -> None:
    # Batches run beside one another; results then do not depend on how many threads there are.
    torch.set_num_threads(1)


def in_parallel(
    items: Iterator[_Item], work: Callable[[_Item], _Result], threads: int, done: Callable[[_Result], None]
) -> None:
    """Call `work` on each item in `threads` workers, and `done` here with each result in the order of the items.

    At most 2 x `threads` items are held at a time. An exception of either ends it, after the running workers.
    """
    waiting: dict[int, _Result] = {}
    running: dict[Future[_Result], int] = {}
    expected = 0
    with ThreadPoolExecutor(max_workers=threads, initializer=_one_thread) as pool:
        numbered = enumerate(items)
        try:
            while True:
                while len(running) + len(waiting) < 2 * threads:
                    number, item = next(numbered, (-1, None))
                    if number < 0 or item is None:
                        break
                    running[pool.submit(work, item)] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    waiting[running.pop(future)] = future.result()
                while expected in waiting:
                    done(waiting.pop(expected))
                    expected += 1
        except BaseException:
            for future in running:
                future.cancel()
            raise


Reader = Callable[[int, int], NDArray[np.float32]]
"""Reads `count` boxes from row `first`: (first, count) -> (count, n, n, n)."""


def align(
    read: Reader,
    count: int,
    reference: NDArray[np.float32],
    search: Search,
    *,
    start: Poses | None = None,
    mask: NDArray[np.float32] | None = None,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Poses:
    """Align `count` particles to one reference, both with protein of the same sign.

    `read(first, count)` gives boxes of `search.box_size`; they are read batch by batch, so memory does not grow with
    their number. `start` are poses that the search's ranges are counted from, `mask` `[z, y, x]` what counts of the
    reference, else the sphere in which it stands out of its noise; `names` the particles' ids, for messages. Shells
    count as far as the reference can be believed there (`reliability`), and without a low-pass the band reaches as far
    as it tells of rotations.

    Raises InvalidArgument for a search that can't work, a reference of another box, or a particle that is constant or
    not finite.
    """
    search.check()
    if reference.shape != (search.box_size,) * 3:
        raise InvalidArgument(
            f"the reference is {reference.shape}, the particles are boxes of {search.box_size} voxels"
        )
    if start is not None and len(start.shifts) != count:
        raise InvalidArgument(f"there are starting poses of {len(start.shifts)} particles, but {count} particles")
    ids = np.arange(count) if names is None else names
    aligner, prepared = _believed(reference, search, mask, device)
    references = aligner.references(prepared[None])
    size = batch_size(search.box_size, aligner.search.k_max, device)

    def batches() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first in range(0, count, size):
            yield first, read(first, min(size, count - first))

    def work(batch: tuple[int, NDArray[np.float32]]) -> Refined:
        first, boxes = batch
        check_particles(boxes, ids[first : first + len(boxes)], search.box_size)
        near = None if start is None else start.tensors(np.arange(first, first + len(boxes)), device)
        return aligner.align(torch.from_numpy(standardise(boxes)).to(device), references, near)

    results: list[Refined] = []
    finished = 0

    def done(result: Refined) -> None:
        nonlocal finished
        results.append(result)
        finished += len(result.scores)
        progress(finished / count, "aligning", particles=finished)

    in_parallel(batches(), work, threads if device == "cpu" else 1, done)
    return gather(results)


def _believed(
    reference: NDArray[np.float32], search: Search, mask: NDArray[np.float32] | None, device: str
) -> tuple[Aligner, torch.Tensor]:
    """What aligns to a reference, as far as it can be believed, and the reference made ready for that."""
    n = search.box_size
    sphere = particle_sphere(reference)
    if mask is None and sphere is not None:
        mask = sphere.mask(n, usual_edge_voxels(n))
    prepared = prepare_reference(reference, mask)
    believed = weights(reference, sphere)
    if search.low_pass_angstrom is None:
        cycles = max(band_cycles(prepared, believed), search.k_min + 1)
        search = replace(search, low_pass_angstrom=n * search.voxel_size_angstrom / cycles)
    reach = None if mask is None else float(radius_grid(n)[mask > 0].max())
    return Aligner(search, device, believed**-0.5, reach), torch.from_numpy(prepared).to(device)


def gather(results: list[Refined]) -> Poses:
    """The poses of consecutive batches as one table in double precision."""
    quaternions = torch.cat([r.quaternions for r in results]).cpu().double().numpy()
    return Poses(
        Rotation.from_quat(quaternions),
        torch.cat([r.shifts for r in results]).cpu().double().numpy(),
        torch.cat([r.scores for r in results]).cpu().double().numpy(),
    )


def search_exhaustively(
    particle: NDArray[np.float32], reference: NDArray[np.float32], search: Search, rotations: Rotation
) -> Poses:
    """The slow check: the correlation that `align` maximises at every one of `rotations`, each with its best shift; the
    best one, unrefined.
    """
    aligner, prepared = _believed(reference, search, None, "cpu")
    band = aligner.fine
    table = SpectrumTable(prepared[None], band.k_max)
    data = band.of(centred_rfft(torch.from_numpy(standardise(particle[None]))))
    shifts = ShiftSearch(band, search.shift_limit)
    scores, places = [], []
    quaternions = torch.from_numpy(rotations.as_quat()).float()
    for part in torch.split(quaternions, max(1, 200_000 // len(band))):
        models = band.imaged(table.rotated(band.points, rotation_matrices(part)[None])[0])
        place, overlap = shifts.best(data * models.conj())
        norm = models.abs().square().sum(-1) * data.abs().square().sum()
        scores.append(overlap * norm.clamp(min=1e-30).rsqrt())
        places.append(place)
    score = torch.cat(scores)
    best = int(score.argmax())
    return Poses(
        Rotation.from_quat(quaternions[best : best + 1].double().numpy()),
        torch.cat(places)[best : best + 1].double().numpy(),
        score[best : best + 1].double().numpy(),
    )


def memory_bytes(search: Search, threads: int, references: bool = False) -> int:
    """An upper estimate of what aligning takes; with `references`, of one reference for each particle, as in
    averaging.
    """
    k_max = search.k_max
    table = SpectrumTable.bytes_for(k_max, oversampling(k_max))
    table += SpectrumTable.bytes_for(min(k_max, SEARCH_CYCLES + 1), 4)
    batch = batch_size(search.box_size, k_max, "cpu", 2 if references else 1)
    # The correlation grids and the candidates' models; and the boxes with their transforms.
    each = (20 << 20) + 100 * search.box_size**3
    if references:
        each += max(table, SpectrumTable.bytes_for(search.box_size / 2, 2))
    return threads * batch * each + table + (96 << 20)
