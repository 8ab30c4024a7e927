"""The update step of an averaging: the next model from the sums of an expectation, and the maps of a model."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.masks import centred_coordinates, soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group
from services.alignment.auto_mask import auto_mask
from services.alignment.average_model import Helix, Iteration, Model, Statistics
from services.alignment.band import cycles_per_box
from services.alignment.helical import (
    ALONG_Z,
    AMBIGUOUS,
    Axis,
    HelicalSymmetry,
    find_axis,
    helical_correlation,
    refine,
    upright,
)
from services.alignment.reconstruction import divide, volume_of
from services.alignment.rejection import rejected

LARGEST_RISE_CYCLES = 2.5
"""The low-pass rises by at most this much per iteration."""
SETTLED_CYCLES = 0.25
SETTLED_SCORE = 0.01
"""It has converged when over two iterations neither the low-pass nor the mean score rose by more than this, the latter
as a share."""


def update(model: Model, statistics: Iterable[Statistics]) -> Model:
    """The next model from the statistics of all its particles, whose parts come in the order of their rows.

    Raises InvalidArgument where they do not make up the whole.
    """
    after = _merged(model, statistics)
    after = _in_place(after)
    if after.job.options.mask.kind == "auto":
        after = replace(after, mask=_own_mask(after))
    _, masked, _ = curves(after)
    n, voxel = after.job.search.box_size, after.job.search.voxel_size_angstrom
    reached = resolution(np.arange(n // 2 + 1) / n, masked, voxel)
    after = _refined(after, reached)
    rules = after.job.options.rejection
    if rules.active and after.iteration >= 1:
        after = replace(after, leaving=rejected(rules, after.halves, after.scores, after.signals))
    if after.iteration == 0:
        return replace(after, k_max=after.job.k_start)
    helix = after.symmetry
    done = Iteration(
        float(after.scores.mean()),
        reached,
        after.job.box_angstrom / after.k_max,
        float((after.left_out != 0).sum()) if rules.active else math.nan,
        math.nan if helix is None else helix.rise_angstrom,
        math.nan if helix is None else helix.twist_degrees,
    )
    after = replace(after, history=(*after.history, done))
    # What the halves agree on, rising gently.
    wanted = max(cycles_per_box(n, voxel, reached), after.job.k_start)
    k_next = min(wanted, after.k_max + LARGEST_RISE_CYCLES, after.job.search.k_max)
    settled = _settled(after, k_next) and (after.leaving == after.left_out).all()
    return replace(after, k_max=k_next, converged=bool(settled))


def _merged(model: Model, statistics: Iterable[Statistics]) -> Model:
    """The model with the poses and the sums of its particles after an expectation."""
    sums = np.zeros((2, len(model.job.band())), np.complex128)
    weights = np.zeros(sums.shape, np.float64)
    parts: list[Statistics] = []
    reached = 0
    for part in statistics:
        if part.first != reached:
            raise InvalidArgument(f"statistics of the particles from row {reached} on are missing, or not in order")
        sums += part.sums
        weights += part.weights
        reached += len(part)
        empty = np.zeros((2, 0))
        parts.append(replace(part, sums=empty.astype(np.complex128), weights=empty))
    if reached != len(model):
        raise InvalidArgument(f"there are statistics of {reached} particles, but {len(model)} particles")
    return replace(
        model,
        quaternions=np.concatenate([p.quaternions for p in parts]),
        shifts=np.concatenate([p.shifts for p in parts]),
        scores=np.concatenate([p.scores for p in parts]),
        signals=np.concatenate([p.signals for p in parts]),
        left_out=model.leaving,
        reference=np.zeros(0, np.float32),
        sums=sums.astype(np.complex64),
        weights=weights.astype(np.float32),
        turn=np.array([0.0, 0.0, 0.0, 1.0]),
        move=np.zeros(3),
        iteration=model.iteration + 1,
    )


def _settled(model: Model, k_next: float) -> bool:
    if len(model.history) < 3:
        return False
    before, _, now = model.history[-3:]
    cycles = model.job.box_angstrom / before.low_pass_angstrom
    rise = max(k_next, model.job.box_angstrom / now.low_pass_angstrom) - cycles
    return rise <= SETTLED_CYCLES and now.mean_score - before.mean_score <= SETTLED_SCORE * abs(before.mean_score)


# Maps


def half_maps(model: Model) -> NDArray[np.float32]:
    """The averages of both halves (2, n, n, n), protein positive."""
    counts = torch.tensor(model.counts())[:, None]
    return _placed(model, divide(torch.from_numpy(model.sums), torch.from_numpy(model.weights), counts))


def joint_map(model: Model) -> NDArray[np.float32]:
    """The average of all particles `[z, y, x]`, protein positive."""
    volume: NDArray[np.float32] = _placed(model, _joint(model)[None])[0]
    return volume


def _joint(model: Model) -> torch.Tensor:
    sums, weights = torch.from_numpy(model.sums), torch.from_numpy(model.weights)
    return divide(sums.sum(dim=0), weights.sum(dim=0), sum(model.counts()))


def _placed(model: Model, components: torch.Tensor) -> NDArray[np.float32]:
    """Volumes of components (batch, C), turned and moved."""
    band = model.job.band()
    if model.turned:
        axis = Axis(Rotation.from_quat(model.turn), model.move)
        return np.stack([upright(v, axis) for v in volume_of(band, components).numpy()])
    angle = band.points @ torch.from_numpy(model.move).float() * (2 * math.pi / band.box_size)
    return np.asarray(volume_of(band, components * torch.complex(torch.cos(angle), torch.sin(angle))).numpy())


def fsc_mask(model: Model) -> NDArray[np.float32]:
    """What the halves are compared in."""
    if model.mask.size:
        return model.mask
    n = model.job.search.box_size
    return soft_sphere(n, 0.4 * n, usual_edge_voxels(n))


def curves(model: Model) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Frequencies in 1/Å, masked and unmasked FSC of the halves; before any helix is imposed on them."""
    first, second = half_maps(model)
    frequency, masked = fsc(first, second, fsc_mask(model))
    _, unmasked = fsc(first, second)
    return frequency / model.job.search.voxel_size_angstrom, masked, unmasked


