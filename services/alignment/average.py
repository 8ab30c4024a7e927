"""Iterative alignment and averaging of subtomograms, with or without a first reference.

Each iteration aligns every particle to the average of the others, never one that contains it: its own term is
subtracted from the sum and the weight, exactly, before the division. Otherwise a particle fits best where it was, to
its own noise.

The particles are split into two halves for good. Below 1/50 Å both are aligned to the common average, which keeps the
halves in one frame and makes the start from few particles possible (in boxes smaller than 200 Å: below four cycles
per box); finer detail comes from a particle's own half only, so the Fourier shell correlation of the halves stays
honest there.

An averaging is a `begin`, iterations of `expect`, which may be split over the particles in any way, and `update`, and a
`finish`. `average` runs them in one process; across a cluster the orchestrator does, with the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD, CorrectedFsc, corrected_fsc
from cryofleet.numerics.rotations import point_group
from cryofleet.progress import Progress, no_progress, part
from services.alignment.align import Poses, Reader, Search, check_mask, check_particles, prepare_reference, standardise
from services.alignment.average_expectation import expect
from services.alignment.average_model import Iteration, Job, Model, Options
from services.alignment.average_update import fsc_mask, half_maps, joint_map, update
from services.alignment.helical import HelicalSymmetry, symmetrise
from services.alignment.sharpening import Sharpened, sharpen
from services.alignment.symmetry_axes import find_axes

SEEDS = 4
"""Particles that are tried as a first reference where there is none."""
SEED_PARTICLES = 32
"""So many particles are aligned to each seed to judge it."""
_NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Averaged:
    """The result: volumes `[z, y, x]` with protein of the particles' sign, poses and half set (1 or 2) of each
    particle, why it was `left_out` of the average, empty where it was not, and the Fourier shell correlation of the
    halves, as they are before any helix is imposed on the average.
    """

    average: NDArray[np.float32]
    half_maps: tuple[NDArray[np.float32], NDArray[np.float32]]
    poses: Poses
    halves: NDArray[np.int32]
    left_out: tuple[str, ...]
    signals: NDArray[np.float64] | None
    curves: CorrectedFsc
    mask: str
    resolution_angstrom: float
    joined_angstrom: float
    iterations: tuple[Iteration, ...]
    converged: bool
    helix: HelicalSymmetry | None
    sharpened: Sharpened | None

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which of the particles are in the average."""
        return np.array([not reason for reason in self.left_out])

    def table(self, names: NDArray[np.int64] | None = None) -> dict[str, object]:
        """Curves, history and what was left out as the JSON table that the service stores; `names` are the particles'
        ids. Who was left out of the last iteration was judged by the one before, the figures are those of the last."""
        ids = np.arange(len(self.halves)) if names is None else names
        table: dict[str, object] = {
            "particles": int(self.kept.sum()),
            "frequency_per_angstrom": (self.curves.frequency / self.curves.voxel_size_angstrom).tolist(),
            "fsc": self.curves.corrected.tolist(),
            "fsc_masked": self.curves.masked.tolist(),
            "fsc_randomised": self.curves.randomised.tolist(),
            "fsc_unmasked": self.curves.unmasked.tolist(),
            "mask": self.mask,
            "threshold": HALF_MAP_THRESHOLD,
            "halves_joined_below_angstrom": self.joined_angstrom,
            "randomised_from_angstrom": self.curves.randomised_from_angstrom,
            "resolution_angstrom": self.resolution_angstrom,
            "iterations": [i.table() for i in self.iterations],
            "converged": self.converged,
        }
        if self.helix is not None:
            table["rise_angstrom"], table["twist_degrees"] = self.helix.rise_angstrom, self.helix.twist_degrees
        if self.sharpened is not None:
            table["b_factor_angstrom2"] = self.sharpened.b_factor_angstrom2
            table["largest_gain"] = self.sharpened.largest_gain
        table["rejected"] = [
            {"id": int(ids[i]), "score": float(self.poses.scores[i]), "reason": reason}
            | ({} if self.signals is None else {"signal": float(self.signals[i])})
            for i, reason in enumerate(self.left_out)
            if reason
        ]
        return table


