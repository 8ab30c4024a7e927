"""Where a symmetry lies in an average that was made without it.

Particles that begin at random poses are averaged without symmetry first: the axes of an average then lie as chance had
it, not along the frame's, and a symmetry about the wrong axis is never left again. Here the frame is sought in which
the average correlates best with itself turned by the group's elements,

    q(Q) = sum_g sum_k Re a(k)* a(Q g Q^-1 k) / sum_g sum_k m(k) m(Q g Q^-1 k),

a being the average as far as it is known, m A over the square root of its shell's power, and m = W / (W + r) how far
that is: W says how often a component was sampled, r is noise over signal power. An average of exact symmetry has q = 1.
What no wedge showed counts for nothing: where all wedges lie alike, half of the components and their turned copies are
not both known, and a plain correlation is far from 1 for the true axis, too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.masks import centred_coordinates
from cryofleet.numerics.rotations import point_group, rotation_grid
from cryofleet.numerics.so3 import suppress
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.align import oversampling
from services.alignment.band import Band, rotation_matrices
from services.alignment.pose_grid import angular_step_degrees
from services.alignment.reconstruction import volume_of

COARSE_CYCLES = 5.0
"""Per particle diameter: the band in which frames are tried all around."""
FINE_CYCLES = 8.0
"""And that in which the best of them are compared. A ring of seven shows from some five on."""
FINALISTS = 12
LAST_STEP_DEGREES = 0.25
LEAST_GAIN = 1e-4
LEAST_SAMPLED = 0.1
"""Of the largest weight."""
LEAST_KNOWN = 0.05
"""Of the components known of an average; a frame in which a smaller share meets its copies is not preferred for it."""
ELEMENTS = 6
"""Of the group, that averages are turned by: no two of them inverse to each other, which would say the same."""
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Frame:
    """Of an average a: a(Q r + c) has the group's axes where `point_group` has them.

    `rotation` is Q and `centre_voxels` c, (x, y, z) from the box's centre. A pose (R, t) becomes (R Q, t + R c).
    """

    rotation: Rotation
    centre_voxels: NDArray[np.float64]


def centre_of_mass(volume: NDArray[np.float32]) -> NDArray[np.float64]:
    """(x, y, z) of what is above a quarter of the highest density, from the box's centre."""
    mass = np.maximum(volume - 0.25 * volume.max(), 0.0).astype(np.float64)
    r = centred_coordinates(volume.shape[0]).astype(np.float64)
    moments = [(mass.sum(axis=axes) * r).sum() for axes in ((0, 1), (0, 2), (1, 2))]
    return np.asarray(moments) / max(float(mass.sum()), 1e-30)


class Turnable:
    """Components of an average about `centre_voxels`, and how far each is known: to be turned together."""

    def __init__(
        self,
        band: Band,
        values: NDArray[np.complex128],
        weights: NDArray[np.float64],
        centre_voxels: NDArray[np.float64],
    ) -> None:
        self.band = band
        self.values = torch.from_numpy((values * _phases(band, centre_voxels)).astype(np.complex64))
        self.weights = torch.from_numpy(weights.astype(np.float32))
        self._tables = [
            SpectrumTable(volume_of(band, part.to(torch.complex64)[None]), band.k_max, oversampling(band.k_max))
            for part in (self.values, self.weights)
        ]

    def turned(self, rotations: Rotation, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and weights at R k of the first `count` components k, (rotations, count)."""
        inverse = _inverse_matrices(rotations)[None]
        values, weights = (table.rotated(self.band.points[:count], inverse)[0] for table in self._tables)
        return values, weights.real.clamp(min=0)


def symmetrised(
    band: Band, values: NDArray[Any], rotation: Rotation, centre_voxels: NDArray[np.float64], group: Rotation
) -> NDArray[np.complex64]:
    """The mean over the group of components (components,) on `band`, about a centre, in a frame."""
    centred = torch.from_numpy((values * _phases(band, centre_voxels)).astype(np.complex64))
    table = SpectrumTable(volume_of(band, centred[None]), band.k_max, oversampling(band.k_max))
    inverse = _inverse_matrices(rotation * group)
    total = torch.zeros(len(band), dtype=torch.complex64)
    # One after the other: of a large group and box, all copies at once would outgrow the model by far.
    for element in inverse:
        total += table.rotated(band.points, element[None, None])[0, 0]
    return (total / len(inverse)).numpy()


def _phases(band: Band, centre_voxels: NDArray[np.float64]) -> NDArray[np.complex128]:
    """What moves a volume so that `centre_voxels` comes to the box's centre."""
    cycles = band.points.numpy().astype(np.float64) @ centre_voxels / band.box_size
    return np.asarray(np.exp(2j * np.pi * cycles), dtype=np.complex128)


def _inverse_matrices(rotations: Rotation) -> torch.Tensor:
    """(rotations, 3, 3): `SpectrumTable.rotated` asks for R^-1 k, and so is given the inverse."""
    matrices = rotation_matrices(torch.from_numpy(np.atleast_2d(rotations.as_quat())).float())
    return matrices.transpose(-1, -2).contiguous()


def find_frame(
    band: Band,
    sums: NDArray[np.complex128],
    weights: NDArray[np.float64],
    ratio: NDArray[np.float64],
    power: NDArray[np.float64],
    symmetry: str,
    radius: float,
    centre_voxels: NDArray[np.float64],
) -> Frame:
    """The frame in which sums and weights (components,) on `band` are most nearly of `symmetry`.

    `power` (components,) is the average's own and `ratio` that of the noise over it; `radius` is the particle's, in box
    sides; `centre_voxels` is where the search for the centre begins.
    """
    group = point_group(symmetry)
    fine = band.below(FINE_CYCLES / (2 * radius))
    count = len(fine)
    # What is hardly sampled holds what the particles' mask spills over, and a shell without power noise alone.
    sampled = (weights[:count] > LEAST_SAMPLED * weights[:count].max()) & (power[:count] > 0)
    shrunk = np.where(sampled, 1 / np.where(sampled, weights[:count] + ratio[:count], 1.0), 0.0)
    known = weights[:count] * shrunk
    seen = sums[:count] * shrunk / np.sqrt(np.where(sampled, power[:count], 1.0))
    about = Turnable(fine, seen, known, centre_voxels)
    coarse_cycles = COARSE_CYCLES / (2 * radius)
    coarse, step = len(fine.below(coarse_cycles)), angular_step_degrees(coarse_cycles, radius)
    grid = rotation_grid(step, symmetry)
    found = _correlations(about, grid, group, coarse)
    order = np.argsort(-found)[: 30 * FINALISTS]
    chosen = suppress(
        torch.from_numpy(found[order])[None],
        torch.from_numpy(grid[order].as_quat()).float()[None],
        FINALISTS,
        1.2 * step,
        torch.from_numpy(np.atleast_2d(group.as_quat())).float(),
    )[0]
    climbed = [_climbed(about, grid[order[i]], group, step / 2, step / 4) for i in chosen[chosen >= 0].tolist()]
    rotation = max(climbed, key=lambda found: found[1])[0]
    for _ in range(2):
        centre_voxels = centre_voxels + _off_centre(about, rotation, group)
        about = Turnable(fine, seen, known, centre_voxels)
        rotation = _climbed(about, rotation, group, step / 8, LAST_STEP_DEGREES)[0]
    return Frame(rotation, centre_voxels)


def _elements(group: Rotation) -> Rotation:
    """Some elements of a group but the identity, no two of them inverse to each other."""
    quaternions = np.atleast_2d(group.as_quat(canonical=True))[1:]
    kept: list[NDArray[np.float64]] = []
    for q in quaternions:
        if not any(abs(float(q @ (other * [-1, -1, -1, 1]))) > 1 - 1e-6 for other in kept):
            kept.append(q)
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), ELEMENTS)).astype(int))
    return Rotation.from_quat(np.array(kept)[chosen])


