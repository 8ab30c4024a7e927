"""The signal-to-noise ratio of aligned particles, by pairs, and that of an average, by shells.

Two particles of one structure, brought into one pose, correlate by rho = S / (S + N), S and N the variances of signal
and noise, so that SNR = rho / (1 - rho) (Frank & Al-Ali 1975, Nature 256:376). At an SNR of 0.01 a pair's correlation
is lost in its own error, and rho / (1 - rho) is not linear: the correlation is averaged over pairs, where errors
average out, before the ratio is taken of the mean.

SNR is that of the whole, unfiltered box, over the components that the tilt series imaged. What is common to a pair is
measured in the frame of the reference, on the components that both imaged; turned boxes have only their inner sphere in
common, in space as in frequency. So each shell's signal power is taken from there, and set against the variance of the
particles as they are, corners and all: a mask would have raised the SNR by as much as it shuts noise out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import shell_counts, shell_index, shell_sums
from cryofleet.numerics.masks import radius_grid, soft_sphere, usual_edge_voxels
from cryofleet.numerics.spectra import SpectrumTable, centred_irfft, centred_rfft
from cryofleet.progress import Progress, no_progress

Reader = Callable[[int, int], NDArray[np.float32]]
"""Boxes (count, n, n, n) of the rows first to first + count."""
_LARGEST_FINE_BOX = 64


def _oversampling(box_size: int) -> int:
    """Of the tables of spectra. Twofold is as good on average over rotations, but at those that map the grid onto
    itself it shows 5% too much power; in large boxes it has to do, for its memory.
    """
    return 4 if box_size <= _LARGEST_FINE_BOX else 2


def memory_bytes(box_size: int) -> int:
    """Memory that `pair_snr` takes: tables of the transfer and of a particle, and a score of spectra."""
    return 2 * SpectrumTable.bytes_for(box_size / 2, _oversampling(box_size)) + 20 * 8 * box_size**3


@dataclass(frozen=True)
class PairSnr:
    """`correlation` is the mean over `pairs` pairs, with its standard error; `snr` is correlation / (1 - correlation),
    with the standard error that this hands on. By shells of `frequency` in cycles per voxel (0, 1/n, .. below Nyquist):
    `spectral_snr`, signal power over noise power, which is vague where it is much above 1; `signal_power`, in units of
    the particles' whole variance.
    """

    correlation: float
    correlation_error: float
    snr: float
    snr_error: float
    pairs: int
    frequency: NDArray[np.float64]
    spectral_snr: NDArray[np.float64]
    signal_power: NDArray[np.float64]


def spectral_snr_of_average(fsc: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signal power over noise power of the average of both halves, by shells: 2 FSC / (1 - FSC).

    Each half has FSC / (1 - FSC), and averaging two halves the noise. Negative values of the FSC, which are its error,
    stay so; where it is 1 there is no noise to tell, and the ratio is infinite.
    """
    noise = 1 - np.asarray(fsc, dtype=np.float64)
    return np.where(noise > 0, 2 * fsc / np.where(noise > 0, noise, 1.0), np.inf)


