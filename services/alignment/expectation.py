"""The expectation step of FAML: in which poses and classes each particle is likely to be, and what it then adds.

Each particle is compared with averages that do not hold it: its own terms, at the poses of the last expectation, are
subtracted first. Coarser than `Task.joined_angstrom` the averages are of all others, finer of those of its half set.

While the band is coarse, integrals over poses are sums over a whole uniform grid of rotations and shifts (`pose_grid`),
each point of the same weight. Finer, they are sums over local maxima - of that grid within its band, or of the fast
rotational matching - climbed in the full band and weighted by their Voronoi cells (`voronoi`, eqs. 3 to 6).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.so3 import suppress
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.progress import Progress, no_progress
from services.alignment.align import Aligner, Reader, check_particles, in_parallel, standardise
from services.alignment.band import Band, rotation_matrices
from services.alignment.likelihood_model import (
    Model,
    Task,
    averages,
    prior_ratio,
    reach,
    shells,
    similarity_at,
    symmetry_of,
)
from services.alignment.pose_grid import PoseGrid, angular_step_degrees, memory_bytes
from services.alignment.reconstruction import Contributions, volume_of
from services.alignment.refinement import refine
from services.alignment.sufficient_statistics import Posterior, Statistics
from services.alignment.voronoi import VoronoiWeights

GRID_CYCLES = 12.0
"""Whole grids are searched up to this band, in cycles per box and for a particle of `GRID_DIAMETER` box sides."""
GRID_DIAMETER = 0.5
KEPT_POSES = 32
"""The likeliest poses of each particle that are averaged over; the rest of the posterior is left out."""
LEAST_WEIGHT = 1e-3
"""Of these, those so much less likely than the likeliest are left out too."""
SPLIT_ITERATIONS = 3
"""So long particles stay in the class where the random split put them."""
LEAST_CLASS = 1e-6
"""A class of a smaller share is empty: nothing is compared with it."""
REFINED = 8
"""Of the candidates so many are climbed in the full band."""


@dataclass(frozen=True)
class _Candidates:
    """Poses of a batch for one class: quaternions (batch, poses, 4), shifts (batch, poses, 3), log likelihoods and log
    weights of the integral (batch, poses).
    """

    quaternions: torch.Tensor
    shifts: torch.Tensor
    likelihoods: torch.Tensor
    weights: torch.Tensor
    table: SpectrumTable | None
    """Of the references; None where there are none."""


def cycles_of_grid(task: Task, model: Model) -> float | None:
    """The band of the grid that is searched, in cycles per box; None where none is."""
    if task.candidates == "matching":
        return None
    # Grids of the same number of rotations for particles of any size.
    limit = max(GRID_CYCLES * GRID_DIAMETER / (2 * task.radius), task.search.k_min + 1)
    return model.k_max if task.candidates == "grid" else min(limit, model.k_max)


def grid_bytes(task: Task, model: Model, threads: int) -> int:
    """An upper estimate of what searching the grid takes."""
    k_max, search = cycles_of_grid(task, model), task.search
    if k_max is None:
        return 0
    step = angular_step_degrees(k_max, task.radius)
    return memory_bytes(search.box_size, k_max, step, search.shift_limit, symmetry_of(task, model), threads)


class Expectation:
    """One expectation step against one model, on one device; safe to share between threads."""

    def __init__(self, task: Task, model: Model, device: str = "cpu") -> None:
        search = replace(task.search, symmetry=symmetry_of(task, model))
        n = search.box_size
        self.task, self.model, self.device = task, model, device
        self.deviation = np.sqrt(model.variance)
        self.band = Band(n, search.k_min, model.k_max, search.transfer, device, self.deviation)
        self._inner = Band(n, 1.0, min(model.k_max + 1.5, model.k_reach), None, device)
        self.wide = Band(n, 1.0, reach(task, model.k_max), None, device)
        group = point_group(search.symmetry)
        self._wide = Contributions(self.wide, search.transfer, group, device)
        self._own = Contributions(self._inner, search.transfer, group, device)
        self._group = torch.from_numpy(np.atleast_2d(group.as_quat())).float().to(device)
        size = len(self._inner)

        def tensor(values: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[..., :size])).to(device)

        self._sums = tensor(model.sums).to(torch.complex64)
        self._weights = tensor(model.weights).float()
        self._counts = torch.from_numpy(model.responsibilities).float().to(device)
        self._filling = tensor(model.filling)
        self._ratio = tensor(prior_ratio(task, model)).float()
        self._joined = torch.from_numpy(self._inner.radius <= task.k_joined).to(device)
        # References are needed within their band only, sampled just as finely; the transform then scales with voxels.
        self._side = min(n, 2 * math.ceil(self._inner.k_max + 1) + 2)
        mask = task.mask(self._side) * (n / self._side) ** 3
        self._mask = torch.from_numpy(mask.astype(np.float32)).to(device)
        self._log_alpha = torch.from_numpy(np.log(np.maximum(model.alpha, 1e-300))).float().to(device)
        self._handicap = torch.from_numpy(model.handicap).float().to(device)
        grid_cycles = cycles_of_grid(task, model)
        self._whole = grid_cycles is not None and grid_cycles >= model.k_max
        self._grid: PoseGrid | None = None
        if grid_cycles is not None:
            band = self.band if self._whole else self.band.below(grid_cycles)
            step = angular_step_degrees(band.k_max, task.radius)
            self._grid = PoseGrid(band, step, search.shift_limit, search.symmetry)
        self._step_degrees = angular_step_degrees(model.k_max, task.radius)
        self._aligner: Aligner | None = None
        if not self._whole:
            narrowed = replace(search, low_pass_angstrom=task.box_angstrom / model.k_max)
            self._aligner = Aligner(narrowed, device, self.deviation)
            self._voronoi = VoronoiWeights(task.seed, device, group=self._group)
        self._band_shells = torch.from_numpy(shells(self.band)).to(device)
        self._shells = len(model.variance)

    def of(
        self, boxes: NDArray[np.float32], halves: NDArray[np.int64], before: Posterior
    ) -> tuple[Statistics, Posterior]:
        """What particles (batch, n, n, n), standardised and with protein positive, add at their posterior, and it.

        `halves` (batch,) are 0 or 1, `before` is the posterior of the last expectation.
        """
        before = self.model.followed(before)
        particles = torch.from_numpy(boxes).to(self.device)
        data = self.band.of(centred_rfft(particles))
        references = self._references(particles, torch.from_numpy(halves).to(self.device), before)
        found = [
            self._candidates(particles, data, references[:, k])
            if self.model.alpha[k] >= LEAST_CLASS and bool(references[:, k].any())
            else self._none(len(boxes))
            for k in range(self.task.classes)
        ]
        posterior, evidence, residuals, scores, class_evidence = self._posterior(data, found, before)
        evidence -= float(data.abs().square().sum())
        statistics = self._add(particles, halves, posterior)
        changed = self._changed(before, posterior)
        deviations = torch.from_numpy(self.deviation).to(self.device)[self._band_shells]
        evidence -= 2 * len(boxes) * float(deviations.log().sum())
        return replace(
            statistics,
            residuals=residuals,
            observed=len(boxes) * np.bincount(self._band_shells.cpu().numpy(), minlength=self._shells).astype(float),
            log_evidence=evidence,
            class_evidence=class_evidence,
            score=scores,
            changed=float(changed.sum()),
        ), posterior

    def _references(self, particles: torch.Tensor, halves: torch.Tensor, before: Posterior) -> torch.Tensor:
        """What each particle is compared with, (batch, K, side, side, side): averages without it."""
        batch, classes = len(particles), self.task.classes
        quaternions, shifts, weights = self._tensors(before)
        sums = torch.where(self._joined, self._sums.sum(0), self._sums[halves])
        coverage = torch.where(self._joined, self._weights.sum(0), self._weights[halves])
        # Counts say how much is missing; either is right to a factor of two.
        counts = self._counts[halves].clamp(min=1e-3)
        for k in range(classes):
            mine = weights * torch.from_numpy(before.classes == k).to(self.device)
            if not bool(mine.any()):
                continue
            terms, share = self._own.expected(particles, quaternions, shifts, mine)
            sums[:, k] -= terms
            coverage[:, k] -= share
        models = averages(
            sums,
            coverage.clamp(min=0),
            counts,
            self._filling,
            self._ratio,
            similarity_at(self.task, self.model.iteration),
        )
        volumes = volume_of(self._inner, models.flatten(0, 1), self._side) * self._mask
        return volumes.view(batch, classes, *volumes.shape[1:])

    def _tensors(self, posterior: Posterior) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quaternions = torch.from_numpy(posterior.quaternions).to(self.device)
        return (
            quaternions,
            torch.from_numpy(posterior.shifts).to(self.device),
            torch.from_numpy(posterior.weights).to(self.device),
        )

    def _candidates(self, particles: torch.Tensor, data: torch.Tensor, references: torch.Tensor) -> _Candidates:
        """Poses for one class of references (batch, side, side, side)."""
        if self._whole:
            return self._grid_poses(data, references)
        assert self._aligner is not None
        prepared = self._aligner.references(references)
        limit = self.task.search.shift_limit
        if self._grid is None:
            quaternions, found = self._aligner.candidates(particles, prepared)
            shifts, _ = self._aligner.shifts(centred_rfft(particles), prepared, quaternions)
        else:
            quaternions, shifts, found = self._grid_maxima(data, prepared.fine)
        coarse, _ = self._likelihoods(data, prepared.fine, quaternions, shifts)
        coarse = torch.where(found, coarse, -torch.inf)
        top = torch.topk(coarse, min(REFINED, coarse.shape[1]), dim=1).indices[..., None]
        climbed = refine(
            self._aligner.fine,
            data,
            prepared.fine,
            torch.take_along_dim(quaternions, top, dim=1),
            torch.take_along_dim(shifts, top, dim=1),
            limit,
            3,
        )
        quaternions = quaternions.scatter(1, top.expand_as(climbed.quaternions), climbed.quaternions)
        shifts = shifts.scatter(1, top.expand_as(climbed.shifts), climbed.shifts)
        likelihoods, _ = self._likelihoods(data, prepared.fine, quaternions, shifts)
        weights = self._voronoi.of(quaternions, shifts, found)
        return _Candidates(
            quaternions,
            shifts,
            torch.where(found, likelihoods, -torch.inf),
            weights.clamp(min=1e-12).log(),
            prepared.fine,
        )

    def _none(self, batch: int) -> _Candidates:
        """For a class that is empty, or whose average holds nothing beyond its noise: it is as likely as noise alone
        while it has a share, and not at all once it is empty."""
        identity = torch.tensor([0.0, 0.0, 0.0, 1.0], device=self.device).expand(batch, 1, 4)
        zeros = torch.zeros((batch, 1), device=self.device)
        return _Candidates(identity, zeros[..., None].expand(batch, 1, 3), zeros, zeros, None)

    def _grid_poses(self, data: torch.Tensor, references: torch.Tensor) -> _Candidates:
        """The likeliest points of the whole grid; the weights carry what all others hold."""
        assert self._grid is not None
        grid, xi = self._grid, self.model.xi_voxels
        prior = -grid.shifts.square().sum(-1) / (2 * xi**2)
        table = SpectrumTable(references, self.band.k_max, 3)
        parts = []
        for i in range(len(data)):
            found = grid.likelihoods(table.only(i), data[i])
            flat = (found.values + prior).flatten()
            top = torch.topk(flat, min(KEPT_POSES, len(flat)))
            rotation = found.rotations[top.indices // len(grid.shifts)]
            shift = top.indices % len(grid.shifts)
            # Of the evidence, what the kept points do not hold is shared out among them.
            spread = torch.logsumexp(flat, 0) - torch.logsumexp(top.values, 0)
            count = math.log(len(grid.quaternions) * len(grid.shifts))
            values = top.values - prior[shift]
            parts.append((grid.quaternions[rotation], grid.shifts[shift], values, (spread - count).expand_as(values)))
        quaternions, shifts, likelihoods, weights = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return _Candidates(quaternions, shifts, likelihoods, weights, table)

    def _grid_maxima(self, data: torch.Tensor, table: SpectrumTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Separate local maxima over the grid of a coarser band: quaternions, shifts, and which are real."""
        assert self._grid is not None
        grid, count = self._grid, self.task.search.max_candidates
        prior = -grid.shifts.square().sum(-1) / (2 * self.model.xi_voxels**2)
        parts = []
        for i in range(len(data)):
            found = grid.likelihoods(table.only(i), data[i, : len(grid.band)])
            values, shift = (found.values + prior).max(dim=1)
            top = torch.topk(values, min(len(values), 8 * count))
            quaternions, shifts = grid.quaternions[found.rotations[top.indices]], grid.shifts[shift[top.indices]]
            chosen = suppress(top.values[None], quaternions[None], count, 1.3 * grid.step_degrees, self._group)[0]
            real = chosen >= 0
            parts.append((quaternions[chosen.clamp(min=0)], shifts[chosen.clamp(min=0)], real))
        quaternions, shifts, real = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return quaternions, shifts, real

    def _likelihoods(
        self, data: torch.Tensor, table: SpectrumTable, quaternions: torch.Tensor, shifts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log likelihoods (batch, poses), and the models (batch, poses, components)."""
        models = self.band.imaged(table.rotated(self.band.points, rotation_matrices(quaternions)))
        angle = (shifts @ self.band.points.T) * (-2 * math.pi / self.band.box_size)
        models = models * torch.complex(torch.cos(angle), torch.sin(angle))
        overlap = (data[:, None] * models.conj()).real.sum(-1)
        return 2 * overlap - models.abs().square().sum(-1), models

    def _posterior(
        self, data: torch.Tensor, found: list[_Candidates], before: Posterior
    ) -> tuple[Posterior, float, NDArray[np.float64], float, NDArray[np.float64]]:
        """Eqs. 14 and 15 over all classes: the posterior, its log evidence, residuals by shell, the best correlations'
        sum, and the evidence of each class."""
        classes = torch.cat([torch.full_like(c.likelihoods, k, dtype=torch.int64) for k, c in enumerate(found)], dim=1)
        quaternions = torch.cat([c.quaternions for c in found], dim=1)
        shifts = torch.cat([c.shifts for c in found], dim=1)
        prior = -shifts.square().sum(-1) / (2 * self.model.xi_voxels**2)
        logs = torch.cat([c.likelihoods + c.weights for c in found], dim=1) + prior
        of_class = torch.stack(
            [torch.logsumexp(torch.where(classes == k, logs, -torch.inf), dim=1) for k in range(len(found))], dim=1
        )
        class_evidence = of_class.double().clamp(min=-1e6).sum(dim=0).cpu().numpy()
        logs = logs + (self._log_alpha - self._handicap)[classes]
        if len(found) > 1 and self.model.iteration < SPLIT_ITERATIONS:
            # The classes' means change too fast to compare with: particles stay where the random split put them.
            kept = torch.from_numpy(before.classes[:, :1].astype(np.int64)).to(self.device)
            logs = torch.where(classes == kept, logs, -torch.inf)
        evidence = float(torch.logsumexp(logs, dim=1).double().sum())
        top = torch.topk(logs, min(KEPT_POSES, logs.shape[1]), dim=1)
        weights = torch.softmax(top.values, dim=1)
        weights = torch.where(weights >= LEAST_WEIGHT * weights[:, :1], weights, 0.0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        most = int((weights > 0).sum(dim=1).max())
        index, weights = top.indices[:, :most], weights[:, :most]
        classes = torch.take_along_dim(classes, index, dim=1)
        quaternions = torch.take_along_dim(quaternions, index[..., None], dim=1)
        shifts = torch.take_along_dim(shifts, index[..., None], dim=1)
        residuals = torch.zeros(len(self.band), dtype=torch.float64, device=self.device)
        score = 0.0
        for k, candidates in enumerate(found):
            mine = torch.where(classes == k, weights, 0.0)
            if not bool(mine.any()):
                continue
            if candidates.table is None:
                models = data[:, None].new_zeros((*mine.shape, data.shape[1]))
            else:
                _, models = self._likelihoods(data, candidates.table, quaternions, shifts)
            apart = (data[:, None] - models).abs().square()
            residuals += (mine[..., None] * apart).sum(dim=(0, 1)).double()
            best, own = models[:, 0], classes[:, 0] == k
            norm = best.abs().square().sum(-1) * data.abs().square().sum(-1)
            overlap = (data * best.conj()).real.sum(-1) * norm.clamp(min=1e-30).rsqrt()
            score += float(overlap[own].sum())
        by_shell = torch.bincount(self._band_shells, residuals, minlength=self._shells).cpu().numpy()
        return (
            Posterior(
                classes.cpu().numpy().astype(np.int16),
                quaternions.cpu().numpy(),
                shifts.cpu().numpy(),
                weights.cpu().numpy(),
            ),
            evidence,
            by_shell * self.model.variance,
            score,
            class_evidence,
        )

    def _add(self, particles: torch.Tensor, halves: NDArray[np.int64], posterior: Posterior) -> Statistics:
        return add(self._wide, self.task.classes, self._shells, particles, halves, posterior, self.device)

    def _changed(self, before: Posterior, after: Posterior) -> NDArray[np.bool_]:
        """Whose class is another, or whose rotation is more than a step and a half away."""
        first = torch.from_numpy(before.quaternions[:, 0])
        second = torch.from_numpy(after.quaternions[:, 0])
        x, y, z, w = first.unbind(-1)
        # The scalar part of conj(first) second g, for each g of the group.
        inverse = torch.stack([-x, -y, -z, w], dim=-1)
        relative = _product(inverse, second)
        scalar = (relative @ (self._group.cpu() * torch.tensor([-1.0, -1.0, -1.0, 1.0])).T).abs().amax(dim=1)
        angle = 2 * torch.rad2deg(torch.arccos(scalar.clamp(max=1)))
        moved = angle.numpy() > 1.5 * self._step_degrees
        changed: NDArray[np.bool_] = moved | (before.classes[:, 0] != after.classes[:, 0])
        return changed


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ax, ay, az, aw = a.unbind(-1)
    bx, by, bz, bw = b.unbind(-1)
    return torch.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        dim=-1,
    )


def add(
    contributions: Contributions,
    classes: int,
    shell_count: int,
    particles: torch.Tensor,
    halves: NDArray[np.int64],
    posterior: Posterior,
    device: str,
) -> Statistics:
    """What particles add to the sums at their posterior; residuals are the particles' own power."""
    band = contributions.band
    sums = torch.zeros((2, classes, len(band)), dtype=torch.complex128, device=device)
    weights = torch.zeros((2, classes, len(band)), dtype=torch.float64, device=device)
    quaternions = torch.from_numpy(posterior.quaternions).to(device)
    shifts = torch.from_numpy(posterior.shifts).to(device)
    for k in range(classes):
        mine = torch.from_numpy(np.where(posterior.classes == k, posterior.weights, 0)).to(device)
        rows = torch.nonzero(mine.any(dim=1))[:, 0]
        if not len(rows):
            continue
        terms, coverage = contributions.expected(particles[rows], quaternions[rows], shifts[rows], mine[rows])
        for half in (0, 1):
            of_half = torch.from_numpy(halves == half).to(device)[rows]
            # In double precision, so that the split into batches and shards leaves no trace.
            sums[half, k] += terms[of_half].to(torch.complex128).sum(dim=0)
            weights[half, k] += coverage[of_half].double().sum(dim=0)
    shares = posterior.responsibilities(classes)
    responsibilities = np.stack([shares[halves == half].sum(axis=0) for half in (0, 1)])
    turns = Rotation.from_quat(posterior.quaternions.reshape(-1, 4).astype(np.float64))
    back = turns.apply(posterior.shifts.reshape(-1, 3), inverse=True) * posterior.weights.reshape(-1, 1)
    displacements = np.stack([back[posterior.classes.ravel() == k].sum(axis=0) for k in range(classes)])
    squared = (posterior.weights * np.square(posterior.shifts).sum(axis=-1)).sum()
    return Statistics(
        sums.cpu().numpy(),
        weights.cpu().numpy(),
        responsibilities,
        np.zeros(shell_count),
        np.zeros(shell_count),
        displacements,
        np.zeros(classes),
        float(squared),
        0.0,
        0.0,
        0.0,
        float(len(particles)),
    )


def batches(
    read: Reader, rows: range, names: NDArray[np.int64], box_size: int, sign: float, size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Row numbers and boxes, standardised and with protein positive, batch by batch; `names` are ids for messages."""
    for first in range(rows.start, rows.stop, size):
        chosen = np.arange(first, min(first + size, rows.stop))
        boxes = read(first, len(chosen))
        check_particles(boxes, names[chosen], box_size)
        yield chosen, standardise(boxes) * np.float32(sign)


def expect(
    step: Callable[[NDArray[np.int64], NDArray[np.float32]], tuple[Statistics, Posterior]],
    boxes: Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]],
    count: int,
    threads: int,
    progress: Progress = no_progress,
    phase: str = "expecting",
) -> tuple[Statistics, Posterior]:
    """Sums and posteriors of all batches, added up in their order whatever `threads`."""
    total: Statistics | None = None
    posteriors: list[Posterior] = []
    finished = 0

    def done(result: tuple[Statistics, Posterior]) -> None:
        nonlocal total, finished
        statistics, posterior = result
        total = statistics if total is None else total + statistics
        posteriors.append(posterior)
        finished += len(posterior)
        progress(finished / count, phase, particles=finished)

    in_parallel(boxes, lambda batch: step(*batch), threads, done)
    assert total is not None
    return total, Posterior.together(posteriors)