# Where the averages lie


def _in_place(model: Model) -> Model:
    """The model with its averages moved to where they belong: a helix upright at first, anything else centred."""
    helix, symmetry = model.job.options.helix, model.symmetry
    if helix is not None and symmetry is not None:
        if model.iteration > 0:
            # Its references hold the axis, and along it all places are the same.
            return model
        axis = _axis(model, helix, symmetry)
        return replace(model, turn=axis.rotation.as_quat(canonical=True), move=axis.shift_voxels)
    if model.job.options.mask.kind == "given":
        # The mask says where the particle is.
        return model
    return replace(model, move=_centre(model))


def _axis(model: Model, helix: Helix, symmetry: HelicalSymmetry) -> Axis:
    """The filament's axis in the average; z itself where the helix is seen as well about it."""
    volume = joint_map(model)
    search = model.job.search
    cylinder = helix.cylinder(search.box_size, search.voxel_size_angstrom)
    found = find_axis(volume)

    def seen(axis: Axis) -> float:
        return helical_correlation(upright(volume, axis), symmetry, search.voxel_size_angstrom, cylinder)

    return found if seen(found) > seen(ALONG_Z) else ALONG_Z


def _centre(model: Model) -> NDArray[np.float64]:
    """The centre of the average's mass from the box's (x, y, z): particles can't drift out of it."""
    job = model.job
    band = job.band()
    below = torch.from_numpy(band.radius <= job.k_start)
    n = job.search.box_size
    mask = soft_sphere(n, 0.4 * n, usual_edge_voxels(n))
    volume = volume_of(band, (_joint(model) * below)[None])[0].numpy() * mask
    mass = np.maximum(volume - 0.25 * volume.max(), 0.0).astype(np.float64)
    r = centred_coordinates(n).astype(np.float64)
    centre = np.array([(mass.sum(axis=axes) * r).sum() for axes in ((0, 1), (0, 2), (1, 2))]) / max(mass.sum(), 1e-30)
    # What the symmetry maps elsewhere can't move; rounding apart, it has not.
    return np.asarray(point_group(job.symmetry).apply(centre).mean(axis=0), dtype=np.float64)


def _own_mask(model: Model) -> NDArray[np.float32]:
    """A mask from the average; empty, for the sphere, while no particle stands out of it."""
    try:
        return auto_mask(joint_map(model), model.job.search.voxel_size_angstrom).mask
    except InvalidArgument:
        return np.zeros(0, np.float32)


def _refined(model: Model, resolution_angstrom: float) -> Model:
    """The model with its helix as its average shows it; as it was where nothing correlates, or only turns are seen."""
    helix, symmetry = model.job.options.helix, model.symmetry
    if helix is None or symmetry is None or not helix.refined or model.iteration < 1:
        return model
    search = model.job.search
    cylinder = helix.cylinder(search.box_size, search.voxel_size_angstrom)
    finest = max(resolution_angstrom, 3 * search.voxel_size_angstrom)
    found = refine(joint_map(model), symmetry, search.voxel_size_angstrom, cylinder, low_pass_angstrom=finest)
    if found.score <= 0 or found.line_score >= AMBIGUOUS * found.score:
        return model
    return replace(model, helix=np.array([found.symmetry.rise_angstrom, found.symmetry.twist_degrees]))
