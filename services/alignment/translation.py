"""The best shift for given rotations: the constrained correlation over a grid of shifts, by a zoomed Fourier
transform.
"""

import math

import numpy as np
import torch

from services.alignment.band import Band

_STEPS_PER_CYCLE = 3.0
"""Samples of the correlation per period of its finest component; a parabola then finds the peak to a few percent."""


class ShiftSearch:
    """All shifts up to `max_shift_voxels` along each axis, for one band.

    The correlation is band-limited and only a part of the box is asked for, so three small matrix products (one an
    axis) take the place of an inverse FFT of the box, and the grid may be as fine as the band needs.
    """

    def __init__(self, band: Band, max_shift_voxels: float) -> None:
        n = band.box_size
        self.max_shift_voxels = max_shift_voxels
        reach = math.floor(band.k_max + 1e-6)
        count = math.ceil(max_shift_voxels / (n / (_STEPS_PER_CYCLE * band.k_max)))
        self._step = max_shift_voxels / count if count else 0.0
        self._shifts = np.arange(-count, count + 1) * self._step

        def kernel(k: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
            phases = np.exp(2j * np.pi * np.outer(self._shifts, k) / n)
            return torch.from_numpy(phases.astype(np.complex64)).to(band.device)

        self._full = kernel(np.arange(-reach, reach + 1))
        self._half = kernel(np.arange(reach + 1)).T.contiguous()
        self._sides = (2 * reach + 1, 2 * reach + 1, reach + 1)
        k = band.points.long()
        self._place = ((k[:, 2] + reach) * self._sides[1] + k[:, 1] + reach) * self._sides[2] + k[:, 0]

    def best(self, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where Re sum_j Z_j exp(2 pi i k_j t / n) is largest, and its value there.

        `products` are Z = X conj(R A), complex (items, components). Returns shifts t (items, 3) as (x, y, z) in voxels
        and values (items,); both from a parabola through the best point of the grid.
        """
        items, count = len(products), len(self._shifts)
        cube = products.new_zeros((items, math.prod(self._sides)))
        cube[:, self._place] = products
        along_z = torch.matmul(self._full, cube.view(items, self._sides[0], -1))
        along_y = torch.matmul(self._full, along_z.view(items * count, self._sides[1], self._sides[2]))
        along_y = along_y.view(items * count * count, self._sides[2])
        values = (along_y.real @ self._half.real - along_y.imag @ self._half.imag).view(items, -1)
        value, best = values.max(dim=1)
        place = torch.stack([best % count, best // count % count, best // count**2], dim=1)
        shift = (place - count // 2).to(value.dtype) * self._step
        if count > 1:
            for axis, stride in enumerate((1, count, count * count)):
                inner = (place[:, axis] > 0) & (place[:, axis] < count - 1)
                before = torch.where(inner, best - stride, best)
                after = torch.where(inner, best + stride, best)
                low, high = values.gather(1, before[:, None])[:, 0], values.gather(1, after[:, None])[:, 0]
                middle = values.gather(1, best[:, None])[:, 0]
                bend = (2 * middle - low - high).clamp(min=1e-20)
                offset = torch.where(inner, ((high - low) / (2 * bend)).clamp(-0.5, 0.5), 0.0)
                shift[:, axis] += offset * self._step
                value = value + torch.where(inner, (high - low) * offset / 4, 0.0)
        return shift, value
