"""FAML: averaging and classifying subtomograms by maximum likelihood over candidate poses (Zhao et al. 2018).

The whole of it is a `start` - sums at random poses and classes - and iterations of an expectation, which may be split
over particles in any way, and a maximisation. `faml` runs them in one process; across a cluster the orchestrator does.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import point_group, uniform_random
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.progress import Progress, no_progress, part
from services.alignment import likelihood_model
from services.alignment.align import Poses, Reader, Search, batch_size, oversampling
from services.alignment.array_files import Arrays, pack
from services.alignment.band import Band
from services.alignment.expectation import Expectation, add, batches, expect
from services.alignment.likelihood_model import Model, Task
from services.alignment.reconstruction import Contributions
from services.alignment.sufficient_statistics import Posterior, Statistics


@dataclass(frozen=True, eq=False)
class Particles:
    """Subtomograms to be averaged: `read(first, count)` gives boxes, `names` their ids for messages; `halves` (n,) are
    0 or 1 and stay for good; `sign` is -1 where protein is dark.
    """

    read: Reader
    names: NDArray[np.int64]
    halves: NDArray[np.int64]
    sign: float = 1.0

    def __post_init__(self) -> None:
        if len(self) < 2:
            raise InvalidArgument(f"averaging needs at least 2 particles, one for each half set, and got {len(self)}")

    def __len__(self) -> int:
        return len(self.names)


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
    contributions = Contributions(
        band, task.search.transfer, point_group(likelihood_model.symmetry_of(task, None)), device
    )

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


def class_bytes(task: Task) -> int:
    """What each further class takes of a thread: its references' tables, kept until all classes are compared."""
    search = task.search
    return _batch(task, "cpu") * SpectrumTable.bytes_for(search.k_max, oversampling(search.k_max))


