"""Fourier transforms of volumes at arbitrary frequencies, in batches, on any device.

Frequencies are (kx, ky, kz) in cycles per box. Transforms are about the box's centre c (voxel n//2):
F(k) = sum_r f(r) exp(-2 pi i k . (r - c) / n), so that a rotation of the volume about its centre is one of F.
"""

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.numerics.compiled import compiled

# Corners of a cell as (x, y, z) steps; the order of the weights below.
_CORNERS = [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]


@compiled
def _sample_rotated(
    values: NDArray[np.float32],
    sides: tuple[int, int, int],
    oversampling: float,
    points: NDArray[np.float32],
    matrices: NDArray[np.float32],
    result: NDArray[np.float32],
) -> None:
    """`SpectrumTable.rotated` on a CPU: values (volumes, nodes, 2), matrices and result per volume or all for the
    one.
    """
    _, sy, sx = sides
    reach = sx - 1
    for b in range(matrices.shape[0]):
        table = values[b if values.shape[0] > 1 else 0]
        for c in range(matrices.shape[1]):
            m = matrices[b, c] * np.float32(oversampling)
            for j in range(points.shape[0]):
                px, py, pz = points[j, 0], points[j, 1], points[j, 2]
                x = px * m[0, 0] + py * m[1, 0] + pz * m[2, 0]
                y = px * m[0, 1] + py * m[1, 1] + pz * m[2, 1]
                z = px * m[0, 2] + py * m[1, 2] + pz * m[2, 2]
                sign = np.float32(1.0)
                if x < 0:
                    x, y, z, sign = -x, -y, -z, np.float32(-1.0)
                y += reach
                z += reach
                ix, iy, iz = int(x), int(y), int(z)
                fx, fy, fz = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
                row = (iz * sy + iy) * sx + ix
                for part in range(2):
                    low = np.float32(0.0)
                    high = np.float32(0.0)
                    for far in range(2):
                        at = row + far * sx * sy
                        first = table[at, part] + fx * (table[at + 1, part] - table[at, part])
                        at += sx
                        second = table[at, part] + fx * (table[at + 1, part] - table[at, part])
                        if far == 0:
                            low = first + fy * (second - first)
                        else:
                            high = first + fy * (second - first)
                    value = low + fz * (high - low)
                    result[b, c, j, part] = value * sign if part == 1 else value


