"""A filter of learned gains in Fourier space: what wedge, contrast transfer and reconstruction do to all alike."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

RATE = 20.0
"""Natural logarithm of a gain for a weight of 1: gains differ by orders of magnitude, and weights move by the learning
rate in a step."""


class LearnedTransfer(nn.Module):
    """Gains above zero, at first 1, for each frequency of boxes of `box_size` voxels."""

    def __init__(self, box_size: int) -> None:
        super().__init__()
        self.box_size = box_size
        self.weight = nn.Parameter(torch.zeros(box_size, box_size, box_size // 2 + 1))

    @property
    def reach(self) -> int:
        """Voxels to either side that a voxel's value depends on."""
        return self.box_size // 2

    def gains(self) -> Tensor:
        """(n, n, n // 2 + 1), of the half spectrum as `torch.fft.rfftn` has it."""
        return torch.exp(RATE * self.weight.float())

    def forward(self, volumes: Tensor, periodic: bool) -> Tensor:
        """Filtered volumes (batch, 1, z, y, x).

        Periodic ones have the box's size. Others have any, and go on beyond their faces as their mirror images.
        """
        with torch.autocast(volumes.device.type, enabled=False):
            volumes, gains = volumes.float(), self.gains()
            if periodic:
                return _filtered(volumes, gains)
            sides = volumes.shape[2:]
            for axis, side in enumerate(sides, start=2):
                volumes = volumes.index_select(axis, mirrored(side, self.reach, volumes.device))
            kernel = torch.fft.fftshift(torch.fft.irfftn(gains, (self.box_size,) * 3))
            kernel = functional.pad(kernel, [x for side in reversed(sides) for x in (0, side)])
            kernel = torch.roll(kernel, (-self.reach,) * 3, (0, 1, 2))
            z, y, x = (slice(self.reach, self.reach + side) for side in sides)
            return _filtered(volumes, torch.fft.rfftn(kernel))[..., z, y, x]

    @torch.no_grad()
    def correct(self, real: Tensor, made: Tensor) -> None:
        """Change the gains so that what had the mean power `made` (n, n, n // 2 + 1) gets `real`.

        That is exact but for what a window leaks from a frequency to its neighbours, which is less from time to time.
        """
        self.weight.add_(torch.log(real / made) / (2 * RATE))


def _filtered(volumes: Tensor, transfer: Tensor) -> Tensor:
    """Volumes (batch, 1, z, y, x), periodic, times a transfer function (z, y, x // 2 + 1) in Fourier space."""
    transform = torch.fft.rfftn(volumes, dim=(2, 3, 4)) * transfer
    result: Tensor = torch.fft.irfftn(transform, volumes.shape[2:], dim=(2, 3, 4))
    return result


def mirrored(side: int, reach: int, device: torch.device) -> Tensor:
    """Where a line of `side` voxels gets its values from when it goes on by `reach` to either end, mirrored at its
    ends as often as needed.
    """
    period = max(1, 2 * (side - 1))
    places = torch.arange(-reach, side + reach, device=device) % period
    return torch.minimum(places, period - places) if side > 1 else torch.zeros_like(places)


def windowed_power(volumes: Tensor) -> Tensor:
    """(batch, n, n, n // 2 + 1): power spectra of boxes (batch, 1, n, n, n) under a Hann window, above zero."""
    line = torch.hann_window(volumes.shape[-1], periodic=False, device=volumes.device)
    windowed = volumes[:, 0].float() * (line[:, None, None] * line[:, None] * line)
    transform = torch.fft.rfftn(windowed, dim=(1, 2, 3), norm="ortho")
    power: Tensor = transform.real**2 + transform.imag**2 + FLOOR
    return power


FLOOR = 1e-6
"""Added to power, whose logarithm is taken."""