def _correlations(about: Turnable, frames: Rotation, group: Rotation, count: int) -> NDArray[np.float64]:
    """q of each frame, on the first `count` components."""
    elements = _elements(group)
    own, known = about.values[:count].conj(), about.weights[:count]
    least = LEAST_KNOWN * float(known.square().sum()) * len(elements)
    step = max(1, _CHUNK // (count * len(elements)))
    parts = []
    for first in range(0, len(frames), step):
        some = frames[first : first + step]
        turns = Rotation.concatenate([some * element * some.inv() for element in elements])
        values, weights = about.turned(turns, count)
        agreed = (own * values).real.sum(dim=1).view(len(elements), -1).sum(dim=0)
        parts.append(agreed / ((known * weights).sum(dim=1).view(len(elements), -1).sum(dim=0) + least))
    return np.asarray(torch.cat(parts).double().numpy(), dtype=np.float64)


def _climbed(about: Turnable, frame: Rotation, group: Rotation, step: float, last: float) -> tuple[Rotation, float]:
    """The best frame nearby, and its q, by steps from `step` down to `last` degrees or less."""
    around = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    here = len(around) // 2
    while True:
        near = frame * Rotation.from_rotvec(np.radians(step) * around)
        found = _correlations(about, near, group, len(about.band))
        best = int(np.argmax(found))
        # About the axis of a Cn nothing but rounding tells frames apart, and one could go round forever.
        if found[best] > found[here] + LEAST_GAIN:
            frame = near[best]
        elif step <= last:
            return frame, float(found[here])
        else:
            step /= 2


def _off_centre(about: Turnable, frame: Rotation, group: Rotation) -> NDArray[np.float64]:
    """How far the symmetry's centre lies from what frames are turned about; 0 along an axis, which fixes nothing.

    A volume of symmetry g about d, turned by g about 0, has moved by g^-1 d - d.
    """
    elements = frame * _elements(group) * frame.inv()
    values, _ = about.turned(elements, len(about.band))
    moves = [_peak(volume_of(about.band, (v * about.values.conj())[None])[0].numpy()) for v in values]
    system = np.concatenate([g.inv().as_matrix() - np.eye(3) for g in elements])
    solution = np.linalg.lstsq(system, np.concatenate(moves), rcond=0.1)[0]
    return np.asarray(solution, dtype=np.float64)


def _peak(correlation: NDArray[np.float32], reach: int = 6) -> NDArray[np.float64]:
    """(x, y, z) of the highest value within `reach` voxels of the centre, between voxels by parabolas."""
    middle = correlation.shape[0] // 2
    reach = min(reach, middle - 2)
    inside = slice(middle - reach, middle + reach + 1)
    place = np.array(np.unravel_index(np.argmax(correlation[inside, inside, inside]), (2 * reach + 1,) * 3))
    place = place + middle - reach
    found = np.empty(3)
    for axis in range(3):
        step = np.zeros(3, dtype=int)
        step[axis] = 1
        low, here, high = (float(correlation[tuple(place + i * step)]) for i in (-1, 0, 1))
        bend = low - 2 * here + high
        found[axis] = place[axis] - middle + (0.5 * (low - high) / bend if bend < 0 else 0.0)
    return found[::-1].copy()