@dataclass(frozen=True, eq=False)
class State:
    """A run between two iterations, as it passes from process to process; `model` is None before the first sums."""

    task: Task
    halves: NDArray[np.int64]
    posterior: Posterior
    model: Model | None = None

    def __len__(self) -> int:
        return len(self.halves)

    @property
    def iteration(self) -> int:
        """Of the model; -1 where there is none."""
        return -1 if self.model is None else self.model.iteration

    @cached_property
    def digest(self) -> NDArray[np.uint8]:
        """Of all that the state holds: sums that were made with another one are told by it. Made once for all."""
        return np.frombuffer(hashlib.sha256(pack(self.to_arrays())).digest(), np.uint8)

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        search = replace(self.task.search, transfer=None)
        values = asdict(replace(self.task, search=search))
        arrays: Arrays = {
            "task": np.frombuffer(json.dumps(values, sort_keys=True).encode(), np.uint8),
            "halves": self.halves,
        }
        if self.task.search.transfer is not None:
            arrays["transfer"] = self.task.search.transfer
        arrays |= {f"posterior.{name}": array for name, array in self.posterior.to_arrays().items()}
        if self.model is not None:
            arrays |= {f"model.{name}": array for name, array in self.model.to_arrays().items()}
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any], source: str) -> "State":
        """What `to_arrays` gave. Raises InvalidArgument, which names `source`, where it is something else."""
        try:
            arrays = {name: np.array(array) for name, array in arrays.items()}
            values: dict[str, Any] = json.loads(arrays["task"].astype(np.uint8).tobytes())
            search = Search(**{**values.pop("search"), "transfer": arrays.get("transfer")})
            task = Task(search=search, **values)
            posterior = Posterior.from_arrays(_within(arrays, "posterior."))
            model = None if "model.sums" not in arrays else Model.from_arrays(_within(arrays, "model."))
            state = State(task, arrays["halves"].astype(np.int64), posterior, model)
            state._check()
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InvalidArgument(f"{source} is no state of a likelihood averaging: {error}") from None
        return state

    def _check(self) -> None:
        self.task.check()
        count, classes, n = len(self.halves), self.task.classes, self.task.search.box_size
        _check_posterior(self.posterior, count, classes)
        if not np.isin(self.halves, (0, 1)).all():
            raise ValueError("half sets that are none")
        if self.model is not None:
            model = self.model
            size = len(Band(n, 1.0, model.k_reach, None, "cpu"))
            shapes = {
                "model.sums": (model.sums.shape, (2, classes, size)),
                "model.weights": (model.weights.shape, (2, classes, size)),
                "model.filling": (model.filling.shape, (classes, size)),
                "model.responsibilities": (model.responsibilities.shape, (2, classes)),
                "model.power": (model.power.shape, (classes, n // 2 + 1)),
                "model.variance": (model.variance.shape, (n // 2 + 1,)),
                "model.alpha": (model.alpha.shape, (classes,)),
                "model.recentring": (model.recentring.shape, (classes, 3)),
                "model.turns": (model.turns.shape, (classes, 4)),
                "model.handicap": (model.handicap.shape, (classes,)),
            }
            for name, (shape, expected) in shapes.items():
                if tuple(shape) != tuple(expected):
                    raise ValueError(f"{name} is {shape}, not {expected}")
            for name, array in model.to_arrays().items():
                if name != "history" and not np.isfinite(array).all():
                    raise ValueError(f"{name} holds values that are not finite")


def _within(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def begin(task: Task, count: int, poses: Poses | None = None, halves: NDArray[np.int64] | None = None) -> State:
    """The state before anything was read. Raises InvalidArgument for a task that can't work."""
    task.check()
    if count < 2:
        raise InvalidArgument(f"averaging needs at least 2 particles, one for each half set, and got {count}")
    if task.classes > count:
        raise InvalidArgument(f"classes {task.classes}: there are only {count} particles")
    task = replace(task, axes_known=poses is not None or len(point_group(task.search.symmetry)) == 1)
    return State(
        task, random_halves(count, task.seed) if halves is None else halves, first_posterior(task, count, poses)
    )


def sums_of(
    state: State,
    particles: Particles,
    rows: range | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> tuple[Statistics, Posterior]:
    """What `rows` of the particles add to the next state, and their posterior: the first sums, or an expectation."""
    if state.model is not None:
        return expectation(
            state.task, state.model, particles, state.posterior, rows, device=device, threads=threads, progress=progress
        )
    rows = range(len(particles)) if rows is None else rows
    sums = first_sums(state.task, particles, state.posterior, rows, device=device, threads=threads, progress=progress)
    return sums, state.posterior.rows(slice(rows.start, rows.stop))


def sums_to_arrays(state: State, first: int, statistics: Statistics, posterior: Posterior) -> Arrays:
    """What `sums_of` gave for the particles from row `first` on, as plain arrays that say so."""
    arrays: Arrays = {"first": np.array(first), "iteration": np.array(state.iteration), "state": state.digest}
    arrays |= {f"statistics.{name}": array for name, array in statistics.to_arrays().items()}
    return arrays | {f"posterior.{name}": array for name, array in posterior.to_arrays().items()}


def read_sums(state: State, first: int, arrays: Mapping[str, Any], source: str) -> tuple[Statistics, Posterior]:
    """Sums and posterior that some process wrote by `sums_to_arrays` for the particles from row `first` on.

    Raises InvalidArgument, which names `source`, where they are something else, of another state, or of other rows.
    """
    task = state.task
    try:
        arrays = {name: np.array(array) for name, array in arrays.items()}
        begins, iteration = int(arrays["first"]), int(arrays["iteration"])
        same = np.array_equal(arrays["state"], state.digest)
        statistics = Statistics.from_arrays(_within(arrays, "statistics."))
        posterior = Posterior.from_arrays(_within(arrays, "posterior."))
        k_max = task.k_start if state.model is None else state.model.k_max
        size = len(Band(task.search.box_size, 1.0, likelihood_model.reach(task, k_max), None, "cpu"))
        for name, array, shape in (
            ("sums", statistics.sums, (2, task.classes, size)),
            ("weights", statistics.weights, (2, task.classes, size)),
            ("responsibilities", statistics.responsibilities, (2, task.classes)),
            ("residuals", statistics.residuals, (task.search.box_size // 2 + 1,)),
            ("observed", statistics.observed, (task.search.box_size // 2 + 1,)),
            ("class_evidence", statistics.class_evidence, (task.classes,)),
            ("displacements", statistics.displacements, (task.classes, 3)),
        ):
            if array.shape != shape:
                raise ValueError(f"{name} is {array.shape}, not {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite")
        _check_posterior(posterior, len(posterior), task.classes)
        if statistics.count != len(posterior):
            raise ValueError(f"sums over {statistics.count:g} particles, poses of {len(posterior)}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidArgument(f"{source} holds no sums of this run: {error}") from None
    if iteration != state.iteration:
        raise InvalidArgument(f"{source} holds sums of iteration {iteration}, and the state is of {state.iteration}")
    if not same:
        raise InvalidArgument(f"{source} holds sums that were made with another state than this one")
    if begins != first:
        raise InvalidArgument(
            f"{source} holds the particles from row {begins} on: those from row {first} on are missing, or not in order"
        )
    return statistics, posterior


def _check_posterior(posterior: Posterior, count: int, classes: int) -> None:
    kept = posterior.weights.shape[-1]
    for name, array, shape in (
        ("classes", posterior.classes, (count, kept)),
        ("quaternions", posterior.quaternions, (count, kept, 4)),
        ("shifts", posterior.shifts, (count, kept, 3)),
        ("weights", posterior.weights, (count, kept)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, not {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
    if not np.isin(posterior.classes, np.arange(classes)).all():
        raise ValueError("classes that are none")


def advance(state: State, statistics: Statistics, posterior: Posterior) -> State:
    """The next state from the sums over all particles. Raises InvalidArgument where some are missing."""
    if len(posterior) != len(state) or round(statistics.count) != len(state):
        raise InvalidArgument(f"sums over {statistics.count:g} particles, and there are {len(state)}")
    if state.model is None:
        model = likelihood_model.start(state.task, statistics)
    else:
        model = likelihood_model.maximise(state.task, state.model, statistics)
    return replace(state, posterior=posterior, model=model)


@dataclass(frozen=True, eq=False)
class Result:
    """The last model and posterior; `volumes` (K, n, n, n) and `half_volumes` (K, 2, n, n, n) have the particles' sign.

    `poses` are the likeliest of each particle, of class `classes` (n,) with `probabilities` (n,).
    """

    model: Model
    posterior: Posterior
    halves: NDArray[np.int64]
    volumes: NDArray[np.float32]
    half_volumes: NDArray[np.float32]
    poses: Poses
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def _ignore(state: State) -> None:
    """For runs whose states nobody keeps."""


def faml(
    task: Task,
    particles: Particles,
    *,
    iterations: int = 20,
    start: Poses | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
    each: Callable[[State], None] = _ignore,
) -> Result:
    """Iterate from random poses, or from `start`, until nothing changes or `iterations` are over.

    `each` is told of every state. Raises InvalidArgument for fewer than two particles, one that is constant, not finite
    or of another box, and for a task that can't work.
    """
    if iterations < 1:
        raise InvalidArgument(f"iterations {iterations}: must be at least 1")
    state = begin(task, len(particles), start, particles.halves)
    steps = iterations + 1
    while state.model is None or state.model.iteration < iterations:
        done = 0 if state.model is None else state.model.iteration + 1
        report = part(progress, done / steps, (done + 1) / steps)
        state = advance(state, *sums_of(state, particles, device=device, threads=threads, progress=report))
        each(state)
        if state.model is not None and state.model.converged:
            break
    return finish(state, particles.sign)


def finish(state: State, sign: float = 1.0) -> Result:
    """The averages of a state as volumes, and each particle's likeliest pose."""
    task, model, posterior = state.task, state.model, state.posterior
    if model is None:
        raise InvalidArgument("the averaging has not begun: there is nothing to finish")
    if not model.imposed:
        model = likelihood_model.imposed(task, model)
    posterior = model.followed(posterior)
    halves = likelihood_model.halves(task, model)
    half_volumes = [likelihood_model.volumes(task, model, half) for half in halves]
    classes = posterior.classes[:, 0].astype(np.int64)
    rotations = Rotation.from_quat(posterior.quaternions[:, 0].astype(np.float64))
    shifts = posterior.shifts[:, 0].astype(np.float64)
    shares = posterior.responsibilities(task.classes)
    probabilities = shares[np.arange(len(classes)), classes]
    return Result(
        model,
        posterior,
        state.halves,
        likelihood_model.volumes(task, model, likelihood_model.joint(task, model)) * np.float32(sign),
        np.stack(half_volumes, axis=1) * np.float32(sign),
        Poses(rotations, shifts, probabilities),
        classes,
        probabilities,
    )
