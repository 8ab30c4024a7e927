"""Turning a volume so that its point group's axes lie along the frame's."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import rotation_grid
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.band import Band, rotation_matrices

_STEP_DEGREES = 10.0
_ENERGY_CHUNK = 1_000_000


def _energies(table: SpectrumTable, band: Band, rotations: Rotation, group: Rotation) -> NDArray[np.float64]:
    """sum_k |mean_g A(Q g k)|^2 for each Q: how much of the volume is left when it is symmetrised in the frame Q."""
    members = rotation_matrices(torch.from_numpy(group.as_quat()).float()).to(band.device)
    frames = rotation_matrices(torch.from_numpy(np.atleast_2d(rotations.as_quat())).float()).to(band.device)
    energies = []
    for chunk in torch.split(frames, max(1, _ENERGY_CHUNK // (len(band) * len(members)))):
        turned = torch.matmul(chunk[:, None], members).flatten(0, 1).transpose(-1, -2).contiguous()
        values = table.rotated(band.points, turned[None])[0].view(len(chunk), len(members), -1)
        energies.append(values.mean(dim=1).abs().square().sum(-1))
    return torch.cat(energies).double().cpu().numpy()


def find_axes(volume: NDArray[np.float32], k_max: float, group: Rotation, device: str = "cpu") -> Rotation:
    """The rotation Q for which a(Q r) is most nearly symmetric under `group`, looking at up to `k_max` cycles per box.

    Every rotation of a grid of 10 degrees is tried, then finer ones around the best, down to half a degree. A pose R
    of the volume becomes R Q.
    """
    band = Band(volume.shape[0], 1.0, k_max, None, device)
    table = SpectrumTable(torch.from_numpy(volume[None]).to(device), band.k_max)
    # Q and Q g are the same frame: of each such set the smallest turn is looked at, and a margin against gaps.
    grid = rotation_grid(_STEP_DEGREES)
    scalars = np.abs(grid.as_quat() @ (group.as_quat() * [-1, -1, -1, 1]).T)
    slack = np.radians(_STEP_DEGREES) / 2
    smallest = np.arccos(np.abs(grid.as_quat()[:, 3]).clip(max=1)) <= np.arccos(scalars.clip(max=1)).min(axis=1) + slack
    grid = grid[np.flatnonzero(smallest)]
    best = grid[int(np.argmax(_energies(table, band, grid, group)))]
    around = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    step = _STEP_DEGREES / 3
    while step > 0.4:
        near = best * Rotation.from_rotvec(np.radians(step) * around)
        best = near[int(np.argmax(_energies(table, band, near, group)))]
        step /= 2
    return best
