"""Integrals over rigid transformations as sums over a few of them, weighted by the cells around each (FAML, eqs. 3-6).

The cell of a transformation in a set S is what lies nearer to it than to any other of S by the distance

    tau(1, 2)^2 = ||I - R1^T R2||_F^2 + a |t1 - t2|^2 = 8 (1 - (q1 . q2)^2) + a |t1 - t2|^2

of rotations R (quaternions q) and shifts t. Its volume is the share of random transformations that fall into it:
rotations uniform on SO(3) (the paper draws Euler angles independently, which is not), shifts uniform in the box that
bounds those of S. Of a reference with a point group G, R and R g are one: the least distance over G counts.
"""

import numpy as np
import torch

SAMPLES = 10_000
SHIFT_WEIGHT = 1.0
"""a, per squared voxel."""


def _times(quaternions: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products (n, 4) of quaternions (n, 4) with one (4,), which acts first."""
    v, w = quaternions[:, :3], quaternions[:, 3:]
    u, s = right[:3], right[3]
    vector = w * u + s * v + torch.linalg.cross(v, u.expand_as(v))
    return torch.cat([vector, w * s - (v * u).sum(-1, keepdim=True)], dim=-1)


class VoronoiWeights:
    """Cells measured by one fixed set of random transformations, so that the same candidates have the same weights.

    `group` (order, 4) are the quaternions of the references' point group.
    """

    def __init__(
        self,
        seed: int,
        device: str = "cpu",
        samples: int = SAMPLES,
        shift_weight: float = SHIFT_WEIGHT,
        group: torch.Tensor | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        quaternions = rng.normal(size=(samples, 4))
        quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
        self._quaternions = torch.from_numpy(quaternions).float().to(device)
        self._places = torch.from_numpy(rng.uniform(size=(samples, 3))).float().to(device)
        self._shift_weight = shift_weight
        # q1 . (q2 g) = (q1 g^-1) . q2, and G holds its inverses.
        self._alike = [self._quaternions] if group is None else [_times(self._quaternions, g) for g in group]

    def of(self, quaternions: torch.Tensor, shifts: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Shares of the cells (batch, candidates), of sum 1, of candidates (batch, candidates, 4) and (.., 3); those
        not `found` have none.
        """
        batch, count = found.shape
        weights = torch.zeros((batch, count), device=shifts.device)
        samples = len(self._places)
        for i in range(batch):
            real = torch.nonzero(found[i])[:, 0]
            if not len(real):
                continue
            own = shifts[i, real]
            low, high = own.amin(dim=0), own.amax(dim=0)
            places = low + self._places * (high - low)
            nearness = torch.stack([(q @ quaternions[i, real].T).square() for q in self._alike]).amax(dim=0)
            # |t1 - t2|^2 but for |t1|^2, the same for all candidates
            apart = own.square().sum(-1) - 2 * (places @ own.T)
            nearest = (self._shift_weight * apart - 8 * nearness).argmin(dim=1)
            weights[i, real] = torch.bincount(nearest, minlength=len(real)).float() / samples
        return weights
