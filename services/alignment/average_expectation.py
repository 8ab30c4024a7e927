"""The expectation step of an averaging: particles aligned to averages without them, and summed at their poses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.masks import radius_grid, soft_cylinder, soft_sphere
from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.spectra import centred_rfft
from cryofleet.progress import Progress, no_progress
from services.alignment.align import (
    Aligner,
    Reader,
    References,
    Search,
    batch_size,
    check_particles,
    in_parallel,
    standardise,
)
from services.alignment.average_model import Model, Statistics
from services.alignment.band import Band, rotation_matrices
from services.alignment.helical import Axis, symmetrise, upright
from services.alignment.reconstruction import Contributions, divide, volume_of
from services.alignment.refinement import Refined
from services.alignment.rejection import FREE_SHARE

_Batch = tuple[NDArray[np.int64], NDArray[np.float32]]
_SMALLEST_SIDE = 16
"""Of the references where a helix is imposed."""


def expect(
    model: Model,
    read: Reader,
    names: NDArray[np.int64],
    rows: range | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Statistics:
    """Align `rows` of the model's particles, all where left out, and sum them at their new poses.

    `read(first, count)` gives boxes of any of the model's particles, `names` are the ids of all, for messages. Each is
    aligned to the average without itself; the first time to the reference, if there is one, or left where it is. Sums
    are in double precision, batch by batch in the order of the rows whatever `threads`.

    Raises InvalidArgument for a particle that is constant, not finite or of another box.
    """
    rows = range(len(model)) if rows is None else rows
    expectation = _Expectation(model, device)
    total = _Total(model, device)
    size = batch_size(model.job.search.box_size, model.job.search.k_max, device, len(model))
    finished = 0

    def done(result: _Terms) -> None:
        nonlocal finished
        total.add(result)
        finished += len(result.rows)
        progress(finished / len(rows), "aligning", particles=finished)

    in_parallel(_batches(model, read, names, rows, size), expectation.terms, threads if device == "cpu" else 1, done)
    return total.statistics(rows.start)


def _batches(model: Model, read: Reader, names: NDArray[np.int64], rows: range, size: int) -> Iterator[_Batch]:
    """Row numbers and standardised boxes, protein positive, batch by batch."""
    for first in range(rows.start, rows.stop, size):
        chosen = np.arange(first, min(first + size, rows.stop))
        boxes = read(first, len(chosen))
        check_particles(boxes, names[chosen], model.job.search.box_size)
        yield chosen, standardise(boxes) * np.float32(model.job.sign)


@dataclass(frozen=True, eq=False)
class _Terms:
    """A batch at its new poses, and its terms of the sums; signals (batch,) are 0 where they are not asked for."""

    rows: NDArray[np.int64]
    poses: Refined
    signals: torch.Tensor
    terms: torch.Tensor
    coverage: torch.Tensor


class _Total:
    def __init__(self, model: Model, device: str) -> None:
        self._half = np.where(model.leaving == 0, model.halves, 0)
        self._device = device
        components = len(model.job.band())
        self._sums = torch.zeros((2, components), dtype=torch.complex128, device=device)
        self._weights = torch.zeros((2, components), dtype=torch.float64, device=device)
        self._results: list[_Terms] = []

    def add(self, result: _Terms) -> None:
        for half in (1, 2):
            mine = torch.from_numpy(self._half[result.rows] == half).to(self._device)
            self._sums[half - 1] += result.terms[mine].sum(dim=0)
            self._weights[half - 1] += result.coverage[mine].sum(dim=0)
        empty = result.terms.new_zeros(0)
        self._results.append(replace(result, terms=empty, coverage=empty))

    def statistics(self, first: int) -> Statistics:
        def column(values: list[torch.Tensor]) -> NDArray[np.float64]:
            return np.asarray(torch.cat(values).cpu().double().numpy())

        return Statistics(
            first,
            column([r.poses.quaternions for r in self._results]),
            column([r.poses.shifts for r in self._results]),
            column([r.poses.scores for r in self._results]),
            column([r.signals for r in self._results]),
            self._sums.cpu().numpy(),
            self._weights.cpu().numpy(),
        )


class _Expectation:
    """One expectation against one model; safe to share between threads."""

    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device
        job, n = model.job, model.job.search.box_size
        search = replace(model.search, low_pass_angstrom=job.box_angstrom / model.k_max)
        group = point_group(job.symmetry)
        self._group = group
        self._whole = Contributions(job.band(device), search.transfer, group, device)
        self._aligns = model.iteration >= 0 or model.reference.size > 0
        if not self._aligns:
            return
        self._free: Band | None = None
        if job.options.rejection.signal_deviations is not None and model.iteration >= 0:
            search, self._free = _split(search, job.seed, device)
        self._aligner = Aligner(search, device)
        if model.iteration < 0:
            self._given = self._aligner.references(torch.from_numpy(model.reference[None]).to(device))
            return
        # A little more than what is compared, for the interpolation at the band's edge.
        reach = min(model.k_max + 1.5, n / 2 - 0.5)
        self._inner = Band(n, 1.0, reach, None, device)
        place = np.flatnonzero(job.band().radius <= reach + 1e-6)
        self._sums = torch.from_numpy(model.sums[:, place]).to(device)
        self._weights = torch.from_numpy(model.weights[:, place]).to(device)
        self._counts = torch.tensor(model.counts(), device=device)
        self._half = torch.from_numpy(model.halves.astype(np.int64) - 1).to(device)
        self._held = torch.from_numpy((model.left_out == 0).astype(np.float32)).to(device)
        self._joined = torch.from_numpy(self._inner.radius <= job.k_joined).to(device)
        self._own = Contributions(self._inner, model.search.transfer, group, device)
        side = 2 * math.ceil(reach + 1) + 2
        self._side = min(n, side if job.options.helix is None else max(side, _SMALLEST_SIDE))
        self._mask = _reference_mask(model, self._side)
        self._shaped = torch.from_numpy(self._mask).to(device)
        angle = self._inner.points @ torch.from_numpy(model.move).float().to(device) * (2 * math.pi / n)
        self._moved = torch.complex(torch.cos(angle), torch.sin(angle))

    def terms(self, batch: _Batch) -> _Terms:
        """Align a batch and make its terms."""
        rows, boxes = batch
        particles = torch.from_numpy(boxes).to(self.device)
        before = (
            torch.from_numpy(self.model.quaternions[rows]).float().to(self.device),
            torch.from_numpy(self.model.shifts[rows]).float().to(self.device),
        )
        if not self._aligns:
            scores = torch.from_numpy(self.model.scores[rows]).float().to(self.device)
            poses, signals = Refined(*before, scores), torch.zeros_like(scores)
        else:
            if self.model.iteration < 0:
                references = self._given
            else:
                references = self._aligner.references(self._references(self._without(rows, particles, before)))
            poses = self._aligner.align(particles, references)
            signals = torch.zeros_like(poses.scores)
            if self._free is not None:
                signals = self._signals(self._free, particles, references, poses)
            if self.model.iteration < 0:
                poses = self._in_frame(poses)
        return _Terms(rows, poses, signals, *self._whole.of(particles, poses.quaternions, poses.shifts))

    def _without(
        self, rows: NDArray[np.int64], particles: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The averages without each of the particles (batch, components): what each may be compared to."""
        chosen = torch.from_numpy(rows).to(self.device)
        half, held = self._half[chosen], self._held[chosen][:, None]
        terms, coverage = self._own.of(particles, *before)
        terms, coverage = terms * held, coverage * held
        counts = self._counts[half][:, None] - held
        own = divide(self._sums[half] - terms, self._weights[half] - coverage, counts)
        total = self._counts.sum() - held
        every = divide(self._sums.sum(dim=0) - terms, self._weights.sum(dim=0) - coverage, total)
        return torch.where(self._joined, every, own)

    def _references(self, components: torch.Tensor) -> torch.Tensor:
        """References (batch, m, m, m) of averages: turned and moved, of the helix's symmetry, and masked."""
        model = self.model
        if not model.turned:
            components = components * self._moved
        volumes = volume_of(self._inner, components, self._side)
        helix, symmetry = model.job.options.helix, model.symmetry
        scale = model.job.search.box_size / self._side
        if model.turned:
            axis = Axis(Rotation.from_quat(model.turn), model.move / scale)
            volumes = self._each(volumes, [upright(v, axis) for v in volumes.cpu().numpy()])
        if helix is not None and symmetry is not None:
            voxel = model.job.search.voxel_size_angstrom * scale
            cylinder = helix.cylinder(self._side, voxel)
            volumes = self._each(
                volumes, [symmetrise(v, symmetry, voxel, cylinder).volume for v in volumes.cpu().numpy()]
            )
        if model.mask.size or helix is not None:
            # What surrounds the particle is not 0, and would make an edge.
            around = torch.from_numpy((self._mask < 0.02) & (radius_grid(self._side) < self._side / 2)).to(self.device)
            if helix is not None:
                around &= volumes[:1].abs().amax(dim=0) > 0
            if bool(around.any()):
                volumes = volumes - volumes[:, around].mean(dim=1)[:, None, None, None]
        return volumes * self._shaped

    def _each(self, like: torch.Tensor, volumes: list[NDArray[np.float32]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(volumes)).to(like)

    def _in_frame(self, poses: Refined) -> Refined:
        """Poses against the reference as poses against what it is turned and moved to."""
        rotations = Rotation.from_quat(poses.quaternions.cpu().double().numpy())
        quaternions = (rotations * Rotation.from_quat(self.model.turn)).as_quat()
        moves = torch.from_numpy(rotations.apply(self.model.move)).to(poses.shifts)
        return Refined(torch.from_numpy(quaternions).to(poses.quaternions), poses.shifts + moves, poses.scores)

    def _signals(self, free: Band, particles: torch.Tensor, references: References, poses: Refined) -> torch.Tensor:
        """The signal (batch,) of particles at their poses on components that no alignment saw (`rejection`)."""
        spectra = centred_rfft(particles)
        compared = self._aligner.fine
        shells = torch.from_numpy(np.rint(compared.radius).astype(np.int64)).to(self.device)
        power = torch.zeros((len(particles), int(shells.max()) + 2), device=self.device)
        power.index_add_(1, shells, compared.of(spectra).abs().square())
        variance = power / torch.bincount(shells, minlength=power.shape[1]).clamp(min=1)
        noise = variance[:, torch.from_numpy(np.rint(free.radius).astype(np.int64)).to(self.device)]
        # A shell of which nothing else was seen says nothing.
        noise = torch.where(noise > 0, noise, torch.inf)
        model = references.fine.rotated(free.points, rotation_matrices(poses.quaternions[:, None]))[:, 0]
        model = free.moved(free.imaged(model), poses.shifts)
        overlap = ((free.of(spectra) * model.conj()).real / noise).sum(dim=1)
        return overlap / (model.abs().square() / (2 * noise)).sum(dim=1).clamp(min=1e-30).sqrt()


def _split(search: Search, seed: int, device: str) -> tuple[Search, Band]:
    """The search without a random share of its components, and the band of these: one of each ten that follow each
    other in |k|, the same in wider bands."""
    n = search.box_size
    whole = np.ones((n, n, n // 2 + 1), np.float32) if search.transfer is None else search.transfer
    index = Band(n, search.k_min, search.k_max, whole, "cpu").index.numpy()
    step = round(1 / FREE_SHARE)
    first = np.arange(0, len(index), step)
    chosen = first + np.random.default_rng([seed, 1]).integers(0, step, whole.size)[: len(first)]
    free = np.zeros(whole.size, np.bool_)
    free[index[np.minimum(chosen, len(index) - 1)]] = True
    rest = replace(search, transfer=np.where(free.reshape(whole.shape), np.float32(0), whole))
    k_max = Band(n, search.k_min, search.k_max, rest.transfer, "cpu").k_max
    # The references' tables end where the rest does.
    return rest, Band(n, search.k_min, k_max, np.where(free.reshape(whole.shape), whole, np.float32(0)), device)


def _reference_mask(model: Model, side: int) -> NDArray[np.float32]:
    """The mask of references sampled by `side` voxels."""
    edge = max(1.0, side / 16)
    mask = soft_sphere(side, side / 2 - edge, edge)
    n = model.job.search.box_size
    helix = model.job.options.helix
    if helix is not None:
        voxel = model.job.search.voxel_size_angstrom * n / side
        radius = helix.cylinder(side, voxel).outer_radius_angstrom
        assert radius is not None
        mask = mask * soft_cylinder(side, radius / voxel - edge, side, edge)
    if model.mask.size:
        offset = n // 2 - n / side * (side // 2)
        sampled = scipy.ndimage.affine_transform(
            model.mask, [n / side] * 3, offset=offset, output_shape=(side,) * 3, order=1, mode="nearest"
        )
        mask = mask * sampled
    return np.asarray(mask, dtype=np.float32)
