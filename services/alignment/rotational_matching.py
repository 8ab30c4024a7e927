"""Candidate rotations by fast rotational matching under the missing wedge (FAML, eq. 2).

The magnitude of a transform does not change with a shift, so c~(R) = C[|w X|, |A|](R) / sqrt(C[w^2, |A|^2](R)), with
C[p, q](R) = sum_j p_j (R q)_j, bounds the constrained correlation over all shifts. Both correlations come from
expansions in spherical harmonics on shells. w is the wedge mask, or what CTF and dose leave of each component.

Noise has a magnitude too: a constant on each shell, which says nothing of R but that c~ is large where both wedges
overlap. Magnitudes are therefore taken about their means over the shell's imaged components, in |X| and in |A|.

Magnitudes are centro-symmetric, so only even degrees occur. The particle's side is taken as it is, point by point on
its own Fourier grid: the sum over j above is then exact, and no magnitude of the particle is ever interpolated.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.numerics.harmonics import spherical_harmonics
from cryofleet.numerics.so3 import euler_grid, local_maxima, suppress
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.band import LEAST_TRANSFER, Band

SHELL_STEP = 0.5
"""Distance of shells in cycles per box: magnitudes of a particle that fills the box vary over about one."""
SEPARATION_STEPS = 1.75
"""Candidates keep this many steps of the grid from one another."""


@dataclass(frozen=True)
class MagnitudeModel:
    """What the matching needs of a batch of references: coefficients of |A| and 1 / sqrt(C[w^2, |A|^2]) on the grid."""

    coefficients: torch.Tensor
    inverse_norm: torch.Tensor


def degree_limit(k_max: float) -> int:
    """Even band limit of the expansion: magnitudes on the shell of k cycles per box turn about 3 k times."""
    return int(min(max(2 * math.ceil(1.5 * k_max), 8), 36))


class RotationalMatcher:
    """Matches magnitudes in one band; holds the tables for it.

    `group` (order, 4) are the quaternions of the references' point group, `reference_transfer` what imaging left of the
    references themselves, as `Band` has it of the particles; None where they are whole.
    """

    def __init__(
        self, band: Band, group: torch.Tensor | None = None, reference_transfer: NDArray[np.float32] | None = None
    ) -> None:
        self.band = band
        self._group = group
        limit = degree_limit(band.k_max)
        degrees = tuple(range(0, limit + 1, 2))
        self.grid = euler_grid(degrees, max(72, 4 * math.ceil((2 * limit + 1) / 4)), band.device)
        first = max(math.floor(band.k_min / SHELL_STEP) * SHELL_STEP, SHELL_STEP)
        self._shells = np.arange(first, band.k_max + SHELL_STEP, SHELL_STEP)
        width = len(degrees) * (limit + 1)

        def basis(directions: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> torch.Tensor:
            values = spherical_harmonics(directions, degrees).conj().reshape(-1, width)
            return torch.from_numpy(np.concatenate([values.real, values.imag], axis=1).astype(np.float32)).to(
                band.device
            )

        # Every component lies between two shells and is shared out linearly.
        place = (band.radius - first) / SHELL_STEP
        below = np.minimum(np.floor(place).astype(int), len(self._shells) - 2)
        self._upper_share = torch.from_numpy((place - below).astype(np.float32)).to(band.device)
        self._edges = np.searchsorted(below, np.arange(len(self._shells)))
        thin = np.rint(place).astype(int)
        self._thin = torch.from_numpy(thin).to(band.device)
        self._thin_counts = torch.from_numpy(np.maximum(np.bincount(thin), 1).astype(np.float32)).to(band.device)
        self._particle_basis = basis(band.directions)
        self._shape = (len(degrees), limit + 1)

        # Half the nodes of a product rule: the other half is opposite and has the same magnitudes.
        rows = limit + 8
        columns = 2 * rows
        cosine, weight = np.polynomial.legendre.leggauss(rows)
        cosine, weight = cosine[rows // 2 :], 2 * weight[rows // 2 :]
        phi = 2 * np.pi * (np.arange(columns) + 0.5) / columns
        sine = np.sqrt(1 - cosine**2)
        nodes = np.stack(
            [np.outer(sine, np.cos(phi)), np.outer(sine, np.sin(phi)), np.repeat(cosine[:, None], columns, 1)], axis=-1
        ).reshape(-1, 3)
        weights = np.repeat(weight * 2 * np.pi / columns, columns).astype(np.float32)
        self._node_weights = torch.from_numpy(weights).to(band.device)
        self._reference_basis = basis(nodes) * self._node_weights[:, None]
        points = (self._shells[:, None, None] * nodes).reshape(-1, 3)
        self._reference_points = torch.from_numpy(points.astype(np.float32)).to(band.device)
        self._coverage = self._covered(reference_transfer)
        self._imaged = self._project(band.imaged(band.imaged(torch.ones((1, len(band)), device=band.device))))

    @property
    def reach(self) -> float:
        """The largest frequency at which references are sampled, in cycles per box."""
        return float(self._shells[-1])

    def _complex(self, values: torch.Tensor) -> torch.Tensor:
        real, imaginary = values.view(*values.shape[:-1], 2, *self._shape).unbind(-3)
        return torch.complex(real, imaginary)

    def _project(self, values: torch.Tensor) -> torch.Tensor:
        """sum_j p_j h_r(|k_j|) conj Y_lm(k_j) of real (batch, components): complex (batch, shells, degrees, m)."""
        result = values.new_zeros((len(values), len(self._shells), self._particle_basis.shape[1]))
        upper = values * self._upper_share
        lower = values - upper
        for s in range(len(self._shells) - 1):
            part = slice(int(self._edges[s]), int(self._edges[s + 1]))
            result[:, s] += lower[:, part] @ self._particle_basis[part]
            result[:, s + 1] += upper[:, part] @ self._particle_basis[part]
        return self._complex(result)

    def _covered(self, transfer: NDArray[np.float32] | None) -> torch.Tensor:
        """1 where the references' own imaging left something, 0 elsewhere: (shells, nodes)."""
        shape = (len(self._shells), -1)
        if transfer is None:
            return torch.ones(len(self._reference_points), device=self.band.device).view(shape)
        nearest = torch.round(self._reference_points).long()
        sign = torch.where(nearest[:, :1] < 0, -1, 1)
        x, y, z = (nearest * sign).cpu().unbind(-1)
        seen = np.abs(transfer[z.numpy(), y.numpy(), x.numpy()]) >= LEAST_TRANSFER * np.abs(transfer).max()
        return torch.from_numpy(seen.astype(np.float32)).to(self.band.device).view(shape)

    def model(self, table: SpectrumTable) -> MagnitudeModel:
        """Prepare the references of `table`; its band must reach to `reach`."""
        identity = torch.eye(3, device=self.band.device).expand(table.batch, 1, 3, 3).contiguous()
        values = table.rotated(self._reference_points, identity)
        magnitudes = values.abs().view(table.batch, len(self._shells), -1)
        share = self._node_weights * self._coverage
        mean = (magnitudes * share).sum(-1, keepdim=True) / share.sum(-1)[:, None].clamp(min=1e-12)
        magnitudes = (magnitudes - mean) * self._coverage
        norm = self.grid.correlate(self._imaged, self._complex((magnitudes * magnitudes) @ self._reference_basis))
        # The expansion of a squared magnitude is cut off, so it can dip below what a sum of squares may be.
        # A reference of nothing matches nothing.
        floor = (0.05 * norm.mean(dim=(1, 2, 3), keepdim=True)).clamp(min=1e-12)
        return MagnitudeModel(self._complex(magnitudes @ self._reference_basis), torch.maximum(norm, floor).rsqrt())

    def correlation(self, magnitudes: torch.Tensor, model: MagnitudeModel) -> torch.Tensor:
        """c~ on the grid (batch, beta, alpha, gamma), but for the particle's own norm; magnitudes are (batch,
        components).
        """
        total = magnitudes.new_zeros((len(magnitudes), len(self._thin_counts))).index_add_(1, self._thin, magnitudes)
        magnitudes = magnitudes - (total / self._thin_counts)[:, self._thin]
        if self.band.transfer is not None:
            magnitudes = magnitudes * self.band.transfer.abs()
        return self.grid.correlate(self._project(magnitudes), model.coefficients) * model.inverse_norm

    def candidates(
        self,
        magnitudes: torch.Tensor,
        model: MagnitudeModel,
        count: int,
        around: tuple[torch.Tensor, float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best `count` separate local maxima of c~: quaternions (batch, count, 4), and which of them are real
        ones. With `around` = (quaternions (batch, 4), degrees), those no further away, and first of all these
        themselves.
        """
        values = self.correlation(magnitudes, model)
        if around is not None:
            near, degrees = around
            closeness = (near @ self._every_quaternion().T).abs().view_as(values)
            values = torch.where(closeness >= math.cos(math.radians(min(degrees, 180.0)) / 2), values, -torch.inf)
        # More than are asked for, as some are too close to better ones; their distances are a square table.
        alike = 1 if self._group is None else len(self._group)
        values, index = local_maxima(values, min(4 * alike * count, 600 + count))
        quaternions = self.grid.quaternions(index)
        if around is not None:
            highest = values.new_full((len(values), 1), torch.inf)
            values, quaternions = torch.cat([highest, values], 1), torch.cat([near[:, None], quaternions], 1)
        chosen = suppress(values, quaternions, count, SEPARATION_STEPS * self.grid.step_degrees, self._group)
        found = chosen >= 0
        picked = torch.take_along_dim(quaternions, chosen.clamp(min=0)[..., None], dim=1)
        return picked, found

    def _every_quaternion(self) -> torch.Tensor:
        count = self.grid.shape[0] * self.grid.steps**2
        return self.grid.quaternions(torch.arange(count, device=self.band.device))