# The start


def begin(
    job: Job,
    count: int,
    read: Reader,
    *,
    transfer: NDArray[np.float32] | None = None,
    poses: Poses | None = None,
    reference: NDArray[np.float32] | None = None,
    mask: NDArray[np.float32] | None = None,
    halves: NDArray[np.int64] | None = None,
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Model:
    """The model before the first expectation: half sets, and `poses` that are kept by it or a reference it aligns to.

    `reference` has the particles' contrast, and its symmetry axes along the frame's. Without poses and reference,
    one is made of a few particles. `mask` is for options that take a given one. `halves` (count,) are 1 or 2 and stay
    for good; random ones of the same size where left out.

    Raises InvalidArgument for fewer than two particles, an empty half set, inputs that do not fit, or a job that can't
    work.
    """
    job.check()
    n = job.search.box_size
    if count < 2:
        raise InvalidArgument(f"averaging needs at least 2 particles, one for each half set, and got {count}")
    if reference is not None and reference.shape != (n,) * 3:
        raise InvalidArgument(f"the reference is {reference.shape}, the particles are boxes of {n} voxels")
    if poses is not None and len(poses.shifts) != count:
        raise InvalidArgument(f"there are starting poses of {len(poses.shifts)} particles, but {count} particles")
    if (job.options.mask.kind == "given") != (mask is not None):
        raise InvalidArgument("a mask and the option to take a given one belong together")
    if mask is not None:
        check_mask(mask, n)
    rng = np.random.default_rng(job.seed)
    order = rng.permutation(count)
    if halves is None:
        halves = np.empty(count, dtype=np.int64)
        halves[order[: (count + 1) // 2]] = 1
        halves[order[(count + 1) // 2 :]] = 2
    check_halves(halves, count)
    model = _first_model(job, halves.astype(np.int32), transfer)
    model = replace(model, mask=job.options.mask.volume(n, job.search.voxel_size_angstrom) if mask is None else mask)
    if job.options.helix is not None:
        given = job.options.helix.symmetry
        model = replace(model, helix=np.array([given.rise_angstrom, given.twist_degrees]))
    if reference is not None:
        return replace(model, reference=prepare_reference(reference * np.float32(job.sign), mask))
    if poses is not None:
        quaternions = np.atleast_2d(poses.rotations.as_quat())
        return replace(model, quaternions=quaternions, shifts=poses.shifts, scores=poses.scores)
    ids = np.arange(count) if names is None else names
    volume = _seeded(model, read, rng, ids, device, threads, progress)
    group = point_group(job.symmetry)
    if len(group) > 1:
        # A particle lies in its box anyhow; the axes of its symmetry are found before it is imposed.
        model = replace(model, turn=find_axes(volume, job.k_start, group, device).as_quat(canonical=True))
    return replace(model, reference=volume)


def check_halves(halves: NDArray[np.int64], count: int) -> None:
    """Raise InvalidArgument unless they are 1 or 2 of each of `count` particles, and either has some."""
    if halves.shape != (count,) or not np.isin(halves, (1, 2)).all():
        raise InvalidArgument(f"half sets must be 1 or 2 of each of the {count} particles")
    for half in (1, 2):
        if not (halves == half).any():
            raise InvalidArgument(f"half set {half} has no particle: give each at least one, or none a half set")


def _first_model(job: Job, halves: NDArray[np.int32], transfer: NDArray[np.float32] | None) -> Model:
    count = len(halves)
    quaternions = np.zeros((count, 4))
    quaternions[:, 3] = 1.0
    return Model(
        job=job,
        halves=halves,
        quaternions=quaternions,
        shifts=np.zeros((count, 3)),
        scores=np.zeros(count),
        signals=np.zeros(count),
        left_out=np.zeros(count, np.int8),
        leaving=np.zeros(count, np.int8),
        transfer=_NOTHING if transfer is None else transfer,
        reference=_NOTHING,
        mask=_NOTHING,
        sums=np.zeros((2, 0), np.complex64),
        weights=np.zeros((2, 0), np.float32),
        k_max=job.k_start,
    )


def _seeded(
    model: Model,
    read: Reader,
    rng: np.random.Generator,
    names: NDArray[np.int64],
    device: str,
    threads: int,
    progress: Progress,
) -> NDArray[np.float32]:
    """A reference where there is none: the average of a few particles aligned to the best of single ones.

    An average at random orientations is a round blob, which iterations leave slowly or never. One particle has the
    structure, if with noise and a wedge of its own. Each seed is judged by how well a subset of the particles then
    agrees with its own average, each left out of it in turn.
    """
    seeds = rng.permutation(len(model))[:SEEDS]
    subset = np.sort(rng.permutation(len(model))[:SEED_PARTICLES])
    plain = Options(start_low_pass_angstrom=model.job.options.start_low_pass_angstrom)
    job = replace(model.job, symmetry="C1", options=plain)
    few = _first_model(job, model.halves[subset], model.search.transfer)

    def read_few(first: int, count: int) -> NDArray[np.float32]:
        return np.concatenate([read(int(i), 1) for i in subset[first : first + count]])

    best: tuple[float, Model] | None = None
    for i, seed in enumerate(seeds):
        box = read(int(seed), 1)
        check_particles(box, names[[seed]], job.search.box_size)
        tried = replace(few, reference=prepare_reference(standardise(box)[0] * np.float32(job.sign)))
        score = 0.0
        for step in range(2):
            report = part(progress, (i + step / 2) / len(seeds), (i + (step + 1) / 2) / len(seeds))
            found = expect(tried, read_few, names[subset], device=device, threads=threads, progress=report)
            tried, score = update(tried, [found]), float(found.scores.mean())
        if best is None or score > best[0]:
            best = score, tried
    assert best is not None
    return prepare_reference(joint_map(best[1]))


# The end


def finish(model: Model) -> Averaged:
    """The maps of a model, and what is known of them.

    The average is low-passed at its resolution, which is where the FSC of the halves, corrected for the mask by random
    phases, falls below 0.143; or sharpened, weighted by the FSC and low-passed there. A helix is imposed on it, not on
    the halves.
    """
    job, helix = model.job, model.symmetry
    n, voxel = job.search.box_size, job.search.voxel_size_angstrom
    sign = np.float32(job.sign)
    first, second = half_maps(model)
    curves = corrected_fsc(first, second, fsc_mask(model), voxel, seed=job.seed)
    reached = curves.resolution_angstrom()
    average = joint_map(model)
    if helix is not None and job.options.helix is not None:
        average = symmetrise(average, helix, voxel, job.options.helix.cylinder(n, voxel)).volume
    sharpened = None
    b_factor, fit_from = job.options.b_factor_angstrom2, job.options.sharpen_from_angstrom
    if b_factor is not None or fit_from is not None:
        sharpened = sharpen(
            average, voxel, reached, b_factor_angstrom2=b_factor, fit_from_angstrom=fit_from, fsc=curves.corrected
        )
        average = sharpened.volume
    else:
        average = low_pass(average, reached, voxel)
    rules = job.options.rejection
    return Averaged(
        average * sign,
        (first * sign, second * sign),
        model.poses(),
        model.halves,
        tuple(rules.reason(int(code)) if code else "" for code in model.left_out),
        model.signals if rules.signal_deviations is not None else None,
        curves,
        _mask_in_words(model),
        reached,
        job.box_angstrom / job.k_joined,
        model.history,
        model.converged,
        helix,
        sharpened,
    )


def _mask_in_words(model: Model) -> str:
    mask = model.job.options.mask
    if not model.mask.size:
        sphere = "soft sphere of 0.8 of the box's diameter"
        return sphere if mask.kind == "sphere" else f"{sphere}: no particle stood out of the average"
    if mask.kind == "sphere":
        return f"soft sphere of radius {mask.radius_angstrom:g} Å"
    if mask.kind == "cylinder":
        height = "" if mask.height_angstrom is None else f" and height {mask.height_angstrom:g} Å"
        return f"soft cylinder of radius {mask.radius_angstrom:g} Å{height}"
    return "given" if mask.kind == "given" else "made from the average"


# All of it


def _ignore(model: Model) -> None:
    """For runs whose models nobody keeps."""


def average(
    read: Reader,
    count: int,
    search: Search,
    *,
    iterations: int = 6,
    symmetry: str = "C1",
    contrast: str = "light",
    start: Poses | None = None,
    reference: NDArray[np.float32] | None = None,
    mask: NDArray[np.float32] | None = None,
    halves: NDArray[np.int64] | None = None,
    seed: int = 0,
    options: Options = Options(),  # noqa: B008
    names: NDArray[np.int64] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
    checkpoint: Callable[[Model], None] = _ignore,
    resume: Model | None = None,
) -> Averaged:
    """Align and average `count` particles `iterations` times, or until neither low-pass nor score rises any more.

    `read(first, count)` gives boxes of `search.box_size` with protein of the sign that `contrast` says (dark or
    light); the averages have it too. The first average is made at the poses of `start`, or at those found against
    `reference` (of the particles' contrast, its symmetry axes along the frame's), or, with neither, at those found
    against the best of a few single particles. The low-pass begins at five cycles per box, or where `options` say, and
    follows the halves' FSC up to `search`'s. `mask` `[z, y, x]` is for options that take a given one. `halves` (count,)
    are the half sets 1 and 2 where they are known, which are kept; random ones where left out.

    `checkpoint` is called with the model after the start and after each iteration; a run that is given one of them as
    `resume` ends with the same result. The same seed gives the same result on the same device, whatever `threads`.

    Raises InvalidArgument for fewer than two particles, an empty half set, a particle or reference that is constant,
    not finite or of another box, a point group that is none, or a search or options that can't work.
    """
    if contrast not in ("dark", "light"):
        raise InvalidArgument(f"contrast {contrast!r}: must be dark or light")
    check_iterations(iterations, options)
    if resume is not None and len(resume) != count:
        raise InvalidArgument(f"the checkpoint is of {len(resume)} particles, not of {count}")
    ids = np.arange(count) if names is None else names
    model = resume
    share = 0.0
    if model is None:
        share = 0.25 if start is None and reference is None else 0.0
        job = Job(replace(search, transfer=None), symmetry, -1.0 if contrast == "dark" else 1.0, seed, options)
        model = begin(
            job,
            count,
            read,
            transfer=search.transfer,
            poses=start,
            reference=reference,
            mask=mask,
            halves=halves,
            names=ids,
            device=device,
            threads=threads,
            progress=part(progress, 0.0, share),
        )
    begun = model.iteration
    while model.iteration < iterations and not model.converged:
        steps = max(1, iterations - begun)
        at = share + (1 - share) * (model.iteration - begun) / steps
        report = part(progress, at, at + (1 - share) / steps)
        statistics = expect(model, read, ids, device=device, threads=threads, progress=report)
        model = update(model, [statistics])
        checkpoint(model)
    return finish(model)


def check_iterations(iterations: int, options: Options) -> None:
    """Raise InvalidArgument where there are too few."""
    if iterations < 1:
        raise InvalidArgument(f"iterations {iterations}: must be at least 1")
    if options.rejection.active and iterations < 2:
        raise InvalidArgument(
            "what the first iteration finds wanting is left out of the second: give at least 2 iterations"
        )