class SpectrumTable:
    """Transforms of a batch of volumes on a grid `oversampling` times finer than one cycle per box, to be interpolated.

    Interpolation is trilinear. In real space that multiplies the volume by sinc^2 along each axis; the volumes are
    divided by it beforehand, so what is left are aliases, 0.4% in amplitude at half the box's radius for a fourfold
    grid. The table is filled by three matrix products (a zoom transform of just the band), cheaper than an FFT of a
    padded box.

    `values` is (batch, nodes, 2), real and imaginary parts of nodes on a grid of `sides` (z, y, x), x not negative.

    `volumes` is (batch, n, n, n), real, on the device where the table shall live; n may be any Fourier-cropped sampling
    of the box that still holds `k_max` cycles.
    """

    def __init__(self, volumes: torch.Tensor, k_max: float, oversampling: int = 4) -> None:
        n = volumes.shape[-1]
        self.oversampling = oversampling
        self.k_max = k_max
        self.batch = len(volumes)
        # One node more than the band needs, and one for the far corner of the last cell.
        self._reach = math.ceil(k_max * oversampling) + 2
        full = 2 * self._reach + 1
        self.sides = (full, full, self._reach + 1)
        position = np.arange(n) - n // 2
        correction = np.sinc(position / (n * oversampling)) ** -2

        def kernel(nodes: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
            phase = np.exp(-2j * np.pi * np.outer(nodes, position) / (n * oversampling)) * correction
            return torch.from_numpy(phase.astype(np.complex64)).to(volumes.device)

        every = kernel(np.arange(-self._reach, self._reach + 1))
        half = kernel(np.arange(self._reach + 1))
        along_x = torch.complex(volumes @ half.real.T, volumes @ half.imag.T)
        along_y = torch.matmul(every, along_x)
        along_z = torch.matmul(every, along_y.reshape(self.batch, n, full * (self._reach + 1)))
        self.values = torch.view_as_real(along_z).view(self.batch, -1, 2)
        _, sy, sx = self.sides
        steps = torch.tensor([(z * sy + y) * sx + x for x, y, z in _CORNERS], device=volumes.device)
        self._corner_steps = steps

    @staticmethod
    def bytes_for(k_max: float, oversampling: int) -> int:
        """Memory that making one such table takes, intermediate products included."""
        reach = math.ceil(k_max * oversampling) + 2
        return 16 * (2 * reach + 1) ** 2 * (reach + 1)

    def only(self, volume: int) -> "SpectrumTable":
        """The table of one volume of the batch."""
        one = copy.copy(self)
        one.values, one.batch = self.values[volume : volume + 1], 1
        return one

    def _locate(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First corner's row, position within the cell (.., 3), and the sign that folded k onto kx >= 0."""
        sign = 1.0 - 2.0 * (points[..., 0] < 0)
        scaled = points * (sign * self.oversampling)[..., None]
        scaled[..., 1:] += self._reach
        cell = scaled.floor()
        within = scaled - cell
        cell = cell.to(torch.int64)
        _, sy, sx = self.sides
        row = (cell[..., 2] * sy + cell[..., 1]) * sx + cell[..., 0]
        if self.batch > 1:
            volume = torch.arange(self.batch, device=points.device) * math.prod(self.sides)
            row += volume.view(-1, *([1] * (row.ndim - 1)))
        return row, within, sign

    def rotated(self, points: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """F(R^-1 k) at the frequencies k of `points` (points, 3) for rotations R: complex (batch, poses, points).

        `matrices` is (batch, poses, 3, 3). This is the transform of the volume after the rotation R.
        """
        if points.device.type != "cpu":
            return self.sample(torch.matmul(points, matrices))
        result = torch.empty((*matrices.shape[:2], len(points), 2))
        _sample_rotated(
            self.values.numpy(), self.sides, float(self.oversampling), points.numpy(), matrices.numpy(), result.numpy()
        )
        return torch.view_as_complex(result)

    def sample(self, points: torch.Tensor) -> torch.Tensor:
        """F at `points` (batch, .., 3) within the band, complex (batch, ..). A table of one volume takes any batch."""
        row, within, sign = self._locate(points)
        x, y, z = within.unbind(-1)
        low_y, low_z = 1 - y, 1 - z
        plane = torch.stack([low_y * low_z, y * low_z, low_y * z, y * z], dim=-1)
        weights = torch.stack([plane * (1 - x)[..., None], plane * x[..., None]], dim=-1).flatten(-2)
        rows = row[..., None] + self._corner_steps
        result = torch.nn.functional.embedding_bag(
            rows.view(-1, 8), self.values.view(-1, 2), per_sample_weights=weights.view(-1, 8), mode="sum"
        ).view(*row.shape, 2)
        result[..., 1] *= sign
        return torch.view_as_complex(result)

    def sample_gradient(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F and its gradient by (kx, ky, kz): complex (batch, ..) and (batch, .., 3).

        The gradient is that of the interpolant itself, so value and slope always agree.
        """
        row, within, sign = self._locate(points)
        x, y, z = within.unbind(-1)
        low_x, low_y, low_z = 1 - x, 1 - y, 1 - z
        p = self.oversampling
        values = self.values.view(-1, 2)[(row[..., None] + self._corner_steps).view(-1)].view(*row.shape, 4, 2, 2)
        # Along x first, then y, then z; (corner pairs, re/im) shrink by two each time.
        on_x = values[..., 0, :] * low_x[..., None, None] + values[..., 1, :] * x[..., None, None]
        by_x = values[..., 1, :] - values[..., 0, :]
        on_x, by_x = on_x.view(*row.shape, 2, 2, 2), by_x.view(*row.shape, 2, 2, 2)
        wy, wx = y[..., None, None], low_y[..., None, None]
        on_xy = on_x[..., 0, :] * wx + on_x[..., 1, :] * wy
        by_x_on_y = by_x[..., 0, :] * wx + by_x[..., 1, :] * wy
        by_y = on_x[..., 1, :] - on_x[..., 0, :]
        high, low = z[..., None], low_z[..., None]
        value = on_xy[..., 0, :] * low + on_xy[..., 1, :] * high
        gradient = (
            torch.stack(
                [
                    by_x_on_y[..., 0, :] * low + by_x_on_y[..., 1, :] * high,
                    by_y[..., 0, :] * low + by_y[..., 1, :] * high,
                    on_xy[..., 1, :] - on_xy[..., 0, :],
                ],
                dim=-2,
            )
            * p
        )
        # F(k) = conj F(-k), so the fold conjugates the value, and the slope changes sign with k as well.
        value[..., 1] *= sign
        gradient[..., 0] *= sign[..., None]
        return torch.view_as_complex(value), torch.view_as_complex(gradient)


def centred_rfft(volumes: torch.Tensor) -> torch.Tensor:
    """`rfftn` of real boxes (.., n, n, n) about their centre, voxel n//2."""
    shifted = torch.fft.ifftshift(volumes, dim=(-3, -2, -1))
    spectra: torch.Tensor = torch.fft.rfftn(shifted, dim=(-3, -2, -1))
    return spectra


def centred_irfft(spectra: torch.Tensor, box_size: int) -> torch.Tensor:
    """The inverse of `centred_rfft`."""
    volumes = torch.fft.irfftn(spectra, s=(box_size,) * 3, dim=(-3, -2, -1))
    centred: torch.Tensor = torch.fft.fftshift(volumes, dim=(-3, -2, -1))
    return centred
