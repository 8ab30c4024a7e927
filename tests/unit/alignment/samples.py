"""Subtomograms whose poses are known: sums of Gaussians, evaluated anew at every pose, so that nothing is
interpolated.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import point_group, uniform_random
from cryofleet.numerics.wedge import wedge_mask

WEDGE = (-50.0, 70.0)


@dataclass(frozen=True)
class Blobs:
    """Gaussians at `centres` (k, 3) as (x, y, z), of deviations `widths` and heights `heights`, in box sides."""

    centres: NDArray[np.float64]
    widths: NDArray[np.float64]
    heights: NDArray[np.float64]

    def volume(
        self, box: int, rotation: Rotation | None = None, shift: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """The volume `[z, y, x]` after the rotation about voxel box//2 and the shift in voxels."""
        r = np.arange(box) - box // 2
        total = np.zeros((box, box, box))
        centres = self.centres if rotation is None else rotation.apply(self.centres)
        for centre, width, height in zip(centres, self.widths, self.heights, strict=True):
            at = centre * box + (0 if shift is None else shift)
            x, y, z = (np.exp(-((r - at[i]) ** 2) / (2 * (width * box) ** 2)) for i in range(3))
            total += height * z[:, None, None] * y[None, :, None] * x[None, None, :]
        return total.astype(np.float32)


def asymmetric(seed: int = 1, count: int = 8) -> Blobs:
    """Gaussians scattered in a ball of 0.3 box sides."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    radii = 0.3 * rng.uniform(size=(count, 1)) ** (1 / 3)
    return Blobs(directions * radii, rng.uniform(0.04, 0.08, count), rng.uniform(0.5, 1.5, count))


def symmetric(group: str, seed: int = 1, count: int = 3) -> Blobs:
    """Every rotation of the group applied to a few Gaussians off its axes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 3))
    centres *= rng.uniform(0.2, 0.3, size=(count, 1)) / np.linalg.norm(centres, axis=1, keepdims=True)
    members = point_group(group)
    return Blobs(
        np.concatenate([g.apply(centres) for g in members]),
        np.tile(rng.uniform(0.04, 0.05, count), len(members)),
        np.tile(rng.uniform(0.5, 1.5, count), len(members)),
    )


def observed(
    volume: NDArray[np.float32], wedge: tuple[float, float], snr: float | None, rng: np.random.Generator
) -> NDArray[np.float32]:
    """What a tilt series keeps of a volume, with noise of the same wedge: SNR is the variances' ratio in the box."""
    box = volume.shape[0]
    mask = wedge_mask((box, box, box), *wedge, half=True)

    def seen(v: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.asarray(scipy.fft.irfftn(scipy.fft.rfftn(v.astype(np.float64)) * mask, volume.shape))

    signal = seen(volume)
    if snr is None:
        return signal.astype(np.float32)
    noise = seen(rng.normal(size=volume.shape))
    return np.asarray(signal + noise * (signal.std() / noise.std() / np.sqrt(snr)), dtype=np.float32)


@dataclass(frozen=True)
class Sample:
    """Particles (n, box, box, box), their true poses, and a reader of them."""

    particles: NDArray[np.float32]
    rotations: Rotation
    shifts: NDArray[np.float64]

    def read(self, first: int, count: int) -> NDArray[np.float32]:
        return self.particles[first : first + count]

    def __len__(self) -> int:
        return len(self.particles)


def sample(
    blobs: Blobs,
    box: int,
    count: int,
    snr: float | None,
    seed: int = 0,
    wedge: tuple[float, float] = WEDGE,
    largest_shift: float = 2.0,
) -> Sample:
    """Particles at uniform random rotations and shifts."""
    rng = np.random.default_rng(seed)
    rotations = uniform_random(count, rng)
    shifts = rng.uniform(-largest_shift, largest_shift, size=(count, 3))
    boxes = [observed(blobs.volume(box, rotations[i], shifts[i]), wedge, snr, rng) for i in range(count)]
    return Sample(np.stack(boxes), rotations, shifts)
