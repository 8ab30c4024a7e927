"""Averages as sums in Fourier space: what each particle adds, and the average without it."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.masks import soft_sphere, usual_edge_voxels
from cryofleet.numerics.spectra import SpectrumTable, centred_irfft, centred_rfft
from services.alignment.band import Band, rotation_matrices

_OVERSAMPLING = 2
_CHUNK = 1 << 22
"""Components of turned particles that are held at a time."""
JOINED_ANGSTROM = 50.0
JOINED_CYCLES = 4.0
"""Coarser than this (Å), or than so many cycles per box, particles of both half sets are compared with the average of
all; finer, each with its own."""
_COVERAGE_FLOOR = 0.1
"""Where fewer than this share of the particles was sampled, the average is damped rather than its noise blown up."""


def _quaternions(rotations: Rotation) -> torch.Tensor:
    return torch.from_numpy(np.atleast_2d(rotations.as_quat())).float()


class Contributions:
    """What particles add to the sums on one band of the reference's Fourier space.

    For a particle X at pose (R, t) and each g of the point group: (w X)(R g k) exp(2 pi i R g k . t / n) to the sum and
    w(R g k)^2 to its weight, both divided by the order of the group, where w is the transfer function. It is
    interpolated just as the particle is: near the wedge's planes, which at low frequencies is everywhere, both fall off
    alike, and their quotient stays right.
    """

    def __init__(self, band: Band, transfer: NDArray[np.float32] | None, symmetry: Rotation, device: str) -> None:
        n = band.box_size
        self.band = band
        self._group = rotation_matrices(_quaternions(symmetry)).to(device)
        self._mask = torch.from_numpy(_inscribed(n)).to(device)
        k = np.fft.fftfreq(n) * n
        self._axes = [torch.from_numpy(a.astype(np.float32)).to(device) for a in (k, k, np.fft.rfftfreq(n) * n)]
        self._transfer: torch.Tensor | None = None
        self._sampled: SpectrumTable | None = None
        if transfer is not None:
            self._transfer = torch.from_numpy(transfer).to(device)
            spread = centred_irfft(self._transfer.square().to(torch.complex64), n) * self._mask
            self._sampled = SpectrumTable(spread[None], band.k_max, _OVERSAMPLING)

    def _recentred(self, particles: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Particles moved back by their shifts and cut to the sphere that can be rotated within the box."""
        n = self.band.box_size
        spectra = torch.fft.rfftn(particles, dim=(1, 2, 3))
        if self._transfer is not None:
            spectra = spectra * self._transfer
        for axis, (k, place) in enumerate(zip(self._axes, (2, 1, 0), strict=True)):
            angle = shifts[:, place, None] * k * (2 * math.pi / n)
            shape = [len(shifts), 1, 1, 1]
            shape[axis + 1] = len(k)
            spectra = spectra * torch.complex(torch.cos(angle), torch.sin(angle)).view(shape)
        moved: torch.Tensor = torch.fft.irfftn(spectra, s=(n, n, n), dim=(1, 2, 3))
        return moved * self._mask

    def of(
        self, particles: torch.Tensor, quaternions: torch.Tensor, shifts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of the sum, complex (batch, components), and of the weight, real (batch, components).

        `particles` is (batch, n, n, n), poses are (batch, 4) and (batch, 3).
        """
        return self.expected(particles, quaternions[:, None], shifts[:, None], shifts.new_ones((len(shifts), 1)))

    def expected(
        self, particles: torch.Tensor, quaternions: torch.Tensor, shifts: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of particles that may be in several poses, (batch, poses, 4) and (batch, poses, 3), with `weights`
        (batch, poses), which need not sum to 1.
        """
        k = self.band.points
        total = weights.sum(dim=1, keepdim=True)
        middle = (weights[..., None] * shifts).sum(dim=1) / total.clamp(min=1e-12)
        table = SpectrumTable(self._recentred(particles, middle), self.band.k_max, _OVERSAMPLING)
        # (R g) takes a reference frame's frequency k to R g k in the particle's.
        forward = torch.matmul(rotation_matrices(quaternions)[:, :, None], self._group).flatten(1, 2)
        order = len(self._group)
        share = weights.repeat_interleave(order, dim=1) / order
        apart = (shifts - middle[:, None]).repeat_interleave(order, dim=1)
        terms = k.new_zeros((len(particles), len(k)), dtype=torch.complex64)
        coverage = k.new_zeros((len(particles), len(k)))
        step = max(1, _CHUNK // (len(k) * len(particles)))
        for first in range(0, forward.shape[1], step):
            # `rotated` asks for R^-1 k, so it is given the inverse.
            inverse = forward[:, first : first + step].transpose(-1, -2).contiguous()
            part = share[:, first : first + step, None]
            values = table.rotated(k, inverse)
            offsets = apart[:, first : first + step]
            if bool(offsets.any()):
                # (R g k) . t = k . (R g)^-1 t
                angle = torch.matmul(torch.matmul(inverse, offsets[..., None])[..., 0], k.T) * (
                    2 * math.pi / self.band.box_size
                )
                values = values * torch.complex(torch.cos(angle), torch.sin(angle))
            terms += (values * part).sum(dim=1)
            if self._sampled is not None:
                flat = inverse.flatten(0, 1)[None]
                sampled = self._sampled.rotated(k, flat)[0].real.clamp(min=0.0).view(values.shape)
                coverage += (sampled * part).sum(dim=1)
        return terms, coverage if self._sampled is not None else coverage + total


def _inscribed(box_size: int) -> NDArray[np.float32]:
    """The soft sphere that can be turned within the box."""
    edge = usual_edge_voxels(box_size)
    return soft_sphere(box_size, box_size / 2 - edge, edge)


def noise_share(box_size: int) -> float:
    """Of the particles' noise in a component of `Contributions`' sums: they are cut to the box's sphere."""
    return float(np.square(_inscribed(box_size)).mean())


def divide(sums: torch.Tensor, weights: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The average on its band: sum / weight, the weight never below a tenth of `count`."""
    floor = torch.as_tensor(count, device=weights.device, dtype=weights.dtype) * _COVERAGE_FLOOR
    return sums / torch.maximum(weights, floor.clamp(min=1e-3))


def volume_of(band: Band, components: torch.Tensor, box_size: int | None = None) -> torch.Tensor:
    """Volumes (batch, m, m, m) of components (batch, components) on a band; m is the box, or a Fourier-cropped
    sampling of it.
    """
    m = band.box_size if box_size is None else box_size
    k = band.points.long()
    spectra = components.new_zeros((len(components), m, m, m // 2 + 1))
    z, y, x = k[:, 2] % m, k[:, 1] % m, k[:, 0]
    spectra[:, z, y, x] = components
    # Of the plane kx = 0 the band has one of each pair; the other is its conjugate.
    plane = x == 0
    spectra[:, (-k[:, 2])[plane] % m, (-k[:, 1])[plane] % m, 0] = components[:, plane].conj()
    return centred_irfft(spectra, m) * (m / band.box_size) ** 3


def components_of(band: Band, volume: NDArray[np.float32]) -> torch.Tensor:
    """The components (1, components) of a volume on a band."""
    return band.of(centred_rfft(torch.from_numpy(volume[None]).to(band.device)))
