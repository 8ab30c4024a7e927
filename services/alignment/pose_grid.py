"""The likelihood of a particle at every rotation of a uniform grid and every shift of a cubic one.

For a reference A (centred transform) and a particle X with transfer function w, both divided by the noise's deviation,

    log P(X | R, t) + const = sum_j 2 Re(X_j conj(M_j)) - |M_j|^2,    M = w (R A) exp(-2 pi i k t / n),

one of each Friedel pair counted. The shifts share the rotated reference, so the first term for all of them is one
matrix product of (rotations, components) with (components, shifts), and the second does not depend on the shift. Fine
grids are searched in two passes: a coarse one, of wider steps and fewer components, says which rotations are worth the
fine one.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cryofleet.numerics.rotations import point_group, rotation_grid
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.band import Band, rotation_matrices

STEPS_PER_CYCLE = 2.7
"""Shifts per period of the band's finest component, at least."""
COARSE_SHARE = 0.6
"""The coarse pass compares up to this share of the band's frequencies,"""
LEAST_COARSE_CYCLES = 4.0
"""and there is none where that is less than this many cycles per box."""
KEPT_ROTATIONS = 0.25
"""Of the coarse rotations at most this share is looked at finely,"""
KEPT_NATS = 25.0
"""and none whose likelihood is so far (in log) below the best."""
_CHUNK = 1 << 20
"""Components of rotated references that are held at a time."""


@dataclass(frozen=True)
class Likelihoods:
    """Log likelihoods (rotations, shifts) at `rotations`, indices into the grid's."""

    rotations: torch.Tensor
    values: torch.Tensor


def angular_step_degrees(k_max: float, radius: float) -> float:
    """The step by which the rim of a particle, its radius in box sides, moves half a period of `k_max` cycles per box:
    no rotation is further than a quarter from the grid. Between 3 and 30 degrees.
    """
    return float(np.clip(math.degrees(0.5 / (k_max * radius)), 3.0, 30.0))


def shifts_along_axis(box_size: int, k_max: float, max_shift_voxels: float) -> int:
    """How many shifts, 0 among them, reach `max_shift_voxels` to both sides in steps that `k_max` can follow."""
    return 2 * math.ceil(max_shift_voxels * STEPS_PER_CYCLE * k_max / box_size) + 1


def memory_bytes(
    box_size: int, k_max: float, step_degrees: float, max_shift_voxels: float, symmetry: str, threads: int
) -> int:
    """An upper estimate of what a grid and comparing `threads` particles with it at once take."""
    shifts = shifts_along_axis(box_size, k_max, max_shift_voxels) ** 3
    components = 2 / 3 * math.pi * (k_max + 0.5) ** 3
    rotations = 8 * math.pi**2 / math.radians(step_degrees) ** 3 / len(point_group(symmetry))
    # The phases, and what they are made of; for each particle its own at all shifts, in two orders.
    tables = (20 + 16 * threads) * shifts * components
    # Likelihoods in parts, joined, and with their prior, of half the rotations, or all of a grid too coarse for two.
    compared = rotations if COARSE_SHARE * k_max < LEAST_COARSE_CYCLES else rotations / 2
    return int(tables + threads * (12 * compared * shifts + 16 * _CHUNK))


class PoseGrid:
    """Rotations `quaternions` (rotations, 4) and shifts (shifts, 3) in voxels, and what comparing them needs.

    Shifts reach exactly `max_shift_voxels` to both sides along each axis.
    """

    def __init__(
        self, band: Band, step_degrees: float, max_shift_voxels: float, symmetry: str = "C1", coarser: bool = True
    ) -> None:
        self.band = band
        self.step_degrees = step_degrees
        quaternions = _quaternions(step_degrees, symmetry)
        self.quaternions = torch.from_numpy(quaternions).float().to(band.device)
        self._matrices = rotation_matrices(self.quaternions)
        side = np.linspace(-1.0, 1.0, shifts_along_axis(band.box_size, band.k_max, max_shift_voxels)) * max_shift_voxels
        cube = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
        self.shifts = torch.from_numpy(cube).float().to(band.device)
        angle = (self.shifts @ band.points.T) * (2 * math.pi / band.box_size)
        self._phases = torch.complex(torch.cos(angle), torch.sin(angle))
        self._coarse: PoseGrid | None = None
        if coarser and COARSE_SHARE * band.k_max >= max(LEAST_COARSE_CYCLES, band.k_min + 2):
            inner = band.below(COARSE_SHARE * band.k_max)
            self._coarse = PoseGrid(inner, step_degrees / COARSE_SHARE, max_shift_voxels, symmetry, coarser=False)
            self._parents = torch.from_numpy(_parents(step_degrees, step_degrees / COARSE_SHARE, symmetry))

    def likelihoods(self, table: SpectrumTable, data: torch.Tensor) -> Likelihoods:
        """Of one particle's whitened components (components,) against the reference of `table`."""
        if self._coarse is None:
            chosen = torch.arange(len(self.quaternions), device=data.device)
        else:
            inner = len(self._coarse.band)
            coarse = self._coarse.likelihoods(table, data[:inner]).values.amax(dim=1)
            best = torch.topk(coarse, max(1, math.ceil(KEPT_ROTATIONS * len(coarse))))
            near = torch.zeros(len(coarse), dtype=torch.bool, device=data.device)
            near[best.indices[best.values >= best.values[0] - KEPT_NATS]] = True
            chosen = torch.nonzero(near.to(self._parents.device)[self._parents].any(dim=1))[:, 0].to(data.device)
        weighted = self.band.imaged(data) * self._phases
        columns = torch.view_as_real(weighted).flatten(1).T.contiguous()
        twice = self.band.imaged(self.band.imaged(torch.ones(len(self.band), device=data.device))).repeat_interleave(2)
        parts = []
        for rows in torch.split(chosen, max(1, _CHUNK // len(self.band))):
            models = torch.view_as_real(table.rotated(self.band.points, self._matrices[rows][None])[0]).flatten(1)
            parts.append(2 * (models @ columns) - (models.square() @ twice)[:, None])
        return Likelihoods(chosen, torch.cat(parts))


@lru_cache(maxsize=16)
def _quaternions(step_degrees: float, symmetry: str) -> NDArray[np.float64]:
    return np.atleast_2d(rotation_grid(step_degrees, symmetry).as_quat())


@lru_cache(maxsize=16)
def _parents(step_degrees: float, coarse_degrees: float, symmetry: str) -> NDArray[np.int64]:
    """Of each fine rotation the two nearest coarse ones."""
    coarse, fine = _quaternions(coarse_degrees, symmetry), _quaternions(step_degrees, symmetry)
    tree = cKDTree(np.concatenate([coarse, -coarse]))
    count = min(2, len(coarse))
    nearest = np.asarray(tree.query(fine, k=count)[1]).reshape(len(fine), count)
    return np.asarray(nearest % len(coarse), dtype=np.int64)
