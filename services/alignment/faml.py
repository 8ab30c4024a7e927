"""FAML: averaging and classifying subtomograms by maximum likelihood over candidate poses (Zhao et al. 2018).

The whole of it is a `start` - sums at random poses and classes - and iterations of an expectation, which may be split
over particles in any way, and a maximisation. `faml` runs them in one process; across a cluster the orchestrator does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.spectra import centred_rfft
from cryofleet.progress import Progress, no_progress, part
from services.alignment import likelihood_model
from services.alignment.align import Poses, Reader, batch_size
from services.alignment.band import Band
from services.alignment.expectation import Expectation, add, batches, expect
from services.alignment.likelihood_model import Model, Task
from services.alignment.reconstruction import Contributions
from services.alignment.sufficient_statistics import Posterior, Statistics


@dataclass(frozen=True, eq=False)
class Particles:
    """Subtomograms to be averaged: `read(first, count)` gives boxes, `contrast` the sign of their protein (dark or
    light), `names` their ids for messages; `halves` (n,) are 0 or 1 and stay for good.
    """

    read: Reader
    names: NDArray[np.int64]
    halves: NDArray[np.int64]
    contrast: str = "light"

    def __post_init__(self) -> None:
        if self.contrast not in ("dark", "light"):
            raise InvalidArgument(f"contrast {self.contrast!r}: must be dark or light")
        if len(self) < 2:
            raise InvalidArgument(f"averaging needs at least 2 particles, one for each half set, and got {len(self)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sign(self) -> float:
        return -1.0 if self.contrast == "dark" else 1.0


def random_halves(count: int, seed: int) -> NDArray[np.int64]:
    """Half set 0 or 1 of each particle, evenly and at random."""
    halves = np.arange(count) % 2
    np.random.default_rng([seed, 1]).shuffle(halves)
    return halves


def first_posterior(task: Task, count: int, poses: Poses | None = None) -> Posterior:
    """Where particles begin: an even random split into classes, each at a uniform random rotation or at `poses`."""
    rng = np.random.default_rng([task.seed, 2])
    classes = np.arange(count) % task.classes
    rng.shuffle(classes)
    rotations = uniform_random(count, rng) if poses is None else poses.rotations
    shifts = np.zeros((count, 3)) if poses is None else poses.shifts
    return Posterior(
        classes[:, None].astype(np.int16),
        np.atleast_2d(rotations.as_quat())[:, None].astype(np.float32),
        shifts[:, None].astype(np.float32),
        np.ones((count, 1), np.float32),
    )


def first_sums(
    task: Task,
    particles: Particles,
    posterior: Posterior,
    rows: range | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Statistics:
    """Sums over `rows` of the particles at their first poses, and the power on each shell in place of residuals."""
    task.check()
    rows = range(len(particles)) if rows is None else rows
    n = task.search.box_size
    band = Band(n, 1.0, likelihood_model.reach(task, task.k_start), None, device)
    whole = Band(n, 1.0, n / 2 - 0.5, task.search.transfer, device)
    shell = torch.from_numpy(likelihood_model.shells(whole)).to(device)
    size = n // 2 + 1
    contributions = Contributions(band, task.search.transfer, Rotation.identity(1), device)

    def step(chosen: NDArray[np.int64], boxes: NDArray[np.float32]) -> tuple[Statistics, Posterior]:
        tensor = torch.from_numpy(boxes).to(device)
        mine = posterior.rows(chosen)
        sums = add(contributions, task.classes, size, tensor, particles.halves[chosen], mine, device)
        power = whole.of(centred_rfft(tensor)).abs().square().sum(dim=0).double()
        residuals = torch.bincount(shell, power, minlength=size).cpu().numpy()
        observed = len(boxes) * np.bincount(shell.cpu().numpy(), minlength=size).astype(np.float64)
        return Statistics(**{**vars(sums), "residuals": residuals, "observed": observed}), mine

    boxes = batches(particles.read, rows, particles.names, n, particles.sign, _batch(task, device))
    return expect(step, boxes, len(rows), threads if device == "cpu" else 1, progress, "averaging")[0]


def expectation(
    task: Task,
    model: Model,
    particles: Particles,
    posterior: Posterior,
    rows: range | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> tuple[Statistics, Posterior]:
    """The expectation over `rows` of the particles; `posterior` is that of all of them before, the result of these."""
    task.check()
    rows = range(len(particles)) if rows is None else rows
    step = Expectation(task, model, device)

    def work(chosen: NDArray[np.int64], boxes: NDArray[np.float32]) -> tuple[Statistics, Posterior]:
        return step.of(boxes, particles.halves[chosen], posterior.rows(chosen))

    boxes = batches(particles.read, rows, particles.names, task.search.box_size, particles.sign, _batch(task, device))
    return expect(work, boxes, len(rows), threads if device == "cpu" else 1, progress)


def _batch(task: Task, device: str) -> int:
    return batch_size(task.search.box_size, task.search.k_max, device, 2)


@dataclass(frozen=True, eq=False)
class Result:
    """The last model and posterior; `volumes` (K, n, n, n) and `half_volumes` (K, 2, n, n, n) have the particles' sign.

    `poses` are the likeliest of each particle, of class `classes` (n,) with `probabilities` (n,).
    """

    model: Model
    posterior: Posterior
    volumes: NDArray[np.float32]
    half_volumes: NDArray[np.float32]
    poses: Poses
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def _ignore(model: Model, posterior: Posterior) -> None:
    """For runs whose models nobody keeps."""


def faml(
    task: Task,
    particles: Particles,
    *,
    iterations: int = 20,
    start: Poses | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
    each: Callable[[Model, Posterior], None] = _ignore,
) -> Result:
    """Iterate from random poses, or from `start`, until nothing changes or `iterations` are over.

    `each` is told of every model. Raises InvalidArgument for fewer than two particles, one that is constant, not finite
    or of another box, and for a task that can't work.
    """
    task.check()
    if iterations < 1:
        raise InvalidArgument(f"iterations {iterations}: must be at least 1")
    posterior = first_posterior(task, len(particles), start)
    sums = first_sums(
        task, particles, posterior, device=device, threads=threads, progress=part(progress, 0.0, 0.5 / (iterations + 1))
    )
    model = likelihood_model.start(task, sums, len(particles))
    while model.iteration < iterations and not model.converged:
        share = (model.iteration + 0.5) / (iterations + 1)
        statistics, posterior = expectation(
            task,
            model,
            particles,
            posterior,
            device=device,
            threads=threads,
            progress=part(progress, share, share + 1 / (iterations + 1)),
        )
        model = likelihood_model.maximise(task, model, statistics)
        each(model, posterior)
    return finish(task, particles, model, posterior)


def finish(task: Task, particles: Particles, model: Model, posterior: Posterior) -> Result:
    """The averages of the last model as volumes, and each particle's likeliest pose."""
    sign = np.float32(particles.sign)
    halves = likelihood_model.halves(task, model)
    half_volumes = [likelihood_model.volumes(task, model, half) for half in halves]
    classes = posterior.classes[:, 0].astype(np.int64)
    rotations = Rotation.from_quat(posterior.quaternions[:, 0].astype(np.float64))
    shifts = posterior.shifts[:, 0].astype(np.float64) + rotations.apply(model.recentring[classes])
    shares = posterior.responsibilities(task.classes)
    probabilities = shares[np.arange(len(classes)), classes]
    return Result(
        model,
        posterior,
        likelihood_model.volumes(task, model, likelihood_model.joint(task, model)) * sign,
        np.stack(half_volumes, axis=1) * sign,
        Poses(rotations, shifts, probabilities),
        classes,
        probabilities,
    )