class _Frame:
    """Particles as they look from the reference: components of half of each shell, on the grid of the box."""

    def __init__(self, box_size: int, transfer: NDArray[np.float32] | None) -> None:
        n = box_size
        self.box_size = n
        self.shells = n // 2
        k, kx = np.fft.fftfreq(n) * n, np.fft.rfftfreq(n) * n
        z, y, x = np.meshgrid(k, k, kx, indexing="ij")
        half = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
        shell = shell_index(n)
        chosen = half & (shell >= 1) & (shell < self.shells)
        self.shell = shell[chosen]
        points = np.stack([x[chosen], y[chosen], z[chosen]], axis=1)
        self.points = torch.from_numpy(points.astype(np.float32))
        self._reach = float(np.sqrt((points**2).sum(axis=1)).max())
        edge = usual_edge_voxels(n)
        self._mask = torch.from_numpy(soft_sphere(n, n / 2 - edge, edge))
        self._weights = np.full(n // 2 + 1, 2.0)
        self._weights[0] = 1.0
        if n % 2 == 0:
            self._weights[-1] = 1.0
        self._axes = [torch.from_numpy(a.astype(np.float32)) for a in (k, k, kx)]
        grid = np.ones(shell.shape, np.float32) if transfer is None else transfer
        # What a blob half as wide as the box, of unit mass, has after the transfer, in the mean and in the corners.
        blob = torch.from_numpy(soft_sphere(n, n / 4, n / 8))
        passed = centred_irfft(centred_rfft(blob / blob.sum()) * torch.from_numpy(grid), n).numpy()
        self._corners = radius_grid(n) > n / 2
        self._unit_mean, self._unit_corners = float(passed.mean()), float(passed[self._corners].mean())
        self._imaged = torch.from_numpy((grid != 0).astype(np.float32))
        self.transfer_power = shell_sums(grid.astype(np.float64) ** 2, n)[: self.shells]
        self._spread: SpectrumTable | None = None
        if transfer is not None:
            kernel = centred_irfft(torch.from_numpy(grid).to(torch.complex64), n) * self._mask
            self._spread = SpectrumTable(kernel[None], self._reach, _oversampling(n))

    def _level(self, box: NDArray[np.float32]) -> float:
        """The constant that a particle of mass m lies on: box mean = m mean_1 + level, corners = m corners_1 + level.

        Boxes come with any constant, most with that which makes their mean 0. Left in, or taken to be the mean, it is
        cut by the mask, and changes the power of the lowest shells by tenths.
        """
        mean, corners = float(box.mean(dtype=np.float64)), float(box[self._corners].mean(dtype=np.float64))
        mass = (mean - corners) / (self._unit_mean - self._unit_corners)
        return mean - mass * self._unit_mean

    def seen(
        self, box: NDArray[np.float32], rotation: Rotation, shift: NDArray[np.float64], name: int
    ) -> tuple[NDArray[np.complex128], NDArray[np.float64], NDArray[np.float64]]:
        """The particle's components at `points`, the transfer they passed, and its power by shells (of the whole box,
        in units of the variance). The box's width blurs both alike.
        """
        n = self.box_size
        level = self._level(box)
        spectrum = centred_rfft(torch.from_numpy(np.asarray(box - level, dtype=np.float32))) * self._imaged
        power = np.abs(spectrum.numpy().astype(np.complex128)) ** 2
        power[0, 0, 0] = 0
        shell_power = shell_sums(power, n)[: self.shells]
        total = float((power * self._weights).sum())
        if not (math.isfinite(total) and total > 0):
            raise InvalidArgument(f"particle {name} is constant or holds values that are not finite")
        for axis, (k, place) in enumerate(zip(self._axes, (2, 1, 0), strict=True)):
            angle = k * (float(shift[place]) * 2 * math.pi / n)
            shape = [1, 1, 1]
            shape[axis] = len(k)
            spectrum = spectrum * torch.complex(torch.cos(angle), torch.sin(angle)).view(shape)
        moved = centred_irfft(spectrum, n) * self._mask
        table = SpectrumTable(moved[None], self._reach, _oversampling(n))
        inverse = torch.from_numpy(rotation.inv().as_matrix().astype(np.float32)).reshape(1, 1, 3, 3)
        values = table.rotated(self.points, inverse)[0, 0].numpy().astype(np.complex128) / math.sqrt(total)
        passed = np.ones(len(values))
        if self._spread is not None:
            passed = self._spread.rotated(self.points, inverse)[0, 0].real.numpy().astype(np.float64)
        return values, passed, shell_power / total

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the shells."""
        return np.asarray(np.bincount(self.shell, weights=values, minlength=self.shells), dtype=np.float64)


def _draw(count: int, pairs: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Pairs of different particles, none twice: whole rounds in which no particle is met twice, as far as they go."""
    met: set[tuple[int, int]] = set()
    while len(met) < pairs:
        order = rng.permutation(count)
        for a, b in zip(order[0::2], order[1::2], strict=False):
            pair = (int(min(a, b)), int(max(a, b)))
            if len(met) < pairs and pair not in met:
                met.add(pair)
                yield pair


def pair_snr(
    read: Reader,
    rotations: Rotation,
    shifts: NDArray[np.float64],
    box_size: int,
    *,
    transfer: NDArray[np.float32] | None = None,
    pairs: int | None = None,
    names: NDArray[np.int64] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> PairSnr:
    """The SNR of aligned particles, from random pairs of them.

    Poses count: what they are off lowers the SNR of fine detail. Poses that were found by aligning the particles' noise
    to one another raise it.

    The standard error is by the scatter of the pairs, and counts that two pairs may have a particle in common (the
    variance of dyadic data, Fafchamps & Gubert 2007).

    Args:
        read: gives the boxes of rows.
        rotations: of the particles, n of them; each takes the reference onto the particle.
        shifts: (n, 3) as (x, y, z) in voxels, applied after the rotation.
        box_size: side of the boxes.
        transfer: `[z, y, x // 2 + 1]`, in the layout of `rfftn`: 0 where a component was not imaged, 1 where plain, or
            a transfer function that varies little from one component to the next; None where all was imaged.
        pairs: how many; where left out, as many as there are particles, or all where there are fewer.
        names: ids of the particles, for errors.
        seed: of the draw.
        progress: told of each pair.

    Raises InvalidArgument where there are fewer than 4 particles, where shapes differ or the transfer is zero
    everywhere, where a particle is constant or not finite, and where the correlation is 1: no noise.
    """
    count = len(shifts)
    if count < 4 or len(rotations) != count:
        raise InvalidArgument(
            f"{count} shifts and {len(rotations)} rotations: at least 4 particles with both are needed"
        )
    if box_size < 8:
        raise InvalidArgument(f"boxes of {box_size} voxels are too small: at least 8 are needed")
    half = (box_size, box_size, box_size // 2 + 1)
    if transfer is not None and transfer.shape != half:
        raise InvalidArgument(f"the transfer function is {transfer.shape}, boxes of {box_size} voxels need {half}")
    if transfer is not None and not transfer.any():
        raise InvalidArgument("the transfer function is zero everywhere: nothing was imaged")
    most = count * (count - 1) // 2
    wanted = min(count if pairs is None else pairs, most)
    if wanted < 2:
        raise InvalidArgument(f"pairs is {wanted}: at least 2 are needed for a standard error")
    frame = _Frame(box_size, transfer)

    def particle(row: int) -> tuple[NDArray[np.complex128], NDArray[np.float64], NDArray[np.float64]]:
        name = row if names is None else int(names[row])
        box = read(row, 1)
        if box.shape != (1, box_size, box_size, box_size):
            raise InvalidArgument(f"particle {name} has shape {box.shape[1:]}, expected a box of {box_size} voxels")
        return frame.seen(box[0], rotations[row], shifts[row], name)

    common, coverage, powers, drawn = [], [], [], []
    for number, (i, j) in enumerate(_draw(count, wanted, np.random.default_rng(seed))):
        progress(number / wanted, "comparing pairs", pairs=number)
        a, passed_a, power_a = particle(i)
        b, passed_b, power_b = particle(j)
        # a b* is the signal's power times what both passed, and noise. Sums over whole shells, what neither imaged
        # included, hold all that the wedge's edge has blurred; a cut, or weights, would bias their quotient.
        common.append(frame.sums((a * b.conj()).real))
        coverage.append(frame.sums(passed_a * passed_b))
        powers.append((power_a + power_b) / 2)
        drawn.append((i, j))
    share = np.mean(coverage, axis=0)
    compared = share > 1e-6 * shell_counts(box_size)[: frame.shells]
    signal = np.where(compared, np.mean(common, axis=0) / np.where(compared, share, 1.0), 0.0)
    weight = np.where(compared, frame.transfer_power / np.where(compared, share, 1.0), 0.0)
    correlation = float((frame.transfer_power * signal).sum())
    residual = np.array([(weight * (c - signal * s)).sum() for c, s in zip(common, coverage, strict=True)])
    by_particle = np.zeros(count)
    np.add.at(by_particle, np.array(drawn), residual[:, None])
    alone = float((residual**2).sum())
    variance = max(alone, float((by_particle**2).sum()) - alone) / wanted**2 * wanted / (wanted - 1)
    error = math.sqrt(variance)
    if correlation >= 1:
        raise InvalidArgument(f"the particles' mean correlation is {correlation:g}: without noise there is no SNR")
    signal_power = frame.transfer_power * signal
    noise_power = np.mean(powers, axis=0) - signal_power
    spectral = np.where(noise_power > 0, signal_power / np.where(noise_power > 0, noise_power, 1.0), np.inf)
    return PairSnr(
        correlation=correlation,
        correlation_error=error,
        snr=correlation / (1 - correlation),
        snr_error=error / (1 - correlation) ** 2,
        pairs=wanted,
        frequency=np.arange(frame.shells) / box_size,
        spectral_snr=np.where(compared, spectral, 0.0),
        signal_power=signal_power,
    )
