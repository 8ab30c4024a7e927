"""The Fourier components that an alignment compares."""

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

LEAST_TRANSFER = 0.02
"""Of the largest: components that imaging left less of are taken as missing."""


class Band:
    """The components of a box that imaging left and that lie between two frequencies.

    `transfer` says what imaging made of each component: float32 in the layout of `rfftn` `[z, y, x // 2 + 1]`, 0 where
    missing, 1 where whole, the CTF's and the dose's value else (`cryofleet.numerics.transfer` makes it); None where
    nothing is missing. A particle is modelled as X = transfer * (rotated reference) + noise.

    Of each Friedel pair one is kept, so every component counts the same; zero frequency and Nyquist are never in.
    `points` are their (kx, ky, kz) in cycles per box, ordered by |k|, on the band's device; `index` are their places
    in a flattened `rfftn` of the box; `k_min` and `k_max` are in cycles per box; the band's `transfer` (components,)
    is None where it is 1 for all.

    With `deviation`, the noise's standard deviation on each shell of the nearest integer radius, components are
    whitened: `of` and `imaged` divide by it, so that sums of squares are chi-squared.

    Raises InvalidArgument where nothing is left to compare.
    """

    def __init__(
        self,
        box_size: int,
        k_min: float,
        k_max: float,
        transfer: NDArray[np.float32] | None,
        device: str,
        deviation: NDArray[np.float64] | None = None,
    ) -> None:
        k = np.fft.fftfreq(box_size) * box_size
        kx = np.fft.rfftfreq(box_size) * box_size
        z, y, x = np.meshgrid(k, k, kx, indexing="ij")
        radius = np.sqrt(x * x + y * y + z * z)
        half = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
        below_nyquist = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.abs(z)) < box_size / 2
        kept = half & below_nyquist & (radius >= k_min - 1e-6) & (radius <= k_max + 1e-6)
        if transfer is not None:
            kept &= np.abs(transfer) >= LEAST_TRANSFER * np.abs(transfer).max()
        index = np.flatnonzero(kept)
        if index.size == 0:
            raise InvalidArgument(
                f"no Fourier component of the box of {box_size} voxels lies between {k_min:g} and {k_max:g} cycles "
                "per box and was imaged: give a wider band"
            )
        index = index[np.argsort(radius.ravel()[index], kind="stable")]
        points = np.stack([x.ravel()[index], y.ravel()[index], z.ravel()[index]], axis=1)
        self.box_size = box_size
        self.k_min = k_min
        self.k_max = float(radius.ravel()[index].max())
        self.radius: NDArray[np.float64] = radius.ravel()[index]
        self.directions: NDArray[np.float64] = points / self.radius[:, None]
        self.device = device
        self.points = torch.from_numpy(points.astype(np.float32)).to(device)
        self.index = torch.from_numpy(index).to(device)
        self.transfer: torch.Tensor | None = None
        if transfer is not None and (transfer.ravel()[index] != 1).any():
            self.transfer = torch.from_numpy(transfer.ravel()[index].astype(np.float32)).to(device)
        self.whitening: torch.Tensor | None = None
        if deviation is not None:
            shells = np.minimum(np.rint(self.radius).astype(np.int64), len(deviation) - 1)
            self.whitening = torch.from_numpy((1 / deviation[shells]).astype(np.float32)).to(device)
            self.transfer = self.whitening if self.transfer is None else self.transfer * self.whitening

    def __len__(self) -> int:
        return len(self.index)

    def below(self, k_max: float) -> "Band":
        """The band's first components, those up to `k_max` cycles per box."""
        count = int(np.searchsorted(self.radius, k_max + 1e-6))
        inner = copy.copy(self)
        inner.radius, inner.directions = self.radius[:count], self.directions[:count]
        inner.points, inner.index = self.points[:count], self.index[:count]
        inner.transfer = None if self.transfer is None else self.transfer[:count]
        inner.whitening = None if self.whitening is None else self.whitening[:count]
        inner.k_max = float(inner.radius.max())
        return inner

    def of(self, spectra: torch.Tensor) -> torch.Tensor:
        """The band's components (batch, components) of half spectra (batch, n, n, n//2 + 1)."""
        values = spectra.flatten(1).index_select(1, self.index)
        return values if self.whitening is None else values * self.whitening

    def imaged(self, models: torch.Tensor) -> torch.Tensor:
        """Rotated references (.., components) as imaging would show them."""
        return models if self.transfer is None else models * self.transfer

    def moved(self, values: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Components (batch, components) of particles after shifts (batch, 3) in voxels."""
        angle = (shifts @ self.points.T) * (-2 * math.pi / self.box_size)
        return values * torch.complex(torch.cos(angle), torch.sin(angle))


def cycles_per_box(box_size: int, voxel_size_angstrom: float, resolution_angstrom: float) -> float:
    """A resolution in Å as cycles per box, at most just below Nyquist."""
    return min(box_size * voxel_size_angstrom / resolution_angstrom, box_size / 2 - 0.5)


def rotation_matrices(quaternions: torch.Tensor) -> torch.Tensor:
    """Matrices (.., 3, 3) of unit quaternions (qx, qy, qz, qw) (.., 4)."""
    x, y, z, w = quaternions.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).view(*quaternions.shape[:-1], 3, 3)


def turn(quaternions: torch.Tensor, rotation_vectors: torch.Tensor) -> torch.Tensor:
    """Quaternions of exp(v) R: each rotation followed by a turn about v by |v| radians, in the particle's frame."""
    angle = rotation_vectors.norm(dim=-1, keepdim=True)
    # sin(a / 2) / a, which is 1/2 at 0.
    scale = 0.5 * torch.sinc(angle / (2 * math.pi))
    x, y, z = (rotation_vectors * scale).unbind(-1)
    w = torch.cos(angle / 2)[..., 0]
    qx, qy, qz, qw = quaternions.unbind(-1)
    product = torch.stack(
        [
            w * qx + x * qw + y * qz - z * qy,
            w * qy - x * qz + y * qw + z * qx,
            w * qz + x * qy - y * qx + z * qw,
            w * qw - x * qx - y * qy - z * qz,
        ],
        dim=-1,
    )
    return torch.nn.functional.normalize(product, dim=-1)


def turn_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rotation vectors (.., 3) of at most pi that `turn` rotations `first` (.., 4) into `second` (.., 4)."""
    x1, y1, z1, w1 = first.unbind(-1)
    x2, y2, z2, w2 = second.unbind(-1)
    # second conj(first)
    vector = torch.stack(
        [
            x2 * w1 - w2 * x1 - y2 * z1 + z2 * y1,
            y2 * w1 - w2 * y1 - z2 * x1 + x2 * z1,
            z2 * w1 - w2 * z1 - x2 * y1 + y2 * x1,
        ],
        dim=-1,
    )
    scalar = (first * second).sum(-1, keepdim=True)
    vector = torch.where(scalar < 0, -vector, vector)
    sine = vector.norm(dim=-1, keepdim=True)
    turned: torch.Tensor = vector * (2 * torch.atan2(sine, scalar.abs()) / sine.clamp(min=1e-12))
    return turned
