"""The model of FAML and its maximisation: averages, class shares, noise and shifts from the sums of an expectation.

X_i = w_i (R_phi A_k) + noise: particle i shows class k with probability alpha_k, at a rotation that may be any and a
shift from a Gaussian of deviation xi; the noise of each Fourier component is Gaussian, of one variance on each shell
(the paper has one for all). `docs/faml.md` derives the updates, which are those of Scheres et al. (Structure 17 (2009)
1563) with these differences: components that particles show are solved for at once, where eq. 10 moves towards that
solution by a step each iteration; those that none shows are filled from the model, as there; and averages have a
Gaussian prior whose power on each shell is measured, so that they are not compared finer than they are known.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.rotations import point_group
from services.alignment.align import Search
from services.alignment.array_files import Arrays
from services.alignment.band import Band
from services.alignment.reconstruction import JOINED_ANGSTROM, components_of, noise_share, volume_of
from services.alignment.sufficient_statistics import Posterior, Statistics
from services.alignment.symmetry_frame import centre_of_mass, find_frame, symmetrised

LEAST_COVERAGE = 0.5
"""Where fewer than this share of a class was sampled, the rest is filled from the model."""
BALANCED_ITERATIONS = 9
"""So long classes are compared by how much better than the mean particle each particle fits them. The first averages
differ by chance, and the better one would draw all particles before the others say anything."""
IMPOSED_ITERATION = 12
"""By this one at the latest a symmetry whose axes had to be found is imposed."""
SIMILAR_ITERATIONS = 10
"""In so many the pull between classes falls to nothing."""
LEAST_DIVISOR = 0.1
"""Half maps, which nothing is filled into, are damped where fewer than this share was sampled."""
LARGEST_RISE_CYCLES = 1.5
"""The band grows by at most this much in an iteration,"""
SETTLED_SHARE = 0.3
"""and only when no larger share of the particles still changes its pose by more than a step."""
CONVERGED_SHARE = 0.02
LEAST_SHIFT_VOXELS = 0.5
BEYOND_CYCLES = 4.0
"""Averages are made this much beyond the band that is compared, so that their FSC shows whether it may grow."""


Candidates = Literal["matching", "grid", "auto"]


@dataclass(frozen=True)
class Task:
    """What is to be estimated, and how.

    `search` has the box, the transfer function, the finest resolution, the shifts' range, the symmetry and the number
    of candidates. `diameter_angstrom` is that of a sphere that holds the particle. `candidates` are the poses that
    integrals run over: the whole of a uniform `grid`, local maxima of the rotational `matching` (the paper's), or
    `auto`: the grid while it is coarse, and the local maxima of the coarse grid in a finer band. `axes_known` says that
    poses begin in the symmetry's frame; it is imposed from the first sums on then, and else once its axes are found.
    """

    search: Search
    diameter_angstrom: float
    classes: int = 1
    candidates: Candidates = "matching"
    start_angstrom: float | None = None
    joined_angstrom: float = JOINED_ANGSTROM
    similarity: float = 0.0
    seed: int = 0
    axes_known: bool = False

    def check(self) -> None:
        """Raise InvalidArgument where a value can't work."""
        self.search.check()
        box = self.search.box_size * self.search.voxel_size_angstrom
        if not 0 < self.diameter_angstrom <= box:
            raise InvalidArgument(
                f"particle_diameter_angstrom {self.diameter_angstrom:g}: must lie in 0 to the box, {box:g} Å"
            )
        if not 1 <= self.classes <= 100:
            raise InvalidArgument(f"classes {self.classes}: must lie in 1 to 100")
        if self.candidates not in ("auto", "grid", "matching"):
            raise InvalidArgument(f"candidates {self.candidates!r}: must be auto, grid or matching")
        if not self.similarity >= 0:
            raise InvalidArgument(f"similarity {self.similarity:g}: must not be negative")

    @property
    def box_angstrom(self) -> float:
        return self.search.box_size * self.search.voxel_size_angstrom

    @property
    def k_start(self) -> float:
        """The first band in cycles per box: a quarter of the particle, unless `start_angstrom` says else."""
        cycles = 4.0 * self.box_angstrom / self.diameter_angstrom
        if self.start_angstrom is not None:
            cycles = self.box_angstrom / self.start_angstrom
        return min(max(cycles, 4.0), self.search.k_max)

    @property
    def radius(self) -> float:
        """Of the particle, in box sides."""
        return self.diameter_angstrom / self.box_angstrom / 2

    @property
    def k_joined(self) -> float:
        return self.box_angstrom / self.joined_angstrom

    def mask(self, side: int) -> NDArray[np.float32]:
        """A soft sphere that holds the particle, in a box sampled by `side` voxels."""
        edge = max(1.5, side / 16)
        return soft_sphere(side, min(self.radius * side + edge / 2, side / 2 - edge), edge)


@dataclass(frozen=True)
class Iteration:
    """What one iteration reached."""

    log_evidence: float
    resolution_angstrom: float
    low_pass_angstrom: float
    sizes: tuple[float, ...]
    changed: float
    mean_score: float
    xi_voxels: float


@dataclass(frozen=True, eq=False)
class Model:
    """Everything that a next expectation starts from.

    `sums` complex128, `weights` float64 (2, K, components) and `responsibilities` (2, K) are those of the last
    expectation, on the band up to `k_reach`; `filling` complex64 (K, components) is the average before; `power` (K,
    shells) is the averages' own, `variance` (shells,) the noise's; `alpha` (K,); `xi_voxels`; `k_max` is the band of
    the next expectation in cycles per box. `recentring` (K, 3) is how far (x, y, z, voxels) each average was moved
    after the last expectation, and `turns` (K, 4) the quaternions it was turned by then, which its poses have to
    follow; `handicap` (K,) is taken from the log likelihoods of a class. `imposed` says whether the sums have the
    task's symmetry.
    """

    sums: NDArray[np.complex128]
    weights: NDArray[np.float64]
    responsibilities: NDArray[np.float64]
    filling: NDArray[np.complex64]
    power: NDArray[np.float64]
    variance: NDArray[np.float64]
    alpha: NDArray[np.float64]
    recentring: NDArray[np.float64]
    turns: NDArray[np.float64]
    handicap: NDArray[np.float64]
    xi_voxels: float
    k_max: float
    k_reach: float
    iteration: int
    converged: bool
    imposed: bool
    history: tuple[Iteration, ...]

    def followed(self, posterior: Posterior) -> Posterior:
        """Poses after the averages were moved and turned."""
        turned = Rotation.from_quat(posterior.quaternions.reshape(-1, 4))
        moves = turned.apply(self.recentring[posterior.classes].reshape(-1, 3)).reshape(posterior.shifts.shape)
        turned = turned * Rotation.from_quat(self.turns[posterior.classes].reshape(-1, 4))
        quaternions = turned.as_quat().reshape(posterior.quaternions.shape)
        return replace(
            posterior,
            quaternions=quaternions.astype(np.float32),
            shifts=posterior.shifts + moves.astype(np.float32),
        )

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        rows = [[v for x in asdict(h).values() for v in (x if isinstance(x, tuple) else (x,))] for h in self.history]
        return {
            "sums": self.sums,
            "weights": self.weights,
            "responsibilities": self.responsibilities,
            "filling": self.filling,
            "power": self.power,
            "variance": self.variance,
            "alpha": self.alpha,
            "recentring": self.recentring,
            "turns": self.turns,
            "handicap": self.handicap,
            "scalars": np.array(
                [self.xi_voxels, self.k_max, self.k_reach, self.iteration, self.converged, self.imposed], np.float64
            ),
            "history": np.array(rows, dtype=np.float64).reshape(len(rows), 6 + len(self.alpha)),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> "Model":
        """What `to_arrays` gave."""
        names = (
            "sums", "weights", "responsibilities", "filling", "power", "variance", "alpha", "recentring", "turns",
            "handicap",
        )  # fmt: skip
        xi, k_max, k_reach, iteration, converged, imposed = (float(v) for v in arrays["scalars"])
        classes = arrays["alpha"].size
        history = tuple(
            Iteration(row[0], row[1], row[2], tuple(row[3 : 3 + classes]), row[-3], row[-2], row[-1])
            for row in arrays["history"].astype(float).tolist()
        )
        kept = {name: arrays[name] for name in names}
        return Model(**kept, xi_voxels=xi, k_max=k_max, k_reach=k_reach, iteration=int(iteration),
                     converged=bool(converged), imposed=bool(imposed), history=history)  # fmt: skip


def reach(task: Task, k_max: float) -> float:
    """How far averages are made while `k_max` cycles per box are compared."""
    return min(k_max + BEYOND_CYCLES, task.search.box_size / 2 - 0.5)


def symmetry_of(task: Task, model: Model | None) -> str:
    """The point group that particles are averaged in: the task's once its axes are where they belong."""
    imposed = task.axes_known if model is None else model.imposed
    return task.search.symmetry if imposed else "C1"


def shells(band: Band) -> NDArray[np.int64]:
    """The shell of each component: its radius, rounded."""
    return np.rint(band.radius).astype(np.int64)


def similarity_at(task: Task, iteration: int) -> float:
    """What is left of the pull between classes, which falls linearly."""
    return task.similarity * max(0.0, 1 - iteration / SIMILAR_ITERATIONS)


def averages(
    sums: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    filling: torch.Tensor,
    ratio: torch.Tensor,
    similarity: float = 0.0,
) -> torch.Tensor:
    """Averages (.., K, components) from sums and weights of that shape, and counts (.., K).

    A = (S + f A_old) / (W + f + r): f fills what was hardly sampled from the average before, r = noise variance over
    signal power (K, components) is the prior. With `similarity` lambda > 0, averages are drawn to their mean over
    classes: l = lambda N / K.
    """
    fill = (LEAST_COVERAGE * counts[..., None] - weights).clamp(min=0)
    result = (sums + fill * filling) / (weights + fill + ratio).clamp(min=1e-6)
    if similarity > 0:
        classes = result.shape[-2]
        together = result.sum(dim=-2, keepdim=True)
        count = counts[..., None]
        pull = similarity * count.sum(dim=-2, keepdim=True) / classes
        result = (count * result + pull * together) / (count + classes * pull)
    return result


def start(task: Task, statistics: Statistics) -> Model:
    """The model before the first expectation, from sums at the starting poses (eq. of section 2.4: alpha = 1 / K)."""
    classes = task.classes
    variance = _noise(statistics, None)
    model = Model(
        statistics.sums,
        statistics.weights,
        statistics.responsibilities,
        np.zeros(statistics.sums.shape[1:], np.complex64),
        np.zeros((classes, len(variance))),
        variance,
        np.full(classes, 1.0 / classes),
        np.zeros((classes, 3)),
        _unturned(classes),
        np.zeros(classes),
        max(task.search.shift_limit, LEAST_SHIFT_VOXELS),
        task.k_start,
        reach(task, task.k_start),
        0,
        False,
        task.axes_known,
        (),
    )
    return replace(model, power=_power(task, model))


def _unturned(classes: int) -> NDArray[np.float64]:
    return np.tile([0.0, 0.0, 0.0, 1.0], (classes, 1))


def maximise(task: Task, model: Model, statistics: Statistics) -> Model:
    """The next model from the sums over all particles (eqs. 10 to 13)."""
    n, count = task.search.box_size, statistics.count
    k_reach = reach(task, model.k_max)
    band = Band(n, 1.0, k_reach, None, "cpu")
    # Within the particle's sphere alone: what is missing then follows from what is known beside it.
    before = volumes(task, model, joint(task, model)) * task.mask(n)
    filling = np.concatenate([components_of(band, volume).numpy() for volume in before])
    next_model = replace(
        model,
        sums=statistics.sums,
        weights=statistics.weights,
        responsibilities=statistics.responsibilities,
        filling=filling,
        variance=_noise(statistics, model.variance, _apart(task, model)),
        alpha=statistics.responsibilities.sum(axis=0) / count,
        handicap=statistics.class_evidence / count * (model.iteration + 1 < BALANCED_ITERATIONS),
        xi_voxels=max(math.sqrt(statistics.squared_shift / (3 * count)), LEAST_SHIFT_VOXELS),
        k_reach=k_reach,
        iteration=model.iteration + 1,
        turns=_unturned(task.classes),
    )
    next_model = _centred(task, band, next_model, statistics)
    next_model = replace(next_model, power=_power(task, next_model))
    masked = half_map_fsc(task, next_model)
    reached = resolution(np.arange(len(masked)) / n, masked, task.search.voxel_size_angstrom)
    changed = statistics.changed / count
    done = Iteration(
        statistics.log_evidence,
        reached,
        task.box_angstrom / model.k_max,
        tuple(statistics.responsibilities.sum(axis=0).tolist()),
        changed,
        statistics.score / count,
        next_model.xi_voxels,
    )
    k_next = model.k_max
    if changed <= SETTLED_SHARE:
        wanted = min(max(task.box_angstrom / reached, model.k_max), task.search.k_max)
        k_next = min(wanted, model.k_max + LARGEST_RISE_CYCLES)
    # Nor while classes are held in balance.
    least = 2 if task.classes == 1 else BALANCED_ITERATIONS + 1
    stands = k_next <= model.k_max + 0.25 and model.iteration >= least
    next_model = replace(
        next_model,
        k_max=k_next,
        converged=model.imposed and stands and changed <= CONVERGED_SHARE,
        history=(*model.history, done),
    )
    if not model.imposed and ((stands and changed <= SETTLED_SHARE) or next_model.iteration >= IMPOSED_ITERATION):
        next_model = imposed(task, next_model)
    return next_model


def imposed(task: Task, model: Model) -> Model:
    """The model with its averages turned into the symmetry's frame, where that was found, and symmetrised."""
    n = task.search.box_size
    band = Band(n, 1.0, model.k_reach, None, "cpu")
    group = point_group(task.search.symmetry)
    ratio, place = prior_ratio(task, model), shells(band)
    sums, weights, filling = model.sums.copy(), model.weights.copy(), model.filling.copy()
    recentring, turns = model.recentring.copy(), model.turns.copy()
    averaged = volumes(task, model, joint(task, model)) * task.mask(n)
    for k in np.flatnonzero(model.power.any(axis=1)):
        frame = find_frame(
            band, model.sums[:, k].sum(0), model.weights[:, k].sum(0), ratio[k], model.power[k][place],
            task.search.symmetry, task.radius, centre_of_mass(averaged[k]),
        )  # fmt: skip
        for half in range(2):
            sums[half, k] = symmetrised(band, model.sums[half, k], frame.rotation, frame.centre_voxels, group)
            # How often a component was sampled does not depend on where the average lies.
            sampled = symmetrised(band, model.weights[half, k], frame.rotation, np.zeros(3), group)
            weights[half, k] = np.maximum(sampled.real, 0)
        filling[k] = symmetrised(band, model.filling[k], frame.rotation, frame.centre_voxels, group)
        recentring[k] += frame.centre_voxels
        turns[k] = frame.rotation.as_quat()
    model = replace(
        model, sums=sums, weights=weights, filling=filling, recentring=recentring, turns=turns, imposed=True
    )
    return replace(model, power=_power(task, model))


def prior_ratio(task: Task, model: Model) -> NDArray[np.float64]:
    """Noise variance over signal power, (K, components)."""
    band_shells = shells(Band(task.search.box_size, 1.0, model.k_reach, None, "cpu"))
    noise = noise_share(task.search.box_size) * model.variance[band_shells]
    ratio: NDArray[np.float64] = noise / np.maximum(model.power[:, band_shells], 1e-30)
    return np.minimum(ratio, 1e12)


def joint(task: Task, model: Model) -> NDArray[np.complex64]:
    """The averages of all particles, (K, components)."""
    return _averages(task, model, model.sums.sum(0), model.weights.sum(0), model.responsibilities.sum(0))


def halves(task: Task, model: Model) -> NDArray[np.complex64]:
    """The averages of each half set, (2, K, components), without the prior, which would hide how far they agree."""
    floor = LEAST_DIVISOR * np.maximum(model.responsibilities, 1e-3)[..., None]
    return (model.sums / np.maximum(model.weights, floor)).astype(np.complex64)


def volumes(task: Task, model: Model, components: NDArray[np.complex64]) -> NDArray[np.float32]:
    """Volumes (K, n, n, n) of components (K, components)."""
    band = Band(task.search.box_size, 1.0, model.k_reach, None, "cpu")
    return volume_of(band, torch.from_numpy(components)).numpy()


def half_map_fsc(task: Task, model: Model) -> NDArray[np.float64]:
    """The FSC of the halves within the particle's sphere, by shell; the mean over classes weighted by their sizes."""
    components = halves(task, model)
    mask = task.mask(task.search.box_size)
    sizes = model.responsibilities.sum(axis=0)
    pairs = [volumes(task, model, components[:, k]) for k in range(task.classes)]
    curves = np.array([fsc(pair[0], pair[1], mask)[1] for pair in pairs])
    # Beyond what was reconstructed there is nothing, whatever a mask's convolution spills over.
    return np.where(np.arange(curves.shape[1]) <= model.k_reach, sizes / sizes.sum() @ curves, 0.0)


def _averages(
    task: Task,
    model: Model,
    sums: NDArray[np.complex128],
    weights: NDArray[np.float64],
    counts: NDArray[np.float64],
) -> NDArray[np.complex64]:
    result = averages(
        torch.from_numpy(sums),
        torch.from_numpy(weights),
        torch.from_numpy(counts),
        torch.from_numpy(model.filling),
        torch.from_numpy(prior_ratio(task, model)),
        similarity_at(task, model.iteration),
    )
    components: NDArray[np.complex64] = result.to(torch.complex64).numpy()
    return components


def _apart(task: Task, model: Model) -> NDArray[np.float64]:
    """What the pull between classes costs on each shell, l sum_k<k' |A_k - A_k'|^2: it counts as residual."""
    size = len(model.variance)
    pull = similarity_at(task, model.iteration) * float(model.responsibilities.sum()) / task.classes
    if pull == 0:
        return np.zeros(size)
    components = joint(task, model)
    spread = task.classes * np.abs(components - components.mean(axis=0)) ** 2
    place = shells(Band(task.search.box_size, 1.0, model.k_reach, None, "cpu"))
    return np.asarray(pull * np.bincount(place, spread.sum(axis=0), minlength=size)[:size], dtype=np.float64)


def _noise(
    statistics: Statistics, before: NDArray[np.float64] | None, further: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float64]:
    """Variance of the noise on each shell, from the residuals and what is `further` to be counted as such; where none
    was compared, what it was before.
    """
    seen = statistics.observed > 0
    measured = (statistics.residuals + further) / np.maximum(statistics.observed, 1)
    # A residual of nothing would make any likelihood infinite.
    least = 1e-6 * max(float(measured[seen].mean()) if seen.any() else 0.0, 1e-30)
    measured = np.maximum(measured, least)
    if before is not None:
        return np.where(seen, measured, before)
    first = int(np.flatnonzero(seen)[0])
    places = np.flatnonzero(seen)
    filled = np.interp(np.arange(len(measured)), places, measured[places])
    filled[:first] = measured[first]
    return filled


def _power(task: Task, model: Model) -> NDArray[np.float64]:
    """The averages' own power on each shell: what they have beyond their noise."""
    band = Band(task.search.box_size, 1.0, model.k_reach, None, "cpu")
    place = shells(band)
    size = len(model.variance)
    sums, weights = model.sums.sum(axis=0), model.weights.sum(axis=0)
    counts = model.responsibilities.sum(axis=0)
    share = noise_share(task.search.box_size)
    result = np.zeros((task.classes, size))
    for k in range(task.classes):
        known = weights[k] > max(LEAST_DIVISOR * counts[k], 1e-6)
        if not known.any():
            continue
        noise = share * model.variance[place[known]] / weights[k][known]
        excess = np.abs(sums[k][known] / weights[k][known]) ** 2 - noise
        total = np.bincount(place[known], excess, minlength=size)[:size]
        result[k] = np.maximum(total / np.maximum(np.bincount(place[known], minlength=size)[:size], 1), 0)
    return result


def _centred(task: Task, band: Band, model: Model, statistics: Statistics) -> Model:
    """Each average moved so that its particles' shifts are, in its own frame, zero on average.

    Where an average lies in its box is free, as shifts can make up for it; without this it would drift until they can
    no longer.
    """
    n = task.search.box_size
    group = point_group(symmetry_of(task, model))
    points = band.points.numpy().astype(np.float64)
    sums, filling, moves = model.sums.copy(), model.filling.copy(), np.zeros((task.classes, 3))
    counts = statistics.responsibilities.sum(axis=0)
    for k in np.flatnonzero(counts > 1e-3):
        # What the symmetry maps elsewhere can't move; rounding apart, it has not.
        moves[k] = -group.apply(statistics.displacements[k] / counts[k]).mean(axis=0)
        turn = np.exp(2j * np.pi / n * (points @ moves[k]))
        sums[:, k] *= turn
        filling[k] *= turn.astype(np.complex64)
    return replace(model, sums=sums, filling=filling, recentring=moves)
