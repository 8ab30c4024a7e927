"""Few numbers that say how a particle differs from the average, whatever of it the missing wedge hides.

Every particle is brought into the reference's frame, and there its difference from the average is taken on the Fourier
components that it shows (Xu et al., J. Struct. Biol. 178 (2012) 152). What it does not show is missing, not zero: with
zeros in its place the largest "difference" of two particles is how their wedges lie, and a classification sorts them by
orientation.

The differences are described by a linear model with missing data (probabilistic PCA: Roweis, NIPS 10 (1998) 626;
Tipping & Bishop, J. R. Stat. Soc. B 61 (1999) 611; weighted: Bailey, PASP 124 (2012) 1015),

    x_ij = mu_j + U_j . z_i + e_ij,    z_i ~ N(0, I),    e_ij ~ N(0, s^2 / w_ij),

where w_ij, 0 to 1, is how much of component j particle i shows. It is fitted by expectation-maximisation, so its
likelihood never falls. After each step the model is rescaled so that the z have mean 0 and covariance I again
(parameter expansion: Liu, Rubin & Wu, Biometrika 85 (1998) 755), which leaves the likelihood where it is or raises it,
and saves most of the iterations.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.progress import Progress, no_progress, part
from cryofleet.scratch_array import reserved_array
from services.alignment.align import Poses, Reader, check_particles, in_parallel, standardise
from services.alignment.band import Band, rotation_matrices
from services.alignment.reconstruction import Contributions, volume_of

LEAST_WEIGHT = 0.1
"""Components of which a particle shows less are taken as missing."""
SIGNIFICANCE = 1.15
"""The largest variance of noise scatters by 3 to 6% from set to set (Tracy & Widom, for 40 to 150 particles)."""
_ROWS = 256
"""Particles that are worked on at a time."""
_BATCH = 4
_MARGIN_CYCLES = 3.0
"""What the mask mixes into the band from beyond it (cycles per box)."""


@dataclass(frozen=True)
class Features:
    """Differences of particles from an average, in the reference's frame.

    `values` is (particles, 2, components), real and imaginary parts; `weights` (particles, components), 0 where a
    particle does not show a component, and the value there is 0. A value's noise has the variance 1 / weight, in units
    of `deviations` (components,), by which the values were divided. `points` (components, 3) are the frequencies
    (kx, ky, kz) in cycles per box.
    """

    values: NDArray[np.float32]
    weights: NDArray[np.float32]
    points: NDArray[np.float32]
    deviations: NDArray[np.float32]


def features_bytes(count: int, components: int) -> int:
    """What the features of `count` particles take, in memory or on disk."""
    return 12 * count * components


def features(
    read: Reader,
    count: int,
    poses: Poses,
    average: NDArray[np.float32],
    transfer: NDArray[np.float32] | None,
    *,
    k_min: float = 1.0,
    k_max: float = 8.0,
    mask: NDArray[np.float32] | None = None,
    scratch: Path | None = None,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Features:
    """Differences of `count` particles from `average` between `k_min` and `k_max` cycles per box.

    `read(first, count)` gives boxes (count, n, n, n); `poses` take the average onto each. `average` (n, n, n) is one of
    the boxes at mean 0 and deviation 1, each (as `class_averages` makes it): it is taken away, seen through each
    particle's `transfer` (the layout of `rfftn`; None where nothing is missing), before anything is masked or
    interpolated. What these smear over the wedge's edges is then smeared differences only, and not the average itself.
    `mask` (n, n, n), in the reference's frame, is where differences are looked for; everywhere within the box's sphere
    where left out. Values are divided by the deviation of their shell, so that noise counts the same at all
    frequencies.

    They are kept in files of the folder `scratch` where one is given, else in memory (`features_bytes`); boxes are read
    batch by batch.

    Raises InvalidArgument for poses, average, mask or transfer that do not fit, or a particle that can't be used.
    """
    n = average.shape[0]
    _check(count, poses, average, transfer, mask)
    band = Band(n, k_min, k_max, None, device)
    wide = Band(n, 1.0, min(band.k_max + _MARGIN_CYCLES, n / 2 - 0.5), None, device)
    contributions = Contributions(wide, transfer, point_group("C1"), device)
    inner = torch.from_numpy(np.flatnonzero(_within(wide, band))).to(device)
    table = SpectrumTable(torch.from_numpy(average[None]).to(device), wide.k_max)
    imaged = None if transfer is None else wide.of(torch.from_numpy(transfer[None]).to(device))
    within = None if mask is None else torch.from_numpy(mask).to(device)
    ids = np.arange(count) if names is None else names
    size = len(band)
    values = _array(scratch, "values.bin", (count, 2, size))
    weights = _array(scratch, "weights.bin", (count, size))

    def batches() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        step = _BATCH if device == "cpu" else 64
        for first in range(0, count, step):
            rows = np.arange(first, min(first + step, count))
            yield rows, read(first, len(rows))

    def work(
        batch: tuple[NDArray[np.int64], NDArray[np.float32]],
    ) -> tuple[NDArray[np.int64], NDArray[np.complex64], NDArray[np.float32]]:
        rows, boxes = batch
        check_particles(boxes, ids[rows], n)
        particles = torch.from_numpy(standardise(boxes)).to(device)
        quaternions, shifts = poses.tensors(rows, device)
        model = table.rotated(wide.points, rotation_matrices(quaternions)[:, None])[:, 0]
        angle = (shifts @ wide.points.T) * (-2 * math.pi / n)
        model = model * torch.complex(torch.cos(angle), torch.sin(angle))
        if imaged is not None:
            model = model * imaged
        terms, coverage = contributions.of(particles - volume_of(wide, model), quaternions, shifts)
        terms = terms[:, inner] if within is None else band.of(centred_rfft(volume_of(wide, terms) * within))
        coverage = coverage[:, inner].clamp(max=1.0)
        coverage = torch.where(coverage < LEAST_WEIGHT, 0.0, coverage)
        shown = torch.where(coverage > 0, terms / coverage.clamp(min=LEAST_WEIGHT), 0.0)
        return rows, shown.cpu().numpy(), coverage.cpu().numpy()

    shells = np.rint(band.radius).astype(np.int64)
    power, seen = np.zeros(shells.max() + 1), np.zeros(shells.max() + 1)

    def done(result: tuple[NDArray[np.int64], NDArray[np.complex64], NDArray[np.float32]]) -> None:
        rows, shown, coverage = result
        values[rows, 0], values[rows, 1], weights[rows] = shown.real, shown.imag, coverage
        np.add.at(power, shells, (coverage * np.abs(shown) ** 2).sum(axis=0, dtype=np.float64) / 2)
        np.add.at(seen, shells, (coverage > 0).sum(axis=0))
        progress(float(rows[-1] + 1) / count, "differences", particles=float(rows[-1] + 1))

    in_parallel(batches(), work, threads if device == "cpu" else 1, done)
    by_shell = np.sqrt(power / np.maximum(seen, 1))
    deviations = np.where(by_shell > 0, by_shell, 1.0)[shells].astype(np.float32)
    for rows in _blocks(count):
        values[rows] /= deviations
    return Features(values, weights, band.points.cpu().numpy(), deviations)


def _check(
    count: int,
    poses: Poses,
    average: NDArray[np.float32],
    transfer: NDArray[np.float32] | None,
    mask: NDArray[np.float32] | None,
) -> None:
    if average.ndim != 3 or len(set(average.shape)) != 1:
        raise InvalidArgument(f"the average is {average.shape}: it must be a cube")
    n = average.shape[0]
    if len(poses.shifts) != count:
        raise InvalidArgument(f"there are poses of {len(poses.shifts)} particles, but {count} particles")
    if mask is not None and mask.shape != average.shape:
        raise InvalidArgument(f"the mask is {mask.shape}, the average {average.shape}: they must be one box")
    if transfer is not None and transfer.shape != (n, n, n // 2 + 1):
        raise InvalidArgument(f"the transfer function is {transfer.shape}: {(n, n, n // 2 + 1)} is expected")


def _within(wide: Band, band: Band) -> NDArray[np.bool_]:
    """Which components of a wider band are in a narrower one; both keep the order of |k|."""
    return np.asarray(np.isin(wide.index.cpu().numpy(), band.index.cpu().numpy()), dtype=np.bool_)


def _array(scratch: Path | None, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if scratch is None:
        return np.zeros(shape, dtype=np.float32)
    return reserved_array(scratch / name, shape, np.float32)


def _blocks(count: int) -> Iterator[slice]:
    for first in range(0, count, _ROWS):
        yield slice(first, min(first + _ROWS, count))


class _Rows(Protocol):
    """An array (particles, parts, features) that is read in slices of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class PCA:
    """A fitted model: `mean` (parts, features), `components` (q, parts, features), orthonormal over parts and features,
    by falling `variances` (q,); `scores` (particles, q) are the latent values along them, in the units of the values,
    drawn towards 0 the more the less a particle shows; `noise_variance` is s^2. `log_likelihood` has one entry per
    iteration and never falls.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    variances: NDArray[np.float64]
    scores: NDArray[np.float32]
    noise_variance: float
    log_likelihood: tuple[float, ...]


def weighted_pca(
    values: _Rows,
    weights: NDArray[np.float32],
    components: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
    progress: Progress = no_progress,
) -> PCA:
    """Fit `components` principal components to values of which each has a weight, 0 where it is missing.

    `values` is (particles, parts, features), the parts (real and imaginary, say) sharing `weights` (particles,
    features). Both are read in blocks of rows, so they may be files mapped as arrays; what is held besides is
    particles x q for the scores and features x q^2 for the sums, in double precision. One iteration takes about
    4 x particles x features x q^2 operations. Ends after `iterations`, or when the log-likelihood rises by less than
    `tolerance` per observed value; components of noise alone may still turn among each other then.

    Raises InvalidArgument where shapes do not fit, nothing is observed, or there are no more particles than components.
    """
    _check_model(values, weights, components)
    count, parts, _ = values.shape
    q = components
    rng = np.random.default_rng(seed)
    observed = parts * sum(int(np.count_nonzero(weights[rows])) for rows in _blocks(count))
    if observed == 0:
        raise InvalidArgument("the weights are 0 everywhere: nothing is observed")
    log_weights = parts * sum(
        float(np.log(block[block > 0], dtype=np.float64).sum()) for block in (weights[rows] for rows in _blocks(count))
    )
    loadings, mean, noise = _start(values, weights, observed, q, rng)
    history: list[float] = []
    scores = np.zeros((count, q))
    for iteration in range(iterations + 1):
        sums = _expectation(values, weights, loadings, mean, noise, scores)
        history.append(0.5 * (log_weights - observed * math.log(2 * math.pi * noise) + sums.fit))
        rise = math.inf if iteration == 0 else history[-1] - history[-2]
        if iteration == iterations or rise < tolerance * observed:
            break
        loadings, mean, noise = _maximisation(sums, count, observed)
        progress((iteration + 1) / iterations, "principal components", log_likelihood=history[-1])
    progress(1.0, "principal components", log_likelihood=history[-1])
    return _ordered(loadings, mean, noise, scores, tuple(history))


def _check_model(values: _Rows, weights: NDArray[np.float32], components: int) -> None:
    if len(values.shape) != 3 or weights.shape != (values.shape[0], values.shape[2]):
        raise InvalidArgument(
            f"values are {values.shape} and weights {weights.shape}: (particles, parts, features) and (particles, "
            "features) are expected"
        )
    if not 1 <= components < min(values.shape[0], values.shape[1] * values.shape[2]):
        raise InvalidArgument(
            f"{components} components of {values.shape[0]} particles and {values.shape[2]} features: "
            "at least 1, and fewer than either, are possible"
        )


@dataclass
class _Sums:
    """What the expectation leaves for the maximisation; z is extended by a constant 1, for the mean.

    `moments` (features, q + 1, q + 1) is sum_i w_ij E[z z'], `overlaps` (features, q + 1, parts) sum_i w_ij x_ij E[z],
    `power` sum w x^2, `first` (q,) and `second` (q, q) the means of E[z] and E[z z'], `fit` the part of twice the
    log-likelihood that the data decide.
    """

    moments: NDArray[np.float64]
    overlaps: NDArray[np.float64]
    power: float
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    fit: float


def _start(
    values: _Rows, weights: NDArray[np.float32], observed: int, q: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Loadings (features, parts, q), the weighted mean, and the variance about it."""
    count, parts, size = values.shape
    total, seen = np.zeros((parts, size)), np.zeros(size)
    drawn = np.zeros((size, parts, q))
    power = 0.0
    for rows in _blocks(count):
        w, x = weights[rows].astype(np.float64), values[rows].astype(np.float64)
        weighted = w[:, None] * x
        total += weighted.sum(axis=0)
        seen += w.sum(axis=0)
        power += float((weighted * x).sum())
        # Random sums of the data themselves: they lie in its span, as the components do.
        drawn += np.tensordot(weighted, rng.normal(size=(len(w), q)), axes=(0, 0)).transpose(1, 0, 2)
    mean = total / np.maximum(seen, 1e-12)
    noise = max((power - float((seen * mean**2).sum())) / observed, 1e-12 * max(power / observed, 1e-300))
    drawn /= np.sqrt(np.maximum(seen, 1e-12))[:, None, None]
    return drawn * math.sqrt(noise / max(float(np.mean(drawn**2)), 1e-300) / size), mean, noise


def _expectation(
    values: _Rows,
    weights: NDArray[np.float32],
    loadings: NDArray[np.float64],
    mean: NDArray[np.float64],
    noise: float,
    scores: NDArray[np.float64],
) -> _Sums:
    """Posterior of each z_i: covariance (I + U' W U / s^2)^-1, mean that times U' W (x - mu) / s^2, put in `scores`."""
    size, parts, q = loadings.shape
    products = np.einsum("fpa,fpb->fab", loadings, loadings).reshape(size, q * q)
    moments = np.zeros((size, (q + 1) ** 2))
    overlaps = np.zeros((size, q + 1, parts))
    first, second = np.zeros(q), np.zeros((q, q))
    power = fit = 0.0
    for rows in _blocks(values.shape[0]):
        w, x = weights[rows].astype(np.float64), values[rows].astype(np.float64)
        weighted = w[:, None] * x
        residual = weighted - w[:, None] * mean
        precision = (w @ products).reshape(-1, q, q) / noise + np.eye(q)
        slope = sum(residual[:, p] @ loadings[:, p] for p in range(parts)) / noise
        covariance = np.linalg.inv(precision)
        z = np.einsum("iab,ib->ia", covariance, slope)
        scores[rows] = z
        # By the determinant lemma and Woodbury's identity, all of it in q dimensions.
        fit += float((slope * z).sum() - np.linalg.slogdet(precision)[1].sum() - (residual * (x - mean)).sum() / noise)
        extended = np.concatenate([z, np.ones((len(z), 1))], axis=1)
        moment = extended[:, :, None] * extended[:, None, :]
        moment[:, :q, :q] += covariance
        moments += w.T @ moment.reshape(len(z), -1)
        for p in range(parts):
            overlaps[:, :, p] += weighted[:, p].T @ extended
        first += z.sum(axis=0)
        second += moment[:, :q, :q].sum(axis=0)
        power += float((weighted * x).sum())
    count = values.shape[0]
    return _Sums(moments.reshape(size, q + 1, q + 1), overlaps, power, first / count, second / count, fit)


def _maximisation(sums: _Sums, count: int, observed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Loadings and mean by weighted regression feature by feature, then the noise, then z rescaled to N(0, I)."""
    q = len(sums.first)
    # A feature that nobody shows has no equations at all: its loadings are 0.
    floor = 1e-12 * count * np.eye(q + 1)
    solved = np.linalg.solve(sums.moments + floor, sums.overlaps)
    # sum w E(x - U z)^2 is what the regression leaves of sum w x^2.
    left = sums.power - float((solved * sums.overlaps).sum())
    noise = max(left / observed, 1e-12 * sums.power / observed, 1e-300)
    loadings, mean = solved[:, :q].transpose(0, 2, 1), solved[:, q].T
    spread = np.linalg.cholesky(sums.second - np.outer(sums.first, sums.first))
    return loadings @ spread, mean + (loadings @ sums.first).T, noise


def _ordered(
    loadings: NDArray[np.float64],
    mean: NDArray[np.float64],
    noise: float,
    scores: NDArray[np.float64],
    history: tuple[float, ...],
) -> PCA:
    """The model along its principal axes: orthonormal, by falling variance, each with its largest entry positive."""
    size, parts, q = loadings.shape
    flat = loadings.transpose(1, 0, 2).reshape(parts * size, q)
    axes, lengths, turn = np.linalg.svd(flat, full_matrices=False)
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(q)]
    signs = np.where(largest < 0, -1.0, 1.0)
    along = (scores @ turn.T) * (lengths * signs)
    return PCA(mean, (axes * signs).T.reshape(q, parts, size), lengths**2, along.astype(np.float32), noise, history)


class _Flipped:
    """The values without the mean and the first `taken` components of a model, each block of features of each particle
    with a sign drawn at random.
    """

    def __init__(self, values: NDArray[np.float32], pca: PCA, taken: int, blocks: NDArray[np.int64], seed: int) -> None:
        self.shape = values.shape
        self._values, self._pca, self._taken, self._blocks, self._seed = values, pca, taken, blocks, seed
        self._count = int(blocks.max()) + 1

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        m = self._taken
        left = self._values[rows] - self._pca.mean
        if m > 0:
            left -= np.tensordot(self._pca.scores[rows, :m], self._pca.components[:m], axes=1)
        # From the rows' place, so that each reading of a row draws the same.
        signs = np.random.default_rng([self._seed, rows.start]).choice([-1.0, 1.0], size=(len(left), self._count))
        return np.asarray(left * signs[:, self._blocks][:, None], dtype=np.float32)


def neighbourhoods(points: NDArray[np.float32], side_cycles: float = 3.0) -> NDArray[np.int64]:
    """The cube of `side_cycles` that each frequency (features, 3) lies in, numbered from 0: what a mask correlates."""
    _, block = np.unique(np.floor(points / side_cycles), axis=0, return_inverse=True)
    return np.asarray(block.ravel(), dtype=np.int64)


def significant(
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    pca: PCA,
    blocks: NDArray[np.int64],
    *,
    draws: int = 2,
    iterations: int = 40,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[int, float]:
    """How many leading components vary by more than noise alone would make them, and the variance that noise reaches.

    Parallel analysis by signs (Hong, Sheng & Dobriban, J. R. Stat. Soc. B 83 (2021)): the values less their mean are
    given random signs, block by block of features for each particle. That keeps the noise, its missing values and its
    correlation within a block, and destroys whatever the particles have in common. The largest variance that a
    component then finds is the level that noise reaches; a component must be `SIGNIFICANCE` times it. Large components
    raise the level a little by what is left of them within blocks, so it is found again without those that passed.

    `blocks` (features,) numbers the block of each feature; `neighbourhoods` makes them.
    """
    taken, level = 0, 0.0
    for _ in range(2):
        levels = []
        for i in range(draws):
            noise = _Flipped(values, pca, taken, blocks, seed + i)
            null = weighted_pca(
                noise,
                weights,
                len(pca.variances),
                iterations=iterations,
                seed=seed,
                progress=part(progress, i / draws, 1.0),
            )
            levels.append(null.variances[0])
        level = float(np.mean(levels))
        small = np.flatnonzero(pca.variances <= SIGNIFICANCE * level)
        found = int(small[0]) if small.size else len(pca.variances)
        if found == taken:
            break
        taken = found
    return taken, level
