"""Correlation of functions on shells over all rotations at once.

For p and q given by their coefficients on shells,

    C(R) = sum_l sum_mn I^l_mn conj(D^l_mn(R)),    I^l_mn = sum_r p_lm(r) conj(q_ln(r)),

is the correlation of p with R q (Kovacs & Wriggers 2002). Their transform takes beta to a Fourier sum through rotations
by pi/2, so that one 3D FFT gives a grid on the torus, which holds each rotation twice. Here beta is sampled directly on
0..pi with tabulated d^l_mn(beta), and Fourier sums in alpha and gamma follow: half as many points, each rotation once.
Those sums are matrix products: at 72 angles and degrees around 24 they take less time than an FFT of mostly zeros.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.harmonics import wigner_d


class RotationGrid:
    """The Euler grid of a correlation to band limit `degrees[-1]`, for real functions with the given degrees only.

    `steps` angles of alpha and gamma, `steps` / 2 of beta at the middle of each step. Immutable; see `rotation_grid`.
    """

    def __init__(self, degrees: tuple[int, ...], steps: int, device: str) -> None:
        l_max = degrees[-1]
        if steps < 2 * l_max + 1:
            raise ValueError(f"{steps} steps are too few for degree {l_max}")
        self.degrees = degrees
        self.steps = steps
        self.step_degrees = 360.0 / steps
        self.beta = (np.arange(steps // 2) + 0.5) * np.pi / (steps // 2)
        self.shape = (steps // 2, steps, steps)
        # d^l_mn with m = -L..L and n = 0..L: what is left out follows because the correlation is real.
        table = np.zeros((2 * l_max + 1, l_max + 1, len(self.beta), len(degrees)), dtype=np.float32)
        for i, degree in enumerate(degrees):
            d = wigner_d(degree, self.beta)[:, :, degree:]
            table[l_max - degree : l_max + degree + 1, : degree + 1, :, i] = d.transpose(1, 2, 0)
        self._table = torch.from_numpy(table.reshape(-1, len(self.beta), len(degrees))).to(device)
        angle = 2 * np.pi * np.arange(steps) / steps
        alpha = np.exp(1j * np.outer(angle, np.arange(-l_max, l_max + 1))).astype(np.complex64)
        self._alpha = torch.from_numpy(alpha).to(device)
        # Re sum_n c_n exp(i n gamma), c_n = 2 for what stands for -n as well; rows are (re, im) of each n.
        twice = np.where(np.arange(l_max + 1) > 0, 2.0, 1.0)[:, None]
        turns = np.outer(np.arange(l_max + 1), angle)
        gamma = np.stack([twice * np.cos(turns), -twice * np.sin(turns)], axis=1).reshape(-1, steps)
        self._gamma = torch.from_numpy(gamma.astype(np.float32)).to(device)

    def correlate(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """C(R) on the grid, (batch, beta, alpha, gamma), for real functions.

        `p` and `q` are complex (batch, shells, degrees, m = 0..L); a batch of one is taken for all of the other's.
        """
        l_max = self.degrees[-1]
        width, half = 2 * l_max + 1, l_max + 1
        batch = max(len(p), len(q))
        signs = torch.ones(l_max, device=p.device)
        signs[0::2] = -1
        negative = (p[..., 1:].conj() * signs).flip(-1)
        full = torch.cat([negative, p], dim=-1)
        # (batch, degree, m, n), the sum over shells.
        products = torch.matmul(full.permute(0, 2, 3, 1), q.conj().permute(0, 2, 1, 3))
        stacked = (
            torch.view_as_real(products).permute(2, 3, 1, 0, 4).reshape(width * half, len(self.degrees), batch * 2)
        )
        sums = torch.bmm(self._table, stacked).reshape(width, half, len(self.beta), batch, 2)
        ordered = torch.view_as_complex(sums.permute(3, 2, 0, 1, 4).contiguous())
        over_alpha = torch.matmul(self._alpha, ordered)
        return torch.view_as_real(over_alpha).flatten(-2) @ self._gamma

    def rotations(self, index: NDArray[np.int64]) -> Rotation:
        """The rotations of flat indices into a grid (beta, alpha, gamma)."""
        quaternions = self.quaternions(torch.from_numpy(index.ravel()))
        return Rotation.from_quat(quaternions.double().numpy())

    def quaternions(self, index: torch.Tensor) -> torch.Tensor:
        """Unit quaternions (qx, qy, qz, qw) of flat indices into a grid, of the index's shape + (4,), float32."""
        beta = (torch.div(index, self.steps**2, rounding_mode="floor").double() + 0.5) * (math.pi / (self.steps // 2))
        alpha = (torch.div(index, self.steps, rounding_mode="floor") % self.steps).double() * (2 * math.pi / self.steps)
        gamma = (index % self.steps).double() * (2 * math.pi / self.steps)
        total, difference = (alpha + gamma) / 2, (alpha - gamma) / 2
        sine, cosine = torch.sin(beta / 2), torch.cos(beta / 2)
        parts = [
            -sine * torch.sin(difference),
            sine * torch.cos(difference),
            cosine * torch.sin(total),
            cosine * torch.cos(total),
        ]
        return torch.stack(parts, dim=-1).float()


@lru_cache(maxsize=8)
def euler_grid(degrees: tuple[int, ...], steps: int, device: str) -> RotationGrid:
    """The grid for these degrees, made once per process and device."""
    return RotationGrid(degrees, steps, device)


def local_maxima(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest `count` points of each grid (batch, beta, alpha, gamma) that none of their neighbours exceeds.

    Returns (values, flat indices), each (batch, count), highest first; where a grid has fewer, -inf fills up.
    """
    around = torch.maximum(values.roll(1, dims=3), values.roll(-1, dims=3))
    highest = torch.maximum(values, around)
    highest = torch.maximum(highest, torch.maximum(highest.roll(1, dims=2), highest.roll(-1, dims=2)))
    # Beta does not go round: its first and last rows have one neighbour each.
    beyond = highest.clone()
    torch.maximum(beyond[:, 1:], highest[:, :-1], out=beyond[:, 1:])
    torch.maximum(beyond[:, :-1], highest[:, 1:], out=beyond[:, :-1])
    peaks = torch.where(values >= beyond, values, -torch.inf).flatten(1)
    top = torch.topk(peaks, min(count, peaks.shape[1]), dim=1)
    return top.values, top.indices


def suppress(
    values: torch.Tensor,
    quaternions: torch.Tensor,
    count: int,
    separation_degrees: float,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """Non-maximum suppression on SO(3): positions of the best `count` that keep `separation_degrees` from better ones.

    `values` (batch, points) must be sorted, highest first, `quaternions` is (batch, points, 4). Distances are angles
    of rotation, so the crowding of Euler grids at their poles does not matter; rotations R and R g are the same for g
    of the `group` (order, 4). Returns (batch, count), -1 where none is left.
    """
    limit = math.cos(math.radians(separation_degrees) / 2)
    closeness = (quaternions @ quaternions.transpose(1, 2)).abs()
    for g in () if group is None else group[1:]:
        # (q g) . p: the product with a fixed quaternion is linear.
        x, y, z, w = (float(v) for v in g)
        by = quaternions.new_tensor([[w, -z, y, -x], [z, w, -x, -y], [-y, x, w, -z], [x, y, z, w]])
        torch.maximum(closeness, (quaternions @ by @ quaternions.transpose(1, 2)).abs(), out=closeness)
    close = closeness > limit
    free = values > -torch.inf
    chosen = torch.full((len(values), count), -1, dtype=torch.int64, device=values.device)
    row = torch.arange(len(values), device=values.device)
    for i in range(count):
        best = free.int().argmax(dim=1)
        found = free[row, best]
        chosen[:, i] = torch.where(found, best, -1)
        free = free & ~(close[row, best] & found[:, None])
    return chosen
